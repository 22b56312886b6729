"""The only reader of raw weights: one tensor at a time, from safetensors files, a live model or a GGUF file.

Names are those of the live model. Files that keep one tensor per expert where transformers fuses them are presented
fused, `model.layers.0.mlp.experts.gate_up_proj` of shape (E, 2I, H), and read by expert, `...gate_up_proj[3]`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError
from .files import CONVERT, PICKLES, FileWeights, Place, Span, as_matrix, find_shards, places, read_bytes, read_header
from .gguf import GgufWeights
from .live import LiveWeights, base_module, dequantized_weights, matrix_of
from .quantized import give_storage_without_values, int8_products_as_on, keep_4bit_differentiable, through_quantization
from .source import DTYPES, TensorInfo, WeightSource, one_line, split_expert

__all__ = [
    "DTYPES",
    "FileWeights",
    "GgufWeights",
    "LiveWeights",
    "Place",
    "Span",
    "TensorInfo",
    "WeightSource",
    "as_matrix",
    "base_module",
    "dequantized_weights",
    "fetch",
    "find_shards",
    "give_storage_without_values",
    "holds_adapter",
    "int8_products_as_on",
    "keep_4bit_differentiable",
    "locate",
    "matrix_of",
    "open_located",
    "open_weights",
    "places",
    "read_bytes",
    "read_header",
    "split_expert",
    "through_quantization",
]


def open_weights(model_or_path: Any, revision: str | None = None) -> WeightSource:
    """Open whatever holds weights, reading headers only.

    Args:
        model_or_path: an `nn.Module` (a PeftModel gives W + dW under the base's names); a folder with safetensors
            files, one such file, a `.gguf` file; or a hub id, of which safetensors and json files are fetched.
        revision: branch, tag or commit of a hub id.
    Raises:
        CheckpointError: not there; empty, truncated or not safetensors; a shard missing; only pickle files; a
            quantization that cannot be undone here.
    """
    if isinstance(model_or_path, nn.Module):
        return LiveWeights(model_or_path)
    return open_located(*locate(model_or_path, revision))


def locate(model_or_path: str | os.PathLike[str], revision: str | None = None) -> tuple[Path, str, str | None]:
    """Where a checkpoint or adapter lies: (file or folder, what it is called, revision); a hub id is fetched.

    Raises:
        CheckpointError: not there, or it cannot be fetched.
    """
    if not isinstance(model_or_path, str | os.PathLike):
        kind = type(model_or_path).__name__
        raise CheckpointError(f"the weights to open are a {kind}, wanted a model, a path or a hub id.")
    path = Path(model_or_path).expanduser()
    if path.exists():
        return path, str(path), None
    text = os.fspath(model_or_path)
    if text.count("/") > 1 or text.startswith((".", "~", "/")) or path.suffix in {".gguf", ".safetensors", *PICKLES}:
        raise CheckpointError(f"{path}: no such file or folder.")
    folder = fetch(text, revision)
    # A snapshot of the hub's cache lies in a folder named by its commit.
    return folder, text, folder.name if folder.parent.name == "snapshots" else revision


def open_located(path: Path, model_id: str, revision: str | None) -> WeightSource:
    """`open_weights` of a file or folder that is there."""
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
        raise CheckpointError(f"{model_id!r} is neither a file, a folder nor a hub id: {one_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model_id!r}: no such file or folder here, not in the hub's cache, and the hub cannot be reached."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"{model_id!r}{at} cannot be fetched from the hub: {one_line(error)}") from error
