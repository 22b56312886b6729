"""How the originals of weights that train are kept: in main memory, or as a way to read them back from the checkpoint."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import names
from ..errors import CheckpointError, MismatchError, OptionError, near_matches
from ..weights import FileWeights, open_weights, read_stored, skeleton_like, skeleton_of
from .layers import Original
from .parameters import base_of, base_parameters

logger = logging.getLogger(__name__)


def local_folder(model: nn.Module) -> Path | None:
    """The checkpoint folder that a transformers model was loaded from, where it is a local folder."""
    path = getattr(getattr(base_of(model), "config", None), "_name_or_path", None)
    return Path(path) if path and Path(path).is_dir() else None


def _read_seen(folder: Path, name: str, kind: type[nn.Module], config: Any) -> Tensor:
    """A parameter that is made of several stored tensors, under the name that it has in a class."""
    files = open_weights(folder)
    assert isinstance(files, FileWeights)
    return files.seen_by(skeleton_of(kind, config) if hasattr(kind, "_from_config") else None).read(name)


def original_keeper(model: nn.Module, keep_base: str) -> Callable[[str, Tensor], Original]:
    """How the originals of weights that train are kept; see `SpectrumConfig.keep_base`.

    Returns:
        (full parameter name, value) -> Original.
    """
    if keep_base in ("host", "none"):
        return lambda name, value: Original(name, value, lost=keep_base == "none")
    folder = local_folder(model)
    stored: dict[str, str] = {}
    if folder is not None:
        try:
            source = open_weights(str(folder))
            assert isinstance(source, FileWeights)
            source = source.seen_by(skeleton_like(base_of(model)))
            tensors = [t.name for t in source.tensors()]
            stored = {found: name for name, found in names.align(tensors, base_parameters(model)).items()}
        except CheckpointError as error:
            if keep_base == "file":
                raise
            logger.info("keep_base='auto': %s; originals are kept in main memory", error)
    elif keep_base == "file":
        raise OptionError("keep_base='file' needs a model loaded from a local folder; use keep_base='host'.")

    def keep(name: str, value: Tensor) -> Original:
        if name in stored:
            same = value.device.type != "meta" and torch.equal(
                source.read(stored[name]).to(value.dtype), value.detach().to("cpu")
            )
            if same or keep_base == "file":
                whole, base = source.whole(stored[name]), base_of(model)
                reader: Callable[[], Tensor] = (
                    functools.partial(read_stored, folder, whole)
                    if whole
                    else functools.partial(_read_seen, folder, stored[name], type(base), getattr(base, "config", None))
                )
                return Original(name, value, reader=reader)
        elif keep_base == "file":
            raise MismatchError(f"keep_base='file': {folder} holds no tensor {name}." + near_matches(name, stored))
        return Original(name, value)

    return keep
