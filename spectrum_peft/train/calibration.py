"""Rows of a task as `probe` takes them: what is to be learnt, as the cross-entropy of tokens or of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from .encoding import DataChoices
from .tasks import Task, limit_of

if TYPE_CHECKING:
    from datasets import Dataset


def calibration_rows(
    task: Task, rows: Dataset, tokenizer: Any, max_length: int | None, labels: Sequence[str], data: DataChoices
) -> tuple[Dataset, str]:
    """
    Of a pair the chosen answer says what is to be learnt; of answers with a judgement, those that are wanted.

    Returns:
        (rows, task as `calibration_batches` takes it).
    Raises:
        OptionError: the task's loss is no cross-entropy, or needs what the model writes.
    """
    if task.rewarded or task.head in ("several", "number", "reward"):
        raise OptionError(
            f"a probe measures the cross-entropy of tokens or of classes, and task {task.name!r} has another loss: take a mode "
            "and a criterion that need no gradients, or give --gradients of a probe on other rows."
        )
    if task.head == "tokens":
        return task.encode(rows, tokenizer, limit_of(tokenizer, max_length), labels, data), task.name
    if "label" in rows.column_names and task.head is None:
        rows = rows.filter(lambda row: row["label"]).remove_columns("label")
    if "chosen" in rows.column_names:
        rows = rows.remove_columns("rejected")
        rows = rows.rename_column("chosen", "completion" if "prompt" in rows.column_names else "messages")
    if task.relative:
        return rows, "causal_lm"
    return rows, task.name
