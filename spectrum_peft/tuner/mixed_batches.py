"""Batches whose rows belong to different adapters: `model(..., adapter_names=[...])`, as in PEFT.

PEFT's LoRA layers and its wrappers of whole modules take the names as an argument of their forward, given by hooks; here the
layers of real weights take them, too, and what cannot differ from row to row is refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..errors import OptionError, near_matches
from .layers import SpectrumLayer

BASE = "__base__"  # PEFT's name for a row without an adapter


def check_rows(model: nn.Module, configs: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse names that no adapter has, and adapters whose change cannot be kept to single rows.

    Args:
        model: the base model with the adapters' layers in it.
        configs: {adapter: its config}.
    Raises:
        OptionError: as above, or the model is in training mode.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise OptionError(f"adapter_names is {names!r}, wanted a list with one name for each row.")
    if model.training:
        raise OptionError("adapter_names is for inference, and the model is in training mode; call model.eval() first.")
    wanted = {name for name in names if name != BASE}
    for name in sorted(wanted - set(configs)):
        raise OptionError(f"adapter_names: no adapter is called {name!r}." + near_matches(name, [*configs, BASE]))
    for name in sorted(wanted):
        if configs[name].bias != "none":
            raise OptionError(
                f"adapter_names: adapter {name!r} has bias={configs[name].bias!r}, which trains the base model's own biases; "
                "they hold for every row. Run its rows alone."
            )
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or not wanted & set(module.modules_to_save):
            continue
        owner = min(wanted & set(module.modules_to_save))
        known = isinstance(module.original_module, nn.Linear) or module is inputs or module.original_module is inputs
        if not known:  # a table of positions gets no rows of the batch, a module with parts anything at all
            raise OptionError(
                f"adapter_names: adapter {owner!r} trains {path} ({type(module.original_module).__name__}) whole, which cannot "
                "differ from row to row; run the rows of one adapter at a time, with set_adapter."
            )


@contextmanager
def names_for_rows(model: nn.Module, names: Sequence[str], beams: int = 1) -> Iterator[None]:
    """During the context every layer computes each row with the adapter of that row.

    Args:
        beams: of beam search, which repeats each row; the encoder of an encoder and decoder sees it once.
    """
    encoder = _encoder(model)
    once = {id(m) for m in encoder.modules()} if encoder is not None else set()
    handles, active = [], []
    try:
        for module in model.modules():
            if not isinstance(module, LoraLayer | SpectrumLayer | AuxiliaryTrainingWrapper):
                continue
            rows = list(names) if id(module) in once else [n for n in names for _ in range(beams)]
            if isinstance(module, AuxiliaryTrainingWrapper):
                # An adapter without a copy of this module uses the base's. PEFT's wrapper looks at the rows only while the
                # adapter that is switched on has a copy, so one that has stands in.
                have = [n for n in dict.fromkeys(rows) if n in module._adapters]
                rows = [n if n in have else BASE for n in rows]
                active.append((module, module._active_adapter))
                module._active_adapter = have[:1]
                if not have:
                    continue
            handles.append(module.register_forward_pre_hook(_giver(rows), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, before in active:
            module._active_adapter = before


def _giver(rows: list[str]) -> Any:
    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": rows}

    return give


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder and decoder; transformers gives a model without one back as its own."""
    found = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if found is model else found
