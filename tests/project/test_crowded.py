"""Places that change under a command: an output folder that vanishes, a base that cannot be written, a cache that two runs share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectrum_peft.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--max-steps 3 --save-steps 1 --per-device-train-batch-size 2 --max-length 32 --dtype float32 --report-to none"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"number {i} is followed by {i + 1}"} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# What stands for a whole result where a command makes its folder anew.
RESULTS = {
    "train": ("run/adapter_model.safetensors", "run/adapter_config.json", "run/checkpoint-3/optimizer.pt", "run/tokenizer.json"),
    "scan": ("report.json",), "plan": ("plan.yaml",), "evaluate": ("metrics.json",),
}  # fmt: skip


def vanishes(folder: str, how: str) -> None:
    """A folder that a command writes to goes away; nothing, or something else, stands in its place."""
    shutil.rmtree(folder)
    if how == "a file in its place":
        Path(folder).write_text("")


def once_before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], None]) -> None:
    real = getattr(owner, name)
    done: list[int] = []

    def instead(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(1)
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, instead)


@pytest.fixture
def adapter(tiny_llama_folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), LoraConfig(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tiny_llama_folder)
    model.save_pretrained("adapter")
    return Path("adapter")


@pytest.mark.parametrize("how", ["nothing in its place", "a file in its place"])
@pytest.mark.parametrize("verb", ["train", "merge", "export", "scan", "plan", "evaluate"])
def test_an_output_folder_that_vanishes_is_one_line_or_made_again(
    verb: str, how: str, adapter: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import spectrum_peft.plan
    import spectrum_peft.scan
    from spectrum_peft.train import saved, watch
    from spectrum_peft.weights import writer

    Path("out").mkdir()
    lines = {
        "train": f"train --model {tiny_llama_folder} --dataset rows.jsonl --mode lora --output-dir out/run {FLAGS}",
        "merge": f"merge {adapter} --base {tiny_llama_folder} -o out/merged",
        "export": f"export {adapter} --format lora -o out/lora",
        "scan": f"scan {tiny_llama_folder} --criterion last -o out/report.json",
        "plan": "plan report.json -o out/plan.yaml",
        "evaluate": f"evaluate {adapter} --dataset rows.jsonl --dtype float32 -o out/metrics.json",
    }
    if verb == "plan":
        assert main(lines["scan"].replace("out/", "").split()) == 0
    places = {
        "train": (watch.StepClock, "on_step_end"), "merge": (writer.SafetensorsWriter, "__exit__"),
        "export": (writer.SafetensorsWriter, "__exit__"), "scan": (spectrum_peft.scan, "scan_weights"),
        "plan": (spectrum_peft.plan, "explain"), "evaluate": (saved, "evaluate_saved"),
    }  # fmt: skip
    once_before(monkeypatch, *places[verb], lambda: vanishes("out", how))
    code = main(lines[verb].split())
    said = capsys.readouterr().err
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("spectrum-peft: error: ")]
    assert (code, len(errors)) in {(0, 0), (2, 1)}
    if code:
        assert "out/" in errors[0] and "cannot be written" in errors[0] and ".part" not in errors[0]
        assert not Path("out").is_dir() or not [path for path in Path("out").rglob("*") if path.is_file()]
    else:
        assert (verb, how) in {(v, "nothing in its place") for v in ("train", "scan", "plan", "evaluate")}
        assert [path.name for name in RESULTS[verb] for path in [Path("out", name)] if not path.is_file()] == []
