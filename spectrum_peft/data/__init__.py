"""The user's rows: read from files and the hub, brought into standard columns, with their labels.

datasets is imported inside functions: `--help` reads the names of columns without it.
"""

from __future__ import annotations

from .labels import label_ids, label_names
from .rows import COLUMNS, IGNORED, read_dataset, select_columns

__all__ = [
    "COLUMNS",
    "IGNORED",
    "label_ids",
    "label_names",
    "read_dataset",
    "select_columns",
]
