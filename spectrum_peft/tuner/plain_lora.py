"""What is a plain LoRA is saved as one, so that plain peft and all who read its folders open it without this package.

`adapter_config.json` then says what PEFT, transformers and serving engines read, and `spectrum_adapter.json` beside it the rest
of the config, the plan first of all. Once this package is imported, a folder that has both is loaded with its plan again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME
from torch import Tensor

from .. import names
from ..records import BESIDE_FILE, write_text
from ..weights.adapter_config import fields_beside, read_adapter_config
from .places import is_fused, is_held, is_placed

if TYPE_CHECKING:
    from .config import SpectrumConfig

_PEFTS = frozenset(field.name for field in dataclasses.fields(LoraConfig))


def is_plain(config: SpectrumConfig) -> bool:
    """Whether the adapter is products of two factors of their own, and modules that train whole: what a LoRA of PEFT can say."""
    if config.plan is None:
        return False
    entries = [e for e in config.plan.entries if is_placed(e, config)]
    if not any(e.rank for e in entries) or any(e.action != "lora" for e in entries):
        return False
    if config.retargeted and config.use_dora:  # which PEFT does not put beside parameters
        return False
    if config.misread:
        return False
    held = [e for e in config.plan.entries if is_held(e, config)]
    if held and config.bias != "none":  # PEFT stores the bias of a norm apart from a norm that is saved whole
        return False
    whole = {names.module_name(e.name) for e in held if e.action == "save"}
    return all(e.action == "save" for e in held) and not whole & {names.module_name(e.name) for e in entries}


def plain_fields(config: SpectrumConfig, trained: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plain LoRA with the same function.

    Args:
        config: one that `is_plain`. trained: its own fields, as `adapter_config.json` would hold them.
    """
    plain = {key: value for key, value in trained.items() if key in _PEFTS}
    placed = {names.module_name(e.name) for e in config.plan.entries if is_placed(e, config)}
    targets = trained["target_modules"] or []
    held = [module for module in targets if module not in placed]
    as_parameters = [module for module in targets if module in config.retargeted]
    plain |= {
        "peft_type": "LORA",
        "target_modules": sorted(set(targets) - {*held, *as_parameters}),
        "modules_to_save": [*(trained["modules_to_save"] or ()), *held] or None,
    }
    if as_parameters:  # the same layers, named so that PEFT puts them there
        plain["target_parameters"] = sorted(
            {*(trained["target_parameters"] or ()), *(f"{m}.weight" for m in as_parameters)}
        )
        for patterns in ("rank_pattern", "alpha_pattern"):
            renamed = {f"^{re.escape(m)}": f"^{re.escape(f'{m}.weight')}" for m in as_parameters}
            plain[patterns] = {renamed.get(key, key): value for key, value in trained[patterns].items()}
        plain["lora_dropout"] = 0.0  # PEFT refuses it beside parameters; it is the training's, not the function's
    return plain


def write_plain(config: SpectrumConfig, folder: Path) -> None:
    """Turn the `adapter_config.json` that PEFT wrote into the plain form and what lies beside it, where the adapter has one."""
    if not is_plain(config):
        (folder / BESIDE_FILE).unlink(missing_ok=True)
        return
    trained = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    plain = plain_fields(config, trained)
    beside = fields_beside(trained, plain)
    write_text(folder / BESIDE_FILE, json.dumps(beside, indent=2, sort_keys=True) + "\n")
    write_text(folder / CONFIG_NAME, json.dumps(plain, indent=2, sort_keys=True) + "\n")


def held_as_saved(tensors: dict[str, Tensor], config: SpectrumConfig, adapter_name: str) -> dict[str, Tensor]:
    """Norms and the like that train beside the adapters, under the names that `modules_to_save` gives them in a file."""
    if not is_plain(config):
        return tensors
    part = f".lora_spectrum.{adapter_name}."
    return {key.replace(part, "."): tensor for key, tensor in tensors.items()}


def saved_as_held(tensors: dict[str, Tensor], config: SpectrumConfig, adapter_name: str) -> dict[str, Tensor]:
    """The way back. Files of earlier versions have the names that the layers have."""
    if not is_plain(config):
        return tensors
    held = {e.name for e in config.plan.entries if is_held(e, config) and not is_fused(e)}
    found = {}
    for key, tensor in tensors.items():
        start = "base_model.model." if key.startswith("base_model.model.") else ""
        name = key.removeprefix(start)
        if name in held:
            module, _, leaf = name.rpartition(".")
            key = f"{start}{module}.lora_spectrum.{adapter_name}.{leaf}"
        found[key] = tensor
    return found


def find_plans() -> None:
    """Let PEFT's `from_pretrained` of configs give a `SpectrumConfig` for the folder of a plain LoRA that has our file beside it.

    PEFT goes from `peft_type` to a class, and has no place for a second opinion; a plain LoRA of anybody else stays what it is.
    """
    original = PeftConfigMixin.from_pretrained.__func__  # type: ignore[attr-defined]
    if hasattr(original, "finds_plans"):
        return

    @functools.wraps(original)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if type(config) is not LoraConfig:
            return config
        folder = _folder_with_plan(cls, pretrained_model_name_or_path, subfolder, kwargs)
        return config if folder is None else LoraConfig.from_peft_type(**read_adapter_config(folder / CONFIG_NAME))

    from_pretrained.finds_plans = True  # type: ignore[attr-defined]
    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]


def _folder_with_plan(cls: Any, source: str | os.PathLike[str], subfolder: str | None, kwargs: Any) -> Path | None:
    folder = Path(source, subfolder or "")
    if (folder / CONFIG_NAME).is_file():
        return folder if (folder / BESIDE_FILE).is_file() else None
    options, _, _ = cls._split_kwargs(kwargs)
    try:
        return Path(hf_hub_download(str(source), BESIDE_FILE, subfolder=subfolder, **options)).parent
    except EntryNotFoundError:  # a plain LoRA, as nearly all are
        return None
