"""The adapters of a model in memory as plain data: what a file of them would hold, and their low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import get_peft_model_state_dict
from torch import Tensor, nn

from ..errors import OptionError, near_matches
from ..weights import open_weights
from ..weights.adapters import AdapterState
from ..weights.updates import Stored


def adapter_state(model: nn.Module, adapter_name: str | None = None) -> AdapterState:
    """One adapter of a PeftModel, read through PEFT's own selection of tensors, as `save_pretrained` would write it.

    The tensors are the model's own, read when they are asked for.

    Args:
        adapter_name: None for the active one.
    Raises:
        OptionError: no such adapter, or several are active.
    """
    name = _chosen(model, adapter_name)
    config: dict[str, Any] = model.peft_config[name].to_dict()  # type: ignore[union-attr, index]
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    if not config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None)
    # Resized embeddings are found by comparing with the base's files, so PEFT need not look for them.
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return AdapterState(config, {key: Stored.in_memory(t) for key, t in tensors.items()}, f"adapter {name!r}")


def _chosen(model: Any, adapter_name: str | None) -> str:
    if adapter_name is not None:
        if adapter_name not in model.peft_config:
            raise OptionError(f"adapter_name is {adapter_name!r}." + near_matches(adapter_name, model.peft_config))
        return adapter_name
    active = model.active_adapters
    active = list(active() if callable(active) else active)
    if len(active) != 1:
        raise OptionError(f"adapters {active} are active, wanted one; say which with adapter_name.")
    return str(active[0])


def factors(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(entry name, B, A, scale) of every low-rank update of an adapter: dW = scale * B @ A.

    B is (out, rank), A (rank, in); of fused experts (experts, out, rank) and (experts, rank, in). Copies on the CPU, in
    the dtype they train in; entries are in the order of the model's layers.

    Args:
        adapter_name: None for the active one.
    """
    state = adapter_state(model, adapter_name)
    yield from state.factors(None if state.plan else open_weights(model).tensors())
