"""What is exported: an adapter from a folder without peft, or from a model in memory, and its base."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import names
from ..errors import CheckpointError, MismatchError, OptionError, near_matches
from ..records import RESULTS_FILE, checked, read_mapping
from ..records.schema import Name
from ..weights import (
    DTYPES,
    AdaptedWeights,
    FileWeights,
    TensorInfo,
    base_module,
    open_weights,
    read_config,
    seen_as_trained,
    skeleton_like,
)
from ..weights.adapters import AdapterState
from ..weights.updates import Stored, Update, Value, may_grow
from .quantized import quantization_settings, quantized_names


@dataclass(frozen=True)
class _Noted:
    """The fields of train_results.json that are read."""

    dtype: Name | None = None
    quantization: Name | None = None


@dataclass
class TrainedAdapter:
    """An adapter from a folder."""

    state: AdapterState

    @property
    def described(self) -> Mapping[str, Any]:
        """The config of the adapted model, where it is known: names of a new head's classes."""
        config = self.state.folder / "config.json" if self.state.folder else None
        return {} if config is None else read_config(config)

    def seen(self, files: FileWeights) -> FileWeights:
        """The base under the names of the class that was trained."""
        return seen_as_trained(files, self.state)

    def from_memory(self, base: Mapping[str, TensorInfo]) -> list[Value]:
        """New values that the adapter's own tensors do not hold; a folder has none."""
        return []

    @property
    def base_config(self) -> Mapping[str, Any]:
        """transformers' config of the base, of whatever is at hand; empty where nothing is."""
        if "model_type" not in self.described and self.state.base:
            from transformers import AutoConfig

            try:
                revision = self.state.config.get("revision")
                found = AutoConfig.from_pretrained(self.state.base, revision=revision, local_files_only=True)
            except Exception:  # each config class has its own errors for fields of wrong types
                return {}
            fields: Mapping[str, Any] = found.to_dict()
            return fields
        return self.described

    @property
    def noted(self) -> Mapping[str, Any]:
        """What the training run wrote down: `quantization` and `dtype` of its base among others."""
        results = self.state.folder / RESULTS_FILE if self.state.folder else None
        fields = read_mapping(results) if results is not None and results.is_file() else {}
        checked(fields, _Noted, results)
        return fields

    def quantization(self) -> Any:
        """How the base was quantized in training, a word or a config; None if nobody knows."""
        return self.noted.get("quantization")

    def dequantized(self, files: FileWeights, quantization: Any) -> dict[str, Callable[[], Tensor]]:
        """{parameter: reads the float weight that the quantized base computed with}, in its stored shape; of those that the
        base's files hold in float, since what they hold quantized is dequantized by itself."""
        from ..weights import through_quantization

        if files.quantized():
            return {}
        settings = quantization_settings(self.quantization() if quantization is None else quantization, self.state.plan)
        dtype = dtype_named(self.noted.get("dtype"))  # the base was cast to it before it was quantized
        infos = {t.name: t for t in files.tensors()}

        def reader(name: str) -> Callable[[], Tensor]:
            turned = infos[name].transposed  # bitsandbytes holds a Conv1D as (out, in)

            def read() -> Tensor:
                weight = files.read(name)
                weight = weight if dtype is None else weight.to(dtype)
                seen = through_quantization(weight.T if turned else weight, settings)
                return seen.T if turned else seen

            return read

        return {name: reader(name) for name in quantized_names(files, settings)}


