"""Means with intervals over seeds, and what is told apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


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
        value = finite_number(row.get("metrics", {}).get(metric))
        if row["label"] in found and row["error"] is None and value is not None:
            found[row["label"]][row["seed"]] = value
    mine, other = found[label], found[reference]
    differences = [mine[seed] - other[seed] for seed in mine if seed in other]
    return interval_of(differences, confidence) if differences else None


def interval_of(values: Sequence[Any], confidence: float) -> dict[str, Any]:
    """As `interval`; a run that diverged leaves no mean, and it is said so."""
    bad = [v for v in values if not math.isfinite(v)]
    if bad:
        return {"mean": None, "low": None, "high": None, "n": len(values), "not_finite": len(bad)}
    return interval(values, confidence)


def finite_number(value: Any) -> float | None:
    """JSON has no infinity; ours writes it as a string."""
    return float(value) if isinstance(value, int | float) or value in ("inf", "-inf", "nan") else None
