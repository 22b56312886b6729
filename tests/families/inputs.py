"""Inputs for a model of any class, with labels where it computes a loss: by what its `forward` takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch

ROWS = 2
TOKENS = 12
LABELS = 3


def inputs_for(model: Any) -> dict[str, Any]:
    """Two rows of tokens, pictures or sounds, the same for the same class."""
    taken = inspect.signature(model.forward).parameters
    needed = {n for n, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    main = model.main_input_name
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 90, (ROWS, TOKENS), generator=generator)
    given: dict[str, Any] = {}
    read = main in ("input_ids", "pixel_values") or not {"input_values", "input_features"} & set(taken)
    if "input_ids" in taken and (read or "input_ids" in needed):
        given["input_ids"] = ids
        if "attention_mask" in taken:
            given["attention_mask"] = torch.ones_like(ids)
    for name in ("pixel_values", "input_values", "input_features"):
        if name in taken and (name == main or name in needed):
            given[name] = _senses(name, model, generator)
    if "bbox" in taken:
        given["bbox"] = torch.zeros(ROWS, TOKENS, 4, dtype=torch.long)
    if "labels" in taken:
        labels = labels_for(model, ids, given)
        if labels is not None:
            given["labels"] = labels
    elif "start_positions" in taken:
        given |= {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    elif "return_loss" in taken:
        given["return_loss"] = True
    if "decoder_input_ids" in taken and "labels" not in given:
        given["decoder_input_ids"] = ids
    return given


def labels_for(model: Any, ids: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
    name = type(model).__name__
    if "Classification" in name and "Token" not in name:
        return torch.tensor([0, 1])
    if "TokenClassification" in name:
        return ids % 2
    if name.endswith("ForCTC"):
        return (ids[:, :3] % 15 + 3).contiguous()
    if "LM" in name or name.endswith(("Generation", "Model", "SpeechToText", "ForPreTraining")):
        return ids[:, :8].contiguous() if "decoder_input_ids" in inspect.signature(model.forward).parameters else ids
    return None


def _senses(name: str, model: Any, generator: torch.Generator) -> torch.Tensor:
    config = model.config
    for part in ("vision_config", "image_config", "encoder", "audio_config", "encoder_config"):
        inner = getattr(config, part, None)
        if inner is not None and hasattr(inner, "to_dict"):
            config = inner
            break
    if name == "input_values":
        return torch.randn(ROWS, 1600, generator=generator)
    if name == "input_features":
        bins = getattr(config, "num_mel_bins", getattr(config, "input_feat_per_channel", 16))
        long = 2 * getattr(config, "max_source_positions", 24)
        shape = (ROWS, bins, long) if "whisper" in config.model_type else (ROWS, 48, bins)
        return torch.randn(*shape, generator=generator)
    size = getattr(config, "image_size", 32)
    height, width = (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)
    frames = (config.num_frames,) if getattr(config, "num_frames", None) else ()
    return torch.randn(ROWS, *frames, getattr(config, "num_channels", 3), height, width, generator=generator)
