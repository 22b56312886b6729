"""Two processes that share each batch, and under FSDP2 the weights, end as one process ends, in every mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import QUANTIZABLE
from safetensors.torch import load_file

from spectrum_peft import Plan
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
    "buffers of columns", "no FSDP",
)  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/two_processes.py wrote, run by torchrun on two processes and then by one."""
    out = tmp_path_factory.mktemp("runs")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]), "PYTHONWARNINGS": "ignore"}
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(variable, None)
    script = [str(TESTS / "two_processes.py"), str(out), *CASES]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher in (torchrun, []):
        done = subprocess.run(
            [sys.executable, *launcher, *script], env=env, capture_output=True, text=True, check=False, timeout=1200
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        if launcher:
            for what in REFUSALS:
                assert done.stdout.count(f"{what}: refused") == 2, what
    return out


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
