"""Real weights of some columns or rows of a matrix, in PEFT's LoRA layers: y = base(x) + x[..., columns] D^T.

W' = W + D P, where P (k, in) selects k input features: a product of rank k whose A is one-hot, so that PEFT's own machinery
switches, moves, saves and deletes it. A is never multiplied with: where PEFT expects `lora_A` stands a `Columns` with the
numbers of the columns, and `lora_B` is PEFT's own Linear, whose weight is D (out, k), zero at first. Backward keeps the k
selected features of x, where LoRA keeps x. Rows are the mirror image, W' = W + P^T D: `lora_A` is PEFT's Linear with D (k, in),
`lora_B` a `Rows`, and x is kept.

Related: Yang et al. (2024), "S2FT", arXiv:2412.06289 (coupled rows and columns that are permuted to the front); Bhardwaj et
al. (2024), "SHiRA", arXiv:2406.13175 (scattered elements); Yang et al. (2025), "DiaBlo", arXiv:2506.03230 (diagonal blocks).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn import functional

from ..errors import MismatchError
from ..records import PlanEntry


class Lines(nn.Module):
    """Which columns or rows train: a buffer of their numbers, (k,), int64, ascending.

    A buffer and no parameter, since FSDP shards parameters and casts them to its dtype of communication.

    Args:
        change: the other factor of PEFT's layer, whose weight is D.
        numbers: as in the plan's entry. width: features of the matrix on that side.
    """

    factor: ClassVar[str]  # in whose place this stands
    numbered: ClassVar[str]  # name of the buffer

    def __init__(self, change: nn.Module, numbers: tuple[int, ...], width: int, device: torch.device) -> None:
        super().__init__()
        self._change = (change,)  # in a tuple: no child of this module
        self.width = width
        self.register_buffer(self.numbered, torch.tensor(numbers, dtype=torch.int64, device=device))

    @property
    def numbers(self) -> Tensor:
        found: Tensor = getattr(self, self.numbered)
        return found

    @property
    def _selection(self) -> Tensor:
        """One-hot rows, (k, width), in D's dtype."""
        dtype: Any = self._change[0].weight.dtype
        rows = self.numbers.new_zeros((len(self.numbers), self.width), dtype=dtype)
        return rows.scatter_(1, self.numbers[:, None], 1)

    def check(self, stored: Tensor, where: str) -> None:
        """Compare the numbers in a file with those of the plan.

        Raises:
            MismatchError: they differ.
        """
        planned = self.numbers.tolist()
        if stored.dtype != torch.int64 or stored.tolist() != planned:
            raise MismatchError(
                f"{where}: the file holds {self.numbered} {_some(stored.tolist())}, the plan says {_some(planned)}: one of them "
                "was changed."
            )

    def extra_repr(self) -> str:
        return f"{self.numbered}={len(self.numbers)} of {self.width}"


class Columns(Lines):
    """In the place of LoRA's A; D (out, k) is the weight of B."""

    factor, numbered = "lora_A", "columns"

    @property
    def weight(self) -> Tensor:
        """LoRA's A: one-hot rows, (k, in), in D's dtype. Of all forwards PEFT asks its dtype."""
        return self._selection


class Rows(Lines):
    """In the place of LoRA's B; D (k, in) is the weight of A."""

    factor, numbered = "lora_B", "rows"

    @property
    def weight(self) -> Tensor:
        """LoRA's B: one-hot columns, (out, k), in D's dtype."""
        return self._selection.T


