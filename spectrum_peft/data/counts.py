"""What became of the rows: how many were read, cut and dropped, and how many tokens teach something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .chat import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class RowCounts:
    """Rows of language modelling, counted.

    Attributes:
        read: all rows.
        silent: of them, those in which no token carries loss: no turn of the assistant, or an empty one.
        filled: those in which none does within the limit: the prompt alone fills it. Both kinds are dropped.
        cut: rows that stay and are longer than the limit.
        tokens, learned: of the rows that stay, within the limit; and those that carry loss.
        limit: in tokens; None: nothing is cut.
    """

    read: int
    silent: int
    filled: int
    cut: int
    tokens: int
    learned: int
    limit: int | None

    @property
    def left(self) -> int:
        return self.read - self.silent - self.filled

    def __str__(self) -> str:
        parts = [f"{self.read:,} rows read"]
        if self.silent:
            parts.append(f"{self.silent:,} dropped, in which no token carries loss")
        if self.filled:
            parts.append(f"{self.filled:,} dropped, whose prompt alone fills the {self.limit:,} tokens of max_length")
        if self.cut:
            parts.append(f"{self.cut:,} cut at {self.limit:,} tokens")
        return f"{', '.join(parts)}; {self.tokens:,} tokens, of which {self.learned:,} carry loss"


def count_rows(encoded: Dataset, limit: int | None, *, from_end: bool = False) -> RowCounts:
    """
    Args:
        encoded: with `input_ids` and `labels`.
        limit: longest row, in tokens. from_end: of a longer row the end is kept.
    """
    silent = filled = cut = tokens = learned = 0
    for labels in encoded["labels"]:
        kept = _within(labels, limit, from_end)
        if all(label == IGNORED for label in labels):
            silent += 1
        elif all(label == IGNORED for label in kept):
            filled += 1
        else:
            cut += len(kept) < len(labels)
            tokens += len(kept)
            learned += sum(label != IGNORED for label in kept)
    return RowCounts(len(encoded), silent, filled, cut, tokens, learned, limit)


def without_silent(encoded: Dataset) -> Dataset:
    """The rows in which a token carries loss."""
    return encoded.filter(lambda row: any(label != IGNORED for label in row["labels"]))


def _within(values: Sequence[int], limit: int | None, from_end: bool) -> Sequence[int]:
    if limit is None:
        return values
    return values[-limit:] if from_end else values[:limit]


def show_rows(encoded: Dataset, tokenizer: Any, n: int, limit: int | None, *, from_end: bool = False) -> str:
    """The first `n` rows token by token; a `*` before each token that carries loss."""
    lines = []
    for i, row in enumerate(encoded.select(range(min(n, len(encoded)))), 1):
        ids, labels = (_within(row[name], limit, from_end) for name in ("input_ids", "labels"))
        learned = sum(label != IGNORED for label in labels)
        more = len(row["input_ids"]) - len(ids)
        lines.append(f"row {i}: {len(ids)} tokens, {learned} carry loss (*)" + (f", {more} cut off" if more else ""))
        for token, label in zip(ids, labels, strict=True):
            lines.append(f"  {'*' if label != IGNORED else ' '} {token:>7}  {tokenizer.decode([token])!r}")
    return "\n".join(lines)
