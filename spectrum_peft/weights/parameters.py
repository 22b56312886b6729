"""Parameters of the live model, out of a checkpoint's stored tensors: as a model class lays them out, or by the names alone
where no class can be asked (a file without its folder, custom code)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import names
from ..errors import CheckpointError
from . import model_types
from .layouts import Layout, Recipe
from .source import TensorInfo
from .towers import tower_in

if TYPE_CHECKING:
    from .forms import Form

# Modules of those models that are built of Conv1D.
_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
# Buffers that old files carry among the weights.
_BUFFERS = re.compile(
    r"(rotary_emb|rotary_pos_emb)\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$|position_ids$"
)
_EXPERT = re.compile(
    r"^(?P<owner>.*\.experts)\.(?P<expert>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$"
)


@dataclass(frozen=True)
class Logical:
    """A parameter of the live model and the stored tensors it is made of: `parts[e]` are joined along the rows.

    `slab` means that one stored tensor holds all experts, one after the other. With a `recipe`, elements are mixed and
    transformers' own operations make the parameter.
    """

    info: TensorInfo
    parts: tuple[tuple[str, ...], ...]
    slab: bool = False
    recipe: Recipe | None = None


def by_layout(layout: Layout, forms: Mapping[str, Form]) -> Iterator[Logical]:
    """The parameters that a class takes from a checkpoint, in the order of the stored tensors."""
    for name, recipe in layout.recipes.items():
        first = recipe.stored[0]
        if first not in forms:
            continue
        word, role, tower = forms[first].word, layout.roles[name], tower_in(layout.towers, name)
        turned = name in layout.transposed and not forms[first].turned
        if recipe.places is None:
            shape = layout.shapes[name]
            experts = _experts(role, shape)
            yield Logical(TensorInfo(name, shape, word, role, experts, turned, tower), (), recipe=recipe)
            continue
        stored = sorted((row, part) for part, (owner, row) in recipe.places.items() if owner == name)
        parts = tuple(part for _, part in stored)
        if len(parts) == 1 and len(forms[first].shape) == len(layout.shapes[name]):
            # Its own shape: a table, or a head, may have another number of rows than the class.
            shape = forms[first].shape
            experts = _experts(role, shape)
            yield Logical(TensorInfo(name, shape, word, role, experts, turned, tower), (parts,), experts is not None)
        else:
            shape = layout.shapes[name]
            experts = _experts(role, shape)
            info = TensorInfo(name, shape, word, role, experts, turned, tower)
            yield Logical(info, _by_expert(parts, forms, shape) if experts else (parts,))


def _experts(role: str, shape: Sequence[int]) -> int | None:
    return shape[0] if role == "linear" and len(shape) == 3 else None


def _by_expert(
    parts: tuple[str, ...], forms: Mapping[str, Form], shape: tuple[int, ...]
) -> tuple[tuple[str, ...], ...]:
    """The stored tensors of each expert, in order."""
    rows, at = shape[1], 0
    result: list[list[str]] = [[] for _ in range(shape[0])]
    for part in parts:
        result[at // rows].append(part)
        at += math.prod(forms[part].shape[:-1])
    return tuple(tuple(group) for group in result)


def by_names(forms: Mapping[str, Form], config: Mapping[str, Any]) -> Iterator[Logical]:
    """The tensors of a file as parameters of the live model, in checkpoint order, as far as names say it."""
    fused: dict[str, dict[int, dict[str, str]]] = {}
    renamed_moe = any(".block_sparse_moe.experts." in name for name in forms)
    conv1d = config.get("model_type") in model_types.CONV1D
    for name in forms:
        match = _EXPERT.match(name)
        if match:
            fused.setdefault(match["owner"], {}).setdefault(int(match["expert"]), {})[match["part"]] = name
    for name, form in forms.items():
        match = _EXPERT.match(name)
        if match:
            owner = match["owner"]
            if owner in fused:  # the first of them stands for all
                yield from _fuse(owner, fused.pop(owner), forms)
            continue
        if _is_buffer(name, form.shape):
            continue
        # transformers 5, conversion_mapping.py, "mixtral": `.block_sparse_moe.` -> `.mlp.`; GPTNeoXForCausalLM:
        # `embed_out.` -> `lm_head.`
        live = name.replace(".block_sparse_moe.", ".mlp.") if renamed_moe else name
        live = re.sub(r"^embed_out\.", "lm_head.", live)
        live = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", live))
        role = names.role(live, form.shape)
        slab = role == "linear" and len(form.shape) == 3
        turned = conv1d and names.module_name(live).rpartition(".")[2] in _CONV1D_NAMES and len(form.shape) == 2
        turned = turned and not form.turned
        info = TensorInfo(live, form.shape, form.word, role, form.shape[0] if slab else None, turned)
        yield Logical(info, ((name,),), slab)


def _fuse(owner: str, experts: dict[int, dict[str, str]], forms: Mapping[str, Form]) -> Iterator[Logical]:
    """One tensor per expert in the file, one 3-D parameter in the model.

    Source: transformers 5 conversion_mapping.py, "mixtral" (w1, w3 -> gate_up_proj; w2 -> down_proj) and "qwen2_moe".
    """
    live_owner = owner.replace(".block_sparse_moe.", ".mlp.")
    if sorted(experts) != list(range(len(experts))):
        raise CheckpointError(f"{owner}: experts are numbered {sorted(experts)}, wanted 0 to {len(experts) - 1}.")
    have = set(experts[0])
    recipes = {
        "gate_up_proj": next((pair for pair in (("w1", "w3"), ("gate_proj", "up_proj")) if have >= set(pair)), None),
        "up_proj": ("up_proj",) if "up_proj" in have and "gate_proj" not in have else None,
        "down_proj": next(((part,) for part in ("w2", "down_proj") if part in have), None),
    }
    for live, recipe in recipes.items():
        if recipe is None:
            continue
        parts = []
        shapes = set()
        for e in range(len(experts)):
            lacking = [part for part in recipe if part not in experts[e]]
            if lacking:
                raise CheckpointError(f"{owner}.{e}.{lacking[0]}.weight: not in the checkpoint, but expert 0 has it.")
            stored = tuple(experts[e][part] for part in recipe)
            if any(len(forms[name].shape) != 2 for name in stored):
                raise CheckpointError(
                    f"{owner}.{e}: has weights of {[forms[n].shape for n in stored]}, wanted matrices."
                )
            shapes.add((sum(forms[name].shape[0] for name in stored), *forms[stored[0]].shape[1:]))
            parts.append(stored)
        if len(shapes) > 1:
            raise CheckpointError(
                f"{owner}.*.{recipe[0]}: the experts have the shapes {sorted(shapes)}, wanted one shape."
            )
        name = f"{live_owner}.{live}"
        shape = (len(parts), *shapes.pop())
        word = forms[parts[0][0]].word
        yield Logical(TensorInfo(name, shape, word, names.role(name, shape), len(parts)), tuple(parts))


def _is_buffer(name: str, shape: Sequence[int]) -> bool:
    # GPT-2's `attn.bias` of four dimensions is its causal mask; GPT-NeoX has `attention.bias` alike.
    match = _BUFFERS.search(name)
    return bool(match) and (not name.endswith(".bias") or len(shape) == 4)
