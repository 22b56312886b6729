"""Resuming: the newest checkpoint that is whole, and a line for those that are passed over."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from spectrum_peft.errors import CheckpointError, OptionError
from spectrum_peft.records.whole import _node
from spectrum_peft.train.checkpoints import checkpoint_to_resume, problem_of, refuse_other_sharing, resuming, saving
from spectrum_peft.train.output import clear_killed


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"x": torch.ones(2)}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return tmp_path


def test_the_newest_by_number_is_taken(run_folder: Path) -> None:
    assert checkpoint_to_resume("true", str(run_folder)) == str(run_folder / "checkpoint-10")
    assert checkpoint_to_resume(None, str(run_folder)) is None
    assert checkpoint_to_resume("false", str(run_folder)) is None


@pytest.mark.parametrize(
    ("file", "saved", "shown"),
    [
        ("optimizer.bin", "FSDP", "under FSDP2"),
        ("optimizer_0", "FSDP", "under FSDP2"),
        ("global_step4", "DeepSpeed", "under DeepSpeed"),
    ],
)
def test_what_another_way_of_sharing_saved_is_no_checkpoint(
    run_folder: Path, file: str, saved: str, shown: str
) -> None:
    plain, shared = run_folder / "checkpoint-2", run_folder / "checkpoint-4"
    (shared / file).write_bytes(b"")
    refuse_other_sharing(None, saved)
    refuse_other_sharing(str(plain), None)
    refuse_other_sharing(str(shared), saved)
    with pytest.raises(
        CheckpointError, match=f"checkpoint-4: was saved {shown} and this run is without .*Resume it {shown}"
    ):
        refuse_other_sharing(str(shared), None)
    with pytest.raises(CheckpointError, match=f"checkpoint-2: was saved without sharing .* and this run is {shown}"):
        refuse_other_sharing(str(plain), saved)


# In the order that the trainer writes them: a kill may come after each, and in the middle of each.
@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("how", ["missing", "half", "empty"])
def test_one_that_was_cut_off_is_passed_over_with_a_line(
    run_folder: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run_folder / "checkpoint-10"
    assert problem_of(newest) is None
    content = (newest / file).read_bytes()
    (newest / file).unlink()
    if how != "missing":
        (newest / file).write_bytes(content[: len(content) // 2] if how == "half" else b"")
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume("true", str(run_folder)) == str(run_folder / "checkpoint-4")
    assert "checkpoint-10: its saving was cut off" in caplog.text
    with pytest.raises(CheckpointError, match=r"checkpoint-10: cannot be resumed.*one before is whole: .*checkpoint-4"):
        checkpoint_to_resume(str(newest), str(run_folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_flos", None), ("num_input_tokens_seen", "12"), ("best_metric", "low"), ("best_global_step", [4]),
        ("best_model_checkpoint", 4), ("epoch", {}), ("log_history", [1]), ("log_history", {}), ("stateful_callbacks", [1]),
    ],
)  # fmt: skip
def test_what_the_trainer_counts_on_from_is_looked_at_before_it_does(run_folder: Path, field: str, value: Any) -> None:
    newest = run_folder / "checkpoint-10"
    sound = dataclasses.asdict(TrainerState(global_step=10, epoch=1.0, total_flos=1e18, best_metric=0.5))
    (newest / "trainer_state.json").write_text(json.dumps(sound))
    assert problem_of(newest) is None
    (newest / "trainer_state.json").write_text(json.dumps(sound | {field: value}))
    with pytest.raises(CheckpointError, match=f"checkpoint-10: cannot be resumed, trainer_state.json is .*{field}"):
        checkpoint_to_resume(str(newest), str(run_folder))


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume from"):
        checkpoint_to_resume("true", str(tmp_path))
    with pytest.raises(OptionError, match="wanted a checkpoint folder or true"):
        checkpoint_to_resume(str(tmp_path / "none"), str(tmp_path))


def test_what_a_killed_run_was_writing_goes_from_the_folder_and_its_checkpoints(run_folder: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [
        folder / f".spectrum_plan.yaml.{ended.pid}-{_node()}.x.part"
        for folder in (run_folder, run_folder / "checkpoint-4")
    ]
    others = run_folder / "checkpoint-4" / f".spectrum_plan.yaml.{os.getpid()}-{_node()}.x.part"
    for path in (*left, others):
        path.write_text("half")
    clear_killed(run_folder)
    assert [path.exists() for path in (*left, others)] == [False, False, True]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt"])
def test_a_checkpoint_with_a_pipe_in_it_is_passed_over(run_folder: Path, name: str) -> None:
    """To open one is to wait for whoever opens its other end."""
    (run_folder / "checkpoint-10" / name).unlink()
    os.mkfifo(run_folder / "checkpoint-10" / name)
    assert problem_of(run_folder / "checkpoint-10") == f"{name} is a device or a pipe"
    assert checkpoint_to_resume("true", str(run_folder)) == str(run_folder / "checkpoint-4")


def test_states_of_other_types_are_the_checkpoints_fault_and_a_fresh_runs_are_its_own() -> None:
    """What the scheduler takes as it is and computes with at its first step."""

    def step() -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        schedule.base_lrs = [{}]
        optimizer.step()
        schedule.step()

    with pytest.raises(
        CheckpointError, match=r"checkpoint-2: cannot be resumed \(TypeError: .*Resume from one before it"
    ):
        with resuming("checkpoint-2"):
            step()
    with pytest.raises(TypeError), resuming(None):
        step()


def test_a_full_disk_is_an_error_of_one_line_and_other_faults_are_not_hidden() -> None:
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(No space left on device\)"), saving("out"):
        raise OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="out: a checkpoint cannot be written"), saving("out"):
        raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/1")
    with pytest.raises(RuntimeError, match="shapes"), saving("out"):
        raise RuntimeError("shapes do not fit")
