"""export_axolotl: a plan as a config for axolotl."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import names
from ..errors import OptionError, near_matches
from ..records import ADAPTER_ACTIONS, PLAN_FILE, Plan, PlanEntry, write_text
from ..weights.adapters import AdapterState
from .adapters import open_adapter


def export_axolotl(
    adapter_or_plan: Any,
    out: str | os.PathLike[str],
    *,
    quantization: str | None = None,
    adapter_name: str | None = None,
) -> Path:
    """Write the part of an axolotl config that carries out the same plan: what trains, and how.

    Real weights become `unfrozen_parameters`; adapters become `adapter: lora` or `qlora`, with the modules by their full names
    and patterns for the ranks that are not the most frequent one. Data, batch size and learning rate are the user's to add.

    Args:
        adapter_or_plan: a Plan or its file, a folder that training has written, or a `PeftModel`.
        out: the YAML file.
        quantization: of the base: `none`, `nf4`, `fp4`, `int8`; None for what the training run noted, and for 4 bit
            where the mode is made for it.
    Raises:
        OptionError: the plan says what axolotl cannot: learning rates that differ, re-evaluation, real weights
            on a quantized base.
    Source of the keys: axolotl-ai-cloud/axolotl@00564c8 src/axolotl/utils/schemas/peft.py and config.py.
    """
    import yaml

    plan, state, known = _planned(adapter_or_plan, adapter_name)
    quantization = quantization or known or ("nf4" if plan.mode == "spectra_qlora" else "none")
    if quantization not in ("none", "nf4", "fp4", "int8"):
        raise OptionError(
            f"quantization is {quantization!r}." + near_matches(quantization, ("none", "nf4", "fp4", "int8"))
        )
    model = plan.model_id or (state.base if state else None)
    head = [f"# spectrum_peft: mode {plan.mode}, {len(plan.trainable_names)} of {len(plan.entries)} tensors train."]
    data: dict[str, Any] = {} if model is None else {"base_model": model}
    if plan.revision and not str(model or "").startswith(("/", ".")):
        data["revision_of_model"] = plan.revision
    adapters = [e for e in plan.entries if e.trains and e.action in ADAPTER_ACTIONS]
    if adapters:
        data |= _axolotl_lora(plan, adapters, {} if state is None else state.config, quantization)
        if "lora_rank_pattern" in data or "lora_alpha_pattern" in data:
            head.append("# The patterns need axolotl with its pull request 3673 (May 2026).")
    else:
        if quantization != "none":
            raise OptionError(
                f"axolotl trains real weights on a float base only, and the base is quantized ({quantization})."
            )
        data["unfrozen_parameters"] = list(plan.unfrozen_parameters)
    path = Path(out)
    write_text(path, "\n".join(head) + "\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))
    return path


def _planned(given: Any, adapter_name: str | None) -> tuple[Plan, AdapterState | None, str | None]:
    """(plan, adapter, quantization that the training run noted)."""
    if isinstance(given, Plan):
        return given, None, None
    if isinstance(given, str | os.PathLike):
        beside = Path(given) / PLAN_FILE
        if not Path(given).is_dir():
            return Plan.load(given), None, None
        if beside.is_file() and not (Path(given) / "adapter_config.json").is_file():  # real weights, a plain checkpoint
            return Plan.load(beside), None, None
    source = open_adapter(given, adapter_name)
    if source.state.plan is None:
        raise OptionError(
            f"{source.state.where}: carries no plan, so what trains is not known; export the adapter's own plan."
        )
    noted = source.quantization()
    if noted is not None and not isinstance(noted, str):
        fields = dict(noted) if isinstance(noted, Mapping) else noted.to_dict()
        noted = "int8" if fields.get("load_in_8bit") else fields.get("bnb_4bit_quant_type", "nf4")
    return source.state.plan, source.state, noted


def _anchored(entry: PlanEntry) -> str:
    """A pattern of PEFT that matches this module and no other."""
    fused = entry.shape is not None and len(entry.shape) == 3
    return "^" + re.escape(entry.name if fused else names.module_name(entry.name))


def _axolotl_lora(
    plan: Plan, adapters: Sequence[PlanEntry], config: Mapping[str, Any], quantization: str
) -> dict[str, Any]:
    scales = Counter((e.rank, e.alpha) for e in adapters)
    if plan.options.get("rescore_every") is not None:
        raise OptionError(
            f"rescore_every is {plan.options['rescore_every']!r}; axolotl cannot evaluate the choice again in training."
        )
    uneven = next((e for e in adapters if e.lr_ratio != 1.0), None)
    if uneven is not None:
        raise OptionError(
            f"{uneven.name} has lr_ratio {uneven.lr_ratio:g}; axolotl cannot say it. Plan with lr_ratio=(1, 1)."
        )
    shared = next((e for e in adapters if e.action != "lora"), None)
    if shared is not None:
        raise OptionError(f"{shared.name} has the action {shared.action!r}; axolotl knows plain LoRA only.")
    (rank, alpha), _ = scales.most_common(1)[0]
    for entry in adapters:
        if entry.rank is None or entry.alpha is None or entry.alpha != int(entry.alpha):
            raise OptionError(f"{entry.name}: alpha is {entry.alpha}; axolotl's lora_alpha is a whole number.")
    others = [e for e in adapters if (e.rank, e.alpha) != (rank, alpha)]
    fused = [e.name for e in adapters if e.shape is not None and len(e.shape) == 3]
    saved = [names.module_name(e.name) for e in plan.entries if e.trains and e.action == "save"]
    four = quantization in ("nf4", "fp4")
    data = {
        "adapter": "qlora" if four else "lora",
        "load_in_4bit": four,
        "load_in_8bit": quantization == "int8",
        "lora_r": rank,
        "lora_alpha": int(alpha or 0),
        # By pull request 3673 of axolotl-ai-cloud/axolotl, as PEFT's rank_pattern and alpha_pattern.
        "lora_rank_pattern": {_anchored(e): e.rank for e in others if e.rank != rank} or None,
        "lora_alpha_pattern": {_anchored(e): int(e.alpha or 0) for e in others if e.alpha != alpha} or None,
        "lora_dropout": float(config.get("lora_dropout") or 0.0),
        "lora_target_modules": [names.module_name(e.name) for e in adapters if e.name not in fused],
        "lora_target_parameters": fused or None,
        "lora_modules_to_save": list(dict.fromkeys(saved)) or None,
        "peft_use_rslora": bool(config.get("use_rslora") or plan.options.get("use_rslora")) or None,
        "peft_use_dora": bool(config.get("use_dora")) or None,
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"} if quantization == "fp4" else None,
    }
    return {key: value for key, value in data.items() if value is not None}
