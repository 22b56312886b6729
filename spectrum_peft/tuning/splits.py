"""The three sets of a tune: rows that train, rows that the search judges by, rows that are looked at once, at the end."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..records import move_over, read_mapping, write_text
from .settings import FEWEST_ROWS, MOST_SEARCH_ROWS

_SHARE = 10  # % of the rows, for each of the sets that are carved


@dataclass(frozen=True)
class Sets:
    """Files in the standard columns of the task, and their rows.

    Attributes:
        carved: the evaluation rows are of the training set, since no others were given.
    """

    train: str
    search: str
    evaluation: str
    train_rows: int
    search_rows: int
    evaluation_rows: int
    carved: bool


def carve(rows: Any, evaluation: Any, folder: Path, source: str, search_rows: int | None = None) -> Sets:
    """Write the sets, or find them written; drawn at random with a fixed seed, each class with a row to train on.

    Args:
        rows: training rows, standard columns. evaluation: rows, or None where none were given.
        search_rows: how many the search judges by; None for a tenth, at least 16 and at most 200.
    Raises:
        DataError: too few rows.
    """
    index = folder / "sets.json"
    if index.is_file():
        return Sets(**read_mapping(index))
    count = len(rows)
    held = search_rows or min(MOST_SEARCH_ROWS, max(FEWEST_ROWS, count * _SHARE // 100))
    last = 0 if evaluation is not None else max(FEWEST_ROWS, count * _SHARE // 100)
    wanted = 2 * held + last
    if count < wanted:
        what = f"{held} that the search judges by"
        what += f", {last} for the end (--eval-dataset gives others)" if last else ""
        raise DataError(
            f"{source}: has {count} rows, too few to split: {what}, and at least {held} to train on are {wanted}."
        )
    taken = _draw(rows, held + last)
    parts = {"search": rows.select(sorted(taken[:held]))}
    parts["evaluation"] = evaluation if evaluation is not None else rows.select(sorted(taken[held:]))
    parts["train"] = rows.select(sorted(set(range(count)) - set(taken)))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        part.to_parquet(str(folder / f"{name}.part"))
        move_over(folder / f"{name}.part", folder / f"{name}.parquet")
    files = {name: str((folder / f"{name}.parquet").resolve()) for name in parts}
    sizes = {f"{name}_rows": len(part) for name, part in parts.items()}
    found = Sets(**files, **sizes, carved=evaluation is None)
    write_text(index, json.dumps(asdict(found), indent=1) + "\n")
    return found


def _draw(rows: Any, count: int) -> list[int]:
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    if "label" not in rows.column_names:
        return order[:count]
    labels = rows["label"]
    left = Counter(labels)
    taken: list[int] = []
    for i in order:
        if len(taken) < count and left[labels[i]] > 1:
            left[labels[i]] -= 1
            taken.append(i)
    return taken
