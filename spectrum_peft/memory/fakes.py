"""A model of fake tensors: built from its config, quantized as bitsandbytes would, on the kernels of a device."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, PreTrainedConfig, masking_utils
from transformers.quantizers import AutoHfQuantizer

from ..errors import CheckpointError, InstallError, OptionError, SpectrumError, near_here, one_line
from ..records import Plan, mode_of
from ..tuner.classes import check_config, class_of
from ..tuner.loading import quantization_config_for
from ..weights import base_module, give_storage_without_values, int8_products_as_on


def config_of(model: Any, revision: str | None, trust_remote_code: bool) -> Any:
    """The transformers config of a path, hub id, config or model.

    Raises:
        CheckpointError: no config there.
        OptionError: the config needs code from its repository and that is not allowed.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    if isinstance(model, nn.Module):
        config = getattr(base_module(model), "config", None)
        if not isinstance(config, PreTrainedConfig):
            raise OptionError(
                f"{type(model).__name__} carries no transformers config, from which it could be built again."
            )
        return config
    if not isinstance(model, str | os.PathLike):
        raise OptionError(f"model is a {type(model).__name__}, wanted a path, a hub id, a config or a model.")
    text, extra = os.fspath(model), {}
    if text.endswith(".gguf"):
        text, extra = str(Path(text).parent), {"gguf_file": Path(text).name}
    else:
        check_config(text)
    try:
        return AutoConfig.from_pretrained(text, revision=revision, trust_remote_code=trust_remote_code, **extra)
    except Exception as error:  # each config class has its own errors for fields of wrong types
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise OptionError(
                f"{text}: its model class is code in the repository itself, which is run only with "
                "trust_remote_code=True."
            ) from error
        if not mode_of(text):
            first = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{text}: no such folder, and not loadable from the hub ({first}){near_here(text)}"
            ) from error
        raise CheckpointError(f"{text}: no config of a model that could be built ({reason}).") from error


def model_class_of(model: Any, config: Any, model_class: Any, trust_remote_code: bool) -> Any:
    if model_class is not None:
        return model_class
    if isinstance(model, nn.Module):
        return type(base_module(model))
    remote = getattr(config, "auto_map", None) or {}
    if remote and class_of(config).__name__.startswith("AutoModel") and not trust_remote_code:
        raise OptionError(
            f"config of type {config.model_type!r} names its model class {next(iter(remote.values()))!r} in a "
            "repository, whose code is run only with trust_remote_code=True."
        )
    return class_of(config)


def skeleton_of(
    model_class: Any, config: Any, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool
) -> Any:
    """The model on the meta device: every module, shape and tie, no values."""
    config = copy.deepcopy(config)
    if attn_implementation is None and config._attn_implementation not in (None, "sdpa", "eager"):
        config._attn_implementation = None  # of a live model: kernels that fake tensors do not have
    config._name_or_path = ""  # nothing about this model may be read from a folder
    if not isinstance(model_class, type):
        raise CheckpointError(f"config.json: architectures names {model_class.__name__}, which is no class of a model.")
    make = getattr(model_class, "_from_config", None)
    extra = {} if make is not None else {"trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            built = (make or model_class.from_config)(
                config, dtype=dtype, attn_implementation=attn_implementation, **extra
            )
    except (SpectrumError, MemoryError):
        raise
    except Exception as error:  # each model class has its own errors for fields of wrong types
        kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
        raise OptionError(f"{model_class.__name__} cannot be built: {kind}{one_line(error)}") from error
    return built


