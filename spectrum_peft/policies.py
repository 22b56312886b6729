"""The table of modes, and the policies that choose: plain Python on scores and shapes.

A mode differs from the others in two things: how its entries are chosen (a policy, by the key `Mode.select`) and what
a chosen module becomes (`Mode.action`). Everything else that depends on the mode is a field of its row, so that nobody
asks `if mode ==`. To add a mode, add a row, and a policy if none of these chooses as it does.

    policy(candidates, options, gradients) -> Draft(entries, notes)

Selection follows the published tool (QuixiAI/spectrum@13dcd40 spectrum.py: the best share of each kind) with the
counting made exact: floor(n * ratio + 1e-9) of n, at least one, ties by block, then by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import OptionError, near_matches
from .records import REAL_WEIGHT_ACTIONS, GradientReport, GradientStat, PlanEntry


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    Attributes:
        name: as the user writes it.
        summary: one line for tables and help texts.
        select: key of `POLICIES`.
        action: what a chosen module becomes, one of `records.ACTIONS`.
        default_lr: learning rate where the user set none, for AdamW.
        needs_data: wants a GradientReport or calibration batches.
        whole_model: every parameter of the model trains, candidates or not.
        importance_rates: the learning rate of an entry grows with its score, within `lr_ratio`.
        rescorable: `rescore_every` may move the choice during training.
        plain_model: the callback alone can carry it out, on a model without a PEFT wrapper.
        own_options: options that mean something in this mode and not in every mode; refused elsewhere.
    """

    name: str
    summary: str
    select: str
    action: str
    default_lr: float
    needs_data: bool = False
    whole_model: bool = False
    importance_rates: bool = False
    rescorable: bool = False
    plain_model: bool = False
    own_options: frozenset[str] = field(default_factory=frozenset)

    @property
    def real_weights(self) -> bool:
        """The weights of the base train themselves; there is no adapter."""
        return self.action in REAL_WEIGHT_ACTIONS

    @property
    def selective(self) -> bool:
        """Scores decide: the ratio, the threshold and the scope mean something."""
        return self.select != "all"


MODES: dict[str, Mode] = {
    row.name: row
    for row in (
        Mode(
            "full", "every parameter trains", select="all", action="train", default_lr=2e-5,
            whole_model=True, plain_model=True,
        ),
        Mode(
            "spectrum", "the best-scored matrices train, as real weights", select="top", action="train",
            default_lr=2e-5, plain_model=True,
        ),
        Mode("lora", "LoRA of one rank on every matrix", select="all", action="lora", default_lr=2e-4),
        Mode(
            "spectra_qlora", "LoRA of one rank on the best-scored matrices", select="top", action="lora",
            default_lr=2e-4, rescorable=True,
        ),
        Mode(
            "alors", "LoRA of two ranks on the best-scored matrices, learning rates by importance", select="tiers",
            action="lora", default_lr=2e-4, importance_rates=True, rescorable=True,
            own_options=frozenset({"r_high", "r_medium", "score_cuts", "trainable_parameters"}),
        ),
        Mode(
            "sgm", "LoRA on the best-scored matrices, a factor shared by those with like gradients", select="alike",
            action="shared", default_lr=2e-4, needs_data=True,
            own_options=frozenset({"similarity", "similarity_threshold", "n_groups", "share", "group_gain"}),
        ),
        Mode(
            "lorsa", "singular values shift and their vectors turn, for the components that the data ask for",
            select="components", action="lorsa", default_lr=3e-3, needs_data=True,
            own_options=frozenset({"n_components", "component_scope", "svd_rank", "rotation_rank"}),
        ),
    )
}  # fmt: skip


def get_mode(name: object) -> Mode:
    """The row of a mode.

    Raises:
        OptionError: there is no such mode; the message shows the near ones.
    """
    if not isinstance(name, str) or name not in MODES:
        raise OptionError(f"mode is {name!r}." + near_matches(str(name), MODES))
    return MODES[name]


