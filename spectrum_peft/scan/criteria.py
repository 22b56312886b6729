"""Scores of a single weight matrix: pure numerics, a matrix in, numbers out.

Notation: W is n x m with singular values s_1 >= ... >= s_k, k = min(n, m), beta = k / max(n, m). All statistics are
taken in float64; only the Gram matrix and its eigenvalues are computed in float32, and only while the error that this
can cause stays far below what a score shows (`singular_values`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import names
from ..devices import exact
from ..errors import CheckpointError, OptionError, near_matches
from .edges import marchenko_pastur_edge, published_edge
from .gram import gram_values

# How many places for the start of the tail `power_law` tries, and how many values a tail must have.
_TAIL_STARTS, _TAIL_LEAST = 64, 10
# The error of an eigenvalue in float32, in units of eps * (mean(s^2) + 4 s^2): on average over a matrix, and of a single
# one; and of a single one in units of eps * s_1^2, where that is more. See `_trusted`.
_USUAL, _WORST, _WORST_OF_TOP = 4.0, 60.0, 1.0
# Weights whose largest entry lies outside of this range are scaled first: squares must not overflow in float32.
_SAFE_RANGE = (2.0**-30, 2.0**30)
Edge = Callable[[Tensor, tuple[int, int]], float]
# ((k,) descending, number of signal values) -> (k,) derivatives of ln(score) by each singular value.
Sensitivity = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class MatrixScore:
    """What a criterion found in one matrix; the fields are those of `records.MatrixStat`."""

    score: float
    n_signal: int | None = None
    s_max: float | None = None
    power_law: float | None = None


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    Attributes:
        name, summary: key in the table, and one line for `--help`.
        source: where the formula comes from.
        needs_weights: False for controls that look at names only.
        needs_spectrum: the score is a function of the singular values.
        needs_data: the score comes from gradients on data, not from a matrix.
        tolerance: relative error that a score may have against one from float64 singular values of the same matrix, if the
            values that it divides by lie above the resolution of `singular_values`; `n_signal` has none.
        smallest: every value is wanted to full precision, the smallest too: float64 from the start. The safe choice where no
            `sensitivity` is known.
        edge: where signal ends in a spectrum; None for criteria that split nothing.
        sensitivity: what an error of the values does to the score; needed where float32 may serve.
        of_values: ((k,) float64 descending, (n, m)) -> (score, number of signal values or None).
        of_matrix: (n, m) matrix -> score.
        of_name: (parameter name, seed) -> score.
    """

    name: str
    summary: str
    source: str
    needs_weights: bool = True
    needs_spectrum: bool = False
    needs_data: bool = False
    tolerance: float = 0.0
    smallest: bool = False
    edge: Edge | None = None
    sensitivity: Sensitivity | None = None
    of_values: Callable[[Tensor, tuple[int, int]], tuple[float, int | None]] | None = None
    of_matrix: Callable[[Tensor], float] | None = None
    of_name: Callable[[str, int], float] | None = None


# --- singular values -------------------------------------------------------------------------------------------------


