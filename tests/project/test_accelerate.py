"""examples/accelerate: accelerate reads each configuration and what launch.sh makes of it, as a launch would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
PLACES = [(1,), (2,), (8,), (8, 2, 0, "10.0.0.1"), (8, 2, 1, "10.0.0.1")]


def command(kind: str, place: tuple[Any, ...], *flags: str) -> list[str]:
    """What launch.sh starts, word by word."""
    words = [str(FOLDER / "launch.sh"), kind, *map(str, place), "--", *flags]
    env = {**os.environ, "ACCELERATE": "echo"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_every_kind_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_takes_it(kind: str, place: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(FOLDER / f"{kind}.yaml"))  # which refuses a key that it does not know
    assert str(config.distributed_type.value) == KINDS[kind]
    # accelerate counts the cards of this machine where a number is missing, and there are none.
    parsed, *_ = _validate_launch_command(
        launch_command_parser().parse_args(command(kind, place, "--max-steps", "2")[1:])
    )
    cards, machines, this = (*place, 1, 0)[:3] if len(place) == 1 else place[:3]
    assert (parsed.num_processes, parsed.num_machines, parsed.machine_rank) == (cards * machines, machines, this)
    assert parsed.main_process_ip == ("127.0.0.1" if machines == 1 else "10.0.0.1")
    assert (parsed.training_script, parsed.training_script_args) == ("spectrum_peft", ["train", "--max-steps", "2"])
    assert parsed.use_fsdp == (kind == "fsdp2")
    assert parsed.use_deepspeed == kind.startswith("zero")
    if kind == "fsdp2":
        environment = prepare_multi_gpu_env(parsed)
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"
    if kind.startswith("zero"):
        assert parsed.zero_stage == int(kind[-1])
    if kind == "zero3":
        assert str(parsed.zero3_save_16bit_model).lower() == "true"
        assert str(parsed.zero3_init_flag).lower() == "false"


@pytest.mark.parametrize(
    "words", [["ddp"], ["ddp4", "2", "--", "x"], ["ddp", "2", "2", "--", "x"], ["ddp", "2", "x", "x"]]
)
def test_a_wrong_call_is_one_line(words: list[str]) -> None:
    done = subprocess.run([str(FOLDER / "launch.sh"), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("usage: launch.sh")


@pytest.mark.multiprocess
def test_train_under_the_launcher(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "0")  # one that is free
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"{i} squared is {i * i}"}) for i in range(16)))
    flags = [
        "--model",
        str(tiny_llama_folder),
        "--mode",
        "lora",
        "--dataset",
        str(rows),
        "--max-steps",
        "2",
        "--use-cpu",
    ]
    flags += ["--output-dir", str(tmp_path / "out"), "--dtype", "float32", "--per-device-train-batch-size", "2"]
    # `--cpu` is accelerate's, for a machine without cards; all else is as the script starts it.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = command("ddp", (2,), *flags)[1:]
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", *words]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["steps"] == 2
    assert done.stdout.count("learning rate 0.0018 (the default of mode 'lora' for 2 steps at rank 16)") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
