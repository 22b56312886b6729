"""What came out: the winner by the search rows, the report on the evaluation rows, one sentence with its interval."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import plots
from ..compare.figures import shown
from ..compare.matrix import Contestant
from ..compare.outcome import Outcome
from ..compare.report import write_results
from ..compare.results import collect
from ..compare.settings import METRICS
from ..compare.statistics import paired
from ..errors import ComparisonError
from ..machine import machine
from ..memory import format_bytes
from ..plan import edge_of
from ..records import RESULTS_FILE
from .prices import Price
from .recipe import RECIPE, write_recipe
from .stages import Tune

MODEL = "model"


def search_means(outcomes: Sequence[Outcome], higher: bool) -> dict[str, float]:
    """{contestant: mean over its seeds on the search rows}, the best first; those of which every run has ended well.

    A run that failed at one seed may fail at the next: such a contestant stands behind all others.
    """
    found: dict[str, list[float]] = {}
    failed = {o.cell.label for o in outcomes if o.results is None}
    for o in outcomes:
        if o.results is not None:
            found.setdefault(o.cell.label, []).append(float(o.results["scores"]["search"]["value"]))
    means = {label: statistics.fmean(values) for label, values in found.items()}
    order = sorted(means, key=lambda label: (label in failed, -means[label] if higher else means[label]))
    return {label: means[label] for label in order}


def finish(tune: Tune) -> dict[str, Any]:
    """Write the report, the recipe and the winner's folder.

    Returns:
        What `results.json` holds: that of a comparison, with `tune` beside it: `winner`, `sentence`, `rate`, `seed`, `stages`,
        `race`, `dropped`, `prices`.
    Raises:
        ComparisonError: every run of the finals failed.
    """
    outcomes = tune.final_outcomes()
    means = search_means(outcomes, tune.higher)
    if not means:
        raise ComparisonError(
            f"all {len(outcomes)} runs of the finals failed, the first: {outcomes[0].error} (log: {outcomes[0].log})."
        )
    prices = {p.contestant.label: p for p in tune.prepared.prices}
    winner = next(iter(means))
    contestants = _as_contestants(outcomes)
    reference = _reference(winner, means, prices)
    seeds = sorted({o.cell.seed for o in outcomes if o.cell.seed is not None})
    compared = tune.compared(
        [], seeds=seeds, reference=None, train={**tune.asked.train, "eval_dataset": tune.sets.evaluation}
    )
    compared = replace(compared, asked={**compared.asked, "reference": reference})
    results = collect(compared, contestants, outcomes, machine(), None)
    rate = _rate(contestants, winner)
    sentence = says(results, winner, reference, prices, rate)
    best = _best_run(outcomes, winner, tune.higher)
    results["tune"] = {
        "winner": winner, "rate": rate, "seed": best.cell.seed, "sentence": sentence, "search": means,
        "stages": tune.stage_spending(), "race": tune.verdicts(), "dropped": list(tune.prepared.dropped),
        "prices": {label: p.peak_bytes for label, p in prices.items()},
    }  # fmt: skip
    results["notes"] = [sentence, *_notes(tune, winner, rate), *results["notes"]]
    results["pictures"] = pictures(tune)
    results["sections"] = [*fronts(results["pictures"]), *sections(results["tune"], results["metric"])]
    write_results(results, tune.output)
    steps, seed = best.cell.train["max_steps"], best.cell.seed or 0
    write_recipe(tune.output, tune.asked, prices[winner], rate, steps, seed, sentence)
    _keep_winner(tune, best, outcomes)
    return results


def _as_contestants(outcomes: Sequence[Outcome]) -> list[Contestant]:
    found: dict[str, Contestant] = {}
    for o in outcomes:
        assert o.cell.contestant is not None
        found.setdefault(o.cell.label, o.cell.contestant)
    return list(found.values())


def _rate(contestants: Sequence[Contestant], label: str) -> float:
    return float(next(c for c in contestants if c.label == label).settings["learning_rate"])


def _reference(winner: str, means: Mapping[str, float], prices: Mapping[str, Price]) -> str | None:
    """Whom the winner is held against: of the other finalists the one that needs most memory, by the dry run."""
    others = [label for label in means if label != winner]
    return max(others, key=lambda label: prices[label].peak_bytes or 0) if others else None


def _best_run(outcomes: Sequence[Outcome], winner: str, higher: bool) -> Outcome:
    runs = [o for o in outcomes if o.cell.label == winner and o.results is not None]
    return (max if higher else min)(runs, key=lambda o: o.results["scores"]["search"]["value"])  # type: ignore[index]


def says(
    results: Mapping[str, Any], winner: str, reference: str | None, prices: Mapping[str, Price], rate: float
) -> str:
    """The answer in one sentence: the winner against the reference with its memory, then against each control."""
    metric = results["metric"]
    mean = next(s for s in results["contestants"] if s["label"] == winner)["metrics"].get(metric, {})
    figure = f" ({METRICS[metric].title} {shown(metric, mean['mean'])})" if mean.get("mean") is not None else ""
    text = f"{winner} at {rate:g}{figure}: "
    if reference is None or (told := _told(results, winner, reference)) is None:
        return f"{text}nothing else finished that it could be held against"
    mine, other = prices[winner].peak_bytes, prices[reference].peak_bytes
    text += told + (f", at {mine / other:.2f} of its memory" if mine and other else "")
    controls = [s["label"] for s in results["contestants"] if s["control"] and s["label"] not in (winner, reference)]
    return "; ".join([text, *(beside for label in controls if (beside := _told(results, winner, label, short=True)))])


def _told(results: Mapping[str, Any], winner: str, other: str, short: bool = False) -> str | None:
    """Whether the evaluation rows tell the winner from another, with the interval of the difference, seed by seed.

    None where there is none.
    """
    metric, confidence = results["metric"], results["config"]["confidence"]
    found = paired(results["cells"], winner, other, metric, confidence)
    if found is None or found["low"] is None:
        return None
    low, high = found["low"], found["high"]
    better, worse = (low > 0, high < 0) if METRICS[metric].higher else (high < 0, low > 0)
    told = "better than" if better else "worse than" if worse else "not told from"
    ends = f"{low:+.4f} to {high:+.4f}"
    if short:
        return f"{told} {other} ({found['mean']:+.4f}, {ends})"
    how = f"{100 * confidence:g} % interval {ends}, {found['n']} seeds"
    return f"{told} {other} (difference {found['mean']:+.4f}, {how})"


def _notes(tune: Tune, winner: str, rate: float) -> list[str]:
    sets = tune.sets
    notes = [
        f"the winner is the best on {sets.search_rows} training rows that no run trained on; the figures here are of "
        f"{sets.evaluation_rows} other rows, which decided nothing"
        + (" (taken from the training set, since no evaluation set was given)" if sets.carved else "")
    ]
    tried = {row["rate"] for row in tune.verdicts()[0]["runs"] if row["contestant"] == winner}
    if len(tried) > 1 and (beyond := edge_of(sorted(tried), rate)):
        notes.append(f"the winner's rate is {rate:g}: {beyond} (--learning-rates)")
    stopped = [row for rung in tune.verdicts() for row in rung["runs"] if row["fate"] == "worse"]
    if stopped:
        notes.append(
            f"{len(stopped)} runs of the race were stopped by a test; the chance that the best was among them is at most "
            f"{tune.asked.values['error']:g}, by Bonferroni over runs and rungs"
        )
    if tune.final_steps() < tune.prepared.outline.steps:
        notes.append(f"the finals were cut to {tune.final_steps()} steps for want of time")
    return notes


def pictures(tune: Tune) -> list[dict[str, Any]]:
    """What quality costs, of all who raced, each at its best rate after the first rung; arguments of `plots.trade_off`."""
    metric = METRICS[tune.asked.metric]
    prices = {p.contestant.label: p for p in tune.prepared.prices}
    steps = tune.step_seconds(0)
    best: dict[str, float] = {}
    for row in tune.verdicts()[0]["runs"]:  # the best first
        if row["value"] is not None:
            best.setdefault(row["contestant"], row["value"])
    costs = {
        "memory": ("memory of a step by the dry run, GiB", {c: (p.peak_bytes or 0) / 2**30 for c, p in prices.items()}),
        "time": ("seconds of a step", steps),
        "parameters": ("trained parameters, millions", {c: p.trained / 1e6 for c, p in prices.items()}),
    }
    found = []
    for name, (label, cost) in costs.items():
        points = [{"label": c, "x": cost[c], "y": value} for c, value in best.items() if cost.get(c)]
        if points:
            title = (
                f"All after {tune.prepared.outline.rungs[0]} steps: {metric.title} against {label.partition(',')[0]}"
            )
            drawn = {
                "points": points, "x_label": label, "y_label": metric.title, "log_x": name == "parameters",
                "higher": metric.higher,
            }  # fmt: skip
            found.append({"name": f"race-{name}", "title": title, "trade_off": drawn})
    return found


def fronts(drawn: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table of who is on the Pareto fronts of `pictures`."""
    rows = []
    for one in drawn:
        edge = plots.front(one["trade_off"]["points"], one["trade_off"]["higher"])
        rows.append(
            [one["trade_off"]["x_label"], "; ".join(f"{p['label']} ({p['x']:.3g}, {p['y']:.4g})" for p in edge)]
        )
    heads = ["cost", "contestants (cost, quality)"]
    return (
        [{"title": "After the first rung no cheaper one was better than", "heads": heads, "rows": rows}] if rows else []
    )


