"""Plain models: frozen to what a plan trains; and of every model whether what requires a gradient is what its plan says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import MismatchError, OptionError, near_matches
from ..plan import MODES
from ..records import ADAPTER_ACTIONS, Plan
from ..weights import computes_gradients_itself
from .parameters import base_of, base_parameters, plan_parameters, tied_names


def freeze_to_plan(model: nn.Module, plan: Plan) -> None:
    """Set `requires_grad` on a plain model so that exactly the plan's parameters train.

    Raises:
        MismatchError: an entry matches nothing; a chosen weight is quantized.
        OptionError: the plan's mode puts adapters beside weights, which needs `get_peft_model`.
    """
    if not MODES[plan.mode].plain_model:
        raise OptionError(
            f"mode {plan.mode!r} puts adapters into the model; use get_peft_model(model, SpectrumConfig(mode={plan.mode!r}, "
            "...)) or the trainer's peft_config. A callback on a plain model takes "
            + ", ".join(repr(name) for name, mode in MODES.items() if mode.plain_model)
            + "."
        )
    present = base_parameters(model)
    wanted = set(plan.trainable_names)
    for name in sorted(wanted - set(present)):
        raise MismatchError(f"the plan trains {name}, which the model lacks." + near_matches(name, present))
    for name in sorted(wanted):
        owner, leaf = present[name]
        parameter = owner._parameters[leaf]
        if parameter is None or not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise MismatchError(
                f"{name} is quantized ({type(parameter).__name__}), so its real weights cannot train. Load the base with "
                "quantization_config_for(plan, model), which leaves the chosen modules in 16 or 32 bit."
            )
    chosen = {id(present[name][0]._parameters[present[name][1]]) for name in wanted}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    let_gradients_in(model)


def let_gradients_in(model: nn.Module) -> None:
    """Where a model's own `autograd.Function` holds the weights that train, have the inputs of its blocks ask for a gradient,
    as for reentrant checkpointing; autograd would leave the function out otherwise."""
    base: Any = base_of(model)
    if computes_gradients_itself(base):
        base.enable_input_require_grads()


def trainable_mismatch(model: nn.Module, plan: Plan) -> str | None:
    """None if exactly the plan's parameters train, else one line that names the first ones that should not, or do not."""
    belongs = plan_parameters(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trains = {id(p) for p in parameters.values() if p.requires_grad}
    entries = with_groups(plan, {belongs[n] for n, p in parameters.items() if n in belongs and id(p) in trains})
    stray = sorted(n for n, p in parameters.items() if n not in belongs and p.requires_grad)
    wanted = set(plan.trainable_names)
    # Slots that re-evaluation may fill are trainable tensors for DDP's sake; the optimizer's step leaves them out.
    entries -= {e.name for e in plan.entries if e.action in ADAPTER_ACTIONS and not e.active}
    tied = tied_names(model)
    entries |= {other for name in entries for other in tied.get(name, ())} & wanted
    missing = sorted(wanted - entries)
    extra = sorted(name for name in entries - wanted if not set(tied.get(name, ())) & wanted)
    if not (missing or extra or stray):
        return None
    parts = [
        f"{len(found)} {what}, first {found[0]}"
        for found, what in (
            (missing, "planned parameters do not train"),
            (extra, "parameters train that the plan freezes"),
            (stray, "trainable parameters are in no plan"),
        )
        if found
    ]
    return "; ".join(parts)


def with_groups(plan: Plan, names_: Iterable[str]) -> set[str]:
    """The entries named, and those of their groups: a member that shares both factors has no parameter of its own."""
    found = set(names_)
    groups = {e.group for e in plan.entries if e.name in found and e.group is not None}
    return found | {e.name for e in plan.entries if e.group in groups}
