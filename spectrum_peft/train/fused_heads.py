"""What TRL's training step asks of a model, where a class of transformers says the same in other words.

trl 1.16 runs a causal model's body by itself, to multiply by the head in pieces, and adds the loss that balances experts. It
finds the body by `base_model`, which is the whole model where a class's prefix names no part of it (Llama 4's text class), and
the number of experts by `num_experts`, which Granite, JetMoE and others call `num_local_experts` alone.
Source: trl 1.16, trainer/utils.py `add_fused_lm_head`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def found_by_trl(model: nn.Module) -> Iterator[None]:
    """Let TRL find the body and the number of experts of a model while it trains; afterwards everything is as it was.

    Args:
        model: plain or a PeftModel.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    undo = []
    body = _body(inner)
    if body is not None:
        inner.base_model_prefix = body
        undo.append(lambda: inner.__dict__.pop("base_model_prefix", None))
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    kind, alias = type(config), {"num_experts": "num_local_experts"}
    if hasattr(config, "output_router_logits") and hasattr(config, "num_local_experts"):
        if not hasattr(config, "num_experts"):
            before = kind.attribute_map
            kind.attribute_map = {**before, **alias}
            undo.append(lambda: setattr(kind, "attribute_map", before))
    try:
        yield
    finally:
        for back in undo:
            back()


def _body(model: Any) -> str | None:
    """The name of the one model inside a model, where `base_model` is the model itself."""
    if getattr(model, "base_model", None) is not model:
        return None
    found = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    return found[0] if len(found) == 1 else None
