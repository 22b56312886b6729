"""Weights in safetensors files, one tensor at a time.

Files are read into fresh memory, not mapped: mapped pages count as resident until the mapping goes, and a
scan of shards would end up holding the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .. import names
from ..errors import CheckpointError, quoted
from ..records import Fingerprint, checked, parse_json
from ..records.schema import Count
from .headers import Span, find_shards, read_config, read_header, read_index
from .layouts import Layout, Recipe, layout_of, must_ask, skeleton_in
from .parameters import by_layout, by_names
from .quantized import dequantize_4bit, int8_values
from .shards import LocalShards, Shards, ends_of, read_bytes
from .source import DTYPES, SAMPLE, TensorInfo, split_found, structure_of

_BLOCK_SIZES = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


@dataclass(frozen=True)
class _QuantState:
    """What bitsandbytes writes beside a 4-bit matrix. Source: bitsandbytes 0.50, functional.py, `QuantState.as_dict`."""

    shape: tuple[Count, Count]
    blocksize: _BLOCK_SIZES
    quant_type: Literal["nf4", "fp4"]
    dtype: Literal["float16", "bfloat16", "float32"]
    nested_blocksize: _BLOCK_SIZES | None = None
    nested_dtype: str | None = None
    nested_offset: float | None = None


class FileWeights:
    """A checkpoint in safetensors files.

    Args:
        files: all of its files; `config.json` is read beside the first.
        model_id, revision: what it is called.
        folder: that the files make up, None for a file that was given alone.
        skeleton: the model, without values, whose names and shapes are wanted (`layouts.skeleton_like`); None for the
            class that config.json names.
        shards: who reads the files; None where they are files of this machine.
    Attributes:
        layout: what the model class makes of the stored tensors; None where nobody had to, or could, be asked.
    """

    kind: Literal["file"] = "file"

    def __init__(
        self,
        files: Sequence[Path],
        model_id: str | None = None,
        revision: str | None = None,
        folder: Path | None = None,
        skeleton: nn.Module | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.shards: Shards = LocalShards() if shards is None else shards
        self.model_id, self.revision, self.folder = model_id, revision, folder
        self.files = tuple(files)
        self.notes: tuple[str, ...] = ()
        self._spans: dict[str, tuple[Path, Span]] = {}
        for path, header in zip(self.files, self.shards.headers(self.files), strict=True):
            for name, span in header.items():
                if name in self._spans:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is also in {self._spans[name][0].name}, wanted it once."
                    )
                self._spans[name] = (path, span)
        index = self.files[0].with_name("model.safetensors.index.json")
        if folder and index.is_file() and self.files[0].name != "model.safetensors":
            for name, file in read_index(index).items():
                if name not in self._spans:
                    raise CheckpointError(f"{index}: tensor {name!r} should be in {file}, and is not.")
        config = self.files[0].with_name("config.json")
        self.config = read_config(config)
        self._quantization = self._quantization_method()
        if self._quantization:
            self.notes += (f"weights are stored {self._quantization}; they were dequantized one matrix at a time",)
        spans = {name: span for name, (_, span) in self._spans.items()}
        self.layout = self._layout(skeleton)
        self._logical = {
            item.info.name: item
            for item in (
                by_names(spans, self.config, self._quantized, self._belongs_to_quantized)
                if self.layout is None
                else by_layout(self.layout, spans, self._quantized)
            )
        }
        if not self._logical:
            raise CheckpointError(f"{self.files[0]}: holds no floating-point tensors.")
        self._made: tuple[Recipe | None, dict[str, Tensor]] = (None, {})
        self._making = threading.Lock()
        self.tied = self._tied()

    def seen_by(self, skeleton: nn.Module | None) -> FileWeights:
        """The same checkpoint under the names of another class; None for the names that it has."""
        if skeleton is None:
            return self
        return FileWeights(self.files, self.model_id, self.revision, self.folder, skeleton, self.shards)

    # -- what is there

    def _layout(self, skeleton: nn.Module | None) -> Layout | None:
        shapes = {}
        for name, (_, span) in self._spans.items():
            quantized = self._quantized(name)
            if quantized or not self._belongs_to_quantized(name):
                shapes[name] = quantized[0] if quantized else span.shape
        if skeleton is None and (self.folder is None or not must_ask(self.config, list(shapes))):
            return None
        try:
            skeleton = skeleton or skeleton_in(self.files[0].parent, self.config)
            layout = None if skeleton is None else layout_of(skeleton, shapes)
        except CheckpointError as error:
            self.notes += (f"names and layouts are the file's own, transformers could not be asked: {error}",)
            return None
        if layout is None or not layout.recipes:
            return None
        if layout.ignored:
            self.notes += (
                f"{len(layout.ignored)} stored tensors are not {type(skeleton).__name__}'s, first {layout.ignored[0]}",
            )
        return layout

    def _quantization_method(self) -> str | None:
        settings = self.config.get("quantization_config")
        if not isinstance(settings, dict):
            return None
        method = settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "unknown")
        if method != "bitsandbytes":
            raise CheckpointError(
                f"{self.files[0].parent}: weights are quantized by {quoted(method)}, wanted float or bitsandbytes weights; use"
                " the checkpoint they were quantized from."
            )
        return f"in bitsandbytes {'4-bit' if settings.get('load_in_4bit') else '8-bit'}"

    def _quantized(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """(shape, word) of a bitsandbytes weight as `save_pretrained` of a quantized model stores it."""
        if not self._quantization or not name.endswith(".weight"):
            return None
        state = next(
            (n for n in (f"{name}.quant_state.bitsandbytes__{t}" for t in ("nf4", "fp4")) if n in self._spans), None
        )
        if state:
            return self._described(name, state).shape, state.rpartition("__")[2]
        if name.removesuffix("weight") + "SCB" in self._spans:
            values, scales = self._spans[name][1], self._spans[name.removesuffix("weight") + "SCB"][1]
            if (values.dtype, scales.dtype, math.prod(scales.shape)) != ("I8", "F32", (values.shape or (0,))[0]):
                raise CheckpointError(f"{name}: is no int8 matrix with a scale in float32 for each row.")
            return values.shape, "int8"
        return None

    def _described(self, name: str, state: str) -> _QuantState:
        """The state of a 4-bit matrix, whose parts are as large as it says: bitsandbytes' own code does not look.

        Raises:
            CheckpointError: it is damaged.
        """
        text = bytes(self._stored(state).view(torch.uint8).numpy()).decode("utf-8", "replace")
        found = checked(parse_json(text, state), _QuantState, state)
        values = math.prod(found.shape)
        blocks = -(-values // found.blocksize)
        wanted = {"": (values + 1) // 2, ".absmax": blocks, ".quant_map": 16}
        if found.nested_blocksize is not None:
            wanted |= {".nested_absmax": -(-blocks // found.nested_blocksize), ".nested_quant_map": 256}
        for part, count in wanted.items():
            _, span = self._spans.get(f"{name}{part}", (None, None))
            if span is None or math.prod(span.shape) != count:
                seen = "missing" if span is None else f"of the shape {span.shape}"
                raise CheckpointError(
                    f"{name}{part}: is {seen}, wanted {count} values for a 4-bit matrix of {found.shape}."
                )
        return found

    def _belongs_to_quantized(self, name: str) -> bool:
        return bool(self._quantization) and (".weight." in name or name.endswith((".SCB", ".weight_format")))

    def _tied(self) -> tuple[tuple[str, ...], ...]:
        """What the model class will tie on loading: the head to the embedding, T5's stacks to the shared table."""
        present = self._logical
        if self.layout is not None:
            groups = (group for group in self.layout.tied if group[0] in present)
            return tuple(group for group in groups if self._equal([name for name in group if name in present]))
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

    def _equal(self, group: Sequence[str]) -> bool:
        """Whether tensors that a class ties hold the same values where several are stored; transformers ties them then."""
        first, *others = group
        if self.received is not None:  # their ends tell two tables apart, and a gigabyte need not come twice
            ends = [torch.cat(self.ends(name, SAMPLE)) for name in group]
            return all(torch.equal(ends[0], end) for end in ends[1:])
        return all(
            self._logical[first].info.shape == self._logical[other].info.shape
            and torch.equal(self.read(first), self.read(other))
            for other in others
        )

    def tensors(self) -> list[TensorInfo]:
        return [item.info for item in self._logical.values()]

    def recipe(self, name: str) -> Recipe | None:
        """How a parameter is made whose elements lie mixed with others' in the stored tensors; None for any other."""
        item = self._logical.get(name)
        return None if item is None else item.recipe

    def whole(self, name: str) -> str | None:
        """The stored tensor that a parameter is, as it is; None where it is made of several, or of part of one."""
        item = self._logical.get(name)
        simple = item is not None and item.recipe is None and [len(part) for part in item.parts] == [1]
        return (
            item.parts[0][0] if simple and item is not None and item.info.dtype not in {"nf4", "fp4", "int8"} else None
        )

    def made_of(self) -> dict[str, tuple[str, ...]]:
        """{parameter: the stored tensors that it is made of}."""
        return {
            name: item.recipe.stored if item.recipe else tuple(part for parts in item.parts for part in parts)
            for name, item in self._logical.items()
        }

    def mixed(self) -> dict[str, Recipe]:
        """{stored tensor: its recipe} of all such parameters."""
        recipes = (item.recipe for item in self._logical.values() if item.recipe is not None)
        return {stored: recipe for recipe in recipes for stored in recipe.stored}

    # -- reading

    def read(self, name: str) -> Tensor:
        item, expert = split_found(name, self._logical, self.model_id)
        if item.recipe is not None:
            whole = self._converted(item.recipe)[item.info.name]
            return whole.clone() if expert is None else whole[expert].clone()
        if item.slab:
            return self._stored(item.parts[0][0], slab=expert)
        if item.info.experts is None:
            if len(item.parts[0]) == 1:
                return self._matrix(item.parts[0][0], item.info)
            return torch.cat([self._stored(n) for n in item.parts[0]]).reshape(item.info.shape)
        chosen = range(item.info.experts) if expert is None else [expert]
        read = [torch.cat([self._stored(n) for n in item.parts[e]]) for e in chosen]
        return torch.stack(read) if expert is None else read[0]

    def _converted(self, recipe: Recipe) -> dict[str, Tensor]:
        """{parameter: values} of a recipe; the last one is kept, because experts are read one after the other."""
        with self._making:
            if self._made[0] is not recipe:
                self._made = (None, {})
                self._made = (recipe, recipe.convert({name: self._stored(name) for name in recipe.stored}))
            return self._made[1]

    def as_stored(self, name: str) -> Tensor:
        """A stored tensor by its name in the file."""
        return self._stored(name)

    def _matrix(self, stored: str, info: TensorInfo) -> Tensor:
        if info.dtype == "int8":
            return int8_values(self._stored(stored), self._stored(stored.removesuffix("weight") + "SCB"))
        if info.dtype in {"nf4", "fp4"}:
            parts = {n: self._stored(n) for n in self._spans if n.startswith(f"{stored}.")}
            return dequantize_4bit(self._stored(stored), parts)
        values = self._stored(stored)
        if values.element_size() > 1:
            return values
        scale = next((f"{stored}{end}" for end in ("_scale_inv", "_scale") if f"{stored}{end}" in self._spans), None)
        if scale is not None:
            raise CheckpointError(
                f"{self._spans[stored][0]}: tensor {stored!r} is {info.dtype} with {scale!r} beside it, wanted weights that are "
                "not scaled; use the checkpoint they were quantized from."
            )
        return values.float()  # float8 knows next to no arithmetic

    def _stored(self, name: str, slab: int | None = None) -> Tensor:
        path, span = self._spans[name]
        begin, end, shape = span.begin, span.end, span.shape
        if slab is not None:
            size = (end - begin) // shape[0]
            begin, end, shape = begin + slab * size, begin + (slab + 1) * size, shape[1:]
        return self.shards.read(path, begin, end).view(DTYPES[span.dtype]).reshape(shape)

    def place_of(self, stored: str) -> tuple[Path, Span]:
        """The file and the byte range of a stored tensor, by its name in the file."""
        return self._spans[stored]

    def spans(self, path: Path) -> dict[str, Span]:
        """{stored tensor: Span} of one of the files, in the order of the bytes."""
        return {name: span for name, (where, span) in self._spans.items() if where == path}

    def ends(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        """The first and the last `size` bytes of a tensor, as flat values; of one that lies in parts it is put together."""
        if self.whole(name) is None:
            values = self.read(name).reshape(-1)
            count = max(1, size // values.element_size())
            return values[:count], values[-count:]
        path, span = self._spans[self._logical[name].parts[0][0]]
        dtype = DTYPES[span.dtype]
        head = self.shards.read(path, span.begin, min(span.end, span.begin + size))
        tail = self.shards.read(path, max(span.begin, span.end - size), span.end)
        return head.view(dtype), tail.view(dtype)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(structure_of(self.tensors()), self._content, "file")

    def identity(self) -> str:
        return self.shards.identity(self.files) or self._content

    @property
    def received(self) -> int | None:
        return self.shards.received

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256()
        spans = sorted(self._spans.items())
        ends = {name: list(ends_of(span.begin, span.end)) for name, (_, span) in spans}
        parts = self.shards.read_many([(path, *end) for name, (path, _) in spans for end in ends[name]])
        for name, (_, span) in spans:
            digest.update(json.dumps([name, span.dtype, list(span.shape)]).encode())
            for _ in ends[name]:
                digest.update(next(parts).numpy().data)
        return digest.hexdigest()


def read_stored(folder: Path, name: str) -> Tensor:
    """One tensor of a folder's safetensors files, by its name in them, in its stored dtype and shape.

    Raises:
        CheckpointError: no such tensor, or no such folder any more.
    """
    for path in find_shards(folder):
        span = read_header(path).get(name)
        if span is not None:
            return read_bytes(path, span.begin, span.end).view(DTYPES[span.dtype]).reshape(span.shape)
    raise CheckpointError(f"{folder}: no tensor {name!r} any more.")


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
        if item.recipe is not None:
            continue
        for part in (stored for parts in item.parts for stored in parts):
            span = files._spans[part][1]
            rows, columns = as_matrix(item.info.shape if len(item.parts) == len(item.parts[0]) == 1 else span.shape)
            found[part] = Place(item.info.name, first, rows, columns)
            first += rows
    return found
