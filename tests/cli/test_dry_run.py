"""`train --dry-run` against the run that it speaks of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectrum_peft.cli.main import main

FLAGS = "--dtype float32 --report-to none --save-strategy no"
Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text("def length(completions, **_):\n    return [float(len(c)) for c in completions]\n")

    def command(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(f"train --model {tiny_llama_folder} {FLAGS} {line}".split())
        return (code, *capsys.readouterr())

    return command


def rows_of(task: str, n: int) -> list[dict[str, Any]]:
    words = {
        "causal_lm": lambda i: {"prompt": "p" * (1 + 8 * i), "completion": f"answer {i}"},
        "dpo": lambda i: {"prompt": "p" * (1 + 8 * i), "chosen": "good", "rejected": "bad"},
        "kto": lambda i: {"prompt": "p" * (1 + 8 * i), "chosen": "good", "rejected": "bad"},
        "reward": lambda i: {"prompt": "p" * (1 + 8 * i), "chosen": "good", "rejected": "bad"},
        "grpo": lambda i: {"prompt": f"say {i}"},
        "classification": lambda i: {"text": "t" * (1 + 8 * i), "label": "ab"[i % 2]},
        "multi_label": lambda i: {"text": f"t {i}", "label": ["a", "b"][: i % 3]},
        "regression": lambda i: {"text": f"t {i}", "label": i / 10},
        "token_classification": lambda i: {"tokens": ["x", "y"], "tags": ["A", "B"]},
    }[task]
    return [words(i) for i in range(n)]


# What a task needs beside the common flags; `learnt` and `rows` are what the dry run has to say of ten rows.
MORE = {"grpo": "--reward-function rewards.py:length --num-generations 2 --max-completion-length 2"}
FAST = ["causal_lm", "reward", "grpo"]
SLOW = ["dpo", "kto", "classification", "multi_label", "regression", "token_classification"]


@pytest.mark.parametrize("task", [*FAST, *(pytest.param(task, marks=pytest.mark.slow) for task in SLOW)])
def test_the_run_is_as_it_was_said(task: str, run: Run) -> None:
    """Steps against transformers' own count, tokens and dropped rows against the trainer's."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, 10)))
    line = (
        f"--task {task} --mode lora --r 4 --dataset rows.jsonl --output-dir out --num-train-epochs 1.5 --max-length 48"
    )
    line += f" --per-device-train-batch-size 2 --gradient-accumulation-steps 2 {MORE.get(task, '')}"
    code, said, err = run(f"{line} --dry-run")
    assert code == 0, err
    assert not Path("out").exists() and "nothing was trained and nothing written" in said
    assert "training: 10 rows read" in said and "no --mode was given" not in said
    assert "peak " in said and "Mode lora" in said
    assert "time: not known" in said
    code, out, err = run(line)
    assert code == 0, err
    steps = json.loads(Path("out/train_results.json").read_text())["steps"]
    assert f"steps: {steps} (batches of 2, 2 of them for a step, 1.5 epochs)" in said
    assert " of 10 rows dropped" not in out  # which is said where the trainer drops others than were counted
    assert re.findall("training: 10 rows read.*", said) == re.findall("training: 10 rows read.*", out) != []


@pytest.mark.parametrize(
    "mode", ["full", "spectrum --ratio 0.5", "sgm --n-groups 1", "lorsa --n-components 8 --svd-rank 16"]
)
def test_every_kind_of_plan_is_said(mode: str, run: Run) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("dpo", 4)))
    code, said, err = run(f"--task dpo --mode {mode} --dataset rows.jsonl --output-dir out --max-steps 7 --dry-run")
    assert code == 0, err
    assert f"Mode {mode.split()[0]} on" in said
    assert ("note: the plan needs gradients" in said) == mode.startswith(("sgm", "lorsa"))
    assert "the model as it was before, which the loss holds it beside, is counted" in said
    assert "steps: 7 (batches of 8, --max-steps)" in said


def test_a_step_is_measured_where_it_is_asked_for(run: Run) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("causal_lm", 4)))
    line = "--dataset rows.jsonl --output-dir out --num-train-epochs 100 --per-device-train-batch-size 2"
    code, said, err = run(f"{line} --dry-run --time-steps 2 --show-rows 1 --packing --max-length 64")
    assert code == 0, err
    assert re.search(r"time: about \d+ (s|min) for \d+ steps of [\d.]+ s, measured on 2", said)
    assert "no --mode was given, and none was shown to be the best one" in said
    assert "row 1: " in said and "carry loss (*)" in said and said.count("rows read") == 1
    assert not Path("out").exists()
    assert run(f"{line} --time-steps 2")[0] == 2


def test_what_would_be_refused_is_refused(run: Run) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("reward", 2)))
    line = "--task reward --mode lora --dataset rows.jsonl --output-dir out --dry-run"
    code, _, err = run(f"{line} --max-length 4")
    assert code == 2 and "none of its 2 rows is left to train on: each is longer than the 4 tokens of max_length" in err
    Path("out").mkdir()
    Path("out/adapter_config.json").write_text("{}")
    code, _, err = run(line)
    assert code == 2 and "holds another run's adapter_config.json" in err


@pytest.mark.parametrize(
    ("task", "seen"),
    [
        ("dpo", ["row 1, chosen: ", "row 1, rejected: "]),
        ("kto", ["row 1, chosen, wanted: ", "row 1, rejected, not wanted: "]),
        ("reward", ["row 1, chosen: ", "row 1, rejected: "]),
        ("grpo", ["row 1, prompt: "]),
        ("classification", ["learnt: a"]),
        ("multi_label", ["learnt: none of the labels"]),
        ("regression", ["learnt: 0"]),
        ("token_classification", ["row 1: 3 tokens, 2 carry loss (*)"]),
    ],
)
def test_rows_of_every_task_are_shown(task: str, seen: list[str], run: Run) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, 4)))
    code, said, err = run(
        f"--task {task} --mode lora --dataset rows.jsonl --output-dir out --show-rows 1 {MORE.get(task, '')}"
    )
    assert code == 0, err
    for text in seen:
        assert text in said
    assert "row 2" not in said
