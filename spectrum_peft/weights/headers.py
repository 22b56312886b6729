"""What a checkpoint's files say before a tensor is read: headers, the index, the config, which files there are."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, no_such
from ..records import checked, is_file, parse_json, read_mapping
from ..records.schema import Count, Name, Shape
from .source import DTYPES

_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    " Convert them: from_pretrained(folder) of the class that config.json names under architectures (AutoModel has no head), "
    "then save_pretrained(new_folder), which writes safetensors."
)


_MOST_EMPTY = 1 << 20  # longest side of a tensor that has no elements: nothing in the file bounds it


class Span(NamedTuple):
    """Where a tensor lies in a safetensors file.

    Attributes:
        dtype: safetensors' tag, `BF16`.
        shape: as stored.
        begin, end: byte range in the file (not in its data part); end - begin is the tensor's size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


_PARTS = re.compile(r"^n(um)?_.*(layer|block|expert|head|stage)|_layers$|^n_?layers?$|^depths?$")
_MOST_PARTS = 10_000


@dataclass(frozen=True)
class _HeaderRow:
    """What a header says of a tensor."""

    dtype: str
    shape: Shape
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True)
class _Index:
    """The fields of model.safetensors.index.json that are read: {tensor: file}."""

    weight_map: dict[Name, Name]
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Config:
    """The fields of config.json that are read here; the rest is transformers' to check."""

    model_type: Name | None = None
    architectures: tuple[Name, ...] | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: dict[str, Any] | None = None
    vocab_size: Count | None = None


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file} of a `model.safetensors.index.json`.

    Raises:
        CheckpointError: not that, or it names a file of another folder.
    """
    mapping = checked(read_mapping(path), _Index, path).weight_map
    if not mapping:
        raise CheckpointError(f"{path}: weight_map is empty, wanted {{tensor: file}}.")
    for name in dict.fromkeys(mapping.values()):
        if Path(name).name != name:
            raise CheckpointError(f"{path}: names the file {name!r}, wanted a plain file name in the same folder.")
    return mapping


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's config.json, or nothing where there is none; the fields that are read here have their types."""
    config = read_mapping(path) if is_file(path) else {}
    checked(config, _Config, path)
    _refuse_giants(config, path)
    return config


def _refuse_giants(config: dict[str, Any], path: Path) -> None:
    """
    Raises:
        CheckpointError: a model of so many layers, heads or experts would be built for hours, before a weight is looked at.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_giants(value, path)
        elif isinstance(value, int) and value > _MOST_PARTS and _PARTS.search(key):
            raise CheckpointError(f"{path}: {key} is {value}, wanted at most {_MOST_PARTS:,}.")


def read_header(path: str | os.PathLike[str]) -> dict[str, Span]:
    """The header of a safetensors file: {name: Span} in order of the bytes; every range is checked against the file.

    Raises:
        CheckpointError: not there, empty, truncated, not safetensors, or ranges that overlap, leave holes or do not fit
            shape and dtype; the message names file and tensor.
    Source: https://github.com/huggingface/safetensors#format
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), size, path)
            return header_spans(file.read(length), size, path)
    except FileNotFoundError:
        raise CheckpointError(no_such("file", path)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error


def header_length(start: bytes, size: int, path: object) -> int:
    """How long the header is.

    Args:
        start: the first 8 bytes of the file. size: of the file, bytes. path: for messages.
    Raises:
        CheckpointError: empty, truncated, or not safetensors.
    """
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty, wanted safetensors.")
    length = int.from_bytes(start, "little")
    if size < 8 or length > _HEADER_LIMIT or length > size - 8:
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: its first 8 bytes ask for a header of {length}"
            f" bytes, the file has {size}."
        )
    return length


