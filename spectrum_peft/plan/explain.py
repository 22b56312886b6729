"""A plan in words: what trains, why, and what it gives up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..records import Plan, PlanEntry, SnrReport, count_trainable
from .candidates import candidates_of_plan
from .choose import covering, groups
from .modes import get_mode
from .options import OPTIONS

# What chooses without a score, and what the measured comparisons say of scores beside it (docs/results.md).
_CONTROLS = ("random", "first", "last", "spaced")
_NOT_SHOWN = "No score was shown to choose better than chance; `compare --controls random spaced` tells on your data."


@dataclass(frozen=True)
class PlanNumbers:
    """A plan counted.

    Attributes:
        kinds: kinds of matrices among the candidates.
        candidates: how many matrices could be chosen.
        chosen: how many of them train or carry an adapter.
        saved: tensors that train besides: embeddings, head, norms, biases.
        trainable_parameters: elements that the optimizer sees.
        total_parameters: of the base model, tied tensors once; 0 if not known.
    """

    kinds: int
    candidates: int
    chosen: int
    saved: int
    trainable_parameters: int
    total_parameters: int

    @property
    def chosen_percent(self) -> float:
        return 100 * self.chosen / self.candidates if self.candidates else 0.0

    @property
    def trainable_percent(self) -> float | None:
        """Of the base model's parameters; None if their number is not known."""
        return 100 * self.trainable_parameters / self.total_parameters if self.total_parameters else None


def plan_numbers(plan: Plan) -> PlanNumbers:
    """Count what a plan trains."""
    matrices = [e for e in plan.entries if e.action != "save"]
    return PlanNumbers(
        kinds=len({e.kind for e in matrices}),
        candidates=len(matrices),
        chosen=sum(e.trains for e in matrices),
        saved=sum(e.trains for e in plan.entries if e.action == "save"),
        trainable_parameters=plan.trainable_parameters,
        total_parameters=plan.total_parameters,
    )


def explain(plan: Plan, report: SnrReport | None = None) -> str:
    """What a plan trains and why, as text for a terminal.

    Args:
        report: the one the plan was made from; adds how many singular values stand out in the chosen matrices.
    Raises:
        MismatchError: the report is of another checkpoint.
    """
    if report is not None and plan.fingerprint is not None:
        plan.fingerprint.check(report.fingerprint, this="the plan", that="the report")
    count = plan_numbers(plan)
    matrices = [e for e in plan.entries if e.action != "save"]
    on = f" on {plan.model_id}" if plan.model_id else ""
    lines = [
        f"Mode {plan.mode}{on}: {get_mode(plan.mode).summary}.",
        f"Training {count.chosen} of {count.candidates} matrices ({count.chosen_percent:.1f} %) of {count.kinds} kinds"
        + (f"; other tensors that train: {count.saved}." if count.saved else "."),
        _parameters_line(count),
        f"Chosen by: {_chosen_by(plan)}.",
        *([_NOT_SHOWN] if get_mode(plan.mode).selective and plan.criterion not in _CONTROLS else []),
        "",
        _kind_table(matrices, report),
    ]
    given_up = _given_up(plan)
    if given_up:
        lines += ["", f"What backward_depth={plan.options['backward_depth']} gives up ({len(given_up)} better scores):"]
        lines += [f"  {shown_score(e.score):>9}  {e.name}" for e in given_up]
    if plan.notes:
        lines += ["", "Notes:", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines)


Plan.put_into_words_by(explain)


def _parameters_line(count: PlanNumbers) -> str:
    if not count.trainable_parameters:
        return "Trainable parameters: not known, the report states no shapes."
    if count.trainable_percent is None:
        return f"Trainable parameters: {count.trainable_parameters:,} of an unknown total."
    return (
        f"Trainable parameters: {count.trainable_parameters:,} of {count.total_parameters:,} "
        f"({count.trainable_percent:.2f} %)."
    )


