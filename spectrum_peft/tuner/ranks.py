"""Ranks that change during training, without a shape that changes.

A LoRA layer whose rank may change is allocated once at the largest rank and computes with its first rows and columns. The
rest, the dead slots, are zero in both factors, so that their gradients are zero too and the whole product is the live one.
Parameters, optimizer groups, DDP's buckets and checkpoints of the optimizer never see a change.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor
from torch.nn import functional

from ..devices import exact

logger = logging.getLogger(__name__)

# Singular values below this share of the largest are noise of float32 factors, not directions that were trained.
_NEGLIGIBLE = 1e-7
# Averages that an optimizer keeps entry by entry, and the power of the gradient that they average.
_MOMENTS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def live_factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, float]:
    """(B, A, scale) of a LoRA layer, live slots only: dW = scale * B @ A, B (out, rank), A (rank, in)."""
    rank = live_rank(layer, adapter)
    return layer.lora_B[adapter].weight[:, :rank], layer.lora_A[adapter].weight[:rank], layer.scaling[adapter]


class SlicedRank(LoraVariant):
    """PEFT's seam for what a LoRA layer computes, over float, 4-bit and 8-bit bases: the live slots only.

    PEFT's own `layer.r` stays the allocated rank, and `layer.lora_alpha` what gives the layer's scale at that rank, so that
    PEFT's `set_scale` and `unscale_layer` compute what they say.

    Args:
        live: slots that are live.
    """

    def __init__(self, live: int = 0) -> None:
        self.live = live

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to make: `allocate` prepares the factors."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + scale * B A dropout(x). At rank 0 the factors are still in the graph, for DDP's sake."""
        B, A, scale = live_factors(module, active_adapter)
        x = module.lora_dropout[active_adapter](x.to(A.dtype))
        return result + functional.linear(functional.linear(x, A), B) * scale

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _delta(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _delta(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _delta(module, active_adapter, orig_weight)


def _delta(module: LoraLayer, adapter: str, like: Tensor) -> Tensor:
    B, A, scale = live_factors(module, adapter)
    delta = (B @ A) * scale
    return (delta.T if getattr(module, "fan_in_fan_out", False) else delta).to(like.dtype)


def live_rank(layer: Any, adapter: str) -> int:
    """The rank that a layer computes with."""
    rank: int = layer.lora_variant[adapter].live if is_sliced(layer, adapter) else layer.r[adapter]
    return rank


def set_scaling(layer: LoraLayer, adapter: str, scale: float) -> None:
    """Set what the update is multiplied by, and the alpha that says the same at the allocated rank."""
    layer.scaling[adapter] = scale
    rank = layer.r[adapter]
    layer.lora_alpha[adapter] = scale * (math.sqrt(rank) if layer.use_rslora.get(adapter, False) else rank)


def is_sliced(layer: Any, adapter: str) -> bool:
    return isinstance(layer, LoraLayer) and isinstance(layer.lora_variant.get(adapter), SlicedRank)


@torch.no_grad()
def allocate(layer: LoraLayer, adapter: str, live: int) -> None:
    """Make a fresh LoRA layer's rank movable: live slots stay as PEFT made them, dead ones become zero."""
    layer.lora_variant[adapter] = SlicedRank(live)
    for slot in (layer.lora_A[adapter].weight[live:], layer.lora_B[adapter].weight[:, live:]):
        if slot.device.type != "meta":
            slot.zero_()


@dataclass(frozen=True)
class RankChange:
    """One layer whose rank moved.

    Attributes:
        dropped: largest singular value of the update that was cut off, 0.0 on growth: how far the function moved, in the
            spectral norm of the layer's weight.
    """

    name: str
    before: int
    after: int
    dropped: float


@torch.no_grad()
def set_rank(
    layer: LoraLayer, adapter: str, rank: int, *, name: str, step: int, seed: int, optimizer: Any = None
) -> RankChange:
    """Move a layer to another live rank.

    Growth adds directions with B = 0 and leaves the function as it was. Shrinking keeps the best approximation of B A of
    the new rank (Eckart-Young), by QR of both factors and an SVD of the small core; no (out, in) product is formed.
    Adam's moments follow: they rotate with the factors on shrinking (exact for the first moment, squared entries for the
    second, an approximation), and new slots get the mean second moment of the live ones, since with zero moments late in
    training Adam's bias correction would move them several times too far.

    Args:
        rank: new live rank, 0 to the allocated one.
        name: plan entry name; with `seed` and `step` it seeds the new rows, so that all processes draw the same.
        optimizer: torch optimizer that trains the factors, or None.
    """
    before = live_rank(layer, adapter)
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    allocated = A.shape[0]
    if not 0 <= rank <= allocated:
        raise ValueError(f"{name}: rank is {rank}, wanted 0 to the allocated {allocated}")
    dropped = 0.0
    kept = before
    if rank < before:
        kept, dropped = _shrink(A, B, before, rank, layer.scaling[adapter], optimizer, name)
    if rank > kept:
        rows = _new_rows(A, rank - kept, f"{seed}:{step}:{name}")
        A[kept:rank] = rows
        B[:, kept:rank] = 0.0
        _fill_moments(optimizer, A, B, kept, rank, name)
    layer.lora_variant[adapter].live = rank
    return RankChange(name, before, rank, dropped)


def _new_rows(A: Tensor, count: int, seed: str) -> Tensor:
    """Rows as PEFT draws them (Kaiming uniform with a = sqrt(5), that is U(-1, 1) / sqrt(in)), from a generator of their own."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1)
    bound = 1 / math.sqrt(A.shape[1])
    rows = torch.rand(count, A.shape[1], generator=generator, dtype=torch.float32) * (2 * bound) - bound
    return rows.to(device=A.device, dtype=A.dtype)


def _shrink(A: Tensor, B: Tensor, before: int, rank: int, scale: float, optimizer: Any, name: str) -> tuple[int, float]:
    """Write the best rank-`rank` factors of B A into the first slots, zero the rest.

    Returns:
        (slots that carry a direction, dropped singular value): a product of lower rank than asked for leaves free slots.
    """
    a, b = exact(A[:before]).double(), exact(B[:, :before]).double()
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    kept = min(rank, int((s > _NEGLIGIBLE * s[0]).sum()) if s[0] > 0 else 0)
    root = s[:kept].sqrt()
    new_b, new_a = qb @ (u[:, :kept] * root), (vh[:kept] * root[:, None]) @ qa.T
    # B' = B M and A' = N A, whence dL/dA' = M^T dL/dA and dL/dB' = dL/dB N^T.
    M = torch.linalg.pinv(rb) @ (u[:, :kept] * root)
    N = (vh[:kept] * root[:, None]) @ torch.linalg.pinv(ra).T
    A.zero_()
    B.zero_()
    A[:kept] = new_a.to(A.dtype)
    B[:, :kept] = new_b.to(B.dtype)
    for parameter, turn in ((A, lambda m, power: (M.T**power) @ m), (B, lambda m, power: m @ (N.T**power))):
        for key, moment in moments(optimizer, parameter, name).items():
            live = exact(moment[:before] if parameter is A else moment[:, :before]).double()
            turned = turn(live, _MOMENTS[key]).to(moment.dtype)
            moment.zero_()
            if parameter is A:
                moment[:kept] = turned
            else:
                moment[:, :kept] = turned
    return kept, float(s[kept]) * abs(scale) if kept < len(s) and kept == rank else 0.0


def moments(optimizer: Any, parameter: Tensor, name: str) -> dict[str, Tensor]:
    """{key: moment} of a factor in the optimizer's state, each of the factor's shape.

    State that says anything else about the factor's entries (rows and columns of Adafactor, 8-bit blocks) cannot follow
    them: it is dropped, with a logged line, and the optimizer starts it anew.
    """
    if optimizer is None or parameter not in optimizer.state:
        return {}
    arrays = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.ndim > 0}
    if any(key not in _MOMENTS or value.shape != parameter.shape for key, value in arrays.items()):
        optimizer.state.pop(parameter)
        logger.info("%s: its rank moves, %s starts its state of a factor anew", name, type(optimizer).__name__)
        return {}
    return arrays


def _fill_moments(optimizer: Any, A: Tensor, B: Tensor, kept: int, rank: int, name: str) -> None:
    for parameter in (A, B):
        for key, moment in moments(optimizer, parameter, name).items():
            live = moment[:kept] if parameter is A else moment[:, :kept]
            value = live.mean() if _MOMENTS[key] == 2 and live.numel() else moment.new_zeros(())
            (moment[kept:rank] if parameter is A else moment[:, kept:rank]).fill_(value)
