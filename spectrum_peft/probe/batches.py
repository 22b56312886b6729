"""Rows of a dataset become calibration batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import IGNORED, encode_row, label_ids, label_names, select_columns, tokenizing
from ..errors import DataError, OptionError
from .probe import DEFAULT_SAMPLES

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_BATCH_SIZE = 8
_MAX_LENGTH = 512


def calibration_batches(
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    n: int = DEFAULT_SAMPLES,
    seed: int = 0,
    *,
    batch_size: int = _BATCH_SIZE,
    max_length: int = _MAX_LENGTH,
    task: str | None = None,
    labels: Sequence[str] | None = None,
) -> list[dict[str, Tensor]]:
    """Rows of a dataset as batches for `probe_gradients`: ids, attention mask and labels on the CPU, padded on the right.

    Rows in the forms that training takes: `text`; `prompt` and `completion`, of which only the completion is learnt; `messages`,
    through the tokenizer's chat template, of which what the assistant wrote is learnt; `text` and `label`; or `input_ids`, with
    `labels` where they differ. Language modelling ends a text with the tokenizer's end token, as TRL does. Use rows of the
    training set, never of validation.

    Args:
        dataset: of which `n` rows are drawn; all, with a logged line, where it has fewer.
        seed: of the draw.
        batch_size: samples of a batch; the results do not depend on it, memory does.
        max_length: in tokens; longer rows are cut.
        task: `causal_lm`, `seq2seq` or `classification`; None: classification where there is a label, else causal_lm.
        labels: names of the classes in the order of the model's ids, `list(model.config.label2id)`; None: numbered as
            `label_names` finds them in the column, which is the model's order only where it was trained on the same column.
    Raises:
        DataError: fewer rows than one batch, no usable column, a label that is none of `labels`.
        OptionError: n below 1.
    """
    if n < 1 or batch_size < 1:
        raise OptionError(f"n is {n} and batch_size is {batch_size}, wanted at least 1.")
    if not hasattr(dataset, "column_names"):
        from datasets import Dataset

        dataset = Dataset.from_list([dict(row) for row in dataset])
    if len(dataset) < min(n, batch_size):
        raise DataError(
            f"calibration: {len(dataset)} rows, wanted at least one batch of {min(n, batch_size)}; give more rows or a "
            "smaller batch_size."
        )
    if len(dataset) < n:
        logger.info("calibration: %d rows asked for, the dataset has %d", n, len(dataset))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(dataset), generator=generator)[:n].sort().values.tolist()
    encoded = _encoded(dataset, drawn, tokenizer, min(max_length, tokenizer.model_max_length), task, labels)
    encoded.sort(key=lambda row: len(row["input_ids"]))  # rows of a length together: little padding
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return [_padded(encoded[i : i + batch_size], padding) for i in range(0, len(encoded), batch_size)]


def _encoded(
    dataset: Dataset, drawn: Sequence[int], tokenizer: Any, limit: int, task: str | None, labels: Sequence[str] | None
) -> list[dict[str, Any]]:
    """{input_ids, labels} of the drawn rows, plain lists."""
    if "input_ids" in dataset.column_names:
        rows = dataset.select(drawn)
        given = "labels" if "labels" in dataset.column_names else "input_ids"
        return [
            {
                "input_ids": list(r["input_ids"])[:limit],
                "labels": v if isinstance(v := r[given], int) else list(v)[:limit],
            }
            for r in rows
        ]
    task = task or ("classification" if "label" in dataset.column_names else "causal_lm")
    dataset = select_columns(dataset, task, "calibration data")
    to_id = (
        label_ids(dataset, labels or label_names(dataset, None, "calibration data"))
        if task == "classification"
        else None
    )
    return [_encode(row, tokenizer, limit, task, to_id) for row in dataset.select(drawn)]


def _encode(row: Mapping[str, Any], tokenizer: Any, limit: int, task: str, to_id: Any) -> dict[str, Any]:
    if to_id is not None:
        with tokenizing():
            ids = tokenizer(row["text"], truncation=True, max_length=limit)["input_ids"]
        return {"input_ids": ids, "labels": to_id(row["label"])}
    if task == "seq2seq":
        with tokenizing():
            both = tokenizer(row["prompt"], text_target=row["completion"], truncation=True, max_length=limit)
            return {"input_ids": both["input_ids"], "labels": both["labels"]}
    encoded = encode_row(row, tokenizer)
    return {name: ids[:limit] for name, ids in encoded.items()}


def _padded(rows: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Tensor]:
    def filled(values: Sequence[Sequence[int]], value: int) -> Tensor:
        width = max(map(len, values))
        return torch.tensor([[*v, *[value] * (width - len(v))] for v in values])

    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": filled(ids, padding),
        "attention_mask": filled([[1] * len(v) for v in ids], 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else filled(labels, IGNORED),
    }
