"""Commands ended by SIGKILL at random moments, run again, and compared with a run that nothing disturbed.

    python tests/fuzz/kills.py --kills 48 --seed 0 --out FILE

Each command is killed as often as its share says, then run to its end in the same place. What must hold: what a killed run left
under the name of a result is whole or not there; the run after it ends well, writes the same bytes, and leaves no `.part`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]


@dataclass(frozen=True)
class Command:
    """Attributes:
    line: (inputs, folder of the outputs) -> words of the command.
    results: files and folders that it writes, below that folder.
    share: of the kills.
    """

    name: str
    line: Callable[[Path, Path], list[str]]
    results: tuple[str, ...]
    share: int


_RUN = (
    "--max-steps 6 --save-steps 2 --save-strategy steps --dtype float32 --max-length 32 --per-device-train-batch-size 2 "
    "--report-to none"
)


def _train(mode: str, share: int, more: str = "") -> Command:
    def line(inputs: Path, out: Path) -> list[str]:
        places = ["--model", inputs / "base", "--dataset", inputs / "rows.jsonl", "--report", inputs / "report.json"]
        from spectrum_peft.train.checkpoints import problem_of

        words = ["train", "--mode", mode, "--output-dir", out / "run", *places, *_RUN.split(), *more.split()]
        saved = list(out.glob("run/checkpoint-*"))
        if any(problem_of(checkpoint) is None for checkpoint in saved):
            words += ["--resume-from-checkpoint", "true"]
        elif saved or list(out.glob("run/*")):  # killed in its first save, or in its last
            words += ["--overwrite-output-dir"]
        return [*map(str, words)]

    return Command(f"train, {mode}", line, ("run/*.safetensors",), share)


def _plain(name: str, share: int, result: str, *words: str) -> Command:
    """A command without training; `I/` and `O/` in its words are the folders of inputs and outputs."""

    def line(inputs: Path, out: Path) -> list[str]:
        return [name, *(w.replace("I/", f"{inputs}/").replace("O/", f"{out}/") for w in words)]

    return Command(name, line, (result,), share)


COMMANDS = (
    _plain("scan", 5, "report.json", "I/base", "-o", "O/report.json", "--jobs", "1"),
    _plain("probe", 3, "gradients.json", "I/base", "--dataset", "I/rows.jsonl", "-o", "O/gradients.json"),
    _plain("plan", 3, "plan.yaml", "I/report.json", "-o", "O/plan.yaml"),
    _plain("merge", 5, "merged", "I/adapter", "--base", "I/base", "-o", "O/merged"),
    _plain("export", 4, "lora", "I/adapter", "--format", "lora", "-o", "O/lora"),
    _train("full", 4),
    _train("spectrum", 4, "--ratio 0.5"),
    _train("lora", 3),
    _train("spectra_qlora", 3, "--ratio 0.5 --rescore-every 1"),
    _train("alors", 5, "--ratio 0.5 --rescore-every 2"),
    _train("sgm", 3, "--ratio 1 --similarity-threshold -1 --calibration-samples 4"),
    _train("lorsa", 3, "--n-components 16 --svd-rank 32 --calibration-samples 4"),
    _train("columns", 3, "--n-columns 4"),
)
# Rounds for one kill: a command that ends before its moment is no kill, and the next moment is drawn from the shorter time.
_TRIES = 8


def _inputs(folder: Path) -> None:
    """A tiny base with a tokenizer, rows, a report, and an adapter."""
    import torch
    from conftest import _saved, _tiny_llama
    from peft import LoraConfig, get_peft_model

    from spectrum_peft import scan_weights

    _saved(_tiny_llama(tied=False), folder / "base")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} squared is {n * n}"}) + "\n" for n in range(16))
    )
    scan_weights(str(folder / "base"), jobs=1, device="cpu").save(folder / "report.json")
    torch.manual_seed(0)
    model = get_peft_model(
        _tiny_llama(tied=False), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "adapter")


def _forked(words: list[str], log: Path) -> int:
    """A process that runs a command; forked, because its imports take longer than the command."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from spectrum_peft.cli.main import main

        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _digests(out: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    files = [
        path
        for pattern in patterns
        for found in out.glob(pattern)
        for path in ([found] if found.is_file() else found.rglob("*"))
    ]
    # A model card says when it was written.
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.is_file() and path.name != "README.md"
    }


