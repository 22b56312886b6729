"""What one training step needs, by category."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .files import SCHEMA_VERSION, Record, as_plain
from .schema import Count, Name, Text


@dataclass(frozen=True)
class MemoryReport(Record):
    """What one training step needs at its worst moment, and what that is made of. All sizes in bytes.

    Attributes:
        mode: of the plan.
        peak_bytes: most that lives at once on the training device; the sum of `by_category`.
        by_category: {category: bytes} at the peak; `memory.CATEGORIES` says what each one is.
        phase: where in the step the peak is, one of `memory.PHASES`.
        where: the operation and the module or parameter at the peak, for the reader.
        phases: {phase: {category: bytes}} at the worst moment of each phase.
        host_bytes: copies of original weights in main memory; part of the peak where that is the training device.
        trainable_parameters, trainable_bytes: elements and bytes of what the optimizer trains.
        total_parameters: elements of the base model, tied tensors once.
        largest_block_bytes: weights of the largest repeated block, and `largest_block_gradients` of its trainable ones:
            what has to be whole at once where the rest is sharded.
        cast_bytes: 16-bit copies of float32 weights that train, which autocast keeps until the forward pass has ended.
        settings: what the step was run with.
        devices: over how many devices the numbers are spread; they are those of one device.
        complete: False where activations could not be counted.
        notes: what the reader must know.
    """

    mode: Name
    peak_bytes: Count
    by_category: Mapping[str, Count]
    phase: Name
    where: Text
    phases: Mapping[str, Mapping[str, Count]]
    host_bytes: Count
    trainable_parameters: Count
    trainable_bytes: Count
    total_parameters: Count
    largest_block_bytes: Count
    largest_block_gradients: Count
    settings: Mapping[str, Any]
    cast_bytes: Count = 0
    devices: Count = 1
    complete: bool = True
    notes: tuple[Text, ...] = ()

    _kind = "memory_report"

    def to_dict(self) -> dict[str, Any]:
        return {
            "record": self._kind,
            "schema_version": SCHEMA_VERSION,
            **{f.name: as_plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "memory report") -> MemoryReport:
        found: MemoryReport = cls._checked(data, source)
        return found
