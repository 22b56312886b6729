"""Laws of parameter names: kinds, roles, blocks, and matching across a base-model prefix."""

from __future__ import annotations

import random

import pytest
from architectures import ARCHITECTURES

from spectrum_peft import names

LLAMA = [
    f"model.layers.{i}.{part}.weight"
    for i in range(3)
    for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
] + ["model.embed_tokens.weight", "lm_head.weight"]


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "stack"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11, "model.layers"),
        ("h.0.attn.c_attn.weight", 0, "h"),
        ("decoder.block.5.layer.1.EncDecAttention.k.weight", 5, "decoder.block"),
        ("model.layers.2.mlp.experts.7.w1.weight", 2, "model.layers"),
        ("model.embed_tokens.weight", None, None),
        ("classifier.0.weight", None, None),
        ("lm_head.2.weight", None, None),
    ],
)
def test_the_block_is_the_first_number_outside_a_head(name: str, block: int | None, stack: str | None) -> None:
    assert names.block_index(name) == block
    assert names.stack(name) == stack


def test_a_module_is_what_holds_the_parameter() -> None:
    assert names.module_name("model.layers.0.mlp.down_proj.weight") == "model.layers.0.mlp.down_proj"
    assert names.module_name("model.layers.0.mlp.experts.gate_up_proj") == "model.layers.0.mlp.experts"


# --- kinds -----------------------------------------------------------------------------------------------------------


def test_a_kind_is_the_name_without_numbers_and_weight() -> None:
    kinds = names.kinds(LLAMA)
    assert kinds["model.layers.2.self_attn.q_proj.weight"] == "self_attn.q_proj"
    assert kinds["model.layers.0.input_layernorm.weight"] == "input_layernorm"
    assert kinds["model.embed_tokens.weight"] == "model.embed_tokens"


def test_kinds_do_not_depend_on_the_order_and_keep_it() -> None:
    shuffled = random.Random(0).sample(LLAMA, len(LLAMA))
    assert names.kinds(shuffled) == names.kinds(LLAMA)
    assert list(names.kinds(shuffled)) == shuffled


def test_two_stacks_keep_what_tells_them_apart() -> None:
    kinds = names.kinds(
        [
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "decoder.block.0.layer.0.SelfAttention.q.weight",
            "decoder.block.1.layer.1.EncDecAttention.q.weight",
        ]
    )
    assert list(kinds.values()) == ["encoder.SelfAttention.q", "decoder.SelfAttention.q", "decoder.EncDecAttention.q"]


def test_two_lists_under_one_owner_are_told_apart_by_their_own_names() -> None:
    kinds = names.kinds(["model.early.0.q.weight", "model.late.0.q.weight"])
    assert list(kinds.values()) == ["early.q", "late.q"]


def test_a_head_with_numbers_is_no_second_stack() -> None:
    kinds = names.kinds([*LLAMA, "classifier.0.weight", "classifier.2.weight"])
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "self_attn.q_proj"
    assert kinds["classifier.2.weight"] == "classifier.2"


def test_a_bias_is_another_kind_than_its_weight() -> None:
    kinds = names.kinds(["h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"])
    assert kinds == {"h.0.attn.c_attn.weight": "attn.c_attn", "h.0.attn.c_attn.bias": "attn.c_attn.bias"}


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.layers.0.mlp.down_proj.weight", (8, 16), "linear"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 16, 8), "linear"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 16), "bias"),
        ("model.layers.0.mlp.gate.weight", (4, 8), "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), "router"),
        ("model.layers.0.mlp.gate_proj.weight", (16, 8), "linear"),
        ("model.layers.0.self_attn.q_norm.weight", (8,), "norm"),
        ("model.layers.0.self_attn.q_proj.bias", (8,), "bias"),
        ("model.layers.0.mixer.A_log", (16, 4), "other"),
        ("model.layers.0.mixer.conv1d.weight", (16, 1, 4), "other"),
        ("bert.pooler.dense.weight", (8, 8), "linear"),
        ("bert.embeddings.position_embeddings.weight", (32, 8), "embedding"),
        ("transformer.wpe.weight", (32, 8), "embedding"),
        ("shared.weight", (32, 8), "embedding"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "embedding"),
        ("lm_head.weight", (32, 8), "head"),
        ("embed_out.weight", (32, 8), "head"),
        ("classifier.0.weight", (8, 8), "head"),
        ("classifier.dense.bias", (8,), "bias"),
        ("model.layers.0.score.weight", (8, 8), "linear"),
        ("model.norm.weight", None, "norm"),
        ("transformer.h.0.ln_1.weight", None, "norm"),
        ("model.layers.0.self_attn.q_proj.weight", None, "linear"),
    ],
)
def test_roles(name: str, shape: tuple[int, ...] | None, role: str) -> None:
    assert names.role(name, shape) == role
    assert role in names.ROLES


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_role_is_what_the_module_says(family: str) -> None:
    """Names alone, as in a file's header, come to what the classes of the modules show."""
    from torch import nn

    model = ARCHITECTURES[family].build()
    output = model.get_output_embeddings()
    seen = set()
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        name = f"{path}.weight"
        role = names.role(name, weight.shape)
        seen.add(role)
        if isinstance(module, nn.Embedding):
            assert role == "embedding", name
        elif module is output or path.startswith("classifier"):
            assert role == "head", name
        elif weight.ndim == 1:
            assert role == "norm", name
        elif "gate" in type(module).__name__.lower() or "router" in type(module).__name__.lower():
            assert role == "router", name
        else:
            assert role == "linear", name
    assert {"linear", "norm"} <= seen


# --- one tensor under two heads --------------------------------------------------------------------------------------


def test_canonical_names_do_not_see_the_prefix() -> None:
    assert names.canonical("bert.encoder.layer.0.output.dense.weight") == "layer.0.output.dense.weight"
    assert names.canonical("encoder.layer.0.output.dense.weight") == "layer.0.output.dense.weight"
    assert names.canonical("bert.pooler.dense.weight") is None
    assert names.canonical("classifier.0.weight") is None


def test_names_align_across_a_prefix_in_both_directions() -> None:
    bare = ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight", "wte.weight"]
    full = [f"transformer.{name}" for name in bare]
    assert names.align(bare, full) == dict(zip(bare, full, strict=True))
    assert names.align(full, bare) == dict(zip(full, bare, strict=True))
    assert names.align(full, full) == {name: name for name in full}


def test_a_name_that_fits_two_is_matched_to_neither() -> None:
    assert names.align(["q.weight"], ["encoder.q.weight", "decoder.q.weight"]) == {}
    assert names.align(["model.layers.9.q.weight"], ["model.layers.0.q.weight"]) == {}
    assert names.align(["language.layers.0.q.weight", "vision.layers.0.q.weight"], ["layers.0.q.weight"]) == {}
