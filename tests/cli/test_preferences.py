"""DPO from the command line: real runs of TRL's trainer, by the example's own file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectrum_peft import Plan
from spectrum_peft.cli.main import main

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "dpo.yaml"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} squared is", "chosen": f" {i * i}", "rejected": f" {i + i}!"} for i in range(4)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("mode", ["lora", "spectrum", pytest.param("sgm", marks=pytest.mark.slow)])
def test_preferences_are_learnt_and_the_example_runs(
    mode: str, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        f"--mode {mode} --model {tiny_llama_folder} --dataset pairs.jsonl --eval-dataset pairs.jsonl --output-dir out"
    )
    more += " --max-steps 4 --dtype float32 --learning-rate 1e-3" + (" --n-groups 1" if mode == "sgm" else "")
    code = main(["train", "--config", str(EXAMPLE), *more.split()])
    _, err = capsys.readouterr()
    assert code == 0, err
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["task"] == "dpo"
    assert results["before"]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference are the same
    assert results["after"]["loss"] < results["before"]["loss"]
    assert results["after"]["reward_accuracy"] > results["before"]["reward_accuracy"]
    assert Plan.load("out/spectrum_plan.yaml").mode == mode


def test_the_usual_rate_is_that_of_preferences(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"train --task dpo --mode lora --model {tiny_llama_folder} --dataset pairs.jsonl --output-dir out --max-steps 1"
    )
    assert main([*line.split(), "--dtype", "float32", "--max-length", "64", "--report-to", "none"]) == 0
    out, err = capsys.readouterr()
    assert "learning rate 1e-05 (the default of mode 'lora', over 20 for dpo)" in out
    assert "usual rate" not in err


def test_rows_without_a_pair_are_named(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts.jsonl").write_text('{"text": "t"}\n')
    line = f"train --task dpo --mode lora --model {tiny_llama_folder} --dataset texts.jsonl --output-dir out"
    assert main(line.split()) == 2
    assert (
        "no usable column for task 'dpo': it has ['text'], wanted prompt/chosen/rejected or" in capsys.readouterr().err
    )
