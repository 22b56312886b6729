"""What `make demo` does, with its numbers kept: python benchmarks/demo.py [--steps N]

Trains SmolLM2-135M as `full`, `spectrum` and `lora` on Python's help topics and writes the table that README.md quotes to
benchmarks/results/demo.json, the learning curves to docs/images/curves.png. Under ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import common

from spectrum_peft.demo import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS / "demo.json")
    options = parser.parse_args()
    common.warn_if_busy()
    facts = common.machine()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), options.steps)
        shutil.copy(Path(folder) / "curves.png", common.ROOT / "docs" / "images" / "curves.png")
    for one in found["runs"]:
        one["model"] = Path(one["model"]).name  # the folder is this machine's
    keep = ("steps", "ratio", "scan_seconds", "seconds", "runs", "closing")
    print(common.save(options.output, "demo", {"machine": facts, **{key: found[key] for key in keep}}))


if __name__ == "__main__":
    main()
