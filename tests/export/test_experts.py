"""Adapters on mixtures of experts in plain peft, whose converter knows model types by name: the same function, or an error.

Slow: a model, three adapters and six loads for each model type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from running import LIBRARIES
from test_families import SAME, apart, outputs, trained

from spectrum_peft import export_lora
from spectrum_peft.tuner.retargeting import retargeted, types_in

pytestmark = LIBRARIES

# Whatever a config calls these sizes; a config takes those that it has.
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "num_dense_layers": 1,
    "n_group": 1, "topk_group": 1, "max_position_embeddings": 64, "layer_types": None, "mlp_layer_types": None,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {}, "olmoe": {}, "phimoe": {}, "minimax_m2": {}, "flex_olmo": {}, "dots1": {},
    "glm4_moe": {}, "ernie4_5_moe": {}, "solar_open": {}, "granitemoe": {}, "granitemoeshared": {}, "gpt_oss": {},
    "deepseek_v2": LATENT | {"head_dim": 8}, "deepseek_v3": LATENT, "glm4_moe_lite": LATENT,
}  # fmt: skip


def saved(kind: str, folder: Path) -> Any:
    known = transformers.AutoConfig.for_model(kind).to_dict()
    fields = {name: value for name, value in {**SIZES, **TYPES[kind]}.items() if name in known}
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return type(model)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["all", "no experts", "half"])
@pytest.mark.parametrize("kind", TYPES)
def test_plain_peft_computes_what_was_trained(kind: str, chosen: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "all": {"mode": "lora"},
        "no experts": {"mode": "lora", "exclude_modules": r".*\.experts\..*"},
        "half": {"mode": "spectra_qlora", "spectrum_ratio": 0.5},
    }[chosen]
    model_class = saved(kind, tmp_path / "base")
    inputs = {"input_ids": torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))}
    model = trained(tmp_path / "base", model_class, task_type="CAUSAL_LM", **options)
    wanted = outputs(model, inputs)
    assert apart(wanted, outputs(model_class.from_pretrained(tmp_path / "base"), inputs)) > 10 * SAME
    model.save_pretrained(tmp_path / "saved")
    export_lora(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        again = peft.PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / folder)
        assert apart(wanted, outputs(again, inputs)) < SAME


def test_a_part_of_a_model_is_asked_for_its_own_type() -> None:
    """peft asks the class that is open, which may be of a part of what config.json names."""
    part = {"model_type": "qwen3_omni_moe_thinker"}
    dense = ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"]
    moved = retargeted(types_in(part), dense)
    assert moved == {"model.layers.0.mlp.gate_proj"}  # as peft does it, see below
    assert retargeted(types_in({"model_type": "qwen3_omni_moe", "thinker_config": part}), dense) == moved
    assert not retargeted(types_in({"model_type": "llama"}), dense)
    config = peft.LoraConfig(target_modules=list(dense))
    model: Any = type("Model", (), {"config": type("Config", (), part)})
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of a fused pair
        return
    assert dense[0] not in config.target_modules
