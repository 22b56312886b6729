"""How the originals of weights that train are kept: in main memory, or as a way to read them back from the checkpoint."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import names
from ..errors import CheckpointError, MismatchError, OptionError, near_matches
from ..weights import open_weights
from .apply import base_of, base_parameters
from .layers import Original

logger = logging.getLogger(__name__)


def local_folder(model: nn.Module) -> Path | None:
    """The checkpoint folder that a transformers model was loaded from, where it is a local folder."""
    path = getattr(getattr(base_of(model), "config", None), "_name_or_path", None)
    return Path(path) if path and Path(path).is_dir() else None


def _read_tensor(folder: str, name: str) -> Tensor:
    return open_weights(folder).read(name)


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
                reader = functools.partial(_read_tensor, str(folder), stored[name])
                return Original(name, value, reader=reader)
        elif keep_base == "file":
            raise MismatchError(f"keep_base='file': {folder} holds no tensor {name}." + near_matches(name, stored))
        return Original(name, value)

    return keep
