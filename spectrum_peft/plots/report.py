"""A report, and what a plan chose of it: block by kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import names
from ..errors import OptionError
from ..records import Plan, SnrReport
from .style import new_figure, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INFINITE: dict[str, Any] = {"facecolor": "#d9d9d9", "edgecolor": "#6b6b6b", "hatch": "////"}
_CELL = 0.32  # inches


def heat_map(report: SnrReport, plan: Plan | None = None) -> Figure:
    """How high each matrix scores among those of its kind, by block (across) and kind (down); what the plan chose has a dot.

    Scores of different kinds cannot be compared: a kind's shape alone moves them by factors. The colour is therefore the
    rank of a score within its row, from the lowest to the highest, equal ones alike. Several matrices of one kind in one block
    (experts) share a cell: their mean score, marked where any is chosen. Infinite scores are hatched, zeros say so, what has
    no score stays white. Dots of adapters grow with the rank.

    Raises:
        OptionError: the report has no score in a block.
        MismatchError: the plan is of another checkpoint.
        InstallError: matplotlib is missing.
    """
    if plan is not None and plan.fingerprint is not None:
        plan.fingerprint.check(report.fingerprint, this="the plan", that="the report")
    cells: dict[tuple[str, int], list[float]] = {}
    outside = 0
    for stat in report.stats:
        if stat.score is None:
            continue
        block = names.block_index(stat.name)
        if block is None:
            outside += 1
            continue
        cells.setdefault((stat.kind.partition("[")[0], block), []).append(stat.score)
    if not cells:
        raise OptionError("the report has no score inside a block: there is nothing to draw.")
    kinds = sorted({kind for kind, _ in cells})
    blocks = sorted({block for _, block in cells})
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for (kind, block), scores in cells.items():
        grid[kinds.index(kind), blocks.index(block)] = sum(scores) / len(scores)

    figure = new_figure(2.7 + _CELL * max(len(blocks), 12), 1.45 + _CELL * len(kinds))
    axes = figure.add_subplot()
    _colour_cells(figure, axes, grid, report.criterion)
    legend = _special_cells(axes, grid)
    if plan is not None:
        legend += _mark_chosen(axes, plan, kinds, blocks)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if len(blocks) / s <= 45)
    axes.set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]], fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    model = report.model_id or "model"
    if Path(model).is_absolute():  # a folder: where it lies says nothing
        model = Path(model).name
    title = f"{model}: scores, each kind by itself"
    if plan is not None:
        matrices = [e for e in plan.entries if e.action != "save"]
        title += f"; {plan.mode} trains {sum(e.trains for e in matrices)} of {len(matrices)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if outside:
        legend.append(words(f"{outside} scored outside the blocks: not shown"))
    if legend:
        figure.legend(handles=legend, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    return figure


def _colour_cells(figure: Figure, axes: Axes, grid: np.ndarray, criterion: str) -> None:
    shown = np.ma.masked_invalid(ranks_within_rows(grid))
    image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="equal")
    axes.set_xticks(np.arange(grid.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(grid.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    beside = axes.inset_axes((1 + 0.4 / grid.shape[1], 0, 0.5 / grid.shape[1], 1))
    bar = figure.colorbar(image, cax=beside)
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1], labels=["lowest", "middle", "highest"])
    bar.set_label(f"place within its kind\n({criterion})", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def ranks_within_rows(grid: np.ndarray) -> np.ndarray:
    """0 for the lowest number of each row and 1 for its highest, evenly between; equal ones share the mean of their places.

    Args:
        grid: (rows, columns) float64. NaN and infinite cells have no rank: NaN.
    """
    ranks = np.full(grid.shape, np.nan)
    for row, values in enumerate(grid):
        finite = np.isfinite(values)
        known = np.sort(values[finite])
        if known.size:
            places = np.searchsorted(known, values[finite]) + np.searchsorted(known, values[finite], side="right") - 1
            ranks[row, finite] = places / 2 / max(known.size - 1, 1) if known.size > 1 else 0.5
    return ranks


def _special_cells(axes: Axes, grid: np.ndarray) -> list[Any]:
    """Hatch infinite scores and label zeros; returns what the legend needs."""
    from matplotlib.patches import Patch, Rectangle

    infinite = np.argwhere(np.isposinf(grid))
    for row, column in infinite:
        corner = (column - 0.46, row - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, linewidth=0, **_INFINITE))
    for row, column in np.argwhere(grid == 0):
        axes.text(column, row + 0.36, "0", ha="center", va="center", fontsize=6, color="#444444")
    return [Patch(label=f"infinite ({len(infinite)})", **_INFINITE)] if len(infinite) else []


def _mark_chosen(axes: Axes, plan: Plan, kinds: Sequence[str], blocks: Sequence[int]) -> list[Any]:
    """A dot on every chosen cell; returns what the legend needs, one line for each rank."""
    from matplotlib.lines import Line2D

    ranks: dict[tuple[int, int], int] = {}
    for entry in plan.entries:
        block = names.block_index(entry.name)
        if entry.trains and entry.kind in kinds and block in blocks:
            cell = (kinds.index(entry.kind), blocks.index(block))
            ranks[cell] = max(ranks.get(cell, 0), entry.rank or 0)
    highest = max(ranks.values(), default=0)
    legend: list[Any] = []
    for rank in sorted(set(ranks.values()), reverse=True):
        size = 6.5 * math.sqrt(rank / highest) if highest else 6.5
        at = [(column, row) for (row, column), r in sorted(ranks.items()) if r == rank]
        style: dict[str, Any] = {
            "linestyle": "none", "marker": "o", "markersize": max(size, 2.5), "markerfacecolor": "white",
            "markeredgecolor": "black", "markeredgewidth": 1.0,
        }  # fmt: skip
        label = f"chosen, rank {rank}" if rank else "chosen"
        axes.plot([x for x, _ in at], [y for _, y in at], label=label, **style)
        legend.append(Line2D([], [], label=f"{label} ({len(at)})", **style))
    return legend
