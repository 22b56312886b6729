"""What is measured about a gradient as it passes: Fisher mass, mean gradients and their likeness, components."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..devices import exact, summed
from ..errors import DataError
from ..scan import SingularTriplets

# Singular values of a sketch's core below this many units of rounding of the largest are no directions.
_NEGLIGIBLE = 10


class Collector(Protocol):
    """Something that is measured on gradients as they pass, and ends as fields of a `GradientStat`."""

    as_computed: bool

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        """One batch at one matrix (out, in).

        Args:
            name: of the parameter.
            x: inputs, (samples, tokens, in).
            g: derivatives of each sample's own loss by the outputs, (samples, tokens, out); zero at padding. Both float32,
                or float64 where the model is; what is `as_computed` gets the dtype that the model computes in.
        """
        ...

    def see_whole(self, name: str, gradient: Tensor) -> None:
        """One sample's derivative by a parameter that no module's input and output speak of (fused experts), as stored."""
        ...

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        """What goes into the `GradientStat` of a matrix, by field; all samples have been seen."""
        ...


class FisherMass:
    """The empirical Fisher mass: the squared derivative of one sample's loss, its mean over samples and elements.

    |sum_t g_t x_t^T|_F^2 is also the sum over pairs of tokens of (x_t . x_u)(g_t . g_u), which is cheaper where a sample has
    fewer tokens than the matrix has rows and columns; else the product is formed, of one sample at a time.
    Source: Kunstner et al. (2019), arXiv:1905.12558, equation 3 (the empirical Fisher; its diagonal, averaged).
    """

    as_computed = False

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        for one_x, one_g in zip(x, g, strict=True):
            tokens, width, height = len(one_x), one_x.shape[1], one_g.shape[1]
            if tokens * (width + height) < width * height:
                square = summed((one_x @ one_x.T) * (one_g @ one_g.T))
            else:
                square = summed((one_g.T @ one_x).square_())
            self._add(name, square)

    def see_whole(self, name: str, gradient: Tensor) -> None:
        self._add(name, summed(gradient.square()))

    def _add(self, name: str, square: Tensor) -> None:
        self._totals[name] = square + self._totals[name] if name in self._totals else square

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        # A sum over pairs of tokens may round to a little below zero.
        total = max(0.0, float(self._totals[name])) if name in self._totals else 0.0
        return {"fisher": total / samples / numel}


class MeanGradients:
    """Sketches of the mean gradients, from which each comes back as a product of low rank.

    Two products with fixed random matrices are kept of a mean gradient G (out, in), X = G P and Y = G^T Q, which add up over
    batches; then G is about X (Q^T X)^+ Y^T, exactly so where its rank is at most `sketch`, and else with an error near that
    of the best approximation of that rank.
    Source: Nakatsukasa (2020), arXiv:2009.11392, equation 1.2 (generalized Nystroem, its second sketch half as wide again).

    Args:
        sketch: columns of P.
        seed: of the random matrices.
    """

    as_computed = False

    def __init__(self, sketch: int, seed: int = 0) -> None:
        self.sketch, self.seed = sketch, seed
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._random: dict[tuple[int, int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def _matrices(self, width: int, height: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """P (in, sketch) and Q (out, 1.5 sketch): the same for all matrices of one shape."""
        key = (width, height, like.dtype, like.device)
        if key not in self._random:
            columns = min(self.sketch, width, height)
            wider = min(columns + (columns + 1) // 2, height)
            generator = torch.Generator().manual_seed(_seed(self.seed, width, height))
            pair = (torch.randn(rows, n, generator=generator) for rows, n in ((width, columns), (height, wider)))
            p, q = (m.to(dtype=like.dtype, device=like.device) for m in pair)
            self._random[key] = (p, q)
        return self._random[key]

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        p, q = self._matrices(x.shape[-1], g.shape[-1], x)
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        if name not in self._kept:
            self._kept[name] = (x.new_zeros(g.shape[1], p.shape[1]), x.new_zeros(x.shape[1], q.shape[1]))
        left, right = self._kept[name]
        left.addmm_(g.T, x @ p)
        right.addmm_(x.T, g @ q)

    def see_whole(self, name: str, gradient: Tensor) -> None:
        """Fused experts are not compared with each other."""

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        return {}

    def svd(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """(U, s, V) of the sum of the gradients that were seen: U (out, rank), V (in, rank), float64 on the CPU.

        Of rank 0 where all of it was zero.

        Raises:
            DataError: it holds NaN or Inf.
        """
        x, y = (t.cpu().double() for t in self._kept[name])
        kept = self._kept[name][0]
        q = self._matrices(y.shape[0], x.shape[0], kept)[1].cpu().double()
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise DataError(f"calibration: the sum of the gradients of {name} is no finite matrix on these samples.")
        u, s, vh = torch.linalg.svd(q.T @ x, full_matrices=False)
        rank = int((s > _NEGLIGIBLE * torch.finfo(kept.dtype).eps * s[0]).sum())
        left, right = x @ (vh[:rank].T / s[:rank]), y @ u[:, :rank]
        ql, rl = torch.linalg.qr(left)
        qr, rr = torch.linalg.qr(right)
        inner_u, values, inner_vh = torch.linalg.svd(rl @ rr.T)
        return ql @ inner_u, values, qr @ inner_vh.T

    def has(self, name: str) -> bool:
        """Whether the gradient of a matrix was seen by its module's input and output."""
        return name in self._kept

    def similarities(
        self, members: Sequence[str], side: str, directions: int
    ) -> tuple[list[list[float]], list[list[float]]]:
        """(subspace, cosine) tables of matrices of one shape.

        subspace: |V_a^T V_b|_F^2 / n for the n strongest directions of each on the given side, n at most `directions` and the
        rank of either: the mean squared cosine of the principal angles, n / width by chance. cosine: <G_a, G_b> of the
        low-rank products over their norms. A gradient that is zero is like no other.

        Args:
            side: `in` or `out`.
        """
        parts = [self.svd(name) for name in members]
        subspace = [[1.0] * len(members) for _ in members]
        cosine = [[1.0] * len(members) for _ in members]
        for i, (ua, sa, va) in enumerate(parts):
            for j, (ub, sb, vb) in enumerate(parts[:i]):
                count = min(directions, len(sa), len(sb))
                mine, other = (va, vb) if side == "in" else (ua, ub)
                overlap = (mine[:, :count].T @ other[:, :count]).square().sum().item() / count if count else 0.0
                product = ((ua.T @ ub) * (sa[:, None] * sb) * (va.T @ vb)).sum().item()
                norms = sa.norm().item() * sb.norm().item()
                subspace[i][j] = subspace[j][i] = min(1.0, overlap)
                cosine[i][j] = cosine[j][i] = product / norms if norms else 0.0
        return subspace, cosine


