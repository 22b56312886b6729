"""Cells that train: stopped and gone on with they are the run that was not stopped; what each row scores; whole tunes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from running import same_bytes
from safetensors.torch import load_file

import spectrum_peft
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
    ("return 'good'", r"mine_\d+:score returned 'good', wanted a number, or one for each row"),
    ("return '0.5'", r"mine_\d+:score returned '0.5', wanted a number, or one for each row"),
    ("return None", r"mine_\d+:score returned None, wanted a number, or one for each row"),
])  # fmt: skip
def test_a_users_function_that_goes_wrong_is_one_line(body: str, says: str) -> None:
    name = f"mine_{abs(hash(body))}"
    Path(f"{name}.py").write_text(f"def score(model, tokenizer, rows):\n    {body}\n")
    with pytest.raises(DataError, match=says):
        score_rows(FakeSaved(), list(range(6)), f"{name}:score", 4, "d")


# --- whole tunes, by processes ---------------------------------------------------------------------------------------


def begin(model: Path) -> subprocess.Popen[bytes]:
    flags = {
        "model": model, "dataset": "train.jsonl", "output-dir": "tuned", "memory": "4GiB", "max-steps": 2, "batch-size": 4,
        "dtype": "float32", "contestants": "full", "learning-rates": 3e-3, "finalists": 1,
    }  # fmt: skip
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "spectrum_peft", "tune", *argv]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=runs._environment())


def trials() -> list[Any]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{Path('tuned/race.db').resolve()}")
    names = optuna.get_all_study_names(storage)
    return [t for name in names for t in optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_share_a_race_and_one_takes_up_what_the_other_was_killed_at(tiny_llama_folder: Path) -> None:
    first, second = begin(tiny_llama_folder), begin(tiny_llama_folder)
    try:
        deadline = time.monotonic() + 900
        while True:  # until both have ended a run, and the first is at another
            assert time.monotonic() < deadline and first.poll() is None and second.poll() is None
            if Path("tuned/race.db").is_file() and Path("tuned/prepared.json").is_file():
                seen = trials()
                at = [
                    t
                    for t in seen
                    if t.state.name == "RUNNING" and t.user_attrs.get("worker", "").endswith(f":{first.pid}")
                ]
                ended = {t.user_attrs["worker"].rpartition(":")[2] for t in seen if t.state.name == "COMPLETE"}
                if at and ended == {str(first.pid), str(second.pid)}:
                    break
            time.sleep(0.3)
        first.send_signal(signal.SIGKILL)
        task = at[0].user_attrs["task"]
        while not (ends := [t for t in trials() if t.user_attrs.get("task") == task and t.state.name == "COMPLETE"]):
            assert time.monotonic() < deadline and second.poll() is None
            time.sleep(0.3)
    finally:
        first.kill()
        second.terminate()
        first.wait()
        second.wait()
    assert ends[0].user_attrs["worker"].endswith(f":{second.pid}")
    assert [t.state.name for t in trials() if t.user_attrs.get("task") == task] == ["FAIL", "COMPLETE"]
    done = [t.user_attrs["task"] for t in trials() if t.state.name == "COMPLETE"]
    assert len(set(done)) == len(done)  # nothing was run twice


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_real_classifier_is_tuned_by_a_metric_and_its_recipe_trains(minilm: Path) -> None:
    rows = [{"text": f"{w} {i} {w}", "label": w} for i in range(24) for w in ("river", "engine", "sonata")]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = spectrum_peft.tune(
        str(minilm), "train.jsonl", output_dir="tuned", task="classification", memory="4GiB", max_steps=3, batch_size=8,
        metric="macro_f1", dtype="float32", max_length=16, contestants=["full"], learning_rates=[1e-3], finalists=1,
    )  # fmt: skip
    assert {c["label"] for c in found["contestants"]} == {"lora r16", "real 0.25 random", "full"}
    best = found["contestants"][[c["label"] for c in found["contestants"]].index(found["tune"]["winner"])]
    assert best["metrics"]["macro_f1"]["mean"] > 0.5 and best["metrics"]["macro_f1"]["n"] == 3  # chance is a third
    assert Path("tuned/model/train_results.json").is_file() and "interval" in found["tune"]["sentence"]
    assert not list(Path("tuned/cells").glob("*/model"))
    assert main(["train", "--config", "tuned/recipe.yaml", "--output-dir", "again", "--max-steps", "1"]) == 0
    kept = yaml.safe_load(Path("tuned/recipe.yaml").read_text())
    assert kept["seed"] == found["tune"]["seed"] and kept["learning_rate"] == found["tune"]["rate"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_hours_are_met_by_the_wall_clock(tiny_llama_folder: Path) -> None:
    rows = [{"text": f"{i} squared is {i * i}"} for i in range(600)]
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.monotonic()
    run("warm", cell_of(tiny_llama_folder, 4))
    # Forty runs' starts and ends: time for the smallest race and its finals, and much more than that for steps.
    budget = max(75.0, 40 * (time.monotonic() - began))
    began = time.monotonic()
    found = spectrum_peft.tune(
        str(tiny_llama_folder), "many.jsonl", output_dir="tuned", memory="4GiB", hours=budget / 3600, batch_size=4,
        dtype="float32", max_length=32, contestants=["full"], learning_rates=[3e-3], max_steps=100_000, search_rows=16,
        eval_dataset="search.jsonl",
    )  # fmt: skip
    took = time.monotonic() - began
    assert 0.8 * budget <= took <= 1.2 * budget  # what is promised; other work beside it that comes and goes breaks it
    assert all(len(c["seeds"]) >= 3 for c in found["contestants"])


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_family_that_nobody_tuned_on_gets_the_same_treatment() -> None:
    import pydoc_data.topics

    base, texts = Path("neox"), [t for _, t in sorted(pydoc_data.topics.topics.items())]
    pieces = [" ".join(t.split())[i : i + 90] for t in texts for i in range(0, 1800, 90)]
    learnt_from, rows = pieces[::2], [piece for piece in pieces[1::2] if len(piece) == 90]
    _pretrained_neox(base, learnt_from)
    for name, part in (("mine", rows[:200]), ("held_out", rows[200:264])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    found = spectrum_peft.tune(
        str(base), "mine.jsonl", output_dir="tuned", memory="2GiB", max_steps=12, batch_size=8, dtype="float32", max_length=96,
        contestants=["full", "columns r16"], finalists=1, eval_dataset="held_out.jsonl",
    )  # fmt: skip
    assert {"lora r16", "real 0.25 random"} <= {c["label"] for c in found["contestants"]}
    evaluate = ["evaluate", str(base), "--dataset", "held_out.jsonl", "--max-length", "96", "--dtype", "float32"]
    assert main([*evaluate, "-o", "before.json"]) == 0
    before = json.loads(Path("before.json").read_text())["loss"]
    after = {c["label"]: c["metrics"]["loss"] for c in found["contestants"]}
    winner = after[found["tune"]["winner"]]
    assert before < 4.5  # it had learnt something: a byte that is drawn at random costs ln(264) = 5.6
    assert winner["high"] < before  # and the winner learnt more, by its interval
    assert main(["train", "--config", "tuned/recipe.yaml", "--output-dir", "again", "--max-steps", "1"]) == 0


def _pretrained_neox(folder: Path, texts: list[str]) -> None:
    """A GPT-NeoX of 3 blocks, trained briefly: bytes of 16 texts a step."""
    import torch
    from conftest import byte_tokenizer
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=257, eos_token_id=258, pad_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokenizer = byte_tokenizer()
    whole = [text for text in texts if len(text) == 90 and text.isascii()]
    for step in range(100):
        ids = torch.tensor(tokenizer([whole[(16 * step + i) % len(whole)] for i in range(16)])["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
