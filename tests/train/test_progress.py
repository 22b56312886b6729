"""What a run prints of its log, and who may read what it saved."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectrum_peft.records import with_usual_modes
from spectrum_peft.train.progress import line_of


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            {
                "loss": 1.23456,
                "learning_rate": 2e-4,
                "grad_norm": 0.5,
                "epoch": 0.5,
                "num_tokens": 7,
                "train_runtime": 3,
            },
            "step 5 of 10, epoch 0.50: loss 1.235, rate 0.0002, gradient 0.5; about 2 min left",
        ),
        (
            {"eval_loss": 2.0, "eval_runtime": 9.0, "eval_rewards/margins": 0.25, "epoch": 1},
            "step 5 of 10, epoch 1.00, held out: loss 2, rewards/margins 0.25; about 2 min left",
        ),
        ({"train_loss": 1.5, "train_runtime": 61.2, "epoch": 2.0}, "5 steps in 61 s, to epoch 2, mean loss 1.5"),
    ],
)
def test_a_log_is_a_line_in_words(logs: dict[str, float], line: str) -> None:
    assert line_of(logs, 5, 10, left=121) == line


@pytest.mark.skipif(os.name == "nt", reason="rights of another kind")
def test_files_of_safetensors_get_the_rights_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "inner" / "model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").chmod(0o640)  # somebody wanted it so
    before = os.umask(0o027)
    try:
        with_usual_modes(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "inner" / "model.safetensors").stat().st_mode) in (0o640, 0o644)
    (tmp_path / "inner" / "model.safetensors").chmod(0o600)
    before = os.umask(0o022)
    try:
        with_usual_modes(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "inner" / "model.safetensors").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "other.safetensors").stat().st_mode) == 0o640
