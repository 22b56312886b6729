"""Real weights of some columns of a matrix, in PEFT's LoRA layers: y = base(x) + x[..., columns] D^T.

W' = W + D P, where P (k, in) selects k input features: a product of rank k whose A is one-hot, so that PEFT's own machinery
switches, moves, saves and deletes it. A is never multiplied with: where PEFT expects `lora_A` stands a `Columns` with the
numbers of the columns, and `lora_B` is PEFT's own Linear, whose weight is D (out, k), zero at first. Backward keeps the k
selected features of x, where LoRA keeps x.

Related: Yang et al. (2024), "S2FT", arXiv:2412.06289 (coupled rows and columns that are permuted to the front); Bhardwaj et
al. (2024), "SHiRA", arXiv:2406.13175 (scattered elements); Yang et al. (2025), "DiaBlo", arXiv:2506.03230 (diagonal blocks).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn import functional

from ..errors import MismatchError
from ..records import PlanEntry


class Columns(nn.Module):
    """Which columns train: the buffer `columns` (k,), int64, ascending.

    A buffer and no parameter, since FSDP shards parameters and casts them to its dtype of communication.

    Args:
        change: PEFT's `lora_B`, whose weight is D (out, k).
        columns: as in the plan's entry. inside: input features of the matrix.
    """

    columns: Tensor

    def __init__(self, change: nn.Module, columns: tuple[int, ...], inside: int, device: torch.device) -> None:
        super().__init__()
        self._change = (change,)  # in a tuple: no child of this module
        self.inside = inside
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64, device=device))

    @property
    def weight(self) -> Tensor:
        """LoRA's A: one-hot rows, (k, in), in D's dtype. Of all forwards PEFT asks its dtype."""
        dtype: Any = self._change[0].weight.dtype
        rows = self.columns.new_zeros((len(self.columns), self.inside), dtype=dtype)
        return rows.scatter_(1, self.columns[:, None], 1)

    def check(self, stored: Tensor, where: str) -> None:
        """Compare the numbers in a file with those of the plan.

        Raises:
            MismatchError: they differ.
        """
        planned = self.columns.tolist()
        if stored.dtype != torch.int64 or stored.tolist() != planned:
            raise MismatchError(
                f"{where}: the file holds columns {_some(stored.tolist())}, the plan says {_some(planned)}: one of them was "
                "changed."
            )

    def extra_repr(self) -> str:
        return f"columns={len(self.columns)} of {self.inside}"


class RealColumns(LoraVariant):
    """What PEFT's layer computes with `Columns` and D, over float, 4-bit and 8-bit bases."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to make: `install` puts the columns in."""

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

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _added(module, active_adapter, orig_weight.clone(), 1)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        _added(module, active_adapter, orig_weight.data, 1)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _added(module, active_adapter, orig_weight.clone(), -1)


@torch.no_grad()
def _added(module: LoraLayer, adapter: str, weight: Tensor, sign: int) -> Tensor:
    """W[:, columns] + sign * scale * D in place, in the wider of the two dtypes and rounded once; nothing else is touched."""
    columns, change = module.lora_A[adapter].columns, module.lora_B[adapter].weight
    matrix = weight.T if getattr(module, "fan_in_fan_out", False) else weight
    wide = torch.promote_types(weight.dtype, change.dtype)
    moved = matrix[:, columns].to(wide).add_(change.to(wide), alpha=sign * module.scaling[adapter])
    matrix[:, columns] = moved.to(weight.dtype)
    return weight


def install_columns(layer: LoraLayer, adapter: str, entry: PlanEntry) -> None:
    """Turn a LoRA adapter that PEFT has just made into the real weights of some columns.

    Raises:
        MismatchError: columns that the matrix does not have.
    """
    columns, inside = entry.columns or (), layer.in_features
    if columns[-1] >= inside:
        raise MismatchError(f"{entry.name}: the plan has column {columns[-1]}, the matrix has {inside} input features.")
    change = layer.lora_B[adapter]
    layer.lora_A[adapter] = Columns(change, columns, inside, layer.get_base_layer().weight.device)  # type: ignore[arg-type, union-attr]
    layer.lora_variant[adapter] = RealColumns()
    layer.r[adapter] = layer.lora_alpha[adapter] = len(columns)
    layer.scaling[adapter] = 1.0  # what a column's rate should be does not depend on how many there are


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:4])) + (f", ... ({len(values)})" if len(values) > 4 else "")


def column_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Columns]]:
    """(module name in `model`, its columns) of the layers of which an adapter trains columns."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.lora_variant.get(adapter), RealColumns):
            yield name, module.lora_A[adapter]
