"""The stages on planted answers: what wins, what goes on, what is run once, what is refused.

Cells answer from a formula here: the stages, the database and the folder are real, the training is not. What real cells do is
tested in test_real_cells.py.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import yaml
from running import only_fast
from transformers import PreTrainedTokenizerFast

import spectrum_peft
from spectrum_peft.cli.main import main
from spectrum_peft.cli.tune import opened
from spectrum_peft.compare.matrix import Cell, Contestant
from spectrum_peft.compare.outcome import Outcome
from spectrum_peft.errors import SpectrumError
from spectrum_peft.machine import versions
from spectrum_peft.tuning import cells, preparing, prices, queue, stages

Tune = Callable[..., dict[str, Any]]
# How good each contestant is at its best rate, and where that is.
PLANTED = {"lora r16": (1.2, 1e-3), "real 0.25 random": (1.3, 1e-4), "full": (1.0, 1e-4)}


class World:
    """What the cells answer.

    Attributes:
        ran: (label, rate, until, seed) of the cells as they were run.
        fails: labels whose cells fail.
        interrupt: raised at the cell of this number.
        now: seconds that have gone by, where the tune's clock is this world's.
        step, overhead: seconds of a step of each contestant, and of a run beside its steps.
    """

    def __init__(self) -> None:
        self.ran: list[tuple[str, float, int | None, int | None]] = []
        self.now = 0.0
        self.step: dict[str, float] = {}
        self.overhead = 0.0
        self.fails: set[str] = set()
        self.interrupt: int | None = None

    def run_cell(self, comparison: Any, cell: Cell, scans: Any, refresh: Any = None) -> Outcome:
        steps = cell.train["max_steps"] if cell.until is None else cell.until
        rate = cell.train["learning_rate"]
        if self.interrupt is not None and len(self.ran) == self.interrupt:
            self.interrupt = None
            raise KeyboardInterrupt
        self.ran.append((cell.label, rate, cell.until, cell.seed))
        folder = comparison.output / "cells" / cell.folder
        if cell.label in self.fails:
            return Outcome(cell, None, "the loss is nan at step 1", folder / "log.txt")
        best, at = PLANTED[cell.label]
        before = [
            u for label, r, u, _ in self.ran[:-1] if (label, r) == (cell.label, rate) and u is not None and cell.until
        ]
        run, seconds = steps - max(before, default=0), self.step.get(cell.label, 0.01)
        self.now += self.overhead + run * seconds
        value = best + 0.3 * math.log10(rate / at) ** 2 + 1 / steps
        rows = [value + 0.1 * math.sin(7 * i) + 0.03 * math.sin(i * (cell.seed or 1) + 50 * rate) for i in range(16)]
        value = sum(rows) / len(rows)
        model = folder / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "train_results.json").write_text("{}")
        scored = {"value": value, "rows": rows}
        results = {
            "label": cell.label, "seed": cell.seed, "control": None, "versions": versions(), "metrics": {"loss": value},
            "scores": {"search": scored, "evaluation": scored}, "judge_seconds": {"search": 0.0},
            "mode": cell.train["mode"], "task": "causal_lm",
            "dtype": "float32", "quantization": None,
            "new_head": False, "learning_rate": rate, "trainable_parameters": 10, "total_parameters": 100,
            "steps": steps, "step_seconds": [seconds] * run, "input_tokens": 100, "peak_memory_bytes": 2**20,
            "saved_bytes": 100, "before": None, "loss_curve": [[1, 2.0]], "setup_seconds": {"scan": 0.0, "model": 0.1},
        }  # fmt: skip
        return Outcome(cell, results, None, folder / "log.txt")


_DRY_RUNS: dict[str, Any] = {}


def _once(estimate: Callable[..., Any]) -> Callable[..., Any]:
    """The dry runs of the tests here are made once: there are four contestants."""

    def run(model: Any, config: Any, **settings: Any) -> Any:
        key = repr((model, config.mode, config.criterion, sorted(settings.items(), key=str)))
        if key not in _DRY_RUNS:
            _DRY_RUNS[key] = estimate(model, config, **settings)
        return _DRY_RUNS[key]

    return run


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    found = World()
    monkeypatch.setattr(cells, "run_cell", found.run_cell)
    monkeypatch.setattr(stages, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(prices, "estimate_memory", _once(prices.estimate_memory))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} squared is {i * i}"}) + "\n" for i in range(80))
    )
    return found


@pytest.fixture
def tune(tiny_llama_folder: Path, world: World) -> Callable[..., dict[str, Any]]:
    def run(**changes: Any) -> dict[str, Any]:
        given: dict[str, Any] = {
            "memory": "4GiB", "max_steps": 6, "batch_size": 4, "dtype": "float32", "contestants": ["full"],
            "learning_rates": [1e-4, 1e-3],
        }  # fmt: skip
        return spectrum_peft.tune(str(tiny_llama_folder), "train.jsonl", **({"output_dir": "tuned"} | given | changes))

    return run


def test_the_planted_best_wins_at_its_rate_and_what_is_far_behind_is_not_run_to_the_end(
    tune: Tune, world: World, tiny_llama_folder: Path
) -> None:
    found = tune()
    assert found["tune"]["winner"] == "full" and found["tune"]["rate"] == 1e-4
    recipe = yaml.safe_load(Path("tuned/recipe.yaml").read_text())
    assert recipe["mode"] == "full" and recipe["learning_rate"] == 1e-4 and recipe["max_steps"] == 6
    assert Path(recipe["dataset"]) == Path("train.jsonl").resolve()
    # Controls are in the finals at their own best rates, each with three seeds, whatever their place.
    finals = {(label, rate) for label, rate, until, _ in world.ran if until is None}
    assert {("lora r16", PLANTED["lora r16"][1]), ("real 0.25 random", PLANTED["real 0.25 random"][1])} <= finals
    assert all(sum(r[0] == label and r[2] is None for r in world.ran) == 3 for label, _ in finals)
    at = [sum(r[2] == until for r in world.ran) for until in (2, 6)]
    assert at[0] >= 6 > at[1]
    assert ("full", 1e-5) in {r[:2] for r in world.ran}  # the best of the grid was at its edge
    # A run that goes on has been through the rungs before it; nothing is run twice.
    assert len(set(world.ran)) == len(world.ran)
    for label, rate, until, seed in world.ran:
        assert until != 6 or (label, rate, 2, seed) in world.ran
    assert [p.name for p in Path("tuned/model").iterdir()] == ["train_results.json"]
    assert not list(Path("tuned/cells").glob("*/model"))
    page = Path("tuned/report.html").read_text()
    assert "What each stage spent" in page and "The race after 2 steps" in page
    # Against the one that needs most memory beside it with the interval, and against the controls, whichever is nearest.
    assert re.fullmatch(
        r"full at 0\.0001 \(held-out loss [\d.]+\): better than lora r16 "
        r"\(difference -\S+, 95 % interval -\S+ to -\S+, 3 seeds\), at [\d.]+ of its memory; "
        r"better than real 0\.25 random \(-\S+, -\S+ to -\S+\)",
        found["tune"]["sentence"],
    )
    assert Path("tuned/recipe.yaml").read_text().startswith(f"# {found['tune']['sentence']}\n")
    spent = {row["stage"]: row for row in found["tune"]["stages"]}
    assert spent["rung 0"]["runs"] == at[0] and spent["finals"]["runs"] == 3 * len(finals)

    # The same command, on the command line, has nothing more to do.
    argv = [
        "tune", "--model", str(tiny_llama_folder), "--dataset", "train.jsonl", "--memory", "4GiB", "--max-steps", "6",
        "--batch-size", "4", "--dtype", "float32", "--contestants", "full", "--learning-rates", "1e-4", "1e-3", "-o", "tuned",
    ]  # fmt: skip
    world.ran.clear()
    assert main(argv) == 0 and world.ran == []
    assert json.loads(Path("tuned/results.json").read_text())["tune"]["sentence"] == found["tune"]["sentence"]


@pytest.mark.parametrize(("hours", "slower"), only_fast([(1.0, 1.0), (2.0, 3.0), (2.0, 0.4)], [(2.0, 3.0)]))
def test_the_hours_are_met_though_steps_are_other_than_thought(
    tune: Tune, world: World, monkeypatch: pytest.MonkeyPatch, hours: float, slower: float
) -> None:
    clock = SimpleNamespace(monotonic=lambda: world.now, sleep=time.sleep)
    monkeypatch.setattr(stages, "time", clock)
    monkeypatch.setattr(preparing, "time", clock)
    monkeypatch.setattr(queue, "time", clock)
    # What is timed beforehand is lora and the random choice; full is estimated beside it, and slower or faster than that says.
    world.overhead, world.step = 20.0, {"lora r16": 1.0, "full": 1.5 * slower, "real 0.25 random": 1.0}
    found = tune(hours=hours, max_steps=2000, num_train_epochs=None)
    # 20 % is what is promised.
    assert 0.8 * hours * 3600 <= world.now <= 1.2 * hours * 3600
    assert sum(row["seconds"] for row in found["tune"]["stages"]) == pytest.approx(world.now)
    assert all(len({r[3] for r in world.ran if r[2] is None and r[0] == c["label"]}) >= 3 for c in found["contestants"])


@pytest.mark.parametrize("at", only_fast([3, 14], [14]))
def test_a_tune_that_is_interrupted_goes_on_and_runs_nothing_twice(tune: Tune, world: World, at: int) -> None:
    world.interrupt = at
    with pytest.raises(KeyboardInterrupt):
        tune()
    if at == 14:  # the best so far is there
        assert yaml.safe_load(Path("tuned/recipe.yaml").read_text())["mode"]
    found = tune()
    assert found["tune"]["winner"] == "full"
    assert len(set(world.ran)) == len(world.ran)


def test_what_becomes_of_the_rows_and_each_price_is_said_before_the_race(
    tune: Tune, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.interrupt = 0  # at the first run that is timed
    with pytest.raises(KeyboardInterrupt):
        tune(max_length=4)
    said = capsys.readouterr().out
    assert re.search(r"training: 80 rows read, 80 cut at 4 tokens", said)
    assert "what fits into 4.00 GiB, of which 5% stay free: dry runs of 3 contestants" in said
    assert all(re.search(rf"^{label} .* trained  4 rows a step$", said, re.M) for label in PLANTED)


def test_a_classifier_is_priced_with_the_head_that_its_rows_ask_for(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the config that was saved it has two outputs; each more of them is a row of weights and a bias."""
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained("bert")
    tiny_tokenizer.save_pretrained("bert")
    trained = {}
    for classes in (2, 5):
        rows = [{"text": f"{i}", "label": f"class {i % classes}"} for i in range(80)]
        Path(f"{classes}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        one = opened(
            {}, {"model": "bert", "dataset": f"{classes}.jsonl", "task": "classification"}, f"of {classes}", "here"
        )
        price = preparing._pricing(one.asked, one.run, 8).price(Contestant("lora", {"mode": "lora", "r": 4}))
        trained[classes] = price.trained
    assert trained[5] - trained[2] == 3 * (32 + 1)


