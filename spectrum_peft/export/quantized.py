"""Which modules of a base were quantized while its adapter was trained, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import names
from ..errors import CheckpointError, OptionError, loading, near_matches
from ..records import REAL_WEIGHT_ACTIONS, Plan
from ..weights import FileWeights, undivided_rows, unquantized_modules


def quantization_settings(given: Any, plan: Plan | None) -> dict[str, Any]:
    """The fields of a `BitsAndBytesConfig`: from one, from its fields, or from the word that `load_model_with_spectrum`
    takes, which means double quantization, heads and the plan's real weights left out."""
    if given in (None, "none"):
        raise OptionError(
            "onto='dequantized': nothing says how the base was quantized in training; give quantization='nf4', 'fp4', "
            "'int8' or the BitsAndBytesConfig.",
            shell="onto='dequantized': nothing says how the base was quantized in training; give quantization=nf4, fp4 or int8.",
        )
    if not isinstance(given, str):
        return dict(given if isinstance(given, Mapping) else given.to_dict())
    known = ("nf4", "fp4", "int8")
    if given not in known:
        raise OptionError(f"quantization is {given!r}." + near_matches(given, known))
    real = (
        [names.module_name(e.name) for e in plan.entries if e.trains and e.action in REAL_WEIGHT_ACTIONS]
        if plan
        else []
    )
    return {
        "load_in_8bit": given == "int8",
        "load_in_4bit": given != "int8",
        "bnb_4bit_quant_type": given,
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": [*real, *sorted(names.HEADS)],
        "by_word": True,  # as `quantization_config_for` did, which knew the model
    }


def quantized_names(files: FileWeights, settings: Mapping[str, Any]) -> list[str]:
    """Parameters of the base that transformers puts into bitsandbytes layers on loading: every Linear and Conv1D that
    no skip rule matches. The model is built without weights: only its classes say which matrix is a Linear."""
    import transformers
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert files.folder is not None
    with loading(files.folder):
        config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise CheckpointError(
            f"{files.folder}: architectures in config.json is {config.architectures!r}, wanted a class of "
            "transformers, which says what was quantized; merge from the model in memory instead."
        )
    with loading(files.folder), torch.device("meta"):
        model = kind._from_config(config)
    listed = settings.get("llm_int8_skip_modules")
    if settings.get("by_word"):
        listed = [*listed, *unquantized_modules(model)]
    skipped = HfQuantizer.get_modules_to_not_convert(model, listed, model._keep_in_fp32_modules)
    chosen = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped)
    ]
    unsure = [name for name in undivided_rows(model) if f"{name}.weight" in chosen]
    if unsure and settings.get("by_word") and settings["load_in_4bit"]:
        raise OptionError(
            f"onto='dequantized': whether {len(unsure)} matrices such as {unsure[0]}.weight were in 4 bit goes by the device "
            "that trained: their rows are no multiple of 32 values. Merge the model in memory, or give the BitsAndBytesConfig."
        )
    infos = {t.name for t in files.tensors()}
    return sorted(names.align(chosen, infos).values())
