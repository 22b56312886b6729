"""What a run logged, as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InstallError
from ..records import write_text


def as_csv(log: Sequence[Mapping[str, Any]]) -> str:
    """The Trainer's `log_history`, one line for each entry; the columns in the order in which they first appear, step first."""
    columns = list(dict.fromkeys(["step", *(name for row in log for name in row)]))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    return out.getvalue()


def write_history(log: Sequence[Mapping[str, Any]], folder: Path, label: str) -> None:
    """`history.csv`, and `loss.png` where matplotlib is installed and at least two losses were logged."""
    write_text(folder / "history.csv", as_csv(log))
    losses = {row["step"]: float(row["loss"]) for row in log if "loss" in row and "step" in row}
    held_out = {row["step"]: float(row["eval_loss"]) for row in log if "eval_loss" in row and "step" in row}
    if len(losses) < 2:
        return
    from .. import plots

    run = {"label": label, "steps": list(losses), "loss": list(losses.values()), "held_out": held_out}
    try:
        plots.save(plots.curves([run]), folder / "loss.png")
    except InstallError:
        return
