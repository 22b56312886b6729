"""A checkpoint's files written anew with some parameters changed; everything else stays in its place, byte for byte.

First a layout: every file with every tensor, nothing written yet. Then the writing: byte ranges of frozen tensors are
copied by the kernel, rows of changed ones are computed a chunk at a time on every core, each chunk to its place.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..machine import cores
from ..records import read_mapping, write_text
from ..weights import DTYPES, FileWeights, Place, Recipe, Span, as_matrix, places
from ..weights.threads import one_torch_thread
from ..weights.updates import LowRank, RowChange, Stored, Update, Value
from ..weights.writer import SafetensorsWriter, header_bytes, read_raw_header

INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 18  # elements computed at a time by one thread: 1 MiB in float32, which stays in a core's cache
_JOB = 1 << 24  # elements that one job computes, so that a large table is shared out over the cores
_COPY = 1 << 26  # bytes that one job copies
_OPEN = 8  # updates whose factors are kept in memory at a time


@dataclass
class Tally:
    """What was written.

    Attributes:
        changed, added, copied: stored tensors, in file order; added: the base's files have none of that name.
        rounding: largest |value as computed - value as stored|, 0.0 where nothing was rounded; and where that was.
    """

    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    rounding: float = 0.0
    rounding_at: str | None = None


@dataclass(frozen=True)
class NewTensor:
    """One tensor of the output.

    Attributes:
        source: file and place of the base's bytes, None where the base has none for it.
        place: of its rows in the parameter that they belong to; None for what is no parameter.
        changes: of that parameter, a new value first.
        start: reads the whole parameter as it is before the changes, where that is not the base's stored tensor.
        base: reads the tensor itself, where the base holds it quantized.
        new: the base's files have no tensor of this name.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: tuple[Path, Span] | None
    place: Place | None
    changes: Sequence[Update] = ()
    start: Callable[[], Tensor] | None = None
    new: bool = False
    base: Callable[[], Tensor] | None = None

    @property
    def size(self) -> int:
        """Bytes in the output."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def frozen(self) -> bool:
        """Whether its bytes are the base's."""
        return (
            not self.changes
            and self.start is None
            and self.source is not None
            and self.dtype == DTYPES[self.source[1].dtype]
        )

    @property
    def stored_dtype(self) -> torch.dtype | None:
        return None if self.source is None else DTYPES[self.source[1].dtype]

    @property
    def value(self) -> Value | None:
        return self.changes[0] if self.changes and isinstance(self.changes[0], Value) else None

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor seen as a matrix."""
        return as_matrix(self.shape)

    @property
    def wide(self) -> torch.dtype:
        """What its values are computed in."""
        return torch.float64 if torch.float64 in (self.dtype, self.stored_dtype) else torch.float32


@dataclass(frozen=True)
class Shard:
    """One file of the output.

    Attributes:
        name: file name.
        tensors: in the order of the data.
        header: the file's bytes up to the data.
    """

    name: str
    tensors: tuple[NewTensor, ...]
    header: bytes

    @property
    def size(self) -> int:
        """Bytes of data."""
        return sum(t.size for t in self.tensors)


# --- layout ----------------------------------------------------------------------------------------------------------


def layout(
    files: FileWeights,
    changes: Mapping[str, Sequence[Update]],
    starts: Mapping[str, Callable[[], Tensor]],
    cast: torch.dtype | None,
) -> list[Shard]:
    """Every file of the output, with the base's names, shards, order and metadata.

    Args:
        changes: {parameter: its updates, a new value first}; a parameter that no file holds is added to the last one.
        starts: {parameter: reads it as it is before its changes}, where that is not the base's stored tensor.
        cast: dtype of every floating parameter; None for each tensor's own. What is no parameter keeps its own.
    """
    known = places(files)
    mixed = files.mixed()
    remade = _remade(files, mixed, changes, starts)
    parts = Counter(place.name for place in known.values())
    usual = main_dtype(files)
    shards: list[tuple[Path, list[NewTensor]]] = []
    for path in files.files:
        rows = []
        for stored, span in files.spans(path).items():
            name = files.tensor_of(stored)
            if name is None:  # scales and the like of a quantized matrix are left out: it becomes a float one
                continue
            place, base = known.get(name), files.undone(name)
            source = (path, span) if base is None else None
            dtype, shape = (DTYPES[span.dtype], span.shape) if base is None else (usual, files.forms[name].shape)
            if name in mixed:
                again = tuple(remade.get(name, ()))
                rows.append(NewTensor(name, _cast(dtype, cast), shape, source, None, again, base=base))
                continue
            if place is None:
                dtype = _cast(dtype, cast) if base is not None else dtype
                rows.append(NewTensor(name, dtype, shape, source, None, base=base))
                continue
            mine = changes.get(place.name, ())
            if mine and isinstance(mine[0], Value) and parts[place.name] == 1:
                if len(mine[0].stored.shape) == len(shape):  # the only expert of a layer is stored without its number
                    shape = mine[0].stored.shape  # a table may have grown
            start = starts.get(place.name)
            rows.append(NewTensor(name, _cast(dtype, cast), shape, source, place, mine, start, base=base))
        shards.append((path, rows))
    present = {place.name for place in known.values()} | {n for r in mixed.values() for n in r.parameters}
    for name, mine in changes.items():
        if name not in present:
            shards[-1][1].append(_added(name, mine, files, known, usual, cast))
    return [_shard(path, rows, alone=len(files.files) == 1) for path, rows in shards]


def _remade(
    files: FileWeights,
    mixed: Mapping[str, Recipe],
    changes: Mapping[str, Sequence[Update]],
    starts: Mapping[str, Callable[[], Tensor]],
) -> dict[str, list[Update]]:
    """{stored tensor: its new value}, of parameters whose elements lie mixed in the stored tensors: the parameters are
    changed as a whole and moved back. One group's values are held at a time."""
    lock = threading.Lock()
    last: dict[int, dict[str, Tensor]] = {}

    def group(recipe: Recipe) -> dict[str, Tensor]:
        with lock:
            if id(recipe) not in last:
                last.clear()
                new = {n: _changed(files, n, changes.get(n, ()), starts.get(n)) for n in recipe.parameters}
                last[id(recipe)] = recipe.put_back(new, {n: files.as_stored(n) for n in recipe.stored})
            return last[id(recipe)]

    def value(recipe: Recipe, name: str) -> Value:
        shape = files.forms[name].shape
        return Value(name, name, Stored.computed(shape, lambda: group(recipe)[name]))

    touched = {n for n in (*changes, *starts) if changes.get(n) or n in starts}
    return {name: [value(recipe, name)] for name, recipe in mixed.items() if touched.intersection(recipe.parameters)}


