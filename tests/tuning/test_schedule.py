"""How long a tune is: within the hours, whole where they suffice, and refused where they are too few."""

from __future__ import annotations

import re

import pytest

from spectrum_peft.errors import OptionError
from spectrum_peft.tuning.schedule import Clock, Outline, outline, relative_step, rest, room_after, rungs_of, ties_of

CLOCK = Clock({"a": 1.0, "b": 3.0}, 10.0)  # 2 s a step on average
WANTED = {"contestants": 10, "rates": 4, "finalists": 3, "seeds": 3}


def test_rungs_are_thirds_and_end_at_the_whole_length() -> None:
    assert rungs_of(90) == [10, 30, 90]
    assert rungs_of(18) == [2, 6, 18]
    assert rungs_of(5) == [2, 5] and rungs_of(1) == [1]
    assert all(rungs_of(n)[-1] == n for n in range(1, 60))


def test_the_seconds_of_an_outline_are_those_of_its_runs_one_by_one() -> None:
    plan = Outline(90, **WANTED)
    runs = plan.runs()
    assert runs[0] == 40 and runs[1] == room_after(40) + ties_of(room_after(40)) + 2
    race = 1.15 * runs[0] * (10 + 10 * 2) + runs[1] * (10 + 20 * 2) + runs[2] * (10 + 60 * 2)
    assert plan.race_seconds(CLOCK) == pytest.approx(race)
    assert plan.final_seconds(CLOCK) == (3 + 2) * 3 * (10 + 90 * 2)


@pytest.mark.parametrize("hours", [0.7, 1.0, 2.0, 5.0, 20.0])
def test_a_tune_fits_and_is_no_shorter_than_it_must_be(hours: float) -> None:
    plan = outline(hours, 900, CLOCK, **WANTED)
    assert plan.seconds(CLOCK) <= 3600 * hours
    assert plan.steps <= 900
    if plan.steps < 900:  # the next longer one would not fit
        longer = Outline(plan.steps + 3, plan.contestants, plan.rates, plan.finalists, plan.seeds)
        assert longer.seconds(CLOCK) > 0.9 * 3600 * hours
    assert plan.contestants >= 2 and plan.seeds == 3


def test_without_hours_all_of_it_is_done_and_with_plenty_too() -> None:
    assert outline(None, 900, CLOCK, **WANTED) == outline(1e4, 900, CLOCK, **WANTED) == Outline(900, **WANTED)


def test_too_few_hours_say_how_many_would_do_and_those_do() -> None:
    with pytest.raises(OptionError, match=r"hours is 0\.01, too few") as caught:
        outline(0.01, 900, CLOCK, **WANTED)
    found = re.search(r"which take about (\S+) here", str(caught.value))
    assert found
    assert outline(1.05 * float(found[1]), 900, CLOCK, **WANTED).steps >= 18


def test_slower_steps_than_thought_shrink_the_rest_and_faster_ones_let_it_grow() -> None:
    plan = outline(3.0, 900, CLOCK, **WANTED)
    spent = plan.race_seconds(CLOCK) / 3
    asked = rest(None, spent, CLOCK, plan, rung=0, runs=40)
    slow = rest(3.0, 2 * spent, Clock({"a": 4.0}, 20.0), plan, rung=0, runs=40)
    fast = rest(3.0, spent / 2, Clock({"a": 0.3}, 2.0), plan, rung=0, runs=40)
    assert (slow.room, slow.finalists, slow.steps) < (asked.room, asked.finalists, asked.steps)
    assert slow.seeds >= 3 and fast.room > asked.room and fast.finalists >= asked.finalists and fast.steps == plan.steps


def test_a_step_counts_forward_backward_and_the_weights_that_train() -> None:
    full = relative_step(100, 100, checkpointing=False)
    assert full == 3 and relative_step(0, 100, checkpointing=False) == 2
    assert (
        relative_step(0, 100, checkpointing=True) == full
        and relative_step(0, 100, checkpointing=False, depth=0.5) == 1.5
    )
