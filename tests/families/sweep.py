"""`make families`: every family of `listing.py` through everything, one row each; the JSON behind docs/families.md.

    python tests/families/sweep.py --out benchmarks/results/families.json
    python tests/families/sweep.py --only llama,whisper            # some of them, printed
    python tests/families/sweep.py --part 1/4 --out part1.json     # a quarter; files are put together by --join

Each family has a process of its own, so that a crash or a hang is a row. A file that is there is gone on with.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("SPECTRUM_PEFT_CACHE", tempfile.mkdtemp(prefix="families_"))

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from listing import LEFT_OUT, LISTED  # noqa: E402
from trial import COLUMNS, row_of  # noqa: E402

START = "fork" if sys.platform == "linux" else "spawn"  # a fork has the libraries imported
LIMIT = 240  # seconds for one family; the slowest of them took a quarter of it


def here(name: str) -> dict[str, Any]:
    """The row of one family, in this process."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    family = LISTED[name]
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="family_") as folder:
        try:
            row: dict[str, Any] = {"cells": row_of(family, Path(folder))}
        except Exception as error:
            row = {
                "not_built": f"{type(error).__name__}: {' '.join(str(error).split())}".replace(
                    f"{folder}/base", "the checkpoint"
                )
            }
    return {"class": family.class_name, "task": family.task, "seconds": round(time.process_time() - began, 1), **row}


def _child(name: str, pipe: Any) -> None:
    with Path(os.devnull).open("w") as sink:
        sys.stdout = sys.stderr = sink
        pipe.send(here(name))


def tried(name: str) -> dict[str, Any]:
    """The row of one family, from a process of its own."""
    context = multiprocessing.get_context(START)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        row = ours.recv() if ours.poll(LIMIT) else {"died": f"took more than {LIMIT} s"}
    except EOFError:
        row = {"died": "the process ended without a word"}
    if "died" in row:
        process.kill()
    process.join()
    if "died" in row:
        row |= {"class": LISTED[name].class_name, "task": LISTED[name].task}
        row["cells"] = dict.fromkeys(COLUMNS, ("failed", row["died"]))
    return row


def record(rows: dict[str, Any]) -> dict[str, Any]:
    versions = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}
    return {
        "versions": versions,
        "columns": list(COLUMNS),
        "families": dict(sorted(rows.items())),
        "left_out": LEFT_OUT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--part", default="1/1", help="K/N: every Nth family from the Kth")
    parser.add_argument("--out", type=Path, help="JSON; gone on with where it is there")
    parser.add_argument("--again", action="store_true", help="do rows of --out again that are not all ok")
    parser.add_argument("--join", type=Path, nargs="+", help="files of parts, put together in --out")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text())["families"]
    for part in options.join or ():
        rows |= json.loads(part.read_text())["families"]
    k, n = map(int, options.part.split("/"))
    chosen = [] if options.join else (options.only.split(",") if options.only else list(LISTED))[k - 1 :: n]
    if len(chosen) > 1 and START == "fork":
        here("llama")  # what libraries import when they are first used, once and not in each process
    for name in chosen:
        done = rows.get(name)
        if (
            done
            and not (options.again and any(c[0] in ("failed",) for c in done.get("cells", {}).values()))
            and not options.only
        ):
            continue
        rows[name] = tried(name)
        print(said(name, rows[name]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(record(rows), indent=1) + "\n")
    if options.join and options.out:
        options.out.write_text(json.dumps(record(rows), indent=1) + "\n")


def said(name: str, row: dict[str, Any]) -> str:
    if "not_built" in row:
        return f"{name:26} NOT BUILT {row['not_built'][:300]}"
    cells = " ".join(f"{c}={s}" + (f"[{why[:300]}]" if why else "") for c, (s, why) in row["cells"].items())
    return f"{name:26} {cells} ({row.get('seconds')} s)"


if __name__ == "__main__":
    main()
