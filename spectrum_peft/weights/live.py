"""Weights of a model in memory: PEFT's wrappers taken out of the names, adapters applied, quantized ones as floats."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import names
from ..errors import CheckpointError, TrainingSetupError
from ..records import Fingerprint
from .files import FileWeights
from .headers import find_shards
from .layouts import skeleton_like
from .quantized import int8_values, quantization_of, unpacked_4bit, values_of_4bit
from .roles import output_head, role_of
from .source import SAMPLE, TensorInfo, dtype_name, split_expert, split_found, structure_of
from .towers import tower_in, towers_of
from .unpacking import block_of, scaled


def expert_product(a: Tensor, b: Tensor, experts: int, expert: int) -> Tensor:
    """(out, in) float32: the product B A of one expert of a fused parameter.

    Args:
        a: (experts * rank, in). b: (out, rank * experts), the experts innermost.
    Source: peft 0.21 tuners/lora/layer.py, `ParamWrapper.get_delta_weight`.
    """
    rank = a.shape[0] // experts
    return b.view(b.shape[0], rank, experts)[:, :, expert].float() @ a.view(experts, rank, -1)[expert].float()


def apply_delta(weight: Tensor, delta: Tensor, magnitude: Tensor | None, transposed: bool = False) -> Tensor:
    """W + dW in float32; with DoRA's magnitudes m each output's row is rescaled to length m.

    Args:
        weight, delta: of one shape, (out, in), or (in, out) if `transposed`. magnitude: (out,) or None.
    Source: Liu et al. (2024), "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5.
    """
    changed = weight.float() + delta.to(weight.device, torch.float32)
    if magnitude is None:
        return changed
    along = 0 if transposed else 1
    length = torch.linalg.vector_norm(changed, dim=along, keepdim=True)
    rescaled: Tensor = changed * (magnitude.flatten().to(changed).reshape(length.shape) / length)
    return rescaled


@dataclass(frozen=True)
class _Live:
    """A parameter in memory and the PEFT layers around it, innermost first."""

    info: TensorInfo
    owner: nn.Module
    parameter: Tensor
    layers: tuple[nn.Module, ...] = ()
    scale: Tensor | None = None  # of a float8 weight that its layer keeps

    @property
    def quantized(self) -> bool:
        return self.info.dtype in {"nf4", "fp4", "int8"} or self.scale is not None


def base_module(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel and its tuner; any other module as it is."""
    # A PeftModel and a tuner both hold `peft_config`; so does a plain model with an adapter loaded into it, whose
    # `base_model` is a property and not a child.
    while hasattr(model, "peft_config"):
        if "base_model" in model._modules:
            model = model.get_submodule("base_model")
        elif "model" in model._modules and hasattr(model, "targeted_module_names"):
            model = model.get_submodule("model")
        else:
            break
    return model


def checkpoint_folder(model: nn.Module) -> Path | None:
    """The local folder that a model was loaded from: its path, or its snapshot in the hub's cache; None without one."""
    config = getattr(base_module(model), "config", None)
    origin = getattr(config, "_name_or_path", None)
    if not origin:
        return None
    if Path(origin).is_dir():
        return Path(origin)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(origin, "config.json", revision=getattr(config, "_commit_hash", None))
    except HFValidationError:  # a folder that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


def refuse_partitioned(model: nn.Module) -> None:
    """
    Raises:
        TrainingSetupError: DeepSpeed's zero.Init made the model: its weights lie in pieces elsewhere and are empty here.
    """
    empty = next((n for n, p in model.named_parameters() if hasattr(p, "ds_id") and not p.numel()), None)
    if empty is not None:
        raise TrainingSetupError(
            f"{empty} has shape (0,): the model was loaded under ZeRO-3, which partitions weights, so nothing can be scanned or "
            "planned on it. Load it before TrainingArguments(deepspeed=...), or by load_model_with_spectrum or `spectrum-peft "
            "train`, which load it whole and scan its files."
        )


