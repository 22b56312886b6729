"""Figures, from records and plain numbers only. matplotlib is imported inside the functions.

Every function returns a `matplotlib.figure.Figure` that belongs to no window and no global state; `save` writes it.
The colours are told apart by readers with any colour vision (cividis; Okabe and Ito 2008), and nothing rests on colour
alone.
"""

from .gradients import similarities
from .matrices import SpectrumLike, chosen_components, component_overlap, components, spectrum
from .report import heat_map, ranks_within_rows
from .runs import curves, front, intervals, trade_off
from .style import FORMATS, colours, log_scale, require_matplotlib, save

__all__ = [
    "FORMATS", "SpectrumLike", "chosen_components", "colours", "component_overlap", "components", "curves", "front", "heat_map",
    "intervals", "log_scale", "ranks_within_rows", "require_matplotlib", "save", "similarities", "spectrum", "trade_off",
]  # fmt: skip
