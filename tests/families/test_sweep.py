"""Every family through everything: its cells are those of docs/families.md."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import listing
import peft
import pytest
import torch
import transformers
import trial
from packaging.version import Version

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "families.json"


@functools.cache
def committed() -> Mapping[str, Any]:
    return json.loads(COMMITTED.read_text())


def same_versions() -> bool:
    there = committed()["versions"]
    return there["transformers"] == transformers.__version__ and there["peft"] == peft.__version__


def test_the_list_is_long_and_its_exceptions_are_of_it() -> None:
    assert len(listing.LISTED) >= 190
    types = {family.model_type for family in listing.LISTED.values()}
    if Version(transformers.__version__) >= Version("5.24"):  # older ones lack a few of the types
        assert set(listing.FIELDS) <= types
        assert set(listing.INPUTS) <= set(listing.LISTED)


def test_the_page_has_a_row_for_each_family() -> None:
    if not same_versions():
        pytest.skip(f"benchmarks/results/families.json is of {committed()['versions']}")
    assert set(committed()["families"]) == set(listing.LISTED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries, about shapes and kernels of single families
@pytest.mark.parametrize("name", listing.LISTED)
def test_a_family_does_what_the_page_says(name: str, tmp_path: Path) -> None:
    row = committed()["families"].get(name, {})
    try:
        cells = trial.row_of(listing.LISTED[name], tmp_path)
    except Exception as error:  # transformers' own
        if "not_built" not in row and same_versions():
            raise
        pytest.skip(f"transformers does not build it: {type(error).__name__}")
    states = {column: state for column, (state, _) in row.get("cells", {}).items()}
    if same_versions():
        assert {column: state for column, (state, _) in cells.items()} == states, cells
    else:  # other releases pass or refuse other families; what is wrong is wrong with any
        assert [cell for column, cell in cells.items() if cell[0] == "failed" != states.get(column)] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_a_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: object, lr: float) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.zeros(1))]

    monkeypatch.setattr(trial, "parameter_groups", wrong)
    row = trial.row_of(listing.LISTED["llama"], tmp_path)
    assert row["scan"] == row["plan"] == ("ok", "")
    assert row["real weights"] == row["merge"] == ("failed", "training changed nothing")
