"""Linear layers that an adapter cannot stand beside, asked of the modules' own code.

Some modules read the weight of a layer without calling it: Mamba hands `self.out_proj.weight` to a fused kernel and
multiplies by `self.dt_proj.weight` itself, so an adapter around the layer would never be asked. That is read from the
source, and so holds for every path of a forward, for the kernels that this machine lacks, too. Other layers are called, but
compute something else than x W^T: DeepSeek-V4 multiplies by groups.

The same source says which layers cannot be quantized, because a model changes their weight, or what comes out of them, in
place; and which models compute gradients by themselves.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

# What a look at a weight asks; anything else that is done with it is a use.
_PROPERTIES = frozenset(
    {"dtype", "device", "shape", "size", "ndim", "numel", "requires_grad", "data", "grad", "is_meta"}
)
# Where the code of models lies: transformers' own, and what comes with a checkpoint.
_MODELS = ("transformers.models.", "transformers_modules.")
_QUESTIONS = frozenset({"isinstance", "hasattr", "getattr", "id", "type", "len"})


@dataclass(frozen=True)
class _Code:
    """What is read in the source of one class.

    Attributes:
        reads: children whose weight its methods use as a tensor: `self.child.weight` as an operand or an argument; a look
            at its dtype, and a tie (`self.a.weight = self.b.weight`), are no use.
        changes: paths below it whose weight, or whose output, its methods change in place.
        returns: children whose output its `forward` returns as it is.
        calls_backward: whether it calls `backward` of something.
    """

    reads: frozenset[str]
    changes: frozenset[str]
    returns: frozenset[str]
    calls_backward: bool


def _codes(kind: type[nn.Module]) -> Iterator[_Code]:
    """The code of a class and of those it inherits from, torch's own left out."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or not issubclass(base, nn.Module) or base is nn.Module:
            continue
        code = _code_in(base.__module__).get(base.__qualname__)
        if code is not None:
            yield code


@functools.cache
def _code_in(module: str) -> Mapping[str, _Code]:
    """{qualified name of a class: its code} of a module, which is parsed once for all of its classes; what was made at run
    time has no source, and is not there."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError, KeyError):
        return {}
    return {
        name: _Code(*(frozenset(find(node)) for find in (_reads, _changes, _returned)), _calls_backward(node))
        for name, node in _classes(tree, ())
    }


def _classes(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[str, ast.ClassDef]]:
    """(`__qualname__`, node) of every class below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            inside = (*path, child.name)
            yield ".".join(inside), child
            yield from _classes(child, inside)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _classes(child, (*path, child.name, "<locals>"))
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _classes(child, path)


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
        read = _read_by(type(module))
        for child, layer in module.named_children():
            full = f"{name}.{child}.weight" if name else f"{child}.weight"
            if isinstance(layer, nn.Linear) and child in read:
                found[full] = f"{type(module).__name__} reads the weight without calling the layer"
            elif isinstance(layer, nn.Linear) and not _takes_rows(layer):
                found[full] = f"a {type(layer).__name__} computes something else than x W^T"
            elif _of_its_own(layer):
                found[full] = f"a {type(layer).__name__} is no Linear, and PEFT has no layer for it"
    return found


@functools.cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Children whose weight a class reads; see `_Code.reads`."""
    return frozenset(child for code in _codes(kind) for child in code.reads)


# Methods that set values before anything is computed.
_FIRST = ("__init__", "_init", "init_", "reset_")


def changed_in_place(model: nn.Module) -> Iterator[str]:
    """Modules below a model whose weight, or whose output, the model's code changes in place: Gemma 3n clamps its
    `prediction_coefs`, RWKV divides the weights of later blocks, Longformer divides its queries. Packed weights are no numbers
    to be clamped, and the output of a quantized product with a bias is a view that autograd lets nobody change (torch's linear
    adds the bias to rows in two dimensions; without one there is no view)."""
    for name, module in model.named_modules():
        for path in _changed_by(type(module)):
            for full, layer in module.named_modules(prefix=name):
                inside = full[len(name) + 1 if name else 0 :]
                if f".{inside}".endswith(f".{path}"):
                    yield from _handing_out(full, layer)


def _handing_out(name: str, module: nn.Module) -> Iterator[str]:
    """The Linear whose output is a module's: itself, or what is inside of it and last; there only with a bias."""
    if isinstance(module, nn.Linear):
        yield name
        return
    for path in {path for code in _codes(type(module)) for path in code.returns}:
        child = getattr(module, path, None)
        if isinstance(child, nn.Module) and not (isinstance(child, nn.Linear) and child.bias is None):
            yield from _handing_out(f"{name}.{path}", child)


