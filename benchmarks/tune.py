"""Does `tune` end where an exhaustive grid ends, at what share of its steps? And are its estimates right?

    python benchmarks/tune.py --list                      # what is run, and about how long it takes
    python benchmarks/tune.py --parts banking77           # MiniLM, 4 contestants: about 20 minutes on one core
    python benchmarks/tune.py --parts gsm8k               # SmolLM2-135M, 3 contestants: about an hour and a half
    python benchmarks/tune.py --parts dolly               # likewise; --steps 18 takes an hour
    python benchmarks/tables.py                           # the tables of docs/tune.md

The grid is every contestant at every rate that `tune` begins with, the whole length, with the three seeds of the finals. A tune
races with another seed each time (`race_seed`), on the same rows. Its finals are cells of the grid where the rate is one of the
grid's, and are taken from there: the same run would be made again, bit for bit. They count as steps and as seconds of the tune
all the same, as do the steps that are timed beforehand.

Both choose by the mean over the seeds on the search rows, and are held against each other on the evaluation rows, row by row:
the difference of the means over the seeds, with its 95 % interval by Student's t. The default rate of each mode is one of the
grid's. Estimates: the dry run's memory beside the rise of a run's resident memory, the time of a step as it was expected before
the first run beside its median in the grid, and the hours of the whole tune.

Cells are kept in the work folder, and the same command goes on; the result is written after each. Several parts may run at a
time, each in a process of its own, with the same work folder. One thread; a load beside it spoils the figures of time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
from models import folder_of
from quality import some_rows

RESULT = common.RESULTS / "tune.json"
SEEDS = (0, 1, 2)  # of the finals and of the grid
RACE_SEEDS = (1000, 1001, 1002)
CONFIDENCE = 0.95
# As in benchmarks/memory.py: what is resident is then what is alive.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
_LANGUAGE = {"task": "causal_lm", "max_length": 128}


@dataclass(frozen=True)
class Part:
    """A model on a dataset.

    Attributes:
        settings: keys of `train` for all runs.
        steps: of a whole run. batch: rows of a step. rows: that are read of the training data; some of them judge.
        judged: search rows, and as many evaluation rows.
        seconds: of a step and of a run beside its steps, on one core, about.
    """

    model: str
    settings: Mapping[str, Any]
    contestants: Sequence[str]
    steps: int
    batch: int
    rows: int
    judged: int
    seconds: tuple[float, float]
    rates: Sequence[float] | None = None  # of every contestant; None: those that a tune begins with


PARTS = {
    "banking77": Part(
        "minilm", {"task": "classification", "max_length": 32, "metric": "loss"},
        ("lora r16", "real 0.25 random", "real 0.25 spaced", "columns r16"), 54, 8, 2000, 160, (0.06, 6.0),
    ),
    "gsm8k": Part("smollm2", _LANGUAGE, ("lora r16", "real 0.25 random", "columns r16"), 27, 2, 400, 24, (2.0, 20.0)),
    "dolly": Part("smollm2", _LANGUAGE, ("lora r16", "real 0.25 random", "columns r16"), 27, 2, 400, 24, (2.0, 20.0)),
}  # fmt: skip


# --- cells -----------------------------------------------------------------------------------------------------------


def _cell_process(folder: str, log: str) -> None:
    """A cell in a process that was forked with the libraries loaded: on a slow core loading them takes longer than its steps."""
    import gc

    from spectrum_peft.cli.main import main
    from spectrum_peft.compare.cell import STARTED_BY

    gc.freeze()
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ[STARTED_BY] = str(os.getppid())
    sys.exit(main(["compare", "--cell", folder]))


def _launch(context: Any) -> Callable[[Path, Path, Callable[[], Any]], int]:
    def launch(folder: Path, log: Path, refresh: Callable[[], Any]) -> int:
        process = context.Process(target=_cell_process, args=(str(folder), str(log)))
        process.start()
        try:
            process.join()
        except BaseException:
            process.terminate()
            raise
        return int(process.exitcode or 0)

    return launch


class Cells:
    """The whole runs of a part, each once: the grid makes them, and the finals of the tunes find them."""

    def __init__(self, folder: Path, run: Callable[..., Any], wrote: Callable[[], None]) -> None:
        self.folder, self.run, self.wrote = folder, run, wrote
        folder.mkdir(parents=True, exist_ok=True)

    def found(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def __call__(self, comparison: Any, cell: Any, scans: Any) -> Any:
        """`run_cell`, for whole runs only where there is none yet."""
        from spectrum_peft.compare.cell import named
        from spectrum_peft.compare.outcome import Outcome
        from spectrum_peft.records import RESULTS_FILE

        if cell.until is not None:
            return self.run(comparison, cell, scans)
        rate = cell.train["learning_rate"]
        path = self.folder / f"{cell.folder.rpartition('-')[0]}-{rate:g}-{cell.train['max_steps']}.json"
        if not path.is_file():
            began = time.monotonic()
            outcome = self.run(comparison, cell, scans)
            seconds, home = time.monotonic() - began, comparison.output / "cells" / cell.folder
            trained = json.loads((home / named(RESULTS_FILE, None)).read_text()) if outcome.results else {}
            before = trained.get("peak_memory_before_loading_bytes")
            row = {
                "contestant": cell.label, "rate": rate, "seed": cell.seed, "steps": cell.train["max_steps"], "seconds": seconds,
                "error": outcome.error, "results": outcome.results,
                "rise_bytes": None if before is None else trained["peak_memory_bytes"] - before,
            }  # fmt: skip
            common.write_text(path, json.dumps(row) + "\n")
            shutil.rmtree(home, ignore_errors=True)  # the trained model
            self.wrote()
        row = json.loads(path.read_text())
        return Outcome(cell, row["results"], row["error"], path)


@contextmanager
def _shared(cells: Cells, launch: Callable[..., int]) -> Iterator[None]:
    """Runs of tunes go through `cells`, and their processes are forked."""
    from spectrum_peft.compare import runs
    from spectrum_peft.tuning import cells as tuned

    kept = tuned.run_cell, runs.launch
    tuned.run_cell, runs.launch = cells, launch  # type: ignore[assignment]
    try:
        yield
    finally:
        tuned.run_cell, runs.launch = kept


# --- a part ----------------------------------------------------------------------------------------------------------


def tune_of(part: Part, name: str, data: Path, work: Path, output: str, race_seed: int) -> Any:
    """A tune of this part, its folder taken."""
    from spectrum_peft.cli.tune import opened

    train = some_rows(data / name / "train.jsonl", work / "train.jsonl", part.rows, None)
    judged = some_rows(data / name / "validation.jsonl", work / "evaluation.jsonl", part.judged, None)
    settings = dict(part.settings)
    given = {
        "batch_size": part.batch, "contestants": list(part.contestants), "finalists": 1, "seeds": list(SEEDS),
        "race_seed": race_seed, "search_rows": part.judged, "metric": settings.pop("metric", "loss"),
        "learning_rates": part.rates,
    }  # fmt: skip
    shared = {
        **settings, "model": str(folder_of(part.model)), "dataset": str(train), "eval_dataset": str(judged), "dtype": "float32",
        "max_steps": part.steps, "lr_scheduler_type": "linear", "warmup_steps": part.steps // 10, "per_device_eval_batch_size": 8,
    }  # fmt: skip
    return opened(given, shared, str(work / output), "benchmark")


def run(name: str, part: Part, data: Path, work: Path, result: Path, races: int) -> None:
    """The grid, then the tunes; what is there is not run again."""
    from spectrum_peft.compare.runs import run_cell
    from spectrum_peft.tuning.queue import Task

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(common.ROOT / "benchmarks"), str(common.ROOT)])
    tunes: dict[int, Any] = {}
    grid: list[Any] = []

    def wrote() -> None:
        if grid:
            save(name, part, result, report(part, grid, cells.found(), tunes))

    cells = Cells(work / "whole", run_cell, wrote)
    with _shared(cells, _launch(context)):
        for number, race_seed in enumerate(RACE_SEEDS[:races]):
            one = tune_of(part, name, data, work, f"tune-{race_seed}", race_seed)
            one.prepare()
            if not number:
                prices = one.prepared.prices
                tasks = [
                    Task(p.contestant.label, rate, part.steps, seed)
                    for p in prices for rate in one.rates(p) for seed in SEEDS
                ]  # fmt: skip
                grid += tasks
                usual = default_rates(prices, part)
                beside = [Task(label, rate, part.steps, seed) for label, rate in usual.items() for seed in SEEDS]
                beside = [task for task in beside if task not in tasks]
                compared = one.compared([])
                priced = {p.contestant.label: p for p in prices}
                for i, task in enumerate([*tasks, *beside], 1):
                    done = cells(compared, one.cells.make(priced[task.contestant], task, part.steps, final=True), {})
                    value = done.error if done.results is None else f"{done.results['scores']['search']['value']:.4f}"
                    print(f"{name} grid {i}/{len(tasks) + len(beside)}: {task.key}: {value}", flush=True)
            one.work()
            tunes[race_seed] = one
            wrote()


def default_rates(prices: Iterable[Any], part: Part) -> dict[str, float]:
    """{contestant: the default rate of its mode, at its rank and ratio}."""
    from spectrum_peft.tuning.contestants import default_rate

    return {p.contestant.label: default_rate(p.contestant, str(part.settings["task"]), part.steps) for p in prices}


def report(
    part: Part, grid: Sequence[Any], cells: Sequence[Mapping[str, Any]], tunes: Mapping[int, Any]
) -> dict[str, Any]:
    """What is known so far."""
    runs = {(c["contestant"], c["rate"], c["seed"]): c for c in cells}
    wanted = {(task.contestant, task.rate): None for task in grid}
    rows = [one for key in wanted if (one := summary(*key, runs)) is not None]
    found: dict[str, Any] = {
        "steps": part.steps, "batch": part.batch, "judged": part.judged, "cells": len(runs), "of": len(grid), "grid": rows,
        "grid_steps": part.steps * len(grid),
    }  # fmt: skip
    found |= {"model": part.model, "settings": dict(part.settings), "seeds": list(SEEDS), "tunes": []}
    if len(rows) < len(wanted) or not tunes:
        return found
    able = [row for row in rows if row["search"] is not None]
    best = min(able, key=lambda row: row["search"])
    on_evaluation = min(able, key=lambda row: row["evaluation"])
    prices = {p.contestant.label: p for p in next(iter(tunes.values())).prepared.prices}
    usual = [summary(label, rate, runs) for label, rate in default_rates(prices.values(), part).items()]
    at_default = min((row for row in usual if row and row["search"] is not None), key=lambda row: row["search"])
    found |= {"best": _name(best), "best_on_evaluation": _name(on_evaluation), "best_default": _name(at_default)}
    found["memory"] = memory(prices, rows, runs)
    for race_seed, one in tunes.items():
        found["tunes"].append(of_tune(race_seed, one, runs, best, on_evaluation, at_default, found["grid_steps"]))
    return found


def summary(contestant: str, rate: float, runs: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any] | None:
    """A contestant at a rate: means over the seeds; None where a run is missing, without figures where one failed."""
    mine = [runs.get((contestant, rate, seed)) for seed in SEEDS]
    if any(one is None for one in mine):
        return None
    done = [one["results"] for one in mine if one is not None and one["results"] is not None]
    row: dict[str, Any] = {"contestant": contestant, "rate": rate, "search": None, "evaluation": None, "failed": 0}
    if len(done) < len(mine):
        return row | {"failed": len(mine) - len(done)}
    for name in ("search", "evaluation"):
        row[name] = statistics.fmean(one["scores"][name]["value"] for one in done)
    return row | {
        "of_seeds": [one["scores"]["evaluation"]["value"] for one in done],
        "step": statistics.median(s for one in done for s in one["step_seconds"]),
        "rise_bytes": [one["rise_bytes"] for one in mine if one is not None],
    }


def _name(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("contestant", "rate", "search", "evaluation")}


def difference(
    mine: Mapping[str, Any], other: Mapping[str, Any], runs: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    """By how much one is worse on the evaluation rows, and its interval over them; positive: worse."""
    from spectrum_peft.compare.statistics import interval

    def rows(one: Mapping[str, Any]) -> list[float]:
        of_seeds = [
            runs[one["contestant"], one["rate"], seed]["results"]["scores"]["evaluation"]["rows"] for seed in SEEDS
        ]
        return [statistics.fmean(values) for values in zip(*of_seeds, strict=True)]

    return interval([a - b for a, b in zip(rows(mine), rows(other), strict=True)], CONFIDENCE)


def of_tune(
    race_seed: int, one: Any, runs: Mapping[Any, Mapping[str, Any]], best: Mapping[str, Any],
    on_evaluation: Mapping[str, Any], at_default: Mapping[str, Any], grid_steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Where a tune ended, and what it spent."""
    from spectrum_peft.tuning.report import search_means

    outcomes = one.final_outcomes()
    winner = next(iter(search_means(outcomes, one.higher)))
    rate = next(o.cell.train["learning_rate"] for o in outcomes if o.cell.label == winner)
    mine = summary(winner, rate, runs)
    assert mine is not None
    # A run that fails has taken some of its steps; all of them are counted.
    raced = sum(row["steps"] for row in one.stage_spending() if row["stage"] != "finals")
    failed = sum(d.task.until for d in one.raced() if d.results is None)
    finals = [runs[o.cell.label, o.cell.train["learning_rate"], o.cell.seed] for o in outcomes]
    steps = raced + failed + sum(row["steps"] for row in finals)
    plan, clock = one.prepared.outline, one.prepared.clock
    seconds = sum(d.seconds for d in one.raced()) + sum(row["seconds"] for row in finals)
    told = {
        name: difference(mine, other, runs)
        for name, other in (
            ("to_best", best),
            ("to_best_on_evaluation", on_evaluation),
            ("to_best_default", at_default),
        )
    }
    return {
        "race_seed": race_seed, **_name(mine), "steps": steps, "share": steps / grid_steps, **told,
        "within_noise": told["to_best"]["low"] <= 0, "not_worse_than_default": told["to_best_default"]["low"] <= 0,
        "expected_seconds": plan.seconds(clock), "seconds": seconds, "expected_step": dict(clock.step),
        "steps_met": {
            label: statistics.median(s for r in runs.values() if r["contestant"] == label and r["results"]
                                     for s in r["results"]["step_seconds"])
            for label in clock.step
        },
    }  # fmt: skip


