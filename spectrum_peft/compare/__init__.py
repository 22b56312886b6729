"""The verb `compare`: a matrix of training runs on one task, each in a process of its own, and a report on them.

matrix   what was asked for -> contestants -> cells
runs     cells -> one folder each, run or found finished
results  the cells' numbers -> means with intervals, results.json, results.csv, results.md
page     the results -> pictures and report.html
cell     what one cell measures besides training
"""

from .cell import measure
from .matrix import KEYS, Comparison, read_comparison
from .results import as_markdown
from .runs import check_measures, list_cells, run_comparison

__all__ = [
    "KEYS", "Comparison", "as_markdown", "check_measures", "list_cells", "measure", "read_comparison", "run_comparison",
]  # fmt: skip
