"""Where a plan's entry goes in a model: into a layer of real weights, a LoRA layer, a module that trains whole; and the plan
in the words of PEFT's config."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .. import names
from ..records import ADAPTER_ACTIONS, REAL_WEIGHT_ACTIONS, Plan, PlanEntry

if TYPE_CHECKING:
    from .config import SpectrumConfig


def is_saved(entry: PlanEntry, config: SpectrumConfig) -> bool:
    """Trains as a whole module through PEFT's `modules_to_save`: embeddings, output heads, and what the user lists there."""
    if not entry.trains or entry.action != "save":
        return False
    listed = names.lies_in(entry.name, config.modules_to_save)
    return listed or names.in_head(entry.name) or names.role(entry.name, entry.shape) == "embedding"


def is_held(entry: PlanEntry, config: SpectrumConfig) -> bool:
    """Trains in a `SpectrumLayer`: real weights, and norms and biases that train with them."""
    if not entry.trains or entry.action not in REAL_WEIGHT_ACTIONS or is_saved(entry, config):
        return False
    if names.module_name(entry.name) in config.row_modules:
        return False
    return entry.action == "train" or not (config.bias != "none" and entry.name.endswith("bias"))


def is_movable(config: SpectrumConfig) -> bool:
    """Ranks may change in this process: layers are allocated at the largest rank."""
    return config.plan.options.get("rescore_every") is not None and not config.inference_mode


def is_placed(entry: PlanEntry, config: SpectrumConfig) -> bool:
    """Gets an adapter layer: it trains, it keeps trained factors, or its rank may grow during training."""
    return entry.action in ADAPTER_ACTIONS and (entry.trains or bool(entry.rank) or is_movable(config))


def allocated_rank(plan: Plan) -> int:
    """The largest rank that re-evaluation may give a layer, slots per layer."""
    options = plan.options
    ranks = [options.get("r_high"), options.get("r_medium"), *(e.rank for e in plan.entries)]
    if options.get("r_high") is None:
        ranks.append(options.get("r"))
    return max(r for r in ranks if r)


def pattern_of(name: str) -> str:
    """The key of a module or parameter in PEFT's patterns: its full name, anchored."""
    return "^" + re.escape(name)


def patterns_of(
    entries: Iterable[PlanEntry], config: SpectrumConfig, allocated: int | None = None
) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's `rank_pattern` and `alpha_pattern` for adapter entries, by anchored full name; the config's own are left out.

    Args:
        allocated: rank of every layer where ranks may move; alpha is then such that the scale is the live rank's.
    """
    ranks, alphas = {}, {}
    for entry in entries:
        key = pattern_of(entry.name if is_fused(entry) else names.module_name(entry.name))
        rank, alpha = entry.rank, entry.alpha
        if allocated is not None:
            alpha = alpha_for_scale(scale_of(entry, config), allocated, config)
            rank = allocated
        if rank != config.r:
            ranks[key] = rank
        if alpha != config.lora_alpha:
            alphas[key] = alpha
    return ranks, alphas


def scale_of(entry: PlanEntry, config: SpectrumConfig) -> float:
    """What the update of an adapter is multiplied by; for an empty slot, what a new adapter of rank r would get."""
    rank, alpha = (entry.rank, entry.alpha) if entry.rank else (config.r, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def alpha_for_scale(scale: float, rank: int, config: SpectrumConfig) -> float:
    return scale * (math.sqrt(rank) if config.use_rslora else rank)


def is_fused(entry: PlanEntry) -> bool:
    return entry.shape is not None and len(entry.shape) == 3


def describe(config: SpectrumConfig, plan: Plan) -> None:
    """Write the plan into the config's PEFT fields as a file with live slots only must have them."""
    config.plan = plan
    live = [e for e in plan.entries if e.action in ADAPTER_ACTIONS and e.rank]
    in_modules = [
        e for e in plan.entries if is_held(e, config) or (e.action in ADAPTER_ACTIONS and e.rank and not is_fused(e))
    ]
    config.target_modules = list(dict.fromkeys(names.module_name(e.name) for e in in_modules))
    config.rank_pattern, config.alpha_pattern = patterns_of(live, config)
