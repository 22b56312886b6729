"""Is the learning rate that `--learning-rate auto` finds as good as a grid's best? Whole runs at both, on held-out rows.

    python benchmarks/race.py            # classification with MiniLM, about half an hour
    python benchmarks/race.py --chat     # and SmolLM2 on gsm8k, hours

Each contestant is trained once with `auto` and once at every rate of a grid of factors of sqrt(10) around it, from the same
base on the same rows; the last grid rate on either side is worse than the best, or the grid goes on. What is reported is the
loss on held-out rows: at the default rate, at the raced one, at the grid's best. One thread; times mean nothing. Finished runs
are kept in the work folder and finished contestants in the result, and the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from models import folder_of

RESULT = common.RESULTS / "race.json"
DATA = common.ROOT.parent / "shared" / "data"
SUITES: dict[str, dict[str, Any]] = {
    "banking77": {
        "model": "minilm", "task": "classification", "max-length": 48, "per-device-train-batch-size": 8, "max-steps": 400,
        "eval-rows": 500,
    },
    "gsm8k": {
        "model": "smollm2", "task": "causal_lm", "max-length": 144, "per-device-train-batch-size": 2, "max-steps": 200,
        "eval-rows": 48,
    },
}  # fmt: skip
CONTESTANTS = {
    "full": ["--mode", "full"],
    "spectrum": ["--mode", "spectrum", "--ratio", "0.25"],
    "lora": ["--mode", "lora"],
}
FACTOR = 10**0.5


def run(suite: str, flags: Sequence[str], rate: str, seed: int, work: Path) -> dict[str, Any]:
    """One whole run by the verb `train`; its results."""
    from spectrum_peft.cli.main import main

    settings = dict(SUITES[suite])
    held_out = work / f"{suite}.jsonl"
    if not held_out.is_file():
        lines = (DATA / suite / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        held_out.write_text("\n".join(lines[: settings["eval-rows"]]) + "\n", encoding="utf-8")
    del settings["eval-rows"]
    output = work / f"{suite}-{'-'.join(flags)}-{rate}-{seed}"
    finished = output / "train_results.json"  # the last file that is written
    if finished.is_file():
        return dict(json.loads(finished.read_text(encoding="utf-8")))
    argv = ["train", "--model", str(folder_of(settings.pop("model"))), "--dataset", str(DATA / suite / "train.jsonl")]
    argv += ["--eval-dataset", str(held_out), "--output-dir", str(output), "--learning-rate", rate, "--seed", str(seed)]
    argv += ["--report-to", "none", "--save-strategy", "no", "--dtype", "float32", *flags]
    argv += ["--overwrite-output-dir"]  # of a run that was ended
    for name, value in settings.items():
        argv += [f"--{name}", str(value)]
    if suite == "gsm8k":
        argv += ["--prompt-column", "question", "--completion-column", "answer"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(argv)
    if code:
        raise RuntimeError(said.getvalue())
    found: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
    (output / "model.safetensors").unlink(missing_ok=True)
    return found


def contest(suite: str, name: str, seed: int, work: Path) -> dict[str, Any]:
    """The raced run and a grid around its rate."""
    flags = CONTESTANTS[name]
    raced = run(suite, flags, "auto", seed, work)
    tried = {raced["learning_rate"]: raced["after"]["loss"]}

    def loss(place: int) -> float:
        rate = float(f"{raced['learning_rate'] * FACTOR**place:.3g}") if place else raced["learning_rate"]
        if rate not in tried:
            tried[rate] = run(suite, flags, repr(rate), seed, work)["after"]["loss"]
        return tried[rate]

    low, high = -1, 1
    while loss(low) == min(loss(place) for place in range(low, high + 1)):
        low -= 1
    while loss(high) == min(loss(place) for place in range(low, high + 1)):
        high += 1
    default = raced["learning_rate_race"][0]["rate"]
    at_default = tried.get(default) or run(suite, flags, repr(default), seed, work)["after"]["loss"]
    best = min(tried, key=lambda rate: tried[rate])
    race_steps = sum(heat["steps"] for heat in raced["learning_rate_race"])
    return {
        "suite": suite, "contestant": name, "seed": seed, "steps": raced["steps"], "race_steps": race_steps,
        "race": raced["learning_rate_race"], "before": raced["before"]["loss"], "default_rate": default,
        "default_loss": at_default, "raced_rate": raced["learning_rate"], "raced_loss": raced["after"]["loss"],
        "best_rate": best, "best_loss": tried[best], "grid": [[rate, tried[rate]] for rate in sorted(tried)],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", action="store_true", help="SmolLM2 on gsm8k, too")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--work", type=Path, default=common.ROOT / "race_runs", help="folder of the runs")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["runs"] if RESULT.is_file() else []
    done = {(row["suite"], row["contestant"], row["seed"]) for row in rows}
    options.work.mkdir(parents=True, exist_ok=True)
    for suite in ("banking77", "gsm8k") if options.chat else ("banking77",):
        for seed in range(options.seeds):
            for name in CONTESTANTS:
                if (suite, name, seed) not in done:
                    rows.append(contest(suite, name, seed, options.work))
                    row = rows[-1]
                    figures = [
                        f"{k} {row[f'{k}_rate']:.3g} {row[f'{k}_loss']:.4f}" for k in ("default", "raced", "best")
                    ]
                    print(f"{suite} {name} seed {seed}: {', '.join(figures)}", flush=True)
                    common.save(RESULT, "race", {"commit": common.commit(), "suites": SUITES, "runs": rows})


if __name__ == "__main__":
    main()
