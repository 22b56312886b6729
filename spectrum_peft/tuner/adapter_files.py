"""What stands in an adapter's file: live slots only, exactly the tensors of the plan, and a plan that says the layers' ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from torch import Tensor, nn

from .. import names
from ..errors import MismatchError, near_matches
from ..records import ADAPTER_ACTIONS
from .columns import column_layers
from .config import SpectrumConfig
from .lorsa import singular_layers
from .parameters import base_of
from .places import alpha_for_scale, describe, is_fused, scale_of
from .ranks import is_sliced, live_rank

_PREFIX = "base_model.model."


def sliced_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """{module name in `model`: LoRA layer} of the layers whose rank may move."""
    return {name: module for name, module in model.named_modules() if is_sliced(module, adapter_name)}


def take_ranks(
    model: nn.Module, config: SpectrumConfig, adapter_name: str, state: dict[str, Tensor], where: str
) -> None:
    """Set every movable layer to the rank that the file holds for it, and pad the factors to the allocation, in place."""
    ranks = {}
    for name, layer in sliced_layers(model, adapter_name).items():
        a, b = (f"{name}.{factor}.{adapter_name}.weight" for factor in ("lora_A", "lora_B"))
        full_a, full_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if (a in state) != (b in state):
            raise MismatchError(f"{where} lacks {b if a in state else a}, and holds the other factor.")
        given_a = state.get(a, full_a.new_zeros((0, full_a.shape[1]), device="cpu"))
        given_b = state.get(b, full_b.new_zeros((full_b.shape[0], 0), device="cpu"))
        rank = given_a.shape[0]
        if rank > full_a.shape[0] or given_b.shape[1] != rank or given_a.shape[1:] != full_a.shape[1:]:
            raise MismatchError(
                f"{where} holds {a} with shape {tuple(given_a.shape)}, wanted at most {tuple(full_a.shape)}."
            )
        pad = full_a.shape[0] - rank
        state[a] = nn.functional.pad(given_a, (0, 0, 0, pad))
        state[b] = nn.functional.pad(given_b, (0, pad))
        layer.lora_variant[adapter_name].live = rank
        ranks[name.removeprefix(_PREFIX) + ".weight"] = rank
    if ranks and config.plan is not None:
        entries = []
        for e in config.plan.entries:
            if e.name in ranks and ranks[e.name] != e.rank:
                rank = ranks[e.name]
                alpha = alpha_for_scale(scale_of(e, config), rank, config) if rank else 0.0
                e = dataclasses.replace(e, rank=rank, alpha=alpha, active=e.active and rank > 0)
            entries.append(e)
        describe(config, config.plan.replace(entries=tuple(entries)))


def follow_layers(model: nn.Module, config: SpectrumConfig, adapter_name: str) -> None:
    """Take into the plan the ranks that PEFT's EVA has given to the layers after the plan was made, 0 where it took one out.

    Args:
        model: the `PeftModel`, its tuner, or a model with adapters loaded into it.
    """
    if config.init_lora_weights != "eva" or config.plan is None:
        return
    layers = {
        name: module
        for name, module in base_of(model).named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    entries = []
    for entry in config.plan.entries:
        if entry.action in ADAPTER_ACTIONS and entry.trains and not is_fused(entry):
            layer = layers.get(names.module_name(entry.name))
            if layer is None:
                entry = dataclasses.replace(entry, action="freeze", rank=None, alpha=None)
            elif live_rank(layer, adapter_name) != entry.rank:
                rank = live_rank(layer, adapter_name)
                alpha = alpha_for_scale(layer.scaling[adapter_name], rank, config)
                entry = dataclasses.replace(entry, rank=rank, alpha=alpha)
        entries.append(entry)
    if tuple(entries) != config.plan.entries:
        describe(config, config.plan.replace(entries=tuple(entries)))


def live_tensors(model: nn.Module, adapter_name: str, selected: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's selection of an adapter's tensors, cut to the live slots: it opens as a plain LoRA of the ranks it holds."""
    for name, layer in sliced_layers(model, adapter_name).items():
        rank = live_rank(layer, adapter_name)
        a, b = (f"{name}.{factor}.{adapter_name}.weight" for factor in ("lora_A", "lora_B"))
        if a in selected and rank == 0:
            del selected[a], selected[b]
        elif a in selected:
            selected[a] = selected[a][:rank].contiguous()
            selected[b] = selected[b][:, :rank].contiguous()
    return selected


def checked_tensors(
    model: nn.Module, config: SpectrumConfig, adapter_name: str, mapped: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A file's tensors under the model's names, padded to what is allocated.

    Raises:
        MismatchError: a tensor is missing, unknown, or of another shape.
    """
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    wanted = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
    bare = {key: key.removeprefix(_PREFIX) for key in mapped}
    got = {bare[k] if k not in wanted and bare[k] in wanted else k: v for k, v in mapped.items()}
    where = f"adapter {adapter_name!r}: the file"
    take_ranks(model, config, adapter_name, got, where)
    missing = sorted(set(wanted) - set(got))
    if missing:
        raise MismatchError(f"{where} lacks {len(missing)} tensors of the plan, first {missing[0]}.")
    unknown = sorted(k for k in got if k not in wanted and (".lora_" in k))
    if unknown:
        raise MismatchError(
            f"{where} holds {len(unknown)} tensors that the plan does not know, first {unknown[0]}."
            + near_matches(unknown[0], wanted)
        )
    for key, value in got.items():
        if key in wanted and wanted[key].shape != value.shape:
            raise MismatchError(
                f"{where} holds {key} with shape {tuple(value.shape)}, wanted {tuple(wanted[key].shape)}."
            )
    for name, basis in singular_layers(model, adapter_name):
        basis.check_digest(got[f"{name}.lora_A.{adapter_name}.digest"], where)
    for name, part in column_layers(model, adapter_name):
        part.check(got[f"{name}.{part.factor}.{adapter_name}.{part.numbered}"], f"{where}: {name}")
    return got