def singular_values(matrix: Tensor, *, criterion: Criterion | None = None, name: str = "matrix") -> Tensor:
    """All singular values of a matrix, as square roots of the eigenvalues of the smaller Gram matrix.

    The Gram matrix squares the condition number: in float32 an eigenvalue is off by some eps32 times the mean of all,
    whatever its own size. Where that could show in a score, all is computed again in float64 (on the CPU, where the
    matrix's device has none). There, values under
    s_1 * sqrt(eps64 * max(n, m)) cannot be told from zero and are returned as zero.

    Args:
        matrix: (n, m), any real floating dtype, any device; 1-D is taken as (1, m). Not changed.
        criterion: what the values are for. Its tolerance is kept, no value is left in doubt about its side of the edge,
            and where the smallest value decides, it is float64 from the start, with a float64 SVD where the Gram matrix
            cannot resolve it. None: their sum is good to 1e-4.
        name: for the error message.
    Returns:
        (min(n, m),) float64 on the CPU, descending, all >= 0.
    Raises:
        CheckpointError: a NaN or Inf, by name, position and value; not 1-D or 2-D; no elements.
    """
    matrix = _as_matrix(matrix, name)
    scale = _scale(matrix, name)
    if scale == 0.0:
        return torch.zeros(min(matrix.shape), dtype=torch.float64)
    smallest = criterion is not None and criterion.smallest
    values = None
    if not smallest and torch.get_float32_matmul_precision() == "highest":
        values = gram_values(matrix, torch.float32, scale)
        if not _trusted(values, (matrix.shape[0], matrix.shape[1]), criterion):
            values = None
    if values is None:
        matrix = exact(matrix)
        values = gram_values(matrix, torch.float64, scale)
        resolution = float(values[0]) * math.sqrt(torch.finfo(torch.float64).eps * max(matrix.shape))
        if smallest and values[-1] < 1e3 * resolution:
            values = torch.linalg.svdvals(matrix.double() / scale).cpu()
            resolution = float(values[0]) * torch.finfo(torch.float64).eps * max(matrix.shape)
        values = torch.where(values < resolution, 0.0, values)
    return values * scale


def _as_matrix(matrix: Tensor, name: str) -> Tensor:
    matrix = matrix.detach()
    matrix = matrix.unsqueeze(0) if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise CheckpointError(f"{name}: shape is {tuple(matrix.shape)}, wanted a matrix with elements.")
    return matrix


def _scale(matrix: Tensor, name: str) -> float:
    """A power of two to divide by, 1.0 for ordinary weights, 0.0 for a zero matrix; refuses what is not finite."""
    low, high = torch.aminmax(matrix)
    largest = max(abs(float(low)), abs(float(high)))
    if not math.isfinite(largest):
        finite = torch.isfinite(matrix)
        at = int((~finite).flatten().to(torch.uint8).argmax())
        row, column = divmod(at, matrix.shape[1])
        value = float(matrix[row, column])
        count = matrix.numel() - int(finite.sum())
        raise CheckpointError(
            f"{name}: element [{row}, {column}] is {value}, wanted finite ones ({count} of {matrix.numel()} are not)."
        )
    if largest == 0.0 or _SAFE_RANGE[0] <= largest <= _SAFE_RANGE[1]:
        return 1.0 if largest else 0.0
    return 2.0 ** math.frexp(largest)[1]


def _trusted(values: Tensor, shape: tuple[int, int], criterion: Criterion | None) -> bool:
    """Whether values from float32 leave a score within half of its criterion's tolerance, and no doubt about its split.

    An eigenvalue comes out wrong by a multiple of eps32 * (mean(s^2) + 4 s^2): by 3.4 at most on average over a matrix and
    by 58 for a single value, on the 247 matrices of SmolLM2-135M and MiniLM and on noise up to 4096 x 11008, with directions
    up to 30 times as long planted in it; by 4.4, and 0.7 eps32 * s_1^2, with longer ones. These are observations, of processors
    of two makers and two libraries, and no theorem, hence the half. Of all errors at their usual size and the most harmful at
    its worst, the first order in the score must stay within it.
    """
    if len(values) < 2:
        return False
    squares = values.square()
    unit = torch.finfo(torch.float32).eps * (squares.mean() + 4.0 * squares)
    usual = _moved(values, _USUAL * unit)
    worst = _moved(values, torch.clamp(_WORST * unit, min=_WORST_OF_TOP * torch.finfo(torch.float32).eps * squares[0]))
    if criterion is None or criterion.sensitivity is None:
        return bool(usual.sum() + worst.max() <= 0.5e-4 * values.sum())
    n_signal = 0
    if criterion.edge is not None:
        where = criterion.edge(values, shape)
        n_signal = int((values > where).sum())
        # Both edges rise with the upper values and fall with the lower ones, of which they read the quartiles.
        way = torch.where(torch.arange(len(values)) < 0.625 * len(values), 1.0, -1.0) * worst
        edges = [criterion.edge((values + w).clamp_(min=0.0), shape) for w in (way, -way)] if where < math.inf else []
        doubt = max((abs(edge - where) for edge in edges), default=0.0)
        if bool(((values - where).abs() <= worst + doubt).any()):
            return False
    harm = criterion.sensitivity(values, n_signal).abs()
    return bool((harm * usual).sum() + (harm * worst).max() <= 0.5 * criterion.tolerance)


