"""The layer that PEFT lacks: a tuner layer whose adapter is the module's own weight.

`SpectrumLayer` wraps any module (Linear, Conv1D, a norm, fused experts) and takes chosen parameters out of it. Each
adapter holds its value of them in a module of its own, `lora_spectrum.<adapter>.<parameter>`. During a forward the active
values stand in the base module's place, so the base module's own code runs, whatever it is. The first adapter takes the
base storage, so that no second copy lies on the device; the original is kept where `keep_base` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import MismatchError, SpectrumError


class HeldWeights(nn.Module):
    """One adapter's values of a module's chosen parameters, under the parameters' own names.

    A module and not a ParameterDict entry: its names read `<adapter>.weight`, which is what code that copies one adapter
    onto another by name (TRL's reference adapter) looks for.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))


class Original:
    """The value that a parameter had before any adapter: a copy in main memory, or a way to read it back.

    Args:
        tensor: the value; cloned to main memory, unless `reader` is given.
        reader: reads the value from the checkpoint, any float dtype, same shape.
        lost: neither is kept; asking for the value is an error.
        name: full parameter name, for messages.
    """

    def __init__(
        self, name: str, tensor: Tensor, *, reader: Callable[[], Tensor] | None = None, lost: bool = False
    ) -> None:
        self.name, self.dtype, self.shape, self.lost, self.reader = name, tensor.dtype, tensor.shape, lost, reader
        self._copy = None if reader or lost else tensor.detach().to("cpu", copy=True)

    @property
    def kept(self) -> Tensor | None:
        """The copy in main memory, where there is one."""
        return self._copy

    def read(self, device: torch.device) -> Tensor:
        """The original on `device`, in its own dtype; on the CPU the kept copy itself, which must not be written to.

        Raises:
            SpectrumError: `keep_base='none'`.
            MismatchError: the checkpoint's tensor has another shape by now.
        """
        if self._copy is not None:
            return self._copy.to(device)
        if self.lost or self.reader is None:
            raise SpectrumError(
                f"{self.name}: the original weight was not kept (keep_base='none'), so disable_adapter(), unmerge, "
                "unload and a second adapter are not possible; load with keep_base='host' or 'file'."
            )
        value = self.reader()
        if value.shape != self.shape:
            raise MismatchError(f"{self.name}: read back with shape {tuple(value.shape)}, wanted {tuple(self.shape)}.")
        return value.to(device=device, dtype=self.dtype)


class SpectrumLayer(nn.Module, BaseTunerLayer):
    """Wraps `base_layer` so that chosen parameters of it train, one set of values per adapter.

    Args:
        base_layer: the module; keeps its code, its other parameters and its buffers.
        module_name: its name in the base model, for messages.
    """

    adapter_layer_names: tuple[str, ...] = ("lora_spectrum",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.lora_spectrum = nn.ModuleDict()
        self.originals: dict[str, Original] = {}
        self._device: torch.device = next(base_layer.parameters()).device
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(
        self,
        adapter_name: str,
        parameters: Sequence[str],
        *,
        dtype: torch.dtype | None,
        original: Callable[[str, Tensor], Original],
        inference_mode: bool = False,
    ) -> None:
        """Give an adapter its own values of some parameters.

        Args:
            parameters: names in the base module, such as `weight`.
            dtype: of the values; None for the parameter's own. Equal dtypes share the base's storage the first time.
            original: makes the keeper of a value that is taken out for the first time.
        """
        values = {}
        for name in parameters:
            if name in self.originals:
                value = self.originals[name].read(self._device).clone()
            else:
                base = self.base_layer._parameters.get(name)
                if base is None:
                    raise MismatchError(f"{self.module_name} has no parameter {name!r} that could train.")
                if not base.is_floating_point() or hasattr(base, "quant_state"):
                    raise MismatchError(
                        f"{self.module_name}.{name} is quantized ({base.dtype}, {type(base).__name__}), so its real weights "
                        "cannot train. Load the base with quantization_config_for(plan, model), which leaves the chosen "
                        "modules in 16 or 32 bit."
                    )
                self.originals[name] = original(f"{self.module_name}.{name}", base.data)
                value = base.data
                # None rather than an empty tensor: nothing of size 0 is left for state_dict, DDP or a move to meta.
                self.base_layer._parameters[name] = None
            values[name] = value if dtype is None else value.to(dtype)
        self.lora_spectrum[adapter_name] = HeldWeights(values)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    # --- which values are in force -------------------------------------------------------------------------------

    def _live_adapter(self) -> str | None:
        """The active adapter that has values here, or None."""
        names = [name for name in self.active_adapters if name in self.lora_spectrum]
        if len(names) > 1:
            raise SpectrumError(
                f"{self.module_name}: adapters {names} are active at once, and each replaces the weight; activate one."
            )
        return names[0] if names else None

    def current(self) -> dict[str, Tensor]:
        """{parameter name: value that the layer computes with now}; values of the base where no adapter is live."""
        adapter = None if self.disable_adapters else self._live_adapter()
        held = {} if adapter is None else dict(self.lora_spectrum[adapter].named_parameters())
        return {name: held[name] if name in held else o.read(self._device) for name, o in self.originals.items()}

    @contextmanager
    def _in_place(self, values: dict[str, Tensor]) -> Iterator[None]:
        slots = self.base_layer._parameters
        dtype = next((v.dtype for v in values.values()), None)
        # A float32 weight beside a bfloat16 bias: one module computes in one dtype, the held one's.
        others = {n: p for n, p in slots.items() if p is not None and n not in values and p.is_floating_point()}
        for name, value in values.items():
            slots[name] = value
        for name, other in others.items():
            if other.dtype != dtype:
                slots[name] = other.to(dtype)
        try:
            yield
        finally:
            for name in values:
                slots[name] = None
            slots.update(others)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, computed in the dtype of the held values, returned in the input's dtype."""
        if self.merged:
            if not self.disable_adapters:
                return self.base_layer(*args, **kwargs)
            self.unmerge()
        values = self.current()
        dtype = next(iter(values.values())).dtype
        given = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        args = tuple(_cast(a, dtype) for a in args)
        kwargs = {k: _cast(v, dtype) for k, v in kwargs.items()}
        with self._in_place(values):
            result = self.base_layer(*args, **kwargs)
        if given is not None and isinstance(result, Tensor) and result.dtype != given and result.is_floating_point():
            result = result.to(given)
        return result

    @property
    def weight(self) -> Tensor:
        """The weight in force; transformers reads it in places (T5 casts to the dtype of `wo.weight`)."""
        if "weight" in self.originals and not self.merged:
            return self.current()["weight"]
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        if "bias" in self.originals and not self.merged:
            return self.current()["bias"]
        return self.base_layer.bias

    # --- merge, unload, delete ------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapter's values into the base module, in the base's own dtype."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_spectrum]
        if not names:
            return
        if len(names) > 1 or self.merged_adapters:
            raise SpectrumError(
                f"{self.module_name}: cannot merge {names} over {self.merged_adapters}: each replaces the weight."
            )
        held = dict(self.lora_spectrum[names[0]].named_parameters())
        for name, value in held.items():
            if safe_merge and not torch.isfinite(value).all():
                raise SpectrumError(f"{self.module_name}.{name}: adapter {names[0]!r} holds NaN or Inf; not merged.")
        for name, original in self.originals.items():
            value = held[name].detach() if name in held else original.read(self._device)
            self.base_layer._parameters[name] = nn.Parameter(
                value.to(original.dtype, copy=name not in held or value.dtype == original.dtype), requires_grad=False
            )
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Take the merged values out again; the adapter's own values were never touched."""
        if not self.merged:
            return
        for name in self.originals:
            self.base_layer._parameters[name] = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base module with its parameters back in place: the adapter's values, or the originals."""
        if merge:
            if self.merged:  # merge_adapter() was called before: this is already the result
                return self.base_layer
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:
            for name, original in self.originals.items():
                self.base_layer._parameters[name] = nn.Parameter(
                    original.read(self._device).clone(), requires_grad=False
                )
        return self.base_layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        return self._device, None  # the dtype of the held values is ours to choose

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectrumLayer:
        super()._apply(fn, recurse)
        self._device = next((p.device for p in self.parameters()), self._device)
        return self

    def extra_repr(self) -> str:
        return f"parameters={sorted(self.originals)}"

    def __repr__(self) -> str:
        # Base modules print the shape of their weight (Llama's norms do), which is not there.
        if self.merged:
            return super().__repr__()
        with self._in_place({n: torch.empty(o.shape, dtype=o.dtype, device="meta") for n, o in self.originals.items()}):
            return super().__repr__()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
