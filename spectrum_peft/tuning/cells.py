"""The runs of a tune as cells of a comparison: how one is made, run and forgotten."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..compare.matrix import Cell, file_digest
from ..compare.runs import run_cell, scans_for
from ..compare.settings import Comparison
from .prices import Price
from .queue import Task
from .settings import Asked
from .splits import Sets


@dataclass(frozen=True)
class Cells:
    """What all runs of a tune have in common.

    Attributes:
        identity: digest of the weights.
        compared: contestants as mappings -> a comparison of them, as the report takes it.
    """

    asked: Asked
    identity: str
    sets: Sets
    compared: Callable[..., Comparison]
    announce: Callable[[str], None]

    def make(self, price: Price, task: Task, steps: int, *, final: bool = False) -> Cell:
        """A run of the race, judged on the search rows; one of the finals on the evaluation rows, too."""
        asked = self.asked
        left_out = ("eval_dataset", "eval_split", "dataset_split", "num_train_epochs", "max_steps", "report")
        shared = {
            k: v for k, v in asked.train.items() if v is not None and k not in left_out and not k.endswith("_column")
        }
        own = {**price.contestant.settings, **price.settings, "learning_rate": task.rate}
        train = {
            **shared, **own, "task": asked.task, "dataset": self.sets.train, "max_steps": steps, "seed": task.seed,
        }  # fmt: skip
        sets = [("search", self.sets.search, False)] + ([("evaluation", self.sets.evaluation, True)] if final else [])
        measure = {
            "scores": [
                {
                    "name": name, "dataset": file, "metric": asked.metric, "max_new_tokens": asked.values["max_new_tokens"],
                    "shown": shown,
                }
                for name, file, shown in sets
            ]
        }  # fmt: skip
        inputs = {"model": self.identity, "dataset": file_digest(self.sets.train) or ""}
        contestant = replace(price.contestant, settings=own)
        until = None if final else task.until
        return Cell(price.contestant.label, task.seed, train, (), measure, inputs, contestant, until)

    def run(self, cell: Cell, keep: bool = False) -> tuple[dict[str, Any] | None, str | None]:
        one = self.compared([], keep_models=keep)
        outcome = run_cell(one, cell, self._scans([cell], one))
        return outcome.results, outcome.error

    def forget(self, cell: Cell) -> None:
        """Remove a run's checkpoints."""
        shutil.rmtree(self.asked.output / "cells" / cell.folder / "model", ignore_errors=True)

    def _scans(self, cells: Sequence[Cell], one: Comparison) -> dict[str, Path]:
        from filelock import FileLock

        with FileLock(self.asked.output / "scans" / ".lock"):
            return scans_for(one, cells, self.announce)
