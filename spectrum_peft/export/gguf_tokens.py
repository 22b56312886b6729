"""A tokenizer in a `.gguf` file: its tokens, merges and special tokens, and the name of the rule by which it splits text.

llama.cpp knows byte-level BPE by names (`tokenizer.ggml.pre`), each a regex in its src/llama-vocab.cpp. A tokenizer gets one only
if its tokenizer.json says that very rule; another one would split text in another way than in training, without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, one_line, quoted
from ..records import checked, is_file, read_mapping
from ..records.schema import Count, Name, Text

_OTHERWISE = "convert it with llama.cpp's own convert_hf_to_gguf.py"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regex that text is split by before bytes are merged -> llama.cpp's name.
_RULES = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}


def add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """
    Args:
        writer: a `gguf.GGUFWriter`.
        folder: of the checkpoint.
        rows: of its embedding; ids beyond the tokenizer's are filled up.
    Raises:
        CheckpointError: no tokenizer, one of another kind, or one with more ids than rows.
    """
    import gguf

    path = folder / "tokenizer.json"
    if not is_file(path):
        raise CheckpointError(f"{folder}: has no tokenizer.json, which a .gguf file holds; {_OTHERWISE}.")
    fields = read_mapping(path)
    checked(fields, _Tokenizer, path)
    name = _rule(fields, path)
    if not isinstance(fields["model"]["vocab"], dict):
        raise CheckpointError(f"{path}: model.vocab is a list, wanted a mapping of tokens to ids.")
    texts = [f"[PAD{i}]" for i in range(rows)]
    kinds = [gguf.TokenType.UNUSED] * rows
    added = {token["id"]: token for token in fields.get("added_tokens") or ()}
    vocabulary = {**fields["model"]["vocab"], **{token["content"]: i for i, token in added.items()}}
    for text, i in vocabulary.items():
        if i >= rows:
            raise CheckpointError(f"{path}: token {quoted(text)} has the id {i}, and the embedding has {rows} rows.")
        texts[i] = text
        kinds[i] = gguf.TokenType.NORMAL
        if i in added:
            kinds[i] = gguf.TokenType.CONTROL if added[i].get("special") else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    try:
        gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows).add_to_gguf(writer, quiet=True)
    except Exception as error:  # gguf reads the same files once more and expects what tokenizers writes
        raise CheckpointError(
            f"{folder}: its tokenizer files hold what gguf cannot read ({type(error).__name__}: {one_line(error)})."
        ) from error


@dataclass(frozen=True)
class _Added:
    """A token beside the vocabulary of the model."""

    id: Count
    content: Text
    special: bool = False


@dataclass(frozen=True)
class _Model:
    """The model of a tokenizer.json."""

    vocab: dict[Text, Count] | list[Any]  # a list in models of other types
    type: Name | None = None
    merges: list[Any] | None = None
    byte_fallback: bool | None = None


@dataclass(frozen=True)
class _Split:
    """How text is split before, in one step or several."""

    type: Name | None = None
    pretokenizers: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Tokenizer:
    """The fields of a tokenizer.json that are read here."""

    model: _Model
    added_tokens: list[_Added] | None = None
    pre_tokenizer: _Split | None = None


def _rule(fields: Any, path: Path) -> str:
    """llama.cpp's name of the rule by which a tokenizer.json splits text."""
    model, before = fields.get("model") or {}, fields.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    kinds = [step.get("type") for step in steps]
    if model.get("type") == "BPE" and not model.get("merges"):
        raise CheckpointError(f"{path}: has no merges, without which llama.cpp opens no tokenizer of this kind.")
    whole = model.get("type") == "BPE" and not model.get("byte_fallback") and kinds[-1:] == ["ByteLevel"]
    if whole and not steps[-1].get("add_prefix_space"):
        splits = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and splits:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and splits and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not splits and steps[0].get("behavior") == "Isolated":
            pattern = steps[0].get("pattern")
            found = _RULES.get(str(pattern.get("Regex"))) if isinstance(pattern, dict) else None
            if found is not None:
                return found
    raise CheckpointError(
        f"{path}: splits text by a rule for which no name of llama.cpp is known here (byte-level BPE as in GPT-2, SmolLM, "
        f"Llama 3 and Qwen 2 to 3 is); {_OTHERWISE}."
    )
