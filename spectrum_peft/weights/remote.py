"""The safetensors files of a repository of the hub, a tensor at a time by HTTP ranges; nothing of them is stored."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
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
        self._here: dict[tuple[str, int, int], bytearray] = {}  # that came with others and wait to be read
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
        return bytes(self._reader.read(name, begin, end))

    def read(self, path: Path, begin: int, end: int) -> Tensor:
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        key = (path.name, begin, end)
        with self._lock:
            here = self._here.pop(key, None)
        if here is None and (known := self._ends.get(key)) is not None:
            here = bytearray(known)
        if here is None:
            here = self._reader.read(*key)
            self._remember(*key, here)
        return torch.frombuffer(here, dtype=torch.uint8)

    def fetch(self, path: Path, ranges: Sequence[tuple[int, int]], arrived: Callable[[int], object]) -> None:
        """Ranges that touch, by one request: `arrived(i)` as soon as the i-th is here, in order; until it returns, `read` gives
        the range without asking again."""
        numbers = iter(range(len(ranges)))

        def filled(buffer: bytearray) -> None:
            i = next(numbers)
            key = (path.name, *ranges[i])
            self._remember(*key, buffer)
            with self._lock:
                self._here[key] = buffer
            arrived(i)

        try:
            self._reader.read_run(path.name, ranges[0][0], [end - begin for begin, end in ranges], filled)
        finally:
            with self._lock:
                for begin, end in ranges:
                    self._here.pop((path.name, begin, end), None)

    def read_many(self, ranges: Sequence[tuple[Path, int, int]]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="range") as pool:
            for first in range(0, len(ranges), _AT_ONCE):
                yield from pool.map(lambda where: self.read(*where), ranges[first : first + _AT_ONCE])

    def _remember(self, name: str, begin: int, end: int, values: bytearray) -> None:
        parts = [(begin, end)] if end - begin <= 2 * SAMPLE else [(begin, begin + SAMPLE), (end - SAMPLE, end)]
        for first, last in parts:
            with self._lock:
                if self._remembered + last - first > _MOST_REMEMBERED:
                    return
                self._remembered += last - first
            self._ends[name, first, last] = bytes(memoryview(values)[first - begin : last - begin])

    def identity(self, files: Sequence[Path]) -> str | None:
        listed = self._reader.snapshot.files
        rows = [[path.name, listed[path.name].size, listed[path.name].etag] for path in files]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
