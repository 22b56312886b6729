"""The layer that PEFT lacks: a tuner layer whose adapter is the module's own weight.

`SpectrumLayer` wraps any module (Linear, Conv1D, a norm, fused experts, an attention with parameters of its own) and takes
chosen parameters out of it. Each adapter holds its value of them in a module of its own,
`lora_spectrum.<adapter>.<parameter>`. During a forward the active values stand in the base module's place, so the base
module's own code runs, whatever it is. The first adapter takes the base storage, so that no second copy lies on the device;
the original is kept where `keep_base` says. To the code around it the layer looks like the module it wraps: attributes,
children and dtypes are the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import CheckpointError, MismatchError, OptionError, SpectrumError


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

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Take the dtype that `nn.Module._apply(fn)` (`.half()`, `.to(torch.bfloat16)`) gives the rest of the model."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

    def replace(self, value: Tensor) -> None:
        """Keep another value instead, in main memory: that of a base state dict that was loaded.

        Raises:
            MismatchError: it has another shape.
        """
        if value.shape != self.shape:
            raise MismatchError(f"{self.name}: given with shape {tuple(value.shape)}, wanted {tuple(self.shape)}.")
        self._copy, self.reader, self.lost = value.detach().to("cpu", self.dtype, copy=True), None, False

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
            return self._copy.to(device=device, dtype=self.dtype)
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
        # PEFT's switch (`disable_input_dtype_casting`): off, the layer computes in the base's dtype.
        self.cast_input_dtype_enabled: bool = True

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

    def take_base_dtype(self, adapter_name: str) -> None:
        """Hold an adapter's values in the dtype that the module had."""
        if adapter_name in self.lora_spectrum:
            for name, parameter in self.lora_spectrum[adapter_name].named_parameters():
                parameter.data = parameter.data.to(self.originals[name].dtype)

    # --- the wrapped module's face --------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """What the layer itself lacks is the wrapped module's: its children, its settings, its methods.

        Private names stay each module's own: libraries keep their marks in them (hooks, FSDP's state).
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return self._shown(name) if name in self.__dict__["originals"] else getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base_layer")
        own = base is None or name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if own or not any(name in kept for kept in (vars(base), base._modules, base._buffers, base._parameters)):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def _shown(self, name: str) -> Tensor:
        """The value in force of a held parameter, in the dtype that the rest of the model believes it has."""
        if self.merged:
            value: Tensor = getattr(self.base_layer, name)
            return value
        return self.current()[name].to(self.originals[name].dtype)

    @property
    def weight(self) -> Tensor:
        """The weight in force; transformers reads it in places (T5 casts to the dtype of `wo.weight`)."""
        return self._shown("weight") if "weight" in self.originals else self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self._shown("bias") if "bias" in self.originals else self.base_layer.bias

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self._device

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
        return self._values_of(None if self.disable_adapters else self._live_adapter())

    def _values_of(self, adapter: str | None) -> dict[str, Tensor]:
        held = dict(self.lora_spectrum[adapter].named_parameters()) if adapter in self.lora_spectrum else {}
        return {name: held[name] if name in held else o.read(self._device) for name, o in self.originals.items()}

    @contextmanager
    def _in_place(self, values: dict[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[None]:
        slots = self.base_layer._parameters
        # A float32 weight beside a bfloat16 bias: one module computes in one dtype.
        others = {n: p for n, p in slots.items() if p is not None and n not in values and p.is_floating_point()}
        for name, value in values.items():
            slots[name] = value
        for name, other in others.items():
            if dtype is not None and other.dtype != dtype:
                slots[name] = other.to(dtype)
        try:
            yield
        finally:
            for name in values:
                slots[name] = None
            slots.update(others)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base module's forward with the values in force, returned in the input's dtype.

        A module without parts computes in the dtype of the held values. One with parts (an attention with parameters of its
        own) computes in the base's: what it hands to its parts must be what they, and the masks that come in, expect.

        Args:
            adapter_names: of each row of the batch, `__base__` for none; as PEFT's layers take it.
        """
        if self.merged:
            if adapter_names is not None:
                raise OptionError(
                    f"{self.module_name}: adapter_names goes with adapters that are not merged; call unmerge_adapter first."
                )
            if not self.disable_adapters:
                return self.base_layer(*args, **kwargs)
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._rows(adapter_names, args, kwargs)
        return self._computed(self.current(), args, kwargs)

    def _computed(self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if has_parts(self.base_layer) or not self.cast_input_dtype_enabled:
            with self._in_place(self._outward(values)), self._in_place_again():
                return self.base_layer(*args, **kwargs)
        dtype = next(iter(values.values())).dtype
        given = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        args = tuple(_cast(a, dtype) for a in args)
        kwargs = {k: _cast(v, dtype) for k, v in kwargs.items()}
        with self._in_place(values, dtype):
            result = self.base_layer(*args, **kwargs)
        if given is not None and isinstance(result, Tensor) and result.dtype != given and result.is_floating_point():
            result = result.to(given)
        return result

    def _outward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.originals[name].dtype) for name, value in values.items()}

    @contextmanager
    def _in_place_again(self) -> Iterator[None]:
        """Let a block that checkpoints itself (transformers' `GradientCheckpointingLayer`) have its values once more when it
        runs again in backward, where this layer's forward is long over."""
        base: Any = self.base_layer
        checkpoint = getattr(base, "_gradient_checkpointing_func", None)
        if checkpoint is None:
            yield
            return

        def checkpointed(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run_with_values(*inputs: Any) -> Any:
                with self._in_place(self._outward(self.current())):
                    return run(*inputs)

            return checkpoint(run_with_values, *args, **kwargs)

        base._gradient_checkpointing_func = checkpointed
        try:
            yield
        finally:
            base._gradient_checkpointing_func = checkpoint

    def _rows(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Each row of the batch with the values of its own adapter.

        Raises:
            OptionError: the module does not compute row by row, as far as can be told.
        """
        x = args[0] if args else None
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if (
            has_parts(self.base_layer)
            or not isinstance(x, Tensor)
            or any(v.shape[:-1] != x.shape[:-1] for v in tensors)
        ):
            raise OptionError(
                f"adapter_names: the real weights of {self.module_name} ({type(self.base_layer).__name__}) cannot differ "
                "from row to row; run the rows of one adapter at a time, with set_adapter."
            )
        if len(x) != len(names):
            raise OptionError(
                f"adapter_names has {len(names)} names, the input of {self.module_name} has {len(x)} rows; wanted one name "
                "for each row."
            )
        result = None
        for adapter in dict.fromkeys(names):
            rows = torch.tensor([i for i, name in enumerate(names) if name == adapter], device=x.device)
            part = self._computed(
                self._values_of(adapter),
                tuple(a[rows] if isinstance(a, Tensor) else a for a in args),
                {k: v[rows] if isinstance(v, Tensor) else v for k, v in kwargs.items()},
            )
            if result is None:
                result = part.new_empty((len(names), *part.shape[1:]))
            result[rows] = part
        assert result is not None
        return result

    # --- merge, unload, delete ------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapter's values into the base module, in the base's own dtype."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_spectrum]
        if not names:
            return
        refuse_two_values_of(self.module_name, [*self.merged_adapters, *names])
        held = dict(self.lora_spectrum[names[0]].named_parameters())
        for name, value in held.items():
            if safe_merge and not torch.isfinite(value).all():
                raise CheckpointError(
                    f"{self.module_name}.{name}: NaNs detected in the merged weights. The adapter {names[0]} seems to be "
                    "broken; it was not merged."
                )
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
                self._unload_parts(merge, safe_merge, adapter_names)
                return self.base_layer
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:
            for name, original in self.originals.items():
                self.base_layer._parameters[name] = nn.Parameter(
                    original.read(self._device).clone(), requires_grad=False
                )
        self._unload_parts(merge, safe_merge, adapter_names)
        return self.base_layer

    def _unload_parts(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Unload the tuner layers inside the wrapped module: PEFT looks for none inside a tuner layer."""
        layers = [
            (name, part)
            for name, part in self.base_layer.named_modules()
            if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        done: tuple[str, ...] = ()
        for name, part in layers:
            if name.startswith(done):
                continue
            layer: Any = part
            if hasattr(layer, "unload_and_optionally_merge_module"):
                bare = layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            else:
                if merge:
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                bare = layer.get_base_layer()
            parent, _, leaf = name.rpartition(".")
            setattr(self.base_layer.get_submodule(parent), leaf, bare)
            done = (*done, f"{name}.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        return self._device, None  # the dtype of the held values is ours to choose

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectrumLayer:
        super()._apply(fn, recurse)
        for original in self.originals.values():
            original.follow(fn)
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


def has_parts(module: nn.Module) -> bool:
    """Whether other modules lie in it: an attention, not a Linear."""
    return bool(module._modules)


def refuse_two_values_of(module: str, adapters: list[str], verb: str = "merge") -> None:
    """
    Raises:
        OptionError: more than one adapter has a value for a module that can have one.
    """
    if len(adapters) > 1:
        raise OptionError(
            f"{module}: adapters {adapters} each hold a value of it, and a weight has one; {verb} one of them, such as "
            f"{adapters[0]!r}."
        )


def refuse_two_values(model: nn.Module, adapter_names: list[str] | None, verb: str = "merge") -> None:
    """Ask every module whether adapters can be merged, or active, together, before anything is done.

    Args:
        adapter_names: as in PEFT's `merge_adapter`; None for the active ones.
        verb: what to do with one of them instead, for the message.
    Raises:
        OptionError: as above.
    """
    for path, module in model.named_modules():
        if isinstance(module, SpectrumLayer):
            asked = module.active_adapters if adapter_names is None else adapter_names
            have = [n for n in asked if n in module.lora_spectrum]
            refuse_two_values_of(module.module_name, list(dict.fromkeys([*module.merged_adapters, *have])), verb)
        elif isinstance(module, ModulesToSaveWrapper) and adapter_names is not None:
            refuse_two_values_of(path, [n for n in adapter_names if n in module.modules_to_save], verb)


class Aside:
    """Layers around modules with parts, kept out of a model while PEFT puts adapters into it.

    PEFT looks for no targets inside a tuner layer, and names what lies in one otherwise than the plan does.

    Use:
        with Aside(model) as aside: ...  # layers that are added to `aside` go into the model at the end
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: dict[int, tuple[nn.Module, str, SpectrumLayer]] = {}
        self._trained: list[tuple[nn.Parameter, bool]] = []

    def __enter__(self) -> Aside:
        for path, module in list(self._model.named_modules()):
            if isinstance(module, SpectrumLayer) and has_parts(module.base_layer):
                parent, _, leaf = path.rpartition(".")
                self.add(self._model.get_submodule(parent), leaf, module)
                self._trained += [(p, p.requires_grad) for p in module.lora_spectrum.parameters()]
        for parent_, leaf, layer in self._places.values():
            parent_._modules[leaf] = layer.base_layer
        return self

    def add(self, parent: nn.Module, leaf: str, layer: SpectrumLayer) -> None:
        self._places[id(layer.base_layer)] = (parent, leaf, layer)

    def around(self, module: nn.Module) -> SpectrumLayer | None:
        """The layer that belongs around a module."""
        place = self._places.get(id(module))
        return place[2] if place else None

    def __exit__(self, *error: Any) -> None:
        for parent, leaf, layer in self._places.values():
            parent._modules[leaf] = layer
        for parameter, trained in self._trained:  # as PEFT: another adapter leaves what is there as it is
            parameter.requires_grad = trained


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