def _whole(out: Path, command: Command, right: dict[str, str]) -> str | None:
    """What is wrong with results that a killed run has left under their names; training writes its own at its end."""
    found = _digests(out, command.results)
    if command.name.startswith("train") or not found:
        return None
    return None if found == right else f"half a result: {sorted(found)}"


def _round(command: Command, inputs: Path, right: dict[str, str], moment: float) -> tuple[float | None, str | None]:
    """Kill once, look, run to the end.

    Args:
        moment: seconds after the start.
    Returns:
        The seconds after which the command ended by itself, None where it was killed; a fault or None.
    """
    out = Path(tempfile.mkdtemp(prefix="kill_"))
    try:
        began = time.perf_counter()
        process = _forked(command.line(inputs, out), out / "log.txt")
        while (ended := os.waitpid(process, os.WNOHANG))[0] == 0 and time.perf_counter() - began < moment:
            time.sleep(0.002)
        took = time.perf_counter() - began
        if ended[0] == 0:
            os.kill(process, signal.SIGKILL)
            ended = os.waitpid(process, 0)
        killed = os.WIFSIGNALED(ended[1])
        fault = _whole(out, command, right)
        if fault is None and killed:
            process = _forked(command.line(inputs, out), out / "log.txt")
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            last = (out / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            fault = f"the next run ended with {code}: {last}" if code else None
        if fault is None and _digests(out, command.results) != right:
            fault = "other bytes than an undisturbed run"
        left = [path.name for path in out.rglob("*.part")]
        return None if killed else took, fault or (f"left {left[0]}" if left else None)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def campaign(kills: int, seed: int, out: Path | None = None) -> dict[str, Any]:
    import spectrum_peft.export
    import spectrum_peft.train.run  # noqa: F401 - before the first fork
    from spectrum_peft.machine import machine

    os.environ["SPECTRUM_PEFT_CACHE"] = tempfile.mkdtemp(prefix="kill_cache_")
    began = time.perf_counter()
    rng = random.Random(seed)
    inputs = Path(tempfile.mkdtemp(prefix="kill_inputs_"))
    process = os.fork()  # torch must not have had threads before the commands are forked
    if process == 0:
        try:
            _inputs(inputs)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    shares = sum(command.share for command in COMMANDS)
    verbs: dict[str, Any] = {}
    for command in COMMANDS:
        once = Path(tempfile.mkdtemp(prefix="kill_once_"))
        at = time.perf_counter()
        process = _forked(command.line(inputs, once), once / "log.txt")
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        seconds = time.perf_counter() - at
        assert code == 0, f"{command.name}: {(once / 'log.txt').read_text()[-2000:]}"
        right = _digests(once, command.results)
        assert right, command.name
        shutil.rmtree(once)
        row: dict[str, Any] = {"kills": 0, "finished": 0, "faults": 0, "said": []}
        wanted = max(1, round(kills * command.share / shares))
        for _ in range(wanted * _TRIES):
            if row["kills"] == wanted:
                break
            ended, fault = _round(command, inputs, right, rng.uniform(0.02, 0.95) * seconds)
            row["kills" if ended is None else "finished"] += 1
            seconds = min(seconds, ended or seconds)
            if fault is not None:
                row["faults"] += 1
                row["said"].append(fault)
        verbs[command.name] = row
        print(f"{command.name:<18}{row}", flush=True)
    shutil.rmtree(inputs)
    shutil.rmtree(os.environ.pop("SPECTRUM_PEFT_CACHE"), ignore_errors=True)
    found = {
        "record": "kills", "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), "seed": seed,
        "seconds": time.perf_counter() - began, "verbs": verbs,
    }  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = campaign(options.kills, options.seed, options.out)
    return int(any(row["faults"] for row in found["verbs"].values()))


if __name__ == "__main__":
    sys.exit(main())
