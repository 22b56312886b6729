"""The tokenizer of a checkpoint, tried before anything is done with it."""

from __future__ import annotations

import base64
import binascii
import logging
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import CheckpointError, loading, quoted
from ..records import check_files_beside, is_file

logger = logging.getLogger(__name__)

# The largest table of an open model has 262,144 rows.
_MOST_TOKENS = 1 << 24
# Of every kind of character that a table of tokens may lack.
_TRIED = "A text, 1 of 2:\n\t\u00e9\u4e2d\U0001f642"
# Of a tokenizer.json: a table of SentencePiece for unlike spellings of a character, in base 64.
_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"')


def load_tokenizer(model_name: str, **kwargs: Any) -> Any:
    """The tokenizer of a checkpoint; None, with a logged line, where a local folder has none.

    Args:
        kwargs: `revision`, `trust_remote_code` and others of transformers' `from_pretrained`.
    Raises:
        CheckpointError: its files cannot be read, or what they make cannot encode, pad and decode a text.
    """
    folder = Path(model_name)
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
    if folder.is_dir() and not any((folder / name).exists() for name in files):
        logger.info("%s has no tokenizer files; the tokenizer is None", model_name)
        return None
    if folder.is_dir():
        check_files_beside(folder)
        _refuse_charsmap(folder / "tokenizer.json")
    with loading(f"{model_name}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model_name, **{"trust_remote_code": False, **kwargs})
        _try_tokenizer(tokenizer, model_name)
    return tokenizer


def _refuse_charsmap(path: Path) -> None:
    """Tokenizers makes room for as many entries as such a table says that it has, before it looks whether they are there.

    The first four bytes are the length of its tree in bytes, little-endian. Source: sentencepiece, `normalizer.cc`,
    `DecodePrecompiledCharsMap`.

    Raises:
        CheckpointError: the file cannot be read, or a table says that it is longer than it is.
    """
    if not is_file(path):
        return
    try:
        held = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    for found in _CHARSMAP.finditer(held):
        try:
            table = base64.b64decode(found[1])
        except binascii.Error:
            continue  # the library says so
        says, there = int.from_bytes(table[:4], "little"), len(table) - 4
        if says > max(there, 0):
            raise CheckpointError(
                f"{path}: its precompiled_charsmap says that it holds {says:,} bytes, and {max(there, 0):,} are there."
            )


def _try_tokenizer(tokenizer: Any, source: str) -> None:
    """Encode, pad and decode a text now: what is wrong in its files would show in the middle of the work.

    Raises:
        CheckpointError: a field of its files is of another kind, or it makes no ids. Whatever the library raises is the caller's.
    """
    most = tokenizer.model_max_length
    if isinstance(most, bool) or not isinstance(most, int | float) or not most >= 1:
        raise CheckpointError(
            f"{source}: tokenizer_config.json has model_max_length {quoted(most)}, wanted a number of at least 1."
        )
    if isinstance(most, float):
        tokenizer.model_max_length = int(min(most, 1e30))
    template = tokenizer.chat_template
    if not isinstance(template, str | None):
        named = template if isinstance(template, dict) else {"": None}
        if not all(isinstance(part, str) for pair in named.items() for part in pair):
            raise CheckpointError(f"{source}: its chat template is {quoted(template)}, wanted text, or texts by name.")
    names = tokenizer.model_input_names
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{source}: tokenizer_config.json has model_input_names {quoted(names)}, wanted a list of names, input_ids first."
        )
    # Of Tapas and LayoutLM, which take tables, and words with boxes.
    if type(tokenizer).__call__ is not PreTrainedTokenizerBase.__call__:
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= _MOST_TOKENS:  # tokenizers counts up to it whenever it writes or hashes the table: minutes, and GiBs
        raise CheckpointError(f"{source}: a token has the id {largest:,}, wanted ids below {_MOST_TOKENS:,}.")
    encoded = tokenizer([_TRIED, "b"], padding=tokenizer.pad_token is not None)
    for ids in encoded["input_ids"]:
        if not all(type(i) is int and 0 <= i < _MOST_TOKENS for i in ids):
            raise CheckpointError(
                f"{source}: tokenizer.json makes the ids {quoted(ids)}, wanted numbers below {_MOST_TOKENS:,}."
            )
        tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.pad_token is not None:  # as rows are put together, one by one
        tokenizer.pad([{name: rows[i] for name, rows in encoded.items()} for i in range(2)])
    for kind in ("eos", "pad", "bos"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None and not (type(token) is int and 0 <= token < _MOST_TOKENS):
            raise CheckpointError(f"{source}: its {kind}_token is {quoted(token)} as an id, wanted one number.")
