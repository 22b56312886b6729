"""What every benchmark needs: facts of the machine, memory and load as the kernel counts them, results as JSON.

Nothing here imports torch, so that a benchmark may measure what importing it costs. Memory and load come from /proc:
on other systems the figures that need it are None.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
if str(ROOT) not in sys.path:  # a benchmark is run from its file, without the package being installed
    sys.path.insert(0, str(ROOT))

# The path comes first; some of these names are for the benchmarks, which ask them of this module.
from spectrum_peft.machine import (  # noqa: E402
    BUSY,
    OtherLoad,  # noqa: F401
    commit,  # noqa: F401
    cores,
    machine,
    peak_resident,
    process_status,
    reset_peak,  # noqa: F401
)
from spectrum_peft.records import write_text  # noqa: E402


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


def resident(process: int | str = "self") -> int | None:
    """Resident memory now, bytes."""
    return process_status("VmRSS", process)


def private(process: int | str = "self") -> int | None:
    """Resident memory now that no file stands behind, bytes: without pages of a checkpoint that is only mapped."""
    return process_status("RssAnon", process)


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


def warn_if_busy() -> bool:
    """Say so on stderr where other processes load the machine before a timing begins.

    Returns:
        whether they do, by the load average of the last minute.
    """
    import psutil

    load = psutil.getloadavg()[0]
    busy = load > BUSY * cores()
    if busy:
        print(
            f"warning: load average {load:.2f} on {cores()} cores before the benchmark begins; the times are doubtful",
            file=sys.stderr,
        )
    return busy