@dataclass(frozen=True)
class Candidate:
    """One parameter that a plan may choose.

    Attributes:
        name: full parameter name; a fused expert parameter is one candidate.
        kind: selection ranks within a kind.
        block: number of its transformer block; None outside the blocks.
        shape: (out, in), (in, out) for a Conv1D, (experts, ., .) for fused experts; None if not known.
        score: of the criterion, the mean over experts; infinite is allowed; None if not scored.
        reachable: False below `backward_depth`: it counts for the ratio, and may not be taken.
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...] | None
    score: float | None
    reachable: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape) if self.shape else 0

    @property
    def rank_cost(self) -> int:
        """Parameters of a LoRA of rank 1 on it, in every expert."""
        if not self.shape:
            return 0
        return (self.shape[0] if len(self.shape) == 3 else 1) * (self.shape[-1] + self.shape[-2])


@dataclass(frozen=True)
class Draft:
    """What a policy decided: one entry for each candidate, in their order, and notices for the reader."""

    entries: tuple[PlanEntry, ...]
    notes: tuple[str, ...] = ()


# The gradients are there if, and only if, they were given; a mode that cannot do without says so by `Mode.needs_data`.
Policy = Callable[[Sequence[Candidate], Mapping[str, Any], GradientReport | None], Draft]


# --- order -----------------------------------------------------------------------------------------------------------


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key with numbers in names as numbers: block 2 before block 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"[.\[\]]", name))


def score_of(candidate: Candidate) -> float:
    """The score, which must be there and be a number.

    Raises:
        OptionError: not scored, or nan.
    """
    if candidate.score is None:
        raise OptionError(
            f"{candidate.name} has no score, and this mode chooses by scores. Scan the checkpoint with a criterion, or "
            "use a mode that takes every matrix."
        )
    if math.isnan(candidate.score):
        raise OptionError(f"{candidate.name}: the score is nan, wanted a number or inf.")
    return candidate.score


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best score first; ties by block (outside the blocks last), then by name."""
    outside = math.inf
    return sorted(
        candidates,
        key=lambda c: (-score_of(c), outside if c.block is None else c.block, natural_key(c.name)),
    )


def groups(candidates: Sequence[Candidate], scope: str) -> dict[str, list[Candidate]]:
    """The candidates that compete with each other, best first: those of one kind, or all (`global`); sorted by kind."""
    if scope == "global":
        return {"all kinds": ranked(candidates)}
    kinds = sorted({c.kind for c in candidates})
    return {kind: ranked([c for c in candidates if c.kind == kind]) for kind in kinds}


def score_range(candidates: Sequence[Candidate]) -> str:
    """`0.12 to 3.4`, for messages."""
    scores = [score_of(c) for c in candidates]
    return f"{min(scores):.4g} to {max(scores):.4g}"


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(candidates: Sequence[Candidate], options: Mapping[str, Any]) -> tuple[dict[str, list[Candidate]], list[str]]:
    """Which candidates are taken, by `spectrum_ratio` or `snr_threshold`.

    Laws: the order of the candidates is of no consequence; raising one score never drops that candidate; a larger ratio
    takes what a smaller one takes, and more.

    Returns:
        {group: chosen ones, best first} and notices.
    Raises:
        OptionError: nothing is chosen (the message gives the scores' range), a score is missing, or
            `measure="parameters"` where shapes are not known.
    """
    chosen: dict[str, list[Candidate]] = {}
    notes: list[str] = []
    threshold, ratio = options["snr_threshold"], options["spectrum_ratio"]
    for label, members in groups(candidates, options["scope"]).items():
        open_to = [c for c in members if c.reachable]
        if threshold is not None:
            chosen[label] = [c for c in open_to if score_of(c) > threshold]
            continue
        if options["measure"] == "count":
            wanted = max(1, math.floor(len(members) * ratio + 1e-9))
            chosen[label] = open_to[:wanted]
            short = wanted - len(chosen[label])
            if short:
                left = f"{len(open_to)}, all of them are taken" if open_to else "none"
                notes.append(f"{label}: {wanted} of {len(members)} were asked for, backward_depth leaves {left}.")
        else:
            chosen[label] = _prefix_within(open_to, sum(_known_numel(c) for c in members) * ratio + 1e-9)
    if not any(chosen.values()):
        reachable = [c for c in candidates if c.reachable]
        if not reachable:
            raise OptionError(
                f"backward_depth={options['backward_depth']} leaves none of the {len(candidates)} candidates: "
                "nothing would train. Raise it."
            )
        raise OptionError(
            f"snr_threshold={threshold} leaves nothing to train: the scores of {len(reachable)} candidates go from "
            f"{score_range(reachable)}."
        )
    return chosen, notes


