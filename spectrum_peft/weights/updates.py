"""What an adapter changes in one parameter of its base: a new value, a low-rank product, rows, or a sum."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .. import names
from .headers import Span
from .shards import read_bytes
from .source import DTYPES, TensorInfo

WRAPPERS = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module|modules_to_save)(?=\.|$)")


class Reader(Protocol):
    """Reads part of a tensor."""

    def __call__(self, begin: int, end: int, out: Tensor | None = None) -> Tensor:
        """Elements [begin, end) of the flattened tensor, on the CPU, in its dtype: fresh memory, or `out`."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor that lies somewhere, read in parts.

    Attributes:
        shape, dtype: of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Reader

    def whole(self) -> Tensor:
        return self.read(0, math.prod(self.shape)).reshape(self.shape)

    @classmethod
    def in_file(cls, path: Path, span: Span) -> Stored:
        dtype = DTYPES[span.dtype]

        def read(begin: int, end: int, out: Tensor | None = None) -> Tensor:
            first, last = (span.begin + n * dtype.itemsize for n in (begin, end))
            return read_bytes(path, first, last, None if out is None else out.view(torch.uint8)).view(dtype)

        return cls(span.shape, dtype, read)

    @classmethod
    def in_memory(cls, tensor: Tensor) -> Stored:
        flat = tensor.detach().reshape(-1)

        def read(begin: int, end: int, out: Tensor | None = None) -> Tensor:
            return flat[begin:end].to("cpu", copy=True) if out is None else out.copy_(flat[begin:end])

        return cls(tuple(tensor.shape), tensor.dtype, read)

    @classmethod
    def computed(cls, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Stored:
        """A float32 tensor that is made from others when it is asked for."""

        def read(begin: int, end: int, out: Tensor | None = None) -> Tensor:
            part = make().reshape(-1)[begin:end]
            return part if out is None else out.copy_(part)

        return cls(shape, torch.float32, read)


# How an update changes rows of a parameter seen as a matrix (fused experts one below the other, a vector as a column):
# (rows as they are, float; index of the first) -> rows as they become. The first argument may be written to.
RowChange = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Value:
    """A parameter's new value: a real weight, a saved module, a table with rows for new tokens.

    Attributes:
        name: of the parameter in the base, or in the adapted model where the base lacks it (`new`).
        key: in the adapter file.
    """

    name: str
    key: str
    stored: Stored
    new: bool = False


@dataclass(frozen=True)
class LowRank:
    """dW = scale * B @ A beside a parameter.

    Attributes:
        name: as in `Value`.
        key: of the module in the adapter file, with one `.base_layer` for each wrapper inside which it lies.
        a, b: the factors as PEFT stores them; fused experts' A is (experts * rank, in), B (out, rank * experts).
        experts: number of fused experts, None for a matrix.
        turned: the parameter is stored as (in, out), so the transpose of dW is added.
        table: LoRA of an embedding; its A is (rank, rows of the table), B (width, rank).
        magnitude: DoRA's (out,).
    """

    name: str
    key: str
    a: Stored
    b: Stored
    scale: float
    experts: int | None = None
    turned: bool = False
    table: bool = False
    magnitude: Stored | None = None

    @property
    def module(self) -> str:
        """Name in the adapted model of the module that the adapter is beside."""
        return WRAPPERS.sub("", self.key)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(B, A, scale): B (out, rank) and A (rank, in), or (experts, out, rank) and (experts, rank, in)."""
        a, b = self.a.whole(), self.b.whole()
        if self.experts is not None:
            # peft 0.21 tuners/lora/layer.py, `ParamWrapper.get_delta_factors`
            a = a.reshape(self.experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, self.experts).permute(2, 0, 1)
        return b, a, self.scale

    @property
    def by_columns(self) -> bool:
        """Whether a row's new value depends on all rows: DoRA's lengths run down the columns of a turned matrix."""
        return self.turned and self.magnitude is not None

    def change(self, dtype: torch.dtype = torch.float32) -> RowChange:
        """W + dW, computed in `dtype`; with DoRA each output is rescaled to its magnitude.

        Source: Hu et al. (2021), "LoRA", equation 3; Liu et al. (2024), "DoRA", equation 5.
        """
        b, a, scale = self.factors()
        left, right = (a.mT, b.mT) if self.turned else (b, a)
        left, right = left.to(dtype).contiguous(), right.to(dtype).contiguous()
        magnitude = None if self.magnitude is None else self.magnitude.whole().to(dtype).flatten()

        def changed(rows: Tensor, begin: int) -> Tensor:
            if self.experts is None:
                mine, inner = left[begin : begin + len(rows)], right
            else:
                expert, first = divmod(begin, left.shape[1])
                mine, inner = left[expert, first : first + len(rows)], right[expert]
            rows = rows.to(dtype).addmm_(mine, inner, alpha=scale)
            if magnitude is None:
                return rows
            if self.turned:
                return rows.mul_(magnitude / torch.linalg.vector_norm(rows, dim=0))
            lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            return rows.mul_(magnitude[begin : begin + len(rows), None] / lengths)

        return changed


@dataclass(frozen=True)
class Rows:
    """New values of some rows of a table: PEFT's `trainable_token_indices`.

    Attributes:
        name, key: as in `Value`. indices: rows that are replaced, in the order of `stored`, (len(indices), width).
    """

    name: str
    key: str
    indices: tuple[int, ...]
    stored: Stored

    def change(self, dtype: torch.dtype = torch.float32) -> RowChange:
        values = self.stored.whole().to(dtype)

        def changed(rows: Tensor, begin: int) -> Tensor:
            rows = rows.to(dtype)
            for i, row in enumerate(self.indices):
                if begin <= row < begin + len(rows):
                    rows[row - begin] = values[i]
            return rows

        return changed


@dataclass(frozen=True)
class Added:
    """scale * vector added to a bias: PEFT's `lora_bias`."""

    name: str
    key: str
    stored: Stored
    scale: float

    def change(self, dtype: torch.dtype = torch.float32) -> RowChange:
        values = self.stored.whole().to(dtype)[:, None]
        return lambda rows, begin: rows.to(dtype).add_(values[begin : begin + len(rows)], alpha=self.scale)


Update = Value | LowRank | Rows | Added


def may_grow(info: TensorInfo, shape: Sequence[int]) -> bool:
    """Whether a parameter may be replaced by one of another number of rows: token tables and heads may."""
    return (info.role == "embedding" or names.in_head(info.name)) and tuple(shape[1:]) == info.shape[1:]
