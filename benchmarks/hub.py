"""What a scan over the network costs, against a stand-in for the hub on the loopback address (tests/stand_in_hub.py).

    python benchmarks/hub.py                       # 1.6 GB of disk, about 10 minutes on 2 cores
    python benchmarks/hub.py --parts real          # a minute, SmolLM2-135M

Parts, each kept in the result file until it is run again:

    bytes    `python -m spectrum_peft scan` of two blocks with the embeddings and the head of Llama-2-7B, random bfloat16, over
             a line that is not throttled: bytes that the server sent against bytes of the scored matrices, peak resident
             memory, and what is on the disk afterwards.
    overlap  the same over a line of 50 MB/s and of 10 MB/s, beside the two halves of the work: the bytes over the rate, and a
             scan of the same files on the disk, right before and after.
    real     bytes of SmolLM2-135M.

The server is a process of its own on the same machine: it takes processor time that a real one would not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import scan

PARTS = ("bytes", "overlap", "real")
GOALS = {"bytes_ratio": 1.05, "peak_bytes": 1.5 * 2**30, "disk_bytes": 50e6, "overlap": 1.15}
BLOCKS, RATES, NAME = 2, (50e6, 10e6), "org/model"


@contextmanager
def served(folder: Path, rate: float | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """A stand-in that serves the files of a folder: (address, what was asked for, once it has ended)."""
    command = [sys.executable, str(common.ROOT / "tests" / "stand_in_hub.py"), str(folder), NAME]
    command += [str(rate)] if rate else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        asked: dict[str, Any] = {}
        try:
            yield process.stdout.readline().strip(), asked
            process.stdin.close()
            asked |= json.loads(process.stdout.read())
        finally:
            process.kill()


def scanned(model: str, url: str | None, home: Path) -> tuple[common.Child, dict[str, Any]]:
    """A scan as a process: (the process, its report)."""
    where = {"HF_ENDPOINT": url or "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0" if url else "1"}
    env = {**os.environ, **where, "HF_HOME": str(home / "hf"), "SPECTRUM_PEFT_CACHE": str(home / "own")}
    report = home / "report.json"
    child = common.run_child([sys.executable, "-m", "spectrum_peft", "scan", model, "-o", str(report)], env=env)
    if child.returncode:
        raise SystemExit(child.stderr[-2000:])
    return child, json.loads(report.read_text())


def over_the_line(folder: Path, rate: float | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home, served(folder, rate) as (url, asked):
        load = common.OtherLoad()
        child, report = scanned(NAME, url, Path(home))
        others = load.cores(child.cpu_seconds)
        disk = sum(p.stat().st_size for p in Path(home).rglob("*") if p.is_file() and not p.is_symlink())
    width = {"bfloat16": 2, "float16": 2, "float32": 4}
    scored = sum(math.prod(s["shape"]) * width[s["dtype"]] for s in report["stats"] if s["score"] is not None)
    stored = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    traffic = re.search(r"in (\d+) s \(([\d.]+) MB/s\)", child.stderr)
    return {
        "seconds": child.seconds, "cpu_seconds": child.cpu_seconds, "peak_bytes": child.peak_bytes, "disk_bytes": disk,
        "sent_bytes": asked["bytes"], "requests": asked["requests"], "scored_bytes": scored, "stored_bytes": stored,
        "ratio": asked["bytes"] / scored, "matrices": sum(s["score"] is not None for s in report["stats"]),
        "other_cores": others,  # the server's included
        "said": traffic[0] if traffic else None,
    }  # fmt: skip


def on_the_disk(folder: Path) -> float:
    with tempfile.TemporaryDirectory() as home:
        return scanned(str(folder), None, Path(home))[0].seconds


def part_overlap(folder: Path, rates: tuple[float, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rate in rates:
        before = on_the_disk(folder)
        line = over_the_line(folder, rate)
        after = on_the_disk(folder)
        fetching, scoring = line["sent_bytes"] / rate, (before + after) / 2
        found[f"{rate / 1e6:.0f} MB/s"] = {
            **line, "fetching_seconds": fetching, "scoring_seconds": scoring, "scoring_runs": [before, after],
            "overlap": line["seconds"] / max(fetching, scoring), "one_after_the_other": (fetching + scoring) / line["seconds"],
        }  # fmt: skip
        print(json.dumps(found[f"{rate / 1e6:.0f} MB/s"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="BYTES")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--folder", type=Path, help="for the synthetic checkpoint; default: the system's temporary one")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "hub.json")
    options = parser.parse_args()
    common.warn_if_busy()
    parts = json.loads(options.out.read_text())["parts"] if options.out.is_file() else {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        if {"bytes", "overlap"} & set(options.parts):
            scan.write_checkpoint(folder, dataclasses.replace(scan.SHAPES[-1], blocks=options.blocks))
        if "bytes" in options.parts:
            parts["bytes"] = {"blocks": options.blocks, **over_the_line(folder)}
            print(json.dumps(parts["bytes"]))
        if "overlap" in options.parts:
            parts.setdefault("overlap", {}).update(part_overlap(folder, tuple(options.rates)))
        if "real" in options.parts:
            from models import folder_of

            parts["real"] = over_the_line(folder_of("smollm2"))
            print(json.dumps(parts["real"]))
    common.save(options.out, "hub", {"goals": GOALS, "parts": parts})


if __name__ == "__main__":
    main()
