"""Which class of transformers a checkpoint is opened as, and whether it has the weights that the class needs.

A classifier's head may be new, it learns its labels; a language head may not: what a random one of a vocabulary would learn
from a fine-tuning set is no language.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from ..errors import CheckpointError, OptionError, loading, quoted
from ..records import check_files_beside, is_file, mode_of
from ..weights import (
    FileWeights,
    open_weights,
    output_head,
    read_config,
    refuse_missing,
    refuse_sharded,
    skeleton_of,
)


def check_config(model_name: str) -> None:
    """
    Raises:
        CheckpointError: a local folder's config.json is damaged, or of a model that nobody could build; it holds a sharded
            checkpoint; it is not there, and not the form of a hub id.
    """
    refuse_missing(model_name)
    if mode_of(model_name):
        refuse_sharded(Path(model_name))
    if Path(model_name).is_dir():
        check_files_beside(model_name)
    if is_file(Path(model_name, "config.json")):
        read_config(Path(model_name, "config.json"))


def config_for(model_name: str, **kwargs: Any) -> Any:
    """transformers' config of a folder or hub id.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    check_config(model_name)
    with loading(model_name):
        return AutoConfig.from_pretrained(model_name, **kwargs)


def class_for(model_name: str, **kwargs: Any) -> Any:
    """The transformers class that a checkpoint's config names in `architectures`, else `AutoModelForCausalLM`."""
    return class_of(config_for(model_name, **kwargs))


def class_of(config: Any) -> Any:
    """The transformers class that a config names in `architectures`, else `AutoModelForCausalLM`.

    Raises:
        CheckpointError: transformers calls something else by that name.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is None:
            continue
        lacking = type(found).__name__ == "DummyObject"  # says itself which package it needs
        model = isinstance(found, type) and (issubclass(found, nn.Module) or hasattr(found, "_model_mapping"))
        if not model and not lacking:
            raise CheckpointError(f"config.json: architectures names {quoted(name)}, which is no class of a model.")
        return found  # a body, too: what its head would compute is in no file
    return transformers.AutoModelForCausalLM


def weightless(model: Any, model_class: Any = None, **kwargs: Any) -> nn.Module | None:
    """The model that a path, id or config stands for, without values; None where it is not there or cannot be built.

    Args:
        model_class: class, or auto class, that it will be opened as; None for the one that its config names.
    """
    if model is None:
        return None
    try:
        named = isinstance(model, str | os.PathLike)
        config = AutoConfig.from_pretrained(model, **kwargs) if named else model
        kind = model_class or class_of(config)
        if hasattr(kind, "_from_config"):
            built = skeleton_of(kind, config)
        else:
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config
            with torch.device("meta"):
                built = kind.from_config(config)
            built.tie_weights()
        if named:  # a text class has the text part's config, which knows no folder
            built.config._name_or_path = os.fspath(model)
        return built
    except (CheckpointError, OSError, ValueError, KeyError, AttributeError):
        return None


def refuse_class(model_name: str, config: Any, kind: Any, **revision: Any) -> None:
    """
    Args:
        config: transformers' config of the checkpoint. kind: class, or auto class, that it shall be opened as.
    Raises:
        OptionError: the class is of another family, or has blocks, or a language head, that the checkpoint lacks; the message
            lists classes that fit.
    """
    if getattr(config, "auto_map", None):  # code of its own, of which nothing is known before it runs
        return
    named = class_of(config)
    mapping = getattr(kind, "_model_mapping", None)
    if mapping is None:
        wanted = getattr(kind, "config_class", None)
        if wanted is None or kind is named:
            return
        family = {type(part).__name__ for part in (config, *_parts(config))}
        if wanted.__name__ not in family:
            said = f"{kind.__name__} is a class of {wanted.model_type!r}, the checkpoint is of {config.model_type!r}"
            raise OptionError(_no_fit(model_name, said, config, **revision))
    elif type(config) in mapping:
        found = mapping[type(config)]
        if (found[0] if isinstance(found, tuple) else found) is named:
            return
    elif not any(type(part) in mapping for part in _parts(config)):
        said = f"{kind.__name__} knows no class of {config.model_type!r}"
        raise OptionError(_no_fit(model_name, said, config, **revision))
    skeleton = weightless(model_name, kind, **revision)
    lacking = None if skeleton is None else _lacking(model_name, skeleton, **revision)
    if lacking is not None:
        said = f"config.json names {named.__name__}, and {lacking[0]} of {type(skeleton).__name__} ({lacking[1]}) is in no file"
        raise OptionError(_no_fit(model_name, said, config, **revision))


def _parts(config: Any) -> Iterator[Any]:
    """Configs inside a config, such as a vision-language model's text part."""
    return (part for part in vars(config).values() if isinstance(part, transformers.PreTrainedConfig))


def _lacking(model_name: str, skeleton: nn.Module, **revision: Any) -> tuple[str, str] | None:
    """What a class needs and a checkpoint does not give, in words, with the first parameter of it: any block, or the language
    head, by itself or by a tie."""
    files = open_weights(model_name, download=False, **revision)
    if not isinstance(files, FileWeights):
        return None
    seen, head = files.seen_by(skeleton), output_head(skeleton)
    if seen.strange is not None:
        return "every block", seen.strange
    if seen.layout is None or head is None:
        return None
    weights = {f"{name}.weight" for name, module in skeleton.named_modules(remove_duplicate=False) if module is head}
    found = next((name for name in seen.layout.new if name in weights), None)
    return None if found is None else ("the language head", found)


def _no_fit(model_name: str, said: str, config: Any, **revision: Any) -> str:
    fitting = ", ".join(sorted(classes_that_fit(model_name, config, **revision))) or "none of transformers'"
    return f"{model_name}: {said}; classes that fit (model_class=, --task): {fitting}."


def classes_that_fit(model_name: str, config: Any, **revision: Any) -> set[str]:
    """The classes of transformers for a checkpoint's family whose language head, if they have one, the checkpoint gives."""
    from transformers.models.auto import modeling_auto

    tables = (v for n, v in vars(modeling_auto).items() if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES"))
    found = [table[config.model_type] for table in tables if config.model_type in table]
    names = {name for entry in found for name in (entry if isinstance(entry, tuple | list) else (entry,))}
    fitting = set()
    for name in names | set(config.architectures or ()):
        kind = getattr(transformers, name, None)
        skeleton = None if kind is None else weightless(model_name, kind, **revision)
        if skeleton is not None and _lacking(model_name, skeleton, **revision) is None:
            fitting.add(name)
    return fitting
