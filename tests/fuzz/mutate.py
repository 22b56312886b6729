"""Damage to bytes and to plain data, the same for the same seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

# What parsers have stumbled over: limits of numbers, tokens of JSON and YAML, control characters, halves of characters.
TOKENS = [
    b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"[" * 2000, b"{", b"}", b"]",
    b'"', b"\\",
    b":", b",", b"- ", b"? ", b"&a ", b"*a", b"<<: ", b"!!int x", b"!!python/object:os.system ", b"2020-99-99", b"0x_",
    b"\x1b[2J",
    b"\\ud800", b"\xff", b"\x00", b"\r\n", b"\t", b"\xe2\x80\xae", "\u00b2".encode(), b"..", b"/etc/passwd", b"a" * 300,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**40, 10**5000, 0.5, -0.0, 1e308, math.inf, -math.inf, math.nan, "", "x",
    "inf", "nan", "\x1b[31m", "\ud800", "\u00b2", "a" * 100_000, "(a+)+$", "(", "../../x", "model.layers." + "9" * 5000 + ".x",
    [],
    {}, [[]], [None], {"": None}, ["x", 1, None], {"a": {"b": {"c": []}}}, [1] * 1000, [2**40, 0, 4], [-1], [1e9],
]  # fmt: skip


# What fields of a tokenizer, a model's config and its generation config may be named as, or point to, and are not.
FIELDS: list[Any] = [
    2**31 - 1, 2**32 - 1, 10**6, 264, 1e-45, "longest", "LlamaTokenizer", "BertTokenizerFast", "T5Tokenizer", "AutoTokenizer",
    "PreTrainedModel", "transformers", "models", "pipeline", "torch", {"__type": "AddedToken", "content": ""},
    {"type": "Whitespace"}, {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"}, {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "Sequence", "pretokenizers": [], "normalizers": []}, {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 7},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}, {"strategy": {"Fixed": 8}},
    {"max_length": 0, "strategy": "OnlySecond", "stride": 1, "direction": "Left"}, {"default": "{{ 1/0 }}"},
    [{"name": "default", "template": "{{ messages[9].content }}"}], "{{ raise_exception('') }}", "{{ 'a' * 9000000 }}", "{%",
]  # fmt: skip
# Where a template stands, or its file is damaged.
TEMPLATES = [
    b"{% for m in messages %}",
    b"{{ 1/0 }}",
    b"{{ x.y.z }}",
    b"{{ raise_exception('') }}",
    b"{{ 'a' * 9000000 }}",
    b"{%",
    b"%}",
]


def damaged(data: bytes, rng: random.Random, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """A few changes of bytes: flipped, removed, doubled, moved, cut off, tokens put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(found) + 1)
        # Headers come first in files of weights, and most of a file is values that may be anything.
        if rng.random() < 0.5:
            at = min(at, rng.randrange(512))
        end = min(len(found), at + rng.choice((1, 1, 2, 8, 64, 1000)))
        kind = rng.randrange(7)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at:end]
        elif kind == 2:
            found[at:at] = found[at:end]
        elif kind == 3:
            found[at:end] = rng.choice(tokens)
        elif kind == 4:
            found[at:at] = rng.choice(tokens)
        elif kind == 5:
            del found[at:]
        else:
            found[at:end] = rng.randbytes(end - at)
    return bytes(found)


def changed(data: Any, rng: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """A copy of plain data with one to three values, keys or items changed, removed, doubled or swapped for another's."""
    data = _copied(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            return rng.choice(values)
        owner, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind <= 2:
            owner[key] = _copied(rng.choice(values))
        elif kind == 3:
            del owner[key]
        elif kind == 4:
            other, at = rng.choice(places)
            try:
                owner[key] = _copied(other[at])
            except (KeyError, IndexError):
                continue
        elif isinstance(owner, list):
            owner.append(_copied(owner[key]))
        else:
            owner[rng.choice(("x", "", "\x1b", str(key) * 50, "\u00b2"))] = owner.pop(key)
    return data


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def _places(value: Any) -> Any:
    """(owner, key) of everything inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def as_json(data: Any) -> bytes:
    """JSON of whatever `changed` made, integers without end among it."""
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(data).encode("utf-8", "surrogatepass")
    finally:
        sys.set_int_max_str_digits(before)


def mutant(
    seed: bytes,
    rng: random.Random,
    parse: Callable[[bytes], Any] | None,
    write: Callable[[Any], bytes],
    more: Sequence[Any] = (),
) -> bytes:
    """One damaged form of a file: of its structure where it can be parsed, else of its bytes.

    Args:
        more: values, or bytes where nothing is parsed, that are put in beside the usual ones.
    """
    if parse is not None and rng.random() < 0.6:
        return write(changed(parse(seed), rng, [*VALUES, *more, *more]))
    return damaged(seed, rng, [*TOKENS, *(m for m in more if isinstance(m, bytes))])
