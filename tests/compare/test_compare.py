"""The comparison: which cells there are, that they are run once and honestly, and what is made of their numbers.

Most runs happen in this process, cell by cell, as their own processes would do them; what only processes show (a kill,
memory of its own) is marked slow.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml

from spectrum_peft.cli.main import main
from spectrum_peft.compare import page, read_comparison, runs
from spectrum_peft.compare.figures import as_csv, as_markdown, columns, shown, spread
from spectrum_peft.compare.matrix import Cell, Contestant, Shapes, cells_of, contestants_of, file_digest
from spectrum_peft.compare.outcome import Outcome
from spectrum_peft.compare.report import write_results
from spectrum_peft.compare.results import collect
from spectrum_peft.compare.runs import _alone_in, _environment, last_line, scan_of
from spectrum_peft.compare.settings import Comparison
from spectrum_peft.compare.statistics import interval, not_told_apart
from spectrum_peft.errors import ComparisonError, OptionError
from spectrum_peft.machine import machine
from spectrum_peft.plan import MODES, make_plan
from spectrum_peft.records import PLAN_FILE, Plan, finite_only

TRAIN = {"model": "m", "dataset": "d.jsonl", "eval_dataset": "e.jsonl"}
SELECTIVE = [name for name, mode in MODES.items() if mode.selective]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def comparison(train: dict[str, Any] | None = None, task: str = "causal_lm", **given: Any) -> Comparison:
    return read_comparison(
        given, train=TRAIN | (train or {}), arguments=(), task=task, output=Path("out"), source="compare.yaml"
    )


def labels(**given: Any) -> list[str]:
    return [c.label for c in contestants_of(comparison(**given))]


# --- which contestants -----------------------------------------------------------------------------------------------


def test_by_default_every_mode_is_there_beside_chance_and_depth() -> None:
    contestants = contestants_of(comparison())
    assert {c.mode for c in contestants} == set(MODES)
    for name in SELECTIVE:
        own = [c for c in contestants if c.mode == name]
        assert [(c.settings["criterion"], c.control) for c in own] == [
            ("spectrum", None), ("random", "random"), ("last", "last"),
        ]  # fmt: skip
    assert not any("learning_rate" in c.settings for c in contestants)  # each run takes its mode's own


def test_the_matrix_is_a_product_where_the_mode_chooses_and_one_where_it_does_not() -> None:
    names = labels(modes=["spectrum", "lora"], ratios=[0.25, 0.5], criteria=["spectrum", "mp"], controls=[])
    assert names == ["spectrum 0.25", "spectrum 0.25 by mp", "spectrum 0.5", "spectrum 0.5 by mp", "lora"]
    cells = cells_of(one := comparison(modes=["lora"], seeds=[3, 4], controls=[]), contestants_of(one), {})
    assert [(c.label, c.train["seed"]) for c in cells] == [("lora", 3), ("lora", 4)]


def test_rates_are_the_modes_own_or_given_for_all_or_by_name_and_can_be_multiplied() -> None:
    def rates(**given: Any) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for c in contestants_of(comparison(modes=["spectrum", "lora"], controls=["random"], **given)):
            found.setdefault(c.label.partition(" at ")[0], []).append(c.settings.get("learning_rate"))
        return found

    assert rates(learning_rate_factors=[0.5, 2]) == {
        "spectrum 0.5": [1.4e-5, 5.6e-5], "spectrum 0.5 by random": [1.4e-5, 5.6e-5], "lora": [7e-5, 2.8e-4],  # of rank 16
    }  # fmt: skip
    for task, rate in (("causal_lm", 8e-5), ("classification", 4e-5)):  # under a head the ratio is no part of it
        assert rates(task=task, learning_rate_factors=[2], ratios=[0.25])["spectrum 0.25"] == [rate]
    own = [{"name": f"own {r}", "peft": {"peft_type": "LORA", **({"r": r} if r else {})}} for r in (0, 2)]
    found = rates(learning_rate_factors=[1, 2], contestants=own)
    assert (found["own 0"], found["own 2"]) == ([2e-4, 4e-4], [4e-4, 8e-4])  # without one it is PEFT's, 8
    assert set(map(tuple, rates(learning_rates=[1e-3]).values())) == {(1e-3,)}
    assert rates(learning_rates={"spectrum": [1e-4], "spectrum 0.5 by random": [3e-4]}) == {
        "spectrum 0.5": [1e-4], "spectrum 0.5 by random": [3e-4], "lora": [None],
    }  # fmt: skip
    assert "lora at 0.0001" in labels(learning_rates=[1e-4, 1e-3], controls=[])


def test_what_would_be_the_same_run_twice_is_one_contestant() -> None:
    twice = [{"name": "mine", "mode": "lora"}, {"name": "other", "mode": "lora", "r": 4}]
    assert labels(modes=["lora"], controls=[], contestants=twice) == ["lora", "other"]
    assert labels(modes=["spectrum"], criteria=["spectrum", "random"], controls=["random"]) == [
        "spectrum 0.5", "spectrum 0.5 by random",
    ]  # fmt: skip


def test_a_name_that_was_dropped_stands_in_a_note() -> None:
    twice = [
        {"name": "mine", "mode": "lora"},
        {"name": "yours", "mode": "lora"},
        {"name": "other", "mode": "lora", "r": 4},
    ]
    one = comparison(modes=["lora"], controls=[], contestants=twice)
    contestants = contestants_of(one)
    assert [(c.label, c.also) for c in contestants] == [("lora", ("mine", "yours")), ("other", ())]
    notes = collect(one, contestants, [], machine(), None)["notes"]
    assert "'mine', 'yours' asked for the settings of 'lora' and stands there" in notes
    assert not any("'other'" in note for note in notes)


@pytest.mark.parametrize(
    ("task", "metric"),
    [("causal_lm", "loss"), ("multi_label", "micro_f1"), ("regression", "loss"), ("token_classification", "macro_f1")],
)
def test_each_task_has_its_metric_and_only_what_can_be_judged_alone_is_compared(task: str, metric: str) -> None:
    assert comparison(task=task).asked["metric"] == metric
    with pytest.raises(OptionError, match="task is 'dpo', and compare judges causal_lm, classification, multi_label"):
        comparison(task="dpo")


def test_a_quantized_base_has_no_mode_that_trains_all_of_it() -> None:
    one = comparison({"quantization": "nf4"})
    assert "full" not in one.asked["modes"]
    assert "lora" in one.asked["modes"]
    assert any("left out" in note for note in one.notes)


def test_uniform_rank_has_the_budget_and_the_scale_of_what_it_is_held_against(tiny_llama_folder: Path) -> None:
    one = comparison(
        {"model": str(tiny_llama_folder), "r": 16}, modes=["alors", "spectra_qlora"], controls=["uniform_rank"]
    )
    shapes = Shapes(one)
    contestants = contestants_of(one, shapes)
    uniform = [c for c in contestants if c.control]
    # alors at one half: a quarter of the matrices at rank 16, a quarter at 4; spectra_qlora: half of them at 16.
    assert [c.settings["r"] for c in uniform] == [(16 + 4) // 4, 16 // 2]
    for c in uniform:
        assert c.settings["lora_alpha"] / c.settings["r"] == 2
    reference = shapes.trainable({"mode": "spectra_qlora", "spectrum_ratio": 0.5})
    assert shapes.trainable(uniform[1].settings) == reference


def test_mlp_only_takes_what_is_no_attention(tiny_llama_folder: Path) -> None:
    one = comparison({"model": str(tiny_llama_folder)}, modes=[], controls=["mlp_only"])
    [c] = contestants_of(one)
    assert {name.rpartition(".")[2] for name in c.settings["target_modules"]} == {"gate_proj", "up_proj", "down_proj"}
    assert len(c.settings["target_modules"]) == 3 * 4


def test_adalora_plans_over_the_whole_run() -> None:
    [c] = contestants_of(comparison({"max_steps": 100, "r": 8}, modes=[], controls=["adalora"]))
    assert c.peft is not None
    assert (c.peft["init_r"], c.peft["target_r"], c.peft["tinit"], c.peft["tfinal"]) == (12, 8, 10, 30)
    with pytest.raises(OptionError, match="give max_steps"):
        contestants_of(comparison(modes=[], controls=["adalora"]))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"modes": ["spectrom"]}, "mode is 'spectrom'. Did you mean 'spectrum'"),
        ({"modess": ["lora"]}, "unknown key 'modess'. Did you mean 'modes'"),
        ({"ratios": [25]}, "ratios is 25, wanted a number above 0, at most 1"),
        ({"ratios": []}, "ratios is an empty list"),
        ({"seeds": [0, 0]}, "seeds holds 0 twice"),
        ({"seeds": [0.5]}, "seeds is 0.5, wanted a whole number"),
        ({"criteria": ["mpp"]}, "'mpp' is none. Did you mean 'mp'"),
        ({"controls": ["randm"]}, "'randm' is none. Did you mean 'random'"),
        ({"metric": "los"}, "'los' is none. Did you mean 'loss'"),
        ({"metric": "accuracy"}, "'accuracy' is none."),
        ({"metric": "rouge_l"}, "which is not in generate"),
        ({"generate": ["rouge"]}, "'rouge' is none. Did you mean 'rouge_l'"),
        ({"learning_rates": [-1]}, "learning_rates is -1, wanted a number above 0"),
        ({"learning_rates": {"lorra": [1e-4]}}, "'lorra' is no mode. Did you mean 'lora'"),
        ({"confidence": 95}, "confidence is 95"),
        ({"modes": [], "controls": []}, "there is nothing to compare"),
        ({"contestants": {"name": "x"}}, "contestants is {'name': 'x'}, wanted a list"),
        ({"contestants": [{"mode": "lora"}]}, "wanted a mapping with a name"),
        ({"contestants": [{"name": "x"}]}, "(x): wanted either mode or peft"),
        ({"contestants": [{"name": "x", "mode": "lorra"}]}, "mode is 'lorra'"),
        ({"contestants": [{"name": "x", "mode": "lora", "seed": 1}]}, "seeds are those of the comparison"),
        ({"contestants": [{"name": "x", "mode": "lora", "eval_dataset": "e"}]}, "eval_dataset is 'e', but all contestants share"),
        ({"contestants": [{"name": "x", "mode": "lora", "model": "m"}]}, "model is 'm', but all contestants share it"),
        ({"contestants": [{"name": "x", "mode": "lora", "metric": "loss"}]}, "metric is 'loss', but all contestants share it"),
        ({"contestants": [{"name": "x", "peft": {"r": 4}}]}, "peft_type among them"),
        ({"learning_rates": [math.inf]}, "learning_rates is inf"),
        ({"seeds": [2**40]}, "wanted a whole number above -1, at most"),
        ({"reference": ["lora"]}, "reference is ['lora'], wanted a name"),
        ({"general_text": 5}, "general_text is 5, wanted a name"),
        ({"ratios": ["half"]}, "ratios is 'half', wanted a number above 0, at most 1"),
        ({"ratios": {"lora": 0.5}}, "ratios is {'lora': 0.5}, wanted a number"),
        ({"ratios": [math.nan]}, "ratios is nan, wanted a number"),
        ({"seeds": list(range(10_001))}, "seeds is a list of 10,001 values, wanted at least one value, at most 10,000"),
        ({"seeds": list(range(10_000)), "modes": list(MODES), "ratios": [0.1, 0.2]}, "ask for 160,000 runs, wanted at most"),
        ({"keep_models": "perhaps"}, "keep_models is 'perhaps', wanted true or false"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, wanted a whole number above 0"),
        ({"general_text": "x" * 5000}, "general_text is 'xxx"),
        ({"learning_rates": {"lora": [[1e-4]]}}, "learning_rates: lora is [0.0001], wanted a number above 0"),
        ({"contestants": [3]}, "contestants is [3], wanted a list of mappings"),
        ({"contestants": [{"name": "a\x1b[2J", "mode": "lora"}]}, "none of them a control character"),
        ({"contestants": [{"name": ["a"], "mode": "lora"}]}, "name is ['a'], wanted a single value"),
        ({"contestants": [{"name": "x", "mode": "lora", "learning_rate": "fast"}]}, "learning_rate is 'fast', wanted a number"),
        ({"train": {"max_steps": "many"}, "modes": [], "controls": ["adalora"]}, "max_steps is 'many', wanted int"),
        (
            {"modes": ["lora"], "controls": [], "contestants": [{"name": "x", "mode": "lora"}], "reference": "x"},
            "'x' is the same as 'lora'",
        ),
        ({"contestants": [{"name": "lora", "mode": "lora", "r": 2}]}, "two contestants are called 'lora'"),
        ({"train": {"seed": 3}}, "seed is one run's, and compare makes many: use seeds"),
        ({"train": {"mode": "lora"}}, "use modes"),
        ({"modes": ["lora"], "controls": [], "reference": "lor"}, "reference: 'lor' is no contestant. Did you mean 'lora'"),
        ({"task": "classification", "general_text": "g.jsonl"}, "general_text is for models that write text"),
    ],
)  # fmt: skip
def test_a_wrong_wish_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=re.escape(says)):
        contestants_of(comparison(**given))


# --- which cells are the same ----------------------------------------------------------------------------------------


def cell(**changes: Any) -> Cell:
    base = Cell(
        "lora", 0, {"mode": "lora", "seed": 0, "learning_rate": 1e-4}, ("--max-steps", "3"), {"speed": {"tokens": 3}},
        {"model": "a" * 64, "dataset": "b" * 64}, Contestant("lora", {"mode": "lora"}),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_a_digest_is_of_everything_that_decides_the_numbers_and_of_nothing_else() -> None:
    same = cell()
    other = Contestant("x", {"mode": "lora"}, peft={"peft_type": "LOHA"})
    for change in (
        {"train": {**same.train, "seed": 1}},
        {"train": {**same.train, "learning_rate": 2e-4}},
        {"train": {**same.train, "r": 8}},
        {"arguments": ("--max-steps", "4")},
        {"measure": {}},
        {"inputs": {**same.inputs, "dataset": "c" * 64}},
        {"inputs": {**same.inputs, "model": "c" * 64}},
        {"contestant": other},
    ):
        assert cell(**change).digest != same.digest, change
        assert cell(**change).folder != same.folder, change
    assert cell(label="another name").digest == same.digest
    assert cell(train=dict(reversed(same.train.items()))).digest == same.digest


def test_changed_data_is_another_cell(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    first = file_digest("d.jsonl")
    assert first == file_digest("d.jsonl")
    (tmp_path / "d.jsonl").write_text('{"text": "b"}\n')
    assert file_digest("d.jsonl") != first
    assert file_digest("some/hub-id") is None


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.31, 0.29], [5.0, -5.0, 0.1, 8.0, 2.0]])
def test_the_interval_is_students(values: list[float], confidence: float) -> None:
    found = interval(values, confidence)
    low, high = scipy.stats.t.interval(
        confidence, len(values) - 1, loc=sum(values) / len(values), scale=scipy.stats.sem(values)
    )
    # Two float64 implementations of Student's quantile; SciPy states about 1e-10 for its own.
    assert found["low"] == pytest.approx(low, rel=1e-9)
    assert found["high"] == pytest.approx(high, rel=1e-9)
    assert found["n"] == len(values)


def test_an_interval_of_three_runs_by_hand() -> None:
    # t(0.975, 2) = 4.302653 (any table); s = 1, n = 3.
    found = interval([1.0, 2.0, 3.0], 0.95)
    assert found["high"] - found["mean"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_run_has_no_interval() -> None:
    assert interval([2.0], 0.95) == {"mean": 2.0, "low": None, "high": None, "n": 1}


def test_only_what_the_intervals_part_from_the_best_is_called_worse() -> None:
    def row(mean: float, half: float | None) -> dict[str, Any]:
        return {
            "mean": mean,
            "low": None if half is None else mean - half,
            "high": None if half is None else mean + half,
        }

    rows = {"a": row(1.0, 0.2), "b": row(1.3, 0.2), "c": row(2.0, 0.1)}
    assert not_told_apart(rows, higher=False) == ["a", "b"]
    assert not_told_apart(rows, higher=True) == ["c"]
    assert not_told_apart({**rows, "d": row(0.1, None)}, higher=False) == ["a", "b"]  # one run is no evidence
    assert not_told_apart({"a": row(1.0, None), "b": rows["b"]}, higher=False) == []
    assert not_told_apart({"a": rows["a"]}, higher=False) == []


# --- what is made of the numbers -------------------------------------------------------------------------------------


def outcome(label: str, seed: int, loss: float, *, error: str | None = None, **changes: Any) -> Outcome:
    settings = {"mode": "spectrum", "spectrum_ratio": 0.5, "criterion": "spectrum", "learning_rate": 2e-5, **changes}
    contestant = Contestant(label, settings)
    made = Cell(label, seed, {**settings, "seed": seed}, (), {}, {}, contestant)
    found = {
        "metrics": {"loss": loss, "perplexity": math.exp(loss)}, "versions": machine()["packages"],
        "step_seconds": [9.0, 1.0, 3.0, 2.0], "input_tokens": 150, "before": {"loss": 3.0}, "trainable_parameters": 1000,
        "total_parameters": 4000, "steps": 4, "peak_memory_bytes": 2**30, "setup_seconds": {"scan": 1.0, "model": 2.0},
        "saved_bytes": 2**20, "loss_curve": [[1, 3.0], [2, loss]], "general": {"loss": 2.5},
        "tokens_per_second": {"tokens_per_second": 20.0}, "merged_tokens_per_second": None,
    }  # fmt: skip
    return Outcome(made, None if error else found, error, Path("log.txt"))


def collected(*outcomes: Outcome, **given: Any) -> dict[str, Any]:
    seeds = sorted({o.cell.seed for o in outcomes if o.cell.seed is not None})
    contestants = list({o.cell.label: o.cell.contestant for o in outcomes if o.cell.contestant}.values())
    one = comparison(seeds=seeds, **given)
    return collect(one, [c for c in contestants if c], outcomes, machine(), None)


def test_a_row_says_what_the_cell_measured() -> None:
    untrained = Outcome(
        Cell("untrained", None, TRAIN, (), {}, {}),
        {"metrics": {}, "general": {"loss": 2.25}, "versions": {}}, None, Path("log"),
    )  # fmt: skip
    found = collected(untrained, outcome("a", 0, 2.0))
    [row] = found["cells"]
    assert row["seconds_per_step"] == 2.0  # the first step warms up
    assert row["train_seconds"] == 15.0
    assert row["tokens_per_second"] == 10.0
    assert row["setup_seconds"] == 3.0
    assert row["forgetting"] == 0.25
    assert row["generation_tokens_per_second"] == 20.0
    assert row["merged_generation_tokens_per_second"] is None
    assert found["untrained"]["metrics"]["loss"] == 3.0
    assert found["untrained"]["general_loss"] == 2.25


def test_a_difference_is_taken_seed_by_seed() -> None:
    # The seeds differ by much more than the two methods, which differ by 0.1 always.
    runs_ = [outcome("a", s, 2.0 + s) for s in range(3)] + [outcome("b", s, 1.9 + s) for s in range(4)]
    runs_ += [outcome("c", 0, 1.0, error="lost"), outcome("d", 0, math.inf)]
    found = collected(*runs_, reference="a", contestants=[{"name": n, "mode": "lora"} for n in "abcd"])
    figures = {s["label"]: s["figures"].get("difference") for s in found["contestants"]}
    assert figures["a"] is None and figures["c"] is None
    assert figures["d"]["mean"] is None and figures["d"]["not_finite"] == 1  # it diverged: that is no difference of 0
    assert as_markdown(found).count("not finite") == 3  # loss, perplexity, difference
    assert figures["b"] == pytest.approx({"mean": -0.1, "low": -0.1, "high": -0.1, "n": 3})
    assert columns(found)[1] == ("difference", "difference to a")
    assert any("seed by seed" in note for note in found["notes"])
    assert "-0.1000" in as_markdown(found) and "difference to a" in as_markdown(found)


def test_a_difference_of_one_seed_has_no_interval_and_says_so() -> None:
    rows = [{"name": n, "mode": "lora"} for n in "ab"]
    alone = collected(outcome("a", 0, 2.0), outcome("b", 0, 1.9), reference="a", contestants=rows)
    [note] = [note for note in alone["notes"] if "seed by seed" in note]
    assert "without an interval" in note and "holds 0" not in note
    runs_ = [outcome("a", 0, 2.0), outcome("a", 1, 2.1), outcome("b", 0, 1.9), outcome("b", 1, 1.0, error="lost")]
    found = collected(*runs_, reference="a", contestants=rows)
    assert "-0.1000 (one seed)" in as_markdown(found)
    assert any("1 of 2 contestants finished fewer than two runs" in note for note in found["notes"])
    assert any("by Student's t" in note for note in found["notes"])


def test_the_untrained_base_is_the_mean_of_its_heads() -> None:
    runs_ = [outcome("a", 0, 2.0), outcome("b", 0, 2.0), outcome("a", 1, 2.0), outcome("b", 1, 2.0)]
    for one in runs_:
        one.results["before"] = {"loss": 3.0 + one.cell.seed}
    assert collected(*runs_)["untrained"]["metrics"]["loss"] == 3.5
    [row] = [line for line in as_markdown(collected(*runs_)).splitlines() if "untrained base" in line]
    assert row.split("|")[3].strip() == "3.5000"  # after the name and the rate
    assert collected(*runs_[:2])["untrained"]["metrics"]["loss"] == 3.0


def test_a_busy_machine_is_noted() -> None:
    runs_ = [outcome("a", 0, 2.0), outcome("b", 0, 1.9)]
    assert not any("other processes" in note for note in collected(*runs_)["notes"])
    runs_[1].results["other_cores"] = 1.44
    assert any("other processes kept up to 1.4 cores busy" in note for note in collected(*runs_)["notes"])


def test_names_are_no_markup(tmp_path: Path) -> None:
    name = r"<b>x</b> | $\frac$"
    found = collected(outcome(name, 0, 2.0), outcome("b", 0, 1.9), outcome(name, 1, 2.1), outcome("b", 1, 1.8))
    table = [line for line in as_markdown(found).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)[|]", line)) for line in table}) == 1 and "\\<b>" in table[3]
    write_results(found, tmp_path)  # a dollar sign begins no formula in a picture
    assert r"\frac" in (tmp_path / "plots" / "quality.svg").read_text()


def test_one_seed_names_no_winner_and_says_why() -> None:
    found = collected(outcome("a", 0, 2.0), outcome("b", 0, 1.0))
    assert found["best"] == []
    assert any("one seed" in note for note in found["notes"])


def test_several_seeds_have_intervals_and_those_that_reach_the_best_are_marked() -> None:
    losses = {"a": (2.0, 2.1, 2.05), "b": (2.06, 2.0, 2.1), "c": (4.0, 4.1, 3.9)}
    found = collected(*(outcome(name, seed, x) for name, xs in losses.items() for seed, x in enumerate(xs)))
    assert sorted(found["best"]) == ["a", "b"]
    text = as_markdown(found)
    assert "| a * |" in text and "| c |" in text
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:5]] == ["a *", "b *", "c"]
    low, high = scipy.stats.t.interval(0.95, 2, loc=2.05, scale=scipy.stats.sem(losses["a"]))
    assert f"2.0500 ± {(high - low) / 2:.4f}" in text


def test_a_run_that_diverged_or_failed_is_said_and_ranks_nowhere() -> None:
    found = collected(
        outcome("a", 0, 2.0), outcome("a", 1, 2.0), outcome("b", 0, 2.0), outcome("b", 1, 2.0, error="out of memory"),
        outcome("c", 0, math.nan), outcome("c", 1, 2.0), controls=[],
    )  # fmt: skip
    by_label = {s["label"]: s for s in found["contestants"]}
    assert by_label["b"]["failed"] == ["out of memory"]
    assert by_label["b"]["metrics"]["loss"]["low"] is None
    assert by_label["c"]["metrics"]["loss"]["not_finite"] == 1
    assert found["best"] == []
    text = as_markdown(found)
    assert "not finite" in text and "b (1 failed)" in text
    assert any("1 of 6 runs failed" in note for note in found["notes"])
    rows = list(csv.DictReader(as_csv(found).splitlines()))
    assert [r["error"] for r in rows] == ["", "", "", "out of memory", "", ""]
    json.dumps(finite_only(found), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "mean", "half", "text"),
    [
        ("peak_memory_bytes", 1.5 * 2**30, 0.06 * 2**30, "1.50 GiB ± 0.06"),  # in the unit of the mean
        ("saved_bytes", 3 * 2**20, 0, "3 MiB"),
        ("peak_memory_bytes", 1001 * 2**20, 30.4 * 2**20, "1,001 MiB ± 30"),
        ("trainable_parameters", 134515008, 0, "135 M"),
        ("seconds_per_step", 1.0, 0.02, "1 s ± 0.02"),
        ("train_seconds", 1200, 60, "20.0 min ± 1.0"),
        ("forgetting", 0.1, 0.05, "+0.1000 ± 0.0500"),
        ("loss", 2.0, 0.01, "2.0000 ± 0.0100"),
    ],
)
def test_a_figure_and_its_spread_are_in_one_unit(name: str, mean: float, half: float, text: str) -> None:
    figure = {"mean": mean, "low": mean - half, "high": mean + half}
    assert f"{shown(name, mean)} {spread(name, figure)}".strip() == text


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Reads a page: tables as rows of cells, everything that could be fetched, tags that do not close."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self._table = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.fetched += [str(values[k]) for k in ("src", "href", "xlink:href", "action", "data") if values.get(k)]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = str(values["id"])
            self.rows[self._table] = []
        if tag == "tr":
            self.rows[self._table].append([])
        if tag in ("td", "th"):
            self.rows[self._table][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.rows[self._table][-1][-1] += data


def read_page(text: str) -> Page:
    found = Page()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def html(found: dict[str, Any]) -> str:
        return page.html(found, page.draw(found, tmp_path / "plots"))

    return html


def test_the_page_holds_every_row_and_fetches_nothing(drawn: Callable[[dict[str, Any]], str]) -> None:
    names = ["a", "b <script>alert(1)</script>", "c & d"]
    found = collected(
        *(outcome(name, seed, 2.0 + seed / 9) for name in names for seed in (0, 1)),
        outcome("broken", 0, 1, error="no <way>"),
    )
    text = drawn(found)
    read = read_page(text)
    heads, *rows = read.rows["contestants"]
    assert {row[0].replace("≈ best", "").strip() for row in rows} >= {*names}
    assert all(len(row) == len(heads) for row in rows)
    heads, *rows = read.rows["runs"]
    assert len(rows) == 7
    assert all(len(row) == len(heads) for row in rows)
    assert [row[-1] for row in rows].count("finished") == 6
    assert "no <way>" in rows[-1][-1]
    assert all(reference.startswith("#") or reference.startswith("data:") for reference in read.fetched)
    assert len(read.ids) == len(set(read.ids))  # pictures bring ids of their own
    assert "<script>alert" not in text
    assert not re.search(r"@import|url\((?!#)", text)


def test_the_ink_of_a_picture_follows_the_scheme(drawn: Callable[[dict[str, Any]], str]) -> None:
    text = drawn(collected(outcome("a", 0, 2.0), outcome("b", 0, 1.0)))
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 5
    for picture in pictures:
        assert "#000000" not in picture
        assert 'style="fill: #ffffff"' not in picture
        assert "currentColor" in picture
    assert "prefers-color-scheme: dark" in text


# --- whole comparisons, in this process ------------------------------------------------------------------------------


STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 32, "dtype": "float32"}


def write_rows(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tiny_llama_folder: Path) -> dict[str, Any]:
    """A small comparison of language models; the test writes it into a file."""
    return {
        "model": str(tiny_llama_folder),
        "dataset": write_rows("train.jsonl", [{"text": f"{i} squared is {i * i}"} for i in range(24)]),
        "eval_dataset": write_rows("eval.jsonl", [{"text": f"{i} cubed is {i**3}"} for i in range(6)]),
        "output_dir": "out", **STEPS,
    }  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells run in this process; their names, as they are started."""
    started: list[str] = []

    def launch(folder: Path, log: Path, refresh: Callable[[], Any]) -> int:
        started.append(folder.name.rpartition("-")[0])
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                return main(["compare", "--cell", str(folder)])
            except Exception as error:  # as a process would end
                print(f"{type(error).__name__}: {error}", file=file)
                return 1

    monkeypatch.setattr(runs, "launch", launch)
    return started


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `compare` on a config; returns the exit code and what it printed, errors last."""

    def command(config: dict[str, Any], *flags: str) -> tuple[int, str]:
        Path("compare.yaml").write_text(yaml.safe_dump(config))
        capsys.readouterr()
        code = main(["compare", "--config", "compare.yaml", *flags])
        out, err = capsys.readouterr()
        return code, out + err

    return command


def stored() -> dict[str, Any]:
    return json.loads(Path("out/results.json").read_text())


@pytest.mark.slow
def test_a_comparison_from_the_config_to_the_report(
    config: dict[str, Any], launched: list[str], compare: Callable[..., tuple[int, str]]
) -> None:
    config |= {"modes": ["spectrum", "lora"], "controls": [], "seeds": [0, 1]}
    code, said = compare(config)
    assert code == 0, said
    found = stored()
    assert [s["label"] for s in found["contestants"]] == ["spectrum 0.5", "lora"]
    assert len(launched) == 4
    first = {(r["label"], r["seed"]): r["loss_curve"][0][1] for r in found["cells"]}
    # The same rows in the same order, and a base that every method leaves as it is: the first loss is the same.
    for seed in (0, 1):
        assert len({round(loss, 5) for (_, s), loss in first.items() if s == seed}) == 1
    assert len({round(loss, 5) for loss in first.values()}) == 2
    for row in found["cells"]:
        assert row["steps"] == 3 and len(row["loss_curve"]) == 3
        assert row["metrics"]["loss"] != row["before"]["loss"] == found["untrained"]["metrics"]["loss"]
        assert row["setup_seconds"] > 0 and row["peak_memory_bytes"] > 2**20 and row["saved_bytes"] > 1000
    assert len({r["metrics"]["loss"] for r in found["cells"]}) == 4
    assert found["machine"]["cores"] >= 1 and found["config"]["seeds"] == [0, 1]
    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    assert len(rows) == 4 and float(rows[0]["loss"]) == found["cells"][0]["metrics"]["loss"]
    read = read_page(Path("out/report.html").read_text())
    assert len(read.rows["runs"]) == 5
    assert Path("out/plots/scan.svg").exists()
    assert not list(Path("out/cells").glob("*/model"))
    assert "| lora |" in Path("out/results.md").read_text().replace(" * |", " |")

    launched.clear()
    code, said = compare(config)
    assert code == 0 and launched == [] and "4 of them finished before" in said
    assert stored()["cells"] == found["cells"]
    next(iter(Path("out/cells").glob("lora-seed1-*/cell_results.json"))).unlink()
    assert compare(config)[0] == 0
    assert launched == ["lora-seed1"]
    launched.clear()
    assert compare(config, "--seeds", "0", "1", "2", "--list")[0] == 0
    again = {"contestants": [{"name": name, "mode": "lora", "r": 3} for name in ("mine", "yours")]}
    code, listed = compare(config | again, "--list")
    assert code == 0 and "as        mine: yours, which has the same settings" in listed
    for wrong, said in (
        ({"nonsense": 3}, "unknown key"), ({"rotation_rank": 2, "modes": ["lora", "lorsa"]}, "stands in `contestants`"),
    ):  # fmt: skip
        code, line = compare(config | wrong, "--list")
        assert code == 2 and said in line
    assert launched == []


def test_a_model_that_is_gone_and_wanted_is_trained_again(
    config: dict[str, Any], launched: list[str], compare: Callable[..., tuple[int, str]]
) -> None:
    config |= {"modes": ["lora"], "controls": [], "general_text": "eval.jsonl"}
    assert compare(config)[0] == 0
    assert launched == ["untrained", "lora-seed0"] and not list(Path("out/cells").glob("*/model"))
    [finished] = Path("out/cells").glob("lora-*/cell_results.json")
    before = json.loads(finished.read_text())
    finished.write_text(
        finished.read_text()[:50]
    )  # what was measured is lost, and so is the model that it was measured on
    code, said = compare(config)
    assert code == 0, said
    again = json.loads(finished.read_text())
    assert launched[2:] == ["lora-seed0"] and (again["metrics"], again["general"]) == (
        before["metrics"],
        before["general"],
    )
    assert compare(config | {"keep_models": True})[0] == 0
    assert launched[3:] == ["lora-seed0"] and (finished.parent / "model" / "adapter_model.safetensors").is_file()
    assert compare(config | {"keep_models": True})[0] == 0 and launched[4:] == []
    finished.write_text(json.dumps({**json.loads(finished.read_text()), "loss_curve": [1.0]}))  # whole, and wrong
    assert compare(config | {"keep_models": True})[0] == 0 and launched[4:] == ["lora-seed0"]
    assert json.loads(finished.read_text())["loss_curve"][0][0] == 1


def test_a_file_that_a_contestant_names_is_part_of_its_cell(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    one = comparison(contestants=[{"name": "x", "mode": "spectrum", "plan": str(plan)}], modes=["lora"], controls=[])
    digests = []
    for text in ("a", "b"):
        plan.write_text(text)
        digests.append({c.label: c.digest for c in cells_of(one, contestants_of(one), {})})
    assert digests[0]["lora"] == digests[1]["lora"] and digests[0]["x"] != digests[1]["x"]


def test_a_method_of_peft_takes_none_of_our_options_along() -> None:
    one = comparison(
        train={"r": 8, "bias": "none", "max_length": 64, "max_steps": 20}, modes=["lora"], controls=["adalora"]
    )
    ours, theirs = cells_of(one, contestants_of(one), {})
    assert ours.train["r"] == 8 and ours.train["bias"] == "none"
    assert "r" not in theirs.train and "bias" not in theirs.train and theirs.train["max_length"] == 64
    assert theirs.peft is not None and theirs.peft["target_r"] == 8


def test_the_scan_in_the_report_is_that_of_the_model(tmp_path: Path, llama_report: Callable[..., Any]) -> None:
    one = dataclasses.replace(comparison(), output=tmp_path)
    (tmp_path / "scans").mkdir()
    llama_report().save(tmp_path / "scans" / f"spectrum-{'a' * 12}.json")
    assert scan_of(one, "b" * 64) is None
    assert scan_of(one, "a" * 64) is not None


def test_the_scan_is_drawn_with_what_the_best_that_chose_by_it_trains(
    tmp_path: Path, llama_report: Callable[..., Any]
) -> None:
    scan = llama_report()
    outcomes = []
    for label, loss, options in (
        ("all of it", 1.0, {"mode": "lora"}),
        ("by another score", 1.5, {"mode": "spectrum", "criterion": "random", "spectrum_ratio": 0.5}),
        ("a quarter", 2.0, {"mode": "spectrum", "spectrum_ratio": 0.25}),
        ("a half", 2.5, {"mode": "spectrum", "spectrum_ratio": 0.5}),
    ):
        folder = tmp_path / label
        folder.mkdir()
        plan = make_plan(dataclasses.replace(scan, criterion=options.pop("criterion", scan.criterion)), **options)
        plan.save(folder / PLAN_FILE)
        outcomes.append(dataclasses.replace(outcome(label, 0, loss), log=folder / "log.txt"))
    found = collect(comparison(), [o.cell.contestant for o in outcomes], outcomes, machine(), scan)
    assert found["chosen"]["label"] == "a quarter"
    pictures = page.draw(json.loads(json.dumps(found)), tmp_path / "plots")
    text, path = pictures["scan"]
    assert "'a quarter' trains" in text
    chosen = len(Plan.from_dict(found["chosen"]["plan"]).trainable_names)
    assert f"chosen ({chosen})" in path.read_text()


def test_a_cell_that_fails_is_reported_and_the_rest_goes_on(
    config: dict[str, Any], launched: list[str], compare: Callable[..., tuple[int, str]]
) -> None:
    broken = {"name": "broken", "mode": "lora", "target_modules": ["q_porj"]}
    config |= {"modes": ["lora"], "controls": [], "contestants": [broken, {"name": "wide", "mode": "lora", "r": 32}]}
    code, said = compare(config)
    assert code == 2
    line = said.strip().splitlines()[-1]
    assert line.startswith(
        "spectrum-peft: error: 1 of 3 cells failed, the first is 'broken': --target-modules: 'q_porj'"
    )
    assert launched == ["lora-seed0", "broken-seed0", "wide-seed0"]
    found = stored()
    assert [r["error"] is None for r in found["cells"]] == [True, False, True]
    assert "q_porj" in Path(found["cells"][1]["log"]).read_text()
    assert "q_porj" in Path("out/report.html").read_text()
    launched.clear()
    [finished] = Path("out/cells").glob("lora-seed0*/cell_results.json")
    finished.write_text(finished.read_text()[:100])  # the disk was full
    compare(config)
    assert launched == ["lora-seed0", "broken-seed0"]  # tried again


@pytest.mark.slow
def test_a_cell_whose_training_was_done_only_measures(
    config: dict[str, Any], launched: list[str], compare: Callable[..., tuple[int, str]]
) -> None:
    config |= {"modes": ["lora"], "controls": [], "keep_models": True}
    assert compare(config)[0] == 0
    [folder] = Path("out/cells").iterdir()
    trained = folder / "model" / "adapter_model.safetensors"
    stamp = trained.stat().st_mtime_ns
    (folder / "cell_results.json").unlink()
    assert compare(config)[0] == 0
    assert trained.stat().st_mtime_ns == stamp
    (folder / "cell_results.json").unlink()
    (folder / "train_results.json").unlink()  # it died while it trained: what lies there is no model
    assert compare(config)[0] == 0
    assert trained.stat().st_mtime_ns != stamp


@pytest.mark.slow
def test_what_is_asked_besides_is_measured_before_and_after(
    config: dict[str, Any], launched: list[str], compare: Callable[..., tuple[int, str]]
) -> None:
    rows = [{"prompt": f"{i} + {i} =", "completion": f" is\n#### {2 * i}"} for i in range(12)]
    config |= {
        "dataset": write_rows("sums.jsonl", rows), "eval_dataset": write_rows("sums-eval.jsonl", rows[:4]),
        "general_text": write_rows("general.jsonl", [{"text": "the cat sat on the mat"}] * 3), "generate": ["exact_match"],
        "generate_rows": 3, "max_new_tokens": 4, "generation_speed": True, "modes": ["spectrum", "lora"], "controls": [],
        "learning_rates": [1e-2],
    }  # fmt: skip
    code, said = compare(config)
    assert code == 0, said
    assert launched[0] == "untrained"
    found = stored()
    base = found["untrained"]
    for row in found["cells"]:
        assert row["metrics"]["exact_match"] == 0.0 and row["metrics"]["generated_rows"] == 3
        assert row["forgetting"] == pytest.approx(row["general_loss"] - base["general_loss"])
        assert row["forgetting"] != 0
        assert row["generation_tokens_per_second"] > 0
    by_label = {r["label"]: r for r in found["cells"]}
    assert by_label["lora"]["merged_generation_tokens_per_second"] > 0
    assert by_label["spectrum 0.5"]["merged_generation_tokens_per_second"] is None
    assert base["metrics"]["exact_match"] == 0.0 and base["generation_tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor")  # AdaLoRA saves a rank of 0 as it is
def test_methods_of_pefts_own_take_part(
    config: dict[str, Any], launched: list[str], compare: Callable[..., tuple[int, str]]
) -> None:
    loha = {"name": "loha", "peft": {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "v_proj"]}}
    config |= {"modes": [], "controls": ["adalora", "dora"], "contestants": [loha], "max_steps": 6}
    code, said = compare(config)
    assert code == 0, said
    assert [(r["label"], r["mode"], r["error"]) for r in stored()["cells"]] == [
        ("adalora", "ADALORA", None), ("dora", "lora", None), ("loha", "LOHA", None),
    ]  # fmt: skip


@pytest.mark.slow
def test_every_mode_and_a_score_that_needs_data_take_part(
    config: dict[str, Any], launched: list[str], compare: Callable[..., tuple[int, str]]
) -> None:
    code, said = compare(config | {"criteria": ["spectrum", "fisher"], "controls": ["uniform_rank"], "max_steps": 2})
    assert code == 0, said
    found = stored()["cells"]
    assert {row["mode"] for row in found} == set(MODES)
    assert {row["label"] for row in found} >= {f"{name} 0.5 by fisher" for name in SELECTIVE}
    # Whatever a method puts on the base, it begins as the base.
    assert len({round(row["loss_curve"][0][1], 4) for row in found}) == 1
    assert len({row["metrics"]["loss"] for row in found}) > len(MODES)


@pytest.mark.slow
def test_columns_chosen_by_scores_take_part_beside_a_lora_of_equal_size(
    config: dict[str, Any], launched: list[str], compare: Callable[..., tuple[int, str]]
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "random": {}, "spectrum": {"columns_by": "spectrum"}, "activation": {"columns_by": "activation"},
        "fisher": {"columns_by": "fisher"}, "coupled": {"coupled": True, "head_width": 1},
    }  # fmt: skip
    asked = [{"name": f"columns {name}", "mode": "columns", **way} for name, way in ways.items()]
    config |= {
        "modes": ["lora"],
        "controls": [],
        "contestants": asked,
        "r": 4,
        "calibration_samples": 4,
        "max_steps": 2,
    }
    code, said = compare(config)
    assert code == 0, said
    found = {row["label"]: row for row in stored()["cells"]}
    assert list(found) == ["lora", *(f"columns {name}" for name in ways)]
    assert [row["error"] for row in found.values()] == [None] * 6
    sizes = {label: row["trainable_parameters"] for label, row in found.items()}
    # A line of 64 or 128 elements is the unit of columns: less than one is rounded away in each of 28 matrices.
    assert all(0 <= sizes["lora"] - size < 28 * 128 for size in sizes.values())
    # Other columns train in each, and the base is the same.
    assert len({row["metrics"]["loss"] for row in found.values()}) == 6
    assert len({round(row["loss_curve"][0][1], 4) for row in found.values()}) == 1


@pytest.mark.parametrize("new_head", [False, True])
def test_classification_is_ranked_by_accuracy_and_a_new_head_is_pointed_out(
    new_head: bool, launched: list[str], compare: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    from architectures import ARCHITECTURES
    from conftest import byte_tokenizer
    from transformers import BertModel

    built = BertModel(ARCHITECTURES["bert"].config()) if new_head else ARCHITECTURES["bert"].build()
    built.save_pretrained("bert")
    byte_tokenizer().save_pretrained("bert")
    rows = [{"text": f"{'abc'[i % 3]} {i}", "label": "xyz"[i % 3]} for i in range(18)]
    config = {
        "model": "bert", "dataset": write_rows("t.jsonl", rows), "eval_dataset": write_rows("e.jsonl", rows[:6]),
        "output_dir": "out", "modes": ["spectrum", "lora"], "controls": [], "task": "classification", **STEPS,
    }  # fmt: skip
    code, said = compare(config)
    assert code == 0, said
    found = stored()
    assert found["metric"] == "accuracy"
    assert any("the head for the classes is new" in note for note in found["notes"]) == new_head
    assert {"accuracy", "macro_f1", "loss"} <= set(found["cells"][0]["metrics"])
    # The new head is drawn alike for every method.
    assert len({r["before"]["loss"] for r in found["cells"]}) == 1


# --- wrong inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modes": ["spectrom"]}, "mode is 'spectrom'. Did you mean 'spectrum'"),
        ({"modess": ["lora"]}, "unknown key 'modess'. Did you mean 'modes'"),
        ({"max_stepz": 3}, "unknown key 'max_stepz'. Did you mean 'max_steps'"),
        ({"metric": "lost"}, "Did you mean 'loss'"),
        ({"modes": [], "controls": []}, "there is nothing to compare"),
        ({"output_dir": "file/out"}, "file: is a file, wanted a folder"),
        ({"output_dir": None}, "--output-dir is missing"),
        ({"dataset": None}, "--dataset is missing"),
        ({"dataset": "gone.jsonl"}, "gone.jsonl: no such file"),
        ({"dataset": "columns.jsonl"}, "columns.jsonl: no usable column for task 'causal_lm'"),
        ({"eval_dataset": "columns.jsonl"}, "columns.jsonl: no usable column"),
        ({"general_text": "columns.jsonl"}, "columns.jsonl: no usable column"),
        ({"model": "gone"}, "gone: "),
        ({"r": 0}, "r is 0"),
        ({"generate": ["exact_match"]}, "generation needs prompt and completion"),
        ({"contestants": [{"name": "x", "mode": "lora", "lora_dropuot": 0.1}]}, "unknown key 'lora_dropuot'"),
        ({"contestants": [{"name": "x", "peft": {"peft_type": "NOPE"}}]}, "peft_type is 'NOPE'"),
        ({"contestants": [{"name": "x", "peft": {"peft_type": "LORA", "rr": 4}}]}, "LORA has no field 'rr'"),
        ({"modes": ["full"], "quantization": "nf4"}, "mode 'full' trains every weight, so none can be quantized"),
        ({"output_dir": ""}, "--output-dir is '', wanted a folder."),
    ],
)  # fmt: skip
def test_a_wrong_input_is_one_line_before_anything_is_run(
    change: dict[str, Any],
    says: str,
    config: dict[str, Any],
    launched: list[str],
    compare: Callable[..., tuple[int, str]],
) -> None:
    Path("file").write_text("")
    write_rows("columns.jsonl", [{"body": "x"}])
    code, said = compare(config | {"modes": ["lora"], "controls": []} | change)
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("spectrum-peft: error: ")]
    assert len(errors) == 1 and says in errors[0], said
    assert launched == []


# --- as processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_comparison_that_is_killed_goes_on_where_it_was(config: dict[str, Any]) -> None:
    config |= {"modes": ["spectrum", "lora"], "controls": [], "seeds": [0]}
    Path("compare.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "spectrum_peft", "compare", "--config", "compare.yaml"]
    environment = _environment()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        until = time.monotonic() + 240
        while not list(Path("out/cells").glob("*/cell_results.json")) or len(list(Path("out/cells").iterdir())) < 2:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        # The second cell is at work, and goes with the comparison: the group of the two is empty soon.
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while time.monotonic() < until:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("the cell's process went on")
    [kept] = Path("out/cells").glob("*/cell_results.json")
    stamp = kept.stat().st_mtime_ns
    assert not Path("out/results.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_mtime_ns == stamp
    assert [r["error"] for r in stored()["cells"]] == [None, None]
    assert "2 cells, 1 of them finished before" in done.stdout


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        _alone_in(tmp_path),
        pytest.raises(ComparisonError, match="another comparison is at work"),
        _alone_in(tmp_path),
    ):
        pass
    with _alone_in(tmp_path):
        pass


def test_the_last_line_of_a_log_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("step 1\nTraceback\nRuntimeError: out of memory\n\n")
    assert last_line(log, 1) == "RuntimeError: out of memory"
    log.write_text("spectrum-peft: error: r is 0.\n[W] resource tracker\n")
    assert last_line(log, 2) == "r is 0."
    assert last_line(log, -9) == "ended by SIGKILL (out of memory, or killed)"
    assert last_line(log, -120) == "ended by signal 120 (out of memory, or killed)"
    log.write_text("")
    assert last_line(log, 1) == "exit code 1"


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., str]:
    """Opens a file in headless Chromium without a network; returns the document as it is after its scripts ran."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed")

    def opened(path: Path, *flags: str) -> str:
        command = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", *flags, path.resolve().as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return opened


