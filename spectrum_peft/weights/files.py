"""Weights in safetensors files, one tensor at a time.

Files are read into fresh memory, not mapped: mapped pages count as resident until the mapping goes, and a
scan of shards would end up holding the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .. import names
from ..errors import CheckpointError
from ..records import Fingerprint
from .forms import describes, forms_of, told
from .headers import Span, find_shards, read_config, read_header, read_index
from .layouts import Layout, Recipe, layout_of, must_ask, skeleton_in
from .parameters import by_layout, by_names
from .shards import LocalShards, Shards, ends_of, read_bytes
from .source import DTYPES, SAMPLE, TensorInfo, split_found, structure_of


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
        forms: {tensor: how it is stored} of all floating-point ones.
        layout: what the model class makes of the stored tensors; None where nobody had to, or could, be asked.
        strange: the first block's parameter of `skeleton`, or its first one, where none of its blocks is stored; else None.
    """

    kind: Literal["file"] = "file"
    strange: str | None = None

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
        spans = {name: span for name, (_, span) in self._spans.items()}
        self.forms = forms_of(spans, self.config, self._stored, self.files[0].parent if folder else self.files[0])
        self.notes += told(self.forms)
        self.layout = self._layout(skeleton)
        self._logical = {
            item.info.name: item
            for item in (
                by_names(self.forms, self.config) if self.layout is None else by_layout(self.layout, self.forms)
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
        parts = {part for form in self.forms.values() for part in form.parts}
        shapes = {name: form.shape for name, form in self.forms.items()}
        if parts == set(shapes):  # nothing is quantized: what is no float either is a name that the class may know
            shapes = {name: span.shape for name, (_, span) in self._spans.items()}
        if skeleton is None and (self.folder is None or not must_ask(self.config, list(shapes))):
            return None
        given = skeleton is not None
        try:
            skeleton = skeleton or skeleton_in(self.files[0].parent, self.config)
            layout = None if skeleton is None else layout_of(skeleton, shapes)
        except CheckpointError as error:
            self.notes += (f"names and layouts are the file's own, transformers could not be asked: {error}",)
            return None
        if layout is not None and given:
            self.strange = layout.stranger()
        if layout is None or not layout.recipes:
            return None
        if layout.ignored:
            self.notes += (
                f"{len(layout.ignored)} stored tensors are not {type(skeleton).__name__}'s, first {layout.ignored[0]}",
            )
        return layout

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
        if item is None or item.recipe is not None or [len(part) for part in item.parts] != [1]:
            return None
        return item.parts[0][0] if self.forms[item.parts[0][0]].what is None else None

    def tensor_of(self, stored: str) -> str | None:
        """The tensor that a stored one is, or is the first part of; None for other parts, and for what describes them."""
        if stored not in self._parts:
            return None if len(self._parts) > len(self.forms) and describes(stored) else stored
        return self._parts[stored]

    @cached_property
    def _parts(self) -> dict[str, str | None]:
        """{stored tensor: what it is, or is the first part of} of all that belong to a float tensor."""
        return {p: name if i == 0 else None for name, form in self.forms.items() for i, p in enumerate(form.parts)}

    def undone(self, name: str) -> Callable[[], Tensor] | None:
        """Reads a tensor of the file that is stored quantized; None where it is stored as it is."""
        form = self.forms.get(name)
        return None if form is None or form.what is None else lambda: self._value(name)

    def quantized(self) -> dict[str, str]:
        """{parameter: the form that it, or part of it, is stored in}, in words, of those that are dequantized when read."""
        made = self.made_of()
        found = {name: next((w for n in parts if (w := self.forms[n].what)), None) for name, parts in made.items()}
        return {name: what for name, what in found.items() if what is not None}

    def made_of(self) -> dict[str, tuple[str, ...]]:
        """{parameter: the tensors of the file that it is made of}; one that is quantized is one, whatever it is stored as."""
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
            return self._value(item.parts[0][0], slab=expert)
        if item.info.experts is None:
            read = [self._value(n) for n in item.parts[0]]
            return (read[0] if len(read) == 1 else torch.cat(read)).reshape(item.info.shape)
        chosen = range(item.info.experts) if expert is None else [expert]
        read = [torch.cat([self._value(n) for n in item.parts[e]]) for e in chosen]
        return torch.stack(read) if expert is None else read[0]

    def _converted(self, recipe: Recipe) -> dict[str, Tensor]:
        """{parameter: values} of a recipe; the last one is kept, because experts are read one after the other."""
        with self._making:
            if self._made[0] is not recipe:
                self._made = (None, {})
                self._made = (recipe, recipe.convert({name: self._value(name) for name in recipe.stored}))
            return self._made[1]

    def as_stored(self, name: str) -> Tensor:
        """A tensor by its name in the file, in its dtype there, or dequantized."""
        undone = self.undone(name)
        return self._stored(name) if undone is None else undone()

    def _value(self, name: str, slab: int | None = None) -> Tensor:
        """A float tensor of the file by its name, or the part of it that is an expert's."""
        return self.forms[name].values(lambda part: self._stored(part, self._own(name, part, slab)))

    def _stored(self, name: str, slab: int | None = None) -> Tensor:
        span = self._spans[name][1]
        values = self.shards.read(*self._range(name, slab)).view(DTYPES[span.dtype])
        return values.reshape(span.shape if slab is None else span.shape[1:])

    def _range(self, name: str, slab: int | None = None) -> tuple[Path, int, int]:
        """The file and the bytes of a stored tensor, or of its part that is an expert's."""
        path, span = self._spans[name]
        if slab is None:
            return path, span.begin, span.end
        size = (span.end - span.begin) // span.shape[0]
        return path, span.begin + slab * size, span.begin + (slab + 1) * size

    def ranges(self, name: str) -> list[tuple[Path, int, int]]:
        """What `read` of a tensor, or of one expert, reads; empty where it is made of more than its own bytes."""
        item, expert = split_found(name, self._logical, self.model_id)
        if item.recipe is not None:
            return []
        chosen = (
            item.parts if item.info.experts is None or item.slab or expert is None else item.parts[expert : expert + 1]
        )
        slab = expert if item.slab else None
        read = [(name, part) for stored in chosen for name in stored for part in self.forms[name].parts]
        return [self._range(part, self._own(name, part, slab)) for name, part in read]

    def _own(self, name: str, part: str, slab: int | None) -> int | None:
        """The expert of which a part of a tensor is read; None for all of it, where it is every expert's."""
        shape = self._spans[part][1].shape
        return slab if shape and shape[0] == self.forms[name].shape[0] else None

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
            shape = files.forms[part].shape
            rows, columns = as_matrix(item.info.shape if len(item.parts) == len(item.parts[0]) == 1 else shape)
            found[part] = Place(item.info.name, first, rows, columns)
            first += rows
    return found
