"""The one place that asks torch about devices: which one there is, what it is good at, its memory, when it is done.

On `torch.accelerator` and torch's module of the device kind, so that CUDA, ROCm (which calls itself cuda), XPU and MPS take one
way. What a kind cannot do is decided here, too: `exact`, `summed`, `refuse_quantization`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InstallError, OptionError, one_line
from .machine import peak_resident, reset_peak

# Kinds on which bitsandbytes 0.50 has kernels for 4-bit and 8-bit weights (its backends/ folder).
_QUANTIZES = ("cpu", "cuda", "hpu", "xpu")


def default_device() -> torch.device:
    """The current accelerator, else the CPU."""
    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
        return torch.device(found.type)
    return torch.device("cpu")


def device_named(text: str) -> torch.device:
    """A device as users write it: `auto`, `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`.

    Raises:
        OptionError: no such kind in torch, none of that kind here, or fewer of it than the number says.
    """
    if text == "auto":
        return default_device()
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise OptionError(f"device is {text!r}, wanted 'auto', 'cpu', 'cuda', 'cuda:N', 'xpu' or 'mps'.") from error
    if device.type in ("cpu", "meta"):
        return device
    here = default_device().type
    count = torch.accelerator.device_count() if here == device.type else 0
    if not count:
        raise OptionError(f"device is {text!r}, but torch {torch.__version__} sees no {device.type} here, only {here}.")
    if (device.index or 0) >= count:
        raise OptionError(f"device is {text!r}, but there are {count} of its kind, numbered from 0.")
    return device


def devices_named(text: str) -> list[torch.device]:
    """Several devices, separated by commas: `cuda:0,cuda:1`. Raises OptionError as `device_named`, for one named twice, and for
    devices of several kinds."""
    devices = [device_named(part.strip()) for part in text.split(",")]
    if len({device.type for device in devices}) > 1:
        raise OptionError(f"device is {text!r}, wanted devices of one kind.")
    if len(set(devices)) < len(devices):
        raise OptionError(f"device is {text!r}, which names one device twice.")
    return devices


def _module(device: torch.device) -> Any:
    """torch.cuda, torch.xpu, torch.mps or torch.cpu."""
    return torch.get_device_module(device)


def name_of(device: torch.device) -> str:
    """What the maker calls it; the kind where that cannot be asked."""
    ask = getattr(_module(device), "get_device_name", None)
    return str(ask(device)) if ask is not None and device.type not in ("cpu", "mps") else device.type


def fast_dtype(device: str | torch.device = "auto") -> torch.dtype:
    """bfloat16 where the device multiplies it at speed, float32 elsewhere.

    GPUs say so themselves; a CPU does with AMX or AVX512-BF16 (Linux names them in /proc/cpuinfo). Without them a bfloat16
    product falls back to scalar code, some hundred times slower than float32.
    """
    kind = device_named(device) if isinstance(device, str) else device
    if kind.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind.type == "cpu":
        info = Path("/proc/cpuinfo")
        flags = info.read_text().split() if info.exists() else []
        return torch.bfloat16 if {"amx_bf16", "avx512_bf16"} & set(flags) else torch.float32
    if kind.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    return torch.bfloat16


@cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64; MPS does not, and many XPUs only when emulated."""
    if device.type == "mps":
        return False
    try:
        torch.ones(1, dtype=torch.float64, device=device).square()
    except (RuntimeError, TypeError):
        return False
    return True


def exact(tensor: Tensor) -> Tensor:
    """The tensor where float64 and decompositions can be had: as it is, or a copy on the CPU where its device has no float64.

    MPS has no eigenvalues and singular values either (`_linalg_eigh` and `_linalg_svd` of torch 2.13's native_functions.yaml).
    """
    return tensor if has_float64(tensor.device) else tensor.cpu()


def summed(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Its sum in float64, of all or over one dimension; on a device without float64 in its own dtype, then given to the CPU."""
    if has_float64(tensor.device):
        return tensor.sum(dim, dtype=torch.float64)
    return tensor.sum(dim).cpu().double()


def refuse_quantization(device: torch.device, quantization: str) -> None:
    """Raise where a base cannot be held in 4 or 8 bit.

    Raises:
        InstallError: bitsandbytes has no kernels for this kind of device.
    """
    if device.type not in _QUANTIZES:
        raise InstallError(
            f"quantization is {quantization!r}, but bitsandbytes has no kernels for {device.type}, only for"
            f" {', '.join(_QUANTIZES)}; train without it."
        )


def synchronize(device: torch.device | None = None) -> None:
    """Wait until all that was asked of the device is done; nothing to do on a CPU."""
    device = device or default_device()
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def generators() -> list[int]:
    """Numbers of the devices whose random state is to be kept beside the CPU's (`torch.random.fork_rng`)."""
    return list(range(torch.accelerator.device_count())) if default_device().type != "cpu" else []


def memory_is_measured(device: torch.device | None = None) -> bool:
    """Whether the device counts the highest memory that tensors held on it; MPS and the CPU do not."""
    device = device or default_device()
    return device.type not in ("cpu", "meta") and hasattr(_module(device), "max_memory_allocated")


def peak_memory(device: torch.device | None = None) -> int:
    """Highest memory in bytes that tensors held on the accelerator; where it does not count, resident memory of the process."""
    device = device or default_device()
    if memory_is_measured(device):
        return int(_module(device).max_memory_allocated())
    return peak_resident() or 0


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Let the peak begin again with what is held now (on accelerators that count, and on Linux)."""
    device = device or default_device()
    if memory_is_measured(device):
        _module(device).reset_peak_memory_stats()
    else:
        reset_peak()


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """(free, whole) bytes of the device, of the machine for a CPU; None where it cannot be asked."""
    if device.type == "cpu":
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)
    module = _module(device)
    if hasattr(module, "mem_get_info"):
        free, whole = module.mem_get_info(device)
        return int(free), int(whole)
    if hasattr(module, "recommended_max_memory"):  # MPS
        whole = int(module.recommended_max_memory())
        return whole - int(module.current_allocated_memory()), whole
    return None


def works(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if a small product in a dtype runs on the device, else what it says instead."""
    try:
        ones = torch.ones(8, 8, dtype=dtype, device=device)
        synchronize(device)
        return None if bool((ones @ ones == 8).all()) else "wrong result"
    except (RuntimeError, TypeError) as error:
        return one_line(error)
