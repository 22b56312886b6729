"""Bytes of a training step, counted from its tensors: each storage once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any


def storages(tensors: Iterator[Any]) -> dict[int, int]:
    """{address: bytes} of the storages behind some tensors, each once."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def weight_tensors(model: Any) -> Iterator[Any]:
    """Parameters, buffers, and the statistics that bitsandbytes keeps beside a 4-bit weight."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if hasattr(t, "untyped_storage"))
            state = state.state2


class Saved:
    """Holds a tensor for autograd, and goes when autograd lets it go."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


class SavedForBackward:
    """Sums what autograd keeps of a forward: every storage once, those of the model's own tensors left out.

    Under gradient checkpointing that is the inputs of the blocks; what a block computes again in backward is not in it.
    """

    def __init__(self, model: Any) -> None:
        import torch

        self._own = storages(weight_tensors(model))
        self._saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda saved: saved.tensor)

    def _keep(self, tensor: Any) -> Saved:
        saved = Saved(tensor)
        self._saved.add(saved)
        return saved

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        """Of what is held now: between forward and backward, all that backward needs."""
        held = storages(saved.tensor for saved in self._saved)
        return sum(size for address, size in held.items() if address not in self._own)
