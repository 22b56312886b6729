"""Facts of the machine that stand beside every measurement, and memory as the kernel counts it. No torch.

Linux says it in /proc; elsewhere psutil and the system's own counters do, which is told where it is less exact.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Of the many flags of a CPU, those that decide how fast it multiplies matrices.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve")
# Load by others above this many cores, for each of ours, makes a timing doubtful.
BUSY = 0.15
_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors", "numpy", "scipy")


def machine() -> dict[str, Any]:
    """CPU model and flags, cores, memory, system, versions, commit of the checkout, load when asked."""
    import psutil

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    pairs = [line.partition(":") for line in lines if ":" in line]
    fields = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions(),
        **commit(),
        "load_average": list(psutil.getloadavg()),
    }


def versions() -> dict[str, str]:
    """{package: version} of the libraries that decide what is measured, those that are installed."""
    return {name: found for name in _PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cpu_maker() -> str:
    """`GenuineIntel`, `AuthenticAMD` or what else the processor says of itself; empty where it cannot be asked."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    said = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    if said:
        return said[0]
    named = (
        os.environ.get("PROCESSOR_IDENTIFIER") or platform.processor()
    )  # Windows: "AMD64 Family 25 ..., AuthenticAMD"
    return next((maker for maker in ("GenuineIntel", "AuthenticAMD") if maker in named), "")


def commit() -> dict[str, Any]:
    """`commit` of the checkout this package lies in, and whether package or benchmarks differ from it.

    Both None where it is no checkout of ours (an installed package that lies inside some other one included).
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        ours = git("ls-files", "--error-unmatch", "spectrum_peft/__init__.py") is not None
        head = git("rev-parse", "HEAD") if ours else None
        changed = git("status", "--porcelain", "--", "spectrum_peft", "benchmarks/*.py") if ours else None
    except FileNotFoundError:  # no git
        head = changed = None
    return {"commit": head, "changed_since_commit": None if changed is None else bool(changed)}


def process_status(field: str, process: int | str = "self") -> int | None:
    """A field of /proc/<process>/status in bytes; None without /proc, or where the process is no more."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    found = [line for line in text.splitlines() if line.startswith(f"{field}:")]
    return int(found[0].split()[1]) * 1024 if found else None


def peak_resident(process: int | str = "self") -> int | None:
    """Highest resident memory since the program began or `reset_peak`, bytes; None where the process is no more.

    Not `ru_maxrss` on Linux: that begins with the peak of the process that started this one. Elsewhere it is what there is for
    this process; of another process, what is resident now, so that who asks often sees its peak.
    """
    if Path("/proc/self/status").exists():
        return process_status("VmHWM", process)
    import psutil

    try:
        memory = psutil.Process(None if process == "self" else int(process)).memory_info()
    except psutil.Error:
        return None
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    if process != "self":
        return int(memory.rss)
    import resource

    # Bytes on macOS, kibibytes on the other systems that have it.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Let this process' peak begin again with what is resident now (Linux; nothing happens elsewhere)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine, and its hypervisor, have taken since it started."""
    import psutil

    times = psutil.cpu_times()._asdict()
    # The time of guests is part of the time of users.
    idle = ("idle", "iowait", "guest", "guest_nice")
    return float(sum(seconds for kind, seconds in times.items() if kind not in idle))


class OtherLoad:
    """How many cores other processes kept busy, on average, between construction and `cores(own)`."""

    def __init__(self) -> None:
        self._began, self._busy = time.perf_counter(), _busy_seconds()

    def cores(self, own: float) -> float:
        """Args:
        own: CPU seconds that the measured processes took in this time.
        """
        return max(0.0, (_busy_seconds() - self._busy - own) / (time.perf_counter() - self._began))
