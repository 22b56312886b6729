"""The parameters of the model at hand under the names that it has without adapters: who owns each, what trains, what is tied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .. import names
from .layers import SpectrumLayer


def base_of(model: nn.Module) -> nn.Module:
    """The user's model inside a PeftModel or a tuner, with adapters still in it; a plain model is returned as it is."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def base_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """{full name in the base model: (module that owns the parameter, name there)}, as if no adapter were there.

    A tied tensor appears under each of its names. A parameter that a `SpectrumLayer` holds appears under its base name.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
        if isinstance(module, SpectrumLayer):
            for name in module.originals:
                yield f"{prefix}{name}", (module.base_layer, name)
        if isinstance(module, BaseTunerLayer):
            yield from walk(module.base_layer, prefix)
            return
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from walk(module.original_module, prefix)
            return
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}{name}", (module, name)
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{prefix}{name}.")

    return dict(walk(base_of(model), ""))


def plan_parameters(model: nn.Module, adapter_name: str | None = None) -> dict[str, str]:
    """{parameter name in `model`: name of the plan entry it belongs to}.

    With tuner layers: the parameters of `adapter_name` (None: of the active ones). On a plain model: every parameter.
    """
    found: dict[str, str] = {}

    def add(module: nn.Module, full: str, entry: str) -> None:
        for name, _ in module.named_parameters(prefix=full, remove_duplicate=False):
            found[name] = entry

    def wanted(module: Any, name: str) -> bool:
        return name == adapter_name if adapter_name else name in module.active_adapters

    def visit(module: nn.Module, full: str, clean: str) -> None:
        if isinstance(module, BaseTunerLayer):
            if isinstance(module, SpectrumLayer):
                for adapter, held in module.lora_spectrum.items():
                    if wanted(module, adapter):
                        for name, _ in held.named_parameters():
                            found[f"{full}lora_spectrum.{adapter}.{name}"] = f"{clean}{name}"
            else:
                leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
                for attribute in module.adapter_layer_names:
                    container = getattr(module, attribute)
                    if not isinstance(container, nn.ModuleDict | nn.ParameterDict):
                        continue
                    for adapter, child in container.items():
                        if not wanted(module, adapter):
                            continue
                        if isinstance(child, nn.Parameter):
                            found[f"{full}{attribute}.{adapter}"] = f"{clean}{leaf}"
                        else:
                            add(child, f"{full}{attribute}.{adapter}", f"{clean}{leaf}")
            visit(module.base_layer, f"{full}base_layer.", clean)
            return
        if isinstance(module, AuxiliaryTrainingWrapper):
            if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
                for adapter, child in module.modules_to_save.items():
                    if wanted(module, adapter):
                        for name, _ in child.named_parameters():
                            found[f"{full}modules_to_save.{adapter}.{name}"] = f"{clean}{name}"
            else:  # rows of an embedding (trainable_token_indices)
                for name, parameter in module.named_parameters():
                    if "original_module" not in name and "base_layer" not in name and parameter.requires_grad:
                        found[f"{full}{name}"] = f"{clean}weight"
            return
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{full}{name}.", f"{clean}{name}.")
        for name, parameter in module._parameters.items():
            if parameter is not None and (not wrapped or parameter.requires_grad):
                found[f"{full}{name}"] = f"{clean}{name}"

    wrapped = any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in model.modules())
    inner = base_of(model)
    start = next((f"{name}." if name else "" for name, module in model.named_modules() if module is inner), "")
    visit(inner, start, "")
    return found


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that the model calls its input embedding, with its wrapper; None where it names none."""
    try:
        found = base_of(model).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # no transformers model, or one without tokens
        return None
    return found if isinstance(found, nn.Module) else None


def embedding_module(model: nn.Module, present: dict[str, Any]) -> str | None:
    """Base name of the module that the model calls its input embedding; None where it names none with a weight."""
    embedding: Any = input_embedding(model)
    if embedding is None:
        return None
    embedding = getattr(embedding, "original_module", embedding)
    return next((names.module_name(n) for n, (owner, _) in present.items() if owner is embedding), None)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    by_tensor: dict[int, list[str]] = {}
    for name, (owner, leaf) in base_parameters(model).items():
        parameter = owner._parameters.get(leaf)
        if parameter is not None:
            by_tensor.setdefault(id(parameter), []).append(name)
    return {name: group for group in by_tensor.values() if len(group) > 1 for name in group}


def tied_modules(model: nn.Module, module: str) -> list[str]:
    """Modules whose weight is the same tensor as a module's, by their base names."""
    tied = tied_names(model).get(f"{module}.weight", ())
    return sorted(names.module_name(other) for other in tied if other != f"{module}.weight")


def modules_tied_to_embedding(model: nn.Module) -> list[str]:
    """Modules whose weight is the input embeddings' own tensor, whatever adapters are around them; by their base names."""
    name = embedding_module(model, base_parameters(model))
    return [] if name is None else tied_modules(model, name)
