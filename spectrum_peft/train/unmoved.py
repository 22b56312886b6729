"""What a plan trains and a model's forward never uses: told by the outputs and the gradients of the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import TrainingSetupError
from ..records import Plan
from ..tuner import plan_parameters
from ..tuner.parameters import base_of


def without_gradient(model: nn.Module, plan: Plan) -> list[str]:
    """Planned tensors of whose parameters none has a gradient, in the plan's order. Call it after a backward, before gradients
    are cleared; a gradient of zeros (the factor A of an adapter that begins at B = 0) is one."""
    entries = plan_parameters(model)
    found: dict[str, bool] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        entry = entries.get(name)
        if entry is not None and parameter.requires_grad:
            found[entry] = found.get(entry, False) or parameter.grad is not None
    return [e.name for e in plan.entries if e.trains and found.get(e.name) is False]


def look_at_first_outputs(model: nn.Module, plan: Plan) -> None:
    """Have the model's first forward of training checked by `refuse_untouched`; later ones are not."""

    def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            handle.remove()
            refuse_untouched(outputs, model, plan)

    handle = model.register_forward_hook(look)


def refuse_untouched(outputs: Any, model: nn.Module, plan: Plan) -> None:
    """
    Args:
        outputs: of a forward in training mode, with gradients.
    Raises:
        TrainingSetupError: nothing that the plan trains has a part in them.
    """
    tensors = [t for t in _tensors(outputs) if t.is_floating_point()]
    if tensors and not any(t.requires_grad for t in tensors):
        planned = plan.trainable_names
        raise TrainingSetupError(
            f"nothing that the plan trains has a part in what {type(base_of(model)).__name__} computes from these rows, so no "
            f"gradient would come: {len(planned)} tensors, first {next(iter(planned), 'none')}. Wanted a plan with matrices that "
            "its forward uses."
        )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
