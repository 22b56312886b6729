"""What a scan over the network costs, against a stand-in for the hub on the loopback address (tests/stand_in_hub.py).

    python benchmarks/hub.py                       # 1.4 GB of disk, about 5 minutes on 2 cores
    python benchmarks/hub.py --parts real          # a minute, SmolLM2-135M
    python benchmarks/hub.py --parts whole         # all of Llama-2-7B, about 20 minutes on 2 cores; --blocks 2: less of it

Parts, each kept in the result file until it is run again:

    bytes    a scan of some blocks with the embeddings and the head of Llama-2-7B, random bfloat16, over a line that is not
             throttled: bytes that the server sent against bytes of the scored matrices, peak resident memory of the process,
             and what is on the disk afterwards.
    real     the same of SmolLM2-135M.
    whole    the same of every block of Llama-2-7B, 13.5 GB in shards that the server makes up as they are asked for
             (benchmarks/made.py), so that no disk holds them.
    overlap  SmolLM2-135M over a line of 50 MB/s and of 10 MB/s, beside the two halves of the work: the bytes over the rate, and
             a scan of the same files on the disk. Scans of the disk and of the two lines take turns, and each of a line is
             held against those of the disk before and after it. About 4 minutes on 2 cores that do nothing else.

Times are those of `scan_weights` in a process that has imported what it needs. The server is a process of its own on the same
machine: it takes processor time that a real one would not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import scan

PARTS = ("bytes", "real", "overlap", "whole")
GOALS = {"bytes_ratio": 1.05, "peak_bytes": 1.5 * 2**30, "disk_bytes": 50e6, "overlap": 1.15}
RATES, NAME = (50e6, 10e6), "org/model"


@contextmanager
def served(what: Path | int, rate: float | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """A stand-in that serves the files of a folder, or so many blocks that it makes up: (address, what was asked for, once it
    has ended)."""
    made = [str(common.ROOT / "benchmarks" / "made.py"), str(what)]
    command = made if isinstance(what, int) else [str(common.ROOT / "tests" / "stand_in_hub.py"), str(what), NAME]
    command += [str(rate)] if rate else []
    with subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        asked: dict[str, Any] = {}
        try:
            yield process.stdout.readline().strip(), asked
            process.stdin.close()
            asked |= json.loads(process.stdout.read())
        finally:
            process.kill()


def scanned(model: str, url: str | None, home: Path) -> tuple[common.Child, dict[str, Any], float]:
    """A scan in a process of its own: (the process, its report, seconds of `scan_weights`)."""
    where = {"HF_ENDPOINT": url or "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0" if url else "1"}
    env = {**os.environ, **where, "HF_HOME": str(home / "hf"), "SPECTRUM_PEFT_CACHE": str(home / "own")}
    child = common.run_child([sys.executable, __file__, "--scan", model, "--out", str(home / "report.json")], env=env)
    if child.returncode:
        raise SystemExit(child.stderr[-2000:])
    return child, json.loads((home / "report.json").read_text()), float(child.stdout.split()[-1])


def scan_here(model: str, out: Path) -> None:
    """What the process does."""
    import huggingface_hub.hf_api  # noqa: F401 - imported before the clock starts, as torch is

    from spectrum_peft.scan import scan_weights

    began = time.perf_counter()
    report = scan_weights(model)
    print(time.perf_counter() - began)
    report.save(out)


def over_the_line(what: Path | int, rate: float | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home, served(what, rate) as (url, asked):
        load = common.OtherLoad()
        child, report, seconds = scanned(NAME, url, Path(home))
        others = load.cores(child.cpu_seconds)
        (Path(home) / "report.json").unlink()
        disk = sum(p.stat().st_size for p in Path(home).rglob("*") if p.is_file() and not p.is_symlink())
    width = {"bfloat16": 2, "float16": 2, "float32": 4}
    scored = sum(math.prod(s["shape"]) * width[s["dtype"]] for s in report["stats"] if s["score"] is not None)
    stored = sum(math.prod(s["shape"]) * width[s["dtype"]] for s in report["stats"])
    return {
        "seconds": seconds, "process_seconds": child.seconds, "cpu_seconds": child.cpu_seconds, "peak_bytes": child.peak_bytes,
        "disk_bytes": disk, "sent_bytes": asked["bytes"], "requests": asked["requests"], "scored_bytes": scored,
        "stored_bytes": stored, "ratio": asked["bytes"] / scored,
        "matrices": sum(s["score"] is not None for s in report["stats"]), "other_cores": others,  # the server's included
    }  # fmt: skip


def on_the_disk(folder: Path) -> float:
    with tempfile.TemporaryDirectory() as home:
        return scanned(str(folder), None, Path(home))[2]


def overlap(folder: Path, rates: Sequence[float], repeats: int) -> dict[str, dict[str, Any]]:
    """{rate: figures}; the disk before and after each line, since what else the machine does changes."""
    lines: dict[float, list[dict[str, Any]]] = {rate: [] for rate in rates}
    beside: dict[float, list[float]] = {rate: [] for rate in rates}
    before = on_the_disk(folder)
    for _ in range(repeats):
        for rate in rates:
            lines[rate].append(over_the_line(folder, rate))
            after = on_the_disk(folder)
            beside[rate].append((before + after) / 2)
            before = after
    found = {}
    for rate, runs in lines.items():
        fetching = runs[0]["sent_bytes"] / rate
        ratios = [run["seconds"] / max(fetching, scoring) for run, scoring in zip(runs, beside[rate], strict=True)]
        found[f"{rate / 1e6:.0f} MB/s"] = {
            "seconds": [run["seconds"] for run in runs], "fetching_seconds": fetching, "scoring_seconds": beside[rate],
            "overlap": common.spread(ratios), "other_cores": [run["other_cores"] for run in runs],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="BYTES")
    parser.add_argument("--blocks", type=int, help="of Llama-2-7B; default 1, of `whole` all 32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the synthetic checkpoint; default: the system's temporary one")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "hub.json")
    parser.add_argument("--scan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scan:
        scan_here(options.scan, options.out)
        return
    from models import folder_of

    common.warn_if_busy()
    parts = json.loads(options.out.read_text())["parts"] if options.out.is_file() else {}

    def keep(part: str, found: dict[str, Any]) -> None:
        parts[part] = found
        common.save(options.out, "hub", {"goals": GOALS, "parts": parts})
        print(part, json.dumps(found))

    if "real" in options.parts:
        keep("real", over_the_line(folder_of("smollm2")))
    if "overlap" in options.parts:
        keep("overlap", overlap(folder_of("smollm2"), options.rates, options.repeats))
    if "bytes" in options.parts:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            scan.write_checkpoint(Path(scratch), dataclasses.replace(scan.SHAPES[-1], blocks=options.blocks or 1))
            keep("bytes", {"blocks": options.blocks or 1, **over_the_line(Path(scratch))})
    if "whole" in options.parts:
        blocks = options.blocks or scan.SHAPES[-1].blocks
        keep("whole", {"blocks": blocks, **over_the_line(blocks)})


if __name__ == "__main__":
    main()
