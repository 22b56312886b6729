"""Several datasets as one, mixed by weights: `chat.jsonl, code.parquet=2, web.txt=0.1`."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .rows import read_dataset, select_columns

if TYPE_CHECKING:
    from datasets import Dataset


def sources_of(text: str) -> list[tuple[str, float]]:
    """(dataset, weight) of each part of a mixture; one part where the whole is the name of a file or of a dataset.

    Raises:
        DataError: a weight that is no number above 0, an empty part.
    """
    if Path(text).exists() or ("," not in text and "=" not in text):
        return [(text, 1.0)]
    found = []
    for part in text.split(","):
        name, equals, weight = part.strip().rpartition("=")
        name = name.strip() if equals else part.strip()
        try:
            number = float(weight) if equals else 1.0
        except ValueError:
            number = math.nan
        if not name or not 0 < number < math.inf:
            raise DataError(f"{text}: {part.strip()!r} is no dataset with a weight, wanted NAME or NAME=2.5.")
        found.append((name, number))
    return found


def from_anywhere(text: str) -> str:
    """The same mixture with the full paths of its files, for a process that works in another folder."""
    found = [(str(Path(name).resolve()) if Path(name).exists() else name, weight) for name, weight in sources_of(text)]
    return found[0][0] if found[0][1] == 1 and len(found) == 1 else ",".join(f"{n}={w:g}" for n, w in found)


def read_rows(text: str, split: str, task: str, renamed: Mapping[str, str] | None = None, seed: int = 0) -> Dataset:
    """The rows of a dataset, or of a mixture of several, in the standard columns of a task.

    Args:
        text: as `sources_of` reads it. A weight says how often each row of its dataset is taken: 2 is twice, 0.5 is every
            second row, drawn at random.
        seed: of the draw.
    Raises:
        DataError: as `read_dataset` and `select_columns`; datasets that have no common format.
    """
    import datasets

    parts = []
    for name, weight in sources_of(text):
        rows = select_columns(read_dataset(name, split), task, name, renamed)
        parts.append((name, _taken(rows, weight, seed)))
    if len(parts) == 1:
        return parts[0][1]
    formats = {frozenset(rows.column_names) & {"messages", "prompt", "text"} for _, rows in parts}
    if len(formats) > 1 and not any("text" in columns for columns in formats):
        parts = [(name, _as_messages(rows)) for name, rows in parts]
    first, columns = parts[0][0], set(parts[0][1].column_names)
    for name, rows in parts[1:]:
        if set(rows.column_names) != columns:
            raise DataError(
                f"{name}: has {sorted(rows.column_names)} and {first} has {sorted(columns)}; texts, conversations and rows "
                "of other tasks are not mixed."
            )
    return datasets.concatenate_datasets([rows for _, rows in parts]).shuffle(seed=seed)


def _taken(rows: Dataset, weight: float, seed: int) -> Dataset:
    if weight == 1:
        return rows
    whole, rest = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(len(rows)), round(rest * len(rows)))
    return rows.select([*range(len(rows))] * int(whole) + sorted(drawn))


def _as_messages(rows: Dataset) -> Dataset:
    if "messages" in rows.column_names:
        return rows

    def turns(row: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(row["prompt"], str):
            return {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
        return {"messages": [*row["prompt"], *row["completion"]]}

    return rows.map(turns, remove_columns=rows.column_names)
