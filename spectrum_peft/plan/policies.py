"""What the chosen candidates become: one function for each way to decide, which a mode names by its key.

policy(candidates, options, gradients) -> Draft(entries, notes)
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .. import names
from ..errors import OptionError, near_matches
from ..records import GradientReport, GradientStat, PlanEntry
from .budget import allocate_ranks
from .choose import (
    Candidate,
    Draft,
    Policy,
    choose,
    drafted,
    groups,
    half,
    importance_rates,
    natural_key,
    score_of,
    tier_ranks,
)
from .modes import get_mode


def everything(
    candidates: Sequence[Candidate], options: Mapping[str, Any], gradients: GradientReport | None = None
) -> Draft:
    """Every candidate within `backward_depth`; scores are of no consequence."""
    taken = {c.name: int(options["r"]) for c in candidates if c.reachable}
    if not taken:
        raise OptionError(
            f"backward_depth={options['backward_depth']} leaves none of the {len(candidates)} candidates: "
            "nothing would train. Raise it."
        )
    return drafted(candidates, options, taken)


def top(candidates: Sequence[Candidate], options: Mapping[str, Any], gradients: GradientReport | None = None) -> Draft:
    """The best-scored ones, at one rank."""
    chosen, notes = choose(candidates, options)
    return drafted(candidates, options, {c.name: int(options["r"]) for cs in chosen.values() for c in cs}, notes)


def tiers(
    candidates: Sequence[Candidate], options: Mapping[str, Any], gradients: GradientReport | None = None
) -> Draft:
    """Two ranks: the better half of what is chosen gets `r_high`, the other half `r_medium`, the rest is frozen.

    `score_cuts=(high, medium)` sets the tiers by score instead: above `high`, and above `medium`. With
    `trainable_parameters` every reachable candidate gets an adapter and the ranks are fitted to the budget
    (`allocate_ranks`). The odd one of a group belongs to the better half.
    """
    high, medium = tier_ranks(options)
    notes: list[str] = []
    if options["trainable_parameters"] is not None:
        reachable = [c for c in candidates if c.reachable]
        chosen = groups(reachable, options["scope"])
        ranks, notes = allocate_ranks(chosen, int(options["trainable_parameters"]), high, medium)
    elif options["score_cuts"] is not None:
        high_cut, medium_cut = options["score_cuts"]
        chosen, notes = choose(candidates, {**options, "snr_threshold": medium_cut})
        ranks = {c.name: high if score_of(c) > high_cut else medium for cs in chosen.values() for c in cs}
    else:
        chosen, notes = choose(candidates, options)
        ranks = {c.name: high if i < half(cs) else medium for cs in chosen.values() for i, c in enumerate(cs)}
    return drafted(candidates, options, ranks, notes, importance_rates(chosen, options["lr_ratio"]))


def components(
    candidates: Sequence[Candidate], options: Mapping[str, Any], gradients: GradientReport | None = None
) -> Draft:
    """The best-scored matrices, and of each the singular components with the largest importance, s_i^2 E[(dL/ds_i)^2].

    `n_components` of each matrix, or with `component_scope="global"` as many in all, wherever the importance is; a matrix
    of which none is taken stays frozen then. What a matrix is too small for is clamped, and a notice says so.

    Raises:
        OptionError: fused experts among the candidates; gradients that do not list a chosen matrix, or not its components.
    """
    _refuse_fused(candidates, options)
    chosen, notes = choose(candidates, options)
    taken = sorted((c for cs in chosen.values() for c in cs), key=lambda c: natural_key(c.name))
    importance = {c.name: _importance(c, options, gradients) for c in taken}
    shapes = {c.name: c.shape or _stat(c, gradients).shape for c in taken}
    for option, limits in (
        ("svd_rank", {name: min(shape) for name, shape in shapes.items()}),
        ("n_components", {name: len(values) for name, values in importance.items()}),
        ("rotation_rank", {name: min(shape) for name, shape in shapes.items()}),
    ):
        clamped = [name for name, limit in limits.items() if options[option] > limit]
        if clamped:
            notes.append(
                f"{option}={options[option]} is more than {len(clamped)} of {len(limits)} matrices have, first "
                f"{clamped[0]}: clamped to {limits[clamped[0]]} there."
            )
    counts = {name: min(int(options["n_components"]), len(values)) for name, values in importance.items()}
    if options["component_scope"] == "global":
        order = sorted(
            (-value, natural_key(name), i, name)
            for name, values in importance.items()
            for i, value in enumerate(values)
        )
        picked: dict[str, list[int]] = {name: [] for name in importance}
        for _, _, i, name in order[: sum(counts.values())]:
            picked[name].append(i)
        empty = [name for name, found in picked.items() if not found]
        if empty:
            notes.append(
                f"component_scope='global': none of the components of {len(empty)} matrices is among the "
                f"{sum(counts.values())} most important ones, first {empty[0]}; they stay frozen."
            )
    else:
        picked = {
            name: [i for _, i in sorted((-value, i) for i, value in enumerate(values))][: counts[name]]
            for name, values in importance.items()
        }
    entries = []
    for c in candidates:
        entry = PlanEntry(c.name, "freeze", kind=c.kind, shape=c.shape, score=c.score)
        if picked.get(c.name):
            rank = min(int(options["rotation_rank"]), *shapes[c.name])
            # The update is no product that alpha scales: its scale is 1.
            entry = PlanEntry(
                c.name, get_mode(options["mode"]).action, rank=rank,
                alpha=math.sqrt(rank) if options["use_rslora"] else float(rank),
                kind=c.kind, shape=shapes[c.name], score=c.score, components=tuple(sorted(picked[c.name])),
            )  # fmt: skip
        entries.append(entry)
    return Draft(tuple(entries), tuple(notes))


def _refuse_fused(candidates: Sequence[Candidate], options: Mapping[str, Any]) -> None:
    fused = [c.name for c in candidates if c.shape is not None and len(c.shape) == 3]
    if fused:
        kinds = sorted({c.kind for c in candidates if c.name in fused})
        raise OptionError(
            f"mode {options['mode']!r} works on single matrices, and {fused[0]} holds one for each expert. Leave them out: "
            f"exclude_modules={kinds}."
        )


def _stat(candidate: Candidate, gradients: GradientReport | None) -> GradientStat:
    assert gradients is not None
    if candidate.name not in gradients.by_name:
        raise OptionError(
            f"{candidate.name} is chosen, and the gradients do not list it."
            + near_matches(candidate.name, gradients.by_name)
        )
    return gradients.by_name[candidate.name]


def _importance(
    candidate: Candidate, options: Mapping[str, Any], gradients: GradientReport | None
) -> tuple[float, ...]:
    """Of the components that `svd_rank` looks at, the largest singular value first."""
    stat = _stat(candidate, gradients)
    wanted = min(int(options["svd_rank"]), *stat.shape)
    if len(stat.importance) < wanted:
        have = f"{len(stat.importance)} of them" if stat.importance else "none"
        rank = options["svd_rank"]
        seen = f"svd_rank={rank} looks at {wanted} components of {candidate.name}, the gradients know {have}"
        raise OptionError(
            f"{seen}: wanted those of probe_gradients(model, batches, svd_rank={rank}).",
            shell=f"{seen}: wanted those of `spectrum-peft probe --svd-rank {rank}`.",
        )
    return stat.importance[:wanted]


# Least mean likeness to the rest of a group, by kind of similarity, where neither a threshold nor a number of groups is given.
# Measured on SmolLM2-135M with instructions (docs/sgm.md): neighbours overlap by 0.3 to 0.6 in `subspace`, two blocks at random
# by 0.014; 0.15 is ten times that. Whole gradients (`cosine`) are nearly orthogonal whatever the pair.
LIKENESS = {"subspace": 0.15, "cosine": 0.05}


def alike(
    candidates: Sequence[Candidate], options: Mapping[str, Any], gradients: GradientReport | None = None
) -> Draft:
    """The best-scored ones, at one rank, in groups of like gradients that share a factor of their adapter.

    Within a kind and shape, average linkage on 1 - similarity, cut where the mean likeness of two groups falls below
    `similarity_threshold`, or at `n_groups` (of each kind and shape, as far as there are members). What has no like is a LoRA
    of its own.
    Source of the clustering: Sokal and Michener (1958), UPGMA, as SciPy has it.
    """
    assert gradients is not None
    draft = top(candidates, options, gradients)
    taken = {e.name for e in draft.entries if e.trains}
    _check_compared([e for e in draft.entries if e.trains], gradients)
    groups_of: dict[str, str] = {}
    widths: dict[str, int] = {}
    counts: dict[str, int] = {}
    for table in gradients.similarities:
        members = [i for i, name in enumerate(table.names) if name in taken]
        whole = table.subspace if options["similarity"] == "subspace" else table.cosine
        for cluster in _clusters([[whole[i][j] for j in members] for i in members], options):
            if len(cluster) < 2:
                continue
            factor = "AB" if options["share"] == "both" else "A" if table.side == "in" else "B"
            label = f"{factor}:{table.kind}:{counts.setdefault(table.kind, 0)}"
            counts[table.kind] += 1
            for i in cluster:
                name = table.names[members[i]]
                groups_of[name] = label
                widths[name] = sum(table.shape) if factor == "AB" else table.width
    entries = []
    for e in draft.entries:
        if e.name in groups_of:
            e = replace(
                e, group=groups_of[e.name], shared=(e.rank or 0) * widths[e.name], gain=bool(options["group_gain"])
            )
        elif e.trains:
            e = replace(e, action="lora")
        entries.append(e)
    notes = list(draft.notes)
    alone = len(taken) - len(groups_of)
    notes.append(
        f"{len(groups_of)} matrices share factors in {len(set(groups_of.values()))} groups, {alone} have no like and get a LoRA "
        f"of their own (similarity {options['similarity']})."
    )
    return Draft(tuple(entries), tuple(notes))


def _check_compared(taken: Sequence[PlanEntry], gradients: GradientReport) -> None:
    """What was never compared would pass for what has no like.

    Raises:
        OptionError: gradients that do not list a chosen matrix, or that compared none.
    """
    compared = {name for table in gradients.similarities for name in table.names}
    by_shape: dict[tuple[Any, ...], list[str]] = {}
    for entry in taken:
        if entry.name not in gradients.by_name:
            raise OptionError(
                f"{entry.name} is chosen, and the gradients do not list it."
                + near_matches(entry.name, gradients.by_name)
            )
        if entry.shape is None or len(entry.shape) == 2:
            by_shape.setdefault((entry.kind, entry.shape), []).append(entry.name)
    some = [members[0] for members in by_shape.values() if len(members) > 1]
    # A report of no samples stands for gradients that are not known yet.
    if some and not compared and gradients.samples:
        seen = f"the gradients compare no two matrices, of {some[0]} and its like: they were measured with directions=0. Wanted "
        raise OptionError(
            f"{seen}those of probe_gradients(model, batches).",
            shell=f"{seen}those of `spectrum-peft probe` without it.",
        )


def _clusters(likeness: Sequence[Sequence[float]], options: Mapping[str, Any]) -> list[list[int]]:
    """Groups of indexes by a symmetric table of likeness, each ascending, in the order of their first members."""
    size = len(likeness)
    if size < 2:
        return [[i] for i in range(size)]
    from scipy.cluster.hierarchy import fcluster, linkage  # 0.3 s that no other mode need pay

    tree = linkage([1 - likeness[i][j] for i in range(size) for j in range(i + 1, size)], method="average")
    if options["n_groups"] is not None:
        labels = fcluster(tree, options["n_groups"], criterion="maxclust")
    else:
        threshold = options["similarity_threshold"]
        threshold = LIKENESS[options["similarity"]] if threshold is None else threshold
        labels = fcluster(tree, 1 - threshold, criterion="distance")
    found: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        found.setdefault(int(label), []).append(i)
    return list(found.values())


def columns(
    candidates: Sequence[Candidate], options: Mapping[str, Any], gradients: GradientReport | None = None
) -> Draft:
    """Some columns of every candidate within `backward_depth`, or some rows of it: the features whose weights train.

    How many: `n_columns`, a share `spectrum_ratio` of those that a matrix has, or as many as have the parameters of a LoRA of
    rank r on it, k = r (in + out) / out columns or r (in + out) / in rows. Which: drawn from seed and name, or those with the
    best scores in `gradients`, in runs of `column_block`, which begin at multiples of it; the hidden features of an attention
    in whole heads of `head_width`. Rows train of `rows_of`; with `coupled` their numbers are those of the columns of the
    matrix that takes in what they put out.
    Source of the coupling: Yang et al. (2024), "S2FT", arXiv:2412.06289.

    Raises:
        OptionError: fused experts among the candidates; a shape that is not known; scores that are asked for and missing; a
            name of `rows_of` that matches nothing, or whose columns others follow; runs longer than a matrix has columns.
    """
    _refuse_fused(candidates, options)
    everything(candidates, options)  # what it refuses is refused here
    entries = {}
    for c in candidates:
        entries[c.name] = PlanEntry(c.name, "freeze", kind=c.kind, shape=c.shape, score=c.score)
        if c.reachable:
            if c.shape is None:
                raise OptionError(
                    f"mode {options['mode']!r} counts columns, and the shape of {c.name} is not known (a published scan "
                    "states none). Scan the checkpoint."
                )
            entries[c.name] = replace(entries[c.name], transposed=c.transposed)
    able = [entries[c.name] for c in candidates if c.reachable]
    leaders = _leaders(able) if options["coupled"] else {}
    by_rows = set(leaders) if options["rows_of"] is None else _of_modules(able, options["rows_of"])
    if led := sorted(by_rows & set(leaders.values())):
        raise OptionError(
            f"rows_of names {led[0]}, and coupled has rows follow its columns: wanted matrices that put out what it takes in, or "
            "coupled left out."
        )
    leaders = {name: leader for name, leader in leaders.items() if name in by_rows}
    clamped, rounded = [], []
    for entry in sorted(able, key=lambda e: e.name in leaders):  # who follows comes behind
        rows = entry.name in by_rows
        if entry.name in leaders:
            leader = entries[leaders[entry.name]]
            entries[entry.name] = replace(
                entry, action=leader.action, rank=leader.rank, alpha=leader.alpha, rows=leader.columns
            )
            continue
        wanted, there = _wanted_columns(entry, options, rows), entry.outside if rows else entry.inside
        if wanted > there:
            clamped.append((entry.name, there))
        entries[entry.name] = chosen = with_columns(entry, wanted, options, gradients, rows=rows)
        if wanted < (chosen.rank or 0):
            rounded.append((entry.name, chosen.rank, wanted))
    notes = []
    if clamped:
        notes.append(
            f"more columns are asked for than {len(clamped)} of {len(entries)} matrices have, first {clamped[0][0]}: all "
            f"{clamped[0][1]} of it train."
        )
    if rounded:
        name, taken, wanted = rounded[0]
        notes.append(
            f"whole runs, or heads, are more columns than asked for in {len(rounded)} of {len(entries)} matrices, first {name}: "
            f"{taken} train in place of {wanted}."
        )
    if by_rows or options["coupled"]:
        notes.append(
            f"of {len(by_rows)} of {len(entries)} matrices rows train, {len(leaders)} of these coupled to the columns of another."
        )
    return Draft(tuple(entries.values()), tuple(notes))


def _place(name: str) -> tuple[str, bool]:
    """Where a matrix' hidden features belong: (its attention, or its block or expert; whether it is an attention)."""
    parts = names.module_name(name).split(".")
    number = max((i for i, part in enumerate(parts) if names.is_number(part)), default=-1)
    attention = next((i for i in range(number + 1, len(parts)) if "att" in parts[i].lower()), None)
    return ".".join(parts[: (number if attention is None else attention) + 1]), attention is not None