def memory(
    prices: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], runs: Mapping[Any, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The dry run beside the largest rise of resident memory over a contestant's runs."""
    found = []
    for label, price in prices.items():
        seen = [r for row in rows if row["contestant"] == label for r in row.get("rise_bytes", ()) if r is not None]
        if seen and price.peak_bytes is not None:
            found.append({"contestant": label, "predicted": price.peak_bytes, "measured": statistics.median(seen)})
    return found


def save(name: str, part: Part, path: Path, found: Mapping[str, Any]) -> None:
    """Put a part into the file; parts in other processes do the same."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        parts = json.loads(path.read_text())["parts"] if path.is_file() else {}
        parts[name] = {**found, "machine": common.machine(), "commit": common.commit()}
        common.save(path, "tune", {"parts": {key: parts[key] for key in PARTS if key in parts}})


def about(part: Part) -> tuple[int, int, float]:
    """(runs of the grid, steps of the grid, hours of the grid and of the three tunes)."""
    from spectrum_peft.tuning.schedule import Clock, Outline

    rates = len(part.rates or (1, 2, 3, 4))
    plan = Outline(part.steps, len(part.contestants), rates, max(0, min(1, len(part.contestants) - 2)), len(SEEDS))
    grid = len(part.contestants) * rates * len(SEEDS)
    step, beside = part.seconds
    race = plan.race_seconds(Clock({"": step}, beside))
    return grid, grid * part.steps, (grid * (beside + part.steps * step) + len(RACE_SEEDS) * race) / 3600


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add(
        "--contestants",
        nargs="+",
        metavar="NAME",
        help="names of docs/tune.md; lora r16 and real 0.25 random always take part",
    )
    add("--learning-rates", dest="rates", nargs="+", type=float, help="of every contestant; default: those of a tune")
    add(
        "--races",
        type=int,
        choices=range(1, len(RACE_SEEDS) + 1),
        default=len(RACE_SEEDS),
        help="tunes, with other seeds",
    )
    add("--steps", type=int, help="of a whole run")
    add("--judged", type=int, help="search rows, and as many evaluation rows")
    add("--model", help="another model's folder, for a rehearsal")
    add("--list", action="store_true", help="say what is run, and about how long it takes; run nothing")
    add("--data", type=Path, default=common.ROOT.parent / "shared" / "data", help="folder of the datasets")
    add("--work", type=Path, default=common.ROOT / "tune_runs", help="folder of the cells")
    add("-o", "--output", type=Path, default=RESULT, help="file of the result")
    options = parser.parse_args(argv)
    changes = {
        name: value
        for name in ("contestants", "rates", "steps", "judged", "model")
        if (value := getattr(options, name))
    }
    for name in options.parts:
        part = replace(PARTS[name], **changes)
        runs, steps, hours = about(part)
        print(
            f"{name}: a grid of {runs} runs, {steps:,} steps, and three tunes: about {hours:.1f} h on one core",
            flush=True,
        )
        if options.list:
            continue
        if not (options.data / name / "train.jsonl").is_file():
            parser.error(f"{options.data / name}: no train.jsonl there; --data names the folder of the datasets")
        os.environ |= ENVIRONMENT
        work = options.work / f"{name}-{part.steps}"
        work.mkdir(parents=True, exist_ok=True)
        run(name, part, options.data.resolve(), work.resolve(), options.output, options.races)


if __name__ == "__main__":
    main()