def _known_numel(candidate: Candidate) -> int:
    if not candidate.shape:
        raise OptionError(
            f"measure='parameters': the shape of {candidate.name} is not known (a published scan states none); "
            "use measure='count'."
        )
    return candidate.numel


def _prefix_within(members: Sequence[Candidate], budget: float) -> list[Candidate]:
    """The longest run of best ones whose elements fit the budget, at least one. A run, so that ratios nest."""
    taken: list[Candidate] = []
    used = 0
    for candidate in members:
        used += _known_numel(candidate)
        if taken and used > budget:
            break
        taken.append(candidate)
    return taken


# --- entries ---------------------------------------------------------------------------------------------------------


def alpha_for(rank: int, options: Mapping[str, Any]) -> float:
    """alpha that gives a rank the same scale as `lora_alpha` gives `r`.

    Plain LoRA scales by alpha / rank, so alpha goes with the rank. rsLoRA scales by alpha / sqrt(rank) so that one
    alpha serves every rank (Kalajdzievski 2023, arXiv:2312.03732, eq. 3): there it stays.
    """
    alpha = float(options["lora_alpha"])
    return alpha if options["use_rslora"] else alpha * rank / int(options["r"])


def _draft(
    candidates: Sequence[Candidate],
    options: Mapping[str, Any],
    ranks: Mapping[str, int],
    notes: Sequence[str] = (),
    lr_ratios: Mapping[str, float] | None = None,
) -> Draft:
    """Entries in the candidates' order. Those in `ranks` are taken (the rank is of no use for real weights)."""
    mode = get_mode(options["mode"])
    entries = []
    for c in candidates:
        entry = PlanEntry(c.name, "freeze", kind=c.kind, shape=c.shape, score=c.score)
        rank = ranks.get(c.name)
        if rank is not None and mode.real_weights:
            entry = PlanEntry(c.name, mode.action, kind=c.kind, shape=c.shape, score=c.score)
        elif rank is not None:
            entry = PlanEntry(
                c.name, mode.action, rank=rank, alpha=alpha_for(rank, options),
                lr_ratio=(lr_ratios or {}).get(c.name, 1.0), kind=c.kind, shape=c.shape, score=c.score,
            )  # fmt: skip
        elif options["rescore_every"] is not None and c.reachable:
            entry = PlanEntry(
                c.name, mode.action, rank=0, alpha=0.0, active=False, kind=c.kind, shape=c.shape, score=c.score
            )
        entries.append(entry)
    return Draft(tuple(entries), tuple(notes))


def importance_rates(chosen: Mapping[str, Sequence[Candidate]], bounds: tuple[float, float]) -> dict[str, float]:
    """Learning-rate ratios that grow with importance, {name: ratio}.

    Within each group the chosen ones are put in order of score; position t, 0 for the worst and 1 for the best, gives
    low * (high / low) ** t: evenly spaced on a log scale, and blind to the unit of the score. Equal scores share their
    mean position; one alone gets the geometric mean, 1.0 for (0.5, 2.0).
    """
    low, high = bounds
    ratios: dict[str, float] = {}
    for members in chosen.values():
        scores = sorted(score_of(c) for c in members)
        for c in members:
            first = scores.index(score_of(c))
            position = first + (scores.count(score_of(c)) - 1) / 2
            t = position / (len(scores) - 1) if len(scores) > 1 else 0.5
            ratios[c.name] = round(low * (high / low) ** t, 6)
    return ratios


