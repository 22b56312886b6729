"""The card says what is in the folder, and its snippet loads it."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from spectrum_peft.card import CARD, PICTURE, card_of, write_card
from spectrum_peft.cli.main import main
from spectrum_peft.errors import CheckpointError
from spectrum_peft.records import PLAN_FILE, Plan

FLAGS = "--max-steps 2 --per-device-train-batch-size 2 --logging-steps 1 --dtype float32"


@pytest.fixture(scope="module")
def runs(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by what made them: a run in three modes, a merge, a LoRA for plain peft."""
    root = tmp_path_factory.mktemp("runs")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} and {i * i}"}) + "\n" for i in range(12)))
    for mode in ("spectrum", "lora", "alors"):
        words = f"train --model {tiny_llama_folder} --dataset {rows} --eval-dataset {rows} --mode {mode}"
        assert main([*words.split(), "--output-dir", f"{root}/{mode}", *FLAGS.split()]) == 0
    assert main(["merge", f"{root}/alors", "-o", f"{root}/merged"]) == 0
    assert main(["export", f"{root}/alors", "--format", "lora", "-o", f"{root}/plain"]) == 0
    return {path.name: path for path in root.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", ["spectrum", "lora", "alors", "merged", "plain"])
def test_the_card_is_valid_metadata_and_says_what_happened(runs: dict[str, Path], name: str) -> None:
    folder = runs[name]
    card = ModelCard.load(folder / CARD)
    assert "None" not in card.content and "spectrum_peft" in card.data.tags
    assert card.data.library_name == ("transformers" if name in ("spectrum", "merged") else "peft")
    assert card.data.base_model is None  # a folder of this machine: nothing that the hub could link to
    results = json.loads((runs["alors" if name in ("merged", "plain") else name] / "train_results.json").read_text())
    assert f"{results['after']['loss']:.4g}" in card.text and "rows.jsonl" in card.text
    assert (folder / PICTURE).is_file() == (f"({PICTURE})" in card.text)
    assert ("merged into it" in card.text) == (name == "merged")
    # The figures are those of the adapter; where they are another folder's, it says so.
    assert ("Judged was the adapter before it was merged;" in card.text) == (name == "merged")
    trained = f"| parameters that train | {results['trainable_parameters']:,} of {results['total_parameters']:,} ("
    assert trained in card.text
    if name in ("alors", "plain"):
        plan = Plan.load(runs["alors"] / PLAN_FILE)
        high, low = sorted({e.rank for e in plan.entries if e.trains}, reverse=True)
        assert f"| rank | {high} in " in card.text and f", {low} in " in card.text


def test_figures_of_a_4_bit_base_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    results = {"mode": "lora", "quantization": "nf4", "before": {"loss": 2.0}, "after": {"loss": 1.0}}
    text = card_of(tmp_path, results, None, name="small")
    assert "Judged with its base held in nf4, as in training" in text
    assert "Judged" not in card_of(tmp_path, {**results, "quantization": "none"}, None, name="small")
    assert "before it was merged, its base held in nf4" in card_of(
        tmp_path, results, None, name="m", merged_from="small"
    )


@pytest.mark.parametrize(("field", "value"), [
    ("steps", "x"), ("input_tokens", [1]), ("total_parameters", {}), ("peak_memory_bytes", "x"), ("after", [1]), ("before", "x"),
    ("mode", "a\n# b"),
])  # fmt: skip
def test_results_that_were_changed_by_hand_are_named(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "train_results.json").write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError, match=rf"train_results\.json: {field}"):
        write_card(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectrum", "lora", "alors", "merged", "plain"])
def test_the_snippet_of_the_card_loads_the_folder(runs: dict[str, Path], name: str) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (runs[name] / CARD).read_text(), re.DOTALL)
    needs_us = "import spectrum_peft" in code
    assert needs_us == (json.loads((runs[name] / "adapter_config.json").read_text())["peft_type"] == "SPECTRUM"
                        if (runs[name] / "adapter_config.json").is_file() else False)  # fmt: skip
    assert "model.generate(" in code  # rows of text, and a template: it talks
    program = code + "\nprint(type(model).__name__, sum(p.numel() for p in model.parameters()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=runs[name].parent,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_was_logged_is_a_table_and_a_picture(runs: dict[str, Path]) -> None:
    with (runs["lora"] / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    log = json.loads((runs["lora"] / "train_results.json").read_text())["log_history"]
    assert [row["loss"] for row in rows if row["loss"]] == [str(entry["loss"]) for entry in log if "loss" in entry]
    assert len([row for row in rows if row["loss"]]) == 2
    assert (runs["lora"] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_hub_base_is_linked_and_an_unknown_one_is_not_made_up(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/model"})
    )
    card = ModelCard.load(write_card(tmp_path))
    assert card.data.base_model == "org/model" and "An adapter for `org/model`" in card.text
    assert "import spectrum_peft" not in card.text
    (tmp_path / "adapter_config.json").unlink()
    assert "a base that its files do not name" in write_card(tmp_path).read_text()
