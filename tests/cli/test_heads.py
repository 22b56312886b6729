"""Classification of every kind from the command line: one label, several, a number, a tag for each word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectrum_peft.cli.main import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FLAGS = "--max-steps 12 --learning-rate 1e-2 --per-device-train-batch-size 4 --save-strategy no --dtype float32 --report-to none"


def _words(i: int) -> list[str]:
    return [["red", "blue"][i % 2], ["cat", "dog"][i // 2 % 2]]


# Task -> a row of its data, a metric, and how it moves.
ROWS: dict[str, tuple[Callable[[int], dict[str, Any]], str, int]] = {
    "multi_label": (lambda i: {"text": " ".join(_words(i)), "label": _words(i)}, "loss", -1),
    "regression": (lambda i: {"text": " ".join(_words(i)), "label": 0.5 + i % 2}, "loss", -1),
    "token_classification": (lambda i: {"tokens": _words(i), "tags": ["colour", "animal"]}, "accuracy", 1),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.mark.parametrize("mode", ["lora", pytest.param("spectrum", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ROWS)
def test_a_head_is_trained_and_opened_again(
    task: str, mode: str, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    row, metric, sign = ROWS[task]
    rows = written([row(i) for i in range(8)])
    line = f"train --config {EXAMPLES / task}.yaml --mode {mode} --model {tiny_llama_folder} --dataset {rows} {FLAGS}"
    code = main(f"{line} --eval-dataset {rows} --output-dir out".split())
    assert code == 0, capsys.readouterr().err
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["task"] == task and results["new_head"]
    assert sign * (results["after"][metric] - results["before"][metric]) > 0
    assert "begins at random: score." in caplog.text and "could be compared" not in caplog.text
    capsys.readouterr(), caplog.clear()
    code = main(f"evaluate out --dataset {rows}".split())  # nobody says the task: the folder does
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "MISSING" not in err and "LOAD REPORT" not in caplog.text and "at random" not in caplog.text
    found = json.loads(out)
    assert found["task"] == task
    counted = {"tags": 2 * 8} if task == "token_classification" else {"examples": 8}  # of eight rows, two words each
    assert {name: found.get(name) for name in ("tags", "examples") if name in found} == counted
    for name, value in results["after"].items():  # the same sums on the same processor, loaded anew
        assert found[name] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        ("multi_label", [{"text": "t", "label": "a"}], "column 'label' holds Value('string'), wanted lists of strings"),
        ("regression", [{"text": "t", "label": "a"}], "column 'label' holds Value('string'), wanted numbers"),
        ("classification", [{"text": "t", "label": 0.5}], "(--task regression learns numbers, --task multi_label"),
        ("token_classification", [{"tokens": ["a", "b"], "tags": ["x", "y"]}, {"tokens": ["a"], "tags": ["x", "y"]}],
         "row 2: 1 tokens and 2 tags, wanted one tag for each token"),
        ("token_classification", [{"tokens": "a b", "tags": "x y"}], "column 'tokens' holds Value('string'), wanted lists"),
        ("token_classification", [{"tokens": ["a"], "tags": [None]}, {"tokens": ["a"], "tags": ["x"]}],
         "column 'tags', row 1: holds a null"),
        ("token_classification", [{"text": "t"}], "wanted tokens/tags; name yours with --tokens-column, --tags-column"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(
    task: str, rows: list[dict[str, Any]], said: str, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"train --task {task} --mode lora --model {tiny_llama_folder} --dataset {written(rows)} --output-dir out {FLAGS}"
    assert main(line.split()) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out").exists()


def test_a_probe_knows_tags_and_says_which_losses_it_does_not(
    tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sgm` asks for gradients, which are those of the tags."""
    tags = written([ROWS["token_classification"][0](i) for i in range(4)])
    line = f"train --mode sgm --n-groups 1 --model {tiny_llama_folder} --output-dir out {FLAGS} --max-steps 1"
    assert main(f"{line} --task token_classification --dataset {tags}".split()) == 0, capsys.readouterr().err
    numbers = written([ROWS["regression"][0](i) for i in range(4)])
    assert main(f"{line} --task regression --dataset {numbers} --overwrite-output-dir".split()) == 2
    assert (
        "a probe measures the cross-entropy of tokens or of classes, and task 'regression'" in capsys.readouterr().err
    )


def test_a_head_of_several_outputs_is_no_reward(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = written([{"text": t, "label": t} for t in ("a", "b")])
    line = f"train --mode lora --model {tiny_llama_folder} --output-dir"
    assert (
        main(f"{line} classes --task classification --dataset {rows} {FLAGS} --max-steps 1 --mode spectrum".split())
        == 0
    )
    pairs = written([{"prompt": "p", "chosen": "a", "rejected": "b"}], "pairs.jsonl")
    capsys.readouterr()
    assert main(f"train --mode lora --model classes --task reward --dataset {pairs} --output-dir out".split()) == 2
    assert "classes: its head has 2 outputs, and a reward is one." in capsys.readouterr().err
