"""Where the singular values of noise end: the published edge, and that of Marchenko and Pastur.

Notation as in `criteria`: W is n x m, values are descending float64, beta = min(n, m) / max(n, m).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# The interquartile range of a normal distribution over its standard deviation (2 * 0.6745).
_IQR_OF_NORMAL = 1.349
# Johnstone (2001), "On the distribution of the largest eigenvalue in principal components analysis", theorem 1.1: the
# largest eigenvalue of noise lies above the centre of its law by this many scales with probability 2e-4 (right tail of
# the Tracy-Widom law of order 1). Without it the bare asymptotic edge calls the top of one noise matrix in six a
# signal.
_TRACY_WIDOM = 4.0


def published_edge(values: Tensor, shape: tuple[int, int]) -> float:
    """The edge of the published tool: sigma * (1 + sqrt(beta)), sigma = IQR(s) / 1.349.

    It takes the interquartile range of the singular values for that of the entries' normal distribution and leaves out
    the factor sqrt(max(n, m)), so it is no Marchenko-Pastur edge: on pure noise it calls 24 to 100 % of the values
    signal.

    Args:
        values: (k,) float64, descending. shape: (n, m).
    Source: QuixiAI/spectrum@1996495 spectrum.py, `marchenko_pastur_threshold`, `estimate_sigma_with_full_iqr`.
    """
    sigma = (_quantile(values, 0.75) - _quantile(values, 0.25)) / _IQR_OF_NORMAL
    return sigma * (1.0 + math.sqrt(min(shape) / max(shape)))


def marchenko_pastur_edge(values: Tensor, shape: tuple[int, int]) -> float:
    """The largest singular value that noise of the bulk's variance would show.

    The variance is fitted to the bulk: the median of the values is matched to the median of the Marchenko-Pastur law.
    The edge is sigma * (sqrt n + sqrt m), moved out by the fluctuation of the largest eigenvalue in a matrix of finite
    size. The median bears up to half of the values being signal; fitting again to what lies below the edge does not: on
    trained weights, whose bulk is wider than the law, it ends with nearly all values above it.

    Args:
        values: (k,) float64, descending. shape: (n, m).
    Returns:
        The edge; 0.0 where half of the values or more are zero; infinite for k = 1, where there is no bulk to fit.
    Source: Marchenko and Pastur (1967); median fit as in Gavish and Donoho (2014), "The optimal hard threshold for
        singular values is 4/sqrt(3)", section III; finite size: Johnstone (2001), theorem 1.1.
    """
    n, m = shape
    if len(values) < 2:
        return math.inf
    sigma = _quantile(values, 0.5) / math.sqrt(mp_median(min(shape) / max(shape)) * max(shape))
    root = math.sqrt(n) + math.sqrt(m)
    width = root * (1 / math.sqrt(n) + 1 / math.sqrt(m)) ** (1 / 3)
    return sigma * math.sqrt(root**2 + _TRACY_WIDOM * width)


def _quantile(values: Tensor, q: float) -> float:
    """Linear interpolation between order statistics, as `torch.quantile`, of values that are in descending order."""
    at = (1.0 - q) * (len(values) - 1)
    low = int(at)
    first = float(values[low])
    return first if low == at else first + (at - low) * (float(values[low + 1]) - first)


@lru_cache(maxsize=4096)
def mp_median(beta: float) -> float:
    """Median of the Marchenko-Pastur law with unit variance and ratio beta in (0, 1], eigenvalues over max(n, m).

    By the midpoint rule in the angle t, x = 1 + beta - 2 sqrt(beta) cos t, in which the density has no root at its
    ends: f(x) dx = 2 sin^2(t) / (pi x) dt.
    """
    steps = 4096
    angle = (torch.arange(steps, dtype=torch.float64) + 0.5) * (math.pi / steps)
    x = 1 + beta - 2 * math.sqrt(beta) * torch.cos(angle)
    mass = torch.cumsum(2 * torch.sin(angle) ** 2 / (math.pi * x), 0) * (math.pi / steps)
    mass = mass / mass[-1]
    at = int(torch.searchsorted(mass, 0.5))
    below = float(mass[at - 1])
    part = (0.5 - below) / (float(mass[at]) - below)
    t = float(angle[at - 1]) + (part + 0.5) * (math.pi / steps)
    return 1 + beta - 2 * math.sqrt(beta) * math.cos(t)
