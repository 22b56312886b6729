"""Cells -> one folder each: started in a process of its own, or found finished.

OUTPUT/scans/CRITERION-IDENTITY.json        the scan that the cells of a criterion share, and how long it took
OUTPUT/cells/LABEL-seedN-DIGEST/cell.json   what the cell is
                                train.yaml  `spectrum-peft train --config train.yaml` does the same run by hand
                                log.txt     what the process printed
                                train_results.json, cell_results.json   its numbers; with the second it is finished
                                model/      while the cell runs, or as long as `keep_models` says
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ..data import from_anywhere, sources_of
from ..errors import CheckpointError, ComparisonError, OptionError
from ..machine import machine, versions
from ..plan import MODES
from ..records import RESULTS_FILE, SnrReport, checked, read_mapping, write_text
from ..scan import CRITERIA
from .cell import MODEL, RESULTS, STARTED_BY, Finished, Judged, named
from .figures import as_markdown
from .matrix import Cell, Contestant, cells_of, contestants_of, file_digest
from .outcome import Outcome
from .report import write_results
from .results import collect
from .settings import Comparison

_POLL = 0.2  # seconds


def inputs_of(comparison: Comparison) -> dict[str, str]:
    """Digests of the weights and the data files behind the names in the settings.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    from ..weights import open_weights

    train = comparison.train
    inputs = {"model": open_weights(train["model"], train.get("revision")).identity()}
    sources = {name: train.get(name) for name in ("dataset", "eval_dataset")}
    for name, source in (sources | {"general_text": comparison.asked["general_text"]}).items():
        digests = [d for part, _ in sources_of(source) if (d := file_digest(part))] if source else []
        if digests:
            inputs[name] = "+".join(digests)
    return inputs


