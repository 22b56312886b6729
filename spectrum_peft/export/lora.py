"""export_lora: an adapter as a LoRA for plain peft."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import names
from ..card import write_card
from ..errors import CheckpointError, OptionError
from ..records import whole_folder, write_text
from ..weights.adapters import PEFT_PREFIX, AdapterState
from ..weights.updates import LowRank, Value
from ..weights.writer import SafetensorsWriter, header_bytes
from .adapters import open_adapter
from .folder import TOKENIZER_FILES, checked_out, copy_entry

# Fields of an adapter's config that say what it is and are the same in a plain LoRA.
_KEPT_FIELDS = (
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "lora_dropout",
    "fan_in_fan_out", "bias", "use_rslora", "use_dora", "lora_bias", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip


def export_lora(
    adapter_or_model: Any, out: str | os.PathLike[str], *, adapter_name: str | None = None, uniform_rank: bool = False
) -> Path:
    """Write an adapter as a LoRA that plain peft opens, without spectrum_peft: the same function, the same factors.

    Every low-rank update is written from its factors (B, A, scale), with `rank_pattern` and `alpha_pattern`; modules
    that train whole go into `modules_to_save`. A plain PEFT LoRA comes out as it is.

    Args:
        adapter_or_model: folder of an adapter, or a `PeftModel`.
        out: folder to write; must not exist, or be empty.
        adapter_name: which adapter of a model in memory; None for the active one.
        uniform_rank: pad every factor with zeros to the largest rank, and let all have one alpha, without patterns: for
            readers that know one alpha, such as llama.cpp's. Exact where all scales are the same (`lora`, `alors`); where they
            differ, B takes the quotient, which is rounded once to B's dtype unless it is a power of two.
    Raises:
        OptionError: real weights were trained, which are no low-rank update; `out` is not empty; one rank of a plain LoRA,
            which is exported as it is.
        CheckpointError, MismatchError: as in `merge_into_base`.
    """
    source = open_adapter(adapter_or_model, adapter_name)
    target = checked_out(out)
    state = source.state
    if state.config["peft_type"] == "LORA":
        if uniform_rank:
            raise OptionError(f"{state.where}: is a plain LoRA, which is exported as it is; uniform_rank is for ours.")
        config = json.loads(json.dumps(state.config, default=_as_json))
        tensors = {key: stored.whole() for key, stored in state.tensors.items()}
    else:
        config, tensors = _as_lora(state, source.base_config, uniform_rank)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{state.where}: {key} holds NaN or Inf, so the run that made it came to nothing.")
    with whole_folder(target) as folder:
        order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
        header = header_bytes({k: (tensors[k].dtype, tuple(tensors[k].shape)) for k in order}, {"format": "pt"}, order)
        size = sum(tensor.nbytes for tensor in tensors.values())
        with SafetensorsWriter(folder / "adapter_model.safetensors", header, size) as writer:
            at = 0
            for key in order:
                writer.write(tensors[key], at)
                at += tensors[key].nbytes
        if state.folder is not None:
            for entry in sorted(state.folder.iterdir()):
                # config.json has the names of a classifier's labels, and with them the size of its head.
                if TOKENIZER_FILES.fullmatch(entry.name) or entry.name == "config.json":
                    copy_entry(entry, folder)
        write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_card(folder, records=state.folder, name=target.name)
    return target


def _as_json(value: Any) -> Any:
    """What PEFT configs hold beside plain data: sets, enums, small dataclasses."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return getattr(value, "value", str(value))


