"""The towers of models that see or hear: which modules are the language model, which look, which listen, which lead from one
to the other. Asked of the built model; no model is known here by name.

Source: transformers 5, modeling_utils.py: `get_decoder`, `get_encoder(modality=)`, `main_input_name`; configs' `sub_configs`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .. import names
from ..names import Tower

_MODALITIES: tuple[tuple[str, Tower], ...] = (("image", "vision"), ("video", "vision"), ("audio", "audio"))
# What a model without a description of its own takes in, by the name of its main input.
_SEES = re.compile(r"pixel|image|vision|video|patches")
_HEARS = re.compile(r"input_values|features|audio|speech|sound")
# Modules, inside a tower or between two, that bring one's outputs to the width of the other.
_LEADS = re.compile(r"Project|Merger|Connector|Resampler|Aligner|Adapt(e|o)r|QFormer|Perceiver")


def towers_of(model: nn.Module) -> dict[str, Tower]:
    """{prefix of names: tower}; a parameter's tower is that of the longest prefix. Empty for a model of one part.

    `language` is the decoder that writes; where nothing is written (CLIP), or an encoder is read from (Florence-2, Canary), the
    part that reads text is `text`. What leads from one tower to another is `projector`, also where it lies inside a tower.

    Args:
        model: built by transformers, with or without values, without adapters or with.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "sub_configs", None) or not hasattr(model, "get_decoder"):
        return {}
    modules = dict(model.named_modules())
    names_of = {id(module): name for name, module in modules.items()}
    bodies = [module for _, module in _outermost(model)]
    nested: dict[str, Tower] = {}
    for body in bodies:  # a retriever around a model that sees; a thinker with ears and eyes beside a talker
        nested |= {f"{names_of[id(body)]}.{name}".rstrip("."): tower for name, tower in towers_of(body).items()}
    if nested:
        return nested | {names_of[id(body)]: nested.get(names_of[id(body)], "projector") for body in bodies}
    writes = bool(_asked(model, "can_generate")) and not getattr(config, "is_encoder_decoder", False)
    reads: Tower = "language" if writes else "text"
    found: dict[str, Tower] = {}

    def add(module: Any, tower: Tower) -> None:
        name = names_of.get(id(module), "")
        if name and module is not getattr(model, "base_model", None) and tower_in(found, name, None) is None:
            found[name] = tower

    for modality, tower in _MODALITIES:
        add(_asked(model, "get_encoder", modality), tower)
    decoder = _asked(model, "get_decoder")
    if _takes_tokens(decoder):
        around = [body for body in bodies if names_of.get(id(decoder), "").startswith(f"{names_of[id(body)]}.")]
        add(around[0] if around else decoder, reads)
    for body in bodies:
        name = names_of[id(body)]
        if not any(other.startswith(f"{name}.") for other in found):
            add(body, _by_input(body, model, reads))
    if reads not in found.values() and _has_blocks_outside(model, found):
        found[""] = reads
    if len(set(found.values()) - {"projector"}) < 2:
        return {}
    for ends in ("get_input_embeddings", "get_output_embeddings"):
        name = names_of.get(id(_asked(model, ends)), "")
        if name and tower_in(found, name, None) is None:
            found[name] = reads
    for name, module in modules.items():
        inside = tower_in(found, name)
        if name and inside not in (reads, "projector") and _LEADS.search(type(module).__name__):
            found[name] = "projector"
    return found


def tower_in(towers: Mapping[str, Tower], name: str, outside: Tower | None = "projector") -> Tower | None:
    """The tower of a parameter or module; `outside` between the towers, None in a model without."""
    if not towers:
        return None
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        if (tower := towers.get(".".join(parts[:end]))) is not None:
            return tower
    return outside


def _has_blocks_outside(model: nn.Module, towers: Mapping[str, Tower]) -> bool:
    return any(
        names.block_index(name) is not None and tower_in(towers, name, None) is None
        for name, _ in model.named_parameters()
    )


def _asked(model: Any, question: str, *words: str) -> Any:
    """What a class answers; None where it answers otherwise, or not at all."""
    try:
        return getattr(model, question)(*words)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def _takes_tokens(module: Any) -> bool:
    return isinstance(_asked(module, "get_input_embeddings"), nn.Embedding)


def _outermost(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Models with a config of their own inside a model: those that no other but the body holds."""
    outer = getattr(module, "config", None)
    for name, child in module.named_children():
        own = getattr(child, "config", None)
        if hasattr(child, "main_input_name") and own is not None and type(own) is not type(outer):
            yield f"{prefix}{name}", child
        else:
            yield from _outermost(child, f"{prefix}{name}.")


def _by_input(body: Any, model: Any, reads: Tower) -> Tower:
    """The tower that a model inside a model is: by its main input, its config's class, or what the whole takes in."""
    if _LEADS.search(type(body).__name__):
        return "projector"
    if _takes_tokens(body):
        return reads
    for words in (
        str(body.main_input_name),
        type(body.config).__name__.lower(),
        *inspect.signature(model.forward).parameters,
    ):
        if _SEES.search(words):
            return "vision"
        if _HEARS.search(words):
            return "audio"
    return "projector"
