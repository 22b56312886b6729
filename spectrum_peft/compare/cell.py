"""One cell, in its own process: the verb `train`, then what is measured on what it saved.

torch and the libraries of training are imported inside functions: this module is also imported by the process that
only starts cells.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import Rest
from ..errors import CheckpointError
from ..machine import OtherLoad
from ..records import PLAN_FILE, RESULTS_FILE, checked, is_stream, read_mapping, write_text
from ..records.schema import Count, Finite, Name, NotNegative

RESULTS = "cell_results.json"
MODEL = "model"
# Set for a cell that a comparison has started: the process that it must not outlive, however that ends.
STARTED_BY = "SPECTRUM_PEFT_COMPARISON"
# Figures of training that a cell's results repeat.
_OF_TRAINING = (
    "mode", "task", "dtype", "quantization", "new_head", "learning_rate", "trainable_parameters", "total_parameters", "steps",
    "step_seconds", "input_tokens", "peak_memory_bytes", "saved_bytes", "before",
)  # fmt: skip


_Figure = Finite | Name | None  # an infinite one is a word


@dataclass(frozen=True)
class Judged:
    """What is read of `cell_results.json` where nothing was trained."""

    metrics: dict[Name, _Figure]
    versions: dict[Name, Name]
    general: dict[Name, _Figure] | None = None


@dataclass(frozen=True, kw_only=True)
class Finished(Judged):
    """What is read of it where something was."""

    new_head: bool | None
    learning_rate: _Figure
    trainable_parameters: Count
    total_parameters: Count
    steps: Count
    step_seconds: list[NotNegative]
    input_tokens: Count | None
    peak_memory_bytes: NotNegative | None
    saved_bytes: Count | None
    before: dict[Name, _Figure] | None
    setup_seconds: dict[Name, NotNegative]
    loss_curve: list[tuple[_Figure, _Figure]]
    other_cores: NotNegative | None = None


def named(file: str, until: int | None) -> str:
    """The name of a cell's file that belongs to the step where the cell stopped; the plain one where it ran to its end."""
    stem, dot, ending = file.partition(".")
    return file if until is None else f"{stem}-{until}{dot}{ending}"


@dataclass(frozen=True)
class Asked:
    """What is measured after training, as `matrix.measures_of` says it."""

    forgetting: dict[str, str] | None = None
    generation: dict[str, Any] | None = None
    speed: dict[str, int] | None = None
    scores: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class CellFile:
    """The fields of cell.json that a cell's own process reads."""

    label: str
    seed: int | None
    trained: bool
    control: str | None
    arguments: list[str]
    measure: Asked
    scan_seconds: float | None
    keep_model: bool
    versions: dict[str, str]
    until: int | None = None


@dataclass(frozen=True)
class TrainFile:
    """The fields of train.yaml that a cell's own process reads; all are keys of `train`, which checks them."""

    model: str
    output_dir: str


