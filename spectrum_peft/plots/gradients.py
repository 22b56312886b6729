"""How alike the gradients of blocks are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import OptionError
from ..records import GradientReport
from .style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def similarities(report: GradientReport) -> Figure:
    """How alike the gradients of the blocks are: for each kind (across) both tables, `subspace` above and `cosine` below.

    The diagonal, 1 by definition, is left out of the colours, so that a row's scale is that of what differs.
    Raises:
        OptionError: the report holds no similarities.
    """
    tables = report.similarities
    if not tables:
        raise OptionError("the report holds no similarities; probe with directions above 0.")
    figure = new_figure(1.0 + 1.75 * len(tables), 4.4)
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
