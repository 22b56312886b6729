"""Live storages: every byte that a step holds, by what it is for."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a byte can be part of. Everything made in the forward pass and not listed otherwise is `activations`; what
# backward, clipping and the optimizer make on their way, recomputed activations of checkpointing included, is
# `temporaries`.
CATEGORIES = (
    "weights", "quantized_weights", "adapters", "gradients", "optimizer",
    "activations", "logits", "temporaries", "inputs", "host_copies",
)  # fmt: skip
PHASES = ("forward", "backward", "clip", "optimizer")


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all live storages, by category, and keeps the worst moment of each phase.

    Views share their storage and in-place operations make none, so each storage counts once, from the operation that
    returns it first to the moment the last reference goes. What a kernel allocates and frees inside is not seen, but
    for the operations in `_WORKSPACE`.

    Args:
        device: type of the device whose storages count, `cpu` for fake tensors.
        block: sizes are rounded up to a multiple of it.
        vocabulary: width of the logits, to tell them from activations; None where there are none.
    """

    def __init__(self, device: str = "cpu", block: int = 1, vocabulary: int | None = None) -> None:
        super().__init__()
        self.device, self.block, self.vocabulary = device, block, vocabulary
        self.phase = "forward"
        self.where = ""
        self.total = 0
        self.bytes: Counter[str] = Counter()
        self.peaks: dict[str, tuple[int, dict[str, int], str]] = {}
        self._live: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = "temporaries" if self.phase != "forward" else "activations"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, made, func)
        workspace = _WORKSPACE.get(func.name())
        if workspace is not None:
            self._note_peak(func, workspace(args))
        return result

    def enter(self, phase: str) -> None:
        """From here on it is another phase, which begins with what is alive."""
        self.phase = phase
        self._note_peak(None, 0)

    def adopt(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count tensors made before the tracker was on, or move those it has seen to a category."""
        for tensor in tensors:
            key = self._key(tensor)
            if key is not None and key in self._live:
                reference, size, before = self._live[key]
                self._live[key] = (reference, size, category)
                self.bytes[before] -= size
                self.bytes[category] += size
            else:
                self._see(tensor, category, None)

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the distinct storages under some tensors, as counted here."""
        found = {key: self._live[key][1] for t in tensors if (key := self._key(t)) in self._live}
        return sum(found.values())

    def _key(self, tensor: Tensor) -> int | None:
        if tensor.layout is not torch.strided or tensor.device.type != self.device:
            return None
        return int(tensor.untyped_storage()._cdata)

    def _see(self, tensor: Tensor, category: str, func: Any) -> None:
        key = self._key(tensor)
        if key is None or key in self._live:
            return
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // self.block) * self.block
        if category in ("activations", "temporaries") and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            category = "logits"
        self._live[key] = (weakref.ref(storage, partial(self._gone, key)), size, category)
        self.total += size
        self.bytes[category] += size
        self._note_peak(func, 0)

    def _gone(self, key: int, _: Any) -> None:
        _, size, category = self._live.pop(key)
        self.total -= size
        self.bytes[category] -= size

    def _note_peak(self, func: Any, workspace: int) -> None:
        if self.total + workspace <= self.peaks.get(self.phase, (0,))[0]:
            return
        composition = {name: size for name, size in self.bytes.items() if size}
        if workspace:
            composition["temporaries"] = composition.get("temporaries", 0) + workspace
        operation = "" if func is None else f"{func.name().removeprefix('aten::')} "
        self.peaks[self.phase] = (self.total + workspace, composition, f"{operation}{self.where}".strip())


def _product_of_4bit(args: Any) -> int:
    """The whole weight in the input's dtype and its block maxima in float32, for the time of one product.

    Source: bitsandbytes 0.50.2, backends/default/ops.py, `_gemm_4bit_default_impl`; backends/cuda/ops.py takes the same
    way for batches of training size on most GPUs, and a fused kernel without it on some.
    """
    x, _, shape, _, blocksize = args[:5]
    numel = math.prod(shape)
    return int(numel * x.element_size() + 4 * -(-numel // blocksize))


def _product_of_int8(args: Any) -> int:
    """The product in int32 before it is scaled. Source: bitsandbytes 0.50.2, backends/cuda/ops.py, `int8_scaled_mm`."""
    x, weight = args[:2]
    return 4 * math.prod(x.shape[:-1]) * int(weight.shape[0])


# Operations that allocate, inside one kernel call, memory in proportion to the weights or the batch.
_WORKSPACE: dict[str, Callable[[Any], int]] = {
    "bitsandbytes::gemm_4bit": _product_of_4bit,
    "bitsandbytes::int8_scaled_mm": _product_of_int8,
}
