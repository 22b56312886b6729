"""Writing safetensors files: tensors to their places in the file, byte ranges of other files copied by the kernel.

Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .source import DTYPES

_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writes one safetensors file: the header, then tensors and byte ranges to their places, from any thread.

    Args:
        path: of the new file.
        header: the file's bytes up to the data, of `header_bytes` or of another file.
        size: bytes of data; on leaving the block, that much must have been written.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path, self._start, self._left = path, len(header), size
        self._lock = threading.Lock()
        self._file = path.open("wb", buffering=0)
        self._file.write(header)
        self._file.truncate(len(header) + size)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        if kind is None and self._left:
            raise AssertionError(f"{self.path}: {self._left} bytes were not written")

    def write(self, tensor: Tensor, at: int) -> None:
        """The tensor's bytes, row-major, from byte `at` of the data on."""
        view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):  # one call writes at most 2 GiB
            done += self._write_at(view[done:], self._start + at + done)
        self._note(done)

    def _write_at(self, part: memoryview, at: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._file.fileno(), part, at)
        with self.path.open("r+b", buffering=0) as own:  # Windows: a position for each thread
            own.seek(at)
            return own.write(part) or 0

    def copy(self, source: Path, begin: int, end: int, at: int) -> None:
        """Bytes [begin, end) of another file, by the kernel where it can: they never come into this process."""
        self._note(end - begin)
        # An own position in the file for each call, which `sendfile` needs.
        with source.open("rb", buffering=0) as file, self.path.open("r+b", buffering=0) as target:
            target.seek(self._start + at)
            while begin < end:
                done = _copy_some(file, target, begin, end - begin)
                if done == 0:
                    raise CheckpointError(f"{source}: ends at byte {begin}, wanted bytes up to {end}: it is truncated.")
                begin += done

    def _note(self, count: int) -> None:
        with self._lock:
            self._left -= count


def _copy_some(source: FileIO, target: FileIO, begin: int, count: int) -> int:
    """Copy up to `count` bytes from `begin` of one file to the position of another; returns how many were copied."""
    for name in ("copy_file_range", "sendfile"):
        try:
            if name == "copy_file_range" and hasattr(os, name):
                return os.copy_file_range(source.fileno(), target.fileno(), count, offset_src=begin)
            if name == "sendfile" and sys.platform == "linux":  # elsewhere it takes sockets only
                return os.sendfile(target.fileno(), source.fileno(), begin, count)
        except OSError as error:  # these say that the kernel cannot do it between these two files
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                raise
    source.seek(begin)
    return target.write(source.read(min(count, 1 << 24))) or 0


def header_bytes(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None, order: Iterable[str]
) -> bytes:
    """The first bytes of a safetensors file.

    Args:
        layout: {name: (dtype, shape)} in the order of the data.
        metadata: of the file, or None.
        order: names as the header lists them.
    """
    at, ranges = 0, {}
    for name, (dtype, shape) in layout.items():
        end = at + math.prod(shape) * dtype.itemsize
        ranges[name] = {"dtype": _TAGS[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    rows = {} if metadata is None else {"__metadata__": dict(metadata)}
    text = json.dumps(rows | {name: ranges[name] for name in order}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_raw_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header as it stands: (parsed, in the file's order; the bytes before the data).

    The file is one that `weights.read_header` has checked.

    Raises:
        CheckpointError: it was changed since.
    """
    with path.open("rb") as file:
        raw = file.read(8)
        raw += file.read(int.from_bytes(raw, "little"))
    try:
        return json.loads(raw[8:]), raw
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: was changed while it was read; its header is no JSON any more.") from error
