"""A cell's own process believes nothing that would delete, or write, elsewhere."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import yaml

from spectrum_peft.compare import read_cell
from spectrum_peft.compare.figures import as_csv
from spectrum_peft.errors import CheckpointError

CELL = {
    "label": "lora", "seed": 0, "trained": True, "control": None, "arguments": [], "measure": {}, "scan_seconds": None,
    "keep_model": False, "versions": {},
}  # fmt: skip


def _cell(folder: Path, output: Path, **changes: object) -> Path:
    (folder / "cell.json").write_text(json.dumps({**CELL, **changes}))
    (folder / "train.yaml").write_text(yaml.safe_dump({"model": "m", "output_dir": str(output)}))
    return folder


def test_a_cell_whose_model_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    """It is deleted when the cell is measured."""
    assert read_cell(_cell(tmp_path, tmp_path / "model"))[0]["label"] == "lora"
    precious = tmp_path / "precious"
    precious.mkdir()
    for output in (precious, tmp_path, tmp_path / "model" / "..", tmp_path / ".." / "model"):
        with pytest.raises(CheckpointError, match=r"train\.yaml: output_dir is .*, wanted "):
            read_cell(_cell(tmp_path, output))
    (tmp_path / "model").symlink_to(precious)
    with pytest.raises(CheckpointError, match="output_dir is"):
        read_cell(_cell(tmp_path, tmp_path / "model"))


def test_a_damaged_cell_is_refused_by_its_field(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cell\.json: arguments\[0\] is 1, wanted text"):
        read_cell(_cell(tmp_path, tmp_path / "model", arguments=[1]))


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@x", " =1"])
def test_a_cell_of_csv_is_no_formula_and_numbers_stay(text: str) -> None:
    row = {"label": text, "seed": -1, "metrics": {}, "log": "l"}
    found = next(csv.DictReader(io.StringIO(as_csv({"cells": [row]}))))
    assert found["label"] == f"'{text}"
    assert found["seed"] == "-1"
