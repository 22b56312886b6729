"""Whatever holds weights, opened: a model, a checkpoint, a GGUF file, a trained adapter, a repository of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import hub
from ..errors import CheckpointError, no_such
from ..records import is_file, mode_of, record_of
from .adapted import AdaptedWeights
from .adapters import AdapterState
from .files import FileWeights
from .gguf import GgufWeights
from .headers import CONVERT, INDEX, PICKLES, choose_shards, find_shards, read_index
from .live import LiveWeights
from .remote import HubShards
from .source import WeightSource


def open_weights(model_or_path: Any, revision: str | None = None, download: bool = True) -> WeightSource:
    """Open whatever holds weights, reading headers only.

    Args:
        model_or_path: an `nn.Module` (a PeftModel gives W + dW under the base's names); a folder with safetensors
            files, one such file, a `.gguf` file; the folder of a trained adapter (its base with the adapter applied);
            or a hub id, of which safetensors and json files are fetched.
        revision: branch, tag or commit of a hub id.
        download: of a hub id; False reads each tensor over the network when it is asked for and stores none of them, unless
            the hub's cache holds the commit already or HF_HUB_OFFLINE is set.
    Raises:
        CheckpointError: not there; empty, truncated or not safetensors; a shard missing; only pickle files; a
            quantization that cannot be undone here; an adapter without a base, or on another adapter.
        HubError: the hub cannot be reached, or refuses.
        MismatchError: an adapter does not fit its base.
    """
    if isinstance(model_or_path, nn.Module):
        return LiveWeights(model_or_path)
    snapshot = None if download else _listed(model_or_path, revision)
    if snapshot is not None and not _is_adapter(snapshot.files):
        return _remote(snapshot)
    path, model_id, found = locate(model_or_path, revision if snapshot is None else snapshot.commit)
    if not (path.is_dir() and holds_adapter(path)):
        return _checkpoint(path, model_id, found)
    adapter = AdapterState.from_folder(path)
    if adapter.base is None:
        raise CheckpointError(
            f"{path / 'adapter_config.json'}: base_model_name_or_path is empty, wanted the base's folder or hub id."
        )
    revision = adapter.config.get("revision")
    listed = None if download else _listed(adapter.base, revision)
    base = _checkpoint(*locate(adapter.base, revision)) if listed is None else _remote(listed)
    return AdaptedWeights(adapter, base, folder=path, model_id=model_id, revision=found)


def _listed(model_or_path: Any, revision: str | None) -> hub.Snapshot | None:
    """The commit that a hub id stands for now; None for what lies here, and where the hub must not be asked."""
    if not isinstance(model_or_path, str | os.PathLike) or hub.offline() or not _may_be_hub_id(model_or_path):
        return None
    return hub.resolve(os.fspath(model_or_path), revision)


def _is_adapter(files: Iterable[str]) -> bool:
    """`holds_adapter` of the files of a repository."""
    return "adapter_config.json" in files and not any(re.fullmatch(r"model[^/]*\.safetensors", name) for name in files)


def _remote(snapshot: hub.Snapshot) -> WeightSource:
    """A repository's checkpoint: its small files through the hub's cache, its tensors over the network."""
    if _is_adapter(snapshot.files):
        raise CheckpointError(
            f"{snapshot.repo_id}: holds an adapter, wanted a model; adapter_config.json names its base."
        )
    top = [name for name in snapshot.files if "/" not in name and not name.startswith("consolidated")]
    chosen = choose_shards(snapshot.repo_id, top, lambda path: read_index(hub.small_file(snapshot, path.name)))
    cached = [hub.cached_file(snapshot.repo_id, name, snapshot.commit) for name in chosen]
    small = [hub.small_file(snapshot, name) for name in ("config.json", INDEX) if name in top]
    folder = small[0].parent if small else Path(snapshot.repo_id)
    if small and all(path is not None for path in cached):
        return FileWeights([folder / name for name in chosen], snapshot.repo_id, snapshot.commit, folder)
    files = [folder / name for name in chosen]
    return FileWeights(files, snapshot.repo_id, snapshot.commit, folder, shards=HubShards(snapshot))


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
    if not _may_be_hub_id(text):
        raise CheckpointError(no_such("file or folder", path))
    folder = fetch(text, revision)
    # A snapshot of the hub's cache lies in a folder named by its commit.
    return folder, text, folder.name if folder.parent.name == "snapshots" else revision


def _may_be_hub_id(model_or_path: str | os.PathLike[str]) -> bool:
    """Whether nothing of this name lies here, and the hub may have it."""
    return hub.may_be_id(os.fspath(model_or_path)) and not mode_of(_expanded(model_or_path))


def refuse_missing(model_or_path: str | os.PathLike[str]) -> None:
    """
    Raises:
        CheckpointError: nothing of this name lies here, and it cannot be meant for the hub; or it is a file of plain data.
    """
    refuse_data(_expanded(model_or_path))
    if not mode_of(_expanded(model_or_path)) and not _may_be_hub_id(model_or_path):
        raise CheckpointError(no_such("file or folder", model_or_path))


def refuse_data(path: Path) -> None:
    """
    Raises:
        CheckpointError: a plan, a report or rows, given where a model is wanted.
    """
    if path.suffix in _DATA and is_file(path):
        found = record_of(path) if path.suffix in (".yaml", ".yml", ".json") else f"a {path.suffix} file"
        raise CheckpointError(
            f"{path}: is {found}, wanted a model: its folder, a .safetensors or .gguf file, or a hub id."
        )


_DATA = frozenset({".yaml", ".yml", ".json", ".jsonl", ".csv", ".parquet", ".txt"})


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
    refuse_data(path)
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
        HubError: no such repository, no access, or it is not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import constants, snapshot_download

    with hub.asked(model_id, revision):
        return Path(
            hub.patiently(
                lambda: snapshot_download(
                    model_id,
                    revision=revision,
                    allow_patterns=list(patterns),
                    ignore_patterns=["*/*", "consolidated*.safetensors"],
                    # Offline, huggingface_hub 2.0 would ask for the files of a commit that it has.
                    local_files_only=constants.is_offline_mode(),
                )
            )
        )