def _moved(values: Tensor, error: Tensor) -> Tensor:
    """How far an error of its square may move each value: error / (2 s) to first order, sqrt(error) at zero."""
    squares = values.square()
    return torch.maximum(values - (squares - error).clamp_(min=0.0).sqrt_(), (squares + error).sqrt_() - values)


# --- scores ----------------------------------------------------------------------------------------------------------


def _spectrum(values: Tensor, shape: tuple[int, int]) -> tuple[float, int]:
    """sum(s > eps) / sum(s <= eps) / s_1; an empty noise set counts as 1.0, noise of zeros gives infinity.

    The zero matrix, infinite in the published tool, scores 0.0: it holds no signal.
    """
    if not values[0]:
        return 0.0, 0
    n_signal = int((values > published_edge(values, shape)).sum())
    noise = float(values[n_signal:].sum()) if n_signal < len(values) else 1.0
    if noise == 0.0:
        return math.inf, n_signal
    return float(values[:n_signal].sum()) / noise / float(values[0]), n_signal


def _spectrum_sensitivity(values: Tensor, n_signal: int) -> Tensor:
    """Of ln sum(signal) - ln sum(noise) - ln s_1; without signal the score is zero whatever the values are."""
    slopes = torch.zeros_like(values)
    if n_signal:
        slopes[:n_signal] = 1.0 / values[:n_signal].sum()
        slopes[n_signal:] = -1.0 / values[n_signal:].sum()
        slopes[0] -= 1.0 / values[0]
    return slopes


def _mp(values: Tensor, shape: tuple[int, int]) -> tuple[float, int]:
    """Energy (sum of squares) above the Marchenko-Pastur edge over the energy below it."""
    n_signal = int((values > marchenko_pastur_edge(values, shape)).sum())
    if n_signal == 0:
        return 0.0, 0
    energy = (values / values[0]).square()
    noise = float(energy[n_signal:].sum())
    return (float(energy[:n_signal].sum()) / noise if noise else math.inf), n_signal


def _mp_sensitivity(values: Tensor, n_signal: int) -> Tensor:
    """Of ln sum(signal^2) - ln sum(noise^2)."""
    slopes = torch.zeros_like(values)
    if n_signal:
        slopes[:n_signal] = 2.0 * values[:n_signal] / values[:n_signal].square().sum()
        slopes[n_signal:] = -2.0 * values[n_signal:] / values[n_signal:].square().sum()
    return slopes


def _mean_over_std(values: Tensor) -> float:
    """mean / std (n - 1 in the denominator); all equal, or only one: infinite; all zero: 0.0."""
    mean = float(values.mean())
    if mean == 0.0:
        return 0.0
    spread = float(values.std()) if len(values) > 1 else 0.0
    return mean / spread if spread else math.inf


def _mean_over_std_sensitivity(values: Tensor, n_signal: int) -> Tensor:
    """Of ln mean - ln std; the small values count, because they lie farthest from the mean."""
    count = len(values)
    return 1.0 / (count * values.mean()) - (values - values.mean()) / ((count - 1) * values.var())


def _row_norm(matrix: Tensor) -> float:
    matrix, rows = exact(matrix), max(1, 2**20 // matrix.shape[1])  # float64 copies of a few rows, not of the matrix
    parts = (matrix[top : top + rows].double() for top in range(0, len(matrix), rows))
    norms = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in parts])
    return _mean_over_std(norms.cpu())