class LiveWeights:
    """The parameters of a model in memory, under the base model's names, adapters applied.

    Quantized matrices are read from the model's own checkpoint folder where that is local and holds them in float, else
    dequantized one at a time; `notes` says which.
    """

    kind: Literal["live"] = "live"
    received: int | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = base_module(model)
        refuse_partitioned(self.model)
        config = getattr(self.model, "config", None)
        self.model_id: str | None = getattr(config, "_name_or_path", None) or None
        self.revision: str | None = getattr(config, "_commit_hash", None)
        self.folder = checkpoint_folder(self.model)
        self._live: dict[str, _Live] = {}
        groups: dict[int, list[str]] = {}
        head, towers = output_head(self.model), towers_of(self.model)
        for item in _walk(self.model, "", (), None, head):
            if towers:
                item = replace(item, info=replace(item.info, tower=tower_in(towers, item.info.name)))
            group = groups.setdefault(id(item.parameter), [])
            group.append(item.info.name)
            if len(group) == 1:
                self._live[item.info.name] = item
            elif item.info.role == "embedding":  # a table is one, wherever it lies first, as in the file
                first = self._live[group[0]]
                self._live[group[0]] = replace(first, info=replace(first.info, role="embedding"))
        self.tied = tuple(tuple(group) for group in groups.values() if len(group) > 1)
        if not self._live:
            raise CheckpointError(f"{type(model).__name__}: has no floating-point parameters.")
        self.notes: tuple[str, ...] = ()
        self._file_name: dict[str, str] = {}
        quantized = [item.info for item in self._live.values() if item.quantized]
        if quantized:
            self._file_name = self._float_twins(quantized)
            how = (
                f"read from the float checkpoint {self.folder}"
                if self._file_name
                else "dequantized one matrix at a time (no local float checkpoint)"
            )
            self.notes += (f"{len(quantized)} {quantized[0].dtype} weights were {how}",)
        if self.adapted:
            self.notes += ("scores are of the weights with the active adapters applied",)

    @cached_property
    def _files(self) -> FileWeights | None:
        """The checkpoint the model came from, or None where there is none to read."""
        if self.folder is None:
            return None
        try:
            shards, skeleton = find_shards(self.folder), skeleton_like(self.model)
            return FileWeights(shards, model_id=str(self.folder), folder=self.folder, skeleton=skeleton)
        except CheckpointError as error:
            self.notes += (f"the model's folder was not used: {error}",)
            return None

    def _float_twins(self, quantized: list[TensorInfo]) -> dict[str, str]:
        """{live name: name in the folder} if the folder holds every one of them in float, else {}."""
        if self._files is None:
            return {}
        stored = {t.name: t for t in self._files.tensors()}
        twins, packed = names.align([t.name for t in quantized], stored), self._files.quantized()
        fits = all(
            t.name in twins and stored[twins[t.name]].shape == t.shape and twins[t.name] not in packed
            for t in quantized
        )
        return twins if fits else {}

    def tensors(self) -> list[TensorInfo]:
        return [item.info for item in self._live.values()]

    @property
    def adapted(self) -> bool:
        """Whether active adapters are added to any of the weights."""
        return any(_changes(item) for item in self._live.values())

    def place(self, name: str) -> tuple[nn.Module, Tensor]:
        """The module that computes with a parameter, inside all PEFT layers around it, and the parameter itself.

        Raises:
            CheckpointError: the model has no such parameter.
        """
        item, _ = split_found(name, self._live, self.model_id or type(self.model).__name__)
        return item.owner, item.parameter

    def read(self, name: str) -> Tensor:
        base, expert = split_expert(name)
        item, expert = split_found(name, self._live, self.model_id or type(self.model).__name__)
        _refuse_meta(base, item.parameter)
        if item.quantized and base in self._file_name:
            assert self._files is not None
            weight = self._files.read(self._file_name[base])
        else:
            weight = _dequantized(item)
        if expert is not None:
            weight = weight[expert]
        for layer, adapter in _changes(item):
            if expert is None:
                delta = layer.get_delta_weight(adapter)
                delta = delta.T if item.quantized and item.info.transposed else delta
            else:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                delta = expert_product(a, b, layer.num_experts, expert) * layer.scaling[adapter]
                delta = delta if layer._did_swap_in_out_features else delta.T
            magnitudes = getattr(layer, "lora_magnitude_vector", {})
            magnitude = magnitudes[adapter].weight.detach() if adapter in magnitudes else None
            weight = apply_delta(weight, delta.detach(), magnitude, transposed=item.info.transposed)
        return weight

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(structure_of(self.tensors()), self._content, "live")

    @cached_property
    def _content(self) -> str | None:
        """That of the checkpoint folder, if it holds all weights in memory and they are still the ones in it."""
        return None if self._twins is None or len(self._twins) < len(self._plain()) else self.folder_content

    def _plain(self) -> list[_Live]:
        return [
            item
            for item in self._live.values()
            if item.info.role == "linear" and not item.quantized and not item.info.experts
        ]

    @cached_property
    def _twins(self) -> Mapping[str, str] | None:
        """{plain matrix: stored tensor} of those that the checkpoint folder holds; None without one."""
        if self._files is None or self.adapted:
            return None
        return names.align([item.info.name for item in self._plain()], {t.name: t for t in self._files.tensors()})

    @cached_property
    def folder_content(self) -> str | None:
        """That of the checkpoint folder, if what of it is in memory is still as there: a head that is new beside it does not
        count."""
        files, twins = self._files, self._twins
        if files is None or twins is None or (self._plain() and not twins):
            return None
        held = [item for item in self._plain() if item.info.name in twins]
        if all(_starts_alike(item.parameter, files, twins[item.info.name]) for item in held):
            return files.fingerprint().content
        self.notes += (f"the weights in memory are no longer those in {self.folder}",)
        return None

    def identity(self) -> str:
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            _refuse_meta(name, parameter)
            digest.update(json.dumps([name, str(parameter.dtype), list(parameter.shape)]).encode())
            flat = parameter.detach().reshape(-1)
            count = max(1, SAMPLE // flat.element_size())
            for part in (flat[:count], flat[-count:]):
                digest.update(part.contiguous().cpu().view(torch.uint8).numpy().data)
        for item in self._live.values():  # switching adapters on and off leaves every parameter as it is
            digest.update(json.dumps([item.info.name, [adapter for _, adapter in _changes(item)]]).encode())
        return digest.hexdigest()


def _walk(
    module: nn.Module, prefix: str, layers: tuple[nn.Module, ...], parent: nn.Module | None, head: nn.Module | None
) -> Iterator[_Live]:
    """The base model's parameters, PEFT's wrappers taken out of the names; `head` and `parent` as in `role_of`."""
    children = module._modules
    wrapped = children.get("base_layer")
    if wrapped is not None:
        layer: Any = module
        if "lora_spectrum" in children and not layer.merged:  # the base holds None where the layer has its own value
            for own, value in layer.current().items():
                yield _live(wrapped, prefix, own, value, (*layers, module), parent, head)
        yield from _walk(wrapped, prefix, (*layers, module), parent, head)
        return
    rows = children.get("token_adapter")
    if rows is not None:  # an embedding of which single rows train: its name is that of the wrapper around it
        yield from _walk(rows, prefix, layers, parent, head)
        return
    saved, original = children.get("modules_to_save"), children.get("original_module")
    if isinstance(saved, nn.ModuleDict) and original is not None:
        wrapper: Any = module
        active = [] if wrapper.disable_adapters else [a for a in wrapper.active_adapters if a in saved]
        inside = saved[active[0]] if active else original
        yield from _walk(inside, prefix, layers, parent, inside if original is head else head)
        return
    for name, parameter in module._parameters.items():
        if _is_scale(module, name):
            continue
        if parameter is not None and (parameter.is_floating_point() or quantization_of(parameter)):
            yield _live(module, prefix, name, parameter, layers, parent, head)
    for name, child in children.items():
        if child is not None:
            # What a wrapper says holds for the parameters of the wrapped module itself, not for modules inside it.
            yield from _walk(child, f"{prefix}{name}.", (), module, head)


def _live(
    owner: nn.Module,
    prefix: str,
    name: str,
    parameter: Tensor,
    layers: tuple[nn.Module, ...],
    parent: nn.Module | None = None,
    head: nn.Module | None = None,
) -> _Live:
    full = prefix + name
    shape = tuple(parameter.shape)
    dtype = quantization_of(parameter)
    if dtype in {"nf4", "fp4"}:
        shape = tuple(parameter.quant_state.shape)  # type: ignore[attr-defined]
    role = role_of(full, shape, owner, head, parent)
    experts = shape[0] if role == "linear" and len(shape) == 3 else None
    # transformers turns a Conv1D's matrix before bitsandbytes quantizes it; its name here means the matrix as stored.
    kind = getattr(owner, "source_cls", type(owner)) if dtype else type(owner)
    turned = kind.__name__ == "Conv1D" and len(shape) == 2
    shape = shape[::-1] if turned and dtype else shape
    return _Live(
        TensorInfo(full, shape, dtype or dtype_name(parameter.dtype), role, experts, turned),
        owner,
        parameter,
        layers,
        _scale_of(owner, name),
    )


def _scale_of(owner: nn.Module, leaf: str) -> Tensor | None:
    """What a float8 parameter is multiplied with, of a layer that keeps it so (transformers' FP8Linear, FP8Experts)."""
    parameter = owner._parameters.get(leaf)
    if parameter is None or parameter.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return None
    found = (getattr(owner, f"{leaf}{end}", None) for end in ("_scale_inv", "_scale"))
    return next((scale for scale in found if isinstance(scale, Tensor)), None)


def _is_scale(owner: nn.Module, leaf: str) -> bool:
    of = re.sub(r"_scale(_inv)?$", "", leaf)
    return of != leaf and _scale_of(owner, of) is not None


def _dequantized(item: _Live) -> Tensor:
    values = _layer_values(item)
    return values.T if item.quantized and item.info.transposed else values


def _layer_values(item: _Live) -> Tensor:
    """The matrix that the layer multiplies with."""
    if item.info.dtype in {"nf4", "fp4"}:
        return values_of_4bit(*unpacked_4bit(item.parameter, item.info.name))
    if item.info.dtype == "int8":
        # After the first forward the scales have moved from the parameter to the module's state.
        owner: Any = item.owner
        scale = getattr(item.parameter, "SCB", None)
        scale = owner.state.SCB if scale is None else scale
        return int8_values(item.parameter.detach(), scale.to(item.parameter.device))
    if item.scale is not None:
        size = getattr(item.owner, "block_size", None)
        block = block_of(item.info.shape, tuple(item.scale.shape), [tuple(size)] if size else ())
        if block is None:
            raise CheckpointError(
                f"{item.info.name}: has the shape {item.info.shape} and scales of the shape {tuple(item.scale.shape)}, wanted a "
                "scale for blocks of one size."
            )
        return scaled(item.parameter.detach(), item.scale.detach(), block)
    values = item.parameter.detach()
    return values.float() if values.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else values


def matrix_of(layer: nn.Module) -> Tensor:
    """The matrix (out, in) that a Linear, Conv1D or bitsandbytes layer multiplies with: dequantized, adapters left out.

    Raises:
        CheckpointError: the layer has no weight of a kind that is known here.
    """
    weight: Any = layer.weight
    if not (weight.is_floating_point() or quantization_of(weight)) or weight.ndim != 2:
        raise CheckpointError(
            f"{type(layer).__name__}: its weight of dtype {weight.dtype} and shape {tuple(weight.shape)} is no matrix that "
            "can be read, wanted a float one or one of bitsandbytes."
        )
    item = _live(layer, "", "weight", weight, ())
    values = _layer_values(item)
    return values.T if item.info.transposed and not item.quantized else values


def _changes(item: _Live) -> list[tuple[Any, str]]:
    """(PEFT layer, adapter) pairs whose product is added to this parameter now."""
    found: list[tuple[Any, str]] = []
    layer: Any
    for layer in reversed(item.layers):
        if not hasattr(layer, "get_delta_weight") or layer.disable_adapters or layer.merged:
            continue
        target = getattr(layer, "parameter_name", "weight")
        if target != item.info.name.rpartition(".")[2]:
            continue
        have = {*layer.lora_A, *layer.lora_embedding_A}
        found += [(layer, adapter) for adapter in layer.active_adapters if adapter in have]
    return found


def _refuse_meta(name: str, parameter: Tensor) -> None:
    if parameter.device.type == "meta":
        raise CheckpointError(
            f"{name}: lies on the meta device and has no values; give the checkpoint's folder instead."
        )


def _starts_alike(parameter: Tensor, files: FileWeights, name: str) -> bool:
    """Whether the first and last values of a parameter are those of the file, cast to the parameter's dtype."""
    head, tail = files.ends(name, SAMPLE)
    flat = parameter.detach().reshape(-1)
    return all(
        torch.equal(part.to(flat.dtype), mine.cpu())
        for part, mine in ((head, flat[: len(head)]), (tail, flat[len(flat) - len(tail) :]))
    )


def dequantized_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """{parameter: reads the float weight that its quantized layer computes with}, on the CPU; empty for a float model."""

    def reader(item: _Live) -> Callable[[], Tensor]:
        return lambda: _dequantized(item).cpu()

    return {item.info.name: reader(item) for item in _walk(base_module(model), "", (), None, None) if item.quantized}
