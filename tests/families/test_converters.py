"""Every rule by which transformers renames or converts stored tensors is one that a family of the sweep is loaded by."""

from __future__ import annotations

import listing
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

from spectrum_peft.weights import skeleton_of

KEYS = frozenset(_build_checkpoint_conversion_mapping())
# Why no family of the sweep is loaded by some rules -> these rules.
LEFT_OUT_BY_REASON = {
    "needs timm, which is not installed here": (
        "ConditionalDetrForSegmentation", "ConditionalDetrModel", "DetrForSegmentation", "DetrModel", "deformable_detr",
        "timm_wrapper",
    ),
    "transformers exports no class that looks it up": (
        "MaskFormerDetrDecoder", "MtpModel", "PPChart2TableModel", "jev", "legacy", "mlcd", "mlcd_vision", "xCLIPTextModel",
        "xCLIPVisionModel",
    ),
    "the classes of this type have rules of their own, which come first": (
        "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "tipsv2_dpt",
    ),
    "its small config is not found yet by the names of its fields": (
        "BeitForSemanticSegmentation", "MimiDecoderModel", "MimiEncoderModel", "MimiModel", "NemotronH_Omni_Reasoning_V3",
        "Sapiens2ForImageMatting", "Sapiens2ForNormalEstimation", "Sapiens2ForPointmapEstimation",
        "Sapiens2ForPoseEstimation", "Sapiens2ForSemanticSegmentation", "d_fine", "deepseek_ocr2", "ernie4_5_vl_moe",
        "gradium_phonon_tts", "lw_detr", "maskformer", "nemo_speechlm", "qwen3_omni_moe", "sapiens2",
    ),
}  # fmt: skip
LEFT_OUT = {rule: reason for reason, rules in LEFT_OUT_BY_REASON.items() for rule in rules}


def rules_of(model: torch.nn.Module) -> set[str]:
    """The rules that transformers looks up for a model: by the class, else the type, of each model inside it."""
    found = set()
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            kind, model_type = type(part).__name__, part.config.model_type
            found.add(kind if kind in KEYS else model_type)
    return found & KEYS


def families_for(key: str) -> list[str]:
    """Families of a rule's type, or with it inside."""
    kind = getattr(transformers, key, None)
    model_type = kind.config_class.model_type if kind is not None and key not in CONFIG_MAPPING else key
    return [
        name
        for name, family in listing.LISTED.items()
        if any(part.model_type == model_type for part in listing._configs(CONFIG_MAPPING[family.model_type]))
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of single families, about shapes
def test_every_converter_of_transformers_is_in_the_sweep() -> None:
    wanted = {name for key in KEYS for name in families_for(key)}
    met: set[str] = set()
    for name in sorted(wanted):
        family = listing.LISTED[name]
        try:
            met |= rules_of(skeleton_of(family.kind, family.config()))
        except Exception:  # of any kind, as their configs and classes raise them; docs/families.md, "Not built"
            continue
    assert sorted(KEYS - met - LEFT_OUT.keys()) == []
    assert sorted(met & LEFT_OUT.keys()) == []
    assert LEFT_OUT.keys() <= KEYS
