"""From rows to what a trainer takes: tokens with labels, and how they are collated.

An encoder is a function (rows in standard columns, tokenizer, longest row in tokens, names of the labels, choices) -> rows with
`input_ids` and `labels`. It needs no model, so that rows are checked and counted before one is loaded. A collator is a function
(model, tokenizer) -> keywords of the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import IGNORED, Piece, encode_row, label_ids, tokenizing
from ..errors import DataError
from .judge import SCORES, require_scikit_learn

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DataChoices:
    """What of a row is shown and learnt, as `data.encode_row` takes it.

    Attributes:
        loss_on: `all`, `assistant`, `completion`, or None for what the row's format means; language modelling only.
        template: prompts and completions go through the tokenizer's chat template where it has one.
    """

    loss_on: str | None = None
    template: bool = True


Encode = Callable[["Dataset", Any, int, Sequence[str], DataChoices], "Dataset"]
UNCUT = 2**30  # tokens: longer than any row
Collate = Callable[[Any, Any], dict[str, Any]]


# --- language modelling ----------------------------------------------------------------------------------------------


def encoded_rows(rows: Dataset, tokenizer: Any, data: DataChoices) -> Dataset:
    """Rows of language modelling as `input_ids` and `labels`, uncut.

    Raises:
        DataError: names the row.
    """

    def encode(row: Any, i: int) -> Any:
        try:
            return encode_row(row, tokenizer, data.loss_on, template=data.template)
        except DataError as error:
            raise DataError(f"row {i + 1}: {error}") from error

    return rows.map(encode, with_indices=True, remove_columns=rows.column_names)


def encode_causal_lm(rows: Dataset, tokenizer: Any, limit: int, labels: Sequence[str], data: DataChoices) -> Dataset:
    """SFTTrainer cuts, drops what is left without loss, and packs; `max_length` is a field of its arguments."""
    return encoded_rows(rows, tokenizer, data)


def one_piece(row: Mapping[str, Any], tokenizer: Any, labels: Sequence[str]) -> list[Piece]:
    return [Piece("", row["input_ids"], row["labels"])]


def by_trainer(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The trainer collates by itself."""
    return {}


# --- sequence to sequence --------------------------------------------------------------------------------------------


def encode_seq2seq(rows: Dataset, tokenizer: Any, limit: int, labels: Sequence[str], data: DataChoices) -> Dataset:
    def encode(batch: Any) -> Any:
        with tokenizing():
            return tokenizer(batch["prompt"], text_target=batch["completion"], truncation=True, max_length=limit)

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def collate_seq2seq(model: Any, tokenizer: Any) -> dict[str, Any]:
    from transformers import DataCollatorForSeq2Seq

    return {"data_collator": DataCollatorForSeq2Seq(tokenizer, model=model)}


def both_sides(row: Mapping[str, Any], tokenizer: Any, labels: Sequence[str]) -> list[Piece]:
    source, target = row["input_ids"], row["labels"]
    return [Piece("source", source, [IGNORED] * len(source)), Piece("target", target, target)]


# --- heads -----------------------------------------------------------------------------------------------------------


def encode_classes(rows: Dataset, tokenizer: Any, limit: int, labels: Sequence[str], data: DataChoices) -> Dataset:
    ids = label_ids(rows, labels)
    return _labelled(rows, tokenizer, limit, ids)


def encode_several(rows: Dataset, tokenizer: Any, limit: int, labels: Sequence[str], data: DataChoices) -> Dataset:
    """1.0 for each label of a row and 0.0 for the others: what the loss of several labels takes."""
    ids = label_ids(rows, labels)

    def marks(values: Sequence[Any]) -> list[float]:
        found = {ids(value) for value in values}
        return [float(i in found) for i in range(len(labels))]

    return _labelled(rows, tokenizer, limit, marks)


def encode_number(rows: Dataset, tokenizer: Any, limit: int, labels: Sequence[str], data: DataChoices) -> Dataset:
    """
    Raises:
        DataError: a label is NaN or infinite.
    """
    for i, value in enumerate(rows["label"], 1):
        if not math.isfinite(float(value)):
            raise DataError(f"row {i}: label is {value}, wanted a finite number.")
    return _labelled(rows, tokenizer, limit, float)


def _labelled(rows: Dataset, tokenizer: Any, limit: int, value: Callable[[Any], Any]) -> Dataset:
    def encode(batch: Any) -> Any:
        with tokenizing():
            found = tokenizer(batch["text"], truncation=True, max_length=limit)
        return {**found, "labels": [value(given) for given in batch["label"]]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def text_with_target(row: Mapping[str, Any], tokenizer: Any, labels: Sequence[str]) -> list[Piece]:
    """A text with its label, its labels or its number."""
    value = row["labels"]
    if isinstance(value, list):
        target = ", ".join(name for name, mark in zip(labels, value, strict=True) if mark) or "none of the labels"
    else:
        target = labels[value] if isinstance(value, int) else f"{value:g}"
    return [Piece("", row["input_ids"], None, target)]


def encode_tags(rows: Dataset, tokenizer: Any, limit: int, labels: Sequence[str], data: DataChoices) -> Dataset:
    """A word's tag is learnt on the first of its tokens; the others, and those that the tokenizer adds, carry no loss.

    Raises:
        DataError: a tokenizer that does not say which word a token is of; a row with more tags than words, or fewer.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not say which word a token is of, which tags need; a model with a tokenizer.json "
            "has one that does."
        )
    ids = label_ids(rows, labels, "tags")

    def encode(row: Any, i: int) -> Any:
        words, tags = row["tokens"], row["tags"]
        if len(words) != len(tags):
            raise DataError(f"row {i + 1}: {len(words)} tokens and {len(tags)} tags, wanted one tag for each token.")
        found = words_encoded(tokenizer, words, limit)
        of = found.word_ids()
        first = [word is not None and word != before for word, before in zip(of, [None, *of], strict=False)]
        marked = [ids(tags[word]) if new else IGNORED for word, new in zip(of, first, strict=True)]
        return {**found, "labels": marked}

    return rows.map(encode, with_indices=True, remove_columns=rows.column_names)


def words_encoded(tokenizer: Any, words: Sequence[str], limit: int) -> Any:
    """Words as tokens, with `word_ids()`. Byte-level tokenizers see where a word begins by the space before it: they get one."""
    if getattr(tokenizer, "add_prefix_space", None) is False:
        words = [word if i == 0 or word[:1].isspace() else f" {word}" for i, word in enumerate(words)]
    with tokenizing():
        return tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=limit)


def _with_padding(model: Any, tokenizer: Any) -> None:
    require_scikit_learn()
    if tokenizer.pad_token is None:  # decoders: the model looks for the last token that is not padding
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def collator_of_heads(head: str) -> Collate:
    """
    Args:
        head: key of `judge.SCORES`.
    """

    def collate(model: Any, tokenizer: Any) -> dict[str, Any]:
        from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

        _with_padding(model, tokenizer)
        collator = DataCollatorForTokenClassification if head == "tokens" else DataCollatorWithPadding
        return {
            "data_collator": collator(tokenizer),
            "compute_metrics": lambda p: SCORES[head](p.predictions, p.label_ids),
        }

    return collate
