"""Bases whose files hold quantized weights: on which of them something trains here, and how they are loaded for it.

float8 and MXFP4 are dequantized while transformers loads them, and then train as any float base: their layers for quantized
products have no place for an adapter, and their weights none for a gradient. bitsandbytes' bases stay as they are. GPTQ and
AWQ need layers of their own from gptqmodel, which PEFT adapts and this package does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import nn

from ..errors import CheckpointError, InstallError, OptionError, quoted

logger = logging.getLogger(__name__)


def _float8() -> Any:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(dequantize=True)


def _mxfp4() -> Any:
    from transformers import Mxfp4Config

    return Mxfp4Config(dequantize=True)


def _compressed_tensors() -> Any:
    if find_spec("compressed_tensors") is None:
        raise InstallError(
            "weights of compressed-tensors are dequantized by its package while transformers loads them: "
            "pip install compressed-tensors. A scan needs it not."
        )
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(dequantize=True)


# {quant_method of config.json: makes what `from_pretrained` takes so that it dequantizes}.
# Source: transformers 5.24, quantizers: `get_load_operations` with an operation `dequantize`.
_DEQUANTIZED: dict[str, Callable[[], Any]] = {
    "fp8": _float8,
    "mxfp8": _float8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}


def loading_of(config: Any, model_name: str, quantization: str | None = None) -> dict[str, Any]:
    """What `from_pretrained` has to be told so that something can train on a checkpoint; empty for float weights.

    Args:
        config: transformers' config of the checkpoint. quantization: that was asked for on top.
    Raises:
        OptionError: it is quantized already, and shall be again.
        CheckpointError: quantized by a method on which nothing trains here.
        InstallError: a package that dequantizes it is lacking.
    """
    method = method_of(config)
    if method is None or (method == "bitsandbytes" and quantization is None):
        return {}
    if quantization is not None:
        raise OptionError(
            f"quantization is {quantization!r} (--quantization), and {model_name} holds weights quantized by {quoted(method)} "
            "already, which transformers does not quantize again; leave it out, or give the float checkpoint."
        )
    if method not in _DEQUANTIZED:
        raise CheckpointError(_refusal(model_name, method))
    settings = _DEQUANTIZED[method]()
    logger.info("%s: weights quantized by %s are dequantized while they are loaded", model_name, method)
    return {"quantization_config": settings}


def method_of(config: Any) -> str | None:
    """How a config says that its checkpoint is quantized; None where it says nothing."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    fields = settings if isinstance(settings, Mapping) else settings.to_dict()
    usual = "bitsandbytes" if fields.get("load_in_4bit") or fields.get("load_in_8bit") else "unknown"
    return str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")) or usual)


def refuse_kept_quantized(model: nn.Module) -> None:
    """
    Raises:
        CheckpointError: a live model computes with weights of another quantizer than bitsandbytes'.
    """
    method = method_of(getattr(model, "config", None)) if getattr(model, "is_quantized", False) else None
    if method is None or method == "bitsandbytes":
        return
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if method in _DEQUANTIZED:
        raise CheckpointError(
            f"{name}: its layers compute with weights quantized by {quoted(method)}, wanted them dequantized: load it with "
            "load_model_with_spectrum, or with quantization_config=<its config class>(dequantize=True)."
        )
    raise CheckpointError(_refusal(name, method))


def _refusal(name: str, method: str) -> str:
    return (
        f"{name}: weights are quantized by {quoted(method)}, on which nothing trains here, wanted float weights, or those of "
        f"bitsandbytes, {', '.join(_DEQUANTIZED)} (all but the first are dequantized while they are loaded); use the "
        "checkpoint that they were quantized from."
    )
