"""The safetensors files of a repository of the hub, a tensor at a time by HTTP ranges; nothing of them is stored."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..hub import RangeReader, Snapshot
from .headers import Span, header_length, header_spans
from .source import SAMPLE

# Most headers are shorter, so that one request has all of it: 7 billion parameters in two shards have 15 KiB each.
_HEADER_GUESS = 64 * 1024
_CONNECTIONS = 8
_AT_ONCE = 64  # ranges of 64 KiB at most that wait to be taken
# What is remembered of tensors that were read, for the fingerprint; beyond it their ends are asked for again.
_MOST_REMEMBERED = 64 << 20


class HubShards:
    """`Shards` of one commit."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._reader = RangeReader(snapshot)
        self._ends: dict[tuple[str, int, int], bytes] = {}
        self._remembered = 0
        self._lock = threading.Lock()

    @property
    def received(self) -> int | None:
        return self._reader.received

    def headers(self, files: Sequence[Path]) -> list[dict[str, Span]]:
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="header") as pool:
            return list(pool.map(self._header, files))

    def _header(self, path: Path) -> dict[str, Span]:
        size = self._reader.snapshot.files[path.name].size
        where = f"{self._reader.snapshot.repo_id}/{path.name}"
        start = self._bytes(path.name, 0, min(size, _HEADER_GUESS))
        length = header_length(start[:8], size, where)
        if 8 + length > len(start):
            start += self._bytes(path.name, len(start), 8 + length)
        return header_spans(start[8 : 8 + length], size, where)

    def _bytes(self, name: str, begin: int, end: int) -> bytes:
        buffer = bytearray(end - begin)
        self._reader.read_into(name, begin, memoryview(buffer))
        return bytes(buffer)

    def read(self, path: Path, begin: int, end: int) -> Tensor:
        known = self._ends.get((path.name, begin, end))
        if known is not None:
            return torch.frombuffer(bytearray(known), dtype=torch.uint8)
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        if begin < end:
            self._reader.read_into(path.name, begin, memoryview(buffer.numpy().data).cast("B"))
        self._remember(path.name, begin, end, buffer)
        return buffer

    def read_many(self, ranges: Sequence[tuple[Path, int, int]]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="range") as pool:
            for first in range(0, len(ranges), _AT_ONCE):
                yield from pool.map(lambda where: self.read(*where), ranges[first : first + _AT_ONCE])

    def _remember(self, name: str, begin: int, end: int, values: Tensor) -> None:
        parts = [(begin, end)] if end - begin <= 2 * SAMPLE else [(begin, begin + SAMPLE), (end - SAMPLE, end)]
        for first, last in parts:
            with self._lock:
                if self._remembered + last - first > _MOST_REMEMBERED:
                    return
                self._remembered += last - first
            self._ends[name, first, last] = values[first - begin : last - begin].numpy().tobytes()

    def identity(self, files: Sequence[Path]) -> str | None:
        listed = self._reader.snapshot.files
        rows = [[path.name, listed[path.name].size, listed[path.name].etag] for path in files]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
