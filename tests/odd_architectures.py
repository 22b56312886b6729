"""Tiny models of families that are no plain decoders: other names in the files, ties inside, towers, experts, heads with parts.

One builder each, `ODD_ARCHITECTURES[name]() -> (class, config, inputs)`; the inputs have labels where the class computes a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 96
WIDTH = 32
_BLOCKS = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {"vocab_size": VOCABULARY, **_BLOCKS}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_VISION = {**_BLOCKS, "image_size": 32, "patch_size": 8}

Built = tuple[Any, Any, dict[str, Any]]
ODD_ARCHITECTURES: dict[str, Callable[[], Built]] = {}


def _family(build: Callable[[], Built]) -> Callable[[], Built]:
    ODD_ARCHITECTURES[build.__name__] = build
    return build


def _tokens() -> Any:
    import torch

    return torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(3))


def _language() -> dict[str, Any]:
    ids = _tokens()
    return {"input_ids": ids, "labels": ids}


@_family
def llava() -> Built:
    """Names in the files are those of an older class: `language_model.model.layers`."""
    import transformers as t

    vision = {"model_type": "clip_vision_model", **_VISION}
    config = t.LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **_DECODER}, image_token_index=90)
    return t.LlavaForConditionalGeneration, config, _language()


@_family
def vit_classifier() -> Built:
    """Blocks are renamed on loading."""
    import torch
    import transformers as t

    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    inputs = {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    return t.ViTForImageClassification, t.ViTConfig(**_VISION, num_labels=3), inputs


@_family
def qwen3_next() -> Built:
    """One tensor for each expert in the files, one for all in the model; linear attention; a shared expert."""
    import transformers as t

    config = t.Qwen3NextConfig(
        **_DECODER, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    return t.Qwen3NextForCausalLM, config, _language()


@_family
def deepseek_v3() -> Built:
    """A dense MLP in the first block, experts and shared experts after it, with the same names of projections."""
    import transformers as t

    config = t.DeepseekV3Config(
        **{**_TEXT, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return t.DeepseekV3ForCausalLM, config, _language()


@_family
def granite_moe() -> Built:
    """Experts and router have other names in the files."""
    import transformers as t

    config = t.GraniteMoeConfig(
        **{k: v for k, v in _DECODER.items() if k != "head_dim"}, num_local_experts=4, num_experts_per_tok=2
    )
    return t.GraniteMoeForCausalLM, config, _language()


@_family
def nomic_bert() -> Built:
    """Query, key and value are one tensor in the files and three in the model; the head is tied."""
    import transformers as t

    return t.NomicBertForMaskedLM, t.NomicBertConfig(**_TEXT), _language()


@_family
def zamba2() -> Built:
    """A block that lies in the model at two places."""
    import transformers as t

    config = t.Zamba2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2, num_attention_heads=4, num_key_value_heads=4, attention_head_dim=16,
        mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1,
        adapter_rank=4, use_shared_attention_adapter=False,
    )  # fmt: skip
    return t.Zamba2ForCausalLM, config, _language()


@_family
def bart() -> Built:
    """Three tables and the head are one tensor."""
    import transformers as t

    config = t.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    return t.BartForConditionalGeneration, config, _language()


@_family
def roberta_mlm() -> Built:
    """A tied head with parts, one of which is as wide as the model."""
    import transformers as t

    return t.RobertaForMaskedLM, t.RobertaConfig(**_TEXT), _language()


@_family
def qwen3_5() -> Built:
    """A vision-language model whose text part has a class of its own."""
    import transformers as t

    text = {
        **_DECODER, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": WIDTH, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": WIDTH,
        "patch_size": 4, "num_position_embeddings": 16,
    }  # fmt: skip
    return t.Qwen3_5ForConditionalGeneration, t.Qwen3_5Config(text_config=text, vision_config=vision), _language()


@_family
def mamba() -> Built:
    """Projections whose weight a fused kernel reads without calling the layer; the head is tied."""
    import transformers as t

    config = t.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, state_size=8, time_step_rank=4
    )
    return t.MambaForCausalLM, config, _language()


def saved(name: str, folder: Path, seed: int = 0, **fields: Any) -> Any:
    """A family's model with random weights, saved to a folder as the hub would have it; returns its class.

    Args:
        fields: of its config that are other than usual.
    """
    import torch

    kind, config, _ = ODD_ARCHITECTURES[name]()
    for field, value in fields.items():
        setattr(config, field, value)
    torch.manual_seed(seed)
    model = kind(config).float()
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros, which would hide a missing path
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    return kind
