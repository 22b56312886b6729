"""What the cells measured, brought together: rows, means with intervals over seeds, and the files.

results.json   machine, versions, commit, config, every cell, every contestant
results.csv    one line for each cell
results.md     the table of contestants
plots/         the pictures
report.html    all of it in one file
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..machine import BUSY
from ..records import SnrReport, write_text
from .matrix import METRICS, Comparison, Contestant

if TYPE_CHECKING:
    from .runs import Outcome

# Columns of the tables and of the csv: name -> (title, unit). Metrics and forgetting stand before them.
FIGURES: dict[str, tuple[str, str]] = {
    "trainable_parameters": ("trained", ""),
    "seconds_per_step": ("step", "s"),
    "tokens_per_second": ("tokens/s", "1/s"),
    "peak_memory_bytes": ("peak memory", "bytes"),
    "setup_seconds": ("set-up", "s"),
    "train_seconds": ("training", "s"),
    "saved_bytes": ("on disk", "bytes"),
    "generation_tokens_per_second": ("generation", "1/s"),
    "merged_generation_tokens_per_second": ("generation, merged", "1/s"),
}
FORGETTING = {"general_loss": "general loss", "forgetting": "forgetting"}


def interval(values: Sequence[float], confidence: float) -> dict[str, Any]:
    """Mean and the ends of its confidence interval by Student's t: mean +- t * s / sqrt(n), n - 1 degrees of freedom.

    Args:
        values: one for each seed, finite.
    Returns:
        mean, n, and low and high; these are None for a single value, which says nothing of its spread.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "n": len(values)}
    from scipy.stats import t

    half = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def not_told_apart(summaries: Mapping[str, Mapping[str, Any]], higher: bool) -> list[str]:
    """The contestant with the best mean, and all whose intervals reach its own; one without an interval is left out.

    Intervals that overlap do not prove that two are equal; that they do not overlap is more than a difference at the
    intervals' level asks for. So the list is rather too long than too short.
    """
    summaries = {name: s for name, s in summaries.items() if s["low"] is not None}
    if len(summaries) < 2:
        return []
    best = (max if higher else min)(summaries, key=lambda name: summaries[name]["mean"])
    edge = summaries[best]["low" if higher else "high"]
    return [name for name, s in summaries.items() if (s["high"] >= edge if higher else s["low"] <= edge)]


def paired(cells: Sequence[Mapping[str, Any]], label: str, reference: str, metric: str, confidence: float) -> Any:
    """The difference of two contestants, run by run of one seed, and its interval as in `interval`.

    Runs with one seed see the same rows in the same order and begin with the same new weights, so what a seed does to both
    falls out of the difference: its interval is as a rule much narrower than those of the two means.

    Args:
        cells: rows of `row_of`.
    Returns:
        As `interval`; a mean of None where one of the runs diverged; None where no seed has a figure of both.
    """
    found: dict[str, dict[Any, float]] = {label: {}, reference: {}}
    for row in cells:
        value = _number(row.get("metrics", {}).get(metric))
        if row["label"] in found and row["error"] is None and value is not None:
            found[row["label"]][row["seed"]] = value
    mine, other = found[label], found[reference]
    differences = [mine[seed] - other[seed] for seed in mine if seed in other]
    return _interval_of(differences, confidence) if differences else None


# --- rows ------------------------------------------------------------------------------------------------------------


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
        "settings": dict(contestant.settings), "peft": contestant.peft, "seeds": [r["seed"] for r in finished],
        "failed": [r["error"] for r in rows if r["error"] is not None], "metrics": {}, "figures": {},
    }  # fmt: skip
    if not finished:
        return summary
    for name in METRICS:
        values = [_number(r["metrics"].get(name)) for r in finished]
        if None not in values:
            summary["metrics"][name] = _interval_of(values, confidence)
    for name in (*FIGURES, *FORGETTING):
        values = [_number(r.get(name)) for r in finished]
        if None not in values:
            summary["figures"][name] = _interval_of(values, confidence)
    summary["loss_curve"] = _mean_curve([r["loss_curve"] for r in finished])
    return summary


def _interval_of(values: Sequence[Any], confidence: float) -> dict[str, Any]:
    """As `interval`; a run that diverged leaves no mean, and it is said so."""
    bad = [v for v in values if not math.isfinite(v)]
    if bad:
        return {"mean": None, "low": None, "high": None, "n": len(values), "not_finite": len(bad)}
    return interval(values, confidence)


def _number(value: Any) -> float | None:
    """JSON has no infinity; ours writes it as a string."""
    return float(value) if isinstance(value, int | float) or value in ("inf", "-inf", "nan") else None


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
    }  # fmt: skip


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
        values = [v for metrics in before.values() if (v := _number(metrics.get(name))) is not None]
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
    failed = [r for r in cells if r["error"] is not None]
    if failed:
        notes.append(f"{len(failed)} of {len(cells)} runs failed and are listed below with their logs")
    if seeds == 1:
        notes.append("one seed: the figures have no spread, and nothing here says which method is better")
    else:
        title = METRICS[comparison.metric].title
        told = f". In {title} these are not told apart from the best: {len(best)} of {len(summaries)}" if best else ""
        notes.append(f"{seeds} seeds; intervals are {percent}, by Student's t{told}")
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