def run_comparison(
    comparison: Comparison, *, check: Callable[[Cell], None], announce: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run what is not finished, collect everything, write the results and the report.

    Args:
        check: raises where `train` would refuse a cell's settings; called for each before any is run.
        announce: gets one line for each thing that happens.
    Returns:
        What `results.json` holds.
    Raises:
        OptionError, DataError, CheckpointError: before anything is run.
        ComparisonError: cells failed, and the results of the others are written; another comparison is at work in the folder.
    """
    contestants, cells = _checked(comparison, check)
    output = comparison.output
    _check_folder(output)
    with _alone_in(output):
        outcomes = _run_cells(comparison, contestants, cells, announce)
        results = collect(comparison, contestants, outcomes, machine(), scan_of(comparison, cells[0].inputs["model"]))
        write_results(results, output)
    failed = [o for o in outcomes if o.results is None]
    if failed:
        first = failed[0]
        announce(f"\n{as_markdown(results)}")
        raise ComparisonError(
            f"{len(failed)} of {len(cells)} cells failed, the first is {first.cell.label!r}: {first.error} (log: "
            f"{first.log}). The others are in {output / 'report.html'}; the same command tries the failed ones again."
        )
    return results


def _run_cells(
    comparison: Comparison, contestants: Sequence[Contestant], cells: Sequence[Cell], announce: Callable[[str], None]
) -> list[Outcome]:
    """Run the cells that are not finished; one outcome for each, in their order."""
    output = comparison.output
    finished = {cell.digest for cell in cells if finished_results(output, cell, comparison.asked["keep_models"])}
    announce(
        f"{len(contestants)} contestants, {len(comparison.asked['seeds'])} seeds: {len(cells)} cells, "
        f"{len(finished)} of them finished before"
    )
    scans = scans_for(comparison, [c for c in cells if c.digest not in finished], announce)
    outcomes: list[Outcome] = []
    seconds: list[float] = []
    with tqdm(total=len(cells), initial=len(finished), unit="cell", disable=not sys.stderr.isatty()) as bar:
        for cell in cells:
            if cell.digest not in finished:
                bar.set_postfix_str(cell.folder.rpartition("-")[0])
                began = time.perf_counter()
                outcome = run_cell(comparison, cell, scans, refresh=bar.refresh)
                seconds.append(time.perf_counter() - began)
                bar.update()
                left = sum(c.digest not in finished for c in cells) - len(seconds)
                line = _one_line(outcome, comparison.metric, seconds[-1])
                ahead = f"; about {_duration(left * sum(seconds) / len(seconds))} left" if left else ""
                with bar.external_write_mode():
                    announce(f"[{len(cells) - left}/{len(cells)}] {line}{ahead}")
            else:
                outcome = Outcome(cell, finished_results(output, cell), None, _folder(output, cell) / "log.txt")
            outcomes.append(outcome)
    return outcomes


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Hold the folder as long as cells run; a process that dies lets go of it.

    Raises:
        ComparisonError: another comparison is at work in it.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout:
        raise ComparisonError(
            f"{output}: another comparison is at work in this folder; wait for its end, or give another with --output-dir."
        ) from None


def check_measures(comparison: Comparison, run: Any) -> None:
    """Refuse now what would otherwise fail after the first training.

    Args:
        run: of `training.settle`.
    Raises:
        InstallError, DataError, OptionError.
    """
    from .. import plots
    from ..data import read_dataset, select_columns
    from ..train import generation
    from ..train.judge import require_scikit_learn

    plots.require_matplotlib()
    asked = comparison.asked
    if run.task.head is not None:
        require_scikit_learn()
    if asked["general_text"]:
        rows = read_dataset(asked["general_text"], asked["general_split"])
        select_columns(rows, run.task.name, asked["general_text"], {})
    for name in asked["generate"]:
        generation.check_metric(name)
    if asked["generate"]:
        if run.eval_rows is None:
            raise OptionError(f"{comparison.source}: generate completes the prompts of eval_dataset, which is missing.")
        generation.check_rows(run.eval_rows, comparison.train.get("eval_dataset") or "eval_split")


def _checked(comparison: Comparison, check: Callable[[Cell], None]) -> tuple[list[Contestant], list[Cell]]:
    """The contestants and their cells, none of which `train` would refuse.

    Raises:
        OptionError: the first refusal, with the contestant's name where others pass: it is what differs between them.
    """
    contestants = contestants_of(comparison)
    cells = cells_of(comparison, contestants, inputs_of(comparison))
    refused: tuple[Cell, OptionError] | None = None
    passed = False
    for cell in cells:
        try:
            check(cell)
            passed = passed or cell.contestant is not None
        except OptionError as error:
            refused = refused or (cell, error)
    if refused is not None:
        cell, error = refused
        if not passed:
            raise error
        raise OptionError(
            f"{cell.label!r}: {error} What not all of the modes take stands in `contestants`, beside its mode."
        )
    return contestants, cells


def list_cells(comparison: Comparison, *, check: Callable[[Cell], None]) -> str:
    """One line for each cell: finished or not, its name, its folder; then those that have another's settings, and no run of
    their own. Refuses what a run would refuse."""
    lines = []
    contestants, cells = _checked(comparison, check)
    for cell in cells:
        done = finished_results(comparison.output, cell, comparison.asked["keep_models"]) is not None
        seed = "" if cell.seed is None else f"seed {cell.seed}"
        lines.append(f"{'finished' if done else 'to do':<9} {cell.label:<40} {seed:<8} {cell.folder}")
    lines += [f"{'as':<9} {c.label}: {', '.join(c.also)}, which has the same settings" for c in contestants if c.also]
    return "\n".join(lines)


def _check_folder(output: Path) -> None:
    try:
        (output / "cells").mkdir(parents=True, exist_ok=True)
        (output / "scans").mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error.strerror}).") from error


def _folder(output: Path, cell: Cell) -> Path:
    return output / "cells" / cell.folder


def finished_results(output: Path, cell: Cell, with_model: bool = False) -> dict[str, Any] | None:
    """What a finished cell measured; None where there is no such cell, or its model was wanted and is not there."""
    folder = _folder(output, cell)
    results = folder / named(RESULTS, cell.until)
    if not results.is_file() or (with_model and cell.contestant and not (folder / MODEL).is_dir()):
        return None
    try:
        found = read_mapping(results)
        checked(found, Finished if cell.contestant else Judged, results)
        return found
    except CheckpointError:  # cut off, or changed by hand: the cell is measured again
        return None


# --- scans -----------------------------------------------------------------------------------------------------------


def scans_for(comparison: Comparison, cells: Sequence[Cell], announce: Callable[[str], None]) -> dict[str, Path]:
    """Scan once for each criterion that reads weights; cells with other criteria find their scores by themselves.

    Returns:
        {criterion: file of the report}; beside each file the seconds it took, in `.seconds.json`.
    """
    from ..scan import find_report, scan_weights

    wanted = [
        c.train.get("criterion") for c in cells if c.contestant and not c.peft and MODES[c.contestant.mode].selective
    ]
    found = {}
    for name in dict.fromkeys(wanted):
        row = CRITERIA.get(name)
        if row is None or row.needs_data or not row.needs_weights:
            continue
        path = _scan_file(comparison, name, cells[0].inputs["model"])
        if not path.is_file():
            announce(f"scanning {comparison.train['model']} by {name}")
            began = time.perf_counter()
            made = find_report if comparison.found_reports else scan_weights
            report = made(comparison.train["model"], name, revision=comparison.train.get("revision"), download=True)
            seconds = time.perf_counter() - began
            write_text(path.with_suffix(".seconds.json"), json.dumps({"seconds": seconds}) + "\n")
            report.save(path)
        found[name] = path
    return found


def _scan_file(comparison: Comparison, criterion: str, identity: str) -> Path:
    return comparison.output / "scans" / f"{criterion}-{identity[:12]}.json"


def scan_of(comparison: Comparison, identity: str) -> SnrReport | None:
    """The scan of these weights that the report draws: that of the first criterion that has one."""
    for criterion in comparison.asked["criteria"]:
        if (path := _scan_file(comparison, criterion, identity)).is_file():
            report: SnrReport = SnrReport.load(path)
            return report
    return None


# --- one cell --------------------------------------------------------------------------------------------------------


def prepare(comparison: Comparison, cell: Cell, scans: Mapping[str, Path]) -> Path:
    """Make the cell's folder and what its process reads; what an earlier try left there is taken up or removed."""
    folder = _folder(comparison.output, cell)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint: Path | None = None
    if not (folder / named(RESULTS_FILE, cell.until)).is_file():  # it died while it trained, or it goes on
        checkpoint = None if cell.until is None else _checkpoint_before(folder / MODEL, cell.until)
        if checkpoint is None:
            shutil.rmtree(folder / MODEL, ignore_errors=True)
    elif (cell.measure or comparison.asked["keep_models"]) and not (folder / MODEL).is_dir():
        # Its figures are there, and the model that is asked for is not: it is trained again.
        (folder / named(RESULTS_FILE, cell.until)).unlink()
    train = {**cell.train, "output_dir": str((folder / MODEL).resolve())}
    if checkpoint is not None:
        train["resume_from_checkpoint"] = str(checkpoint.resolve())
    if cell.until is not None:
        train |= {"stop_at_step": cell.until, "save_total_limit": 1}
    if Path(train["model"]).exists():
        train["model"] = str(Path(train["model"]).resolve())
    for name in ("dataset", "eval_dataset"):
        if train.get(name):
            train[name] = from_anywhere(train[name])
    scan_seconds = None
    if (scan := scans.get(str(cell.train.get("criterion")))) and cell.contestant and not cell.peft:
        train["report"] = str(scan.resolve())
        scan_seconds = read_mapping(scan.with_suffix(".seconds.json"))["seconds"]
    if cell.peft is not None:
        write_text(folder / "peft.yaml", yaml.safe_dump(dict(cell.peft), sort_keys=False))
        train["peft_config"] = str((folder / "peft.yaml").resolve())
    train.setdefault("save_strategy", "no")
    train.setdefault("logging_steps", 1)
    train.setdefault("report_to", "none")
    write_text(folder / "train.yaml", yaml.safe_dump(train, sort_keys=False))
    written = {
        "label": cell.label, "seed": cell.seed, "trained": cell.contestant is not None, "digest": cell.digest,
        "control": cell.contestant.control if cell.contestant else None, "arguments": list(cell.arguments),
        "measure": dict(cell.measure), "inputs": dict(cell.inputs), "scan_seconds": scan_seconds,
        "keep_model": comparison.asked["keep_models"],
        "versions": versions(), "until": cell.until,
    }  # fmt: skip
    write_text(folder / "cell.json", json.dumps(written, indent=1) + "\n")
    return folder


def _checkpoint_before(model: Path, until: int) -> Path | None:
    """The newest whole checkpoint of a cell that was asked for a part of its steps, if that was a smaller part than now."""
    from ..train.checkpoints import problem_of

    found = {int(path.name.rpartition("-")[2]): path for path in model.glob("checkpoint-*")}
    steps = sorted((step for step in found if step < until), reverse=True)
    return next((found[step] for step in steps if problem_of(found[step]) is None), None)


def run_cell(
    comparison: Comparison, cell: Cell, scans: Mapping[str, Path], refresh: Callable[[], Any] = lambda: None
) -> Outcome:
    """Run one cell to its end; a failure is an outcome. Its process ends with this one."""
    folder = prepare(comparison, cell, scans)
    log = folder / "log.txt"
    code = launch(folder, log, refresh)
    results = finished_results(comparison.output, cell) if code == 0 else None
    if results is None:
        return Outcome(cell, None, last_line(log, code), log)
    return Outcome(cell, results, None, log)


def launch(folder: Path, log: Path, refresh: Callable[[], Any]) -> int:
    """Run a cell's process to its end, its output into the log; it ends with this one. Returns its exit code."""
    command = [sys.executable, "-m", "spectrum_peft", "compare", "--cell", str(folder)]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=_environment()
        ) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(_POLL)
                refresh()
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _environment() -> dict[str, str]:
    """This process' own, with the package that runs now found first, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    path = root if not path else os.pathsep.join([root, path])
    return {**os.environ, "PYTHONPATH": path, STARTED_BY: str(os.getpid())}


def last_line(log: Path, code: int) -> str:
    """The line of a log that says why the process ended: the command's own error line, else the last one."""
    if code < 0:
        known = {s.value: s.name for s in signal.Signals}
        return f"ended by {known.get(-code, f'signal {-code}')} (out of memory, or killed)"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    mine = [line for line in lines if line.startswith("spectrum-peft: error: ")]
    return (mine or lines or [f"exit code {code}"])[-1].removeprefix("spectrum-peft: error: ")


def _one_line(outcome: Outcome, metric: str, seconds: float) -> str:
    name = outcome.cell.label + ("" if outcome.cell.seed is None else f", seed {outcome.cell.seed}")
    if outcome.results is None:
        return f"{name}: failed: {outcome.error} (log: {outcome.log})"
    value = outcome.results["metrics"].get(metric)
    figure = f"{metric} {value:.4f}, " if isinstance(value, float) else ""
    memory = outcome.results.get("peak_memory_bytes")
    peak = f"peak {memory / 2**30:.2f} GiB, " if memory else ""
    return f"{name}: {figure}{peak}{_duration(seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
