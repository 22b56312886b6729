"""Weights in safetensors files: headers, shards, tensors one at a time.

Files are read into fresh memory, not mapped: mapped pages count as resident until the mapping goes, and a
scan of shards would end up holding the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError
from ..records import Fingerprint, read_mapping
from .quantized import dequantize_4bit, int8_values
from .source import DTYPES, SAMPLE, TensorInfo, dtype_name, split_found, structure_of

_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Model types whose blocks are built of transformers' Conv1D, which stores (in, out).
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"})
_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
# Buffers that old files carry among the weights.
_BUFFERS = re.compile(
    r"(rotary_emb|rotary_pos_emb)\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$|position_ids$"
)
_EXPERT = re.compile(
    r"^(?P<owner>.*\.experts)\.(?P<expert>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$"
)
CONVERT = (
    " Convert them: from_pretrained(folder) of the class that config.json names under architectures (AutoModel has no head), "
    "then save_pretrained(new_folder), which writes safetensors."
)


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


def read_header(path: str | os.PathLike[str]) -> dict[str, Span]:
    """The header of a safetensors file: {name: Span} in order of the bytes; every range is checked against the file.

    Raises:
        CheckpointError: not there, empty, truncated, not safetensors, or ranges that overlap, leave holes or do not fit
            shape and dtype; the message names file and tensor.
    Source: https://github.com/huggingface/safetensors#format
    """
    path = Path(path)
    header, data_start, size = _raw_header(path)
    spans = []
    for name, row in header.items():
        if name == "__metadata__":
            continue
        where = f"{path}: tensor {name!r}"
        try:
            tag, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{where}: its header entry is {row!r}, wanted dtype, shape and data_offsets."
            ) from error
        if tag not in DTYPES:
            raise CheckpointError(f"{where}: dtype is {tag!r}, wanted one of {sorted(DTYPES)}.")
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
            raise CheckpointError(f"{where}: shape {shape} and offsets [{begin}, {end}], wanted integers from 0 up.")
        wanted = math.prod(shape) * DTYPES[tag].itemsize
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


def _raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, first byte of the data, size of the file)."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty, wanted safetensors.")
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _HEADER_LIMIT or length > size - 8:
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated: its first 8 bytes ask for a header of {length}"
                    f" bytes, the file has {size}."
                )
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: not a safetensors file: its header is a {type(header).__name__}, wanted a mapping."
        )
    return header, 8 + length, size


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in a folder, as transformers would choose them.

    `model.safetensors`; else the shards of `model.safetensors.index.json`; else `model-00001-of-0000N.safetensors`, all
    N; else every safetensors file there is.

    Raises:
        CheckpointError: none (pickle or GGUF files are named), or a shard that the index or the numbering names is
            missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        mapping = read_mapping(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{index}: field 'weight_map' is {type(mapping).__name__}, wanted {{tensor: file}}.")
        files = []
        for name in dict.fromkeys(mapping.values()):
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index}: names the file {name!r}, wanted a plain file name in the same folder.")
            if not (folder / name).is_file():
                first = next(tensor for tensor, where in mapping.items() if where == name)
                raise CheckpointError(f"{folder / name}: no such file, but {index.name} names it (for {first!r}).")
            files.append(folder / name)
        return sorted(files)
    found = sorted(folder.glob("*.safetensors"))
    numbered = {path: re.fullmatch(r".*-(\d+)-of-(\d+)\.safetensors", path.name) for path in found}
    shards = [path for path, match in numbered.items() if match]
    if shards:
        match = numbered[shards[0]]
        assert match is not None
        total = int(match[2])
        present = {int(m[1]) for m in numbered.values() if m}
        missing = sorted(set(range(1, total + 1)) - present)
        if missing:
            raise CheckpointError(
                f"{folder}: of {total} shards number {missing[0]} is missing (have {sorted(present)})."
            )
        return shards
    if found:
        return found
    others = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if others:
        raise CheckpointError(f"{folder}: holds only pickle files ({others[0]}), which are not read.{CONVERT}")
    ggufs = sorted(p for p in folder.iterdir() if p.suffix == ".gguf")
    if ggufs:
        raise CheckpointError(f"{folder}: no safetensors file; give the GGUF file itself: {ggufs[0]}")
    raise CheckpointError(f"{folder}: no safetensors file, wanted model.safetensors or shards of it.")


@dataclass(frozen=True)
class Logical:
    """A parameter of the live model and the stored tensors it is made of: `parts[e]` are joined along the rows.

    `slab` means that one stored tensor holds all experts, one after the other.
    """

    info: TensorInfo
    parts: tuple[tuple[str, ...], ...]
    slab: bool = False


class FileWeights:
    """A checkpoint in safetensors files.

    Args:
        files: all of its files; `config.json` is read beside the first.
        model_id, revision: what it is called.
        folder: that the files make up, None for a file that was given alone.
    """

    kind: Literal["file"] = "file"

    def __init__(
        self,
        files: Sequence[Path],
        model_id: str | None = None,
        revision: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.model_id, self.revision, self.folder = model_id, revision, folder
        self.files = tuple(files)
        self.notes: tuple[str, ...] = ()
        self._spans: dict[str, tuple[Path, Span]] = {}
        for path in self.files:
            for name, span in read_header(path).items():
                if name in self._spans:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is also in {self._spans[name][0].name}, wanted it once."
                    )
                self._spans[name] = (path, span)
        index = self.files[0].with_name("model.safetensors.index.json")
        if folder and index.is_file() and self.files[0].name != "model.safetensors":
            for name, file in read_mapping(index)["weight_map"].items():
                if name not in self._spans:
                    raise CheckpointError(f"{index}: tensor {name!r} should be in {file}, and is not.")
        config = self.files[0].with_name("config.json")
        self.config: dict[str, Any] = read_mapping(config) if config.is_file() else {}
        self._quantization = self._quantization_method()
        if self._quantization:
            self.notes += (f"weights are stored {self._quantization}; they were dequantized one matrix at a time",)
        self._logical = {item.info.name: item for item in self._present()}
        if not self._logical:
            raise CheckpointError(f"{self.files[0]}: holds no floating-point tensors.")
        self.tied = self._tied()

    # -- what is there

    def _quantization_method(self) -> str | None:
        settings = self.config.get("quantization_config")
        if not isinstance(settings, dict):
            return None
        method = str(settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "unknown"))
        if method != "bitsandbytes":
            raise CheckpointError(
                f"{self.files[0].parent}: weights are quantized by {method!r}, wanted float or bitsandbytes weights; use"
                " the checkpoint they were quantized from."
            )
        return f"in bitsandbytes {'4-bit' if settings.get('load_in_4bit') else '8-bit'}"

    def _present(self) -> Iterator[Logical]:
        """Stored tensors as parameters of the live model, in checkpoint order."""
        fused: dict[str, dict[int, dict[str, str]]] = {}
        renamed_moe = any(".block_sparse_moe.experts." in name for name in self._spans)
        conv1d = self.config.get("model_type") in _CONV1D_MODELS
        for name in self._spans:
            match = _EXPERT.match(name)
            if match:
                fused.setdefault(match["owner"], {}).setdefault(int(match["expert"]), {})[match["part"]] = name
        for name, (_path, span) in self._spans.items():
            match = _EXPERT.match(name)
            if match:
                owner = match["owner"]
                if owner in fused:  # the first of them stands for all
                    yield from self._fuse(owner, fused.pop(owner))
                continue
            quantized = self._quantized_info(name)
            if quantized:
                yield quantized
                continue
            dtype = DTYPES[span.dtype]
            if not dtype.is_floating_point or _is_buffer(name, span.shape) or self._belongs_to_quantized(name):
                continue
            # transformers 5, conversion_mapping.py, "mixtral": `.block_sparse_moe.` -> `.mlp.`; GPTNeoXForCausalLM:
            # `embed_out.` -> `lm_head.`
            live = name.replace(".block_sparse_moe.", ".mlp.") if renamed_moe else name
            live = re.sub(r"^embed_out\.", "lm_head.", live)
            live = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", live))
            role = names.role(live, span.shape)
            slab = role == "linear" and len(span.shape) == 3
            turned = conv1d and names.module_name(live).rpartition(".")[2] in _CONV1D_NAMES and len(span.shape) == 2
            info = TensorInfo(live, span.shape, dtype_name(dtype), role, span.shape[0] if slab else None, turned)
            yield Logical(info, ((name,),), slab)

    def _fuse(self, owner: str, experts: dict[int, dict[str, str]]) -> Iterator[Logical]:
        """One tensor per expert in the file, one 3-D parameter in the model.

        Source: transformers 5 conversion_mapping.py, "mixtral" (w1, w3 -> gate_up_proj; w2 -> down_proj) and
            "qwen2_moe".
        """
        live_owner = owner.replace(".block_sparse_moe.", ".mlp.")
        if sorted(experts) != list(range(len(experts))):
            raise CheckpointError(f"{owner}: experts are numbered {sorted(experts)}, wanted 0 to {len(experts) - 1}.")
        have = set(experts[0])
        recipes = {
            "gate_up_proj": next(
                (pair for pair in (("w1", "w3"), ("gate_proj", "up_proj")) if have >= set(pair)), None
            ),
            "up_proj": ("up_proj",) if "up_proj" in have and "gate_proj" not in have else None,
            "down_proj": next(((part,) for part in ("w2", "down_proj") if part in have), None),
        }
        for live, recipe in recipes.items():
            if recipe is None:
                continue
            parts = []
            shapes = set()
            for e in range(len(experts)):
                lacking = [part for part in recipe if part not in experts[e]]
                if lacking:
                    raise CheckpointError(
                        f"{owner}.{e}.{lacking[0]}.weight: not in the checkpoint, but expert 0 has it."
                    )
                stored = tuple(experts[e][part] for part in recipe)
                spans = [self._spans[name][1] for name in stored]
                shapes.add((sum(span.shape[0] for span in spans), *spans[0].shape[1:]))
                parts.append(stored)
            if len(shapes) > 1:
                raise CheckpointError(
                    f"{owner}.*.{recipe[0]}: the experts have the shapes {sorted(shapes)}, wanted one shape."
                )
            name = f"{live_owner}.{live}"
            shape = (len(parts), *shapes.pop())
            dtype = dtype_name(DTYPES[self._spans[parts[0][0]][1].dtype])
            yield Logical(TensorInfo(name, shape, dtype, names.role(name, shape), len(parts)), tuple(parts))

    def _quantized_info(self, name: str) -> Logical | None:
        """A bitsandbytes weight as `save_pretrained` of a quantized model stores it."""
        if not self._quantization or not name.endswith(".weight"):
            return None
        state = next(
            (n for n in (f"{name}.quant_state.bitsandbytes__{t}" for t in ("nf4", "fp4")) if n in self._spans), None
        )
        if state:
            described = json.loads(bytes(self._stored(state).numpy()))
            shape = tuple(int(n) for n in described["shape"])
            return Logical(TensorInfo(name, shape, state.rpartition("__")[2], names.role(name, shape)), ((name,),))
        if name.removesuffix("weight") + "SCB" in self._spans:
            shape = self._spans[name][1].shape
            return Logical(TensorInfo(name, shape, "int8", names.role(name, shape)), ((name,),))
        return None

    def _belongs_to_quantized(self, name: str) -> bool:
        return bool(self._quantization) and (".weight." in name or name.endswith((".SCB", ".weight_format")))

    def _tied(self) -> tuple[tuple[str, ...], ...]:
        """What the model class will tie on loading: the head to the embedding, T5's stacks to the shared table."""
        present = self._logical
        architecture = str((self.config.get("architectures") or [""])[0])
        if "shared.weight" in present:
            others = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
            if self.config.get("tie_word_embeddings", "lm_head.weight" not in present):
                others.append("lm_head.weight")
            return (("shared.weight", *others),)
        heads = [t.info.name for t in present.values() if t.info.role == "head" and len(t.info.shape) == 2]
        tables = [
            t.info.name
            for t in present.values()
            if t.info.role == "embedding"
            and names.module_name(t.info.name).rpartition(".")[2]
            in {"embed_tokens", "wte", "embed_in", "word_embeddings"}
        ]
        causal = "CausalLM" in architecture or "LMHead" in architecture
        # A causal model without a stored head has a tied one; with one, the config must say that they are tied.
        if causal and tables and (not heads or self.config.get("tie_word_embeddings") is True):
            return ((tables[0], heads[0] if heads else "lm_head.weight"),)
        return ()

    def tensors(self) -> list[TensorInfo]:
        return [item.info for item in self._logical.values()]

    # -- reading

    def read(self, name: str) -> Tensor:
        item, expert = split_found(name, self._logical, self.model_id)
        if item.slab:
            return self._stored(item.parts[0][0], slab=expert)
        if item.info.experts is None:
            return self._matrix(item.parts[0][0], item.info)
        chosen = range(item.info.experts) if expert is None else [expert]
        read = [torch.cat([self._stored(n) for n in item.parts[e]]) for e in chosen]
        return torch.stack(read) if expert is None else read[0]

    def _matrix(self, stored: str, info: TensorInfo) -> Tensor:
        if info.dtype == "int8":
            return int8_values(self._stored(stored), self._stored(stored.removesuffix("weight") + "SCB"))
        if info.dtype in {"nf4", "fp4"}:
            parts = {n: self._stored(n) for n in self._spans if n.startswith(f"{stored}.")}
            return dequantize_4bit(self._stored(stored), parts)
        return self._stored(stored)

    def _stored(self, name: str, slab: int | None = None) -> Tensor:
        path, span = self._spans[name]
        begin, end, shape = span.begin, span.end, span.shape
        if slab is not None:
            size = (end - begin) // shape[0]
            begin, end, shape = begin + slab * size, begin + (slab + 1) * size, shape[1:]
        return read_bytes(path, begin, end).view(DTYPES[span.dtype]).reshape(shape)

    def place_of(self, stored: str) -> tuple[Path, Span]:
        """The file and the byte range of a stored tensor, by its name in the file."""
        return self._spans[stored]

    def spans(self, path: Path) -> dict[str, Span]:
        """{stored tensor: Span} of one of the files, in the order of the bytes."""
        return {name: span for name, (where, span) in self._spans.items() if where == path}

    def ends(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        """The first and the last `size` bytes of a tensor stored as such, as flat values."""
        path, span = self._spans[self._logical[name].parts[0][0]]
        dtype = DTYPES[span.dtype]
        head = read_bytes(path, span.begin, min(span.end, span.begin + size))
        tail = read_bytes(path, max(span.begin, span.end - size), span.end)
        return head.view(dtype), tail.view(dtype)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(structure_of(self.tensors()), self._content, "file")

    def identity(self) -> str:
        return self._content

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._spans):
            path, span = self._spans[name]
            digest.update(json.dumps([name, span.dtype, list(span.shape)]).encode())
            sample_file(digest, path, span.begin, span.end)
        return digest.hexdigest()


