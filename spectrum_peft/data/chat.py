"""Rows of text and of conversations as tokens, and which of them carry loss.

A conversation goes through the tokenizer's chat template. Where the template marks what the assistant writes
(`{% generation %}`), its marks are taken; elsewhere the marks are found by rendering the conversation's beginnings and
comparing: what comes after the prompt for an answer, up to and with the token that ends a turn, is the assistant's.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import DataError, OptionError, near_matches
from .tokenizing import tokenizing

LOSS_ON = ("all", "assistant", "completion")
IGNORED = -100  # label of a position that takes no part in the loss, as in torch and transformers
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MOST_WRITTEN = 1 << 20  # a hundred times the longest system prompt that a published template brings
_PROBE = "\u241f"  # a character that no template writes and no conversation holds (SYMBOL FOR UNIT SEPARATOR)

Message = Mapping[str, Any]


def check_loss_on(value: str | None) -> str | None:
    """
    Raises:
        OptionError: none of `LOSS_ON`.
    """
    if value is not None and value not in LOSS_ON:
        raise OptionError(f"--loss-on is {value!r}." + near_matches(value, LOSS_ON))
    return value


def encode_row(
    row: Mapping[str, Any], tokenizer: Any, loss_on: str | None = None, *, template: bool = True
) -> dict[str, list[int]]:
    """A row of language modelling as `input_ids` and `labels`; positions without loss have the label -100.

    Args:
        row: with `messages`; `prompt` and `completion`, strings or lists of messages; or `text`.
        loss_on: `all` tokens; what the `assistant` writes in every turn; the `completion`, which is the last turn only. None:
            the completion where the row has one, the assistant's turns of a conversation, all of a text.
        template: strings of prompt and completion are turns of a user and of an assistant where the tokenizer has a chat
            template; False: they are joined as they are.
    Raises:
        DataError: the template refuses the conversation, or there is none; the tokenizer refuses the text.
    """
    with tokenizing():
        return _encoded_row(row, tokenizer, loss_on, template)


def _encoded_row(row: Mapping[str, Any], tokenizer: Any, loss_on: str | None, template: bool) -> dict[str, list[int]]:
    if "text" in row:
        ids = _ended(list(tokenizer(row["text"])["input_ids"]), tokenizer)
        return {"input_ids": ids, "labels": list(ids)}
    if "messages" in row:
        return _encode_chat(row["messages"], row, tokenizer, loss_on or "assistant")
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, str):
        return _encode_chat([*prompt, *completion], row, tokenizer, loss_on or "completion", known=len(prompt))
    if template and tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _encode_chat(turns, row, tokenizer, loss_on or "completion", known=1)
    # Each by itself: where pieces merged across the border, the prompt would not be the one that is asked later.
    start = list(tokenizer(prompt)["input_ids"])
    if tokenizer.eos_token_id is not None and start and start[-1] == tokenizer.eos_token_id:
        start.pop()
    rest = _ended(list(tokenizer(completion, add_special_tokens=False)["input_ids"]), tokenizer)
    ids = start + rest
    return {"input_ids": ids, "labels": list(ids) if loss_on == "all" else [IGNORED] * len(start) + rest}


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def render(messages: Sequence[Message], row: Mapping[str, Any], tokenizer: Any, **more: Any) -> Any:
    """A conversation through the tokenizer's chat template, with the tools and keywords that its row brings.

    Raises:
        DataError: there is no template, or it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template, which conversations need; take the instruct version of the model, or "
            "rows with prompt and completion, or with text."
        )
    return through_template([_without_nulls(m) for m in messages], row, tokenizer, **more)


def through_template(messages: Sequence[Message], row: Mapping[str, Any], tokenizer: Any, **more: Any) -> Any:
    """`render` of messages as they are, which is what TRL's trainers of preferences do with theirs.

    Raises:
        DataError: the template refuses the conversation, or writes without end.
    """
    _refuse_bomb(_Template(tokenizer), str(tokenizer.chat_template))
    keywords = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {}), **more}
    with tokenizing("the chat template refuses a conversation"):
        return tokenizer.apply_chat_template(messages, **keywords)


