"""Which ways of sharing a run among processes are refused: read from accelerate's state, without its processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from running import options_of
from torch import nn

from spectrum_peft import SpectrumConfig, make_plan
from spectrum_peft.cli.main import main
from spectrum_peft.errors import CheckpointError, OptionError, TrainingSetupError
from spectrum_peft.memory import report_of_config
from spectrum_peft.train import processes
from spectrum_peft.train.arguments import config_of
from spectrum_peft.train.processes import (
    Sharing,
    check_fsdp_version,
    check_launch,
    problem_of,
    refuse_lost_ratios,
    sharing_of,
)
from spectrum_peft.tuner.loading import whole_weights
from spectrum_peft.weights import open_weights

DEEPSPEED = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}


def state(kind: str, **plugins: Any) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=kind, **plugins)


def fsdp(version: int, once: bool = False) -> SimpleNamespace:
    policy = SimpleNamespace(param_dtype=torch.bfloat16)
    return SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=once, mixed_precision_policy=policy)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (state("NO"), Sharing()),
        (state("MULTI_GPU"), Sharing(runs="MULTI_GPU")),
        (state("FSDP", fsdp_plugin=fsdp(1)), Sharing("fsdp1", runs="FSDP", computes_in=torch.bfloat16)),
        (
            state("FSDP", fsdp_plugin=fsdp(2, once=True)),
            Sharing("fsdp2", runs="FSDP", loads_once=True, computes_in=torch.bfloat16),
        ),
        (
            state("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=2, deepspeed_config={})),
            Sharing("zero2", runs="DEEPSPEED"),
        ),
        (
            state("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config=DEEPSPEED)),
            Sharing("zero3", runs="DEEPSPEED"),
        ),
        (
            state("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config={})),
            Sharing("zero3", runs="DEEPSPEED", saves_shards=True),
        ),
    ],
)
def test_the_sharing_is_read_from_accelerate(monkeypatch: Any, found: Any, expected: Sharing) -> None:
    monkeypatch.setattr(processes, "AcceleratorState", lambda: found)
    assert sharing_of(SimpleNamespace(fsdp=None, deepspeed=None)) == expected


@pytest.mark.parametrize(
    ("variable", "asked"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_what_was_asked_for_and_does_not_run(monkeypatch: Any, variable: str, asked: str) -> None:
    monkeypatch.setattr(processes, "AcceleratorState", lambda: state("MULTI_CPU"))
    monkeypatch.setenv(variable, "true")
    sharing = sharing_of(SimpleNamespace(fsdp=None, deepspeed=None))
    assert (sharing.asked, sharing.runs) == (asked, "MULTI_CPU")
    assert f"{asked} was asked for" in problem_of(sharing, SimpleNamespace(mode="lora", options={}), nn.Linear(2, 2))


def made(model: Any, mode: str, **options: Any) -> tuple[Any, Any]:
    config = SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **{**options_of(mode), **options})
    peft = get_peft_model(model, config)
    return peft.peft_config["default"].plan, peft


MOVING = {"rescore_every": 1, "scope": "global", "criterion": "mp"}


@pytest.mark.parametrize(
    ("sharing", "mode", "options", "words"),
    [
        (Sharing("fsdp1"), "lora", {}, "version 1"),
        (Sharing("fsdp2"), "alors", MOVING, "rescore_every=1 under FSDP2"),
        (Sharing("zero2"), "alors", MOVING, "rescore_every=1 under ZeRO-2"),
        (Sharing("zero3"), "spectrum", {}, "as a PEFT adapter under ZeRO-3"),
        (Sharing("zero3"), "lorsa", {}, "would lack the singular vectors"),
        (Sharing("zero3", saves_shards=True), "lora", {}, "stage3_gather_16bit_weights_on_model_save"),
        (Sharing("fsdp2", loads_once=True), "columns", {}, "cannot share out the buffer"),
        (Sharing("fsdp2", loads_once=True), "lora", {}, None),
        (Sharing("fsdp2"), "sgm", {}, None),
        (Sharing("zero2"), "lorsa", {}, None),
        (Sharing("zero3"), "columns", {}, None),
        (Sharing("copies"), "alors", MOVING, None),
    ],
)
def test_what_would_not_be_carried_out(
    tiny_llama: Any, sharing: Sharing, mode: str, options: Any, words: str | None
) -> None:
    problem = problem_of(sharing, *made(tiny_llama, mode, **options))
    assert problem is None if words is None else words in problem


def test_rates_do_not_reach_deepspeed() -> None:
    with pytest.raises(TrainingSetupError, match=r"0.5 to 2 times.*lr_ratio=\(1, 1\)"):
        refuse_lost_ratios(Sharing("zero2", runs="DEEPSPEED"), [0.5, 1.0, 2.0])
    refuse_lost_ratios(Sharing("zero2", runs="DEEPSPEED"), [1.0])
    refuse_lost_ratios(Sharing("fsdp2", runs="FSDP"), [0.5])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set|MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is 1 .* MASTER_ADDR is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "wanted RANK below WORLD_SIZE"),
        ({"RANK": "first"}, "RANK is 'first'"),
    ],
)
def test_an_environment_of_half_a_launcher(environment: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        check_launch(environment)
    check_launch({})
    check_launch({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "1"})


def test_fsdp_of_version_1_is_refused_before_loading() -> None:
    for args, environment in (
        (SimpleNamespace(fsdp_plugin_args={"fsdp_version": 1}), {}),
        (SimpleNamespace(fsdp_plugin_args=None), {"ACCELERATE_USE_FSDP": "true"}),
    ):
        with pytest.raises(OptionError, match="wanted fsdp_version: 2"):
            check_fsdp_version(args, environment)
    check_fsdp_version(SimpleNamespace(fsdp_plugin_args={"fsdp_version": 2}), {})
    check_fsdp_version(SimpleNamespace(fsdp_plugin_args=None), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0", "global_step2", "__0_0.distcp"])
def test_a_sharded_checkpoint_is_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    options = SimpleNamespace(revision=None, trust_remote_code=False)
    for opened in (lambda: open_weights(str(tmp_path)), lambda: config_of(str(tmp_path), options)):
        with pytest.raises(CheckpointError, match=f"sharded checkpoint .{name}"):
            opened()


def test_a_partitioned_model_is_refused(tiny_llama: Any) -> None:
    for parameter in tiny_llama.parameters():  # as deepspeed.zero.Init leaves them
        parameter.ds_id, parameter.data = 0, torch.empty(0)
    with pytest.raises(TrainingSetupError, match=r"loaded under ZeRO-3.* load it whole and scan its files"):
        get_peft_model(tiny_llama, SpectrumConfig(mode="lora", task_type="CAUSAL_LM"))


def test_loading_leaves_zero_3_out_and_gives_it_back() -> None:
    from transformers.integrations import deepspeed

    held = SimpleNamespace(is_zero3=lambda: True)
    deepspeed._hf_deepspeed_config_weak_ref = lambda: held
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = None


def test_train_says_what_the_environment_lacks(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--model", str(tmp_path), "--dataset", "x.jsonl", "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "MASTER_ADDR is not set" in said


@pytest.mark.multiprocess
def test_the_first_process_speaks_for_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0").mkdir(parents=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [
        "train",
        "--model",
        str(tmp_path / "checkpoint-2"),
        "--dataset",
        "x.jsonl",
        "--output-dir",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "spectrum_peft", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if line.startswith("spectrum-peft: error")]
    assert len(said) == 1, done.stderr
    assert "sharded checkpoint (pytorch_model_fsdp_0)" in said[0]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rows", "the processes have different training data"),
        ("plan", "the processes have 2 different plans"),
        ("missing", "another of the processes has ended"),
        ("FSDP1", "FSDP is of version 1"),
    ],
)
def test_processes_that_mean_different_runs_all_end(
    tiny_llama_folder: Path, tmp_path: Path, what: str, words: str
) -> None:
    """Two processes that nobody ends: each by itself, with one line, and the first says what is wrong."""
    for i in range(2):
        rows = [{"text": f"{n + (i if what == 'rows' else 0)} squared"} for n in range(8)]
        (tmp_path / f"rows{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        plan = make_plan(report_of_config(tiny_llama_folder, ("first", "last")[i]), mode="spectrum", spectrum_ratio=0.5)
        plan.save(tmp_path / f"plan{i if what == 'plan' else 0}.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if what == "FSDP1":  # as accelerate launch sets it, for which 1 is the default
        env |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
    # A later process waits for the first to speak; here there is no launcher that would end it.
    script = "import sys; from spectrum_peft.cli import main; main._PATIENCE = 1.0; sys.exit(main.main(sys.argv[1:]))"
    running = []
    for rank in ("0", "1"):
        rows_file = "none.jsonl" if what == "missing" and rank == "1" else f"rows{rank}.jsonl"
        flags = [
            "--model",
            str(tiny_llama_folder),
            "--dataset",
            str(tmp_path / rows_file),
            "--use-cpu",
            "--max-steps",
            "1",
        ]
        flags += [
            "--plan",
            str(tmp_path / f"plan{rank if what == 'plan' else 0}.yaml"),
            "--output-dir",
            str(tmp_path / "out"),
        ]
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            script,
            "train",
            *flags,
            "--dtype",
            "float32",
            "--ddp-backend",
            "gloo",
        ]
        own = {**env, "RANK": rank, "LOCAL_RANK": rank}
        running.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [2, 2], said
    lines = [line for line in said[0].splitlines() if line.startswith("spectrum-peft: error")]
    assert len(lines) == 1 and words in lines[0], said[0]
    assert "Traceback" not in said[0] + said[1]
