"""A checkpoint that nobody stores: its files are made up as they are asked for, the same bytes each time.

    python benchmarks/made.py BLOCKS [BYTES_PER_SECOND]

Serves so many blocks of Llama-2-7B's shapes, with its embeddings and head, as tests/stand_in_hub.py serves a folder. The weights
are bfloat16 numbers of random sign and digits between 2^-6 and 2^-5: independent, mean zero, of full rank, and drawn in
a tenth of the time of normal ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping

import common
import numpy as np
import scan

sys.path.insert(0, str(common.ROOT / "tests"))

import stand_in_hub

_CHUNK = 1 << 20  # bytes that are drawn at once
_SIGN_AND_DIGITS, _EXPONENT = np.uint16(0x807F), np.uint16(121 << 7)


class MadeFile(stand_in_hub.Blob):
    """A safetensors file of bfloat16 tensors, by its number."""

    def __init__(self, number: int, tensors: Mapping[str, tuple[int, ...]]) -> None:
        self._number, self._header = number, scan.header_of(tensors)
        self.content = b""
        self.size = len(self._header) + sum(2 * math.prod(shape) for shape in tensors.values())
        self.sha256 = hashlib.sha256(self._header + bytes([number])).hexdigest()
        self.oid = self.sha256[:40]

    def pieces(self, begin: int, end: int) -> Iterator[bytes]:
        start = len(self._header)
        if begin < start:
            yield self._header[begin : min(end, start)]
        at, end = max(begin, start) - start, end - start
        while at < end:
            chunk, first = divmod(at, _CHUNK)
            last = min(_CHUNK, first + end - at)
            yield self._drawn(chunk)[first:last]
            at += last - first

    def _drawn(self, chunk: int) -> bytes:
        raw = np.random.Philox(key=[self._number, chunk]).random_raw(_CHUNK // 8)
        return ((raw.view(np.uint16) & _SIGN_AND_DIGITS) | _EXPONENT).tobytes()


def files(blocks: int) -> dict[str, stand_in_hub.Blob]:
    shape = dataclasses.replace(scan.SHAPES[-1], blocks=blocks)
    small = {name: stand_in_hub.Blob(text.encode()) for name, text in scan.small_files(shape).items()}
    return small | {name: MadeFile(i, tensors) for i, (name, tensors) in enumerate(scan.shards_of(shape).items())}


def main() -> None:
    blocks, *rate = sys.argv[1:]
    stand_in_hub.serve(files(int(blocks)), "org/model", float(rate[0]) if rate else None)


if __name__ == "__main__":
    main()
