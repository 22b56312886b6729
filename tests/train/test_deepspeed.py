"""DeepSpeed's ZeRO on two processes: what works ends as one process ends, the rest is refused by name. `make test-deepspeed`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from deepspeed_runs import REFUSED
from peft import PeftModel
from running import values
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make test-deepspeed"
    ),
]
TESTS = Path(__file__).parent
CASES = [
    *(f"zero2:{mode}" for mode in ("spectrum", "lora", "spectra_qlora", "alors:even", "sgm", "lorsa", "columns")),
    *(f"zero{stage}:{mode}:plain" for stage in (2, 3) for mode in ("full", "spectrum")),
    *(f"zero3:{mode}" for mode in ("lora", "spectra_qlora", "alors:even", "sgm", "columns", "spectrum:first")),
]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What deepspeed_runs.py wrote, run by torchrun on two processes and then by one."""
    out = tmp_path_factory.mktemp("deepspeed")
    ARCHITECTURES["llama"].build().save_pretrained(out / "base")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]), "PYTHONWARNINGS": "ignore"}
    env["DS_ACCELERATOR"] = "cpu"
    script = [str(TESTS / "deepspeed_runs.py"), str(out), *CASES]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher in (torchrun, []):  # the first time, DeepSpeed compiles what its processes talk by: minutes
        done = subprocess.run(
            [sys.executable, *launcher, *script], env=env, capture_output=True, text=True, check=False, timeout=1500
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        if launcher:
            for what in REFUSED:
                assert done.stdout.count(f"{what}: refused") == 2, what
    return out


@pytest.mark.parametrize("case", CASES)
def test_zero_ends_as_one_process(runs: Path, case: str) -> None:
    found, name = [], case.replace(":", "-")
    for count in (1, 2):
        folder = runs / f"{name}-{count}"
        if adapter := (folder / "adapter_config.json").is_file():
            base = AutoModelForCausalLM.from_pretrained(runs / "base")
            found.append(values(PeftModel.from_pretrained(base, folder)))
        else:
            found.append(values(AutoModelForCausalLM.from_pretrained(folder)))
    start = values(AutoModelForCausalLM.from_pretrained(runs / "base"))
    one, two = found
    assert set(one) == set(two)
    apart = {n: float((one[n] - two[n]).abs().max()) for n in one}
    assert max(apart.values()) < 1e-6, max(apart, key=lambda n: apart[n])
    assert adapter or any((one[n] - start[n]).abs().max() > 1e-5 for n in start)
    both = [json.loads((runs / f"{name}-{count}.json").read_text()) for count in (1, 2)]
    assert both[0] == pytest.approx(both[1], abs=1e-5)  # of float32 losses of about 5.5
    assert len(both[0]) == 4
