"""What plain peft makes of a LoRA's targets where transformers 5 fuses the experts of a model type.

peft 0.21.2 takes every target that is called `gate_proj`, `up_proj` or `down_proj` (`w1`, `w2`, `w3`) for one of the experts
that older versions of transformers had as modules, dense and shared MLPs as well, and turns it into the fused parameter
(`convert_peft_config_for_transformers`, utils/transformers_weight_conversion.py). The same layers, named as parameters, stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from peft import LoraConfig


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
