"""What every source of weights is: its tensors, how one is read, what identifies it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError, near_matches
from ..records import Fingerprint

# safetensors' dtype tags, https://github.com/huggingface/safetensors, `Dtype`.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAMPLE = 64 * 1024  # bytes of each end of a tensor that the fingerprint covers
MOST_EXPERTS = 1 << 16  # of one layer; open models have a few hundred
_PACKED = re.compile(r"(?:nf|fp|mxfp|gptq|awq|int)([2348])")  # numbers of so many bits
_EXPERT_NAME = re.compile(r"^(.*)\[(\d{1,9})\]$")


@dataclass(frozen=True)
class TensorInfo:
    """One parameter, before anything of it is read.

    Attributes:
        name: full parameter name in the base model.
        shape: of the parameter; of the dequantized matrix where it is stored quantized.
        dtype: as stored, `bfloat16`; `nf4`, `int8` or `q4_1` for quantized ones.
        role: one of `names.ROLES`.
        experts: number of experts of a fused parameter, (E, out, in), read as `name[e]`; None for any other.
        transposed: stored as (in, out), as transformers' Conv1D does.
        tower: one of `names.Tower` in a model that sees or hears, else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: names.Role
    experts: int | None = None
    transposed: bool = False
    tower: names.Tower | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            CheckpointError: no fused experts that could be: each of them is scored under a name of its own.
        """
        if self.experts is not None and not (self.experts <= MOST_EXPERTS and self.numel):
            raise CheckpointError(
                f"{self.name}: has the shape {self.shape}, wanted fused experts, up to {MOST_EXPERTS:,} of them, with elements."
            )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """As stored; of quantized ones without the scales."""
        packed = _PACKED.fullmatch(self.dtype)
        if packed:
            return (self.numel * int(packed[1]) + 7) // 8
        dtype = getattr(torch, self.dtype, None)
        return self.numel * (dtype.itemsize if isinstance(dtype, torch.dtype) else 1)


@runtime_checkable
class WeightSource(Protocol):
    """Where weights come from. Safe to read from several threads at once.

    Attributes:
        model_id: hub id or folder; None for a model in memory without a name.
        revision: commit of the hub, where known.
        folder: local folder of the checkpoint, None without one.
        kind: `file`, `live` or `gguf`.
        received: bytes that came over a network so far; None where all lies on this machine.
        notes: what the reader of a report must know.
        tied: groups of names that are one tensor, (kept name, other names...).
    """

    @property
    def model_id(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def kind(self) -> Literal["file", "live", "gguf"]: ...
    @property
    def received(self) -> int | None: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def tied(self) -> tuple[tuple[str, ...], ...]: ...

    def tensors(self) -> list[TensorInfo]:
        """All parameters in checkpoint order, tied ones once where they are stored once."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, or one expert `name[e]` of a fused one, dequantized where it is quantized.

        Returns:
            A tensor of the parameter's shape in a floating dtype. From files it is fresh memory; from a live model it
            may be the model's own: do not change it.
        Raises:
            CheckpointError: no such tensor (near names are shown), or its bytes cannot be read.
        """
        ...

    def fingerprint(self) -> Fingerprint:
        """Identity, see `records.Fingerprint`."""
        ...

    def identity(self) -> str:
        """A key for caches: differs whenever a sampled byte of any tensor does, for live models too."""
        ...


def split_expert(name: str) -> tuple[str, int | None]:
    """`a.gate_up_proj[3]` -> (`a.gate_up_proj`, 3); a name without brackets -> (name, None)."""
    match = _EXPERT_NAME.match(name)
    return (match[1], int(match[2])) if match else (name, None)


def split_found(name: str, found: Mapping[str, Any], where: object) -> tuple[Any, int | None]:
    """(item of `found` that holds a tensor, expert or None); items have an `info`.

    Raises:
        CheckpointError: no such tensor, or no such expert of it.
    """
    base, expert = split_expert(name)
    item = found.get(base)
    if item is None:
        raise CheckpointError(f"{where}: no tensor {base!r}.{near_matches(base, found)}")
    if expert is not None and not (item.info.experts and 0 <= expert < item.info.experts):
        raise CheckpointError(f"{where}: no tensor {name!r}, {base!r} has the shape {item.info.shape}.")
    return item, expert


def structure_of(tensors: Iterable[TensorInfo]) -> str:
    """sha256 of the sorted (name, shape) of the matrices in the blocks, names without the base-model prefix.

    Matrices by their names, whatever a model in memory knows better: a file knows names only.
    """
    rows = sorted(
        (where, list(t.shape))
        for t in tensors
        if names.role(t.name, t.shape) == "linear" and (where := names.canonical(t.name)) is not None
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