def _inverse_condition(values: Tensor, shape: tuple[int, int]) -> tuple[float, None]:
    return (float(values[-1] / values[0]) if values[0] else 0.0), None


def _random(name: str, seed: int) -> float:
    """Uniform in [0, 1) from a hash of seed and name; the experts of one fused parameter get the same."""
    digest = hashlib.sha256(f"{seed}:{name.partition('[')[0]}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _last(name: str, seed: int) -> float:
    block = names.block_index(name)
    return 0.0 if block is None else float(block + 1)


def _first(name: str, seed: int) -> float:
    block = names.block_index(name)
    return 0.0 if block is None else 1.0 / (block + 1)


def _spaced(name: str, seed: int) -> float:
    """The block's number with its binary digits mirrored at the point, in [0, 1); outside the blocks 0.

    The best k of any number of blocks are then spread over the depth: every second block for a ratio of 1/2, every fourth for
    1/4, exactly; for other ratios the count below any block is within log2(n) / 3 + 1 of an even spread.
    Source: van der Corput (1935), "Verteilungsfunktionen"; the bound: Béjian and Faure (1977), C. R. Acad. Sci. Paris 285.
    """
    block = names.block_index(name)
    return 0.0 if not block else int(f"{block:b}"[::-1], 2) / 2 ** block.bit_length()


CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion(
            "spectrum",
            "signal over noise over the largest singular value, as published",
            "QuixiAI/spectrum@1996495 spectrum.py, calculate_snr_for_layer",
            needs_spectrum=True,
            tolerance=1e-4,
            edge=published_edge,
            sensitivity=_spectrum_sensitivity,
            of_values=_spectrum,
        ),
        Criterion(
            "mp",
            "energy above the Marchenko-Pastur edge over the energy below; scale-invariant",
            "Marchenko and Pastur (1967); Gavish and Donoho (2014); Johnstone (2001)",
            needs_spectrum=True,
            tolerance=5e-5,
            edge=marchenko_pastur_edge,
            sensitivity=_mp_sensitivity,
            of_values=_mp,
        ),
        Criterion(
            "mean_std",
            "mean of the singular values over their standard deviation",
            "the SNR of the tutorials on selective fine-tuning by spectrum",
            needs_spectrum=True,
            tolerance=5e-5,
            sensitivity=_mean_over_std_sensitivity,
            of_values=lambda values, shape: (_mean_over_std(values), None),
        ),
        Criterion(
            "row_norm",
            "mean of the row norms over their standard deviation; no SVD",
            "the cheap proxy of the same tutorials, for very large matrices",
            tolerance=1e-9,
            of_matrix=_row_norm,
        ),
        Criterion(
            "kappa",
            "smallest over largest singular value (1 / condition number)",
            "PEFT's KappaTune target selection",
            needs_spectrum=True,
            tolerance=1e-5,
            smallest=True,
            of_values=_inverse_condition,
        ),
        Criterion(
            "fisher",
            "empirical Fisher mass per parameter on calibration batches",
            "Kunstner et al. (2019), arXiv:1905.12558; computed by `probe.probe_gradients`, not from weights",
            needs_weights=False,
            needs_data=True,
        ),
        Criterion("random", "control: seeded random", "control", needs_weights=False, of_name=_random),
        Criterion("last", "control: the last blocks first", "control", needs_weights=False, of_name=_last),
        Criterion("first", "control: the first blocks first", "control", needs_weights=False, of_name=_first),
        Criterion("spaced", "control: evenly spaced in depth", "control", needs_weights=False, of_name=_spaced),
    )
}


def criterion_named(name: str) -> Criterion:
    """Row of `CRITERIA`.

    Raises:
        OptionError: there is none of that name; the message shows near ones.
    """
    if name not in CRITERIA:
        raise OptionError(f"criterion is {name!r}.{near_matches(str(name), CRITERIA)}")
    return CRITERIA[name]


