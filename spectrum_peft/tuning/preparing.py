"""What is settled before the first run: the rows split, the contestants priced, a few steps timed, the hours planned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..compare.matrix import Cell, Contestant
from ..errors import OptionError, TrainingSetupError
from ..memory import format_bytes
from .cells import Cells
from .contestants import chosen, rates_of
from .prices import MARGIN, Price, Pricing, renamed, step_of, those_that_fit
from .queue import Task
from .schedule import MOST_EPOCHS, Clock, Outline, outline, relative_step
from .settings import Asked
from .splits import Sets, carve

CLOCK_STEPS = 4  # of the run that is timed before anything is planned


@dataclass(frozen=True)
class Prepared:
    """What is settled, as `prepared.json` keeps it.

    Attributes:
        prices: of the contestants that fit, in the order in which they are left out from the end.
        dropped: lines on those that do not.
        outline: of the race and the finals as planned. clock: what was expected.
        seconds: that preparing took.
    """

    prices: tuple[Price, ...]
    dropped: tuple[str, ...]
    outline: Outline
    clock: Clock
    sets: Sets
    seconds: float

    def as_plain(self) -> dict[str, Any]:
        """Of plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> Prepared:
        prices = tuple(
            Price(**{**p, "contestant": Contestant(**{**p["contestant"], "also": tuple(p["contestant"]["also"])})})
            for p in found["prices"]
        )
        return cls(
            prices, tuple(found["dropped"]), Outline(**found["outline"]), Clock(**found["clock"]), Sets(**found["sets"]),
            found["seconds"],
        )  # fmt: skip


def prepare(
    asked: Asked,
    run: Any,
    *,
    cells_of: Callable[[Sets], Cells],
    made: Callable[[list[Mapping[str, Any]]], list[Contestant]],
    check: Callable[[Cell], None],
    counted: Callable[[], tuple[list[str], int]],
    announce: Callable[[str], None],
) -> Prepared:
    """Split, price, time, plan.

    Args:
        run: of `train.settle`, of any mode: rows, dtype, task.
        made: contestants as mappings -> contestants. check: raises where `train` would refuse a cell.
        counted: lines on what becomes of the rows, and the tokens of the longest.
    Raises:
        OptionError: too few rows, nothing that fits the memory or the hours.
        TrainingSetupError: whatever is timed fails.
    """
    began = time.monotonic()
    sets = carve(
        run.train_rows,
        run.eval_rows,
        asked.output / "data",
        str(asked.train["dataset"]),
        asked.values["search_rows"],
    )
    announce(
        f"{sets.train_rows} rows train, {sets.search_rows} judge the search, {sets.evaluation_rows} are "
        f"looked at once, at the end{' (of the training set)' if sets.carved else ''}"
    )
    if sets.train_rows < asked.values["batch_size"]:
        raise OptionError(
            f"{asked.source}: batch_size is {asked.values['batch_size']}, and {sets.train_rows} rows are left to train on."
        )
    lines, length = counted()
    for line in lines:
        announce(line)
    pricing = _pricing(asked, run, length)
    contestants = chosen(asked, pricing.report(), made)
    room = "memory" if pricing.memory is None else f"{format_bytes(pricing.memory)}, of which {MARGIN:.0%} stay free"
    announce(f"what fits into {room}: dry runs of {len(contestants)} contestants")
    prices = []
    for contestant in contestants:
        prices.append(renamed(pricing.price(contestant)))
        announce(prices[-1].line())
    fitting = those_that_fit(prices, pricing.memory)
    cells = cells_of(sets)
    for price in fitting:
        check(cells.make(price, _short(asked, price, 1), steps=1))
    steps = _most_steps(asked, sets)
    clock = _clock(fitting, cells)
    plan = outline(
        asked.values["hours"], steps, clock, contestants=len(fitting),
        rates=max(len(rates_of(p.contestant, asked, steps)) for p in fitting), finalists=asked.values["finalists"],
        seeds=len(asked.values["seeds"]), spent=time.monotonic() - began,
    )  # fmt: skip
    announce(
        f"race: {plan.contestants} contestants at {plan.rates} rates: "
        + ", ".join(f"{runs} to step {until}" for until, runs in zip(plan.rungs, plan.runs(), strict=True))
        + f"; finals: {plan.finalists} and the controls, {plan.seeds} seeds, {plan.steps} steps"
    )
    hours = asked.values["hours"]
    announce(
        f"about {plan.seconds(clock) / 3600:.2g} h{'' if hours is None else f' of {hours:g} h'}: a step {clock.mean():.3g} "
        f"s, a run's start and end {clock.overhead:.0f} s"
    )
    dropped = tuple(p.line() for p in prices if not p.fits)
    return Prepared(tuple(fitting[: plan.contestants]), dropped, plan, clock, sets, time.monotonic() - began)


