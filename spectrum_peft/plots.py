"""Figures, from records and plain numbers only. matplotlib is imported inside the functions.

Every function returns a `matplotlib.figure.Figure` that belongs to no window and no global state; `save` writes it.
The colours are told apart by readers with any colour vision (cividis; Okabe and Ito 2008), and nothing rests on colour
alone.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import names
from .errors import CheckpointError, InstallError, OptionError, near_matches
from .records import GradientReport, Plan, SnrReport, move_over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# After those, of Tol's muted scheme what lies furthest from them (https://sronpersonalpages.nl/~pault/).
_MORE_COLOURS = ("#882255", "#999933", "#332288", "#7f7f7f", "#44AA99")
_LINES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_INFINITE: dict[str, Any] = {"facecolor": "#d9d9d9", "edgecolor": "#6b6b6b", "hatch": "////"}
_CELL = 0.32  # inches
_DPI = 160
_SHORT_LEGEND = 5  # lines
_MANY_POINTS = 20  # of a curve, above which its running mean is drawn over it


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


def require_matplotlib() -> None:
    """Raise an InstallError with the install line unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InstallError('plots need matplotlib: pip install "spectrum-peft[plot]".') from error


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Figure, axes: Axes) -> None:
    """Inside the axes while it is short; else below them, where it hides nothing."""
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) <= _SHORT_LEGEND and figure.get_figwidth() > 6:
        axes.legend(frameon=False, fontsize=9)
        return
    # A letter of eight points is about a sixteenth of an inch wide, and a line's mark as wide as six letters.
    columns = 2 if 2 * (max(map(len, labels)) + 6) <= 16 * figure.get_figwidth() else 1
    figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(labels) / columns))
    figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=8)


def colours(n: int) -> list[str]:
    """One colour for each of n labels, no two alike: chosen ones for up to twelve, points of a scale for more."""
    chosen = [*_COLOURS, *_MORE_COLOURS]
    if n <= len(chosen):
        return chosen[:n]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["turbo"](x)) for x in np.linspace(0, 1, n)]


def _mark(i: int) -> str:
    """Of the i-th label: the marks repeat after seven, and the line must then be another one."""
    return _MARKS[(i + i // len(_MARKS)) % len(_MARKS)]


def log_scale(axes: Axes, which: str) -> None:
    """A logarithmic axis (`x` or `y`) whose ticks are few and plain numbers: 20k, 1M, 7B; 0.01, 0.1, 1.

    Over less than two decades the ticks are 1, 2 and 5 of each, else the powers of ten.
    """
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low >= 100 else (1.0, 2.0, 5.0)))
    large = EngFormatter(sep="")
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: large(value).replace("G", "B") if value >= 1000 else f"{value:g}")
    )
    axis.set_minor_formatter(NullFormatter())


