"""What became of the rows: how many were read, cut and dropped, and how many tokens teach something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .chat import IGNORED
from .tokenizing import tokenizing

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Piece:
    """Tokens that a model sees in one piece; a row holds one of them, a pair of answers two.

    Attributes:
        title: which of a row's pieces it is; empty where there is one.
        ids: of the tokens.
        labels: `IGNORED` where a token carries no loss; None where the loss is on the piece as a whole.
        target: what is learnt about the whole piece, for the reader.
    """

    title: str
    ids: Sequence[int]
    labels: Sequence[int] | None = None
    target: str = ""


@dataclass(frozen=True)
class Cut:
    """What a trainer does with rows that are long.

    Attributes:
        limit: longest piece, in tokens; None: nothing is cut. from_end: of a longer one the end is kept.
        drops: `filled`: a row in whose pieces none of the tokens within the limit carries loss goes. `long`: a row with a piece
            above the limit goes. None: every row stays.
    """

    limit: int | None
    from_end: bool = False
    drops: str | None = "filled"

    def within(self, values: Sequence[int]) -> Sequence[int]:
        if self.limit is None:
            return values
        return values[-self.limit :] if self.from_end else values[: self.limit]


@dataclass(frozen=True)
class Doubt:
    """Rows that teach what hardly anybody means.

    Attributes:
        what: they have. rows: how many.
        first: number of the first, from 1. mixed: it counts rows of several datasets, or of a share of one.
    """

    what: str
    rows: int
    first: int
    mixed: bool = False

    def __str__(self) -> str:
        has = "1 row has" if self.rows == 1 else f"{self.rows:,} rows have"
        return f"{has} {self.what}, the first is row {self.first:,}{' of the mixed rows' if self.mixed else ''}"


@dataclass(frozen=True)
class RowCounts:
    """Rows, counted.

    Attributes:
        read: all rows.
        silent: of them, those in which no token carries loss: no turn of the assistant, or an empty one.
        filled: those in which none does within the limit: the prompt alone fills it.
        long: those that a trainer does not cut. All three kinds are dropped.
        cut: rows that stay and are longer than the limit.
        tokens: of the rows that stay, within the limit. learned: those that carry loss; None where the loss is on whole pieces.
        longest: tokens of the longest piece that stays, within the limit.
        limit: in tokens; None: nothing is cut.
        doubts: rows to look at; they stay.
    """

    read: int
    silent: int
    filled: int
    long: int
    cut: int
    tokens: int
    learned: int | None
    longest: int
    limit: int | None
    doubts: tuple[Doubt, ...] = ()

    @property
    def left(self) -> int:
        return self.read - self.silent - self.filled - self.long

    def __str__(self) -> str:
        parts = [f"{self.read:,} rows read"]
        if self.silent:
            parts.append(f"{self.silent:,} dropped, in which no token carries loss")
        if self.filled:
            parts.append(f"{self.filled:,} dropped, whose prompt alone fills the {self.limit:,} tokens of max_length")
        if self.long:
            parts.append(f"{self.long:,} dropped, which are longer than the {self.limit:,} tokens of max_length")
        if self.cut:
            parts.append(f"{self.cut:,} cut at {self.limit:,} tokens")
        learned = "" if self.learned is None else f", of which {self.learned:,} carry loss"
        return f"{', '.join(parts)}; {self.tokens:,} tokens{learned}"


def pieces_of(encoded: Dataset) -> Iterable[list[Piece]]:
    """Rows of `input_ids` and `labels`, a piece each."""
    for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
        yield [Piece("", ids, labels)]


def count_rows(rows: Iterable[list[Piece]], cut: Cut) -> RowCounts:
    read = silent = filled = long = shortened = tokens = learned = longest = 0
    masked = True
    for row in rows:
        read += 1
        kept = [cut.within(piece.ids) for piece in row]
        is_cut = any(len(ids) < len(piece.ids) for ids, piece in zip(kept, row, strict=True))
        labels = [label for piece in row for label in piece.labels or ()]
        masked = masked and all(piece.labels is not None for piece in row)
        seen = [label for piece in row for label in cut.within(piece.labels or ())]
        if masked and all(label == IGNORED for label in labels):
            silent += 1
        elif masked and cut.drops == "filled" and all(label == IGNORED for label in seen):
            filled += 1
        elif cut.drops == "long" and is_cut:
            long += 1
        else:
            shortened += is_cut
            tokens += sum(map(len, kept))
            longest = max(longest, *map(len, kept))
            learned += sum(label != IGNORED for label in seen)
    return RowCounts(read, silent, filled, long, shortened, tokens, learned if masked else None, longest, cut.limit)


def doubts_of(rows: Dataset, mixed: bool = False) -> tuple[Doubt, ...]:
    """What is doubtful of rows in standard columns, before they are tokens: an empty answer, of which the model learns to end
    at once, and pairs of answers that are alike.

    Args:
        mixed: as `Doubt` has it.
    """
    found: list[tuple[str, list[int]]] = []
    for name in ("messages", "completion", "chosen", "rejected"):
        if name in rows.column_names:
            called = "answer" if name in ("messages", "completion") else f"{name!r} answer"
            found.append((f"an empty {called}", [i for i, answer in enumerate(rows[name], 1) if _is_empty(answer)]))
    if {"chosen", "rejected"} <= set(rows.column_names):
        pairs = zip(rows["chosen"], rows["rejected"], strict=True)
        found.append(("the same answer as chosen and as rejected", [i for i, (a, b) in enumerate(pairs, 1) if a == b]))
    return tuple(Doubt(what, len(numbers), numbers[0], mixed) for what, numbers in found if numbers)


def _is_empty(answer: str | Sequence[Mapping[str, Any]]) -> bool:
    """A text without a word, or a conversation in which a turn of the assistant has none and calls no tool."""
    if isinstance(answer, str):
        return not answer.strip()
    said = [turn.get("content") for turn in answer if turn["role"] == "assistant" and not turn.get("tool_calls")]
    return any(not (text.strip() if isinstance(text, str) else text) for text in said)


def without_silent(encoded: Dataset) -> Dataset:
    """The rows in which a token carries loss."""
    return encoded.filter(lambda row: any(label != IGNORED for label in row["labels"]))


def show_rows(rows: Iterable[list[Piece]], tokenizer: Any, cut: Cut) -> str:
    """Rows token by token; a `*` before each token that carries loss."""
    lines = []
    for i, row in enumerate(rows, 1):
        for piece in row:
            ids = cut.within(piece.ids)
            labels = cut.within(piece.labels) if piece.labels is not None else [IGNORED] * len(ids)
            title = f"row {i}, {piece.title}" if piece.title else f"row {i}"
            marked = f", {sum(label != IGNORED for label in labels)} carry loss (*)" if piece.labels is not None else ""
            target = f"; learnt: {piece.target}" if piece.target else ""
            more = len(piece.ids) - len(ids)
            lines.append(f"{title}: {len(ids)} tokens{marked}{target}" + (f", {more} cut off" if more else ""))
            with tokenizing("the tokenizer cannot read its own tokens"):
                written = [tokenizer.decode([token]) for token in ids]
            for token, label, text in zip(ids, labels, written, strict=True):
                lines.append(f"  {'*' if label != IGNORED else ' '} {token:>7}  {text!r}")
    return "\n".join(lines)
