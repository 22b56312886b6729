"""What plain peft makes of a LoRA's targets where transformers 5 fuses the experts of a model type.

peft 0.21.2 takes every target that is called `gate_proj`, `up_proj` or `down_proj` (`w1`, `w2`, `w3`) for one of the experts
that older versions of transformers had as modules, dense and shared MLPs as well, and turns it into the fused parameter
(`convert_peft_config_for_transformers`, utils/transformers_weight_conversion.py). The same layers, named as parameters, stay.

The tensors of a LoRA it renames by transformers' rules for the names in checkpoints. A rule is a regular expression, and one
such as `mlp.shared_expert.` takes the *s* of `mlp.shared_experts` as well (`laguna`): the matrix would silently be missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import nn

from ..errors import CheckpointError
from ..weights.layouts import skeleton_of
from .classes import class_of


def types_in(config: Any) -> Iterator[str]:
    """The `model_type` of a config, as transformers' object or plain data, and of the configs inside it.

    A checkpoint names the whole (`qwen3_omni_moe`), the class that opens it may be of a part (`qwen3_omni_moe_thinker`), and
    peft asks the live model's.
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    for key, value in fields.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, Mapping) or hasattr(value, "model_type"):
            yield from types_in(value)


def retargeted(model_types: Iterable[str], modules: Iterable[str]) -> set[str]:
    """The modules that peft, asked for an adapter on them in a model of any of these types, would not put it on."""
    modules = list(modules)
    return {module for kind in dict.fromkeys(model_types) for module in _retargeted(kind, modules)}


def _retargeted(model_type: str, modules: Iterable[str]) -> set[str]:
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a peft before the conversion, or a transformers before the fused experts
        return set()
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    found = set()
    for module in modules:
        config = LoraConfig(target_modules=[module])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # half of a fused pair
            found.add(module)
            continue
        if module not in cast("Iterable[str]", config.target_modules or ()):
            found.add(module)
    return found


_KEY = "base_model.model.{}.lora_A.weight"


def misread(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """{module: what plain peft makes of its name} of those whose tensors in a LoRA's file it would not find again.

    Args:
        model: of transformers, without adapters; on any device, the meta device too.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        return {}

    def read(asked: Iterable[str]) -> set[str]:
        """The names under which these modules' tensors arrive."""
        tensors = {_KEY.format(module): torch.empty(1, 1, device="meta") for module in asked}
        try:
            return set(convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors))
        except Exception:  # a rule that gathers several tensors has met one of them
            return set()

    there = read(modules := list(modules))
    lost = [module for module in modules if _KEY.format(module) not in there]
    before, after = _KEY.split("{}")
    alone = {module: read([module]) - {_KEY.format(module)} for module in lost}
    return {m: next(iter(seen), "nothing").removeprefix(before).removesuffix(after) for m, seen in alone.items()}


def misread_in(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, str]:
    """The same for a checkpoint's config as plain data; nothing is found where its model cannot be built."""
    import transformers

    try:
        built = transformers.AutoConfig.for_model(**config)
        return misread(skeleton_of(class_of(built), built), modules)
    except (CheckpointError, ValueError, KeyError, TypeError):
        return {}