@dataclass
class LiveAdapter(TrainedAdapter):
    """An adapter of a PeftModel."""

    model: nn.Module = field(kw_only=True)

    @property
    def described(self) -> Mapping[str, Any]:
        config = getattr(self.model, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            return {}
        inner = base_module(self.model)
        fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return fields | {"architectures": [type(inner).__name__]}

    def seen(self, files: FileWeights) -> FileWeights:
        return files.seen_by(skeleton_like(base_module(self.model)))

    def from_memory(self, base: Mapping[str, TensorInfo]) -> list[Value]:
        """Parameters of the model that its checkpoint lacks or has in another size: new heads, tables with new rows."""
        from ..tuner import base_parameters

        parameters = base_parameters(self.model)
        found = names.align(parameters, base)
        result = []
        for name, (owner, leaf) in parameters.items():
            parameter = owner._parameters.get(leaf)
            if parameter is None or not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
                continue
            info, stored = base.get(found.get(name, "")), Stored.in_memory(parameter)
            if info is None:
                result.append(Value(name, name, stored, new=True))
            elif info.shape != stored.shape:
                if not may_grow(info, stored.shape):
                    raise MismatchError(f"{name}: has the shape {stored.shape} in the model, {info.shape} in the base.")
                result.append(Value(info.name, name, stored))
        return result

    def quantization(self) -> Any:
        return getattr(getattr(self.model, "config", None), "quantization_config", None)

    def dequantized(self, files: FileWeights, quantization: Any) -> dict[str, Callable[[], Tensor]]:
        from ..weights import dequantized_weights

        if quantization is not None:
            raise OptionError("quantization is said by the model in memory; leave it out.")
        live = dequantized_weights(self.model)
        if not live and files.quantized():  # dequantized while it was loaded
            return {}
        if not live:
            raise OptionError("onto='dequantized': the model holds no quantized weights; use onto='original'.")
        found = names.align(live, [t.name for t in files.tensors()])
        lacking = [name for name in live if name not in found]
        if lacking:
            raise MismatchError(f"{lacking[0]}: is quantized in the model, and the base has no such parameter.")

        return {found[name]: read for name, read in live.items()}


def updates_of(source: TrainedAdapter, files: FileWeights) -> list[Update]:
    """What the adapter, and the model that it was taken from, change in the base's files."""
    infos = {t.name: t for t in files.tensors()}
    for first, *others in files.tied:
        infos = {
            n: dataclasses.replace(infos[first], name=n) for n in others if n not in infos and first in infos
        } | infos
    memory = source.from_memory(infos)
    if files.layout is not None:  # sinusoids and their like, which the class makes by itself, belong in no file
        made = set(files.layout.shapes) - set(files.layout.new)
        memory = [value for value in memory if not value.new or value.name not in made]
    infos |= {v.name: dataclasses.replace(infos[v.name], shape=v.stored.shape) for v in memory if not v.new}
    updates = source.state.updates(infos.values(), files.config.get("model_type"))
    replaced = {u.name for u in updates if isinstance(u, Value)}
    return [*updates, *(value for value in memory if value.name not in replaced)]


def open_adapter(adapter: Any, adapter_name: str | None = None) -> TrainedAdapter:
    if isinstance(adapter, nn.Module):
        if not hasattr(adapter, "peft_config"):
            raise OptionError(
                f"the model is a plain {type(adapter).__name__} without an adapter: save_pretrained writes it as it is."
            )
        from ..tuner.factors import adapter_state

        return LiveAdapter(adapter_state(adapter, adapter_name), model=adapter)
    if not isinstance(adapter, str | os.PathLike):
        raise OptionError(f"adapter is a {type(adapter).__name__}, wanted a folder or a PeftModel.")
    if adapter_name is not None:
        raise OptionError(f"adapter_name={adapter_name!r} is for a model in memory; a folder holds one adapter.")
    return TrainedAdapter(AdapterState.from_folder(adapter))


def open_base(base: str | os.PathLike[str] | None, source: TrainedAdapter) -> FileWeights:
    if not base:
        raise OptionError(f"{source.state.where}: base_model_name_or_path is empty; say the base (--base).")
    if str(base).endswith(".gguf"):
        raise CheckpointError(
            f"{base}: a .gguf is no base to merge onto, wanted a folder of safetensors. Convert it first: "
            f"AutoModelForCausalLM.from_pretrained({str(Path(base).parent)!r}, gguf_file={Path(base).name!r}), then "
            "put its state_dict into a model made from its config without quantization_config, and save that."
        )
    revision = source.state.config.get("revision") if str(base) == source.state.base else None
    try:
        files = open_weights(base, revision)
    except CheckpointError as error:
        if str(base) != source.state.base:
            raise
        raise CheckpointError(
            f"{error} The adapter names it as its base; give another place with base (--base)."
        ) from error
    if isinstance(files, AdaptedWeights):
        raise CheckpointError(f"{base}: holds an adapter, wanted a model; adapter_config.json names its base.")
    if not isinstance(files, FileWeights) or files.folder is None:
        raise CheckpointError(
            f"{base}: is no checkpoint to merge onto, wanted a folder with config.json and safetensors files."
        )
    if not files.config:
        raise CheckpointError(f"{files.folder}: has no config.json, wanted a checkpoint that transformers opens.")
    return source.seen(files)


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        known = {str(d).removeprefix("torch."): d for d in DTYPES.values() if d.is_floating_point}
        if dtype.removeprefix("torch.") not in known:
            raise OptionError(f"dtype is {dtype!r}." + near_matches(dtype, known))
        return known[dtype.removeprefix("torch.")]
    return dtype
