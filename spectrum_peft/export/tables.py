"""Tied tensors, and tables of tokens that grew or shrank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .. import names
from ..errors import MismatchError
from ..weights import FileWeights
from ..weights.updates import Added, LowRank, Rows, Update, Value


def updates_by_name(updates: Iterable[Update]) -> dict[str, list[Update]]:
    """{parameter: its updates, a new value first}."""
    result: dict[str, list[Update]] = {}
    for update in updates:
        mine = result.setdefault(update.name, [])
        if isinstance(update, Value):
            if mine and isinstance(mine[0], Value):
                raise MismatchError(f"{update.name}: {mine[0].key!r} and {update.key!r} both replace it.")
            mine.insert(0, update)
        else:
            mine.append(update)
    return result


def settle_ties(
    changes: dict[str, list[Update]], files: FileWeights, ensured: bool
) -> tuple[dict[str, list[Update]], dict[str, str]]:
    """Make the changes of tied tensors one, or find that they have become different.

    Args:
        ensured: the adapter was trained with PEFT's `ensure_weight_tying`.
    Returns:
        (changes, {name that is no longer tied: stored name of the tensor it was tied to}).
    Raises:
        MismatchError: tensors differ that a model class always ties.
    """
    changes, untied = dict(changes), {}
    infos = {t.name: t for t in files.tensors()}
    for kept, *others in files.tied:
        for other in others:
            mine, theirs = changes.get(kept, []), changes.get(other, [])
            if not (mine or theirs):
                continue
            if ensured or _still_equal(mine, theirs, files, kept):
                changes.pop(other, None)
                if mine or theirs:
                    changes[kept] = mine or theirs
                if other in infos:
                    changes[other] = changes[kept]
            elif names.in_head(other):
                untied[other] = kept
                changes[other] = theirs
            else:
                raise MismatchError(
                    f"{kept} and {other} are one tensor in this architecture, and the adapter makes them two."
                )
    return changes, untied


def _still_equal(mine: Sequence[Update], theirs: Sequence[Update], files: FileWeights, kept: str) -> bool:
    """Whether two tied tensors are equal after their changes.

    Rows for new tokens follow the tie without being written twice (PEFT sees to it); low-rank changes do not.
    """
    values = [next((u for u in side if isinstance(u, Value)), None) for side in (mine, theirs)]
    if any(isinstance(u, LowRank | Added) for u in (*mine, *theirs)):
        return False
    rows = [u for u in mine if isinstance(u, Rows)]
    for other in (u for u in theirs if isinstance(u, Rows)):
        if not any(r.indices == other.indices and torch.equal(r.stored.whole(), other.stored.whole()) for r in rows):
            return False
    if values == [None, None]:
        return True
    first, second = (files.read(kept) if value is None else value.stored.whole() for value in values)
    return first.shape == second.shape and torch.equal(first, second.to(first.dtype))


def new_shape(mine: Sequence[Update]) -> tuple[int, ...]:
    assert isinstance(mine[0], Value)
    return mine[0].stored.shape


def is_language_head(name: str) -> bool:
    return bool({"lm_head", "embed_out"} & set(name.split(".")))


def _vocabulary(files: FileWeights) -> int | None:
    """Number of tokens as the config says it, of its text part where it has parts."""
    parts = [files.config, *(part for part in files.config.values() if isinstance(part, dict))]
    return next((part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)), None)


def table_rows(files: FileWeights, changes: Mapping[str, Sequence[Update]]) -> dict[int, int]:
    """{rows of the token table in the base: rows after the merge} where that changes.

    Raises:
        MismatchError: embeddings and output head end up with different numbers of rows.
    """
    result, ends = {}, {}
    vocabulary = _vocabulary(files)
    for info in (t for t in files.tensors() if t.shape):
        mine = changes.get(info.name, ())
        grown = new_shape(mine)[0] if mine and isinstance(mine[0], Value) else info.shape[0]
        table = info.role == "embedding" and len(info.shape) == 2
        if grown != info.shape[0] and table:
            result[info.shape[0]] = grown
        # Not all that lies in a head is as long as the vocabulary: RoBERTa's `lm_head.dense` is as wide as the model.
        if (table or is_language_head(info.name)) and info.shape[0] == vocabulary:
            ends[info.name] = grown
        for update in mine:
            outside = [row for row in getattr(update, "indices", ()) if not 0 <= row < grown]
            if outside:
                raise MismatchError(
                    f"{update.key!r} holds row {outside[0]} of {info.name}, which has {grown}: the adapter was trained on "
                    "a larger vocabulary. Save it with save_embedding_layers=True."
                )
    if len(set(ends.values())) > 1:
        (a, rows_a), (b, rows_b) = list(ends.items())[:2]
        raise MismatchError(f"after the merge {a} has {rows_a} rows and {b} {rows_b}, wanted them equal.")
    return result
