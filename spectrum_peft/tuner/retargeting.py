"""What plain peft makes of a LoRA's targets where transformers 5 fuses the experts of a model type.

peft 0.21.2 takes every target that is called `gate_proj`, `up_proj` or `down_proj` (`w1`, `w2`, `w3`) for one of the experts
that older versions of transformers had as modules, dense and shared MLPs as well, and turns it into the fused parameter
(`convert_peft_config_for_transformers`, utils/transformers_weight_conversion.py). The same layers, named as parameters, stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

from peft import LoraConfig


def retargeted(model_type: str | None, modules: Iterable[str]) -> set[str]:
    """The modules that peft, asked for an adapter on them in a model of this type, would not put it on."""
    modules = list(modules)
    if model_type is None:
        return set()
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