def end_with_the_comparison() -> None:
    """End this process when the one that started it is gone; a comparison that is started again would find it at work."""
    parent = os.environ.get(STARTED_BY)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_cell(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(cell.json, train.yaml) of a cell's folder, as `runs.prepare` writes them.

    Raises:
        CheckpointError: one of them is missing, damaged or no file; train.yaml has the model written elsewhere than in the
            cell's folder, from where it would be deleted.
    """
    for file in (folder / "cell.json", folder / "train.yaml"):
        if is_stream(file):
            raise CheckpointError(f"{file}: is a device or a pipe, wanted a file.")
    cell, settings = read_mapping(folder / "cell.json"), read_mapping(folder / "train.yaml")
    checked(cell, CellFile, folder / "cell.json")
    output = checked(settings, TrainFile, folder / "train.yaml").output_dir
    if Path(os.path.realpath(output)) != folder.resolve() / MODEL:
        raise CheckpointError(
            f"{folder / 'train.yaml'}: output_dir is {output!r}, wanted {str(folder.resolve() / MODEL)!r}."
        )
    return cell, settings


def measure(
    folder: Path,
    *,
    train: Callable[[], Mapping[str, Any]],
    options_for: Callable[[str], tuple[argparse.Namespace, Rest, Sequence[str]]],
) -> dict[str, Any]:
    """Train where it is not done yet, measure what `cell.json` asks for, write `cell_results.json`.

    A cell that is asked for a part of its steps stops there with a checkpoint, and its files have that step in their names.

    Args:
        folder: of the cell, as `runs.prepare` makes it.
        train: does the run of `train.yaml`; returns what `train_results.json` holds.
        options_for: model -> flags of the verb `evaluate`, what goes to the trainer's arguments, and the verb's flags.
    Returns:
        What was written: `metrics` {name: value} after training, `before` and `general` {before, after}, figures of
        training, seconds, bytes, tokens per second, `other_cores`: how many cores other processes kept busy meanwhile.
    """
    end_with_the_comparison()
    cell, settings = read_cell(folder)
    model, until = folder.resolve() / MODEL, cell.get("until")
    results: dict[str, Any] = {name: cell[name] for name in ("label", "seed", "control", "versions")}
    results["metrics"] = {}
    source = settings["model"]
    if cell["trained"]:
        whole = folder / named(RESULTS_FILE, until)
        if not whole.is_file():
            load, before = OtherLoad(), os.times()
            train()
            after = os.times()
            own = sum(after[:4]) - sum(before[:4])  # of this process and of its children, in user and system mode
            results["other_cores"] = load.cores(own)
            # `train` writes it into the model's folder when that is whole; here it says that the model is.
            write_text(whole, (model / RESULTS_FILE).read_text(encoding="utf-8"))
            if (model / PLAN_FILE).is_file():  # the report draws what it chose
                write_text(folder / PLAN_FILE, (model / PLAN_FILE).read_text(encoding="utf-8"))
        trained = read_mapping(whole)
        source = str(model)
        results |= {name: trained[name] for name in _OF_TRAINING}
        scan = cell["scan_seconds"] if cell["scan_seconds"] is not None else trained["setup_seconds"]["scan"]
        results["setup_seconds"] = {"scan": scan, "model": trained["setup_seconds"]["model"]}
        results["loss_curve"] = [[row["step"], row["loss"]] for row in trained["log_history"] if "loss" in row]
        results["metrics"] |= trained["after"] or {}
    wanted = cell["measure"]
    if wanted:
        results |= _measured(source, wanted, options_for, results["metrics"])
    if cell["trained"] and not cell["keep_model"] and until is None:
        # Before the cell counts as finished: nothing looks after it then.
        shutil.rmtree(model, ignore_errors=True)
    write_text(folder / named(RESULTS, until), json.dumps(results, indent=1) + "\n")
    if until is not None:  # it may go on from its checkpoint
        for path in model.iterdir():
            if path.is_file():
                path.unlink()
    return results


def _measured(
    source: str,
    wanted: Mapping[str, Any],
    options_for: Callable[[str], tuple[argparse.Namespace, Rest, Sequence[str]]],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """What is asked of the saved model; metrics of completed prompts go into `metrics`."""
    from ..data import read_dataset, select_columns
    from ..train import generation
    from ..train.arguments import quiet_progress
    from ..train.saved import open_saved

    gc.collect()  # the model that was trained
    quiet_progress()
    saved = open_saved(*options_for(source))
    found: dict[str, Any] = {}
    if ask := wanted.get("forgetting"):
        rows = read_dataset(ask["dataset"], ask["split"])
        rows = select_columns(rows, saved.task.name, ask["dataset"], {})
        found["general"] = saved.metrics(rows)
    if ask := wanted.get("scores"):
        from .scores import score_rows

        found["scores"], found["judge_seconds"] = {}, {}
        for one in ask:  # each a set of rows; of one that the report shows, every metric
            rows = saved.rows(one["dataset"])
            began = time.perf_counter()
            scored = score_rows(saved, rows, one["metric"], one["max_new_tokens"], one["dataset"])
            found["judge_seconds"][one["name"]] = time.perf_counter() - began
            found["scores"][one["name"]] = scored
            if one["shown"]:
                metrics |= saved.metrics(rows) | {one["metric"]: scored["value"]}
    judged = saved.options.eval_dataset or saved.options.dataset
    if ask := wanted.get("generation"):
        if not saved.options.eval_dataset and not saved.options.eval_split:
            raise CheckpointError("generate: there is no eval_dataset or eval_split whose prompts could be completed.")
        rows = saved.rows(judged, saved.options.eval_split)
        rows = rows.select(range(min(ask["rows"], len(rows))))
        metrics |= generation.judge(
            saved.model, saved.tokenizer, rows, ask["metrics"], max_new_tokens=ask["max_new_tokens"], source=judged,
            template=saved.options.apply_chat_template is not False,
        )  # fmt: skip
    if ask := wanted.get("speed"):
        prompt = "The"
        found["tokens_per_second"] = generation.speed(saved.model, saved.tokenizer, prompt, tokens=ask["tokens"])
        found["merged_tokens_per_second"] = None
        if hasattr(saved.model, "merge_and_unload") and (Path(source) / "adapter_config.json").is_file():
            plain = saved.model.merge_and_unload()
            found["merged_tokens_per_second"] = generation.speed(plain, saved.tokenizer, prompt, tokens=ask["tokens"])
    return found
