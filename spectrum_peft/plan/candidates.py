"""The rows of a report that could train: fused and expert tensors joined, narrowed to what was asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import names
from ..errors import CheckpointError, OptionError, near_matches
from ..records import MatrixStat, Plan, SnrReport
from .choose import Candidate, natural_key
from .modes import MODES

EXPERT = re.compile(r"^(?P<name>.+)\[(?P<expert>\d+)\]$")
# What `towers` names -> the towers of `names.Tower`; None: all of them, what leads between them as well.
TOWERS: dict[str, tuple[str, ...]] = {
    "language": ("language", "text"),
    "vision": ("vision",),
    "audio": ("audio",),
    "all": (),
}
# Several matrices of one input stored as one: they get one score and one entry.
FUSED_KINDS = frozenset(
    {"qkv_proj", "qkv", "Wqkv", "W_pack", "c_attn", "query_key_value", "in_proj_weight", "gate_up_proj"}
)


# Stacks that run before the others in a forward pass (T5's encoder, the towers of models that see and hear).
_RUNS_FIRST = ("encoder", "vision", "visual", "audio", "speech")


def total_parameters(report: SnrReport) -> int:
    """Elements of the model, 0 where a shape is not known."""
    return report.total_parameters if all(s.shape is not None for s in report.stats) else 0


def units_of(report: SnrReport) -> list[MatrixStat]:
    """The report's rows with the experts of a fused parameter put together, where the first of them stands.

    Raises:
        CheckpointError: a name stands twice; the experts of one parameter are not 0, 1, 2, ... of one shape.
    """
    rows: dict[str, list[MatrixStat]] = {}
    seen: set[str] = set()
    for stat in report.stats:
        if stat.name in seen:
            raise CheckpointError(f"the report lists {stat.name} twice.")
        seen.add(stat.name)
        match = EXPERT.match(stat.name)
        rows.setdefault(match["name"] if match else stat.name, []).append(stat)
    return [members[0] if members[0].name == name else _joined(name, members) for name, members in rows.items()]


def _joined(name: str, members: Sequence[MatrixStat]) -> MatrixStat:
    """One row for the experts of a fused parameter: shape (experts, ., .), the score their mean."""
    members = sorted(members, key=lambda s: natural_key(s.name))
    if [s.name for s in members] != [f"{name}[{e}]" for e in range(len(members))]:
        raise CheckpointError(f"the report lists {len(members)} experts of {name}, not [0] to [{len(members) - 1}].")
    shapes = {s.shape for s in members}
    if len(shapes) > 1:
        raise CheckpointError(f"the experts of {name} differ in shape: {sorted(map(str, shapes))}.")
    first, scores = members[0], [s.score for s in members]
    known = [score for score in scores if score is not None]
    return MatrixStat(
        name=name,
        kind=EXPERT.sub(r"\g<name>", first.kind),
        shape=None if first.shape is None else (len(members), *first.shape),
        numel=sum(s.numel for s in members),
        dtype=first.dtype,
        score=sum(known) / len(known) if len(known) == len(scores) else None,
        n_signal=None,
        s_max=None,
        role=first.role,
        tower=first.tower,
    )


def in_towers(units: Sequence[MatrixStat], towers: str | None) -> list[MatrixStat]:
    """Those of the towers asked for; a model of one part is all of it, and what belongs to no tower's blocks stays.

    Args:
        towers: a key of `TOWERS`; None for the language model where there is one, else for all.
    Raises:
        OptionError: the model has no such tower.
    """
    present = {u.tower for u in units if u.role == "linear" and u.tower is not None}
    if towers is None:
        towers = "language" if "language" in present else "all"
    if towers == "all":
        return list(units)
    wanted = TOWERS[towers]
    if not present & set(wanted):
        has = ", ".join(sorted(present - {"projector"})) or "no towers: it is one model"
        raise OptionError(f"towers is {towers!r}, and the model has {has}.")
    return [u for u in units if u.tower in wanted]


def narrowed(
    linear: Sequence[MatrixStat], units: Sequence[MatrixStat], wanted: Iterable[str] | None
) -> list[MatrixStat]:
    """Those linear units that `wanted` names; all of them if it is None."""
    if wanted is None:
        return list(linear)
    by_name = {u.name: u for u in linear}
    kept: set[str] = set()
    for name in wanted:
        if name in kept:
            raise OptionError(f"candidates: {name} is named twice.")
        if name not in by_name:
            other = next((u for u in units if u.name == name), None)
            if other is not None:
                raise OptionError(f"candidates: {name} is of role {other.role!r}; only linear matrices can be chosen.")
            raise OptionError(f"candidates: {name!r} is not in the report." + near_matches(name, by_name))
        kept.add(name)
    return [u for u in linear if u.name in kept]


def as_candidate(unit: MatrixStat, reached: frozenset[tuple[str, int]] | None) -> Candidate:
    return Candidate(
        name=unit.name,
        kind=unit.kind,
        block=names.block_index(unit.name),
        shape=unit.shape,
        score=unit.score,
        reachable=reached is None or place_of(unit.name) in reached,
        transposed=unit.transposed,
    )


# --- depth -----------------------------------------------------------------------------------------------------------


def place_of(name: str) -> tuple[str, int] | None:
    """(stack, block number) of a name in the blocks."""
    where, block = names.stack(name), names.block_index(name)
    return None if where is None or block is None else (where, block)


def blocks_in_order(places: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Blocks in the order a forward pass runs them: encoders and towers, then the rest."""
    return sorted(places, key=lambda p: (not any(part.startswith(_RUNS_FIRST) for part in p[0].split(".")), p))


