"""The families of the sweep: every model type of the installed transformers that has a class with a head, as a tiny model.

`LISTED` is made from transformers' own tables of classes, so a type that a new release brings is there by itself. What sizes
and inputs the names of the fields cannot tell stands in `FIELDS` and `INPUTS`; what cannot be built here in `LEFT_OUT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from inputs import inputs_for
from shrinking import DROP, IMAGE, WIDTH, small
from transformers import CONFIG_MAPPING
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

# Where a type has several heads, the first of these tasks decides.
TASKS = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "CTC",
    "IMAGE_CLASSIFICATION", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "TOKEN_CLASSIFICATION",
    "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "PRETRAINING",
)  # fmt: skip

# Angles of a head of 16 for time, height and width.
ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_BLOCKS = {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 32, 64, 64], "layer_scale_init_value": 0.5}
_INDEXED = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "hc_lowrank": 16,
}  # fmt: skip
_SLIDING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
    "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_qk_rope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
_SPEECH = {"num_filters": 32, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
_MAMBA_OR_ATTENTION = ["mamba", "attention"]

# Sizes that the names of the fields do not tell.
FIELDS: dict[str, dict[str, Any]] = {
    "altclip": {"text_config": {"project_dim": WIDTH}},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "blip-2": {"image_token_index": 100},
    "blt": {
        "encoder_hash_byte_group_vocab": 97, "encoder_hash_byte_group_size": [3],
    },
    "canary": {"pad_token_id": 0},
    "chameleon": {
        "vocabulary_map": {"<image>": 100, "IMGIMGAZ": 101},
        "vq_config": {
            "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "resolution": 32, "latent_channels": 32,
            "embed_dim": 16, "num_embeddings": 16, "attn_resolutions": [],
        },
    },
    "cohere_asr": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "colqwen2": {"vlm_config": {"text_config": {"rope_parameters": ROTATED}}},
    "convnext": {**_BLOCKS, "num_stages": 4},
    "convnextv2": {**_BLOCKS, "num_stages": 4},
    "cpmant": {"dim_ff": 96, "dim_head": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dinov3_convnext": {"layer_scale_init_value": 0.5},
    "dots1": {
        "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2, "head_dim": 16, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2,
    },
    "dots3_note": {
        "text_config": _SLIDING,
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": _SLIDING,
    "dpt": {
        "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [32] * 4, "fusion_hidden_size": 32,
        "use_auxiliary_head": False,
    },
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|extra_200|>": 101, **{f"<|visual token {i:06}|>": 40 + i for i in range(8)}},
        "vq_config": {
            "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "codebook_size": 8, "latent_channels": 4,
            "embed_dim": 4,
        },
    },
    "encoder-decoder": {"decoder_start_token_id": 1, "pad_token_id": 0},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4, "vocab_size": 128},
    "fsmt": {"src_vocab_size": 128, "tgt_vocab_size": 128},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": WIDTH // 4}},
    "glm46v": {"text_config": {"rope_parameters": ROTATED}},
    "glm4v": {"text_config": {"rope_parameters": ROTATED}},
    "glm4v_moe": {"text_config": {"rope_parameters": {**ROTATED, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}},
    "glm_ocr": {"text_config": {"rope_parameters": ROTATED}},
    "glmga": {"text_config": {"rope_parameters": ROTATED}},
    "granite4_vision": {
        "image_grid_pinpoints": [[IMAGE, IMAGE]], "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0, 1, 0, 1],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": _MAMBA_OR_ATTENTION},
    "hunyuan_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}},
    },
    "inkling2_text": {"vocab_size": 128, "unpadded_vocab_size": 128},
    "instructblip": {"image_token_index": 100},
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "visual_embed": False},
    "levit": {
        "hidden_sizes": [32, 64, 64], "key_dim": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "image_size": 64, "patch_size": 16,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 96},
    "longcat_flash": {"num_hidden_layers": 4, "num_layers": 2, "qk_head_dim": DROP, "head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32, "num_attention_heads": 2},
    "mobilevit": {"image_size": 64},
    "mobilevitv2": {"image_size": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": WIDTH}},
    "moonshine": {"decoder_num_key_value_heads": 4, "encoder_num_key_value_heads": 4, "pad_token_id": 0},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": _MAMBA_OR_ATTENTION},
    "paddleocr_vl": {"text_config": {"rope_parameters": ROTATED}},
    "perceiver": {"d_latents": 32, "num_latents": 4, "d_model": 64, "num_self_attends_per_block": 1},
    "qwen2_5_vl": {"text_config": {"rope_parameters": ROTATED}},
    "qwen2_vl": {"text_config": {"rope_parameters": ROTATED}},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "shape_vocab_size": 128, "shape_embed_dim": 32, "pronunciation_vocab_size": 128, "pronunciation_embed_dim": 32,
    },
    "sam": {"vision_config": {"output_channels": WIDTH, "num_pos_feats": WIDTH // 2}},
    "sam_hq": {"vision_config": {"output_channels": WIDTH, "num_pos_feats": WIDTH // 2}},
    "segformer": {
        **_BLOCKS, "num_attention_heads": [1, 2, 2, 4], "num_encoder_blocks": 4, "sr_ratios": [8, 4, 2, 1],
        "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2], "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 32,
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "swinv2": {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2]},
    "textnet": {"image_size": [64, 64]},
    "timesfm2_5": {"output_quantile_len": 64},
    "vibevoice": {"semantic_model_config": _SPEECH, "audio_config": _SPEECH},
    "vibevoice_asr": {
        "semantic_tokenizer_encoder_config": _SPEECH, "acoustic_tokenizer_encoder_config": _SPEECH,
    },
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xlstm": {"head_dim": DROP, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 4},
    "xmod": {"default_language": "en_XX"},
    "yolos": {"image_size": [IMAGE, IMAGE]},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32,
        "attention_hidden_size": 128, "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_headdim": 16,
        "num_key_value_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 128, "adapter_rank": 8,
        "num_mem_blocks": 1, "use_shared_attention_adapter": False,
    },
}  # fmt: skip


def _tokens(*shape: int) -> Any:
    return torch.randint(4, 90, shape, generator=torch.Generator().manual_seed(5))


def _noise(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def _pictures(config: Any) -> dict[str, Any]:
    return {"pixel_values": _noise(2, 3, IMAGE, IMAGE)}


def _questioned(config: Any) -> dict[str, Any]:
    """A picture whose places are filled by four queries, and a question."""
    ids = torch.cat([torch.full((2, 4), 100), _tokens(2, 8)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **_pictures(config)}


def _one_row(config: Any) -> dict[str, Any]:
    """A row alone, which needs no filling."""
    return {
        "input_ids": _tokens(1, 12),
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
        "labels": torch.tensor([1]),
    }


def _ended(config: Any) -> dict[str, Any]:
    """Rows that end as the model wants."""
    ids = torch.cat([_tokens(2, 11), torch.full((2, 1), config.eos_token_id)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# Inputs that `forward`'s signature does not tell; None takes one away.
INPUTS: dict[str, Callable[[Any], Mapping[str, Any]]] = {
    "altclip": _pictures,
    "chinese_clip": _pictures,
    "clipseg": _pictures,
    "tipsv2": _pictures,
    "bert/multiple_choice": lambda config: {
        "input_ids": _tokens(2, 2, 12), "attention_mask": None, "labels": torch.tensor([0, 1]),
    },
    "seamless_m4t": lambda config: {"input_features": _noise(2, 24, 160), "attention_mask": None},
    "seamless_m4t_v2": lambda config: {"input_features": _noise(2, 24, 160), "attention_mask": None},
    "wav2vec2-bert": lambda config: {"input_features": _noise(2, 24, 160)},
    "audio-spectrogram-transformer": lambda config: {"input_values": _noise(2, config.max_length, config.num_mel_bins)},
    "videoprism": lambda config: {"pixel_values_videos": _noise(2, 2, 3, IMAGE, IMAGE)},
    "videoprism_vision_model": lambda config: {"pixel_values_videos": _noise(2, 2, 3, IMAGE, IMAGE), "pixel_values": None},
    "omniasr_ctc": lambda config: {
        "input_values": _noise(2, 1, 1600), "attention_mask": torch.ones(2, 1600, dtype=torch.long),
    },
    "blip-2": _questioned,
    "fsmt": lambda config: {"labels": _tokens(2, 12)},
    "git": _pictures,
    "parakeet_ctc": lambda config: {"attention_mask": torch.ones(2, 48, dtype=torch.long)},
    "lasr_ctc": lambda config: {"attention_mask": torch.ones(2, 48, dtype=torch.long)},
    "perceiver": lambda config: {"pixel_values": None, "inputs": _noise(2, 3, 224, 224)},
    "lxmert": lambda config: {
        "visual_feats": _noise(2, 4, config.visual_feat_dim), "visual_pos": _noise(2, 4, 4), "labels": _tokens(2, 12),
    },
    "visual_bert": lambda config: {"visual_embeds": _noise(2, 4, config.visual_embedding_dim), "labels": None},
    "pix2struct": lambda config: {"flattened_patches": _noise(2, 4, 2 + 3 * 64), "pixel_values": None},
    "pi0": lambda config: {"state": _noise(2, config.max_state_dim)},
    "instructblip": lambda config: {**_questioned(config), "qformer_input_ids": _tokens(2, 8)},
    "idefics": lambda config: {"pixel_values": _noise(2, 1, 3, IMAGE, IMAGE)},
    "splinter": lambda config: {
        "start_positions": torch.tensor([[1], [2]]), "end_positions": torch.tensor([[3], [4]]),
        "question_positions": torch.tensor([[2], [3]]),
    },
    "siglip2": lambda config: {
        "pixel_values": _noise(2, 16, 3 * config.vision_config.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long), "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "clip/zero_shot_image_classification": _pictures,
    "siglip/zero_shot_image_classification": _pictures,
    "llama/sequence_classification": _one_row,
    "gpt2/sequence_classification": _one_row,
    "bart/sequence_classification": _ended,
    "t5/sequence_classification": _ended,
    "vjepa2": lambda config: {"pixel_values_videos": _noise(2, 2, 3, IMAGE, IMAGE)},
    "timesfm2_5": lambda config: {"past_values": _noise(2, 64)},
    "udop": lambda config: {"bbox": torch.zeros(2, 12, 4)},
    "molmo2": lambda config: {"mm_token_type_ids": torch.zeros(2, 12, dtype=torch.long)},
    "aimv2": _pictures,
    "groupvit": _pictures,
    "vilt": _pictures,
    "diffusion_gemma": lambda config: {"self_conditioning_logits": _noise(2, 12, 128)},
    "patchtsmixer": lambda config: {"past_values": _noise(2, config.context_length, config.num_input_channels)},
    "patchtst": lambda config: {"past_values": _noise(2, config.context_length, config.num_input_channels)},
    "timesfm": lambda config: {"past_values": _noise(2, 64)},
}  # fmt: skip

# Types that this list leaves out -> why.
LEFT_OUT: dict[str, str] = {}


@dataclass(frozen=True)
class Family:
    """A model type with one of its classes."""

    name: str
    model_type: str
    task: str
    class_name: str
    saved_as: str | None = None  # the class that wrote the checkpoint, where it is another

    @property
    def kind(self) -> Any:
        return getattr(transformers, self.class_name)

    def config(self) -> Any:
        return small(CONFIG_MAPPING[self.model_type], **FIELDS.get(self.model_type, {}))

    def build(self) -> Any:
        return getattr(transformers, self.saved_as or self.class_name)(self.config()).float()

    def inputs(self, model: Any) -> dict[str, Any]:
        given = inputs_for(model) | INPUTS.get(self.name, lambda config: {})(model.config)
        return {name: value for name, value in given.items() if value is not None}


def _listed() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for task in TASKS:
        for model_type, classes in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            if model_type not in found and model_type not in LEFT_OUT:
                class_name = classes if isinstance(classes, str) else classes[0]
                found[model_type] = Family(model_type, model_type, task, class_name)
    return dict(sorted(found.items()))


# Other heads of types above: heads with parts, poolers; and text classes on the checkpoint of a model that sees.
HEADS = {
    "SEQUENCE_CLASSIFICATION": (
        "llama", "gemma3_text", "bert", "roberta", "distilbert", "albert", "deberta-v2", "electra", "modernbert", "mpnet",
        "mobilebert", "longformer", "xlnet", "fnet", "funnel", "squeezebert", "big_bird", "bart", "gpt2", "t5",
    ),
    "TOKEN_CLASSIFICATION": ("qwen3", "bert", "modernbert"),
    "QUESTION_ANSWERING": ("bert",),
    "MULTIPLE_CHOICE": ("bert",),
    "MASKED_LM": ("bert", "xlm-roberta"),
    "AUDIO_CLASSIFICATION": ("whisper", "wav2vec2"),
    "ZERO_SHOT_IMAGE_CLASSIFICATION": ("clip", "siglip"),
    "CAUSAL_LM": ("qwen3_5", "qwen3_5_moe", "llama4", "qwen4_exp", "dots3_note"),
}  # fmt: skip


# Types that none of the tasks above names, as bodies or with the head of another task.
OTHERS = (
    "aimv2", "aimv2_vision_model", "clip_text_model", "dpr", "embedding_gemma2", "embedding_gemma2_text", "eomt",
    "eomt_dinov3", "glpn", "groupvit", "higgs_audio_v2", "maskformer-swin", "mgp-str", "mlcd_vision_model",
    "molmo2_text", "nemotron3_5_asr", "nemotron3_diarization_audio", "nemotron_asr_streaming",
    "nemotron_asr_streaming_encoder", "owlv2", "owlvit", "parakeet_rnnt", "parakeet_tdt", "patchtsmixer", "patchtst",
    "pixtral", "sam", "sam3_vision_model", "sam3_vit_model", "sam_hq",
    "sam_hq_vision_model", "sam_vision_model", "siglip_vision_model", "slanext", "superpoint", "swin2sr", "timesfm",
    "tipsv2_text_model", "tipsv2_vision_model", "univnet", "vilt", "vitdet",
)  # fmt: skip

# Tasks of types that are here for their stored names only, and classes that transformers converts by their own name.
CONVERTED_TASKS = (
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "MASK_GENERATION",
    "TIME_SERIES_PREDICTION",
    "BACKBONE",
)
CONVERTED_CLASSES = (
    "BeitBackbone", "BeitForSemanticSegmentation", "ConditionalDetrForSegmentation", "DetrForSegmentation", "Dinov2Backbone",
    "Dinov2WithRegistersBackbone", "MetaClip2TextModel", "MimiModel", "RfDetrForInstanceSegmentation",
    "SegformerForSemanticSegmentation", "Siglip2TextModel", "SwinBackbone", "Tipsv2DptForDepthEstimation",
    "Tipsv2DptForNormalEstimation", "UltrabertForQuestionAnswering", "UltrabertForSequenceClassification",
    "UltrabertForTokenClassification",
)  # fmt: skip


def _converted(listed: Mapping[str, Family]) -> dict[str, Family]:
    """Types that transformers converts on loading and that no family above is, or has inside; and classes that it does."""
    inside = {part.model_type for family in listed.values() for part in _configs(CONFIG_MAPPING[family.model_type])}
    found: dict[str, Family] = {}
    for model_type in sorted(set(_build_checkpoint_conversion_mapping()) & set(CONFIG_MAPPING) - inside):
        tables = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in CONVERTED_TASKS]
        tables += [modeling_auto.MODEL_MAPPING_NAMES]
        named = next((table[model_type] for table in tables if model_type in table), None)
        if named is not None:
            class_name = named if isinstance(named, str) else named[0]
            found[model_type] = Family(model_type, model_type, "STORED_NAMES", class_name)
    for class_name in CONVERTED_CLASSES:
        kind = getattr(transformers, class_name, None)
        if kind is not None:
            model_type = kind.config_class.model_type
            found[f"{model_type}/{class_name}"] = Family(
                f"{model_type}/{class_name}", model_type, "STORED_NAMES", class_name
            )
    return found


def _configs(kind: Any) -> Iterator[Any]:
    """A class of configs and those of its parts."""
    yield kind
    for part in getattr(kind, "sub_configs", {}).values():
        if hasattr(part, "model_type"):
            yield from _configs(part)


def _variants() -> dict[str, Family]:
    found = {}
    for task, types in HEADS.items():
        for model_type in types:
            class_name = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(model_type)
            if class_name is not None and class_name != LISTED[model_type].class_name:
                name = f"{model_type}/{task.lower()}"
                text_of = LISTED[model_type].class_name if task == "CAUSAL_LM" else None
                found[name] = Family(name, model_type, task, class_name, text_of)
    return found


def _others() -> dict[str, Family]:
    found: dict[str, Family] = {}
    tables = sorted(n for n in vars(modeling_auto) if n.startswith("MODEL_FOR_") and n.endswith("_MAPPING_NAMES"))
    for table in (*tables, "MODEL_MAPPING_NAMES"):
        for model_type, named in getattr(modeling_auto, table).items():
            if model_type in OTHERS and model_type not in found:
                task = (
                    table.removeprefix("MODEL_")
                    .removeprefix("FOR_")
                    .removesuffix("_MAPPING_NAMES")
                    .removesuffix("MAPPING_NAMES")
                )
                found[model_type] = Family(
                    model_type, model_type, task or "BODY", named if isinstance(named, str) else named[0]
                )
    return found


LISTED = _listed()
LISTED |= _variants()
LISTED |= _others()
LISTED |= _converted(LISTED)