def judging_seconds(results: Mapping[str, Any], sets: Sets) -> float:
    """Seconds of judging on the evaluation rows, by those on the search rows: the metric, and all others beside it."""
    return float(2 * results["judge_seconds"]["search"] * sets.evaluation_rows / sets.search_rows)


def _pricing(asked: Asked, run: Any, length: int) -> Pricing:
    import transformers

    from ..devices import default_device, free_memory

    device = default_device()
    memory = asked.values["memory"]
    if memory is None:
        free = free_memory(device)
        memory = free[0] if free else None
    step = step_of(
        asked.train, device="cuda" if device.type == "cuda" else "cpu", dtype=str(run.dtype),
        trainer="sft" if asked.task == "causal_lm" else "transformers", max_length=length,
    )  # fmt: skip
    return Pricing(
        run.config, asked.train, step, memory, asked.values["batch_size"], run.task.task_type,
        getattr(transformers, run.task.auto_class),
    )  # fmt: skip


def _most_steps(asked: Asked, sets: Sets) -> int:
    """The length of a whole run as it was asked for, or as long as it may become."""
    train = asked.train
    if (given := train.get("max_steps")) is not None and int(given) > 0:
        return int(given)
    epoch = max(1, sets.train_rows // asked.values["batch_size"])
    if (given := train.get("num_train_epochs")) is not None:
        return max(1, round(float(given) * epoch))
    return int(epoch * (1 if asked.values["hours"] is None else MOST_EPOCHS))


def _short(asked: Asked, price: Price, steps: int) -> Task:
    return Task(price.contestant.label, 1e-4, steps, int(asked.values["race_seed"]))


def _clock(prices: Sequence[Price], cells: Cells) -> Clock:
    """Time a few steps of the first contestant of each kind; the others by their operations beside it.

    Kinds are real weights and adapters, on the base as it is and quantized: operations alone do not say what the many small
    products of adapters take, nor what a 4-bit weight does.
    """
    kinds: dict[Any, list[Price]] = {}
    for price in prices:
        kinds.setdefault((_real(price), price.settings.get("quantization")), []).append(price)
    step: dict[str, float] = {}
    timed: list[Clock] = []
    failed: list[str] = []
    for alike in kinds.values():
        for first in alike:
            seconds = _timed(first, cells, failed)
            if seconds is not None:
                timed.append(seconds)
                step |= {p.contestant.label: seconds.step[""] * _operations(p) / _operations(first) for p in alike}
                break
    if not timed:
        raise TrainingSetupError(f"all {len(failed)} runs that were timed failed, the first: {failed[0]}")
    usual = statistics.fmean(step.values())  # of a kind none of which can be timed: its runs will fail
    return Clock(
        {p.contestant.label: step.get(p.contestant.label, usual) for p in prices},
        statistics.fmean(one.overhead for one in timed), statistics.fmean(one.longer for one in timed),
        len(timed) + len(failed),
    )  # fmt: skip


def _timed(first: Price, cells: Cells, failed: list[str]) -> Clock | None:
    """One contestant's times; None where it failed, and why is noted."""
    cells.announce(f"timing {CLOCK_STEPS} steps of {first.contestant.label}")
    cell = cells.make(first, _short(cells.asked, first, CLOCK_STEPS), steps=CLOCK_STEPS)
    began = time.monotonic()
    results, error = cells.run(cell)
    seconds = time.monotonic() - began
    cells.forget(cell)
    if results is None:
        cells.announce(f"  failed: {error}")
        failed.append(f"{first.contestant.label}: {error}")
        return None
    steps = results["step_seconds"]
    return Clock(
        {"": statistics.median(steps[1:] or steps)}, seconds - sum(steps), judging_seconds(results, cells.sets)
    )


def _real(price: Price) -> bool:
    """Weights of the base train themselves, as a whole."""
    from ..plan import MODES

    return price.contestant.peft is None and MODES[price.contestant.mode].action == "train"


def _operations(price: Price) -> float:
    real = price.trained if _real(price) else 0
    depth = float(price.contestant.settings.get("backward_depth", 1.0))
    return relative_step(real, price.total, checkpointing=bool(price.settings["gradient_checkpointing"]), depth=depth)
