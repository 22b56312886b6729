"""What the cells measured, brought together: rows, means with intervals over seeds.

The result is plain data: machine, versions, commit, config, every cell, every contestant.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..machine import BUSY
from ..plan import MODES
from ..records import PLAN_FILE, Plan, SnrReport
from .figures import FIGURES, FORGETTING
from .matrix import Contestant
from .settings import METRICS, Comparison
from .statistics import finite_number, interval_of, not_told_apart, paired

if TYPE_CHECKING:
    from .outcome import Outcome


def row_of(outcome: Outcome, general_before: float | None) -> dict[str, Any]:
    """One cell as plain figures; None for what it did not measure."""
    cell, found = outcome.cell, outcome.results
    row: dict[str, Any] = {
        "label": cell.label, "seed": cell.seed, "mode": None, "ratio": cell.train.get("spectrum_ratio"),
        "criterion": cell.train.get("criterion"), "learning_rate": cell.train.get("learning_rate"),
        "control": cell.contestant.control if cell.contestant else None, "error": outcome.error, "log": str(outcome.log),
        "digest": cell.digest,
    }  # fmt: skip
    if cell.contestant:
        row["mode"] = cell.contestant.mode
    if found is None:
        return row
    row["learning_rate"] = found.get("learning_rate", row["learning_rate"])  # the one that a race has found
    row["metrics"] = found["metrics"]
    row["versions"] = found["versions"]
    general = found.get("general")
    row["general_loss"] = general["loss"] if general else None
    row["forgetting"] = general["loss"] - general_before if general and general_before is not None else None
    for name, key in (("generation", "tokens_per_second"), ("merged_generation", "merged_tokens_per_second")):
        speed = found.get(key)
        row[f"{name}_tokens_per_second"] = speed["tokens_per_second"] if speed else None
    if not cell.contestant:
        return row
    steps = found["step_seconds"]
    timed = steps[1:] or steps  # the first one warms up
    row |= {
        "before": found["before"],
        "new_head": found.get("new_head"),
        "trainable_parameters": found["trainable_parameters"],
        "total_parameters": found["total_parameters"],
        "steps": found["steps"],
        "seconds_per_step": statistics.median(timed) if timed else None,
        "step_seconds_low": min(timed, default=None),
        "step_seconds_high": max(timed, default=None),
        "train_seconds": sum(steps),
        "tokens_per_second": found["input_tokens"] / sum(steps) if steps and found["input_tokens"] else None,
        "peak_memory_bytes": found["peak_memory_bytes"],
        "setup_seconds": sum(found["setup_seconds"].values()),
        "setup_seconds_scan": found["setup_seconds"]["scan"],
        "saved_bytes": found["saved_bytes"],
        "loss_curve": found["loss_curve"],
        "other_cores": found.get("other_cores"),
    }
    return row


def summary_of(contestant: Contestant, rows: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    """A contestant over its seeds: an interval for each figure, and the mean of its curves."""
    finished = [r for r in rows if r["error"] is None]
    summary: dict[str, Any] = {
        "label": contestant.label, "mode": contestant.mode, "control": contestant.control,
        "also": list(contestant.also), "settings": dict(contestant.settings), "peft": contestant.peft,
        "seeds": [r["seed"] for r in finished],
        "failed": [r["error"] for r in rows if r["error"] is not None], "metrics": {}, "figures": {},
    }  # fmt: skip
    if not finished:
        return summary
    rates = {r["learning_rate"] for r in finished}
    if len(rates) == 1:  # the mode's own, or one that every run has found
        summary["settings"]["learning_rate"] = rates.pop()
    for name in METRICS:
        values = [finite_number(r["metrics"].get(name)) for r in finished]
        if None not in values:
            summary["metrics"][name] = interval_of(values, confidence)
    for name in (*FIGURES, *FORGETTING):
        values = [finite_number(r.get(name)) for r in finished]
        if None not in values:
            summary["figures"][name] = interval_of(values, confidence)
    summary["loss_curve"] = _mean_curve([r["loss_curve"] for r in finished])
    return summary


def _mean_curve(curves: Iterable[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Mean loss at the steps that all curves have."""
    by_step: dict[float, list[float]] = {}
    curves = list(curves)
    for curve in curves:
        for step, loss in curve:
            by_step.setdefault(step, []).append(float(loss))
    return [[step, statistics.fmean(v)] for step, v in sorted(by_step.items()) if len(v) == len(curves)]


def collect(
    comparison: Comparison,
    contestants: Sequence[Contestant],
    outcomes: Sequence[Outcome],
    machine: Mapping[str, Any],
    scan: SnrReport | None,
) -> dict[str, Any]:
    """Everything that the files show, as plain data."""
    confidence = comparison.asked["confidence"]
    untrained = next((o.results for o in outcomes if o.cell.contestant is None), None)
    general = (untrained or {}).get("general")
    rows = [row_of(o, general["loss"] if general else None) for o in outcomes]
    cells = [r for o, r in zip(outcomes, rows, strict=True) if o.cell.contestant is not None]
    summaries = [summary_of(c, [r for r in cells if r["label"] == c.label], confidence) for c in contestants]
    metric, reference = comparison.metric, comparison.asked["reference"]
    for summary in summaries if reference else ():
        figure = paired(cells, summary["label"], reference, metric, confidence)
        if summary["label"] != reference and figure is not None:
            summary["figures"]["difference"] = figure
    ranked = {
        s["label"]: s["metrics"][metric] for s in summaries if s["metrics"].get(metric, {}).get("mean") is not None
    }
    best = not_told_apart(ranked, METRICS[metric].higher)
    by_rank = sorted(ranked, key=lambda label: ranked[label]["mean"], reverse=METRICS[metric].higher)
    return {
        "record": "comparison",
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "spectrum_peft": __version__,
        "machine": dict(machine),
        "config": {
            "source": comparison.source, "train": dict(comparison.train), "arguments": list(comparison.arguments),
            **comparison.asked,
        },
        "task": comparison.task,
        "metric": metric,
        "notes": _notes(comparison, cells, summaries, best, machine),
        "untrained": _untrained(rows, cells, outcomes),
        "best": best,
        "contestants": summaries,
        "cells": cells,
        "scan": None if scan is None else scan.to_dict(),
        "chosen": None if scan is None else _chosen(by_rank, outcomes, scan.criterion),
    }  # fmt: skip


