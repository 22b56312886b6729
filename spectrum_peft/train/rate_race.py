"""A race of learning rates before a run: short trainings from the same start on the same rows, the best rate wins."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import OptionError, TrainingSetupError
from ..plan import edge_of
from .optim import innermost

logger = logging.getLogger(__name__)

SHARE = 0.1  # of the run's steps, at most, in the race
MOST_RATES = 8
FEWEST_STEPS = 4  # of one short training
FEWEST_RATES = 3
COARSE, FINE = 3.0, 3.0**0.5  # steps between rates: first, and around the best
FORWARD = 1 / 3  # of a step's cost: what judging one step's rows takes

# Figures that trl's trainers (1.16) gather between two lines of their log.
_GATHERED = ("_metrics", "_stored_metrics", "_total_train_tokens")


@dataclass(frozen=True)
class Heat:
    """One short training.

    Attributes:
        rate: learning rate after the warm-up.
        loss: afterwards, on as many rows that it did not train on; infinite where it diverged.
        steps: optimizer steps that it took.
    """

    rate: float
    loss: float
    steps: int


class LearningRateRace(TrainerCallback, ExportableState):
    """Finds the learning rate when training begins; `spectrum-peft train --learning-rate auto` is this.

        trainer = SFTTrainer(model, ..., callbacks=[SpectrumCallback()])
        trainer.add_callback(LearningRateRace(trainer))
        trainer.train()

    It begins at `args.learning_rate`, goes up or down by factors of 3 for as long as that lowers the loss, and ends with
    factors of sqrt(3) around the best. Each rate trains for the same few steps from the same weights on the run's first
    rows, by the trainer's own loss, clipping and optimizer, with a warm-up over its first quarter, and is judged by its loss
    on the training rows that come next, the same ones for all. Evaluation rows are not touched. Afterwards weights, buffers,
    optimizer and random state are as before, to the bit: the run is the one that the found rate, given by hand, would have
    been. All rates together cost at most a tenth of its steps, a forward pass counted as a third of one.

    On a resume nothing is raced: the checkpoint's scheduler has the rate, and its state what was tried. Trained weights are
    held in host memory once more during the race.

    Args:
        trainer: the one that it is added to.
        share: at most this share of the run's steps goes into the race, in (0, 1].
    Raises:
        OptionError: `share` outside (0, 1]; (when training begins) the run is too short for the race, or its rate is 0.
        TrainingSetupError: (when training begins) the loss is no number at every rate; the trainer's loss says nothing
            about progress (GRPO and its like); the optimizer is DeepSpeed's.

    Attributes:
        heats: what was tried, in order.
        rate: what was found, None before.
    """

    def __init__(self, trainer: Any, *, share: float = SHARE) -> None:
        if not 0 < share <= 1:
            raise OptionError(f"share is {share!r}, wanted a share of the run's steps in (0, 1].")
        self.trainer = trainer
        self.share = share
        self.heats: list[Heat] = []
        self.rate: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Race, then set the found rate in arguments, optimizer and scheduler."""
        if state.global_step:
            logger.info("the run is resumed, so its learning rate is the checkpoint's and nothing is raced")
            self._take_up(args, state)
            return
        check_can_race(type(self.trainer), args)
        budget = int(self.share * state.max_steps)
        steps = heat_steps(state.max_steps, self.share)
        with _undisturbed(self.trainer) as restore:
            batches = list(itertools.islice(_batches(self.trainer), 2 * steps))
            steps = len(batches) // 2  # fewer where the rows are few
            if not steps:
                raise OptionError(
                    f"a race of learning rates needs two batches of training rows, and there is {len(batches)}."
                )

            def run(rate: float) -> Heat:
                restore()
                heat = _heat(self.trainer, batches[:steps], batches[steps:], rate)
                self.heats.append(heat)
                logger.info("learning rate race: %.3g gives loss %.4f in %d steps", heat.rate, heat.loss, heat.steps)
                return heat

            best = search(run, args.learning_rate, min(MOST_RATES, int(budget / (steps * (1 + FORWARD)))))
        if not math.isfinite(best.loss):
            raise TrainingSetupError(
                f"learning rate race: the loss is no finite number at any of {[f'{h.rate:.3g}' for h in self.heats]}."
            )
        self.rate = best.rate
        _set_rate(self.trainer, best.rate)
        beyond = edge_of([heat.rate for heat in self.heats], best.rate)
        logger.info("learning rate race: %.3g won%s", best.rate, f"; {beyond}" if beyond else "")

    def _take_up(self, args: TrainingArguments, state: TrainerState) -> None:
        """What the race of the checkpoint's run found; older checkpoints do not say."""
        stored = state.stateful_callbacks.get(type(self).__name__)
        kept = (stored[-1] if isinstance(stored, list) and stored else stored or {}).get("attributes", {})
        if kept.get("rate") is not None:
            self.heats, self.rate = [Heat(**heat) for heat in kept["heats"]], kept["rate"]
            args.learning_rate = kept["rate"]

    def state(self) -> dict[str, Any]:
        """What travels in `trainer_state.json`: what was tried, and the rate that was found."""
        return {"args": {}, "attributes": {"heats": self.record(), "rate": self.rate}}

    def record(self) -> list[dict[str, float]]:
        """The heats as plain data."""
        return [asdict(heat) for heat in self.heats]


