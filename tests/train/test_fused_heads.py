"""TRL's step on classes that say in other words what it asks: it gives the loss that the class itself gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from running import LIBRARIES
from trl.trainer.utils import add_fused_lm_head

from spectrum_peft.train.fused_heads import found_by_trl

pytestmark = LIBRARIES
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **SIZES, head_dim=8, intermediate_size_mlp=48, no_rope_layers=[1, 0], attn_temperature_tuning=False,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


def granite() -> Any:
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**SIZES, output_router_logits=True))


@pytest.mark.parametrize("build", [llama4, granite])
def test_the_loss_is_the_one_of_the_class(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().float().eval()
    ids = torch.randint(3, 90, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    wanted = model(**batch).loss
    add_fused_lm_head(model)
    with pytest.raises(AttributeError):  # what the context is for
        model(**batch, fused_lm_head=True)
    with found_by_trl(model):
        torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, wanted)
        model.config.save_pretrained(tmp_path)
    assert "num_experts" not in (tmp_path / "config.json").read_text().replace("num_experts_per_tok", "")
    assert "base_model_prefix" not in vars(model) and not hasattr(model.config, "num_experts")