def _chosen(by_rank: Sequence[str], outcomes: Sequence[Outcome], criterion: str) -> dict[str, Any] | None:
    """{label, plan} of the best-ranked contestant that chose matrices by this criterion; None where no plan was kept."""
    for label in by_rank:
        for outcome in outcomes:
            path = outcome.log.parent / PLAN_FILE
            if outcome.cell.label == label and outcome.results is not None and path.is_file():
                plan = Plan.load(path)
                if plan.criterion == criterion and MODES[plan.mode].selective:
                    return {"label": label, "plan": plan.to_dict()}
    return None


def _untrained(
    rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome]
) -> dict[str, Any] | None:
    """The base before training: what every cell measured before its first step, and what the base's own cell did."""
    own = next((dict(r) for r, o in zip(rows, outcomes, strict=True) if o.cell.contestant is None), None)
    # One of each seed: a new head is another one there.
    before = {r["seed"]: r["before"] for r in reversed(cells) if r.get("before")}
    if own is None and not before:
        return None
    found = own or {"label": "untrained", "error": None, "log": None, "metrics": {}}
    means: dict[str, Any] = {}
    for name in next(iter(before.values()), {}):
        values = [v for metrics in before.values() if (v := finite_number(metrics.get(name))) is not None]
        if len(values) == len(before):
            same = len(set(values)) == 1  # a mean of equal numbers may be off in its last place
            means[name] = values[0] if same else statistics.fmean(values) if all(map(math.isfinite, values)) else None
    return {**found, "metrics": {**means, **found.get("metrics", {})}}


def _notes(
    comparison: Comparison,
    cells: Sequence[Mapping[str, Any]],
    summaries: Sequence[Mapping[str, Any]],
    best: Sequence[str],
    machine: Mapping[str, Any],
) -> list[str]:
    """What a reader must know before believing the tables."""
    asked = comparison.asked
    seeds, percent = len(asked["seeds"]), f"{100 * asked['confidence']:g} %"
    notes = list(comparison.notes)
    for summary in summaries:
        if summary["also"]:
            others = ", ".join(repr(label) for label in summary["also"])
            notes.append(f"{others} asked for the settings of {summary['label']!r} and stands there")
    failed = [r for r in cells if r["error"] is not None]
    if failed:
        notes.append(f"{len(failed)} of {len(cells)} runs failed and are listed below with their logs")
    if seeds == 1:
        notes.append("one seed: the figures have no spread, and nothing here says which method is better")
    else:
        title = METRICS[comparison.metric].title
        near = (
            f". In {title} those of {len(best) - 1} of {len(summaries) - 1} others reach that of the best"
            if best
            else ""
        )
        notes.append(f"{seeds} seeds; intervals are {percent}, by Student's t{near}")
        alone = sum(len(s["seeds"]) < 2 for s in summaries)
        if alone:
            notes.append(
                f"{alone} of {len(summaries)} contestants finished fewer than two runs: they have no interval and are not judged"
            )
    if comparison.train.get("eval_dataset") is None and comparison.train.get("eval_split") is None:
        notes.append("there is no evaluation set: quality was not measured")
    if any(r.get("steps", math.inf) < 50 for r in cells):
        notes.append("fewer than 50 steps: this shows costs rather than quality")
    if any(r.get("new_head") for r in cells):
        notes.append(
            "the head for the classes is new and learns at each contestant's own rate: in a short run that decides, not the "
            "rest. Compare on a checkpoint whose head was fitted before"
        )
    if any("difference" in s["figures"] for s in summaries):
        how = f", with {percent} intervals: one that holds 0 shows none" if seeds > 1 else " and without an interval"
        notes.append(f"differences to {asked['reference']} are taken seed by seed{how}")
    busy = max((r.get("other_cores") or 0.0 for r in cells), default=0.0)
    if busy > BUSY * machine["cores"]:
        notes.append(f"other processes kept up to {busy:.1f} cores busy during a run: times and tokens/s are doubtful")
    if not any(s["control"] for s in summaries):
        notes.append("no controls: whether choosing by the spectrum matters cannot be seen here")
    seen = {json.dumps(r["versions"], sort_keys=True) for r in cells if "versions" in r}
    if len(seen) > 1:
        notes.append("the runs were made with different versions of the libraries; times are not comparable")
    elif seen and json.loads(next(iter(seen))) != machine["packages"]:
        notes.append("the runs were made with other versions of the libraries than those that are installed now")
    notes.append("peak memory is that of the whole process, the interpreter and its libraries included")
    return notes
