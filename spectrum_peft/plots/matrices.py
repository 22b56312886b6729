"""Singular values of one matrix, and the singular components that plans chose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import OptionError
from ..records import Plan
from .style import COLOURS, LINES, colours, literal, new_figure, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class SpectrumLike(Protocol):
    """What `scan.spectrum_of` returns: the singular values of one matrix, descending, and two edges."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def values(self) -> Any: ...
    @property
    def published_edge(self) -> float: ...
    @property
    def marchenko_pastur_edge(self) -> float: ...


def spectrum(matrix: SpectrumLike) -> Figure:
    """The singular values of one matrix in descending order and as a histogram, with both edges drawn in.

    Raises:
        InstallError: matplotlib is missing.
    """
    values = np.asarray(matrix.values, dtype=np.float64)
    edges = {"Marchenko-Pastur edge": matrix.marchenko_pastur_edge, "published edge": matrix.published_edge}
    figure = new_figure(8.6, 4.2)
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 1), wspace=0.03)
    curve = figure.add_subplot(grid[0])
    bars = figure.add_subplot(grid[1], sharey=curve)
    curve.plot(np.arange(1, len(values) + 1), values, color="black", linewidth=1.6)
    span = (values.min(), values.max()) if values.max() > values.min() else (values.max() - 0.5, values.max() + 0.5)
    bars.hist(values, bins=min(80, max(10, len(values) // 8)), range=span, orientation="horizontal", color="#9a9a9a")
    for (label, edge), colour, line in zip(edges.items(), COLOURS, ("--", "-."), strict=False):
        if not math.isfinite(edge):
            continue
        above = int((values > edge).sum())
        text = f"{label} {edge:.4g}: {above} of {len(values)} above"
        curve.axhline(edge, color=colour, linestyle=line, linewidth=1.5, label=text)
        bars.axhline(edge, color=colour, linestyle=line, linewidth=1.5)
    for axes in (curve, bars):
        quiet(axes)
    curve.set_xlim(0, len(values) + 1)
    curve.set_ylim(0, 1.04 * span[1])
    curve.set_xlabel("index")
    curve.set_ylabel("singular value")
    bars.set_xlabel("count")
    bars.tick_params(labelleft=False)
    curve.legend(frameon=False, fontsize=9, loc="upper right")
    rows, columns = matrix.shape
    figure.suptitle(f"{matrix.name}  ({rows} x {columns})", x=0.01, ha="left", fontsize=11)
    return figure


def chosen_components(plan: Plan) -> dict[str, tuple[int, ...]]:
    """{matrix: indexes of its singular components that train} of a plan that chooses components.

    Raises:
        OptionError: the plan chooses none; the message gives its mode.
    """
    chosen = {e.name: e.components for e in plan.entries if e.trains and e.components}
    if not chosen:
        raise OptionError(f"the plan is of mode {plan.mode!r} and chooses no singular components; mode 'lorsa' does.")
    return chosen


def component_overlap(one: Plan, other: Plan) -> float:
    """Share of the chosen components that two plans have in common, in [0, 1], over the matrices that both choose.

    By chance it is about n / k, where each takes n components of the k that were looked at.

    Raises:
        OptionError: a plan chooses no components, or the two have no matrix in common.
    """
    a, b = chosen_components(one), chosen_components(other)
    both = sorted(a.keys() & b.keys())
    if not both:
        raise OptionError("the two plans choose components of no matrix that is the same.")
    common = sum(len(set(a[name]) & set(b[name])) for name in both)
    return 2 * common / sum(len(a[name]) + len(b[name]) for name in both)


def components(plans: Mapping[str, Plan], *, bins: int = 32) -> Figure:
    """Which singular components plans chose: a histogram of their indexes for each kind, and the overlap of each two plans.

    A curve shows, for each range of indexes, the share of the components there that the plan took, over the blocks; 0 is the
    largest singular value. Grey: the share that a choice by chance would take.

    Args:
        plans: {label: plan}; of one base model, or the kinds and indexes mean nothing to each other.
        bins: ranges that the indexes below `svd_rank` are put into.
    Raises:
        OptionError: no plan, or one that chooses no components.
        InstallError: matplotlib is missing.
    """
    if not plans:
        raise OptionError("there is no plan to draw.")
    chosen = {label: chosen_components(plan) for label, plan in plans.items()}
    entries = {name: e for plan in plans.values() for name, e in plan.by_name.items()}
    kinds = sorted({entries[name].kind for found in chosen.values() for name in found})
    looked_at = {name: _looked_at(plan, name) for plan in plans.values() for name in chosen_components(plan)}
    several = len(plans) > 1
    inks = colours(len(plans))
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = new_figure(4.0 * columns + (3.6 if several else 0.6), 2.4 * rows + 0.9)
    grid = figure.add_gridspec(rows, columns + several, width_ratios=[1.0] * columns + [0.9] * several)
    for n, kind in enumerate(kinds):
        axes = figure.add_subplot(grid[n // columns, n % columns])
        quiet(axes)
        members = [name for name in looked_at if entries[name].kind == kind]
        reach = max(looked_at[name] for name in members)
        edges = np.linspace(0, reach, min(bins, reach) + 1)
        for i, (label, found) in enumerate(chosen.items()):
            mine = [name for name in members if name in found]
            if not mine:
                continue
            taken, _ = np.histogram([c for name in mine for c in found[name]], edges)
            there, _ = np.histogram([c for name in mine for c in range(looked_at[name])], edges)
            axes.stairs(
                taken / np.maximum(there, 1), edges, label=literal(label), color=inks[i],
                linestyle=LINES[i % len(LINES)], linewidth=1.6,
            )  # fmt: skip
        chance = [len(f[name]) / looked_at[name] for f in chosen.values() for name in members if name in f]
        axes.axhline(float(np.mean(chance)), color="#9a9a9a", linewidth=1.0)
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_xlim(0, reach)
        axes.set_ylim(0, 1.04)
        if n % columns == 0:
            axes.set_ylabel("share taken")
        if n // columns == rows - 1 or n + columns >= len(kinds):
            axes.set_xlabel("index of the component")
        if n == 0:
            axes.legend(frameon=False, fontsize=8)
    if several:
        _draw_overlap(figure.add_subplot(grid[:, -1]), plans)
    return figure


def _looked_at(plan: Plan, name: str) -> int:
    """How many components of a matrix the plan could choose from."""
    shape = plan.by_name[name].shape
    k = int(plan.options["svd_rank"])
    return min(k, *shape) if shape else k


def _draw_overlap(axes: Axes, plans: Mapping[str, Plan]) -> None:
    labels = [literal(label) for label in plans]
    table = np.array([[component_overlap(a, b) for b in plans.values()] for a in plans.values()])
    axes.imshow(table, vmin=0, vmax=1, cmap="cividis")
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title("components in common", loc="left", fontsize=10)