def _leaders(entries: Sequence[PlanEntry]) -> dict[str, str]:
    """{matrix that reads the residual stream: the one of its place that takes in, alone, as many features as it puts out}."""
    writers: dict[tuple[str, int], list[str]] = {}
    for entry in entries:
        if _side(entry) == "out":
            writers.setdefault((_place(entry.name)[0], entry.inside), []).append(entry.name)
    found = {e.name: writers.get((_place(e.name)[0], e.outside), []) for e in entries if _side(e) == "in"}
    return {name: takers[0] for name, takers in found.items() if len(takers) == 1}


def _side(entry: PlanEntry) -> str:
    return names.residual_side(entry.kind, (entry.outside, entry.inside))


def _of_modules(entries: Sequence[PlanEntry], modules: Sequence[str]) -> set[str]:
    """Names of the entries of some modules, each given by its name or the end of it."""
    found = set()
    for module in modules:
        matching = {e.name for e in entries if f".{names.module_name(e.name)}".endswith(f".{module}")}
        if not matching:
            leaves = sorted({names.module_name(e.name).rpartition(".")[2] for e in entries})
            raise OptionError(f"rows_of: {module!r} is no matrix that trains." + near_matches(module, leaves))
        found |= matching
    return found


def _wanted_columns(entry: PlanEntry, options: Mapping[str, Any], rows: bool) -> int:
    if options["n_columns"] is not None:
        return int(options["n_columns"])
    if options["spectrum_ratio"] is not None:
        there = entry.outside if rows else entry.inside
        return max(1, math.floor(there * float(options["spectrum_ratio"]) + 1e-9))
    return columns_of_rank(entry, int(options["r"]), rows=rows)


