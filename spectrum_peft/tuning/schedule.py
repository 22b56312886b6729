"""How long runs are, how many there are, and what that takes: whole races and finals that fit into the hours.

Seconds are those of one process after the other: two processes share the work, and the hours with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import OptionError
from .race import KEPT

MOST_EPOCHS = 3  # of a run whose length was not given, where there are hours
FEWEST_STEPS = 2 * KEPT**2  # of a whole run: the first rung has two
MOST_FINALISTS, MOST_SEEDS = 6, 10
_CONTROLS = 2  # in the finals beside those that won
_WIDENED = 1.15  # of the first rung: rates beyond the edges, see `contestants.next_rate`
_USED = 0.95  # of the hours: planning itself, the report, a step that is slower


@dataclass(frozen=True)
class Clock:
    """What things take, in seconds.

    Attributes:
        step: {contestant: one optimizer step}.
        overhead: of a run of the race beside its steps: a process, loading, judging, saving.
        longer: by how much that of a run of the finals is longer, which is judged on the evaluation rows, too.
        timed: runs of which this is known, where none has been raced yet.
    """

    step: Mapping[str, float]
    overhead: float
    longer: float = 0.0
    timed: int = 0

    def mean(self) -> float:
        return sum(self.step.values()) / len(self.step)


@dataclass(frozen=True)
class Outline:
    """A tune in numbers.

    Attributes:
        steps: of a whole run. rates: of each contestant at first, beside those beyond the edges.
        finalists: beside the controls.
    """

    steps: int
    contestants: int
    rates: int
    finalists: int
    seeds: int

    @property
    def rungs(self) -> list[int]:
        return rungs_of(self.steps)

    def runs(self) -> list[int]:
        """How many runs there are at each rung, at most."""
        found = [self.contestants * self.rates]
        for _ in self.rungs[1:]:
            found.append(_most(found[-1], room_after(found[-1])))
        return found

    def race_seconds(self, clock: Clock) -> float:
        done, total, widened = 0, 0.0, _WIDENED
        for until, runs in zip(self.rungs, self.runs(), strict=True):
            total += widened * runs * (clock.overhead + (until - done) * clock.mean())
            done, widened = until, 1.0
        return total

    def final_seconds(self, clock: Clock) -> float:
        return final_seconds(self.finalists + _CONTROLS, self.seeds, self.steps, clock)

    def seconds(self, clock: Clock) -> float:
        return self.race_seconds(clock) + self.final_seconds(clock)


def rungs_of(steps: int) -> list[int]:
    """The steps at which the race judges: the whole length, a third and a ninth of it, none below two."""
    found = {max(1, math.ceil(steps / KEPT**k)) for k in range(3)}
    return sorted(n for n in found if n >= 2 or n == steps)


def room_after(runs: int) -> int:
    """How many of a rung's runs go on."""
    return max(2, math.ceil(runs / KEPT))


def ties_of(room: int) -> int:
    """How many beyond the room go on where they are not told apart from the best."""
    return room // KEPT


def _most(runs: int, room: int) -> int:
    """How many of a rung's runs go on at most."""
    return min(runs, room + ties_of(room) + _CONTROLS)


def final_seconds(contestants: int, seeds: int, steps: int, clock: Clock) -> float:
    return contestants * seeds * (clock.overhead + clock.longer + steps * clock.mean())


