"""What torch is asked about devices: the accelerator where there is one, else the CPU; the rest is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectrum_peft
from spectrum_peft import devices
from spectrum_peft.errors import InstallError, OptionError

PACKAGE = Path(spectrum_peft.__file__).parent


def test_without_proc_a_cpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows do not say which instructions a processor has; float32 is fast on all of them."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: not self.as_posix().startswith("/proc") and exists(self))
    assert devices.fast_dtype("cpu") == torch.float32


def test_torch_is_asked_about_accelerators_in_one_place() -> None:
    asked = re.compile(r"torch\.(cuda|xpu|mps|accelerator)\.\w+\(")
    found = {
        p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if asked.search(p.read_text(encoding="utf-8"))
    }
    assert found == {"devices.py"}
    root = PACKAGE.parent
    outside = [p for folder in ("benchmarks", "examples") for p in (root / folder).glob("*.py")]
    # What every accelerator has may be asked there; of one maker's nothing.
    assert not [p.name for p in outside if re.search(r"torch\.(cuda|xpu|mps)\.\w+\(", p.read_text(encoding="utf-8"))]


def test_auto_is_the_accelerator_or_the_cpu() -> None:
    device = devices.device_named("auto")
    assert device == devices.default_device()
    assert device.type != "cpu" or not torch.accelerator.is_available()
    assert devices.device_named("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_a_kind_that_is_not_here_is_refused_with_the_one_that_is(name: str) -> None:
    here = devices.default_device().type
    if name == here:
        pytest.skip(f"there is a {name}")
    with pytest.raises(OptionError, match=rf"device is '{name}:1', but torch \S+ sees no {name} here, only {here}\."):
        devices.device_named(f"{name}:1")


def test_a_word_that_is_no_device_is_refused() -> None:
    with pytest.raises(OptionError, match="device is 'gpu', wanted 'auto', 'cpu', 'cuda'"):
        devices.device_named("gpu")
    with pytest.raises(OptionError, match="names one device twice"):
        devices.devices_named("cpu, cpu")
    with pytest.raises(OptionError, match="wanted devices of one kind"):
        devices.devices_named("cpu,meta")


def test_the_number_of_a_device_is_below_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert devices.devices_named("cuda:0,cuda:1") == [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(OptionError, match="device is 'cuda:7', but there are 2 of its kind, numbered from 0"):
        devices.device_named("cuda:7")
    with pytest.raises(OptionError, match="sees no xpu here, only cuda"):
        devices.device_named("xpu")


def test_peak_memory_is_of_what_was_held_and_begins_again() -> None:
    device = devices.default_device()
    held = torch.ones(64 * 2**20, dtype=torch.uint8, device=device)
    with_it = devices.peak_memory()
    assert with_it >= held.numel()
    del held
    devices.reset_peak_memory()
    assert devices.peak_memory() <= with_it


def test_free_memory_is_a_part_of_all_memory() -> None:
    found = devices.free_memory(torch.device("cpu"))
    assert found is not None and 0 < found[0] <= found[1]


def test_the_cpu_computes_in_float64_and_mps_is_not_asked() -> None:
    assert devices.has_float64(torch.device("cpu"))
    assert not devices.has_float64(torch.device("mps"))


def test_a_dtype_that_runs_says_nothing_and_another_its_reason() -> None:
    assert devices.works(torch.device("cpu"), torch.float32) is None
    reason = devices.works(torch.device("cpu"), torch.float4_e2m1fn_x2)
    assert reason is not None and "\n" not in reason


def test_quantization_is_refused_where_bitsandbytes_has_no_kernels() -> None:
    devices.refuse_quantization(torch.device("cpu"), "nf4")
    with pytest.raises(InstallError, match="quantization is 'nf4', but bitsandbytes has no kernels for mps"):
        devices.refuse_quantization(torch.device("mps"), "nf4")


@pytest.mark.parametrize(
    "part", ["scan", *(pytest.param(p, marks=pytest.mark.slow) for p in ("modes", "command_line"))]
)
def test_a_device_without_float64_and_decompositions(part: str, tmp_path: Path) -> None:
    """As MPS is. In a process of its own, which has such a device."""
    script = Path(__file__).with_name("small_device.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), part, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