def columns_of_rank(entry: PlanEntry, rank: int, *, rows: bool = False) -> int:
    """How many columns, or rows, of a matrix have as many elements as a LoRA of some rank on it, rounded down."""
    return max(1, rank * (entry.inside + entry.outside) // (entry.inside if rows else entry.outside))


def with_columns(
    entry: PlanEntry,
    count: int,
    options: Mapping[str, Any],
    gradients: GradientReport | None = None,
    *,
    rows: bool = False,
) -> PlanEntry:
    """The entry with about `count` columns, or rows, that train, in whole runs of `column_block` or heads, at least one run.

    Raises:
        OptionError: the scores that `columns_by` asks for are missing, as those of rows always are; heads that do not divide
            the features of an attention.
    """
    there = entry.outside if rows else entry.inside
    block, by = int(options["column_block"]), options["columns_by"]
    if options["head_width"] is not None and _place(entry.name)[1] and rows == (_side(entry) == "in"):
        block = int(options["head_width"])
        if there % block:
            raise OptionError(
                f"head_width is {block}, wanted a divisor of the {there} hidden features of {entry.name}."
            )
    if block > there:
        raise OptionError(f"column_block is {block}, wanted at most the {there} features of {entry.name}.")
    runs = there // block
    taken = min(runs, max(1, round(count / block)))
    if count >= there:
        chosen = list(range(there))
    else:
        if by == "random":
            order = random.Random(f"{options['seed']} {entry.name}").sample(range(runs), taken)
        elif rows:
            raise OptionError(
                f"columns_by={by!r} scores input features, and of {entry.name} rows train, coupled to no columns: wanted "
                "columns_by='random', or other rows_of."
            )
        else:
            scores = _column_scores(entry.name, there, by, gradients)
            totals = [math.fsum(scores[i * block : (i + 1) * block]) for i in range(runs)]
            order = sorted(range(runs), key=lambda i: (-totals[i], i))[:taken]
        chosen = [i * block + j for i in sorted(order) for j in range(block)]
    # The change is no product that alpha scales: its scale is 1.
    return replace(
        entry,
        action=get_mode(options["mode"]).action,
        rank=len(chosen),
        alpha=math.sqrt(len(chosen)) if options["use_rslora"] else float(len(chosen)),
        columns=None if rows else tuple(chosen),
        rows=tuple(chosen) if rows else None,
    )


def _column_scores(name: str, inside: int, by: str, gradients: GradientReport | None) -> tuple[float, ...]:
    stat = None if gradients is None else gradients.by_name.get(name)
    if stat is None or len(stat.columns) != inside:
        have = f"{len(stat.columns)} of them" if stat is not None and stat.columns else "none"
        seen = (
            f"columns_by={by!r} chooses by scores of the {inside} columns of {name}, the gradients hold {have}: wanted "
        )
        raise OptionError(
            f"{seen}those of probe_gradients(model, batches, columns={by!r}).",
            shell=f"{seen}those of `spectrum-peft probe --columns {by}`.",
        )
    return stat.columns


POLICIES: dict[str, Policy] = {
    "all": everything,
    "top": top,
    "tiers": tiers,
    "alike": alike,
    "components": components,
    "columns": columns,
}