class ComponentImportance:
    """What each singular component of a matrix has to do with the loss: s_i^2 E[(dL/ds_i)^2], the mean over samples.

    dL/ds_i = u_i^T G v_i is the sum over a sample's tokens of (g_t . u_i)(x_t . v_i), so that no gradient is formed. Where the
    model computes in bfloat16 the products with the singular vectors do, too: they are most of the work. The sums are float32.

    Args:
        bases: {parameter: its leading singular triplets}; what is not in it is not measured.
    """

    as_computed = True

    def __init__(self, bases: Mapping[str, SingularTriplets]) -> None:
        self.bases = bases
        self._squares: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        if name not in self.bases:
            return
        basis = self.bases[name]
        wide = torch.promote_types(x.dtype, torch.float32)
        # float16 has no room for the derivatives.
        dtype = x.dtype if x.dtype == torch.bfloat16 else wide
        right, left = (rows.to(device=x.device, dtype=dtype) for rows in (basis.right, basis.left))
        read, written = (x.to(dtype) @ right.T).to(wide), (g.to(dtype) @ left.T).to(wide)
        slopes = read.mul_(written).sum(dim=1)
        square = exact(slopes).double().square_().sum(dim=0)
        self._squares[name] = square + self._squares[name] if name in self._squares else square

    def see_whole(self, name: str, gradient: Tensor) -> None:
        """Fused experts have no basis of their own."""

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        if name not in self.bases:
            return {}
        values = self.bases[name].values.cpu().double()
        mean = self._squares[name].cpu() / samples if name in self._squares else torch.zeros_like(values)
        return {"singular_values": tuple(values.tolist()), "importance": tuple((values.square() * mean).tolist())}


class ColumnScores:
    """A score of each column of a matrix, which is one input feature.

    `activation`: E[x_j^2] over the tokens that the loss depends on. `fisher`: the squared derivative of one sample's loss,
    summed over the column, its mean over samples: the column's share of `FisherMass`, for which the gradient is formed, of one
    sample at a time.

    Args:
        by: `activation` or `fisher`.
    """

    as_computed = False

    def __init__(self, by: str) -> None:
        self.by = by
        self._totals: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        if self.by == "activation":
            counted = g.ne(0).any(-1)
            self._tokens[name] = self._tokens.get(name, 0) + int(counted.sum())
            squares = summed(x[counted].square(), 0)
        else:
            squares = sum(summed((b.T @ a).square(), 0) for a, b in zip(x, g, strict=True))  # type: ignore[assignment]
        self._totals[name] = squares + self._totals[name] if name in self._totals else squares

    def see_whole(self, name: str, gradient: Tensor) -> None:
        """Fused experts have no columns that train alone."""

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        if name not in self._totals:
            return {}
        count = self._tokens[name] if self.by == "activation" else samples
        return {"columns": tuple((self._totals[name] / max(1, count)).tolist())}


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