def score(matrix: Tensor | None, criterion: str = "spectrum", *, name: str = "matrix", seed: int = 0) -> MatrixScore:
    """Score one matrix.

    Args:
        matrix: (n, m) as a Linear stores it, (out, in); 1-D is taken as (1, m); any floating dtype and device. None for
            the controls, which look at the name only.
        criterion: key of `CRITERIA`.
        name: full parameter name: the controls read it, and errors name it.
        seed: of `random`.
    Raises:
        OptionError: unknown criterion, or one that needs calibration data.
        CheckpointError: NaN or Inf in the matrix.
    """
    row = criterion_named(criterion)
    if row.needs_data:
        raise OptionError(f"criterion {criterion!r} needs gradients on data, which a matrix does not have.")
    if row.of_name is not None:
        return MatrixScore(row.of_name(name, seed))
    if matrix is None:
        raise OptionError(f"criterion {criterion!r} needs the weights of {name}.")
    matrix = _as_matrix(matrix, name)
    if row.of_matrix is not None:
        _scale(matrix, name)
        return MatrixScore(row.of_matrix(matrix))
    values = singular_values(matrix, criterion=row, name=name)
    return score_values(values, (matrix.shape[0], matrix.shape[1]), criterion)


def score_values(values: Tensor, shape: tuple[int, int], criterion: str = "spectrum") -> MatrixScore:
    """Score a spectrum that is at hand.

    Args:
        values: (min(shape),) float64, descending. shape: (n, m). criterion: one with `needs_spectrum`.
    Raises:
        OptionError: the criterion is not a function of the singular values.
    """
    row = criterion_named(criterion)
    if row.of_values is None:
        raise OptionError(f"criterion {criterion!r} is no function of the singular values.")
    value, n_signal = row.of_values(values, shape)
    return MatrixScore(value, n_signal, float(values[0]), power_law(values))


def power_law(values: Tensor) -> float | None:
    """Exponent alpha of a power law fitted to the tail of the eigenvalues s^2, p(x) ~ x^-alpha for x >= x_min.

    Maximum likelihood, alpha = 1 + N / sum(ln(x_i / x_min)), at the x_min whose tail is nearest to its fit in the
    Kolmogorov-Smirnov distance. WeightWatcher reads the quality of a layer from it (2 to 6 for well trained ones).
    x_min is sought among at most 64 of the eigenvalues, evenly spaced in rank, not among all.

    Args:
        values: (k,) float64, descending.
    Returns:
        alpha > 1, or None where fewer than 20 values are above zero, or the tail is constant.
    Source: Clauset, Shalizi and Newman (2009), "Power-law distributions in empirical data", equation 3.1 and section
        3.3; its use on layers: Martin, Peng and Mahoney (2021), Nature Communications 12:4122.
    """
    logs = 2.0 * values[values > 0].log()
    count = len(logs)
    if count < 2 * _TAIL_LEAST:
        return None
    # Tail sizes N to try; the tail is the N largest, and its smallest is x_min.
    sizes = (
        torch.linspace(_TAIL_LEAST, count, min(_TAIL_STARTS, count - _TAIL_LEAST + 1), dtype=torch.float64)
        .round()
        .long()
    )
    starts = logs[sizes - 1]
    excess = torch.cumsum(logs, 0)[sizes - 1] - sizes * starts
    if not bool((excess > 0).any()):
        return None
    alpha = 1.0 + sizes / excess.clamp(min=1e-12)
    ranks = torch.arange(count, dtype=torch.float64)
    share = (1.0 / sizes)[:, None]
    fitted = (logs[None, :] - starts[:, None]).mul_((1.0 - alpha)[:, None]).exp_()
    # Of N values, rank / N lie above the one of that rank and (rank + 1) / N at or above it: the larger of the distances
    # to both is the distance to their middle and half a step.
    off = fitted.sub_((ranks + 0.5) * share).abs_().add_(0.5 * share).masked_fill_(ranks >= sizes[:, None], 0.0)
    return float(alpha[int(off.amax(1).argmin())])
