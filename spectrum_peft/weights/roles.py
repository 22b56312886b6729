"""The part that a parameter plays, asked of the module that owns it; names decide only where modules cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import names

# Classes around a router's matrix: `MixtralTopKRouter`, `GraniteMoeTopKGating`, `SwitchTransformersTop1Router`.
_ROUTER = re.compile(r"Router|Gating|TopK|Top1|Top2")
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def role_of(
    name: str,
    shape: Sequence[int] | None,
    owner: nn.Module,
    head: nn.Module | None = None,
    parent: nn.Module | None = None,
) -> str:
    """One of `names.ROLES`, for a parameter of a live or weightless module.

    A matrix that `nn.MultiheadAttention` reads without calling its module is no place for an adapter, which would never be
    asked; nor is one of a module that is no kind of Linear.

    Args:
        shape: None where nobody knows it. owner: module of the parameter, wrappers taken off; parent: that it lies in.
        head: what the model calls its output embeddings.
    """
    said = names.role(name, shape)
    if said == "bias" or (shape is not None and len(shape) < 2):
        return said
    leaf = name.rpartition(".")[2]
    if leaf == "weight":
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
            return "embedding"
        if head is not None and owner is head:
            return "head"
        if "norm" in type(owner).__name__.lower():
            return "norm"
        if isinstance(owner, _CONVOLUTIONS):
            return "other"
        if _ROUTER.search(type(owner).__name__) or (parent is not None and _ROUTER.search(type(parent).__name__)):
            return "router"
        if said in {"linear", "embedding"} and (shape is None or len(shape) == 2):
            called = is_matrix_layer(owner) and not isinstance(owner, NonDynamicallyQuantizableLinear)
            return "linear" if called else "other"
    return said


def is_matrix_layer(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight as a Linear does: one, a quantized one, or transformers' Conv1D."""
    kind: Any = getattr(module, "source_cls", type(module))
    return (
        isinstance(module, nn.Linear)
        or kind.__name__ == "Conv1D"
        or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    )


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that the model calls its output embeddings, PEFT's wrappers taken off; None where it names none."""
    head = output_embeddings(model)
    found = getattr(head, "original_module", getattr(head, "base_layer", head))
    return found if isinstance(found, nn.Module) else None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that the model calls its output embeddings, with its wrapper; None where it names none."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):  # no transformers model, or one without a head
        return None
    return head if isinstance(head, nn.Module) else None


def roles_of(model: nn.Module) -> tuple[dict[str, str], frozenset[str]]:
    """({parameter: role}, parameters stored as (in, out)) of a model without adapters, a tied one under each name."""
    head = output_head(model)
    roles, turned = {}, set()
    for name, owner, parent in _modules(model, "", None):
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                full = f"{name}{leaf}"
                roles[full] = role_of(full, tuple(parameter.shape), owner, head, parent)
                if type(owner).__name__ == "Conv1D" and parameter.ndim == 2:
                    turned.add(full)
    return roles, frozenset(turned)


def _modules(
    module: nn.Module, prefix: str, parent: nn.Module | None
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    yield prefix, module, parent
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.", module)