def _is_buffer(name: str, shape: Sequence[int]) -> bool:
    # GPT-2's `attn.bias` of four dimensions is its causal mask; GPT-NeoX has `attention.bias` alike.
    match = _BUFFERS.search(name)
    return bool(match) and (not name.endswith(".bias") or len(shape) == 4)


def read_bytes(path: str | os.PathLike[str], begin: int, end: int, out: Tensor | None = None) -> Tensor:
    """(end - begin,) uint8: that range of a file, in fresh memory, or in `out`, which has that shape and dtype.

    Raises:
        CheckpointError: the file cannot be read, or ends before `end`.
    """
    buffer = torch.empty(end - begin, dtype=torch.uint8) if out is None else out
    if begin == end:
        return buffer
    view = buffer.numpy().data
    try:
        with Path(path).open("rb", buffering=0) as file:
            done = 0
            while done < len(view):  # one call reads at most 2 GiB
                file.seek(begin + done)
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(
                        f"{path}: ends at byte {begin + done}, wanted bytes up to {end}: it is truncated."
                    )
                done += got
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return buffer


def sample_file(digest: Any, path: Path, begin: int, end: int) -> None:
    if end - begin <= 2 * SAMPLE:
        digest.update(read_bytes(path, begin, end).numpy().data)
    else:
        digest.update(read_bytes(path, begin, begin + SAMPLE).numpy().data)
        digest.update(read_bytes(path, end - SAMPLE, end).numpy().data)


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies in the model: rows [first, first + rows) of a parameter seen as a matrix.

    Attributes:
        name: of the parameter. rows, columns: of the stored tensor; fused experts lie one below the other.
    """

    name: str
    first: int
    rows: int
    columns: int


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a parameter seen as a matrix: leading dimensions one below the other, a vector as a column."""
    return (math.prod(shape), 1) if len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])


def places(files: FileWeights) -> dict[str, Place]:
    """{stored tensor: where it lies in the model}, for all that are, or belong to, a parameter of it."""
    found = {}
    for item in files._logical.values():
        first = 0
        for part in (stored for parts in item.parts for stored in parts):
            span = files._spans[part][1]
            rows, columns = as_matrix(item.info.shape if len(item.parts) == len(item.parts[0]) == 1 else span.shape)
            found[part] = Place(item.info.name, first, rows, columns)
            first += rows
    return found
