"""Rows of preferences, rewards and prompts as TRL's trainers see them.

TRL tokenizes these itself. What is here brings strings into turns before, as `data.encode_row` does for language modelling, and
says what TRL's tokens are, for counting and for showing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data import IGNORED, Piece, through_template, tokenizing
from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from .encoding import DataChoices

_ANSWERS = ("completion", "chosen", "rejected")


def as_turns(rows: Dataset, tokenizer: Any, limit: int, labels: Sequence[str], data: DataChoices) -> Dataset:
    """Strings of a prompt and its answers as turns of user and assistant, where the tokenizer has a chat template.

    Answers without a prompt stay as they are: nothing says where an answer begins.
    """
    strings = "prompt" in rows.column_names and len(rows) and isinstance(rows[0]["prompt"], str)
    if not (strings and data.template and tokenizer.chat_template is not None):
        return rows
    names = [name for name in ("prompt", *_ANSWERS) if name in rows.column_names]

    def turns(row: Mapping[str, Any]) -> dict[str, Any]:
        roles = {name: "user" if name == "prompt" else "assistant" for name in names}
        return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}

    return rows.map(turns)


def _ids(text: Any, tokenizer: Any, row: Mapping[str, Any], *, asked: bool = False) -> list[int]:
    if isinstance(text, str):
        with tokenizing():
            return list(tokenizer(text)["input_ids"])
    found = through_template(text, row, tokenizer, tokenize=True, return_dict=True, add_generation_prompt=asked)
    return list(found["input_ids"])


def _ended(text: Any, tokenizer: Any) -> Any:
    if not isinstance(text, str):
        return text
    end = tokenizer.eos_token
    if end is None:
        raise DataError("the tokenizer has no end token (eos_token), with which TRL ends an answer that is text.")
    return text if text.endswith(end) else text + end


def pairs(row: Mapping[str, Any], tokenizer: Any, labels: Sequence[str] = ()) -> list[Piece]:
    """The chosen and the rejected answer, each after the prompt; the answer's tokens count.

    An answer begins where the tokens of prompt and answer leave those of the prompt: TRL 1.16, `DPOTrainer._prepare_dataset`.
    """
    from trl import extract_prompt

    row = row if "prompt" in row else extract_prompt(dict(row))
    whole = {
        name: _ids(row["prompt"] + _ended(row[name], tokenizer), tokenizer, row) for name in ("chosen", "rejected")
    }
    prompt = _ids(row["prompt"], tokenizer, row, asked=True)
    start = min(_common(prompt, ids) for ids in whole.values())
    return [_answer(name, ids, start) for name, ids in whole.items()]


def wanted_or_not(row: Mapping[str, Any], tokenizer: Any, labels: Sequence[str] = ()) -> list[Piece]:
    """One answer with whether it is wanted, or both of a pair: TRL 1.16, `KTOTrainer._prepare_dataset`."""
    if "completion" not in row:
        return [
            _named(t, f"{t.title}, {'wanted' if t.title == 'chosen' else 'not wanted'}") for t in pairs(row, tokenizer)
        ]
    ids = _ids(row["prompt"] + _ended(row["completion"], tokenizer), tokenizer, row)
    start = _common(_ids(row["prompt"], tokenizer, row, asked=True), ids)
    return [_answer("wanted" if row["label"] else "not wanted", ids, start)]


def whole_answers(row: Mapping[str, Any], tokenizer: Any, labels: Sequence[str] = ()) -> list[Piece]:
    """Both answers, of which the score of the last token counts: TRL 1.16, `RewardTrainer._prepare_dataset`."""
    found = []
    for name in ("chosen", "rejected"):
        text = _ended(row[name], tokenizer)
        found.append(Piece(name, _ids(row["prompt"] + text if "prompt" in row else text, tokenizer, row)))
    return found


def prompts(row: Mapping[str, Any], tokenizer: Any, labels: Sequence[str] = ()) -> list[Piece]:
    """The prompt; what follows is written by the model."""
    return [Piece("prompt", _ids(row["prompt"], tokenizer, row, asked=True))]


def _answer(title: str, ids: list[int], start: int) -> Piece:
    return Piece(title, ids, [IGNORED] * start + ids[start:])


def _named(piece: Piece, title: str) -> Piece:
    return Piece(title, piece.ids, piece.labels)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
