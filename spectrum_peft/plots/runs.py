"""Training runs: their curves, what quality costs, intervals of contestants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import OptionError, near_matches
from .style import COLOURS, LINES, MARKS, add_legend, colours, literal, log_scale, mark, new_figure, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MANY_POINTS = 20  # of a curve, above which its running mean is drawn over it


def curves(
    runs: Sequence[Mapping[str, Any]],
    *,
    y_label: str = "training loss",
    title: str = "",
    size: tuple[float, float] = (7.6, 4.4),
    reference: str | None = None,
) -> Figure:
    """Training curves of several runs in one picture.

    Curves of many points are drawn faint under their running mean over a twentieth of the run, five points at least.

    Args:
        runs: mappings with `label`, `steps` and `loss` (two lists of one length); with `held_out` ({step: loss}) these
            are drawn as marks.
        size: width and height in inches; a long legend below comes on top of it.
        reference: label of a run. Below the curves stands how much higher the smoothed loss of each other run is, step by step:
            the runs saw the same batches, so that what all batches share goes.
    Raises:
        OptionError: no run, lists of different lengths, or a reference that is none of the runs; the message names it.
        InstallError: matplotlib is missing.
    """
    if not runs:
        raise OptionError("there is no run to draw.")
    labels = [run["label"] for run in runs]
    if reference is not None and reference not in labels:
        raise OptionError(f"reference is {reference!r}." + near_matches(reference, labels))
    figure = new_figure(*size)
    from matplotlib.ticker import MaxNLocator

    axes, below = figure.add_subplot(), None
    if reference is not None:
        figure.clear()
        figure.set_figheight(size[1] * 1.45)
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.6))
        quiet(below)
    quiet(axes)
    smoothed: list[tuple[np.ndarray, np.ndarray]] = []
    inks = colours(len(runs))
    for i, run in enumerate(runs):
        label, steps, loss = run["label"], np.asarray(run["steps"], float), np.asarray(run["loss"], float)
        if steps.shape != loss.shape or steps.ndim != 1:
            raise OptionError(f"run {label!r} has {steps.size} steps and {loss.size} losses, wanted as many.")
        finite = np.isfinite(loss)
        if not finite.all():
            label += f" ({(~finite).sum()} losses not finite)"
        steps, loss = steps[finite], loss[finite]
        colour, line = inks[i], LINES[i % len(LINES)]
        if len(loss) > _MANY_POINTS:
            axes.plot(steps, loss, color=colour, alpha=0.25, linewidth=0.8)
            loss = _running_mean(loss, max(len(loss) // 20, 5))
        smoothed.append((steps, loss))
        last = f": {loss[-1]:.4g} at the end" if len(loss) else ""
        axes.plot(steps, loss, color=colour, linestyle=line, linewidth=1.9, label=literal(f"{label}{last}"))
        if held_out := run.get("held_out"):
            axes.plot(
                list(held_out), list(held_out.values()), linestyle="none", marker=mark(i), markerfacecolor="none",
                # Hollow and of several sizes: those of one height stay to be seen.
                markeredgecolor=colour, markeredgewidth=1.8, markersize=8 + 3 * (i % 3),
                label=literal(f"{run['label']}, held out"),
            )  # fmt: skip
    if below is not None:
        _draw_differences(below, smoothed, labels.index(reference))
        below.set_ylabel(f"above {literal(str(reference).partition(' (')[0])}")
    lowest = axes if below is None else below
    lowest.set_xlabel("step")
    lowest.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=11)
    add_legend(figure, axes)
    return figure


def _draw_differences(axes: Axes, runs: Sequence[tuple[np.ndarray, np.ndarray]], reference: int) -> None:
    """Each run's loss less the reference's, at the steps that both have."""
    steps, loss = runs[reference]
    inks = colours(len(runs))
    axes.axhline(0, color=inks[reference], linestyle=LINES[reference % len(LINES)], linewidth=1.2)
    for i, (own_steps, own) in enumerate(runs):
        if i != reference:
            shared, here, there = np.intersect1d(own_steps, steps, return_indices=True)
            colour, line = inks[i], LINES[i % len(LINES)]
            axes.plot(shared, own[here] - loss[there], color=colour, linestyle=line, linewidth=1.6)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the window around each point, the window cut at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    mean: np.ndarray = (total[high] - total[low]) / (high - low)
    return mean


def front(points: Sequence[Mapping[str, Any]], higher: bool) -> list[Mapping[str, Any]]:
    """The points of the Pareto front: none costs as little or less and is better, or costs less and is as good.

    Args:
        points: mappings with `x`, the cost, and `y`. higher: larger y are better.
    Returns:
        In the order of cost.
    """
    found: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["x"], -p["y"] if higher else p["y"])):
        if not found or (point["y"] > found[-1]["y"] if higher else point["y"] < found[-1]["y"]):
            found.append(point)
    return found


def trade_off(
    points: Sequence[Mapping[str, Any]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    higher: bool | None = None,
    size: tuple[float, float] = (7.6, 4.8),
) -> Figure:
    """What quality costs: one mark for each measurement, a line through those of one label, spread as bars.

    Args:
        points: mappings with `label`, `x`, `y`, and optionally `low` and `high`, the ends of the spread of y.
        higher: larger (True) or smaller (False) y are better, and the Pareto front is drawn; None: no front.
        size: width and height in inches; a long legend below comes on top of it.
    Raises:
        OptionError: no point.
        InstallError: matplotlib is missing.
    """
    if not points:
        raise OptionError("there is no point to draw.")
    figure = new_figure(*size)
    axes = figure.add_subplot()
    quiet(axes)
    if higher is not None:
        edge = front(points, higher)
        dearest = max(p["x"] for p in points)
        axes.step(
            [*(p["x"] for p in edge), dearest], [*(p["y"] for p in edge), edge[-1]["y"]], where="post", color="#8a8a8a",
            linewidth=1.2, linestyle=":", label="no cheaper one is better", zorder=1,
        )  # fmt: skip
    labels = list(dict.fromkeys(p["label"] for p in points))
    for i, (label, colour) in enumerate(zip(labels, colours(len(labels)), strict=True)):
        own = sorted((p for p in points if p["label"] == label), key=lambda p: p["x"])
        bars = [p for p in own if "low" in p and "high" in p]
        if bars:
            spread = [[p["y"] - p["low"] for p in bars], [p["high"] - p["y"] for p in bars]]
            axes.errorbar(
                [p["x"] for p in bars], [p["y"] for p in bars], yerr=spread, color=colour, linestyle="none",
                linewidth=1.3, capsize=3,
            )  # fmt: skip
        axes.plot(
            [p["x"] for p in own], [p["y"] for p in own], label=literal(label), color=colour, marker=mark(i),
            linestyle=LINES[i // len(MARKS) % len(LINES)], markersize=7, markeredgecolor="white", linewidth=1.3,
        )  # fmt: skip
    if log_x:
        log_scale(axes, "x")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=11)
    add_legend(figure, axes)
    return figure


def intervals(
    rows: Sequence[Mapping[str, Any]],
    *,
    x_label: str,
    title: str = "",
    reference: tuple[str, float] | None = None,
    width: float = 7.6,
) -> Figure:
    """One line for each contestant: a mark at the mean, a bar over its interval; the first row on top.

    Args:
        rows: mappings with `label` and `x`, optionally `low` and `high` (None: a mark alone), `marked` (filled marks;
            the others are hollow) and `values` (single runs, as small ticks).
        reference: (label, value) of a line to compare with.
        width: in inches; the height goes by the number of rows.
    Raises:
        OptionError: no row.
        InstallError: matplotlib is missing.
    """
    if not rows:
        raise OptionError("there is no row to draw.")
    figure = new_figure(width, 1.1 + 0.27 * len(rows))
    axes = figure.add_subplot()
    quiet(axes)
    if reference is not None:
        axes.axvline(reference[1], color=COLOURS[1], linestyle="--", linewidth=1.2, label=reference[0])
    for i, row in enumerate(rows):
        x, colour = row["x"], COLOURS[0]
        if row.get("low") is not None:
            axes.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=1.6, solid_capstyle="butt")
        values = row.get("values") or []
        axes.plot(values, [i] * len(values), linestyle="none", marker="|", markersize=9, color="#8a8a8a")
        face = colour if row.get("marked") else "white"
        axes.plot([x], [i], marker="o", markersize=7, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.5)
    axes.set_yticks(range(len(rows)), [literal(row["label"]) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(x_label)
    axes.set_title(title, loc="left", fontsize=11)
    if reference is not None:
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure
