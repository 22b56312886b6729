"""What `make demo` does, with its numbers kept: python benchmarks/demo.py [--steps N]

Trains SmolLM2-135M as `full`, `spectrum` and `lora` on Python's help topics and writes the table that README.md quotes to
benchmarks/results/demo.json, the learning curves to docs/images/curves.png. Under ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import common

from spectrum_peft.demo import draw_curves, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS / "demo.json")
    parser.add_argument("--draw", action="store_true", help="draw the kept curves; run nothing")
    options = parser.parse_args()
    picture = common.ROOT / "docs" / "images" / "curves.png"
    if options.draw:
        print(draw_curves(json.loads(options.output.read_text())["runs"], picture))
        return
    common.warn_if_busy()
    facts = common.machine()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), options.steps)
        shutil.copy(Path(folder) / "curves.png", picture)
    for one in found["runs"]:
        for name in ("model", "dataset"):
            one[name] = Path(one[name]).name  # the folder is this machine's
    keep = ("steps", "ratio", "scan_seconds", "seconds", "runs", "closing")
    print(common.save(options.output, "demo", {"machine": facts, **{key: found[key] for key in keep}}))


if __name__ == "__main__":
    main()
