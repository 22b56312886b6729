"""Running statistics are no parameters: under an adapter they stay the base's, in a plain model they are those of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from peft import PeftModel, get_peft_model

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, merge_into_base

KIND = transformers.Wav2Vec2ConformerForCTC
# One float32 rounding for each of the products and sums of a block, of values about 1.
ROUNDED = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that hears, whose batch norms have seen other sounds than those of `sounds`."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2ConformerConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, conv_dim=(16,),
        conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1, conv_depthwise_kernel_size=3,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, conformer_conv_dropout=0.0, layerdrop=0.0,
        mask_time_prob=0.0,
    )  # fmt: skip
    model = KIND(config).train()
    model(input_values=3 * torch.randn(2, 400) + 1)
    assert statistics(model)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sounds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_values": torch.randn(2, 400, generator=generator), "labels": torch.tensor([[3, 4], [5, 6]])}


def statistics(source: Any) -> dict[str, torch.Tensor]:
    """{name in the base model: running mean, variance, or number of batches}."""
    state = source if isinstance(source, dict) else source.state_dict()
    wanted = ("running_mean", "running_var", "num_batches_tracked")
    return {n.removeprefix("base_model.model."): t.clone() for n, t in state.items() if n.endswith(wanted)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(t, b[n]) for n, t in a.items())


def train(model: Any) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**sounds()).loss.backward()
        optimizer.step()


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    return model.eval()(**sounds()).logits


@pytest.mark.parametrize("mode", ["spectra_qlora", "spectrum"])
def test_an_adapter_leaves_the_statistics_to_the_base(mode: str, folder: Path, tmp_path: Path) -> None:
    before = statistics(safetensors.torch.load_file(folder / "model.safetensors"))
    plain = outputs(KIND.from_pretrained(folder))
    model = get_peft_model(KIND.from_pretrained(folder), SpectrumConfig(mode=mode, spectrum_ratio=0.5))
    train(model)
    assert same(statistics(model), before)
    after = outputs(model)
    assert not torch.allclose(after, plain, **ROUNDED)
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(KIND.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(outputs(again), after, **ROUNDED)
    for source, out in ((tmp_path / "adapter", "from folder"), (model, "from memory")):
        merge_into_base(source, folder, tmp_path / out)
        assert same(statistics(safetensors.torch.load_file(tmp_path / out / "model.safetensors")), before)
        torch.testing.assert_close(outputs(KIND.from_pretrained(tmp_path / out)), after, **ROUNDED)


def test_a_plain_model_moves_its_statistics_as_torch_does_and_saves_them(folder: Path, tmp_path: Path) -> None:
    config = SpectrumConfig(mode="spectrum", spectrum_ratio=0.5)
    model, _ = load_model_with_spectrum(str(folder), config, dtype="float32")
    name, norm = next((n, m) for n, m in model.named_modules() if hasattr(m, "running_mean"))
    means: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, given: means.append(given[0].detach().mean((0, 2))))
    wanted = norm.running_mean.clone()
    train(model)
    for mean in means:
        wanted = (1 - norm.momentum) * wanted + norm.momentum * mean
    torch.testing.assert_close(norm.running_mean, wanted, **ROUNDED)
    assert len(means) == 2 and int(norm.num_batches_tracked) == 3
    model.save_pretrained(tmp_path / "trained")
    again = KIND.from_pretrained(tmp_path / "trained")
    assert same(statistics(again), statistics(model))
    assert torch.equal(dict(again.named_modules())[name].running_mean, norm.running_mean)
    torch.testing.assert_close(outputs(again), outputs(model), **ROUNDED)