@pytest.mark.slow
@pytest.mark.multiprocess
def test_in_a_browser_heads_sort_and_the_paper_follows_the_scheme(
    browser: Callable[..., str], drawn: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    from matplotlib.image import imread

    found = collected(
        *(
            outcome(name, seed, loss + seed / 100)
            for name, loss in (("c", 1.0), ("a", 2.0), ("b", 3.0))
            for seed in (0, 1)
        ),
        controls=[],
    )
    text = drawn(found)
    path = tmp_path / "report.html"

    def names_after(clicks: str) -> list[str]:
        path.write_text(text.replace("</body>", f"<script>{clicks}</script></body>"))
        rows = read_page(browser(path, "--dump-dom")).rows["contestants"]
        return [row[0].replace("≈ best", "").strip() for row in rows[1:]]

    click = "document.querySelectorAll('#contestants th button')[2].click();"
    assert names_after("") == ["c", "a", "b", "untrained base"]
    assert names_after(click) == ["c", "a", "untrained base", "b"]
    assert names_after(click * 2) == ["b", "untrained base", "a", "c"]
    assert (
        names_after("document.querySelectorAll('#contestants th button')[1].click();")[-1] == "untrained base"
    )  # no rate
    path.write_text(text)
    brightness = {}
    for scheme, setting in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        browser(
            path, f"--screenshot={picture}", "--window-size=800,600", f"--blink-settings=preferredColorScheme={setting}"
        )
        brightness[scheme] = imread(picture)[:3, :3, :3].mean()
    assert brightness["dark"] < 0.2 < 0.8 < brightness["light"]
