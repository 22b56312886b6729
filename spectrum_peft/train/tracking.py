"""What wandb, tensorboard, trackio and the like get to see of a plan: its choice as config, its re-evaluations as figures.

Everything goes the trainer's own way, so whatever `report_to` names gets it: reporters write the model's config down when
training begins, and every figure of a log. This callback stands before them, puts the plan into the config while they look, and
adds to the log of a step at which ranks moved.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import TrainingSetupError
from ..records import Plan
from .callback import SpectrumCallback

# The field of the model's config, while reporters read it; and what figures begin with.
FIELD = "spectrum_peft"


def report_plan(trainer: Trainer) -> None:
    """Let the reporters of a trainer see the plan. `spectrum-peft train` does this; in Python, before `trainer.train()`.

    Raises:
        TrainingSetupError: the trainer has no `SpectrumCallback`.
    """
    handler = trainer.callback_handler
    ours = next((c for c in handler.callbacks if isinstance(c, SpectrumCallback)), None)
    if ours is None:
        raise TrainingSetupError("report_plan: the trainer has no SpectrumCallback, which knows the plan.")
    handler.callbacks.insert(0, PlanReports(ours))


def described(plan: Plan) -> dict[str, Any]:
    """A plan as config: plain data of one level, but for the options and {matrix: its rank, or what it does}."""
    return {
        "mode": plan.mode,
        "criterion": plan.criterion,
        "options": {name: value for name, value in plan.options.items() if value is not None},
        "trainable_parameters": plan.trainable_parameters,
        "total_parameters": plan.total_parameters,
        "digest": plan.digest,
        "trains": {e.name: e.rank or e.action for e in plan.entries if e.trains},
    }


class PlanReports(TrainerCallback):
    """Stands before a trainer's reporters; `report_plan` puts it there."""

    def __init__(self, source: SpectrumCallback) -> None:
        self.source = source
        self._told = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        config = getattr(model, "config", None)
        if self.source.plan is not None and hasattr(config, "to_json_string"):
            setattr(config, FIELD, described(self.source.plan))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """They have looked; what is saved from here on has the config that the model had."""
        vars(getattr(model, "config", self)).pop(FIELD, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.source.evaluates_at(state):
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what the latest re-evaluation did, once."""
        if logs is None or len(self.source.history) <= self._told:
            return
        self._told = len(self.source.history)
        latest = self.source.history[-1]
        ranks = [e.rank for e in self.source.plan.entries if e.trains and e.rank] if self.source.plan else []
        logs |= {
            f"{FIELD}/trainable_parameters": latest["trainable_parameters"],
            f"{FIELD}/layers_moved": len(latest["ranks"]),
            f"{FIELD}/layers_activated": len(latest["activated"]),
            f"{FIELD}/layers_deactivated": len(latest["deactivated"]),
            f"{FIELD}/mean_rank": sum(ranks) / len(ranks) if ranks else 0.0,
        }
