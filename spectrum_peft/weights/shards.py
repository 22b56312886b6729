"""The safetensors files of a checkpoint, wherever they lie: their headers, their bytes, what identifies them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .headers import Span, read_header
from .source import SAMPLE


class Shards(Protocol):
    """Files of a checkpoint that can be read in parts. Safe to read from several threads at once.

    Attributes:
        received: bytes that came over a network so far; None for files of this machine.
    """

    @property
    def received(self) -> int | None: ...

    def headers(self, files: Sequence[Path]) -> list[dict[str, Span]]:
        """`read_header` of each file."""
        ...

    def read(self, path: Path, begin: int, end: int) -> Tensor:
        """`read_bytes`."""
        ...

    def read_many(self, ranges: Sequence[tuple[Path, int, int]]) -> Iterator[Tensor]:
        """`read` of each range, in order."""
        ...

    def identity(self, files: Sequence[Path]) -> str | None:
        """What tells these files from all others without reading them; None where nothing does."""
        ...


class LocalShards:
    """Files of this machine."""

    received: int | None = None

    def headers(self, files: Sequence[Path]) -> list[dict[str, Span]]:
        return [read_header(path) for path in files]

    def read(self, path: Path, begin: int, end: int) -> Tensor:
        return read_bytes(path, begin, end)

    def read_many(self, ranges: Sequence[tuple[Path, int, int]]) -> Iterator[Tensor]:
        return (read_bytes(*where) for where in ranges)

    def identity(self, files: Sequence[Path]) -> str | None:
        return None


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


def ends_of(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges of a tensor that a fingerprint covers: all of it, or its first and its last `SAMPLE` bytes."""
    if end - begin <= 2 * SAMPLE:
        yield begin, end
    else:
        yield begin, begin + SAMPLE
        yield end - SAMPLE, end