def reached_blocks(units: Sequence[MatrixStat], depth: float) -> frozenset[tuple[str, int]] | None:
    """The last `depth` of the blocks, at least one; None if that is all of them."""
    if depth == 1:
        return None
    blocks = blocks_in_order({place for u in units if (place := place_of(u.name)) is not None})
    if not blocks:
        raise OptionError(f"backward_depth={depth}: no name of the report tells its block.")
    return frozenset(blocks[-max(1, math.floor(len(blocks) * depth + 1e-9)) :])


def _above_cut(name: str, reached: frozenset[tuple[str, int]], blocks: Sequence[tuple[str, int]]) -> bool:
    """Whether a norm can train without backward going below the cut.

    Outside the blocks there is the one before them (in the embeddings), the last of a stack, and the rest after all.
    """
    place = place_of(name)
    if place is not None:
        return place in reached
    if any(part.startswith("embed") for part in name.split(".")):
        return False
    owners = {where.rpartition(".")[0]: (where, block) for where, block in blocks}  # the last block of each owner
    around = [owner for owner in owners if owner and name.startswith(f"{owner}.")]
    return owners[max(around, key=len)] in reached if around else True


# --- what trains whole -----------------------------------------------------------------------------------------------


def trained_whole(
    units: Sequence[MatrixStat],
    tied: Sequence[Sequence[str]],
    options: Mapping[str, Any],
    reached: frozenset[tuple[str, int]] | None,
) -> tuple[list[MatrixStat], list[str]]:
    """Embeddings, head and norms that their switches ask for, in model order, tied ones once; and notices.

    All that is not linear where the mode trains the whole model.
    """
    notes: list[str] = []
    if MODES[options["mode"]].whole_model:
        return [u for u in units if u.role != "linear"], notes
    taken: set[str] = set()
    roles = {u.name: u.role for u in units}
    if options["train_embeddings"]:
        found = {u.name for u in units if u.role == "embedding"}
        taken |= _found("train_embeddings", found)
    if options["train_head"]:
        found = {u.name for u in units if u.role == "head" or names.in_head(u.name)}
        for group in tied:
            if group[0] in roles and any(names.in_head(name) for name in group[1:]):
                if options["backward_depth"] < 1:
                    raise OptionError(
                        f"backward_depth={options['backward_depth']}, but train_head=True trains {group[0]}, which the "
                        "head is tied to: backward then runs down to the embeddings, and nothing is saved."
                    )
                found.add(group[0])
        taken |= _found("train_head", found)
    if options["train_projectors"]:
        taken |= _found("train_projectors", {u.name for u in units if u.tower == "projector"})
    if options["train_norms"]:
        modules = {names.module_name(u.name) for u in units if u.role == "norm" and not names.in_head(u.name)}
        found = {u.name for u in units if names.module_name(u.name) in modules and u.role in {"norm", "bias"}}
        taken |= _found("train_norms", found)
        if reached is not None:
            blocks = blocks_in_order({place for u in units if (place := place_of(u.name)) is not None})
            below = {name for name in found if not _above_cut(name, reached, blocks)}
            taken -= below
            notes.append(f"train_norms: {len(below)} norm tensors below the cut of backward_depth stay frozen.")
    for group in tied:
        if group[0] in taken:
            notes.append(f"{group[0]} and {', '.join(group[1:])} are one tensor: it trains, and counts, once.")
    return [u for u in units if u.name in taken], notes


def _found(option: str, found: set[str]) -> set[str]:
    if not found:
        raise OptionError(f"{option}=True, but the report lists no tensor that it could mean.")
    return found


def candidates_of_plan(plan: Plan, scores: Mapping[str, float] | None = None) -> list[Candidate]:
    """The candidates a plan was made from, read back from its entries; with other scores if given."""
    return [
        Candidate(
            name=e.name,
            kind=e.kind,
            block=names.block_index(e.name),
            shape=e.shape,
            score=e.score if scores is None else scores[e.name],
            reachable=e.action != "freeze",
        )
        for e in plan.entries
        if e.action != "save"
    ]
