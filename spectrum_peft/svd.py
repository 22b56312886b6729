"""Leading singular triplets of a matrix, and an adapter in their basis: tensors in, tensors out.

A change of a matrix W (out, in) in its own singular basis, over chosen components S of its SVD W = U diag(s) V^T:

    W' = W + U' diag(s + ds) V'^T - U diag(s) V^T,    u'_i = u_i + P p_i,    v'_i = v_i + Q q_i

with fixed random P (out, r) and Q (in, r), and with ds (|S|), p and q (|S|, r) trained from zero. Multiplied out, the change
is [U P] M [V Q]^T, a product of rank |S| + r, with the small core

    M = [[diag(ds), diag(s + ds) q], [p^T diag(s + ds), p^T diag(s + ds) q]]

so that neither W' nor a residual is ever formed, and everything that knows a low-rank product knows this one.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

# Goes into the names of cached files: to be raised when the numbers change.
_CACHE_VERSION = 1
# The range finder looks at this many directions more than it is asked for, and multiplies by W W^T this many times.
OVERSAMPLING = 16
POWER_ITERATIONS = 4
# Where it would look at more than this share of all directions, it saves nothing over the eigenvectors of the Gram matrix.
_WORTH_IT = 0.2
# Random directions are multiples of this before they are scaled to their length.
_GRAIN = 2.0**-12


@dataclass(frozen=True)
class SingularTriplets:
    """The largest singular values of a matrix W (out, in) with their vectors, float32, largest first.

    Attributes:
        left: (k, out), rows are the left singular vectors u_i.
        values: (k,).
        right: (k, in), rows are v_i.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def take(self, components: Tensor) -> SingularTriplets:
        """Those of some indexes."""
        return SingularTriplets(self.left[components], self.values[components], self.right[components])


@torch.no_grad()
def truncated_svd(matrix: Tensor, k: int, *, seed: int = 0) -> SingularTriplets:
    """The k largest singular triplets; the same bytes for the same matrix, k and seed on one machine.

    A randomized range finder with power iterations, each orthonormalized, and an SVD of the matrix in that range. The
    spectral error of the rank-k product is in expectation at most a factor (1 + sqrt(k / (p - 1)))^(1 / (2q + 1)), with a
    like term for the tail, above the best possible, s_{k+1}: p is `OVERSAMPLING`, q is `POWER_ITERATIONS`. Where the range
    would be a large part of the whole space, eigenvectors of the smaller Gram matrix in float64 are as fast and exact to
    float32.

    Each pair of vectors has the sign that makes the largest entry of u_i, the first of equals, positive.

    Args:
        matrix: (out, in), floating point, finite; computed with in float32 on its own device.
        k: 1 to min(out, in).
        seed: of the random test matrix, drawn on the CPU.
    Raises:
        ValueError: k outside its range.
    Source: Halko, Martinsson, Tropp (2011), "Finding structure with randomness", arXiv:0909.4061, algorithms 4.4 and 5.1,
        corollary 10.10.
    """
    smaller = min(matrix.shape)
    if not 1 <= k <= smaller:
        raise ValueError(f"k is {k}, wanted 1 to {smaller}, the smaller side of {tuple(matrix.shape)}")
    turned = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if turned else matrix  # (small, large)
    found = k + OVERSAMPLING
    if found > _WORTH_IT * smaller:
        left, values, right = _by_gram(wide, k)
    else:
        left, values, right = _by_range(wide.float(), k, found, seed)
    if turned:
        left, right = right, left
    left, right = left.T.float(), right.T.float()
    peak = left.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(left.gather(1, peak) < 0, -1.0, 1.0)
    return SingularTriplets((left * sign).contiguous(), values.float(), (right * sign).contiguous())


def _by_gram(wide: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (small, k), s (k,), V (large, k) from the eigenvectors of W W^T.

    In float64: squaring loses half of the digits, of which enough are left for float32 down to s_i = 1e-8 s_1. A direction
    below that has no singular value to speak of; its v is a zero vector then, and the product is right all the same.
    """
    full = wide.double()
    squares, left = torch.linalg.eigh(full @ full.T)
    squares, left = squares.flip(0)[:k].clamp_min(0.0), left.flip(1)[:, :k]
    values = squares.sqrt()
    right = full.T @ left
    lengths = torch.linalg.vector_norm(right, dim=0)
    present = lengths > 1e-8 * values[0]
    right = torch.where(present, right / lengths.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return left, torch.where(present, lengths, 0.0), right


def _by_range(wide: Tensor, k: int, found: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (small, k), s (k,), V (large, k) by subspace iteration from a random start."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(wide.shape[1], found, generator=generator, dtype=torch.float32).to(wide.device)
    basis = torch.linalg.qr(wide @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    return (basis @ left)[:, :k], values[:k], right[:k].T


def cached_svd(matrix: Tensor, k: int, folder: Path) -> SingularTriplets:
    """`truncated_svd` of a matrix, kept in a file named by the matrix's bytes, its dtype and shape, and k.

    A file takes 4 k (out + in + 1) bytes. A file that cannot be read is computed anew, with a logged line.

    Args:
        folder: of the cache; made where it is not there.
    """
    bare = matrix.detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{_CACHE_VERSION} {k} {bare.dtype} {tuple(bare.shape)} ".encode())
    digest.update(bare.view(torch.uint8).numpy().data)
    path = folder / f"{digest.hexdigest()}.safetensors"
    if path.is_file():
        try:
            kept = load_file(path)
            return SingularTriplets(kept["left"], kept["values"], kept["right"])
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s: not read (%s); its matrix is decomposed again", path, error)
    result = truncated_svd(matrix, k)
    tensors = {"left": result.left.cpu(), "values": result.values.cpu(), "right": result.right.cpu()}
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, name)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return SingularTriplets(tensors["left"], tensors["values"], tensors["right"])


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
