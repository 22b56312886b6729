"""Which kinds of matrices and which layers a scan is narrowed to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import names
from ..errors import OptionError, near_matches
from ..weights import TensorInfo

_LAYERS = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")


@dataclass(frozen=True)
class Only:
    """What is scored; None for no limit.

    Attributes:
        kinds: as `names.kinds` gives them, or the last parts of one, `q_proj`. layers: numbers of blocks, from 0.
    """

    kinds: tuple[str, ...] | None = None
    layers: frozenset[int] | None = None

    def __bool__(self) -> bool:
        return self.kinds is not None or self.layers is not None

    def __str__(self) -> str:
        kinds = "" if self.kinds is None else f"of the kinds {', '.join(self.kinds)}"
        layers = "" if self.layers is None else f"in the layers {_ranges(self.layers)}"
        return " ".join(filter(None, (kinds, layers)))

    def of(self, tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
        """Those of a checkpoint's tensors that are meant.

        Raises:
            OptionError: a kind or a layer that the checkpoint does not have.
        """
        kind_of = names.kinds([t.name for t in tensors])
        if self.kinds is not None:
            for kind in self.kinds:
                if not any(_is(kind, found) for found in kind_of.values()):
                    leaves = {
                        found.rpartition(".")[2] for t, found in kind_of.items() if names.block_index(t) is not None
                    }
                    raise OptionError(
                        f"kinds names {kind!r}, which no tensor of this model is." + near_matches(kind, leaves)
                    )
        if self.layers is not None:
            there = {b for t in tensors if (b := names.block_index(t.name)) is not None}
            for layer in sorted(self.layers - there):
                seen = f"has layers {_ranges(there)}" if there else "has no numbered layers"
                raise OptionError(f"layers names {layer}; this model {seen}.")
        return [
            t
            for t in tensors
            if (self.kinds is None or any(_is(kind, kind_of[t.name]) for kind in self.kinds))
            and (self.layers is None or names.block_index(t.name) in self.layers)
        ]


def only(kinds: Any, layers: Any) -> Only:
    """The limits as they are given to `scan_weights`.

    Raises:
        OptionError: none of the forms; no kind, no layer; a range that ends before it begins.
    """
    return Only(_kinds(kinds), _layers(layers))


def _kinds(kinds: Any) -> tuple[str, ...] | None:
    if kinds is None:
        return None
    found = kinds.split(",") if isinstance(kinds, str) else list(kinds)
    if not found or not all(isinstance(kind, str) and kind.strip() for kind in found):
        raise OptionError(f"kinds is {kinds!r}, wanted names of kinds such as 'q_proj,down_proj'.")
    return tuple(dict.fromkeys(kind.strip() for kind in found))


def _layers(layers: Any) -> frozenset[int] | None:
    if layers is None:
        return None
    found: set[int] = set()
    if isinstance(layers, str):
        for part in layers.split(","):
            match = _LAYERS.fullmatch(part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first or last - first >= 1 << 20:
                raise OptionError(f"layers is {layers!r}, wanted numbers and ranges such as '0-15' or '0,4,8-11'.")
            found |= set(range(first, last + 1))
    elif isinstance(layers, Iterable):
        found = {layer for layer in layers if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0}
        if len(found) < len(set(layers)):
            raise OptionError(f"layers is {layers!r}, wanted numbers from 0 up, or a text such as '0-15'.")
    if not found:
        raise OptionError(f"layers is {layers!r}, wanted at least one number from 0 up.")
    return frozenset(found)


def _is(asked: str, kind: str) -> bool:
    return kind == asked or kind.endswith(f".{asked}")


def _ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