def _changed(files: FileWeights, name: str, mine: Sequence[Update], start: Callable[[], Tensor] | None) -> Tensor:
    """A whole parameter after its changes, float32."""
    changes = list(mine)
    if changes and isinstance(changes[0], Value):
        values = changes.pop(0).stored.whole()  # type: ignore[union-attr]
    else:
        values = files.read(name) if start is None else start()
    shape = values.shape
    rows = values.float().reshape(as_matrix(shape))
    step = shape[1] if len(shape) == 3 else max(len(rows), 1)
    for update in changes:
        assert not isinstance(update, Value)
        change = update.change()
        rows = torch.cat([change(part.clone(), i * step) for i, part in enumerate(rows.split(step))])
    return rows.reshape(shape)


def _cast(dtype: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    return cast if cast is not None and dtype.is_floating_point else dtype


def _added(
    name: str,
    mine: Sequence[Update],
    files: FileWeights,
    known: Mapping[str, Place],
    usual: torch.dtype,
    cast: torch.dtype | None,
) -> NewTensor:
    """A tensor that the base's files lack: a new head, or one that was tied and is not any more."""
    if mine and isinstance(mine[0], Value):
        shape = mine[0].stored.shape
        return NewTensor(name, _cast(usual, cast), shape, None, Place(name, 0, *as_matrix(shape)), mine, new=True)
    kept = next(group[0] for group in files.tied if name in group)
    stored = next(stored for stored, place in known.items() if place.name == kept)
    if (base := files.undone(stored)) is not None:
        shape = files.forms[stored].shape
        place = Place(name, 0, *as_matrix(shape))
        return NewTensor(name, _cast(usual, cast), shape, None, place, mine, new=True, base=base)
    path, span = files.place_of(stored)
    place = Place(name, 0, *as_matrix(span.shape))
    return NewTensor(name, _cast(DTYPES[span.dtype], cast), span.shape, (path, span), place, mine, new=True)


def _shard(path: Path, rows: list[NewTensor], *, alone: bool) -> Shard:
    header, raw = read_raw_header(path)
    listed = [name for name in header if name != "__metadata__"]
    same = [t.name for t in rows] == sorted(listed, key=lambda n: header[n]["data_offsets"]) and all(
        t.source is not None and t.shape == t.source[1].shape and t.dtype == t.stored_dtype for t in rows
    )
    if not same:
        # By falling width, as safetensors itself orders them, so that every tensor stays aligned to its own width.
        rows = sorted(rows, key=lambda t: -t.dtype.itemsize)
        have = {t.name for t in rows}
        order = [n for n in listed if n in have] + [t.name for t in rows if t.name not in header]
        raw = header_bytes({t.name: (t.dtype, t.shape) for t in rows}, header.get("__metadata__"), order)
    return Shard("model.safetensors" if alone else path.name, tuple(rows), raw)


def main_dtype(files: FileWeights) -> torch.dtype:
    """The dtype of most of the checkpoint's float elements; what the config says where they are quantized."""
    infos = files.tensors()
    if files.quantized():
        said = str(files.config.get("dtype") or files.config.get("torch_dtype") or "bfloat16")
        found: torch.dtype = getattr(torch, said)
        return found
    numel: dict[str, int] = {}
    for info in infos:
        numel[info.dtype] = numel.get(info.dtype, 0) + info.numel
    most: torch.dtype = getattr(torch, max(numel, key=lambda name: numel[name]))
    return most


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shards(shards: Sequence[Shard], folder: Path) -> Tally:
    """Write the files into a folder, several chunks at a time.

    Raises:
        CheckpointError: values that are not finite, or that the dtype cannot hold; the message names the tensor.
    """
    tally = Tally()
    work = _Workspace()
    pool = ThreadPoolExecutor(cores(), thread_name_prefix="merge")
    try:
        with one_torch_thread():
            for shard in shards:
                with SafetensorsWriter(folder / shard.name, shard.header, shard.size) as writer:
                    running = [(t, pool.submit(job)) for t, job in _jobs(shard, writer, work)]
                    for tensor, future in running:
                        rounding = future.result()
                        if tensor is not None and rounding > tally.rounding:
                            tally.rounding, tally.rounding_at = rounding, tensor.name
                for tensor in shard.tensors:
                    kind = tally.added if tensor.new else tally.copied if tensor.frozen else tally.changed
                    kind.append(tensor.name)
    finally:
        pool.shutdown(cancel_futures=True)
    return tally


class _Workspace:
    """What the jobs share: factors that are in memory, and buffers, one set a thread. Fresh memory for every chunk would
    cost three times what is done with it: the kernel clears each page before it gives it out."""

    def __init__(self) -> None:
        self._changes: dict[tuple[int, torch.dtype], RowChange] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def change(self, update: Update, dtype: torch.dtype) -> RowChange:
        """An update's change. The experts of a fused parameter lie in many stored tensors, those of two parameters in
        turns, so the last few that were used stay."""
        assert not isinstance(update, Value)
        key = (id(update), dtype)
        with self._lock:
            self._changes[key] = self._changes.pop(key) if key in self._changes else update.change(dtype)
            while len(self._changes) > _OPEN:
                self._changes.pop(next(iter(self._changes)))
            return self._changes[key]

    def buffer(self, use: str, dtype: torch.dtype, numel: int) -> Tensor:
        """(numel,) of this thread's memory for one use, with whatever was in it."""
        buffers = self._local.__dict__
        size = numel * dtype.itemsize
        if use not in buffers or len(buffers[use]) < size:
            buffers[use] = torch.empty(size, dtype=torch.uint8)
        return buffers[use][:size].view(dtype)  # type: ignore[no-any-return]


def _jobs(
    shard: Shard, writer: SafetensorsWriter, work: _Workspace
) -> Iterator[tuple[NewTensor | None, Callable[[], float]]]:
    """(tensor, job that writes a part of it and returns the largest rounding); None for ranges that are copied."""
    at = 0
    pending: tuple[Path, int, int, int] | None = None  # file, first byte, end, where it goes
    for tensor in shard.tensors:
        if tensor.frozen:
            assert tensor.source is not None
            path, span = tensor.source
            if pending and pending[0] == path and pending[2] == span.begin:
                pending = (path, pending[1], span.end, pending[3])
            else:
                yield from _copies(writer, pending)
                pending = (path, span.begin, span.end, at)
        else:
            yield from _copies(writer, pending)
            pending = None
            rows, columns = tensor.matrix
            whole = tensor.start is not None or tensor.base is not None
            whole = whole or any(isinstance(u, LowRank) and u.by_columns for u in tensor.changes)
            step = max(rows, 1) if whole else max(1, _JOB // columns)
            for begin in range(0, rows, step):
                yield tensor, _rows_job(tensor, begin, min(rows, begin + step), writer, at, work)
        at += tensor.size
    yield from _copies(writer, pending)


def _copies(
    writer: SafetensorsWriter, pending: tuple[Path, int, int, int] | None
) -> Iterator[tuple[None, Callable[[], float]]]:
    if pending is None:
        return
    path, first, last, at = pending

    def job(begin: int) -> Callable[[], float]:
        def copy() -> float:
            writer.copy(path, begin, min(last, begin + _COPY), at + begin - first)
            return 0.0

        return copy

    for begin in range(first, last, _COPY):
        yield None, job(begin)


def _rows_job(
    tensor: NewTensor, first: int, last: int, writer: SafetensorsWriter, at: int, work: _Workspace
) -> Callable[[], float]:
    """Computes and writes rows [first, last) of a tensor whose data begins at byte `at`."""

    def job() -> float:
        _, columns = tensor.matrix
        # Where the tensor's first row lies in its parameter: experts are rows of one fused parameter.
        offset = 0 if tensor.place is None else tensor.place.first
        read = _reader(tensor, offset * columns)
        changes = [work.change(u, tensor.wide) for u in tensor.changes if not isinstance(u, Value)]
        width = columns * tensor.dtype.itemsize
        worst = 0.0
        for begin, end in _chunks(tensor, first, last):
            numel = (end - begin) * columns
            values = read(begin * columns, end * columns, work)
            if changes:
                values = _cast_into(values, work.buffer("values", tensor.wide, numel)).reshape(-1, columns)
                for change in changes:
                    values = change(values, offset + begin)
            values = values.reshape(-1)
            stored = _cast_into(values, work.buffer("stored", tensor.dtype, numel))
            worst = max(worst, _checked(tensor, values, stored, work))
            writer.write(stored, at + begin * width)
        return worst

    return job


def _chunks(tensor: NewTensor, first: int, last: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of rows that are computed together; never rows of two experts."""
    rows, columns = tensor.matrix
    experts = next((u.experts for u in tensor.changes if isinstance(u, LowRank) and u.experts), None)
    block = rows // experts if experts and len(tensor.shape) == 3 else rows
    by_columns = any(isinstance(u, LowRank) and u.by_columns for u in tensor.changes)
    step = rows if by_columns else max(1, _CHUNK // columns)
    begin = first
    while begin < last:
        end = min(begin + step, last, begin - begin % block + block)
        yield begin, end
        begin = end


def _cast_into(values: Tensor, buffer: Tensor) -> Tensor:
    """The values in the buffer's dtype: themselves, or in the buffer."""
    return values if values.dtype == buffer.dtype else buffer.copy_(values)


def _reader(tensor: NewTensor, offset: int) -> Callable[[int, int, _Workspace], Tensor]:
    """(first element, end, workspace) -> those elements of a tensor before its changes; they may be written to.

    Args:
        offset: element of the parameter at which the tensor begins.
    """
    if tensor.value is None and (tensor.start is not None or tensor.base is not None):
        whole = (tensor.start or tensor.base)().reshape(-1)  # type: ignore[misc]
        first = 0 if tensor.start is None else offset
        return lambda begin, end, work: whole[first + begin : first + end]
    if tensor.value is not None:
        stored = tensor.value.stored
    else:
        assert tensor.source is not None
        stored, offset = Stored.in_file(*tensor.source), 0

    def read(begin: int, end: int, work: _Workspace) -> Tensor:
        return stored.read(offset + begin, offset + end, work.buffer("read", stored.dtype, end - begin))

    return read


def _checked(tensor: NewTensor, values: Tensor, stored: Tensor, work: _Workspace) -> float:
    """The largest rounding of a chunk.

    Raises:
        CheckpointError: NaN or Inf, from the adapter or because the dtype cannot hold the value.
    """
    rounded = values.dtype != stored.dtype
    seen = values
    if rounded:  # in one dtype: a subtraction of mixed ones takes ten times as long
        wide = torch.promote_types(values.dtype, torch.promote_types(stored.dtype, torch.float32))
        seen = work.buffer("check", wide, len(values)).copy_(stored).sub_(values)
    least, greatest = torch.aminmax(seen)
    worst = max(abs(float(least)), abs(float(greatest)))
    if not math.isfinite(worst):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{tensor.name}: the merged values are not finite in {kind}.")
    return worst if rounded else 0.0


def write_index(files: FileWeights, shards: Sequence[Shard], folder: Path) -> None:
    """The index of several files: the base's own where nothing in it changed."""
    if len(shards) == 1:
        return
    assert files.folder is not None
    where = {t.name: shard.name for shard in shards for t in shard.tensors}
    size = sum(shard.size for shard in shards)
    index = files.folder / INDEX
    old = read_mapping(index) if index.is_file() else {"metadata": {}}
    metadata = dict(old.get("metadata") or {})
    if where == old.get("weight_map") and metadata.get("total_size", size) == size:
        write_text(folder / INDEX, index.read_text(encoding="utf-8"))
        return
    metadata["total_size"] = size
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(t.shape) for shard in shards for t in shard.tensors)
    new = {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
    write_text(folder / INDEX, json.dumps(new, indent=2, ensure_ascii=False) + "\n")
