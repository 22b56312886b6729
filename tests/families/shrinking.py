"""Small configs of any class of transformers: the fields that say sizes are made small, by what their names mean."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from transformers import CONFIG_MAPPING

DROP = object()

VOCABULARY = 128
WIDTH = 64
INNER = 96
LAYERS = 2
POSITIONS = 128
IMAGE = 32

# Value -> the fields that mean it, in the order in which they are asked; a star stands for any letters. Widths are multiples
# of 32, which bitsandbytes' CPU kernels want.
_MEANINGS: tuple[tuple[float, str], ...] = (
    # vocabularies and positions
    (VOCABULARY, "vocab_size *_vocab_size vocab_size_per_layer_input vocab_size_per_code"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions seq_len "
        "max_source_positions max_2d_position_embeddings max_text_len",
    ),
    (16, "sliding_window attention_window_size local_attention attention_chunk_size"),
    # layers
    (0, "num_nextn_predict_layers num_kv_shared_layers num_sparse_encoder_layers num_sparse_decoder_layers"),
    (1, "first_k_dense_replace num_dense_layers n_dense_layers moe_layer_start_index"),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers depth num_blocks n_blocks *encoder_layers *decoder_layers text_layers "
        "vision_layers audio_layers *_hidden_layers num_block_layers x_layers r_layers l_layers",
    ),
    # heads
    (2, "*num_key_value_heads *n_key_value_heads *num_kv_heads *n_kv_heads num_key_value_groups"),
    (8, "n_mamba_heads mamba_n_heads mamba_num_heads"),
    (2, "linear_num_key_heads"),
    (4, "linear_num_value_heads *attention_heads *num_heads *n_heads *n_head"),
    (
        16,
        "head_dim attention_head_dim global_head_dim kv_channels d_kv d_head attention_head_size qk_head_dim head_width "
        "qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_headdim "
        "mamba_head_dim",
    ),
    # as wide as rows of a matrix: 4-bit rows of other than 32 values are refused on CPUs
    (32, "q_lora_rank kv_lora_rank o_lora_rank"),
    # experts
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_top_k topk top_k top_k_experts moe_k num_selected_experts "
        "num_activated_experts",
    ),
    (
        1,
        "n_group topk_group n_groups num_expert_group num_limited_groups n_shared_experts num_shared_expert "
        "num_shared_experts moe_num_shared_experts mamba_n_groups mamba_ngroups n_mamba_groups",
    ),
    (4, "*num_experts *num_local_experts *n_routed_experts *num_routed_experts *num_moe_experts"),
    (
        32,
        "moe_intermediate_size moe_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size expert_intermediate_size expert_dim "
        "moe_shared_intermediate_size",
    ),
    # state-space models, turned parts of heads, windows
    (16, "state_size d_state mamba_d_state ssm_state_size"),
    (8, "chunk_size mamba_chunk_size rotary_dim"),
    (2 * WIDTH, "mamba_d_ssm"),
    (2, "window_size mask_time_length mask_feature_length"),
    (
        0.0,
        "*dropout *drop_prob *drop_rate *layerdrop *drop_path_rate *_pdrop *dropout_* mask_time_prob mask_feature_prob",
    ),
    # widths
    (
        INNER,
        "*intermediate_size *ffn_dim *ffn_hidden_size *mlp_dim *inner_dim *feed_forward_size *intermediate_dim *d_ff *d_inner "
        "*ffn_size hidden_dim_ffn linear_units *intermediate_size_mlp n_inner",
    ),
    (
        WIDTH,
        "hidden_size d_model n_embd embed_dim dim hidden_dim embedding_size emb_dim decoder_hidden_size encoder_hidden_size "
        "out_hidden_size model_dim projection_dim projector_hidden_size text_hidden_size vision_hidden_size "
        "word_embed_proj_dim embedding_dim lru_width proj_dim projection_size decoder_dim encoder_dim output_dim "
        "hidden_channels cross_attention_hidden_size d_embed true_hidden_size hidden_size_per_layer_input "
        "attention_hidden_size attention_dim classifier_hidden_size classifier_proj_size initial_hidden_size",
    ),
    # pictures and sounds
    (IMAGE, "image_size"),
    (8, "patch_size spatial_patch_size"),
    (16, "num_mel_bins input_feat_per_channel num_mel"),
    (4, "num_query_tokens num_queries num_latents query_length"),
)


@functools.cache
def meaning_of(field: str) -> float | None:
    """The small value of a field of a config; None where its name says nothing."""
    return next((value for value, words in _MEANINGS if any(fnmatchcase(field, w) for w in words.split())), None)


# Lists with a number for each stage or layer of a hierarchy; each of their numbers becomes this.
_LISTS: tuple[tuple[str, Any], ...] = (
    (r"^(depths|num_blocks|layers_per_block|stage_num_blocks|num_res_blocks|encoder_depths|depth)$", 1),
    (r"(num|n)_(attention_)?heads$|^num_groups$|^heads$", 2),
    (r"dim(s)?$|^hidden_sizes$|channels$|^hidden_size$|^widths$|^d_model$|^out_features_list$", WIDTH),
)
_SPECIAL = re.compile(r"(_token|_token_id|_id|_index|_idx)$")
_FIRST_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "unk_token_id": 3}


def small(config_class: Any, /, **wanted: Any) -> Any:
    """A config with few small layers.

    Args:
        wanted: fields whose values the names cannot tell, `DROP` for one that stays as it is; a mapping for a config inside
            it is merged into what is made small there, its `model_type` names the class.
    """
    default = config_class()
    inside = getattr(config_class, "sub_configs", {})
    values: dict[str, Any] = {}
    known = set(inspect.signature(config_class.__init__).parameters) | set(vars(default))
    taken = iter(range(VOCABULARY - 1, 0, -1))
    layers = _get(default, "num_hidden_layers")
    for field in sorted(known - set(inside) - {"kwargs", "self"}):
        value = _get(default, field)
        if isinstance(value, bool) or field.startswith("_"):
            continue
        if field in _FIRST_IDS:
            if value is not None:
                values[field] = _FIRST_IDS[field]
        elif isinstance(value, int | float):
            meant = meaning_of(field)
            if meant is not None and value > meant:
                values[field] = meant
            elif meant is None and isinstance(value, int) and value >= VOCABULARY and _SPECIAL.search(field):
                values[field] = next(taken)
        elif value is None and field in ("head_dim", "n_inner"):
            values[field] = meaning_of(field)
        elif isinstance(value, list | tuple) and value:
            values |= _shorter(field, value, layers)
        elif isinstance(value, dict) and "mrope_section" in value:
            values[field] = value
    for alias, field in getattr(config_class, "attribute_map", {}).items():
        if alias in values and field in known:
            values[field] = values.pop(alias)
    if "kv_lora_rank" in values:  # the width of a head follows from its parts; every head has keys of its own
        values.pop("head_dim", None)
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = 4
    for field, kind in inside.items():
        given, part = wanted.pop(field, {}), _get(default, field)
        if not isinstance(given, Mapping):
            values[field] = given
            continue
        given = dict(given)
        named = given.pop("model_type", None)
        if named is not None:
            kind = CONFIG_MAPPING[named]
        elif part is not None and not isinstance(part, dict):
            kind = type(part)
        elif not given:
            continue
        values[field] = small(kind, **given)
    if getattr(default, "is_encoder_decoder", False) and not inside:
        values = {"pad_token_id": 0, "decoder_start_token_id": 1} | values
    values |= wanted
    for field, value in values.items():  # sections of a head's angles, which add up to half of what is turned
        if isinstance(value, dict) and "mrope_section" in value and field not in wanted:
            share = value.get("partial_rotary_factor") or getattr(default, "partial_rotary_factor", None) or 1.0
            half = int((values.get("head_dim") or WIDTH // 4) * share) // 2
            values[field] = {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return config_class(**{name: value for name, value in values.items() if value is not DROP})


def _get(config: Any, field: str) -> Any:
    try:
        return getattr(config, field, None)
    except Exception:  # a field that differs from layer to layer asks to be read there
        return None


def _shorter(field: str, value: Sequence[Any], layers: int | None) -> dict[str, Any]:
    """A list with an entry for each layer cut to the layers that stay, with numbers made small; nothing for other lists."""
    first = value[0]
    if isinstance(first, str):
        return {field: some_of_each(value, LAYERS)} if len(value) == layers or field.endswith("layer_types") else {}
    if not isinstance(first, int) or isinstance(first, bool):
        return {field: list(value[:LAYERS])} if len(value) == layers else {}
    meant = next(
        (v for pattern, v in _LISTS if re.search(pattern, field)), meaning_of(field) if len(value) == layers else None
    )
    cut = value[:LAYERS] if len(value) == layers else value
    return (
        {field: type(value)(cut if meant is None else [min(v, meant) for v in cut])}
        if meant or len(value) == layers
        else {}
    )


def some_of_each(kinds: Sequence[Any], count: int) -> list[Any]:
    """`count` layers, of as many kinds as there are."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[i % len(distinct)] for i in range(count)]