def _as_lora(
    state: AdapterState, base: Mapping[str, Any], uniform_rank: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, {key: tensor}) of a plain LoRA with the same function."""
    from ..tuner.retargeting import misread_in, retargeted, types_in  # brings peft, which no merge needs

    updates = state.updates(state.planned())
    by_name = {} if state.plan is None else state.plan.by_name
    for update in updates:
        entry = by_name.get(update.name)
        if isinstance(update, Value) and entry is not None and entry.action == "train":
            assert state.plan is not None
            seen = f"mode {state.plan.mode!r} trains real weights, first {update.name}: that is no low-rank update, so there "
            raise OptionError(
                f"{seen}is no LoRA of it. Merge it: merge_into_base(adapter, base, out).",
                shell=f"{seen}is no LoRA of it. Merge it: spectrum-peft merge.",
            )
    low = [u for u in updates if isinstance(u, LowRank)]
    if not low:
        raise OptionError(f"{state.where}: holds no low-rank update; merge it instead.")
    root = math.sqrt if state.config.get("use_rslora") else float
    ranks = {u.key: u.factors()[1].shape[-2] for u in low}
    alphas = {u.key: _whole_number(u.scale * root(ranks[u.key])) for u in low}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    padding = None
    if uniform_rank:
        scale = _most_common(u.scale for u in low)
        rank, alpha = max(ranks.values()), _whole_number(scale * max(ranks.values()))
        padding = _Padding(rank, scale)
        ranks, alphas = dict.fromkeys(ranks, rank), dict.fromkeys(alphas, alpha)
    # Where peft would take a module for an old name of fused experts, the layer is named as the parameter that it has.
    by_weight = retargeted(types_in(base), (u.module for u in low if u.experts is None))
    fused = {u.key for u in low if u.experts is not None or u.module in by_weight}
    lost = misread_in(base, dict.fromkeys(u.module for u in low if u.experts is None))
    if lost:
        module, read = next(iter(lost.items()))
        raise OptionError(
            f"{module}: plain peft takes it for {read} in a model of type {base.get('model_type')!r}, so the adapter would be "
            "missing there. Merge it instead."
        )
    if by_weight and any(u.magnitude is not None for u in low if u.module in by_weight):
        raise OptionError(
            f"{sorted(by_weight)[0]}: plain peft puts no DoRA beside it in a model of type {base.get('model_type')!r}, whose "
            "experts transformers fuses. Merge the adapter instead."
        )
    tensors: dict[str, Tensor] = {}
    saved = list(state.config.get("modules_to_save") or ())
    # Of a folder that is a plain LoRA already, what trains beside the adapters is stored under its own name.
    held = set(state.config.get("target_modules") or ()) - {u.module for u in low}
    for update in updates:
        if isinstance(update, LowRank):
            tensors |= _peft_tensors(update, padding)
        elif isinstance(update, Value) and ".lora_spectrum." in update.key:  # a norm that trains beside the adapters
            module, _, leaf = update.key.removeprefix(PEFT_PREFIX).partition(".lora_spectrum.")
            tensors[f"{PEFT_PREFIX}{module}.{leaf}"] = update.stored.whole()
            saved.append(module)
        else:
            tensors[update.key] = update.stored.whole()
            if isinstance(update, Value) and names.module_name(update.name) in held:
                saved.append(names.module_name(update.name))
    config = {
        **{key: state.config[key] for key in _KEPT_FIELDS if key in state.config},
        **({"use_rslora": False} if padding else {}),
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(u, fused): ranks[u.key] for u in low if ranks[u.key] != rank},
        "alpha_pattern": {_anchored(u, fused): alphas[u.key] for u in low if alphas[u.key] != alpha},
        "target_modules": sorted({u.module for u in low if u.key not in fused}),
        "target_parameters": sorted({_parameter(u) for u in low if u.key in fused}) or None,
        "modules_to_save": list(dict.fromkeys(saved)) or None,
    }
    if by_weight and config.get(
        "lora_dropout"
    ):  # which peft refuses beside parameters; it is the training's, not the function's
        config["lora_dropout"] = 0.0
    return json.loads(json.dumps(config, default=_as_json)), tensors


def _whole_number(value: float) -> float:
    """alpha / rank * rank is not always the alpha it was."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value


def _most_common(values: Iterable[Any]) -> Any:
    counted = Counter(values)
    return max(counted, key=lambda v: (counted[v], v))


def _parameter(update: LowRank) -> str:
    return update.name if update.experts is not None else f"{update.module}.weight"


def _anchored(update: LowRank, fused: Container[str]) -> str:
    return "^" + re.escape(_parameter(update) if update.key in fused else update.module)


@dataclasses.dataclass(frozen=True)
class _Padding:
    """One rank and one scale for all."""

    rank: int
    scale: float


def _peft_tensors(update: LowRank, padding: _Padding | None) -> dict[str, Tensor]:
    """The factors in PEFT's layout, from (B, A)."""
    b, a, _ = update.factors()
    if padding is not None:
        missing = padding.rank - a.shape[-2]
        if update.scale != padding.scale:
            b = (b.double() * (update.scale / padding.scale)).to(b.dtype)
        # Zeros in both: what they are multiplied with does not matter.
        a, b = pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
    if update.experts is not None:
        a, b = a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
    names_of = ("lora_embedding_A", "lora_embedding_B") if update.table else ("lora_A.weight", "lora_B.weight")
    found = {f"{PEFT_PREFIX}{update.key}.{leaf}": t.contiguous() for leaf, t in zip(names_of, (a, b), strict=True)}
    if update.magnitude is not None:
        found[f"{PEFT_PREFIX}{update.key}.lora_magnitude_vector"] = update.magnitude.whole()
    return found
