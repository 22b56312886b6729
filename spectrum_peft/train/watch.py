"""What a run is watched for: step times, a loss that is no number, the step where it is to stop, ranks that move, files."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..devices import synchronize
from ..errors import DataError
from ..records import with_usual_modes
from .finite import first_not_finite


class StepClock(TrainerCallback):
    """Times each optimizer step on its own: data, logging, saving and evaluation between steps are not in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self._began)


class FiniteLoss(TrainerCallback):
    """Ends a run whose loss or weights have become NaN: what follows would be NaN, too, and nothing would say so."""

    def __init__(self) -> None:
        self._before: str | None = None  # what held such values before anything was trained

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = first_not_finite(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise DataError(f"the loss is {float(loss)} at step {state.global_step}; nothing was saved. {self._why()}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in (1, state.max_steps):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                    raise DataError(f"{name} holds NaN or Inf after step {state.global_step}. {self._why()}")

    def _why(self) -> str:
        if self._before is not None:
            return f"{self._before} held such values before the first step: the checkpoint has them."
        return "A lower learning rate may help; the checkpoint's own values were finite."


class UsualModes(TrainerCallback):
    """Checkpoints may be read by whoever may read other new files."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with_usual_modes(Path(args.output_dir, f"checkpoint-{state.global_step}"))


class StopAt(TrainerCallback):
    """Ends a run after a step, with a checkpoint to go on from; what is planned over the whole run, rates first, stays so."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True
            control.should_save = True


class RankLog(TrainerCallback):
    """AdaLoRA moves its ranks after each optimizer step, while the gradients are still there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)
