"""An adapter in the singular basis of its matrix: tensors in, tensors out.

A change of a matrix W (out, in) in its own singular basis, over chosen components S of its SVD W = U diag(s) V^T:

    W' = W + U' diag(s + ds) V'^T - U diag(s) V^T,    u'_i = u_i + P p_i,    v'_i = v_i + Q q_i

with fixed random P (out, r) and Q (in, r), and with ds (|S|), p and q (|S|, r) trained from zero. Multiplied out, the change
is [U P] M [V Q]^T, a product of rank |S| + r, with the small core

    M = [[diag(ds), diag(s + ds) q], [p^T diag(s + ds), p^T diag(s + ds) q]]

so that neither W' nor a residual is ever formed, and everything that knows a low-rank product knows this one.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Random directions are multiples of this before they are scaled to their length.
_GRAIN = 2.0**-12


def random_directions(count: int, width: int, seed: int, name: str) -> Tensor:
    """(count, width) float32, rows of independent N(0, 1 / width): the columns of P or Q, lengths near 1.

    The same everywhere: drawn in float64 on the CPU and rounded to multiples of 2^-12 before they are scaled, so that a
    last bit of another machine's logarithm does not show.

    Args:
        seed, name: what they are drawn from.
    """
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    drawn = torch.randn(count * width, generator=generator, dtype=torch.float64)
    grains = (drawn / _GRAIN).round() * _GRAIN
    return (grains / math.sqrt(width)).float().reshape(count, width)


def digest_of(*tensors: Tensor) -> Tensor:
    """sha256 over the bytes of CPU tensors, as (32,) uint8."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def rotation_bases(seed: int, name: str, out: int, inside: int, rank: int) -> tuple[Tensor, Tensor]:
    """(P, Q) of a matrix (out, inside) as rows: (rank, out) and (rank, inside).

    Args:
        seed: of the plan. name: of the matrix in the plan.
    """
    return random_directions(rank, out, seed, f"{name} left"), random_directions(rank, inside, seed, f"{name} right")


class _CoreMatrix(torch.autograd.Function):
    """M = [I p]^T diag(s + ds) [I q], its first diagonal s + ds replaced by ds; and its derivative, written out.

    In few operations: they are small, and each costs more to call than to compute.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, shift: Tensor, p: Tensor, q: Tensor) -> Tensor:
        count = len(values)
        unit = torch.eye(count, dtype=p.dtype, device=p.device)
        left, right = torch.cat((unit, p), dim=1), torch.cat((unit, q), dim=1)
        moved = (values + shift)[:, None]
        if torch.is_autocast_enabled(p.device.type):  # which would round the product to 16 bit
            with torch.autocast(p.device.type, enabled=False):
                core = (left * moved).T @ right
        else:
            core = (left * moved).T @ right
        core.diagonal()[:count].copy_(shift)
        ctx.save_for_backward(moved, left, right)
        return core

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        moved, left, right = ctx.saved_tensors
        count = len(moved)
        by_right, by_left = left @ grad, right @ grad.T  # derivatives by diag(s + ds) [I q] and diag(s + ds) [I p]
        return None, (by_right * right).sum(1), by_left[:, count:] * moved, by_right[:, count:] * moved


def core_matrix(values: Tensor, shift: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """M (|S| + r, |S| + r) of the module docstring; exactly zero where shift, p and q are.

    Differentiable once by shift, p and q.

    Args:
        values, shift: (|S|,), s and ds. p, q: (|S|, r).
    """
    core: Tensor = _CoreMatrix.apply(values, shift, p, q)
    return core