def check_can_race(trainer: type, args: TrainingArguments) -> None:
    """
    Raises:
        TrainingSetupError: this trainer's rates cannot be raced.
        OptionError: the rate to begin at is none.
    """
    if any(c.__name__ in ("GRPOTrainer", "RLOOTrainer") for c in trainer.__mro__):
        raise TrainingSetupError(
            f"learning rate race: the loss of {trainer.__name__} is no measure of progress, so rates cannot be raced by it. "
            "Set learning_rate to a number."
        )
    if getattr(args, "deepspeed", None):
        raise TrainingSetupError(
            "learning rate race: DeepSpeed's engine holds the optimizer. Set learning_rate to a number."
        )
    if not args.learning_rate > 0:
        raise OptionError(f"learning_rate is {args.learning_rate:g}, wanted a rate above 0 for the race to begin at.")


def heat_steps(max_steps: int, share: float = SHARE) -> int:
    """Steps of one short training.

    Raises:
        OptionError: too few for `FEWEST_RATES` trainings of `FEWEST_STEPS` steps.
    """
    budget, least = int(share * max_steps), math.ceil(FEWEST_RATES * FEWEST_STEPS * (1 + FORWARD))
    if budget < least:
        raise OptionError(
            f"a race of learning rates takes {share:.0%} of the run's steps and at least {least}, so it needs a run of "
            f"{math.ceil(least / share)} steps; this one has {max_steps}. Set learning_rate to a number."
        )
    return max(FEWEST_STEPS, int(budget / (1 + FORWARD) / MOST_RATES))


def search(run: Callable[[float], Heat], start: float, most: int) -> Heat:
    """Walk from `start` up or down by `COARSE` while the loss falls, then try `FINE` steps around the best.

    Args:
        run: trains at a rate.
        most: rates that may be tried, at least 2.
    Returns:
        The heat of the lowest loss; of equal ones the first.
    """
    tried = {0.0: run(start)}  # by the exponent of COARSE

    def attempt(place: float) -> bool:
        """Whether the rate there was tried and is the best now."""
        if place not in tried and len(tried) < most:
            tried[place] = run(start * COARSE**place)
            return best() == place
        return False

    def best() -> float:
        return min(tried, key=lambda place: tried[place].loss)

    direction = 1 if attempt(1.0) else -1
    place = 1.0 if direction == 1 else 0.0
    while attempt(place + direction):
        place += direction
    top = best()
    attempt(top - math.log(FINE, COARSE))
    attempt(top + math.log(FINE, COARSE))
    return tried[best()]


# --- one short training ----------------------------------------------------------------------------------------------


def _batches(trainer: Any) -> Iterator[tuple[list[Any], Any]]:
    """What the trainer's own loop takes for each optimizer step: micro-batches and the number of their items."""
    loader = trainer.get_train_dataloader()
    rows = iter(loader)
    try:
        while True:
            batch, items = trainer.get_batch_samples(
                rows, trainer.args.gradient_accumulation_steps, trainer.args.device
            )
            if not batch:
                return
            yield batch, items
    finally:
        if hasattr(loader, "end"):  # accelerate would take this loader for the one that runs
            loader.end()


def _heat(trainer: Any, batches: list[tuple[list[Any], Any]], judged: list[tuple[list[Any], Any]], rate: float) -> Heat:
    model, optimizer, args = trainer.model_wrapped, trainer.optimizer, trainer.args
    transformers.set_seed(args.seed)  # the same dropout for each
    groups = innermost(optimizer).param_groups
    begun = [group["initial_lr"] for group in groups]
    warm = max(1, len(batches) // 4)
    for step, (batch, items) in enumerate(batches):
        for group, initial in zip(groups, begun, strict=True):
            group["lr"] = initial / args.learning_rate * rate * min(1.0, (step + 1) / warm)
        trainer.current_gradient_accumulation_steps = len(batch)
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        loss = sum(trainer.training_step(model, copy.copy(part), items) for part in batch)
        if not math.isfinite(float(trainer.accelerator.reduce(loss, reduction="mean"))):
            return Heat(rate, math.inf, step + 1)
        if args.max_grad_norm and args.max_grad_norm > 0:
            trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        model.zero_grad()
    model.eval()
    parts = [part for batch, _ in judged for part in batch]
    losses = [trainer.prediction_step(model, copy.copy(part), prediction_loss_only=True)[0] for part in parts]
    loss = float(trainer.accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
    return Heat(rate, loss if math.isfinite(loss) else math.inf, len(batches))


@contextmanager
def _undisturbed(trainer: Any) -> Iterator[Callable[[], None]]:
    """Gives a function that puts weights, buffers and optimizer back to where they are now; at the end all is put back."""
    model, optimizer = trainer.model_wrapped, innermost(trainer.optimizer)
    places = [p for p in model.parameters() if p.requires_grad]
    places += [b for b in model.buffers() if b is not None and not b.is_meta]
    kept = [place.detach().to("cpu", copy=True) for place in places]
    fresh = not optimizer.state
    state = None if fresh else copy.deepcopy(optimizer.state_dict())
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = getattr(trainer.accelerator, "scaler", None)
    scale = scaler.state_dict() if scaler is not None else None
    gathered = {name: copy.deepcopy(vars(trainer)[name]) for name in _GATHERED if name in vars(trainer)}
    training = model.training

    def restore() -> None:
        with torch.no_grad():
            for place, value in zip(places, kept, strict=True):
                place.copy_(value)
        optimizer.state.clear()
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        if scaler is not None and scale:
            scaler.load_state_dict(scale)

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield restore
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        restore()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, value in gathered.items():
            setattr(trainer, name, value)
        model.zero_grad()
        model.train(training)


def _set_rate(trainer: Any, rate: float) -> None:
    """The rate in arguments, optimizer and scheduler; groups keep their ratios."""
    factor = rate / trainer.args.learning_rate
    for group in innermost(trainer.optimizer).param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]
        scheduler._last_lr = [last * factor for last in scheduler._last_lr]
    trainer.args.learning_rate = rate
