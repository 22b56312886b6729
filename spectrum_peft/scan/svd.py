"""Leading singular triplets of a matrix, exact or by a randomized range finder, and a cache of them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..devices import exact
from ..records import is_stream, whole_file

logger = logging.getLogger(__name__)

# Goes into the names of cached files: to be raised when the numbers change.
_CACHE_VERSION = 1
# The range finder looks at this many directions more than it is asked for, and multiplies by W W^T this many times.
OVERSAMPLING = 16
POWER_ITERATIONS = 4
# Where it would look at more than this share of all directions, it saves nothing over the eigenvectors of the Gram matrix.
_WORTH_IT = 0.2


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
        matrix: (out, in), floating point, finite; computed with in float32 on its own device, on the
            CPU where that has no float64.
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
    wide = exact(matrix.T if turned else matrix)  # (small, large)
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
            found = SingularTriplets(kept["left"], kept["values"], kept["right"])
            shapes = [(k, matrix.shape[0]), (k,), (k, matrix.shape[1])]
            if [tuple(t.shape) for t in (found.left, found.values, found.right)] == shapes:
                return found
            raise KeyError("tensors of these shapes")
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s: not read (%s); its matrix is decomposed again", path, error)
    result = truncated_svd(matrix, k)
    tensors = {"left": result.left.cpu(), "values": result.values.cpu(), "right": result.right.cpu()}
    try:
        if is_stream(path):
            raise OSError("a device or a pipe is there")
        with whole_file(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        logger.warning("%s: cannot be kept (%s)", path, error)
    return SingularTriplets(tensors["left"], tensors["values"], tensors["right"])
