"""Gradients on data: a model and calibration batches become a `GradientReport`.

batches     rows of a dataset -> batches
passes      forward and backward, with hooks that see every candidate matrix
collectors  what is measured about a gradient as it passes
probe       probe_gradients: all of it together
"""

from __future__ import annotations

from .batches import calibration_batches
from .probe import DEFAULT_SAMPLES, column_energies, probe_gradients

__all__ = [
    "DEFAULT_SAMPLES",
    "calibration_batches",
    "column_energies",
    "probe_gradients",
]
