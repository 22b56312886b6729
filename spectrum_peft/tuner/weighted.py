"""A new adapter that is a weighted sum of others: PEFT's `add_weighted_adapter`, for every kind of low-rank adapter here.

PEFT copies the config of the first adapter, gives every layer one rank, and takes the scale for 1. Here a plan says both, layer
by layer, so the sum gets a plan of its own: mode `lora`, at each module the rank that the combination needs there, scale 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import names
from ..errors import OptionError, near_matches
from ..plan import check_options
from ..records import ADAPTER_ACTIONS, Plan, PlanEntry
from .config import SpectrumConfig

# Combinations of the factors themselves, which need one rank in all adapters; the others form the sum of the products.
OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
OF_PRODUCTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


def check_summands(
    model: nn.Module, configs: Mapping[str, Any], adapters: Sequence[str], weights: Sequence[float], combination: str
) -> str:
    """Refuse what no weighted sum of low-rank products is; returns the combination, `linear` for a single adapter.

    Raises:
        OptionError: an adapter is unknown, or changes the model by something else; an unknown combination.
    """
    if not adapters or len(adapters) != len(weights):
        raise OptionError(
            f"add_weighted_adapter: {len(adapters)} adapters and {len(weights)} weights, wanted one for each."
        )
    for name in adapters:
        if name not in configs:
            raise OptionError(f"add_weighted_adapter: no adapter is called {name!r}." + near_matches(name, configs))
        _check_summand(name, configs[name])
    if combination not in (*OF_FACTORS, *OF_PRODUCTS, "cat"):
        raise OptionError(
            f"combination_type is {combination!r}." + near_matches(combination, (*OF_FACTORS, *OF_PRODUCTS, "cat"))
        )
    if len(adapters) == 1:
        return "linear"
    for name in adapters:
        if combination in OF_FACTORS and any(e.components or e.columns or e.rows for e in configs[name].plan.entries):
            raise OptionError(
                f"combination_type={combination!r} mixes factors, and those of adapter {name!r} are a basis of its own; use "
                "'svd' or 'cat'."
            )
    return combination


def _check_summand(name: str, config: Any) -> None:
    start = f"add_weighted_adapter: adapter {name!r} "
    for entry in config.plan.entries:
        if entry.trains and entry.action not in ADAPTER_ACTIONS:
            raise OptionError(
                f"{start}trains {entry.name} itself, and a sum of low-rank products does not hold it. Merge each adapter into a "
                "copy of the base, and average the checkpoints."
            )
        if entry.trains and entry.shape is not None and len(entry.shape) == 3:
            raise OptionError(
                f"{start}adapts fused experts ({entry.name}), whose sums PEFT does not form; exclude them."
            )
    for field in ("use_dora", "lora_bias"):
        if getattr(config, field):
            raise OptionError(f"{start}has {field}=True: its change is no product of two factors; merge it instead.")


def sum_plan(
    model: nn.Module, configs: Mapping[str, Any], adapters: Sequence[str], combination: str, svd_rank: int | None
) -> Plan:
    """The plan of the sum: every module that one of the adapters changes, with the rank that the combination needs there.

    Raises:
        OptionError: a combination of factors, and their ranks differ in a module.
    """
    ranks: dict[str, dict[str, int]] = {}
    for adapter in adapters:
        for entry in configs[adapter].plan.entries:
            layer: Any = model.get_submodule(names.module_name(entry.name))
            if entry.action in ADAPTER_ACTIONS and adapter in getattr(layer, "lora_A", ()):
                ranks.setdefault(entry.name, {})[adapter] = layer.lora_A[adapter].weight.shape[0]
    entries = []
    known: dict[str, PlanEntry] = {}
    for adapter in adapters:
        known |= {e.name: e for e in configs[adapter].plan.entries if e.name not in known}
    for name, entry in known.items():
        bare = PlanEntry(name, "freeze", kind=entry.kind, shape=entry.shape, score=entry.score)
        if name in ranks:
            rank = _rank(name, ranks[name], combination, svd_rank, entry)
            bare = dataclasses.replace(bare, action="lora", rank=rank, alpha=float(rank))
        entries.append(bare)
    first = configs[adapters[0]].plan
    return Plan(
        "lora", tuple(entries), check_options(mode="lora"), first.criterion, first.fingerprint, first.model_id,
        first.revision, first.total_parameters,
    )  # fmt: skip


def _rank(name: str, ranks: Mapping[str, int], combination: str, svd_rank: int | None, entry: PlanEntry) -> int:
    if combination == "cat":
        return sum(ranks.values())
    if combination in OF_PRODUCTS:
        return min(svd_rank or max(ranks.values()), *(entry.shape or ()))
    if len(set(ranks.values())) > 1:
        raise OptionError(
            f"combination_type={combination!r} needs one rank in all adapters, and in {name} they have {dict(ranks)}; use 'svd' "
            "or 'cat'."
        )
    return next(iter(ranks.values()))


def sum_config(plan: Plan, like: Any) -> SpectrumConfig:
    """The config of the sum: what says where an adapter belongs as in another's, and the sum's own plan."""
    rank = max((e.rank or 0 for e in plan.entries), default=0)
    return SpectrumConfig(
        plan=plan,
        r=rank,
        lora_alpha=rank,
        task_type=like.task_type,
        base_model_name_or_path=like.base_model_name_or_path,
        revision=like.revision,
        keep_base=like.keep_base,
        trainable_dtype=like.trainable_dtype,
    )


@torch.no_grad()
def fill(
    model: nn.Module,
    plan: Plan,
    adapter_name: str,
    factors: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Write the sum's factors into its layers.

    Args:
        factors: (layer, its A, its B) to the sum's (A, B).
    """
    for entry in plan.entries:
        if entry.action in ADAPTER_ACTIONS:
            layer: Any = model.get_submodule(names.module_name(entry.name))
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            new_a, new_b = factors(layer, a, b)
            a.copy_(new_a)
            b.copy_(new_b)


def concatenated(layer: Any, adapters: Sequence[str], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(A, B) with the factors of all adapters side by side: exactly the weighted sum."""
    have = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.lora_A]
    a = torch.cat([layer.lora_A[name].weight * (weight * layer.scaling[name]) for name, weight in have])
    return a, torch.cat([layer.lora_B[name].weight for name, _ in have], dim=1)
