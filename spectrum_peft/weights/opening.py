"""Whatever holds weights, opened: a model, a checkpoint, a GGUF file, a trained adapter, a repository of the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, one_line, quoted
from ..records import mode_of
from .adapted import AdaptedWeights
from .adapters import AdapterState
from .files import FileWeights
from .gguf import GgufWeights
from .headers import CONVERT, PICKLES, find_shards
from .live import LiveWeights
from .source import WeightSource


def open_weights(model_or_path: Any, revision: str | None = None) -> WeightSource:
    """Open whatever holds weights, reading headers only.

    Args:
        model_or_path: an `nn.Module` (a PeftModel gives W + dW under the base's names); a folder with safetensors
            files, one such file, a `.gguf` file; the folder of a trained adapter (its base with the adapter applied);
            or a hub id, of which safetensors and json files are fetched.
        revision: branch, tag or commit of a hub id.
    Raises:
        CheckpointError: not there; empty, truncated or not safetensors; a shard missing; only pickle files; a
            quantization that cannot be undone here; an adapter without a base, or on another adapter.
        MismatchError: an adapter does not fit its base.
    """
    if isinstance(model_or_path, nn.Module):
        return LiveWeights(model_or_path)
    path, model_id, found = locate(model_or_path, revision)
    if not (path.is_dir() and holds_adapter(path)):
        return _checkpoint(path, model_id, found)
    adapter = AdapterState.from_folder(path)
    if adapter.base is None:
        raise CheckpointError(
            f"{path / 'adapter_config.json'}: base_model_name_or_path is empty, wanted the base's folder or hub id."
        )
    base = _checkpoint(*locate(adapter.base, adapter.config.get("revision")))
    return AdaptedWeights(adapter, base, folder=path, model_id=model_id, revision=found)


def locate(model_or_path: str | os.PathLike[str], revision: str | None = None) -> tuple[Path, str, str | None]:
    """Where a checkpoint or adapter lies: (file or folder, what it is called, revision); a hub id is fetched.

    Raises:
        CheckpointError: not there, or it cannot be fetched.
    """
    if not isinstance(model_or_path, str | os.PathLike):
        kind = type(model_or_path).__name__
        raise CheckpointError(f"the weights to open are a {kind}, wanted a model, a path or a hub id.")
    path = _expanded(model_or_path)
    if mode_of(path):  # a name that is too long, or holds a NUL, is none that exists
        return path, str(path), None
    text = os.fspath(model_or_path)
    if text.count("/") > 1 or text.startswith((".", "~", "/")) or path.suffix in {".gguf", ".safetensors", *PICKLES}:
        raise CheckpointError(f"{path}: no such file or folder.")
    folder = fetch(text, revision)
    # A snapshot of the hub's cache lies in a folder named by its commit.
    return folder, text, folder.name if folder.parent.name == "snapshots" else revision


def _expanded(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # `~name`, of a user that there is not
        return Path(path)


def _checkpoint(path: Path, model_id: str, revision: str | None) -> WeightSource:
    if path.is_dir():
        if holds_adapter(path):
            raise CheckpointError(f"{path}: holds an adapter, wanted a model; adapter_config.json names its base.")
        return FileWeights(find_shards(path), model_id=model_id, revision=revision, folder=path)
    if path.suffix == ".gguf":
        return GgufWeights(path)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: pickle files are not read, wanted safetensors.{CONVERT}")
    return FileWeights([path], model_id=model_id)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is that of a PEFT adapter and not of a model."""
    return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors"))


def fetch(model_id: str, revision: str | None, patterns: Sequence[str] = ("*.safetensors", "*.json")) -> Path:
    """The local snapshot of a hub repository, with the files of its top folder that match the patterns.

    Raises:
        CheckpointError: no such repository, or it is not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*", "consolidated*.safetensors"],
            )
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{quoted(model_id)} is neither a file, a folder nor a hub id: {one_line(error)}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model_id!r}: no such file or folder here, not in the hub's cache, and the hub cannot be reached."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"{model_id!r}{at} cannot be fetched from the hub: {one_line(error)}") from error