# --- policies --------------------------------------------------------------------------------------------------------


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
    return _draft(candidates, options, taken)


def top(candidates: Sequence[Candidate], options: Mapping[str, Any], gradients: GradientReport | None = None) -> Draft:
    """The best-scored ones, at one rank."""
    chosen, notes = choose(candidates, options)
    return _draft(candidates, options, {c.name: int(options["r"]) for cs in chosen.values() for c in cs}, notes)


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
    return _draft(candidates, options, ranks, notes, importance_rates(chosen, options["lr_ratio"]))


def half(members: Sequence[Candidate]) -> int:
    """How many of the chosen ones of a group belong to the high tier."""
    return (len(members) + 1) // 2


def tier_ranks(options: Mapping[str, Any]) -> tuple[int, int]:
    """(high, medium): `r_high`, by default r, and `r_medium`, by default max(1, r // 4)."""
    r = int(options["r"])
    high = r if options["r_high"] is None else int(options["r_high"])
    medium = max(1, r // 4) if options["r_medium"] is None else int(options["r_medium"])
    return high, medium


def components(
    candidates: Sequence[Candidate], options: Mapping[str, Any], gradients: GradientReport | None = None
) -> Draft:
    """The best-scored matrices, and of each the singular components with the largest importance, s_i^2 E[(dL/ds_i)^2].

    `n_components` of each matrix, or with `component_scope="global"` as many in all, wherever the importance is; a matrix
    of which none is taken stays frozen then. What a matrix is too small for is clamped, and a notice says so.

    Raises:
        OptionError: fused experts among the candidates; gradients that do not list a chosen matrix, or not its components.
    """
    fused = [c.name for c in candidates if c.shape is not None and len(c.shape) == 3]
    if fused:
        kinds = sorted({c.kind for c in candidates if c.name in fused})
        raise OptionError(
            f"mode {options['mode']!r} works on single matrices, and {fused[0]} holds one for each expert. Leave them out: "
            f"exclude_modules={kinds}."
        )
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
        raise OptionError(
            f"svd_rank={options['svd_rank']} looks at {wanted} components of {candidate.name}, the gradients know {have}: "
            f"probe_gradients(model, batches, svd_rank={options['svd_rank']}), or `spectrum-peft probe --svd-rank "
            f"{options['svd_rank']}`."
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
        raise OptionError(
            f"the gradients compare no two matrices, of {some[0]} and its like: they were measured with directions=0. Wanted "
            "probe_gradients(model, batches), or `spectrum-peft probe` without --directions 0."
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


POLICIES: dict[str, Policy] = {
    "all": everything,
    "top": top,
    "tiers": tiers,
    "alike": alike,
    "components": components,
}


# --- an exact budget -------------------------------------------------------------------------------------------------


def smallest_budget(candidates: Sequence[Candidate]) -> int:
    """Parameters of a LoRA of rank 1 on every reachable candidate.

    Raises:
        OptionError: a shape is not known.
    """
    for c in candidates:
        if not c.shape:
            raise OptionError(f"trainable_parameters: the shape of {c.name} is not known (published scans state none).")
    return sum(c.rank_cost for c in candidates if c.reachable)


def allocate_ranks(
    groups: Mapping[str, Sequence[Candidate]], budget: int, high: int, medium: int
) -> tuple[dict[str, int], list[str]]:
    """Ranks that add up to a number of parameters, the better half of each group in the proportion high : medium.

    First all ranks grow together in that proportion as far as the budget goes (never below 1, never above the smaller
    side of the matrix). What is left is spent on single ranks, the best-scored first, chosen by a subset-sum so that
    the total meets the budget exactly, or else comes as close below as any choice of ranks can: the window of ranks
    that may move is widened until the sum is exact, or the greatest common divisor of the costs leaves nothing closer,
    or all ranks have been in it.

    Args:
        groups: {group: candidates, best first}, shapes known.
        budget: at least `smallest_budget` of them.
        high, medium: the proportion; high >= medium >= 1.
    Returns:
        {name: rank} and notices (the difference, where the budget cannot be met).
    """
    # Position in the group comes first, so that within a kind a better score never has the lower rank.
    order = sorted(
        ((i, c, i < half(cs)) for cs in groups.values() for i, c in enumerate(cs)),
        key=lambda item: (item[0], natural_key(item[1].name)),
    )
    caps = [min(c.shape[-2:]) if c.shape else 0 for _, c, _ in order]
    costs = [c.rank_cost for _, c, _ in order]

    def at(step: int) -> list[int]:
        return [
            min(cap, max(1, step // (medium if better else high)))
            for cap, (_, _, better) in zip(caps, order, strict=True)
        ]

    def total(ranks: Sequence[int]) -> int:
        return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))

    low, top_step = 0, max(caps) * high + 1  # step / (high * medium) is the common factor
    while low < top_step:
        middle = (low + top_step + 1) // 2
        low, top_step = (middle, top_step) if total(at(middle)) <= budget else (low, middle - 1)

    floor_total = sum(costs)
    unit = math.gcd(*costs)
    best_possible = min(floor_total + (budget - floor_total) // unit * unit, total(caps))
    width = 1
    while True:
        base = [max(1, rank - width + 1) for rank in at(low)]
        rest = budget - total(base)
        all_of_it = [min(cap - rank, rest // cost) for cap, rank, cost in zip(caps, base, costs, strict=True)]
        room = [min(2 * width - 1, more) for more in all_of_it]
        ranks = _fill(base, room, costs, rest)
        if total(ranks) >= best_possible or (max(base) == 1 and room == all_of_it):
            break
        width *= 2
    missed = budget - total(ranks)
    notes = []
    if missed:
        why = "every matrix has full rank" if ranks == caps else "no choice of ranks comes closer"
        notes.append(
            f"trainable_parameters: adapters take {total(ranks):,} of {budget:,}, {missed:,} below the budget: {why}."
        )
    return {c.name: rank for (_, c, _), rank in zip(order, ranks, strict=True)}, notes


def _fill(base: Sequence[int], room: Sequence[int], costs: Sequence[int], rest: int) -> list[int]:
    """Raise ranks by up to `room` so that their costs add up to as much of `rest` as can be.

    A bounded subset-sum over the distinct costs: bit v of an integer says that v units can be reached.
    """
    unit = math.gcd(*costs)
    limit = rest // unit
    mask = (1 << (limit + 1)) - 1
    classes: dict[int, int] = {}
    for cost, more in zip(costs, room, strict=True):
        classes[cost] = classes.get(cost, 0) + more
    pieces: list[tuple[int, int]] = []  # (cost, how many together): any number up to the class's room is a sum of them
    for cost, more in classes.items():
        size, more = 1, min(more, rest // cost)
        while more > 0:
            pieces.append((cost, min(size, more)))
            more -= size
            size *= 2
    reached = [1]
    for cost, many in pieces:
        reached.append((reached[-1] | reached[-1] << (cost // unit * many)) & mask)
    value = reached[-1].bit_length() - 1
    spend = dict.fromkeys(classes, 0)
    for (cost, many), before in zip(reversed(pieces), reversed(reached[:-1]), strict=True):
        if not before >> value & 1:
            spend[cost] += many
            value -= cost // unit * many
    ranks = list(base)
    for step in range(max(room, default=0)):  # in rounds, best first
        for i, cost in enumerate(costs):
            if spend[cost] and step < room[i]:
                ranks[i] += 1
                spend[cost] -= 1
    return ranks