def fake_model(skeleton: Any, dtype: torch.dtype) -> Any:
    """The same model with storage for its tensors; call it under `FakeTensorMode`."""
    made: dict[int, Tensor] = {}
    for module in skeleton.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            give_storage_without_values(module, dtype)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_empty_like(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                if id(buffer) not in made:
                    made[id(buffer)] = _empty_like(buffer)
                module._buffers[name] = made[id(buffer)]
    return skeleton


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _apply_to_fakes(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, the inside of `.to()`, by new parameters: torch swaps fakes, which weak references forbid."""
    if recurse:
        for module in self.children():
            module._apply(fn)
    with torch.no_grad():
        for name, parameter in self._parameters.items():
            if parameter is not None and (applied := fn(parameter)) is not parameter:
                self._parameters[name] = nn.Parameter(applied, requires_grad=parameter.requires_grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
    return self


class _OneFakeMode(FakeTensorMode):
    def __deepcopy__(self, memo: Any) -> _OneFakeMode:
        """A copy of a fake tensor (PEFT copies modules that train whole) belongs to the same mode."""
        return self


@contextlib.contextmanager
def on_fake_tensors() -> Iterator[None]:
    before = nn.Module._apply
    nn.Module._apply = _apply_to_fakes  # type: ignore[assignment, method-assign]
    try:
        with warnings.catch_warnings(), _OneFakeMode():
            # `copy.deepcopy` of a parameter asks for its address.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor", category=UserWarning)
            yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def quantized_skeleton(skeleton: Any, plan: Plan, quantization: str, dtype: torch.dtype) -> Any:
    """Swap in bitsandbytes' layers where `load_model_with_spectrum` would have them."""
    settings = quantization_config_for(plan, skeleton, quantization, dtype)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    with torch.device("meta"):
        quantizer.preprocess_model(skeleton, device_map={"": "cpu"})
    quantizer.postprocess_model(skeleton)
    return skeleton


def _attention_as_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the kernel that CUDA takes, for its intermediates: called on fake tensors.

    Flash attention in 16 bit without a mask, the memory-efficient kernel otherwise; a boolean mask is turned into one
    of the query's dtype, padded to a multiple of 8 in the last dimension.
    Source: pytorch 2.13, aten/src/ATen/native/transformers/attention.cpp and cuda/sdp_utils.cpp. cuDNN's kernel, which
    some GPUs prefer, keeps the same tensors as flash attention.
    """
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
        pad = -attn_mask.shape[-1] % 8
        if pad:
            attn_mask = nn.functional.pad(attn_mask, (0, pad))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


class _GroupedProduct(torch.autograd.Function):
    """The storages of `torch.nn.functional.grouped_mm`, whose rules for fake tensors know bfloat16 only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(x.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (torch.empty_like(x) if wanted[0] else None, weight.new_empty(weight.shape) if wanted[1] else None)


def _grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """(tokens, in) times (experts, in, out), rows of one expert together, on fake tensors of any dtype."""
    if x.dtype == torch.bfloat16:
        return _grouped_mm_of_torch(x, weight, offs=offs, **kwargs)
    return _GroupedProduct.apply(x, weight)  # type: ignore[no-any-return]


_grouped_mm_of_torch: Any = getattr(nn.functional, "grouped_mm", None)


@contextlib.contextmanager
def fused_head_of(device: str) -> Iterator[None]:
    """TRL's head, which computes the loss in tiles of the logits: on a GPU each is folded in place, without float32 copies.

    Source: trl 1.16 kernels/chunked_logprob.py, `_forward_kernel`, `_backward_kernel`, `_addmm_fp32`.
    Raises:
        InstallError: a trl that computes the loss in another way.
    """
    try:
        from trl.kernels import chunked_logprob as head

        before = {name: getattr(head, name) for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")}
    except (ImportError, AttributeError) as error:
        raise InstallError("trainer='sft' is modelled for trl 1.16: pip install 'trl>=1.16,<2'.") from error
    if device == "cuda":
        for name in before:
            setattr(head, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(head, name, function)


@contextlib.contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Take the ways on fake tensors that are taken on real ones of `device`."""
    attention, packed = nn.functional.scaled_dot_product_attention, masking_utils.find_packed_sequence_indices
    if device == "cuda":
        nn.functional.scaled_dot_product_attention = _attention_as_on_cuda  # type: ignore[assignment]
    # Without a mask transformers looks at the positions for packed sequences; it cannot look at fake ones, and would
    # make a mask to be safe.
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if _grouped_mm_of_torch is not None:
        nn.functional.grouped_mm = _grouped_mm  # type: ignore[assignment]
    try:
        with int8_products_as_on(device):
            yield
    finally:
        nn.functional.scaled_dot_product_attention = attention
        if _grouped_mm_of_torch is not None:
            nn.functional.grouped_mm = _grouped_mm_of_torch
        masking_utils.find_packed_sequence_indices = packed
