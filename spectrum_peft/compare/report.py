"""The files of a comparison.

results.json   machine, versions, commit, config, every cell, every contestant
results.csv    one line for each cell
results.md     the table of contestants
plots/         the pictures
report.html    all of it in one file
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import finite_only, write_text
from .figures import as_csv, as_markdown
from .page import draw, html


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """Write all files of a comparison, each whole or not at all."""
    write_text(output / "results.json", json.dumps(finite_only(results), indent=1, allow_nan=False) + "\n")
    write_text(output / "results.csv", as_csv(results))
    write_text(output / "results.md", as_markdown(results))
    pictures = draw(results, output / "plots")
    write_text(output / "report.html", html(results, pictures))