def _without_nulls(message: Message) -> dict[str, Any]:
    """Columns of a table hold null where a message has no such field; templates ask whether there is one."""
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def _encode_chat(
    messages: Sequence[Message], row: Mapping[str, Any], tokenizer: Any, loss_on: str, known: int = 0
) -> dict[str, list[int]]:
    """
    Args:
        known: messages at the beginning that belong to the prompt, for `completion`.
    """
    if loss_on == "all":
        ids = list(render(messages, row, tokenizer, tokenize=True, return_dict=True)["input_ids"])
        return {"input_ids": ids, "labels": list(ids)}
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    if loss_on == "assistant":
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    else:
        wanted = [i for i in range(known or last, len(messages)) if messages[i]["role"] == "assistant"]
    if loss_on == "assistant" and _MARKED.search(str(tokenizer.chat_template)):
        found = render(messages, row, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(found["input_ids"]), found["assistant_masks"]
    else:
        text = render(messages, row, tokenizer, tokenize=False)
        ids, mask = _masked(text, assistant_spans(messages, wanted, text, row, tokenizer), tokenizer)
    return {"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]}


def assistant_spans(
    messages: Sequence[Message], wanted: Sequence[int], text: str, row: Mapping[str, Any], tokenizer: Any
) -> list[tuple[int, int]]:
    """Where turns of a rendered conversation begin and end, in characters: after the prompt for an answer, and with the
    marker that ends a turn.

    Args:
        wanted: positions of the turns among `messages`. text: all of them, rendered.
    """
    marker = turn_end(tokenizer)
    spans = []
    for i in wanted:
        content = messages[i].get("content")
        start = _start_of(messages, i, text, row, tokenizer)
        end, limit = start, len(text)
        if isinstance(content, str) and content.strip():
            end = max(end, _agree(text, _rendered_with(messages, i, content.rstrip() + _PROBE, row, tokenizer)))
        if i + 1 < len(messages):
            after = messages[i + 1].get("content")
            if isinstance(after, str):
                limit = max(end, _agree(text, _rendered_with(messages, i + 1, _PROBE + after, row, tokenizer)))
        at = text.find(marker, end, limit) if marker else -1
        spans.append((start, end if at < 0 else at + len(marker)))
    return spans


def _start_of(messages: Sequence[Message], i: int, text: str, row: Mapping[str, Any], tokenizer: Any) -> int:
    """How far the conversation before message i, with the prompt for an answer, agrees with the whole one."""
    try:
        return _agree(text, render(messages[:i], row, tokenizer, tokenize=False, add_generation_prompt=True))
    except DataError:  # templates refuse a beginning without a user's turn
        content = messages[i].get("content")
        return max(0, text.find(content.strip())) if isinstance(content, str) else 0


def _rendered_with(messages: Sequence[Message], i: int, content: str, row: Mapping[str, Any], tokenizer: Any) -> str:
    changed = [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]
    return str(render(changed, row, tokenizer, tokenize=False))


def _agree(a: str, b: str) -> int:
    """Length of the common beginning."""
    if a == b or not a or not b:
        return min(len(a), len(b))
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def turn_end(tokenizer: Any) -> str:
    """The special token that a template writes after an answer (`<|im_end|>`, `<|eot_id|>`, `</s>`); `""` where it writes
    none."""
    special = tuple(sorted({*tokenizer.all_special_tokens, *_added_special(tokenizer)}, key=len, reverse=True))
    return _turn_end(_Template(tokenizer), str(tokenizer.chat_template), special)


class _Template:
    """A tokenizer as a key that is alike for the same one, so that its template is asked once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and other.tokenizer is self.tokenizer


@lru_cache(maxsize=8)
def _refuse_bomb(key: _Template, template: str) -> None:
    """
    Raises:
        DataError: the template makes more than `_MOST_WRITTEN` characters of two words, or of one that wants an answer. What it
            makes of other conversations is not known beforehand: it is a program.
    """
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    for probe in (turns, turns[:1]):
        try:
            with tokenizing():
                written = len(
                    key.tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=len(probe) == 1)
                )
        except DataError:  # it wants another conversation
            continue
        if written > _MOST_WRITTEN:
            words = "two words" if len(probe) == 2 else "one word"
            raise DataError(
                f"the chat template makes {written:,} characters of {words}, wanted at most {_MOST_WRITTEN:,}."
            )


@lru_cache(maxsize=8)
def _turn_end(key: _Template, template: str, special: tuple[str, ...]) -> str:
    probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _PROBE}]
    tail = render(probe, {}, key.tokenizer, tokenize=False).rpartition(_PROBE)[2]
    found = [(at, -len(token), token) for token in special if token and (at := tail.find(token)) >= 0]
    return min(found)[2] if found else ""


def _added_special(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def _masked(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens of a rendered text, and whether each begins inside one of the spans."""
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = list(found["input_ids"]), [start for start, _ in found["offset_mapping"]]
        edges = [(bisect_left(starts, start), bisect_left(starts, end)) for start, end in spans]
    else:  # no offsets: as many tokens as the text up to there has in common with the whole
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])

        def until(end: int) -> int:
            head = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
            return next(
                (k for k, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids))
            )

        edges = [(until(start), until(end)) for start, end in spans]
    mask = [False] * len(ids)
    for first, end in edges:
        mask[first:end] = [True] * (end - first)
    return ids, mask