def _quiet(axes: Axes) -> None:
    """Take away the frame lines that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure, whole or not at all; the format goes by the ending: `.png`, `.pdf`, `.svg`.

    Raises:
        OptionError: another ending.
        CheckpointError: the folder cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"{path}: a picture ends in one of {', '.join(FORMATS)}, not in {path.suffix!r}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / path.name
            # Without a date the same figure gives the same bytes.
            stamp = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix.lower())
            figure.savefig(part, dpi=_DPI, metadata=stamp)
            move_over(part, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}).") from error
    return path


# --- a report --------------------------------------------------------------------------------------------------------


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

    figure = _figure(2.7 + _CELL * max(len(blocks), 12), 1.45 + _CELL * len(kinds))
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
        legend.append(_words(f"{outside} scored outside the blocks: not shown"))
    if legend:
        figure.legend(handles=legend, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    return figure


def _literal(text: str) -> str:
    """A user's name for a picture, where a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _words(text: str) -> Any:
    """A legend line without a mark."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=text)


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


# --- one matrix ------------------------------------------------------------------------------------------------------


def spectrum(matrix: SpectrumLike) -> Figure:
    """The singular values of one matrix in descending order and as a histogram, with both edges drawn in.

    Raises:
        InstallError: matplotlib is missing.
    """
    values = np.asarray(matrix.values, dtype=np.float64)
    edges = {"Marchenko-Pastur edge": matrix.marchenko_pastur_edge, "published edge": matrix.published_edge}
    figure = _figure(8.6, 4.2)
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 1), wspace=0.03)
    curve = figure.add_subplot(grid[0])
    bars = figure.add_subplot(grid[1], sharey=curve)
    curve.plot(np.arange(1, len(values) + 1), values, color="black", linewidth=1.6)
    span = (values.min(), values.max()) if values.max() > values.min() else (values.max() - 0.5, values.max() + 0.5)
    bars.hist(values, bins=min(80, max(10, len(values) // 8)), range=span, orientation="horizontal", color="#9a9a9a")
    for (label, edge), colour, line in zip(edges.items(), _COLOURS, ("--", "-."), strict=False):
        if not math.isfinite(edge):
            continue
        above = int((values > edge).sum())
        text = f"{label} {edge:.4g}: {above} of {len(values)} above"
        curve.axhline(edge, color=colour, linestyle=line, linewidth=1.5, label=text)
        bars.axhline(edge, color=colour, linestyle=line, linewidth=1.5)
    for axes in (curve, bars):
        _quiet(axes)
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


# --- components ------------------------------------------------------------------------------------------------------


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
    figure = _figure(4.0 * columns + (3.6 if several else 0.6), 2.4 * rows + 0.9)
    grid = figure.add_gridspec(rows, columns + several, width_ratios=[1.0] * columns + [0.9] * several)
    for n, kind in enumerate(kinds):
        axes = figure.add_subplot(grid[n // columns, n % columns])
        _quiet(axes)
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
                taken / np.maximum(there, 1), edges, label=_literal(label), color=inks[i],
                linestyle=_LINES[i % len(_LINES)], linewidth=1.6,
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
    labels = [_literal(label) for label in plans]
    table = np.array([[component_overlap(a, b) for b in plans.values()] for a in plans.values()])
    axes.imshow(table, vmin=0, vmax=1, cmap="cividis")
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title("components in common", loc="left", fontsize=10)


# --- gradients -------------------------------------------------------------------------------------------------------


def similarities(report: GradientReport) -> Figure:
    """How alike the gradients of the blocks are: for each kind (across) both tables, `subspace` above and `cosine` below.

    The diagonal, 1 by definition, is left out of the colours, so that a row's scale is that of what differs.
    Raises:
        OptionError: the report holds no similarities.
    """
    tables = report.similarities
    if not tables:
        raise OptionError("the report holds no similarities; probe with directions above 0.")
    figure = _figure(1.0 + 1.75 * len(tables), 4.4)
    grid = figure.subplots(2, len(tables), squeeze=False)
    for row, which in enumerate(("subspace", "cosine")):
        values = [np.array(getattr(t, which), dtype=float) for t in tables]
        for table in values:
            np.fill_diagonal(table, np.nan)
        high = max(float(np.nanmax(np.abs(table))) for table in values)
        low = 0.0 if which == "subspace" else -high
        image = None
        for axes, table, record in zip(grid[row], values, tables, strict=True):
            colours = "cividis" if which == "subspace" else "coolwarm"
            image = axes.imshow(table, vmin=low, vmax=high, cmap=colours, interpolation="nearest")
            if row == 0:
                axes.set_title(f"{record.kind.rpartition('.')[2]}\n({record.side} side)", fontsize=9)
            axes.tick_params(labelsize=7)
        grid[row][0].set_ylabel(f"{which}\nblock", fontsize=9)
        bar = figure.colorbar(image, ax=list(grid[row]), fraction=0.02, pad=0.01)  # type: ignore[arg-type]
        bar.ax.tick_params(labelsize=7)
    for axes in grid[1]:
        axes.set_xlabel("block", fontsize=8)
    return figure


# --- runs ------------------------------------------------------------------------------------------------------------


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
    figure = _figure(*size)
    from matplotlib.ticker import MaxNLocator

    axes, below = figure.add_subplot(), None
    if reference is not None:
        figure.clear()
        figure.set_figheight(size[1] * 1.45)
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.6))
        _quiet(below)
    _quiet(axes)
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
        colour, line = inks[i], _LINES[i % len(_LINES)]
        if len(loss) > _MANY_POINTS:
            axes.plot(steps, loss, color=colour, alpha=0.25, linewidth=0.8)
            loss = _running_mean(loss, max(len(loss) // 20, 5))
        smoothed.append((steps, loss))
        last = f": {loss[-1]:.4g} at the end" if len(loss) else ""
        axes.plot(steps, loss, color=colour, linestyle=line, linewidth=1.9, label=_literal(f"{label}{last}"))
        if held_out := run.get("held_out"):
            axes.plot(
                list(held_out), list(held_out.values()), linestyle="none", marker=_mark(i), markerfacecolor="none",
                # Hollow and of several sizes: those of one height stay to be seen.
                markeredgecolor=colour, markeredgewidth=1.8, markersize=8 + 3 * (i % 3),
                label=_literal(f"{run['label']}, held out"),
            )  # fmt: skip
    if below is not None:
        _draw_differences(below, smoothed, labels.index(reference))
        below.set_ylabel(f"above {_literal(str(reference).partition(' (')[0])}")
    lowest = axes if below is None else below
    lowest.set_xlabel("step")
    lowest.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=11)
    _legend(figure, axes)
    return figure


def _draw_differences(axes: Axes, runs: Sequence[tuple[np.ndarray, np.ndarray]], reference: int) -> None:
    """Each run's loss less the reference's, at the steps that both have."""
    steps, loss = runs[reference]
    inks = colours(len(runs))
    axes.axhline(0, color=inks[reference], linestyle=_LINES[reference % len(_LINES)], linewidth=1.2)
    for i, (own_steps, own) in enumerate(runs):
        if i != reference:
            shared, here, there = np.intersect1d(own_steps, steps, return_indices=True)
            colour, line = inks[i], _LINES[i % len(_LINES)]
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
    figure = _figure(*size)
    axes = figure.add_subplot()
    _quiet(axes)
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
            [p["x"] for p in own], [p["y"] for p in own], label=_literal(label), color=colour, marker=_mark(i),
            linestyle=_LINES[i // len(_MARKS) % len(_LINES)], markersize=7, markeredgecolor="white", linewidth=1.3,
        )  # fmt: skip
    if log_x:
        log_scale(axes, "x")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=11)
    _legend(figure, axes)
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
    figure = _figure(width, 1.1 + 0.27 * len(rows))
    axes = figure.add_subplot()
    _quiet(axes)
    if reference is not None:
        axes.axvline(reference[1], color=_COLOURS[1], linestyle="--", linewidth=1.2, label=reference[0])
    for i, row in enumerate(rows):
        x, colour = row["x"], _COLOURS[0]
        if row.get("low") is not None:
            axes.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=1.6, solid_capstyle="butt")
        values = row.get("values") or []
        axes.plot(values, [i] * len(values), linestyle="none", marker="|", markersize=9, color="#8a8a8a")
        face = colour if row.get("marked") else "white"
        axes.plot([x], [i], marker="o", markersize=7, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.5)
    axes.set_yticks(range(len(rows)), [_literal(row["label"]) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(x_label)
    axes.set_title(title, loc="left", fontsize=11)
    if reference is not None:
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure
