"""What a parameter name says: which kind of matrix, in which block, in which role.

Pure string rules, no torch: a checkpoint's header and a live model must come to the same answers, and a scan must not
import model code to ask. Names are full parameter names in the base model, `model.layers.0.self_attn.q_proj.weight`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

# Words that name a list of blocks. Before a number they carry no meaning of their own (T5: `block.0.layer.1.`).
_STACK_WORDS = frozenset({"layer", "layers", "block", "blocks", "h"})
HEADS = frozenset(
    {
        "lm_head", "embed_out", "score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "cls",
        "summary", "v_head",
    }
)  # fmt: skip
# Modules that are a head where they lie outside the blocks, and something else inside.
_OUTER_HEADS = HEADS | {"head", "proj_out"}
# CTRL's table is `transformer.w`, outside the blocks (transformers, modeling_ctrl.py): see `role`.
_EMBEDDING = re.compile(
    r"(^|[._])embed(?!_out)|(^|_)emb$|^wte$|^wpe$|^shared$|relative_attention_bias|rotary|word_embeddings"
)
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
# Last matrices of an attention or MLP: what they put out is added to the residual stream.
_WRITES = frozenset(
    {
        "o_proj", "out_proj", "down_proj", "c_proj", "dense_4h_to_h", "out_lin", "lin2", "fc2", "fc_out", "wo", "w2", "o",
        "proj_out",
    }
)  # fmt: skip

Role = Literal["linear", "embedding", "head", "norm", "bias", "router", "other"]
ROLES: tuple[Role, ...] = get_args(Role)
# Parts of a model that sees or hears: the model that writes text (or only reads it), those that look or listen, and what
# leads from one to another.
Tower = Literal["language", "text", "vision", "audio", "projector"]


def module_name(name: str) -> str:
    """`a.b.weight` -> `a.b`; a fused expert parameter `mlp.experts.down_proj` -> `mlp.experts`."""
    return name.rpartition(".")[0]


def parents(name: str) -> Iterator[str]:
    """The module of a parameter, and the modules that this lies in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def lies_in(name: str, modules: Iterable[str] | None) -> bool:
    """Whether a parameter belongs to one of the modules, or to a part of one; modules as `modules_to_save` names them."""
    return any(part.endswith(wanted) for part in parents(name) for wanted in modules or ())


def is_number(part: str) -> bool:
    """Whether a part of a name counts blocks or experts. Other scripts' digits do not, nor do numbers of ten digits or more."""
    return part.isascii() and part.isdecimal() and len(part) < 10


def _block_part(parts: Sequence[str]) -> int | None:
    """Which part of a name is the block's number: the first number, but for those inside a head (`classifier.0`)."""
    for i, part in enumerate(parts):
        if part in HEADS:
            return None
        if is_number(part):
            return i
    return None


def block_index(name: str) -> int | None:
    """Number of the transformer block that a parameter lies in, or None outside the blocks."""
    parts = name.split(".")
    at = _block_part(parts)
    return None if at is None else int(parts[at])


def stack(name: str) -> str | None:
    """What stands before the block number: `model.layers`, `encoder.block`; None outside the blocks."""
    parts = name.split(".")
    at = _block_part(parts)
    return None if at is None else ".".join(parts[:at])


def _stack_labels(stacks: Sequence[str]) -> dict[str, str]:
    """Shortest prefix that tells the stacks apart; empty where there is only one."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    owners = {s: s.split(".")[:-1] for s in stacks}
    shared = 0
    while all(len(o) > shared for o in owners.values()) and len({o[shared] for o in owners.values()}) == 1:
        shared += 1
    labels = {s: ".".join(o[shared:]) for s, o in owners.items()}
    if len(set(labels.values())) < len(labels):  # two lists under one owner: their own names tell them apart
        labels = {s: ".".join([*owners[s][shared:], s.split(".")[-1]]) for s in stacks}
    return labels


def kinds(names: Iterable[str]) -> dict[str, str]:
    """The kind of every parameter: its name without numbers and without `.weight`.

    One stack of blocks: `self_attn.q_proj`. Several (an encoder and a decoder, a vision tower): the part that tells
    the stacks apart stays in front, `encoder.SelfAttention.q`.

    Args:
        names: all parameter names of one model; the kinds depend on the whole list.
    Returns:
        {name: kind}, in the order given.
    """
    names = list(names)
    labels = _stack_labels(sorted({s for s in map(stack, names) if s is not None}))
    result = {}
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        where = stack(name)
        if where is None:
            result[name] = ".".join(parts)
            continue
        tail = parts[len(where.split(".")) + 1 :]
        kept = [
            part
            for i, part in enumerate(tail)
            if not is_number(part) and not (part in _STACK_WORDS and i + 1 < len(tail) and is_number(tail[i + 1]))
        ]
        result[name] = ".".join([label, *kept] if (label := labels[where]) else kept)
    return result


def role(name: str, shape: Sequence[int] | None) -> Role:
    """The part that a parameter plays, one of `ROLES`.

    `linear` is what a plan may choose: 2-D weights of the blocks and of projections around them, and fused 3-D expert
    parameters; a 2-D parameter that is no module's weight (a state-space model's `A_log`) is not. The output head,
    embeddings, norms, biases and the routers of mixtures of experts have their own roles.
    `shape` None (a published scan states none) is taken for a matrix unless the name says norm.
    """
    leaf = name.rpartition(".")[2]
    owner = module_name(name).rpartition(".")[2] if leaf in {"weight", "bias"} else leaf
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if shape is None:
        shape = (0,) if "norm" in owner.lower() or owner.startswith("ln_") else (0, 0)
    if len(shape) == 1:
        return "norm" if leaf == "weight" else "other"
    if len(shape) == 3 and "experts" in name.split("."):
        return "linear"
    if len(shape) != 2:
        return "other"
    if in_head(name):
        return "head"
    if "norm" in owner.lower():  # one row for each head
        return "norm"
    if _EMBEDDING.search(owner) or (block_index(name) is None and (owner == "w" or "embeddings" in name.split("."))):
        return "embedding"
    if owner in _ROUTERS or "router" in name.split("."):
        return "router"
    return "linear" if leaf == "weight" else "other"


def residual_side(kind: str, shape: Sequence[int], hidden: int | None = None) -> Literal["in", "out"]:
    """The side of a matrix that faces the residual stream: `in` where it reads the stream, `out` where it adds to it.

    The side that is as wide as the stream; where both are (a square query or output projection) or neither is, the name
    decides: `o_proj`, `down_proj`, `c_proj` and their like, and what lies in a module `output` (BERT) or is called
    `attention.dense` (GPT-NeoX), write; everything else reads.

    Args:
        kind: as `kinds` gives it.
        shape: (out, in) of the layer, however the weight is stored.
        hidden: width of the residual stream; None if not known.
    """
    wide = [side for side, width in zip(("out", "in"), shape, strict=True) if width == hidden]
    if len(wide) == 1:
        return "in" if wide[0] == "in" else "out"
    owner, _, leaf = f".{kind}".rpartition(".")
    dense = leaf == "dense" and (owner.endswith("attention") or "output" in owner.split("."))
    return "out" if leaf in _WRITES or dense else "in"


def in_head(name: str) -> bool:
    """Whether a parameter, whatever its role, is part of the head: `lm_head.weight`, `classifier.dense.bias`."""
    return block_index(name) is None and bool(_OUTER_HEADS & set(name.split(".")))


def canonical(name: str) -> str | None:
    """A name that does not depend on the head put on the base model; None outside the blocks.

    `bert.encoder.layer.0.output.dense.weight` and `encoder.layer.0.output.dense.weight` are one tensor, loaded into
    two classes: both give `layer.0.output.dense.weight`.
    """
    where = stack(name)
    if where is None:
        return None
    return name[len(where) - len(where.rpartition(".")[2]) :]


def align(wanted: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """Match names of one checkpoint to names of a model that may carry, or lack, a base-model prefix.

    Returns:
        {wanted name: present name} for those that match; what is missing from the result matches nothing, or something that
        another matches as well: `language_model.layers.0.norm` and `vision_model.layers.0.norm` in a model with `layers.0.norm`.
    """
    present = set(present)
    wanted = list(wanted)
    found = {name: name for name in wanted if name in present}
    rest = [name for name in wanted if name not in found]
    if not rest:
        return found
    by_tail: dict[str, list[str]] = {}
    for name in sorted(present):
        parts = name.split(".")
        for i in range(1, min(3, len(parts))):
            by_tail.setdefault(".".join(parts[i:]), []).append(name)
    for name in rest:
        tails = [name, *(name.split(".", i)[-1] for i in (1, 2) if name.count(".") > i)]
        for i, tail in enumerate(tails):
            hits = ([tail] if i and tail in present else []) or (by_tail.get(tail, []) if i == 0 else [])
            if len(hits) == 1:
                found[name] = hits[0]
                break
    times = Counter(found.values())
    return {name: here for name, here in found.items() if name == here or times[here] == 1}
