"""What a run says while it goes on: a line for each log, in words, with what is left; in a file as on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

# What the trainers log, in words and in this order; the rest keeps its name. None: said elsewhere, or of no use in a line.
_WORDS: dict[str, str | None] = {
    "loss": "loss",
    "learning_rate": "rate",
    "mean_token_accuracy": "token accuracy",
    "grad_norm": "gradient",
    "train_tokens_per_second": None,
    "entropy": None,
    "num_tokens": None,
    "num_input_tokens_seen": None,
    "train_runtime": None,
    "epoch": None,
    "total_flos": None,
    "step": None,
    "step_time": None,
}
_OF_JUDGING = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "entropy")


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def line_of(logs: Mapping[str, Any], step: int, steps: int, left: float | None = None) -> str:
    """A log entry of a Trainer as a line.

    Args:
        logs: as `on_log` gets them. step: that they are of, out of `steps`.
        left: seconds until the last step, None where that is not known.
    """
    if "train_loss" in logs:
        return (
            f"{step} steps in {duration(float(logs['train_runtime']))}, to epoch {_number(logs.get('epoch', 0))}, "
            f"mean loss {_number(logs['train_loss'])}"
        )
    judged = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    shown = {n: v for n, v in judged.items() if n not in _OF_JUDGING} or dict(logs)
    parts = [f"{word} {_number(shown[name])}" for name, word in _WORDS.items() if word and name in shown]
    parts += [f"{name.replace('_', ' ')} {_number(value)}" for name, value in shown.items() if name not in _WORDS]
    if "train_tokens_per_second" in shown:
        parts.append(f"{float(shown['train_tokens_per_second']):,.0f} tokens/s")
    epoch = f", epoch {float(logs['epoch']):.2f}" if "epoch" in logs else ""
    rest = f"; about {duration(left)} left" if left else ""
    return f"step {step} of {steps}{epoch}{', held out' if judged else ''}: {', '.join(parts)}{rest}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


class _Timed:
    """Seconds that are left, from the steps since the run began."""

    began, first = 0.0, 0

    def begin(self, state: Any) -> None:
        self.began, self.first = time.perf_counter(), state.global_step

    def left(self, state: Any) -> float | None:
        done = state.global_step - self.first
        return (time.perf_counter() - self.began) / done * (state.max_steps - state.global_step) if done > 0 else None


class Lines(PrinterCallback):
    """For a file or a pipe, instead of transformers' printer: one line for the first step, so that it is soon seen how long all
    takes, and one for each log."""

    def __init__(self) -> None:
        super().__init__()
        self.time = _Timed()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.time.begin(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = state.global_step == self.time.first + 1 < state.max_steps
        if first and state.is_local_process_zero and state.logging_steps != 1:
            left = self.time.left(state)
            print(f"step {state.global_step} of {state.max_steps} done; about {duration(left or 0)} left", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero and logs:
            print(line_of(logs, state.global_step, state.max_steps, self.time.left(state)), flush=True)


class Bar(ProgressCallback):
    """For a terminal: transformers' bar, with the same lines above it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(line_of(logs, state.global_step, state.max_steps))


def say_it_in_words(trainer: Trainer) -> None:
    """Put `Lines` or `Bar` in the place of transformers' own, whichever the trainer has."""
    for theirs, ours in ((PrinterCallback, Lines), (ProgressCallback, Bar)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours())