def test_cells_that_fail_are_told_and_the_race_goes_on(
    tune: Tune, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.fails = {"full"}
    found = tune()
    assert found["tune"]["winner"] == "lora r16"
    assert "full at 0.0001, seed 1000, 2 steps: failed: the loss is nan" in capsys.readouterr().out
    assert "failed" in {row["fate"] for row in found["tune"]["race"][0]["runs"]}


def test_when_all_fail_one_line_says_so(tune: Tune, world: World) -> None:
    world.fails = set(PLANTED)
    with pytest.raises(SpectrumError, match=r"all 3 runs that were timed failed, the first: lora r16: the loss is nan"):
        tune()


@pytest.mark.parametrize(("changes", "says"), [
    ({"memory": "1MiB", "batch_size": 1}, "memory is 1.0 MiB, into which nothing fits less 5%: the smallest is"),
    ({"memory": "24"}, "memory is '24': the unit is missing"),
    ({"metric": "accuracy"}, "metric is 'accuracy', which the task 'causal_lm' has not"),
    ({"metric": "los"}, "metric is 'los'. Did you mean 'loss'"),
    ({"metric": "nowhere:score"}, "metric is 'nowhere:score': ModuleNotFoundError"),
    ({"hours": 1e-5}, "hours is 1e-05, too few"),
    ({"seeds": [0, 1]}, "seeds are [0, 1], wanted at least three"),
    ({"mode": "lora"}, "mode is one run's, and tune makes many: use contestants"),
    ({"learning_rate": 1e-3}, "learning_rate is one run's, and tune makes many: use learning_rates"),
    ({"metric": "zzz"}, "metric is 'zzz'. Known: 'exact_match', 'loss', 'module:function', 'perplexity'"),
    ({"contestants": ["fulll"]}, "'fulll' is none. Did you mean 'full'"),
    ({"search_rows": 60}, "train.jsonl: has 80 rows, too few to split: 60 that the search judges by, 16 for the end"),
    ({"search_rows": 3}, "search_rows is 3, wanted a whole number above 15"),
    ({"better": "up"}, "better is 'up', wanted higher or lower"),
    ({"max_stepz": 3}, "unknown key 'max_stepz'"),
])  # fmt: skip
def test_a_wrong_wish_is_one_line_before_anything_is_trained(
    tune: Tune, world: World, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpectrumError, match=re.escape(says)):
        tune(**changes)
    # Nothing but the runs that are timed, one of real weights and one of adapters.
    assert {label for label, *_ in world.ran} <= {"lora r16", "real 0.25 random"} and {u for *_, u, _ in world.ran} <= {
        4
    }


def test_another_tune_or_something_else_in_the_folder_is_refused(
    tune: Tune, world: World, tiny_llama_folder: Path
) -> None:
    world.interrupt = 2  # after the runs that are timed
    with pytest.raises(KeyboardInterrupt):
        tune()
    with pytest.raises(SpectrumError, match=re.escape("tuned: holds another tune, whose batch_size is 4, here 8")):
        tune(batch_size=8)
    rows = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text(rows + rows)
    with pytest.raises(
        SpectrumError, match=re.escape("tuned: holds another tune, of other rows than train.jsonl has now;")
    ):
        tune()
    Path("train.jsonl").write_text(rows)
    world.interrupt = 2  # after the runs that are timed
    with pytest.raises(KeyboardInterrupt):
        tune(hours=100)  # how long it may take is no other tune
    # What came to nothing before it began binds nobody.
    with pytest.raises(SpectrumError, match="into which nothing fits"):
        tune(memory="1MiB", batch_size=1, output_dir="small")
    world.interrupt = len(world.ran)
    with pytest.raises(KeyboardInterrupt):
        tune(batch_size=1, output_dir="small", search_rows=20)
    assert json.loads(Path("small/data/sets.json").read_text())["search_rows"] == 20
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    argv = ["tune", "--model", str(tiny_llama_folder), "--dataset", "train.jsonl", "-o", "other"]
    assert main(argv) == 2 and Path("other/notes.txt").read_text() == "mine"
