"""Linear layers that an adapter cannot stand beside, asked of the modules' own code.

Some modules read the weight of a layer without calling it: Mamba hands `self.out_proj.weight` to a fused kernel and
multiplies by `self.dt_proj.weight` itself, so an adapter around the layer would never be asked. That is read from the
source, and so holds for every path of a forward, for the kernels that this machine lacks, too. Other layers are called, but
compute something else than x W^T: DeepSeek-V4 multiplies by groups.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

import torch
from torch import nn

# What a look at a weight asks; anything else that is done with it is a use.
_PROPERTIES = frozenset(
    {"dtype", "device", "shape", "size", "ndim", "numel", "requires_grad", "data", "grad", "is_meta"}
)
# Where the code of models lies: transformers' own, and what comes with a checkpoint.
_MODELS = ("transformers.models.", "transformers_modules.")
_QUESTIONS = frozenset({"isinstance", "hasattr", "getattr", "id", "type", "len"})


@functools.cache
def read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Children whose weight the methods of a class, and of those it inherits from, use as a tensor: `self.child.weight` as an
    operand or an argument; a look at its dtype, and a tie (`self.a.weight = self.b.weight`), are no use."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or not issubclass(base, nn.Module) or base is nn.Module:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made at run time: nobody knows its source
            continue
        found.update(_reads(tree))
    return frozenset(found)


def _reads(tree: ast.AST) -> Iterator[str]:
    for parent in ast.walk(tree):
        looks = (isinstance(parent, ast.Attribute) and parent.attr in _PROPERTIES) or (
            isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _QUESTIONS
        )
        ties = isinstance(parent, ast.Assign) and any(isinstance(target, ast.Attribute) for target in parent.targets)
        # A slice: BLOOM sums over pieces, on a path that only its config's `slow_but_exact` takes.
        if looks or ties or isinstance(parent, ast.Subscript):
            continue
        for node in ast.iter_child_nodes(parent):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "weight"
                and isinstance(node.ctx, ast.Load)
                and isinstance(node.value, ast.Attribute)
                and isinstance(node.value.value, ast.Name)
                and node.value.value.id == "self"
            ):
                yield node.value.attr


def _takes_rows(layer: nn.Linear) -> bool:
    """Whether a Linear whose forward a model wrote anew still takes (..., in) to (..., out); asked on the meta device. A
    quantizer's layer changes how it computes, not what, and is not asked."""
    kind = type(layer)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith(_MODELS):
        return True
    weights = {name: value.detach().to("meta") for name, value in layer.state_dict(keep_vars=True).items()}
    rows = torch.empty(2, 3, layer.in_features, dtype=layer.weight.dtype, device="meta")
    try:
        result = torch.func.functional_call(layer, weights, rows)
    except Exception:  # any that a forward of another kind may raise on this shape
        return False
    return isinstance(result, torch.Tensor) and tuple(result.shape) == (2, 3, layer.out_features)


def _of_its_own(layer: nn.Module) -> bool:
    """Whether a model has written a layer with a matrix from nothing (I-BERT's); a quantizer's layers are PEFT's to know."""
    kind = type(layer)
    return (
        kind.__module__.startswith(_MODELS)
        and hasattr(layer, "in_features")
        and not isinstance(layer, nn.Linear)
        and getattr(layer._parameters.get("weight"), "ndim", 0) == 2
    )


def without_adapters(model: nn.Module) -> dict[str, str]:
    """{weight of a Linear: why no adapter can stand beside it}, in model order.

    Args:
        model: without adapters, or with: a layer inside a wrapper is not looked at again.
    """
    found = {}
    for name, module in model.named_modules():
        for child, layer in module.named_children():
            full = f"{name}.{child}.weight" if name else f"{child}.weight"
            if isinstance(layer, nn.Linear) and child in read_by(type(module)):
                found[full] = f"{type(module).__name__} reads the weight without calling the layer"
            elif isinstance(layer, nn.Linear) and not _takes_rows(layer):
                found[full] = f"a {type(layer).__name__} computes something else than x W^T"
            elif _of_its_own(layer):
                found[full] = f"a {type(layer).__name__} is no Linear, and PEFT has no layer for it"
    return found