@functools.cache
def _changed_by(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(path for code in _codes(kind) for path in code.changes)


def _changes(tree: ast.AST) -> Iterator[str]:
    """See `changed_in_place`."""
    for method in ast.walk(tree):
        if isinstance(method, ast.FunctionDef) and not method.name.startswith(_FIRST):
            yield from _written(method)
            yield from _outputs_changed(method)


def _written(method: ast.AST) -> Iterator[str]:
    """`attention.output` of `block.attention.output.weight.mul_(...)`, `child` of `self.child.weight.data.clamp_(...)`."""
    for node in ast.walk(method):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called = node.func.attr
        if not called.endswith("_") or called in ("requires_grad_", "detach_") or called.startswith("_"):
            continue
        path = _attributes(node.func.value)
        path = path[:-1] if path[-1:] == ["data"] else path
        if len(path) > 1 and path[-1] == "weight":
            yield ".".join(path[:-1])


def _attributes(node: ast.AST) -> list[str]:
    """`["b", "c"]` of `a.b.c`; empty for what is no chain of attributes of a name."""
    found: list[str] = []
    while isinstance(node, ast.Attribute):
        found.insert(0, node.attr)
        node = node.value
    return found if isinstance(node, ast.Name) else []


def _outputs_changed(method: ast.FunctionDef) -> Iterator[str]:
    """Children whose output, as it is, is the target of `x += ...`, `x /= ...`."""
    for statement, made_by in _followed(method.body, {}):
        if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            if statement.target.id in made_by:
                yield made_by[statement.target.id]


def _returned(tree: ast.AST) -> Iterator[str]:
    """Children whose output, as it is, a class's `forward` returns, alone or among others."""
    for method in ast.iter_child_nodes(tree):
        if isinstance(method, ast.FunctionDef) and method.name == "forward":
            for statement, made_by in _followed(method.body, {}):
                if isinstance(statement, ast.Return):
                    value = statement.value
                    for one in value.elts if isinstance(value, ast.Tuple) else [value]:
                        child = made_by.get(one.id) if isinstance(one, ast.Name) else _child_called(one)
                        if child is not None:
                            yield child


def _followed(body: list[ast.stmt], made_by: dict[str, str]) -> Iterator[tuple[ast.stmt, dict[str, str]]]:
    """(statement, {name: the child whose output it is, as it was put out} before it), line by line."""
    for statement in body:
        yield statement, made_by
        if isinstance(statement, ast.Assign):
            target, child = statement.targets[0], _child_called(statement.value)
            for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(name, ast.Name):
                    made_by.pop(name.id, None)
                    if child is not None:
                        made_by[name.id] = child
        for inner in ("body", "orelse"):
            yield from _followed(getattr(statement, inner, []), made_by)


def _child_called(value: ast.AST | None) -> str | None:
    """`child` of `self.child(...)`."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if isinstance(value.func.value, ast.Name) and value.func.value.id == "self":
            return value.func.attr
    return None


def computes_gradients_itself(model: nn.Module) -> bool:
    """Whether a model runs parts of itself inside an `autograd.Function` that calls `backward` (Reformer's reversible blocks):
    autograd then sees the input of those parts and none of their weights, so that input must ask for a gradient."""
    modules = {type(module).__module__ for module in model.modules()}
    return any(_has_backward(name) for name in modules if name.startswith(_MODELS))


def _has_backward(module: str) -> bool:
    own = (kind for kind in vars(sys.modules[module]).values() if isinstance(kind, type) and kind.__module__ == module)
    functions = [kind.__qualname__ for kind in own if issubclass(kind, torch.autograd.Function)]
    codes = _code_in(module) if functions else {}
    return any(name in codes and codes[name].calls_backward for name in functions)


def _calls_backward(tree: ast.AST) -> bool:
    """`backward` of what was given: `layer.backward_pass(...)`, `output.backward(...)`."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(called, ast.Attribute) and called.attr.startswith("backward") for called in calls)
