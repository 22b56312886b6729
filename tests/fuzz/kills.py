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
    share: int = 1


def _train(mode: str, *more: str) -> Command:
    def line(inputs: Path, out: Path) -> list[str]:
        words = [
            "train",
            "--model",
            inputs / "base",
            "--dataset",
            inputs / "rows.jsonl",
            "--output-dir",
            out / "run",
            "--mode",
            mode,
        ]
        words += [
            "--max-steps",
            6,
            "--save-steps",
            2,
            "--save-strategy",
            "steps",
            "--dtype",
            "float32",
            "--max-length",
            32,
        ]
        words += ["--per-device-train-batch-size", 2, "--report-to", "none", "--report", inputs / "report.json", *more]
        resume = [] if not list(out.glob("run/checkpoint-*")) else ["--resume-from-checkpoint", "true"]
        return [*map(str, words), *resume]

    return Command(f"train, {mode}", line, ("run/*.safetensors",), share=3)


COMMANDS = (
    Command(
        "scan", lambda i, o: ["scan", str(i / "base"), "-o", str(o / "report.json"), "--jobs", "1"], ("report.json",), 2
    ),
    Command("plan", lambda i, o: ["plan", str(i / "report.json"), "-o", str(o / "plan.yaml")], ("plan.yaml",)),
    Command(
        "merge",
        lambda i, o: ["merge", str(i / "adapter"), "--base", str(i / "base"), "-o", str(o / "merged")],
        ("merged",),
        3,
    ),
    Command(
        "export", lambda i, o: ["export", str(i / "adapter"), "--format", "lora", "-o", str(o / "lora")], ("lora",), 2
    ),
    _train("spectrum", "--ratio", "0.5"),
    _train("lora"),
    _train("alors", "--ratio", "0.5", "--rescore-every", "2"),
    _train("full"),
)


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


def _round(
    command: Command, inputs: Path, right: dict[str, str], seconds: float, rng: random.Random
) -> tuple[bool, str | None]:
    """Kill once, look, run to the end: (whether the kill came in time, fault or None)."""
    out = Path(tempfile.mkdtemp(prefix="kill_"))
    try:
        process = _forked(command.line(inputs, out), out / "log.txt")
        time.sleep(rng.uniform(0.02, 0.9) * seconds)
        os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        fault = _whole(out, command, right)
        if fault is None and killed:
            process = _forked(command.line(inputs, out), out / "log.txt")
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            last = (out / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            fault = f"the next run ended with {code}: {last}" if code else None
        if fault is None and _digests(out, command.results) != right:
            fault = "other bytes than an undisturbed run"
        left = [path.name for path in out.rglob("*.part")]
        return killed, fault or (f"left {left[0]}" if left else None)
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
        for _ in range(max(1, round(kills * command.share / shares))):
            killed, fault = _round(command, inputs, right, seconds, rng)
            row["kills" if killed else "finished"] += 1
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