def _chosen_by(plan: Plan) -> str:
    options = {**OPTIONS, **plan.options}
    mode = get_mode(plan.mode)
    if options["preset"] is not None:
        share = _percent(options["spectrum_ratio"])
        return f"criterion {plan.criterion}, preset {options['preset']} at {share} of each kind"
    if mode.of_each:
        rows = ", or rows of some," if any(e.rows for e in plan.entries) else ""
        text = f"every matrix, its columns{rows} by {options['columns_by']}"
    elif not mode.selective:
        text = "everything, scores are not asked"
    elif options["snr_threshold"] is not None:
        text = f"criterion {plan.criterion}, every score above {options['snr_threshold']:.6g}"
    elif options["score_cuts"] is not None:
        high, medium = options["score_cuts"]
        text = f"criterion {plan.criterion}, high tier above {high:.6g}, medium tier above {medium:.6g}"
    elif options["trainable_parameters"] is not None:
        text = f"criterion {plan.criterion}, ranks fitted to {options['trainable_parameters']:,} parameters"
    else:
        spread = "" if options["coverage"] is None else f", from {options['coverage']} runs of blocks in turn"
        whole = "each kind" if options["scope"] == "per_kind" else "all matrices together"
        share = _percent(options["spectrum_ratio"])
        text = f"criterion {plan.criterion}, the best {share} of {whole}, by {options['measure']}{spread}"
    if options["backward_depth"] < 1:
        text += f", in the last {_percent(options['backward_depth'])} of the blocks"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _kind_table(matrices: Sequence[PlanEntry], report: SnrReport | None) -> str:
    """One row for each kind: how many are chosen, their scores, the best score that was left out."""
    signal = {s.name: s.n_signal for s in report.stats} if report is not None else {}
    adapters = any(e.rank for e in matrices)
    grouped = any(e.group for e in matrices)
    header = ["kind", "chosen", "of", "scores chosen", "best left out", "parameters"]
    header += ["ranks"] if adapters else []
    header += ["groups"] if grouped else []
    header += ["signal values"] if signal else []
    rows = []
    for kind in sorted({e.kind for e in matrices}):
        members = [e for e in matrices if e.kind == kind]
        taken = [e for e in members if e.trains]
        left = [e.score for e in members if not e.trains and e.score is not None]
        scores = [e.score for e in taken if e.score is not None]
        elements = count_trainable(taken)
        row = [
            kind,
            f"{len(taken)}",
            f"{len(members)}",
            _span([shown_score(min(scores)), shown_score(max(scores))]) if scores else "-",
            shown_score(max(left)) if left else "-",
            f"{elements:,}" if elements or not taken else "?",
        ]
        if adapters:
            ranks = [e.rank or 0 for e in taken]
            row.append(", ".join(f"{rank} x {ranks.count(rank)}" for rank in sorted(set(ranks), reverse=True)) or "-")
        if grouped:
            sizes = Counter(e.group or e.name for e in taken)
            row.append(" + ".join(str(n) for n in sorted(sizes.values(), reverse=True)) or "-")
        if signal:
            counts = [n for e in taken if (n := signal.get(e.name)) is not None]
            row.append(_span([str(min(counts)), str(max(counts))]) if counts else "-")
        rows.append(row)
    return format_table(header, rows)


def _span(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def shown_score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _given_up(plan: Plan) -> list[PlanEntry]:
    """The better-scored matrices that `backward_depth` passed over, group by group, best first.

    As many of each group as were chosen would have come from the top of the whole list; those of the top that were not
    chosen lie below the cut.
    """
    options = {**OPTIONS, **plan.options}
    if options["backward_depth"] == 1 or not get_mode(plan.mode).selective:
        return []
    missed = []
    for members in groups(candidates_of_plan(plan), options["scope"]).values():
        if options["coverage"] is not None:
            members = covering(members, options["coverage"])
        n_chosen = sum(plan.by_name[c.name].trains for c in members)
        missed += [entry for c in members[:n_chosen] if not (entry := plan.by_name[c.name]).trains]
    return missed


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, last_is_text: bool = False) -> str:
    """Plain text columns; the first is flush left, and the last where it is text, the others flush right."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    table.insert(1, ["-" * width for width in widths])
    left = {0, len(widths) - 1} if last_is_text else {0}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
