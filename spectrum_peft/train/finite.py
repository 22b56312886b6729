"""Values that are no numbers: where a model holds NaN or Inf, said where its outputs show it."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import LogitsProcessor

from ..errors import CheckpointError
from .fitting import name_of


def first_not_finite(model: Any) -> str | None:
    """Name of the first parameter or buffer that holds NaN or Inf, without PEFT's wrappers; buffers, which may be masks, may
    hold -Inf."""
    for name, parameter in model.named_parameters():
        if _is_plain(parameter) and not bool(torch.isfinite(parameter).all()):
            return _plain_name(name)
    for name, buffer in model.named_buffers():
        if _is_plain(buffer) and bool((buffer.isnan() | buffer.isposinf()).any()):
            return _plain_name(name)
    return None


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _is_plain(value: torch.Tensor) -> bool:
    """Numbers that can be asked: neither packed ones nor float8."""
    return value.is_floating_point() and not value.is_meta and value.element_size() > 1


def refuse_not_finite(loss: float, model: Any) -> None:
    """
    Raises:
        CheckpointError: the loss of a model on rows is NaN or infinite; a parameter or buffer is named where it is the cause.
    """
    if not math.isfinite(loss):
        raise CheckpointError(f"{name_of(model)}: the loss is {loss}; {_cause(model)}.")


class Numbers(LogitsProcessor):
    """Ends writing where a model gives no numbers: the first token would be drawn again and again, and nothing would say so."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            scores: (rows, vocabulary), as they come.
        Raises:
            CheckpointError: one of them is NaN.
        """
        if bool(scores.isnan().any()):
            raise CheckpointError(f"{name_of(self.model)}: the scores of the next token are NaN; {_cause(self.model)}.")
        return scores


def _cause(model: Any) -> str:
    name = first_not_finite(model)
    if name is not None:
        return f"its {name} holds NaN or Inf"
    kind = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return f"its weights are finite, so what it computes leaves the range of {kind or 'its dtype'}"
