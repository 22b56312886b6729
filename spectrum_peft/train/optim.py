"""A plan's learning-rate ratios: as parameter groups for a loop of one's own, or inside `step()` of a trainer's optimizer.

A trainer saves and restores its optimizer by its groups, and the scheduler writes their rates. Groups of ours would break
both on resume, so under a trainer they exist only while `step()` runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import MismatchError, TrainingSetupError
from ..records import Plan


def ratios_by_parameter(model: Any, plan: Plan, entry_of: Mapping[str, str]) -> dict[int, float]:
    """{id of a trainable parameter: learning-rate ratio of its plan entry}.

    Args:
        model: a torch module.
        entry_of: {parameter name in `model`: plan entry name}, as `tuner.plan_parameters` gives.
    """
    ratio = {e.name: e.lr_ratio for e in plan.entries if e.trains}
    return {
        id(p): ratio[entry_of[name]]
        for name, p in model.named_parameters()
        if p.requires_grad and entry_of.get(name) in ratio
    }


def parameter_groups(
    model: Any, plan: Plan | None = None, lr: float = 2e-4, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: one group for each learning-rate ratio and weight decay of the plan.

    Args:
        model: a `PeftModel` with a `SpectrumConfig`, or a plain model frozen to the plan.
        plan: None for the plan of the active adapter, or the one that `load_model_with_spectrum` froze the model to.
        lr: base rate; a tensor trains at lr * lr_ratio of its entry.
        weight_decay: for matrices; biases, norms and other 1-D tensors get none, as in transformers' Trainer.
    Returns:
        [{"params", "lr", "weight_decay", "lr_ratio"}], sorted by ratio, then by weight decay; every trainable parameter
        is in one group.
    Raises:
        TrainingSetupError: the plan changes ranks during training, which needs the callback; nothing is trainable.
        MismatchError: what requires a gradient is not what the plan trains.
    """
    from ..tuner import plan_parameters, trainable_mismatch

    if hasattr(getattr(model, "base_model", None), "follow_layers"):
        model.base_model.follow_layers(model.active_adapter)
    carried = getattr(getattr(model, "active_peft_config", None), "plan", None) or getattr(model, "spectrum_plan", None)
    plan = plan or carried
    if plan is None:
        raise TrainingSetupError("parameter_groups: the model carries no plan, and none was given.")
    if plan.options.get("rescore_every") is not None:
        raise TrainingSetupError(
            f"parameter_groups: the plan has rescore_every={plan.options['rescore_every']!r}, which changes ranks while the "
            "optimizer runs; train it with a Trainer and SpectrumCallback."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingSetupError("parameter_groups: no parameter of the model requires a gradient.")
    problem = trainable_mismatch(model, plan)
    if problem:
        raise MismatchError(f"parameter_groups: {problem}.")
    ratios = ratios_by_parameter(model, plan, plan_parameters(model))
    groups: dict[tuple[float, float], list[Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (ratios.get(id(parameter), 1.0), weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
    tuner: Any = getattr(model, "base_model", None)
    if hasattr(tuner, "attended"):
        tuner.attended()
    return [
        {"params": params, "lr": lr * q, "weight_decay": decay, "lr_ratio": q}
        for (q, decay), params in sorted(groups.items(), key=lambda item: item[0])
    ]


class StepRatios:
    """Splits an optimizer's groups by learning-rate ratio, inside `step()` only.

    Outside, groups, state dict, scheduler, clipping and the logged rate are the trainer's own. Equal, bit for bit, to
    groups split for good.

    Args:
        optimizer: the innermost torch optimizer (accelerate's wrapper is looked through).
        ratios: {id(parameter): ratio}; parameters that are not named train at the group's rate.
        frozen: ids of parameters that are left out of the step altogether.

    Raises:
        TrainingSetupError: the optimizer has no rate to multiply (Adafactor with `relative_step`).

    Attributes:
        ratios, frozen: may be changed between steps.
    """

    def __init__(self, optimizer: Any, ratios: Mapping[int, float], frozen: Iterable[int] = ()) -> None:
        self.optimizer = innermost(optimizer)
        self.ratios = dict(ratios)
        self.frozen = frozenset(frozen)
        if any(group.get("lr") is None for group in self.optimizer.param_groups):
            raise TrainingSetupError(
                f"{type(self.optimizer).__name__} has no learning rate (lr is None: it finds its own), so the plan's "
                "ratios have nothing to multiply. Give it one, with relative_step=False; or plan with lr_ratio=(1, 1)."
            )
        self._outer: list[dict[str, Any]] | None = None
        self._handles = [
            self.optimizer.register_step_pre_hook(self._split),
            self.optimizer.register_step_post_hook(self._join),
        ]

    def _split(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._join(optimizer, args, kwargs)  # a step that raised has left its groups behind
        self._outer = optimizer.param_groups
        inner = []
        for group in self._outer:
            by_ratio: dict[float, list[Any]] = {}
            for parameter in group["params"]:
                if id(parameter) not in self.frozen:
                    by_ratio.setdefault(self.ratios.get(id(parameter), 1.0), []).append(parameter)
            inner += [{**group, "params": params, "lr": group["lr"] * q} for q, params in by_ratio.items()]
        optimizer.param_groups = inner

    def _join(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._outer is not None:
            optimizer.param_groups = self._outer
            self._outer = None

    def remove(self) -> None:
        """Take the hooks off; the optimizer is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def has_own_ratios(optimizer: Any) -> bool:
    """Whether an optimizer was made from `parameter_groups`, so that its groups' rates have the ratios in them."""
    return any("lr_ratio" in group for group in innermost(optimizer).param_groups)


def innermost(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper (and inside any further wrapper of the same habit)."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
