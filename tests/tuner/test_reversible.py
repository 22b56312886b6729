"""Models that compute gradients by themselves: what trains gets the gradient that it has where everything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model

from spectrum_peft import SpectrumConfig, load_model_with_spectrum

KIND = transformers.ReformerModelWithLMHead


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        vocab_size=96, hidden_size=32, feed_forward_size=48, attn_layers=["local", "local"], num_attention_heads=2,
        is_decoder=True, attention_head_size=16, axial_pos_embds=False, max_position_embeddings=64, local_attn_chunk_length=4,
        hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    KIND(config).save_pretrained(tmp_path)
    return tmp_path


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_real_weights_get_the_gradient_of_the_whole_model(folder: Path) -> None:
    whole = gradients(KIND.from_pretrained(folder, dtype=torch.float32))
    model, _ = load_model_with_spectrum(
        str(folder), SpectrumConfig(mode="spectrum", spectrum_ratio=0.5), dtype="float32"
    )
    mine = gradients(model)
    assert 0 < len(mine) < len(whole)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, whole[name])


def test_an_adapter_gets_a_gradient(folder: Path) -> None:
    model = get_peft_model(KIND.from_pretrained(folder, dtype=torch.float32), SpectrumConfig(mode="lora", r=4))
    found = gradients(model)
    assert all(g is not None for g in found.values())
    assert all(bool(g.any()) for n, g in found.items() if "lora_B" in n)
