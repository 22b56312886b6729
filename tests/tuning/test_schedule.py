"""How long a tune is: within the hours, whole where they suffice, and refused where they are too few."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spectrum_peft.errors import OptionError
from spectrum_peft.tuning.schedule import Clock, Outline, outline, relative_step, rest, room_after, rungs_of, ties_of

MEASURED = json.loads((Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "modes.json").read_text())[
    "models"
]
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


@pytest.mark.parametrize("model", list(MEASURED))
@pytest.mark.parametrize(("timed", "others"), [
    ("spectrum 0.25", ["full", "spectrum 0.25, upper half"]),
    ("lora", ["spectra_qlora 0.5", "spectra_qlora 0.5, upper half", "alors 0.5"]),
    ("lora, SFT", ["spectra_qlora 0.5, SFT", "spectra_qlora 0.5, upper half, SFT", "alors 0.5, SFT"]),
])  # fmt: skip
def test_operations_beside_one_that_was_timed_say_what_a_step_of_its_kind_takes(
    model: str, timed: str, others: list[str]
) -> None:
    found = MEASURED[model]["contestants"]
    whole = found["full"]["trainable_parameters"]

    def operations(name: str) -> float:
        trained = 0 if "lora" in name or "alors" in name else found[name]["trainable_parameters"]
        return relative_step(trained, whole, checkpointing=False, depth=0.5 if "upper half" in name else 1.0)

    for name in others:  # a quarter is what is promised of the estimate before the first run
        said = found[timed]["step"]["median"] * operations(name) / operations(timed)
        assert said == pytest.approx(found[name]["step"]["median"], rel=0.25), name


def test_a_run_of_the_finals_is_longer_by_its_judging() -> None:
    plan = Outline(90, **WANTED)
    longer = Clock(CLOCK.step, CLOCK.overhead, 5.0)
    assert plan.final_seconds(longer) - plan.final_seconds(CLOCK) == pytest.approx((3 + 2) * 3 * 5.0)
    assert plan.race_seconds(longer) == plan.race_seconds(CLOCK)
