"""The base model's own state dict, whole while layers hold some of its weights.

A `SpectrumLayer` takes parameters out of the module it wraps, so that `model.get_base_model().state_dict()`, and PEFT's
`get_base_model_state_dict` on top of it, would lack them. Hooks on the base model put the originals there, under the names
that PEFT expects of a wrapped module (`base_layer.weight`), and take them from a state dict that is loaded. They act where the
base model itself is asked; the state dict of the `PeftModel` around it, which trainers save and shard, is left alone.
Originals that were not kept (`keep_base='none'`) are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .layers import Original, SpectrumLayer


def keep_state_whole(model: nn.Module) -> tuple[Any, Any]:
    """Put the hooks in; returns their handles, whose `remove()` takes them out."""
    return model.register_state_dict_post_hook(_add), model.register_load_state_dict_pre_hook(_take)


def _originals(model: nn.Module) -> Iterator[tuple[str, SpectrumLayer, Original]]:
    """(key in the state dict, layer, original) of every parameter that a layer has taken out and not merged back."""
    for path, module in model.named_modules():
        if isinstance(module, SpectrumLayer) and not module.merged:
            for name, original in module.originals.items():
                yield f"{path}.base_layer.{name}", module, original


def _add(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    if not prefix:
        for key, layer, original in _originals(model):
            if not original.lost:
                state[key] = original.read(layer.device)


def _take(
    model: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    if prefix:
        return
    for key, _, original in _originals(model):
        value = state.pop(key, None)
        if value is not None:
            original.replace(value)
        elif strict:
            missing.append(key)
