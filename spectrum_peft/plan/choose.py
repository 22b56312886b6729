"""Which candidates train: plain Python on scores and shapes.

Selection follows the published tool (QuixiAI/spectrum@13dcd40 spectrum.py: the best share of each kind) with the
counting made exact: floor(n * ratio + 1e-9) of n, at least one, ties by block, then by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import names
from ..errors import OptionError
from ..records import GradientReport, PlanEntry
from .modes import get_mode


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
        transposed: the shape of a matrix is (in, out).
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...] | None
    score: float | None
    reachable: bool = True
    transposed: bool = False

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
    return tuple((0, int(part), "") if names.is_number(part) else (1, 0, part) for part in re.split(r"[.\[\]]", name))


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


def covering(members: Sequence[Candidate], bins: int) -> list[Candidate]:
    """The order that serves the whole depth: the best of each bin, then the second of each, and so on.

    The blocks that occur are cut into `bins` runs whose lengths differ by at most one; what lies outside the blocks counts as
    one block behind the last. Within a round the better score goes first, so that a count that is no multiple of the bins
    leaves out the weakest. More bins than blocks: one for each block.

    Args:
        members: best first.
    """
    blocks = sorted({math.inf if c.block is None else c.block for c in members})
    place = {block: i * min(bins, len(blocks)) // len(blocks) for i, block in enumerate(blocks)}
    seen: dict[int, int] = {}
    rounds: list[int] = []
    for c in members:
        at = place[math.inf if c.block is None else c.block]
        rounds.append(seen.get(at, 0))
        seen[at] = rounds[-1] + 1
    return [members[i] for i in sorted(range(len(members)), key=lambda i: (rounds[i], i))]


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
        order = open_to if options["coverage"] is None else covering(open_to, int(options["coverage"]))
        if options["measure"] == "count":
            wanted = max(1, math.floor(len(members) * ratio + 1e-9))
            chosen[label] = order[:wanted]
            short = wanted - len(chosen[label])
            if short:
                left = f"{len(open_to)}, all of them are taken" if open_to else "none"
                notes.append(f"{label}: {wanted} of {len(members)} were asked for, backward_depth leaves {left}.")
        else:
            chosen[label] = _prefix_within(order, sum(_known_numel(c) for c in members) * ratio + 1e-9)
        if options["coverage"] is not None:
            chosen[label] = ranked(chosen[label])
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


def drafted(
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


def half(members: Sequence[Candidate]) -> int:
    """How many of the chosen ones of a group belong to the high tier."""
    return (len(members) + 1) // 2


def tier_ranks(options: Mapping[str, Any]) -> tuple[int, int]:
    """(high, medium): `r_high`, by default r, and `r_medium`, by default max(1, r // 4)."""
    r = int(options["r"])
    high = r if options["r_high"] is None else int(options["r_high"])
    medium = max(1, r // 4) if options["r_medium"] is None else int(options["r_medium"])
    return high, medium