class RealLines(LoraVariant):
    """What is common to columns and rows in PEFT's layer, over float, 4-bit and 8-bit bases: merging."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to make: `install_columns` puts the numbers in."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _added(module, active_adapter, orig_weight.clone(), 1)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        _added(module, active_adapter, orig_weight.data, 1)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _added(module, active_adapter, orig_weight.clone(), -1)


class RealColumns(RealLines):
    """What PEFT's layer computes with `Columns` and D."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + scale * dropout(x[..., columns]) D^T, (..., out); the product in D's dtype, or autocast's.

        Operations of torch's own: what autograd keeps of them is what must be kept, the picked features.
        """
        change, scale = module.lora_B[active_adapter].weight, module.scaling[active_adapter]
        # A copy, since DDP writes into buffers in every forward, and autograd refuses an index that was written into since.
        picked = x.index_select(-1, module.lora_A[active_adapter].columns.clone()).to(change.dtype)
        picked = module.lora_dropout[active_adapter](picked)
        if scale != 1:
            picked = picked * scale
        if result.dtype != picked.dtype or torch.is_autocast_enabled(x.device.type):
            return result + functional.linear(picked, change)
        # One pass over the output instead of two: it is the widest tensor here.
        flat = torch.addmm(result.reshape(-1, result.shape[-1]), picked.reshape(-1, picked.shape[-1]), change.T)
        return flat.view(result.shape)


class RealRows(RealLines):
    """What PEFT's layer computes with `Rows` and D."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result, (..., out), with scale * dropout(x) D^T added to its features `rows`; the product in D's dtype, or autocast's.

        Backward needs all of x, as LoRA's does, and torch keeps the k features that are added.
        """
        change = module.lora_A[active_adapter].weight
        added = functional.linear(module.lora_dropout[active_adapter](x.to(change.dtype)), change)
        # A copy of the numbers, as in `RealColumns.forward`.
        rows = module.lora_B[active_adapter].rows.clone()
        return result.index_add(-1, rows, (added * module.scaling[active_adapter]).to(result.dtype))


@torch.no_grad()
def _added(module: LoraLayer, adapter: str, weight: Tensor, sign: int) -> Tensor:
    """W[:, columns] or W[rows] + sign * scale * D in place, in the wider of the two dtypes and rounded once; nothing else is
    touched."""
    matrix = weight.T if getattr(module, "fan_in_fan_out", False) else weight
    if isinstance(lines := module.lora_B[adapter], Rows):
        where, change = lines.rows, module.lora_A[adapter].weight
    else:
        where, change = (slice(None), module.lora_A[adapter].columns), module.lora_B[adapter].weight
    wide = torch.promote_types(weight.dtype, change.dtype)
    moved = matrix[where].to(wide).add_(change.to(wide), alpha=sign * module.scaling[adapter])
    matrix[where] = moved.to(weight.dtype)
    return weight


def install_columns(layer: LoraLayer, adapter: str, entry: PlanEntry) -> None:
    """Turn a LoRA adapter that PEFT has just made into the real weights of some columns or rows.

    Raises:
        MismatchError: columns or rows that the matrix does not have.
    """
    numbers = entry.columns or entry.rows or ()
    what, width = ("column", layer.in_features) if entry.columns else ("row", layer.out_features)
    if numbers[-1] >= width:
        side = "input" if entry.columns else "output"
        raise MismatchError(f"{entry.name}: the plan has {what} {numbers[-1]}, the matrix has {width} {side} features.")
    device: Any = layer.get_base_layer().weight.device
    if entry.columns:
        layer.lora_A[adapter] = Columns(layer.lora_B[adapter], numbers, width, device)
        layer.lora_variant[adapter] = RealColumns()
    else:
        nn.init.zeros_(layer.lora_A[adapter].weight)  # type: ignore[arg-type]
        layer.lora_B[adapter] = Rows(layer.lora_A[adapter], numbers, width, device)
        layer.lora_variant[adapter] = RealRows()
    layer.r[adapter] = layer.lora_alpha[adapter] = len(numbers)
    layer.scaling[adapter] = 1.0  # what a column's rate should be does not depend on how many there are


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:4])) + (f", ... ({len(values)})" if len(values) > 4 else "")


def column_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Lines]]:
    """(module name in `model`, its columns or rows) of the layers of which an adapter trains some."""
    for name, module in model.named_modules():
        variant = module.lora_variant.get(adapter) if isinstance(module, LoraLayer) else None
        if isinstance(variant, RealColumns):
            yield name, module.lora_A[adapter]
        elif isinstance(variant, RealRows):
            yield name, module.lora_B[adapter]