# --- files -----------------------------------------------------------------------------------------------------------


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """Write all files of a comparison, each whole or not at all."""
    from .page import draw, html

    write_text(output / "results.json", json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")
    write_text(output / "results.csv", as_csv(results))
    write_text(output / "results.md", as_markdown(results))
    pictures = draw(results, output / "plots")
    write_text(output / "report.html", html(results, pictures))


def _finite(value: Any) -> Any:
    """Infinite and undefined numbers as strings, as in all JSON of ours."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(results: Mapping[str, Any]) -> str:
    """One line for each cell, failed ones too."""
    metrics = [name for name in METRICS if any(name in r.get("metrics", {}) for r in results["cells"])]
    plain = [
        "label", "mode", "ratio", "criterion", "control", "learning_rate", "seed", *metrics, *FORGETTING, *FIGURES,
        "step_seconds_low", "step_seconds_high", "setup_seconds_scan", "steps", "total_parameters", "error", "log",
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(plain)
    for row in results["cells"]:
        flat = {**row, **row.get("metrics", {})}
        writer.writerow(["" if flat.get(name) is None else flat[name] for name in plain])
    return text.getvalue()


def columns(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, title) of what the table of contestants shows: only what was measured; what it is ranked by first."""
    first = results["metric"]
    names = [first, *(n for n in METRICS if n != first)]
    shown = [(n, METRICS[n].title) for n in names if any(n in s["metrics"] for s in results["contestants"])]
    reference = results["config"].get("reference")
    if reference and any("difference" in s["figures"] for s in results["contestants"]):
        shown.insert(1, ("difference", f"difference to {reference}"))
    others = {**FORGETTING, **{name: title for name, (title, _) in FIGURES.items()}}
    return shown + [(n, t) for n, t in others.items() if any(n in s["figures"] for s in results["contestants"])]


def _form(name: str, size: float) -> tuple[float, str, str]:
    """(divisor, format, unit) that a figure of this size is shown in."""
    if name == "trainable_parameters":
        return (1e6, ".3g", " M") if size >= 1e5 else (1, ",.0f", "")
    if name.endswith("_bytes"):
        unit = 2**20
        return (2**30, ".2f", " GiB") if size >= 2**30 else (unit, ",.0f" if size >= 100 * unit else ".3g", " MiB")
    if name == "train_seconds":
        return (1, ".0f" if size >= 10 else ".2g", " s") if size < 600 else (60, ".1f", " min")
    if "seconds" in name and "tokens" not in name:
        return 1, ".3g", " s"
    if name.endswith("tokens_per_second"):
        return (1, ",.0f", "") if size >= 100 else (1, ".3g", "")
    return (1, ".4f", "") if size < 100 else (1, ".4g", "")


def shown(name: str, value: float | None) -> str:
    """A figure for a reader."""
    if value is None:
        return ""
    divisor, form, unit = _form(name, abs(value))
    return f"{value / divisor:{'+' if name in ('forgetting', 'difference') else ''}{form}}{unit}"


def spread(name: str, figure: Mapping[str, Any]) -> str:
    """The half width of an interval, in the unit that the mean is shown in; nothing where it says nothing."""
    if name == "difference" and figure.get("low") is None:
        return "(one seed)"
    if figure.get("low") is None or name in ("trainable_parameters", "saved_bytes"):
        return ""
    divisor, form, _ = _form(name, abs(figure["mean"]))
    return f"± {(figure['high'] - figure['mean']) / divisor:{form}}"


def figure_of(summary: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    found = summary["metrics"].get(name, summary["figures"].get(name))
    return found if found is None or isinstance(found, Mapping) else None


def order(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Contestants by the metric that ranks, best first; those without one at the end."""
    metric, higher = results["metric"], METRICS[results["metric"]].higher
    have = [s for s in results["contestants"] if s["metrics"].get(metric, {}).get("mean") is not None]
    rest = [s for s in results["contestants"] if s not in have]
    return [*sorted(have, key=lambda s: s["metrics"][metric]["mean"], reverse=higher), *rest]


def _plain(text: str) -> str:
    """Names are the user's: in Markdown they shall not end a cell, nor be markup."""
    return re.sub(r"[\\|<*`]", r"\\\g<0>", text)


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table of contestants, and what a reader must know."""
    heads = [(name, _plain(title)) for name, title in columns(results)]
    lines = [
        "| " + " | ".join(["contestant", "rate", *(title for _, title in heads)]) + " |",
        "| --- " * (len(heads) + 2) + "|",
    ]
    for summary in order(results):
        cells = []
        for name, _ in heads:
            figure = figure_of(summary, name)
            text = "" if figure is None else f"{shown(name, figure['mean'])} {spread(name, figure)}".strip()
            cells.append("not finite" if figure and figure.get("not_finite") else text)
        mark = " *" if summary["label"] in results["best"] else ""
        failed = f" ({len(summary['failed'])} failed)" if summary["failed"] else ""
        rate = summary["settings"].get("learning_rate")
        rate = f"{rate:g}" if rate is not None else ""
        lines.append("| " + " | ".join([f"{_plain(summary['label'])}{mark}{failed}", rate, *cells]) + " |")
    if results["best"]:
        lines += ["", f"\\* not told apart from the best in {METRICS[results['metric']].title}"]
    machine = results["machine"]
    lines += ["", *(f"- {_plain(note)}" for note in results["notes"])]
    lines.append(
        f"- {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(
            f"{k} {machine['packages'][k]}" for k in ("torch", "transformers", "peft") if k in machine["packages"]
        )
        + (f"; commit {machine['commit'][:10]}" if machine.get("commit") else "")
    )
    return "\n".join(lines) + "\n"
