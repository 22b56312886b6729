"""Cells that train: stopped and gone on with they are the run that was not stopped; what each row scores; whole tunes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import same_bytes
from safetensors.torch import load_file

from spectrum_peft.cli.main import main
from spectrum_peft.compare import read_comparison, runs
from spectrum_peft.compare.matrix import Cell, Contestant
from spectrum_peft.compare.scores import score_rows
from spectrum_peft.errors import DataError


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, count in (("train", 48), ("search", 6)):
        rows = [{"text": f"{i} squared is {i * i}"} for i in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process."""

    def launch(folder: Path, log: Path, refresh: Callable[[], Any]) -> int:
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                return main(["compare", "--cell", str(folder)])
            except Exception as error:  # as a process would end
                print(f"{type(error).__name__}: {error}", file=file)
                return 1

    monkeypatch.setattr(runs, "launch", launch)


def cell_of(model: Path, until: int | None, metric: str = "loss", **train: Any) -> Cell:
    settings = {
        "model": str(model), "task": "causal_lm", "dataset": "train.jsonl", "dtype": "float32", "mode": "lora", "r": 4,
        "learning_rate": 3e-3, "max_steps": 4, "per_device_train_batch_size": 4, "seed": 3, **train,
    }  # fmt: skip
    score = {"name": "search", "dataset": "search.jsonl", "metric": metric, "max_new_tokens": 4, "shown": False}
    return Cell("x", 3, settings, (), {"scores": [score]}, {"model": "m"}, Contestant("x", settings), until)


def run(output: str, cell: Cell) -> dict[str, Any]:
    train = {"model": cell.train["model"], "dataset": "train.jsonl"}
    one = read_comparison(
        {"modes": ["lora"], "controls": []},
        train=train,
        arguments=(),
        task="causal_lm",
        output=Path(output),
        source="here",
    )
    outcome = runs.run_cell(one, cell, {})
    assert outcome.results is not None, outcome.log.read_text()
    return outcome.results


@pytest.mark.usefixtures("in_process")
def test_a_run_that_stops_and_goes_on_is_the_run_that_was_not_stopped(tiny_llama_folder: Path) -> None:
    # Both end at the last step with a checkpoint; a rate that decays shows that the schedule is the whole run's.
    first = run("parts", cell_of(tiny_llama_folder, 2))
    run("parts", cell_of(tiny_llama_folder, 4))
    run("whole", cell_of(tiny_llama_folder, 4))
    assert first["steps"] == 2
    folders = {name: next(Path(name, "cells").iterdir()) for name in ("parts", "whole")}
    assert folders["parts"].name == folders["whole"].name
    weights = {name: load_file(f / "model/checkpoint-4/adapter_model.safetensors") for name, f in folders.items()}
    assert weights["parts"].keys() == weights["whole"].keys() and len(weights["whole"]) > 8
    for name, value in weights["whole"].items():
        assert same_bytes(weights["parts"][name], value), name
    results = [json.loads((f / "cell_results-4.json").read_text()) for f in folders.values()]
    assert results[0]["scores"] == results[1]["scores"] != first["scores"]
    assert len(results[0]["step_seconds"]) == 2 and len(results[1]["step_seconds"]) == 4  # it did not begin anew
    assert [p.name for p in (folders["parts"] / "model").iterdir()] == ["checkpoint-4"]


class FakeSaved:
    """A model that was opened, as far as a user's function sees it."""

    model, tokenizer = "model", "tokenizer"


@pytest.mark.parametrize(("body", "value", "rows"), [
    ("return len(rows)", 6.0, None),
    ("return [float(i) for i in range(len(rows))]", 2.5, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
    ("import numpy; return numpy.ones(len(rows))", 1.0, [1.0] * 6),
])  # fmt: skip
def test_a_users_function_gives_one_number_or_one_for_each_row(body: str, value: float, rows: Any) -> None:
    name = f"mine_{abs(hash(body))}"
    Path(f"{name}.py").write_text(f"def score(model, tokenizer, rows):\n    assert model == 'model'\n    {body}\n")
    assert score_rows(FakeSaved(), list(range(6)), f"{name}:score", 4, "d") == {"value": value, "rows": rows}


@pytest.mark.parametrize(("body", "says"), [
    ("raise KeyError('answer')", r"mine_\d+:score raised KeyError: 'answer'"),
    ("return float('nan')", r"mine_\d+:score returned nan, wanted a finite number"),
    ("return [1.0, 2.0]", r"mine_\d+:score returned 2 numbers for 6 rows, wanted one for each, or one in all"),
    ("return 'good'", r"mine_\d+:score raised ValueError"),
])  # fmt: skip
def test_a_users_function_that_goes_wrong_is_one_line(body: str, says: str) -> None:
    name = f"mine_{abs(hash(body))}"
    Path(f"{name}.py").write_text(f"def score(model, tokenizer, rows):\n    {body}\n")
    with pytest.raises(DataError, match=says):
        score_rows(FakeSaved(), list(range(6)), f"{name}:score", 4, "d")