def outline(
    hours: float | None,
    steps: int,
    clock: Clock,
    *,
    contestants: int,
    rates: int,
    finalists: int,
    seeds: int,
    spent: float = 0.0,
) -> Outline:
    """The largest tune that fits: first the runs grow shorter, then there are fewer rates, finalists, contestants.

    Args:
        hours: None: all of it. steps: of a whole run, at most.
        spent: seconds that are gone.
    Raises:
        OptionError: the smallest takes longer.
    """
    finalists = min(finalists, max(0, contestants - _CONTROLS))
    whole = Outline(steps, contestants, rates, finalists, seeds)
    if hours is None:
        return whole
    budget = _USED * 3600 * hours - spent
    least = min(FEWEST_STEPS, steps)
    tried = whole
    smaller = [replace(whole, rates=n) for n in range(rates, 1, -1)] or [whole]
    smaller += [replace(smaller[-1], finalists=n) for n in range(finalists - 1, 0, -1)]
    smaller += [
        replace(smaller[-1], contestants=n, finalists=min(smaller[-1].finalists, n - _CONTROLS))
        for n in range(contestants - 1, _CONTROLS - 1, -1)
    ]
    smaller += [replace(smaller[-1], rates=1)]
    # A long run tells more than many rates do: the grid is whole as long as a half of the length fits.
    for floor in (max(least, steps // 2), max(least, steps // 4), least):
        for tried in smaller:
            fitting = _longest(tried, budget, clock, floor)
            if fitting is not None:
                return fitting
    need = (replace(tried, steps=least).seconds(clock) + spent) / _USED / 3600
    raise OptionError(
        f"hours is {hours:g}, too few for one race of {tried.contestants} contestants over {least} steps and its finals, "
        f"which take about {need:.2g} here (a step {clock.mean():.3g} s, a run's start and end {clock.overhead:.0f} s)."
    )


def _longest(tried: Outline, budget: float, clock: Clock, floor: int) -> Outline | None:
    """The same with as many steps as fit, at least `floor`."""
    if replace(tried, steps=floor).seconds(clock) > budget:
        return None
    low, high = floor, tried.steps
    while low < high:
        middle = (low + high + 1) // 2
        if replace(tried, steps=middle).seconds(clock) <= budget:
            low = middle
        else:
            high = middle - 1
    return replace(tried, steps=low)


@dataclass(frozen=True)
class Rest:
    """What is left to do after a rung: how many go on, after the last one into the finals beside the controls, and the finals."""

    room: int
    finalists: int
    seeds: int
    steps: int


def rest(hours: float | None, spent: float, clock: Clock, plan: Outline, *, rung: int, runs: int) -> Rest:
    """What fits into the rest of the hours, by measured times.

    Args:
        rung: number of the one that is over. runs: that ended there.
    """
    rungs = plan.rungs
    last = rung == len(rungs) - 1
    found = Rest(plan.finalists if last else room_after(runs), plan.finalists, plan.seeds, plan.steps)
    if hours is None:
        return found
    left = _USED * 3600 * hours - spent

    def seconds(one: Rest) -> float:
        total, n, done = final_seconds(one.finalists + _CONTROLS, one.seeds, one.steps, clock), one.room, rungs[rung]
        for until in rungs[rung + 1 :]:
            total += _most(runs, n) * (clock.overhead + (until - done) * clock.mean())
            n, done = room_after(_most(runs, n)), until
        return total

    while seconds(found) > left and found.room > 1 and not last:
        found = replace(found, room=found.room - 1)
    while seconds(found) > left and found.finalists > 1:
        found = replace(found, finalists=found.finalists - 1)
    while seconds(found) > left and found.steps > rungs[0]:
        found = replace(found, steps=found.steps - max(1, found.steps // 20))
    most = min(MOST_FINALISTS, plan.contestants - _CONTROLS)
    while True:
        more = [
            replace(found, finalists=max(found.finalists, min(most, found.finalists + 1))),
            replace(found, seeds=max(found.seeds, min(MOST_SEEDS, found.seeds + 1))),
        ]
        if not last:
            more.insert(0, replace(found, room=min(runs, found.room + 1)))
        fitting = [one for one in more if one != found and seconds(one) <= left]
        if not fitting:
            break
        found = min(fitting, key=seconds)
    return replace(found, room=found.finalists) if last else found


def relative_step(trained: float, total: float, *, checkpointing: bool, depth: float = 1.0) -> float:
    """Operations of a step over those of a forward pass: forward 1, backward through the layers 1 for the depth it reaches, the
    gradients of weights 1 for the share that trains, one more forward pass where checkpoints are computed again.

    Source: Kaplan et al. (2020), arXiv:2001.08361, section 2.1: 2 operations a weight and token forward, twice that backward.
    """
    return 1.0 + depth + trained / max(1.0, total) + (1.0 if checkpointing else 0.0)
