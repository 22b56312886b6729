"""The singular values of one matrix of a checkpoint, and where two criteria draw the line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from ..weights import open_weights, split_expert
from . import criteria, edges


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix and where two criteria draw the line.

    Attributes:
        name: full parameter name, or `name[e]`. shape: (n, m).
        values: (min(n, m),) float64, descending.
        published_edge, marchenko_pastur_edge: see `edges`.
    """

    name: str
    shape: tuple[int, int]
    values: torch.Tensor
    published_edge: float
    marchenko_pastur_edge: float


def spectrum_of(model_or_path: Any, name: str, revision: str | None = None) -> Spectrum:
    """All singular values of one matrix of a checkpoint or model.

    Args:
        model_or_path: see `open_weights`. name: full parameter name; a fused parameter needs an expert, `name[3]`.
    Raises:
        CheckpointError: no such tensor (near names are shown), or not a matrix.
    """
    source = open_weights(model_or_path, revision, download=False)
    base, expert = split_expert(name)
    info = next((t for t in source.tensors() if t.name == base), None)
    if info is not None and info.experts and expert is None:
        raise CheckpointError(f"{name}: holds {info.experts} experts, wanted one of them, such as '{name}[0]'.")
    matrix = source.read(name)
    values = criteria.singular_values(matrix, name=name)
    shape = (matrix.shape[0], matrix.shape[1])
    return Spectrum(
        name, shape, values, edges.published_edge(values, shape), edges.marchenko_pastur_edge(values, shape)
    )
