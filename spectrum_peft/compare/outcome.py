"""How a cell ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .matrix import Cell


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        results: of `cell_results.json`; None where it failed.
        error: last line of its log that says what was wrong.
        log: file with all that it printed.
    """

    cell: Cell
    results: dict[str, Any] | None
    error: str | None
    log: Path