def sections(tune: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """Tables for the page and for Markdown: titles, heads, rows of text."""
    spent = [
        [row["stage"], str(row["runs"]), f"{row['steps']:,}", f"{row['seconds'] / 60:.1f} min"]
        for row in tune["stages"]
    ]
    total = sum(row["seconds"] for row in tune["stages"])
    spent.append(
        [
            "in all",
            str(sum(r["runs"] for r in tune["stages"])),
            f"{sum(r['steps'] for r in tune['stages']):,}",
            f"{total / 60:.1f} min",
        ]
    )
    found = [{"title": "What each stage spent", "heads": ["stage", "runs", "steps", "time"], "rows": spent}]
    for rung in tune["race"]:
        rows = [
            [
                r["contestant"], f"{r['rate']:g}", "" if r["value"] is None else shown(metric, r["value"]),
                _FATES[r["fate"]], "" if r["p"] is None else f"{r['p']:.2g}",
            ]
            for r in rung["runs"]
        ]  # fmt: skip
        found.append({
            "title": f"The race after {rung['until']} steps", "heads": ["contestant", "rate", METRICS[metric].title, "then", "p"],
            "rows": rows,
        })  # fmt: skip
    if tune["dropped"]:
        found.append(
            {"title": "What did not fit", "heads": ["contestant"], "rows": [[line] for line in tune["dropped"]]}
        )
    prices = [[label, format_bytes(size)] for label, size in tune["prices"].items() if size]
    found.append({"title": "Memory of a step, by the dry run", "heads": ["contestant", "peak"], "rows": prices})
    return found


_FATES = {
    "goes on": "goes on", "kept": "goes on, a control at its best rate", "worse": "stopped: told apart from the best",
    "no room": "stopped: no room", "failed": "failed",
}  # fmt: skip


def _keep_winner(tune: Tune, best: Outcome, outcomes: Sequence[Outcome]) -> None:
    """Move the winner's folder out of its cell, and remove the others."""
    target = tune.output / MODEL
    source = tune.output / "cells" / best.cell.folder / "model"
    if not target.is_dir():
        if not (source / RESULTS_FILE).is_file():  # it was trained where this process cannot see it
            tune.train_again(best.cell)
        source.rename(target)
    for o in outcomes:
        shutil.rmtree(tune.output / "cells" / o.cell.folder / "model", ignore_errors=True)


def summary(results: Mapping[str, Any], output: Path) -> str:
    """A few lines for the terminal."""
    return "\n".join([
        results["tune"]["sentence"],
        f"wrote {output / RECIPE}, {output / MODEL}, {output / 'report.html'}",
    ])  # fmt: skip
