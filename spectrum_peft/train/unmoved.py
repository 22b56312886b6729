"""What a plan trains and a model's forward never uses: told by the gradients of the first step."""

from __future__ import annotations

from torch import nn

from ..records import Plan
from ..tuner import plan_parameters


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
