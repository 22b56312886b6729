"""What all pictures share: colours, marks, axes, legends, and how one is written. matplotlib is imported inside the functions."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, InstallError, OptionError
from ..records import move_over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# After those, of Tol's muted scheme what lies furthest from them (https://sronpersonalpages.nl/~pault/).
_MORE_COLOURS = ("#882255", "#999933", "#332288", "#7f7f7f", "#44AA99")
LINES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 160
_SHORT_LEGEND = 5  # lines


def require_matplotlib() -> None:
    """Raise an InstallError with the install line unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InstallError('plots need matplotlib: pip install "spectrum-peft[plot]".') from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def add_legend(figure: Figure, axes: Axes) -> None:
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
    chosen = [*COLOURS, *_MORE_COLOURS]
    if n <= len(chosen):
        return chosen[:n]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["turbo"](x)) for x in np.linspace(0, 1, n)]


def mark(i: int) -> str:
    """Of the i-th label: the marks repeat after seven, and the line must then be another one."""
    return MARKS[(i + i // len(MARKS)) % len(MARKS)]


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


def quiet(axes: Axes) -> None:
    """Take away the frame lines that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def literal(text: str) -> str:
    """A user's name for a picture, where a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def words(text: str) -> Any:
    """A legend line without a mark."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=text)


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
