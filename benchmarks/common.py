"""What every benchmark needs: facts of the machine, memory and load as the kernel counts them, results as JSON.

Nothing here imports torch, so that a benchmark may measure what importing it costs. Memory and load come from /proc:
on other systems the figures that need it are None.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
if str(ROOT) not in sys.path:  # a benchmark is run from its file, without the package being installed
    sys.path.insert(0, str(ROOT))

from spectrum_peft.records import write_text  # noqa: E402 - the path comes first

# Of the many flags of a CPU, those that decide how fast it multiplies matrices.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve")
_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors", "numpy", "scipy")
# Load by others above this many cores makes a timing doubtful.
BUSY = 0.15


def machine() -> dict[str, Any]:
    """CPU model and flags, cores, memory, system, versions, commit of the checkout, load when asked."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(reversed([tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line]))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        **commit(),
        "load_average": list(os.getloadavg()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> dict[str, Any]:
    """`commit` of the checkout and whether package or benchmarks differ from it; both None outside a checkout."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "spectrum_peft", "benchmarks/*.py")
    except FileNotFoundError:  # no git
        head = changed = None
    return {"commit": head, "changed_since_commit": None if changed is None else bool(changed)}


def save(path: str | os.PathLike[str], benchmark: str, data: Mapping[str, Any]) -> Path:
    """Write a benchmark's result: its name, when it was written, the machine, then `data`; whole or not at all.

    A `machine` in `data` stands instead of the facts of now: taken before the run, its load is that of others.
    """
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    result = {"benchmark": benchmark, "written": written, "machine": machine(), **data}
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return Path(path)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, greatest and count of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


# --- memory ----------------------------------------------------------------------------------------------------------


def _status(field: str, process: int | str) -> int | None:
    """A field of /proc/<process>/status in bytes; None without /proc, or where the process is no more."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    found = [line for line in text.splitlines() if line.startswith(f"{field}:")]
    return int(found[0].split()[1]) * 1024 if found else None


def resident(process: int | str = "self") -> int | None:
    """Resident memory now, bytes."""
    return _status("VmRSS", process)


def private(process: int | str = "self") -> int | None:
    """Resident memory now that no file stands behind, bytes: without pages of a checkpoint that is only mapped."""
    return _status("RssAnon", process)


def peak_resident(process: int | str = "self") -> int | None:
    """Highest resident memory since the program began or `reset_peak`, bytes.

    Not `ru_maxrss`: that begins with the peak of the process that started this one.
    """
    return _status("VmHWM", process)


def reset_peak() -> None:
    """Let this process' peak begin again with what is resident now (Linux; nothing happens elsewhere)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


@dataclass(frozen=True)
class Child:
    """A program that was run to its end.

    Attributes:
        seconds: wall time from start to exit.
        cpu_seconds: user and system time of the program and of the children it waited for.
        peak_bytes: highest resident memory; None without /proc. Sampled every few milliseconds from a counter that only
            grows, so only growth in the last few is missed.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


def run_child(command: Sequence[str], *, env: Mapping[str, str] | None = None, interval: float = 0.005) -> Child:
    """Run a program and watch its time and memory.

    Args:
        env: additions to this process' environment.
    """
    before = os.times()
    began = time.perf_counter()
    peak = 0
    with subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    ) as process:
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(interval):
                peak = max(peak, peak_resident(process.pid) or 0)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        stdout, stderr = process.communicate()
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Child(process.returncode, stdout, stderr, seconds, cpu, peak or None)


# --- load ------------------------------------------------------------------------------------------------------------


def _busy_seconds() -> float | None:
    """CPU seconds that all processes of the machine, and its hypervisor, have taken since it started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class OtherLoad:
    """How many cores other processes kept busy, on average, between construction and `cores(own)`."""

    def __init__(self) -> None:
        self._began, self._busy = time.perf_counter(), _busy_seconds()

    def cores(self, own: float) -> float | None:
        """Args:
        own: CPU seconds that the measured processes took in this time.
        """
        now = _busy_seconds()
        if self._busy is None or now is None:
            return None
        return max(0.0, (now - self._busy - own) / (time.perf_counter() - self._began))


def warn_if_busy() -> bool:
    """Say so on stderr where other processes load the machine before a timing begins.

    Returns:
        whether they do, by the load average of the last minute.
    """
    load = os.getloadavg()[0]
    busy = load > BUSY * cores()
    if busy:
        print(
            f"warning: load average {load:.2f} on {cores()} cores before the benchmark begins; the times are doubtful",
            file=sys.stderr,
        )
    return busy
