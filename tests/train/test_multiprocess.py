"""Two processes that share each batch, and under FSDP2 the weights, end as one process ends, in every mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import byte_tokenizer
from peft import PeftModel
from running import QUANTIZABLE, logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectrum_peft import Plan, merge_into_base
from spectrum_peft.cli.main import main
from spectrum_peft.plan import MODES

pytestmark = pytest.mark.multiprocess
TESTS = Path(__file__).parent
MOVING = [f"{name}:moving" for name, mode in MODES.items() if mode.rescorable]
CASES = [
    *MODES,
    *(f"{mode}:nf4" for mode in QUANTIZABLE),
    *(f"{name}:plain" for name, mode in MODES.items() if mode.plain_model),
    *(f"{mode}:sft" for mode in MODES),
    *MOVING,
    *(f"fsdp2:{mode}" for mode in MODES),
    *(f"fsdp2:{name}:plain" for name, mode in MODES.items() if mode.plain_model),
    "fsdp2:lora:nf4",
    "fsdp2:columns:nf4",
    "columns:coupled",
    "fsdp2:columns:coupled",
]
REFUSALS = (
    "different plans", "different sizes", "different rows", "fewer rows", "moving ranks", "buffers of lorsa",
    "buffers of columns", "no FSDP", "FSDP of version 1",
)  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/two_processes.py wrote, run by torchrun on two processes and then by one."""
    out = tmp_path_factory.mktemp("runs")
    script = [str(TESTS / "two_processes.py"), str(out), *CASES]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher in (torchrun, []):
        done = subprocess.run(
            [sys.executable, *launcher, *script],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        if launcher:
            for what in REFUSALS:
                assert done.stdout.count(f"{what}: refused") == 2, what
    return out


def environment() -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]), "PYTHONWARNINGS": "ignore"}
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(variable, None)
    return env


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_as_one(runs: Path, case: str) -> None:
    # That both ranks hold the same bytes, weights and moments, is asserted inside the runs.
    name = case.replace(":", "-")
    one, two = (load_file(runs / f"{name}-{count}.safetensors") for count in (1, 2))
    assert set(one) == set(two)
    apart = {n: float((one[n] - two[n]).abs().max()) for n in one if one[n].is_floating_point()}
    assert max(apart.values()) < 1e-6, max(apart, key=lambda n: apart[n])
    if case not in MOVING:
        assert all(torch.equal(one[n], two[n]) for n in one if not one[n].is_floating_point())
    if not case.endswith(":sft"):
        both = [json.loads((runs / f"{name}-{count}.json").read_text()) for count in (1, 2)]
        assert both[0] == pytest.approx(both[1], abs=1e-5)  # of float32 losses of about 5.5
        assert len(both[0]) == 4
    plans = [Plan.load(runs / f"{name}-{count}.yaml") for count in (1, 2)]
    assert plans[0].digest == plans[1].digest


RESUMED = ["lora", "spectrum:plain", "sgm", "fsdp2:lora", "fsdp2:spectrum:plain", "fsdp2:sgm"]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """From two to one and from one to two, at the same rows a step: as the run that was not stopped."""
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path / "base")
    said = ""
    for count in (2, 1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        script = [str(TESTS / "resumed_elsewhere.py"), str(tmp_path), *RESUMED]
        done = subprocess.run(
            [sys.executable, *torchrun, *script],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        said += done.stdout
    for case in RESUMED:
        assert [said.count(f"went on: {case}, {a} -> {3 - a}") for a in (2, 1)] == [1, 2], said


@pytest.mark.parametrize("mode", MODES)
def test_what_fsdp2_saved_is_merged_and_judged(runs: Path, mode: str) -> None:
    """By `merge`, by `evaluate` and by a model in memory: one function."""
    saved = runs / "runs" / f"fsdp2-{mode}" / "saved"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / "base"), saved)
    merged = runs / f"fsdp2-{mode}-merged"
    merge_into_base(saved, runs / "base", merged)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(plain) - logits(loaded)).abs().max() < 2e-6  # one rounding of each merged weight
    assert (logits(plain) - logits(AutoModelForCausalLM.from_pretrained(runs / "base"))).abs().max() > 1e-4
    byte_tokenizer().save_pretrained(runs / "base")
    rows = runs / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"{i} squared is {i * i}"}) for i in range(4)))
    found = []
    for folder in (saved, merged):
        byte_tokenizer().save_pretrained(folder)
        words = [str(folder), "--dataset", str(rows), "--dtype", "float32", "--max-length", "24", "--use-cpu"]
        out = folder / "judged.json"
        assert main(["evaluate", *words, "-o", str(out)]) == 0
        found.append(json.loads(out.read_text())["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