def header_spans(text: bytes, size: int, path: object) -> dict[str, Span]:
    """`read_header` of what stands after the first 8 bytes.

    Args:
        text: the header. size: of the file, bytes. path: for messages.
    """
    header, data_start = _header_mapping(text, path), 8 + len(text)
    checked(header.pop("__metadata__", {}), dict[str, str], f"{path}: __metadata__")
    spans = []
    checked(list(header), list[Name], f"{path}: names of tensors")
    odd = next((name for name in header if any(c.isdigit() and not c.isdecimal() for c in name)), None)
    if odd is not None:  # `int` does not read it, and transformers asks it to
        raise CheckpointError(f"{path}: tensor {odd!r} has a digit in its name that is no number, wanted 0 to 9.")
    for name, entry in header.items():
        where = f"{path}: tensor {name!r}"
        row = checked(entry, _HeaderRow, where)
        tag, shape, (begin, end) = row.dtype, row.shape, row.data_offsets
        if tag not in DTYPES:
            raise CheckpointError(f"{where}: dtype is {tag!r}, wanted one of {sorted(DTYPES)}.")
        wanted = math.prod(shape) * DTYPES[tag].itemsize
        if not wanted and max(shape) > _MOST_EMPTY:
            raise CheckpointError(f"{where}: has the shape {shape} and no elements, wanted a tensor that could be one.")
        if end - begin != wanted:
            raise CheckpointError(
                f"{where}: offsets [{begin}, {end}] hold {end - begin} bytes, wanted {wanted} for {tag} {shape}."
            )
        if data_start + end > size:
            raise CheckpointError(
                f"{where}: ends at byte {data_start + end}, the file has {size}: it is truncated, fetch it again."
            )
        spans.append((name, Span(tag, shape, data_start + begin, data_start + end)))
    spans.sort(key=lambda item: (item[1].begin, item[1].end))
    at, before = data_start, "the header"
    for name, span in spans:
        if span.begin != at:
            what = "overlaps" if span.begin < at else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {span.begin}, wanted {at}: it {what} {before}."
            )
        at, before = span.end, f"{name!r}"
    if at != size:
        raise CheckpointError(f"{path}: the tensors end at byte {at}, the file has {size}, wanted them equal.")
    return dict(spans)


def _header_mapping(text: bytes, path: object) -> dict[str, Any]:
    try:
        header = parse_json(text.decode("utf-8"), f"{path}: not a safetensors file: its header")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is no text ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: not a safetensors file: its header is a {type(header).__name__}, wanted a mapping."
        )
    return header


def refuse_sharded(folder: Path) -> None:
    """
    Raises:
        CheckpointError: the folder holds what the processes of a sharded run saved to go on from, and no model.
    """
    for pattern, joined in (
        ("pytorch_model_fsdp_[0-9]*", "accelerate merge-weights {found} OUT joins its weights"),
        ("*.distcp", "accelerate merge-weights {folder} OUT joins its weights"),
        ("global_step[0-9]*", "{folder}/zero_to_fp32.py joins its weights"),
    ):
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found is not None and not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{folder}: holds a sharded checkpoint ({found.name}), which is no model; --resume-from-checkpoint goes on from "
                f"it, {joined.format(found=found, folder=folder)}."
            )


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in a folder, as transformers would choose them.

    `model.safetensors`; else the shards of `model.safetensors.index.json`; else `model-00001-of-0000N.safetensors`, all
    N; else every safetensors file there is.

    Raises:
        CheckpointError: none (pickle or GGUF files are named), or a shard that the index or the numbering names is
            missing.
    """
    refuse_sharded(folder)
    chosen = choose_shards(folder, [p.name for p in folder.iterdir() if p.is_file()], read_index)
    return [folder / name for name in chosen]


def choose_shards(folder: object, names: Iterable[str], index_at: Callable[[Path], Mapping[str, str]]) -> list[str]:
    """`find_shards` among the names of the files that a folder, or a repository, has at its top.

    Args:
        folder: for messages, and where the index is looked for.
        index_at: reads the index at a path.
    """
    present = set(names)
    if "model.safetensors" in present:
        return ["model.safetensors"]
    if INDEX in present:
        mapping = index_at(Path(str(folder)) / INDEX)
        for name in dict.fromkeys(mapping.values()):
            if name not in present:
                first = next(tensor for tensor, where in mapping.items() if where == name)
                raise CheckpointError(f"{folder}/{name}: no such file, but {INDEX} names it (for {first!r}).")
        return sorted(set(mapping.values()))
    found = sorted(name for name in present if name.endswith(".safetensors"))
    numbered = {name: re.fullmatch(r".*-(\d{1,6})-of-(\d{1,6})\.safetensors", name) for name in found}
    shards = [name for name, match in numbered.items() if match]
    if shards:
        match = numbered[shards[0]]
        assert match is not None
        total = int(match[2])
        there = {int(m[1]) for m in numbered.values() if m}
        missing = sorted(set(range(1, total + 1)) - there)
        if missing:
            raise CheckpointError(f"{folder}: of {total} shards number {missing[0]} is missing (have {sorted(there)}).")
        return shards
    if found:
        return found
    others = sorted(name for name in present if name.endswith(PICKLES))
    if others:
        raise CheckpointError(
            f"{folder}: holds only pickle files ({others[0]}), which are not read: opening one runs the code it holds.{CONVERT}"
        )
    ggufs = sorted(name for name in present if name.endswith(".gguf"))
    if ggufs:
        raise CheckpointError(f"{folder}: no safetensors file; give the GGUF file itself: {folder}/{ggufs[0]}")
    raise CheckpointError(f"{folder}: no safetensors file, wanted model.safetensors or shards of it.")
