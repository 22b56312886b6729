"""The user's rows: read from files and the hub, brought into standard columns, with their labels.

datasets is imported inside functions: `--help` reads the names of columns without it.
"""

from __future__ import annotations

from .chat import IGNORED, LOSS_ON, check_loss_on, encode_row, render, through_template
from .counts import Cut, Doubt, Piece, RowCounts, count_rows, doubts_of, pieces_of, show_rows, without_silent
from .labels import label_ids, label_names
from .mixing import from_anywhere, read_rows, sources_of
from .rows import COLUMNS, read_dataset, select_columns
from .tokenizing import tokenizing

__all__ = [
    "COLUMNS",
    "IGNORED",
    "LOSS_ON",
    "Cut",
    "Doubt",
    "Piece",
    "RowCounts",
    "check_loss_on",
    "count_rows",
    "doubts_of",
    "encode_row",
    "from_anywhere",
    "label_ids",
    "label_names",
    "pieces_of",
    "read_dataset",
    "read_rows",
    "render",
    "select_columns",
    "show_rows",
    "sources_of",
    "through_template",
    "tokenizing",
    "without_silent",
]
