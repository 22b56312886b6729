"""A slice of the sweep: families that have little in common, each through everything."""

from __future__ import annotations

from pathlib import Path

import listing
import pytest
import torch
import transformers
import trial
from packaging.version import Version

SLICE = (
    "llama", "gpt2", "qwen3_moe", "mamba", "zamba2", "deepseek_v3", "t5", "bert/sequence_classification", "modernbert", "whisper",
    "canary", "vit", "llava", "qwen3_vl", "modernbert/sequence_classification", "hunyuan_v1_moe", "blip",
)  # fmt: skip


def test_the_list_is_long_and_its_exceptions_are_of_it() -> None:
    assert len(listing.LISTED) >= 190
    types = {family.model_type for family in listing.LISTED.values()}
    if Version(transformers.__version__) >= Version("5.24"):  # older ones lack a few of the types
        assert set(listing.FIELDS) <= types
        assert set(listing.INPUTS) <= set(listing.LISTED)
    assert set(SLICE) <= set(listing.LISTED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries, about shapes and kernels of single families
@pytest.mark.parametrize("name", SLICE)
def test_a_family_passes_everything(name: str, tmp_path: Path) -> None:
    row = trial.row_of(listing.LISTED[name], tmp_path)
    assert {column: cell for column, cell in row.items() if cell[0] != "ok"} == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_a_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: object, lr: float) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.zeros(1))]

    monkeypatch.setattr(trial, "parameter_groups", wrong)
    row = trial.row_of(listing.LISTED["llama"], tmp_path)
    assert row["scan"] == row["plan"] == ("ok", "")
    assert row["real weights"] == row["merge"] == ("failed", "training changed nothing")
