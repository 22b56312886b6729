"""The verb `compare`: a matrix of training runs on one task, each in a process of its own, and a report on them.

settings    what was asked for, checked
matrix      -> contestants -> cells
runs        -> one folder each, run or found finished      cell     what one of them measures besides training
outcome     how one ended
results     -> rows, means over seeds                      statistics   intervals, and what is told apart
figures     their names, units and order
report      -> results.json, .csv, .md and report.html     page     its pictures and the page
"""

from .cell import measure, read_cell
from .figures import as_markdown
from .reading import read_comparison
from .runs import check_measures, list_cells, run_comparison
from .settings import KEYS, Comparison

__all__ = [
    "KEYS", "Comparison", "as_markdown", "check_measures", "list_cells", "measure", "read_cell", "read_comparison",
    "run_comparison",
]  # fmt: skip
