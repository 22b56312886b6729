"""Feed damaged files to every reader and say what came out: `python tests/fuzz/campaign.py --minutes 30 --seed 7`.

What must hold for each input: the reader returns, or raises a `SpectrumError` whose message is one printable line of at most
1,000 characters; within 10 s; without 2 GiB more than before; without a `.part` file left. Each batch of inputs runs in a process
of its own, so that one that ends the process is found, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
# Before the libraries that read them.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SECONDS = 10  # for one input
MEMORY = 2 << 30  # bytes beyond what was mapped before


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def fault_of(error: BaseException) -> str | None:
    """Why an error is none that a user may see; None for one that is as it should be."""
    from spectrum_peft.errors import SpectrumError

    if not isinstance(error, SpectrumError):
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "spectrum_peft/spectrum_peft" in f.filename or "/spectrum_peft/" in f.filename
        ]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
        return f"{type(error).__name__} at {place}: {str(error)[:150]!r}"
    text = str(error)
    if len(text) > 1000 or not text.isprintable():
        return f"an error of {len(text)} characters, printable: {text.isprintable()}: {text[:150]!r}"
    return None


def left_over(folder: Path) -> str | None:
    parts = [path.name for path in folder.rglob("*.part")]
    return f"left {parts[0]}" if parts else None


def one(name: str, seed: int, sound: Path) -> tuple[str, str | None]:
    """One input: (`taken` or `refused`, fault or None). The same for the same name and seed."""
    from mutate import mutant
    from readers import READERS

    from spectrum_peft.errors import SpectrumError

    reader = READERS[name]
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    try:
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        for path in folder.rglob("*"):  # files that say where they are
            if path.suffix in (".json", ".yaml") and str(sound) in (text := path.read_text()):
                path.write_text(text.replace(str(sound), str(folder)))
        target = folder / reader.file
        rng = random.Random(f"{name} {seed}")
        target.write_bytes(mutant(target.read_bytes(), rng, reader.parse, reader.write, reader.more))
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            reader.read(folder)
            return "taken", left_over(folder)
        except SpectrumError as error:
            return "refused", fault_of(error) or left_over(folder)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return "refused", fault_of(error)
        finally:
            signal.alarm(0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def batch(name: str, seeds: range, progress: Path | None = None, limit: bool = True) -> dict[str, Any]:
    """Inputs of one reader in this process: how many were taken and refused, and {fault: first seed}."""
    from readers import READERS

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sound = Path(tempfile.mkdtemp(prefix="sound_"))
    found: dict[str, Any] = {"taken": 0, "refused": 0, "faults": {}}
    try:
        READERS[name].make(sound)
        READERS[name].read(_copied(sound))  # a sound file is taken, and what it imports is not counted as memory
        if limit:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
        for seed in seeds:
            if progress is not None:
                progress.write_text(str(seed))
            end, fault = one(name, seed, sound)
            found[end] += 1
            if fault is not None:
                found["faults"].setdefault(fault, seed)
    finally:
        shutil.rmtree(sound, ignore_errors=True)
    return found


def _copied(sound: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz_sound_"))
    shutil.copytree(sound, folder, dirs_exist_ok=True)
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".yaml") and str(sound) in (text := path.read_text()):
            path.write_text(text.replace(str(sound), str(folder)))
    return folder


def in_a_process(name: str, first: int, count: int, seconds: float) -> dict[str, Any]:
    """A batch in a process of its own, forked after the imports; if that ends by a signal, the input that did it is a fault."""
    with tempfile.TemporaryDirectory() as scratch:
        at, out = Path(scratch, "at"), Path(scratch, "out")
        process = os.fork()
        if process == 0:
            try:
                tempfile.tempdir = scratch
                os.environ["SPECTRUM_PEFT_CACHE"] = f"{scratch}/cache"
                out.write_text(json.dumps(batch(name, range(first, first + count), at)))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0 if out.is_file() else 1)
        until = time.perf_counter() + seconds
        while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
            if time.perf_counter() > until:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        if out.is_file():
            return json.loads(out.read_text())  # type: ignore[no-any-return]
        seed = int(at.read_text()) if at.is_file() else first
        how = f"the process ended with {os.waitstatus_to_exitcode(ended[1])} (-9: more than {seconds:.0f} s)"
        return {"taken": 0, "refused": seed - first, "faults": {how: seed}}


def campaign(minutes: float, seed: int, only: str | None = None) -> dict[str, Any]:
    """Inputs for every reader, the time shared out by their weights; plain data for docs/reliability.md."""
    from readers import READERS

    from spectrum_peft.machine import machine

    names = [name for name in READERS if only is None or only in name]
    rows = {}
    began = time.perf_counter()
    for i, name in enumerate(names):
        left = minutes * 60 - (time.perf_counter() - began)
        share = max(left * READERS[name].weight / sum(READERS[n].weight for n in names[i:]), 1.0)
        count = max(10, int(share / (READERS[name].cost + 0.004)))
        rows[name] = in_a_process(name, seed * 1_000_000, count, 5 * share + 120)
        total = rows[name]["taken"] + rows[name]["refused"]
        print(
            f"{name:<28}{total:>8,} inputs, {rows[name]['taken']:>7,} taken, {len(rows[name]['faults'])} faults",
            flush=True,
        )
        for fault, at in rows[name]["faults"].items():
            print(f"    {fault} (seed {at})", flush=True)
    return {
        "record": "fuzz",
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "readers": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=3.0)
    add("--seed", type=int, default=0)
    add("--reader", help="only readers with this in their names")
    add("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    found = campaign(options.minutes, options.seed, options.reader)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row["faults"] for row in found["readers"].values()))


if __name__ == "__main__":
    sys.exit(main())
