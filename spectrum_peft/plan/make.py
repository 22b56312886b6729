"""make_plan: a report, options and a policy become a plan."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import names
from ..errors import MismatchError, OptionError, near_matches
from ..records import GradientReport, MatrixStat, Plan, PlanEntry, SnrReport
from .budget import smallest_budget
from .candidates import (
    EXPERT,
    FUSED_KINDS,
    as_candidate,
    blocks_in_order,
    in_towers,
    narrowed,
    place_of,
    reached_blocks,
    total_parameters,
    trained_whole,
    units_of,
)
from .choose import Candidate, natural_key
from .modes import MODES
from .options import CHOOSING_OPTIONS, OPTIONS, check_options, needs_gradients
from .policies import POLICIES
from .published import published_plan


def make_plan(
    report: SnrReport | str | os.PathLike[str],
    *,
    gradients: GradientReport | str | os.PathLike[str] | None = None,
    candidates: Iterable[str] | None = None,
    **options: Any,
) -> Plan:
    """Decide what trains: the scores of a report and a mode become a plan.

    The order of the report's rows is of no consequence (but for `preset="published"`, whose ties go by file order), and
    the same report and options give the same plan, byte for byte.

    Args:
        report: a report, the file of one, or a repository of the hub, `ORG/NAME`, that has one of itself. `auto` is of a model:
            `find_report(MODEL)`.
        gradients: of the same weights, or the file of it; for `criterion="fisher"`, whose scores it holds, and for modes
            that need data.
        candidates: full parameter names to choose among; default every linear matrix of the report but the head.
        options: see `OPTIONS`; unknown ones are refused.
    Raises:
        OptionError: an option is wrong, a candidate is not in the report or is none, nothing would train.
        CheckpointError: the report's file cannot be used, or the report lists a tensor twice.
        MismatchError: another criterion is asked for than the report was scored by; report and gradients are of different
            weights.
    """
    if isinstance(report, str | os.PathLike):
        if report == "auto":
            raise OptionError(
                "report is 'auto', which is of a model, and a plan is made of a report alone: "
                "make_plan(find_report(MODEL), ...).",
                shell="REPORT is auto, which is of a model, and no model is named.",
            )
        return make_plan(SnrReport.named(report), gradients=gradients, candidates=candidates, **options)
    if isinstance(gradients, str | os.PathLike):
        return make_plan(report, gradients=GradientReport.load(gradients), candidates=candidates, **options)
    if not isinstance(report, SnrReport):
        raise OptionError(f"report is a {type(report).__name__}, wanted an SnrReport or the path of one.")
    checked = check_options(**options)
    if gradients is not None and gradients.fingerprint is not None and report.fingerprint is not None:
        gradients.fingerprint.check(report.fingerprint, this="the gradients", that="the report")
    if gradients is None and needs_gradients(checked):
        by = checked["columns_by"]
        what = "criterion 'fisher'" if checked["criterion"] == "fisher" else f"columns_by={by!r}"
        what = f"mode {checked['mode']!r}" if MODES[checked["mode"]].needs_data else what
        raise OptionError(
            f"{what} needs gradients on data: give calibration_data=calibration_batches(dataset, tokenizer) to "
            "SpectrumConfig, or gradients=probe_gradients(model, batches) to make_plan.",
            shell=f"{what} needs gradients on data: give gradients=FILE, which `spectrum-peft probe` writes.",
        )
    if gradients is not None and gradients.stats:
        gradients = _with_names_of(report, gradients)
    if checked["criterion"] == "fisher":
        report = _scored_by(gradients, report)
    if checked["criterion"] != report.criterion:
        # The default cannot be told from a wish, so a report of another criterion goes before it.
        if checked["criterion"] != OPTIONS["criterion"]:
            raise MismatchError(
                f"criterion={checked['criterion']!r} is asked for, the report was scored by {report.criterion!r}. Scan "
                "again, or leave the criterion out."
            )
        checked["criterion"] = report.criterion
    units = units_of(report)
    if checked["preset"] == "published":
        return published_plan(report, units, candidates, checked)

    mode = MODES[checked["mode"]]
    tied_to = {name: group[0] for group in report.tied for name in group[1:]}
    units = sorted((u for u in units if u.name not in tied_to), key=lambda u: natural_key(u.name))
    linear = [u for u in units if u.role == "linear"]
    kept = narrowed(linear, units, candidates)
    seen = {EXPERT.sub(r"\g<name>", s.name) for s in report.stats if s.score is not None}
    scored = [u for u in kept if u.name in seen]
    unscored = len(kept) - len(scored) if mode.selective and scored and candidates is None else 0
    if unscored:  # a scan of some kinds or layers
        kept = scored
    if not kept:
        raise OptionError("the report lists no linear matrix that a plan could choose.")
    # Whoever names candidates, or trains the whole, means them in every tower, unless told otherwise.
    everywhere = checked["towers"] is None and (candidates is not None or mode.whole_model)
    inside = {u.name for u in in_towers(units, "all" if everywhere else checked["towers"])}
    outside = [u for u in kept if u.name not in inside]
    kept = [u for u in kept if u.name in inside]
    if not kept:
        raise OptionError(f"towers={checked['towers']!r} and the candidates leave no matrix that a plan could choose.")
    if mode.whole_model and len(kept) < len(linear):
        raise OptionError(
            f"mode {mode.name!r} trains everything, but the candidates leave out {len(linear) - len(kept)} matrices, "
            f"such as {next(u.name for u in linear if u not in kept)}. To train some, use mode='spectrum'."
        )
    around = [u for u in units if u.name in inside or u.tower in (None, "projector")]
    reached = reached_blocks([u for u in units if u.name in inside], checked["backward_depth"])
    pool = [as_candidate(u, reached) for u in kept]

    saved, notes = trained_whole(around, report.tied, checked, reached)
    policy_options = dict(checked)
    if checked["trainable_parameters"] is not None:
        policy_options["trainable_parameters"] = _adapter_budget(pool, saved, checked["trainable_parameters"])
    draft = POLICIES[mode.select](pool, policy_options, gradients)
    return Plan(
        mode=mode.name,
        entries=(*draft.entries, *(_save_entry(u) for u in saved)),
        options=checked,
        criterion=report.criterion,
        fingerprint=report.fingerprint,
        model_id=report.model_id,
        revision=report.revision,
        total_parameters=total_parameters(report),
        notes=(
            *_about(kept, reached, checked, outside),
            *draft.notes,
            *notes,
            *[f"{unscored} matrices were not scored: no candidates, they stay frozen."] * bool(unscored),
        ),
    )


def worth_probing(
    report: SnrReport, candidates: Iterable[str] | None, options: Mapping[str, Any]
) -> Iterable[str] | None:
    """Of the candidates, those whose gradients a plan with these checked options asks for; None for all.

    A mode that looks at singular components asks for those of the matrices that the weights' scores choose; what goes by
    the gradients themselves must see all.
    """
    if "svd_rank" not in MODES[options["mode"]].own_options or options["criterion"] == "fisher":
        return candidates
    shared = {name: options[name] for name in CHOOSING_OPTIONS}
    plan = make_plan(report, candidates=candidates, mode="spectra_qlora", **shared)
    return [e.name for e in plan.entries if e.action != "save" and e.trains]


def _with_names_of(report: SnrReport, gradients: GradientReport) -> GradientReport:
    """The gradients under the report's names: a model in memory may have a prefix that its checkpoint has not.

    Raises:
        MismatchError: the probe saw a matrix that the report does not list.
    """
    units = {EXPERT.sub(r"\g<name>", s.name) for s in report.stats}
    found = names.align(gradients.by_name, units)
    for name in gradients.by_name:
        if name not in found:
            raise MismatchError(f"the gradients list {name}, which the report lacks." + near_matches(name, units))
    return gradients.renamed(found)


def _scored_by(gradients: GradientReport | None, report: SnrReport) -> SnrReport:
    """The report with the gradients' Fisher mass for scores; what the probe did not see has none.

    Raises:
        OptionError: the probe did not measure the Fisher mass.
    """
    assert gradients is not None
    masses = gradients.scores
    if not masses:
        raise OptionError(
            "criterion 'fisher' scores by the Fisher mass, which these gradients do not have: they were measured with "
            "fisher=False. Wanted probe_gradients(model, batches).",
            shell="criterion 'fisher' scores by the Fisher mass, which these gradients do not have: run `spectrum-peft probe`.",
        )
    stats = tuple(
        dataclasses.replace(
            s, score=masses.get(EXPERT.sub(r"\g<name>", s.name)), n_signal=None, s_max=None, power_law=None
        )
        for s in report.stats
    )
    return dataclasses.replace(report, stats=stats, criterion="fisher")


def _save_entry(unit: MatrixStat) -> PlanEntry:
    return PlanEntry(unit.name, "save", kind=unit.kind, shape=unit.shape, score=unit.score)


def _adapter_budget(pool: Sequence[Candidate], saved: Sequence[MatrixStat], budget: int) -> int:
    """What an exact budget leaves for adapters after the tensors that train whole."""
    whole = sum(u.numel for u in saved)
    smallest = smallest_budget(pool) + whole
    if budget < smallest:
        kept = f", {whole:,} of them in embeddings, head and norms" if whole else ""
        raise OptionError(
            f"trainable_parameters is {budget:,}: too few for rank 1 on each of {sum(c.reachable for c in pool)} "
            f"matrices. The smallest that works is {smallest:,}{kept}."
        )
    return budget - whole


def _about(
    kept: Sequence[MatrixStat],
    reached: frozenset[tuple[str, int]] | None,
    options: Mapping[str, Any],
    left_out: Sequence[MatrixStat],
) -> list[str]:
    notes = []
    for tower in sorted({str(u.tower) for u in left_out}):
        count = sum(u.tower == tower for u in left_out)
        notes.append(f"{count} matrices of the tower {tower!r} are no candidates; towers='all' takes every tower.")
    for kind in sorted({u.kind for u in kept if u.kind.rpartition(".")[2] in FUSED_KINDS and len(u.shape or ()) != 3}):
        notes.append(f"{kind} is stored as one fused matrix: its parts share one score and are chosen together.")
    for kind in sorted({u.kind for u in kept if u.shape and len(u.shape) == 3}):
        experts = next(u.shape[0] for u in kept if u.shape and u.kind == kind)
        notes.append(f"{kind} holds {experts} experts in one parameter: ranked by their mean score, chosen together.")
    if reached is not None:
        stacks = blocks_in_order({(where, 0) for where in {names.stack(u.name) for u in kept} if where is not None})
        if len(stacks) > 1:
            order = ", ".join(stack for stack, _ in stacks)
            notes.append(f"backward_depth: the stacks of blocks are taken to run in the order {order}.")
        outside = [u.name for u in kept if place_of(u.name) is None]
        if outside:
            notes.append(
                f"backward_depth: what lies outside the blocks is not taken ({len(outside)}, such as {outside[0]}): "
                "its name does not tell its depth."
            )
    return notes
