"""Who goes on: the test against scipy's, its stated error by simulation, laws of the cut."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from scipy.stats import binom, ttest_rel

from spectrum_peft.compare.matrix import Contestant
from spectrum_peft.tuning.contestants import default_rate, next_rate
from spectrum_peft.tuning.race import Entry, best_rates, chance_behind, judge


def entries(values: dict[str, float], spread: float = 0.0, rows: int = 40, seed: int = 0) -> list[Entry]:
    """A run for each name, whose rows lie about its value; rows are as hard for one as for the other."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=rows)
    found = []
    for name, value in values.items():
        own = value + hard + spread * rng.normal(size=rows)
        found.append(Entry(name, 1e-3, float(own.mean()), tuple(own)))
    return found


@pytest.mark.parametrize("higher", [False, True])
def test_the_chance_is_that_of_scipys_paired_test(higher: bool) -> None:
    a, b = entries({"a": 1.1, "b": 1.0}, spread=0.3)
    assert a.rows and b.rows
    theirs = ttest_rel(a.rows, b.rows, alternative="less" if higher else "greater").pvalue
    # Two float64 implementations of Student's distribution; SciPy states about 1e-10 for its own.
    assert chance_behind(a.rows, b.rows, higher) == pytest.approx(theirs, rel=1e-9)
    assert chance_behind(b.rows, a.rows, higher) == pytest.approx(1 - theirs, rel=1e-9)


def test_rows_that_do_not_differ_tell_nothing_and_those_that_differ_by_the_same_tell_all() -> None:
    assert chance_behind([1.0, 2.0], [1.0, 2.0], False) == 0.5
    assert chance_behind([2.0, 3.0], [1.0, 2.0], False) == 0.0
    assert chance_behind([1.0], [0.0], False) == 0.5


def test_the_best_is_stopped_by_the_test_no_more_often_than_stated() -> None:
    error, races, n = 0.1, 400, 8
    stopped = 0
    for seed in range(races):  # all are equally good: whichever is called the best, it must not be stopped more often
        verdicts = judge(
            entries(dict.fromkeys("abcdefgh", 0.0), 1.0, seed=seed), higher=False, room=0, ties=n, error=error
        )
        stopped += next(v for v in verdicts if v.entry.contestant == "a").fate == "worse"
    # 0.999 quantile of the binomial at the stated rate
    assert stopped <= binom.ppf(0.999, races, error)
    # ... and a test at that level for each pair would be seen: it must not be called the stated one.
    loose = sum(
        any(
            v.p is not None and v.p < error
            for v in judge(found, higher=False, room=0, ties=n, error=error)
            if v.entry.contestant == "a"
        )
        for found in (entries(dict.fromkeys("abcdefgh", 0.0), 1.0, seed=seed) for seed in range(races))
    )
    assert loose > stopped


def test_below_the_cut_what_is_far_behind_is_stopped_and_what_is_not_told_apart_goes_on_while_there_is_room() -> None:
    runs = entries({"a": 1.0, "b": 1.01, "c": 1.02, "d": 3.0, "e": 1.03}, 0.5)
    fates = {v.entry.contestant: v.fate for v in judge(runs, higher=False, room=1, ties=1, error=0.05)}
    assert sorted(fates[n] for n in "abce") == ["goes on", "goes on", "no room", "no room"] and fates["d"] == "worse"
    above = judge(runs, higher=False, room=5, error=0.05)  # who has room goes on whatever the test says
    assert {v.fate for v in above} == {"goes on"} and above[-1].p is not None and above[-1].p < 0.001


def test_a_control_goes_on_at_its_best_rate_and_takes_no_room() -> None:
    runs = entries({"a": 1.0, "b": 1.1, "lora": 3.0}, 0.1)
    runs.append(dataclasses.replace(runs[-1], rate=1e-2, value=4.0, rows=tuple(r + 1 for r in runs[-1].rows or ())))
    fates = {
        (v.entry.contestant, v.entry.rate): v.fate for v in judge(runs, higher=False, room=2, error=1e-9, kept={"lora"})
    }
    assert fates["lora", 1e-3] == "kept" and fates["lora", 1e-2] == "worse"
    assert fates["a", 1e-3] == fates["b", 1e-3] == "goes on"


def test_order_and_direction_do_not_matter() -> None:
    runs = [*entries({"a": 1.0, "b": 1.2, "c": 1.21, "d": 2.0}, 0.5), Entry("e", 1e-3, None)]
    first = judge(runs, higher=False, room=2, error=0.05)
    random.Random(0).shuffle(runs)
    assert judge(runs, higher=False, room=2, error=0.05) == first
    turned = [
        dataclasses.replace(e, value=None if e.value is None else -e.value, rows=e.rows and tuple(-r for r in e.rows))
        for e in runs
    ]
    other = judge(turned, higher=True, room=2, error=0.05)
    assert [(v.entry.contestant, v.fate) for v in other] == [(v.entry.contestant, v.fate) for v in first]
    assert first[-1].fate == "failed" and sum(v.stays for v in first) == 2


def test_without_rows_only_the_room_decides() -> None:
    verdicts = judge(
        [Entry(n, 1e-3, v) for n, v in (("a", 1.0), ("b", 9.0), ("c", 8.0))], higher=False, room=2, error=0.05
    )
    assert [(v.entry.contestant, v.fate, v.p) for v in verdicts] == [
        ("a", "goes on", None), ("c", "goes on", None), ("b", "no room", None),
    ]  # fmt: skip


def test_one_rate_of_each_contestant_reaches_the_finals() -> None:
    runs = [Entry("a", 1e-3, 1.0), Entry("a", 3e-3, 1.1), Entry("b", 1e-3, 1.2), Entry("c", 1e-3, 1.3)]
    stay = [
        (v.entry.contestant, v.entry.rate)
        for v in judge(runs, higher=False, room=2, error=0.05, one_each=True)
        if v.stays
    ]
    assert stay == [("a", 1e-3), ("b", 1e-3)]
    assert list(best_rates(runs, False)) == ["a", "b", "c"] and best_rates(runs, True)["a"].rate == 3e-3


def test_the_grid_goes_on_by_ones_and_threes_beyond_its_edge_only() -> None:
    grid = [3e-5, 1e-4, 3e-4, 1e-3]
    assert next_rate(grid, 1e-3) == 3e-3 and next_rate(grid, 3e-5) == 1e-5
    assert next_rate([*grid, 3e-3], 3e-3) == 1e-2
    assert next_rate(grid, 1e-4) is None and next_rate([1e-3], 1e-3) is None
    assert next_rate([2e-4, 4e-4], 4e-4) == 8e-4


def test_a_contestant_begins_at_the_default_of_its_mode_at_its_rank_and_ratio() -> None:
    """Long runs; the share of the matrices is no part of it under a head; PEFT's own methods go as LoRA does."""
    real = Contestant("real", {"mode": "spectrum", "spectrum_ratio": 0.25})
    for contestant, task, rate in (
        (real, "causal_lm", 4e-5),
        (real, "classification", 2e-5),
        (Contestant("all", {"mode": "full"}), "causal_lm", 2e-5),
        (Contestant("lora", {"mode": "lora", "r": 2}), "causal_lm", 4e-4),
        (Contestant("lora", {"mode": "lora"}), "causal_lm", 1.4e-4),
        (Contestant("own", {}, peft={"peft_type": "LORA", "r": 32}), "causal_lm", 1e-4),
    ):
        assert default_rate(contestant, task, 10**5) == rate, contestant.label
