"""make_plan: a report and a policy become a plan. Also: the options, explain(), the difference of two plans.

Reads records, writes records; knows neither weights nor models. The options live here, in one place: names, defaults,
ranges and which of them exclude each other. `SpectrumConfig` and the command line call `check_options` too.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import names
from .errors import CheckpointError, MismatchError, OptionError, near_matches
from .policies import (
    MODES,
    POLICIES,
    Candidate,
    alpha_for,
    get_mode,
    groups,
    natural_key,
    ranked,
    score_of,
    smallest_budget,
    tier_ranks,
)
from .records import GradientReport, MatrixStat, Plan, PlanEntry, SnrReport, count_trainable

# Name -> default. None: derived, as the comment says.
OPTIONS: dict[str, Any] = {
    "mode": "spectrum",
    "criterion": "spectrum",
    "spectrum_ratio": None,  # 0.5, unless a threshold, cuts or a budget choose instead
    "snr_threshold": None,
    "scope": "per_kind",
    "measure": "count",
    "backward_depth": 1.0,
    "train_embeddings": False,
    "train_head": False,
    "train_norms": False,
    "keep_base": "auto",
    "trainable_dtype": "float32",
    "r": 16,
    "lora_alpha": None,  # 2 * r
    "use_rslora": False,
    "r_high": None,  # r
    "r_medium": None,  # max(1, r // 4)
    "trainable_parameters": None,
    "score_cuts": None,
    "lr_ratio": (0.5, 2.0),
    "rescore_every": None,
    "similarity": "subspace",
    "similarity_threshold": None,  # `policies.LIKENESS`, unless n_groups says how many
    "n_groups": None,
    "share": "residual_side",
    "group_gain": False,
    "n_components": 64,
    "component_scope": "layer",
    "svd_rank": 256,
    "rotation_rank": 4,
    "seed": 0,
    "preset": None,
}
DEFAULT_RATIO = 0.5
CRITERIA = ("spectrum", "mp", "mean_std", "row_norm", "kappa", "fisher", "random", "last", "first")
# What decides how much is chosen; one of them only.
_AMOUNTS = ("spectrum_ratio", "snr_threshold", "score_cuts", "trainable_parameters")
# What decides which matrices are chosen by score.
_CHOOSING = ("criterion", "spectrum_ratio", "snr_threshold", "scope", "measure", "backward_depth")
# Added by the published script whatever the scores say.
_PUBLISHED_ALWAYS = ("^lm_head.weight$", "^model.embed_tokens.weight$")
_EXPERT = re.compile(r"^(?P<name>.+)\[(?P<expert>\d+)\]$")
# Several matrices of one input stored as one: they get one score and one entry.
_FUSED = frozenset({"qkv_proj", "qkv", "Wqkv", "W_pack", "c_attn", "query_key_value", "in_proj_weight", "gate_up_proj"})
# Stacks that run before the others in a forward pass (T5's encoder, the towers of models that see and hear).
_RUNS_FIRST = ("encoder", "vision", "visual", "audio", "speech")


# --- options ---------------------------------------------------------------------------------------------------------


def _a_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(f"{name} is {value!r}, wanted a number.")
    if math.isnan(value):
        raise OptionError(f"{name} is nan, wanted a number.")
    return float(value)


def _share(name: str, value: Any) -> float:
    share = _a_number(name, value)
    if not 0 < share <= 1:
        raise OptionError(f"{name} is {value!r}, wanted a share in (0, 1]" + (" (25 % is 0.25)." if share > 1 else "."))
    return share


def _likeness(name: str, value: Any) -> float:
    number = _a_number(name, value)
    if not -1 <= number <= 1:
        raise OptionError(f"{name} is {value!r}, wanted a likeness in [-1, 1]; 1 is the same direction.")
    return number


def _positive(name: str, value: Any) -> float:
    number = _a_number(name, value)
    if not 0 < number < math.inf:
        raise OptionError(f"{name} is {value!r}, wanted a number above 0.")
    return int(number) if number.is_integer() else number


def _integer(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        number = _a_number(name, value)
        if not number.is_integer() or number < least:
            raise OptionError(f"{name} is {value!r}, wanted a whole number of at least {least}.")
        return int(number)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}, wanted true or false.")
    return value


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise OptionError(f"{name} is {value!r}." + near_matches(str(value), choices))
        return value

    return check


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _pair(check: Callable[[str, Any], float], what: str) -> Callable[[str, Any], tuple[float, float]]:
    def checked(name: str, value: Any) -> tuple[float, float]:
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
            raise OptionError(f"{name} is {value!r}, wanted two numbers, {what}.")
        return check(name, value[0]), check(name, value[1])

    return checked


def _interval(name: str, value: Any) -> int | str:
    return "epoch" if value == "epoch" else _integer(1)(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "mode": lambda name, value: get_mode(value).name,
    "criterion": _one_of(*CRITERIA),
    "spectrum_ratio": _optional(_share),
    "snr_threshold": _optional(_a_number),
    "scope": _one_of("per_kind", "global"),
    "measure": _one_of("count", "parameters"),
    "backward_depth": _share,
    "train_embeddings": _flag,
    "train_head": _flag,
    "train_norms": _flag,
    "keep_base": _one_of("auto", "host", "file", "none"),
    "trainable_dtype": _one_of("float32", "base"),
    "r": _integer(1),
    "lora_alpha": _optional(_positive),
    "use_rslora": _flag,
    "r_high": _optional(_integer(1)),
    "r_medium": _optional(_integer(1)),
    "trainable_parameters": _optional(_integer(1)),
    "score_cuts": _optional(_pair(_a_number, "(high, medium)")),
    "lr_ratio": _pair(_positive, "(lowest, highest)"),
    "rescore_every": _optional(_interval),
    "similarity": _one_of("subspace", "cosine"),
    "similarity_threshold": _optional(_likeness),
    "n_groups": _optional(_integer(1)),
    "share": _one_of("residual_side", "both"),
    "group_gain": _flag,
    "n_components": _integer(1),
    "component_scope": _one_of("layer", "global"),
    "svd_rank": _integer(1),
    "rotation_rank": _integer(1),
    "seed": _integer(0),
    "preset": _optional(_one_of("published")),
}


def check_options(**options: Any) -> dict[str, Any]:
    """Validate the options of a plan and fill in the defaults.

    Checking what this returns again changes nothing.

    Returns:
        {name: value} for every name in `OPTIONS`, in that order.
    Raises:
        OptionError: an unknown name, a value outside its range, two options that exclude each other, or an option that
            the mode does not have.
    """
    for name in options:
        if name not in OPTIONS:
            raise OptionError(f"unknown option {name!r}." + near_matches(name, OPTIONS))
    checked = {name: _CHECKS[name](name, options.get(name, default)) for name, default in OPTIONS.items()}
    mode = MODES[checked["mode"]]

    amounts = [name for name in _AMOUNTS if checked[name] is not None]
    if len(amounts) > 1:
        raise OptionError(
            f"{amounts[0]}={checked[amounts[0]]} and {amounts[1]}={checked[amounts[1]]} are both given; each says how "
            "much is chosen, give one."
        )
    for name, value in checked.items():
        owners = [row.name for row in MODES.values() if name in row.own_options]
        if owners and mode.name not in owners and value != OPTIONS[name]:
            raise OptionError(f"{name}={value} means nothing in mode {mode.name!r}; it belongs to {', '.join(owners)}.")
    if checked["rescore_every"] is not None and not mode.rescorable:
        able = ", ".join(row.name for row in MODES.values() if row.rescorable)
        raise OptionError(
            f"rescore_every={checked['rescore_every']!r}: mode {mode.name!r} cannot be re-evaluated during training; "
            f"these can: {able}."
        )
    if checked["rescore_every"] is not None and checked["criterion"] == "fisher":
        raise OptionError(
            f"rescore_every={checked['rescore_every']!r} scores the weights anew during training; criterion 'fisher' is of "
            "gradients on calibration data, which are not kept. Use another criterion, or leave rescore_every out."
        )
    high, medium = tier_ranks(checked)
    if high < medium:
        raise OptionError(f"r_high is {high} and r_medium is {medium}, wanted r_high at least as large.")
    cuts = checked["score_cuts"]
    if cuts is not None and cuts[0] <= cuts[1]:
        raise OptionError(f"score_cuts is {cuts}: the tiers overlap; wanted (high, medium), high above medium.")
    if checked["lr_ratio"][0] > checked["lr_ratio"][1]:
        raise OptionError(f"lr_ratio is {checked['lr_ratio']}, wanted (lowest, highest).")
    if checked["similarity_threshold"] is not None and checked["n_groups"] is not None:
        raise OptionError(
            f"similarity_threshold={checked['similarity_threshold']} and n_groups={checked['n_groups']} are both given; each "
            "says where groups end, give one."
        )
    if checked["backward_depth"] < 1 and (checked["train_embeddings"] or mode.whole_model):
        reason = "train_embeddings=True" if checked["train_embeddings"] else f"mode {mode.name!r} trains the embeddings"
        raise OptionError(
            f"backward_depth={checked['backward_depth']}, but {reason}: backward then runs through every block down to "
            "the embeddings, and nothing is saved."
        )
    if checked["preset"] is not None:
        _check_preset(checked)

    if checked["lora_alpha"] is None:
        checked["lora_alpha"] = 2 * checked["r"]
    if mode.selective and not amounts:
        checked["spectrum_ratio"] = DEFAULT_RATIO
    return checked


def _check_preset(checked: Mapping[str, Any]) -> None:
    """The published selection is what it is: only the mode `spectrum` and a ratio go with it."""
    if checked["mode"] != OPTIONS["mode"]:
        raise OptionError(f"preset={checked['preset']!r} goes with mode 'spectrum', not {checked['mode']!r}.")
    fixed = ("snr_threshold", "scope", "measure", "backward_depth", "train_embeddings", "train_head", "train_norms")
    for name in fixed:
        if checked[name] != OPTIONS[name]:
            raise OptionError(
                f"{name}={checked[name]!r} does not go with preset={checked['preset']!r}, which fixes the selection "
                "(embeddings and head always train, each kind on its own, by count)."
            )


# --- making a plan ---------------------------------------------------------------------------------------------------


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
        report: a report, or the file of one.
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
        return make_plan(SnrReport.load(report), gradients=gradients, candidates=candidates, **options)
    if isinstance(gradients, str | os.PathLike):
        return make_plan(report, gradients=GradientReport.load(gradients), candidates=candidates, **options)
    if not isinstance(report, SnrReport):
        raise OptionError(f"report is a {type(report).__name__}, wanted an SnrReport or the path of one.")
    checked = check_options(**options)
    if gradients is not None and gradients.fingerprint is not None and report.fingerprint is not None:
        gradients.fingerprint.check(report.fingerprint, this="the gradients", that="the report")
    if gradients is None and needs_gradients(checked):
        what = f"mode {checked['mode']!r}" if MODES[checked["mode"]].needs_data else "criterion 'fisher'"
        raise OptionError(
            f"{what} needs gradients on data: give calibration_data=calibration_batches(dataset, tokenizer) to "
            "SpectrumConfig, or gradients=probe_gradients(model, batches) to make_plan."
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
    units = _units(report)
    if checked["preset"] == "published":
        return _published(report, units, candidates, checked)

    mode = MODES[checked["mode"]]
    tied_to = {name: group[0] for group in report.tied for name in group[1:]}
    units = sorted((u for u in units if u.name not in tied_to), key=lambda u: natural_key(u.name))
    linear = [u for u in units if u.role == "linear"]
    kept = _narrow(linear, units, candidates)
    if not kept:
        raise OptionError("the report lists no linear matrix that a plan could choose.")
    if mode.whole_model and len(kept) < len(linear):
        raise OptionError(
            f"mode {mode.name!r} trains everything, but the candidates leave out {len(linear) - len(kept)} matrices, "
            f"such as {next(u.name for u in linear if u not in kept)}. To train some, use mode='spectrum'."
        )
    reached = _reached(units, checked["backward_depth"])
    pool = [_candidate(u, reached) for u in kept]

    saved, notes = _saved(units, report.tied, checked, reached)
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
        total_parameters=_total(report),
        notes=(*_unused_options(checked), *_about(kept, reached, checked), *draft.notes, *notes),
    )


def needs_gradients(options: Mapping[str, Any]) -> bool:
    """Whether a plan with these checked options can only be made with a `GradientReport`."""
    return MODES[options["mode"]].needs_data or options["criterion"] == "fisher"


def worth_probing(
    report: SnrReport, candidates: Iterable[str] | None, options: Mapping[str, Any]
) -> Iterable[str] | None:
    """Of the candidates, those whose gradients a plan with these checked options asks for; None for all.

    A mode that looks at singular components asks for those of the matrices that the weights' scores choose; what goes by
    the gradients themselves must see all.
    """
    if "svd_rank" not in MODES[options["mode"]].own_options or options["criterion"] == "fisher":
        return candidates
    shared = {name: options[name] for name in _CHOOSING}
    plan = make_plan(report, candidates=candidates, mode="spectra_qlora", **shared)
    return [e.name for e in plan.entries if e.action != "save" and e.trains]


def _with_names_of(report: SnrReport, gradients: GradientReport) -> GradientReport:
    """The gradients under the report's names: a model in memory may have a prefix that its checkpoint has not.

    Raises:
        MismatchError: the probe saw a matrix that the report does not list.
    """
    units = {_EXPERT.sub(r"\g<name>", s.name) for s in report.stats}
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
            "fisher=False. Wanted probe_gradients(model, batches)."
        )
    stats = tuple(
        dataclasses.replace(
            s, score=masses.get(_EXPERT.sub(r"\g<name>", s.name)), n_signal=None, s_max=None, power_law=None
        )
        for s in report.stats
    )
    return dataclasses.replace(report, stats=stats, criterion="fisher")


def _total(report: SnrReport) -> int:
    """Elements of the model, 0 where a shape is not known."""
    return report.total_parameters if all(s.shape is not None for s in report.stats) else 0


def _units(report: SnrReport) -> list[MatrixStat]:
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
        match = _EXPERT.match(stat.name)
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
        kind=_EXPERT.sub(r"\g<name>", first.kind),
        shape=None if first.shape is None else (len(members), *first.shape),
        numel=sum(s.numel for s in members),
        dtype=first.dtype,
        score=sum(known) / len(known) if len(known) == len(scores) else None,
        n_signal=None,
        s_max=None,
        role=first.role,
    )


def _narrow(
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


def _candidate(unit: MatrixStat, reached: frozenset[tuple[str, int]] | None) -> Candidate:
    return Candidate(
        name=unit.name,
        kind=unit.kind,
        block=names.block_index(unit.name),
        shape=unit.shape,
        score=unit.score,
        reachable=reached is None or _place(unit.name) in reached,
    )


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


# --- depth -----------------------------------------------------------------------------------------------------------


def _place(name: str) -> tuple[str, int] | None:
    """(stack, block number) of a name in the blocks."""
    where, block = names.stack(name), names.block_index(name)
    return None if where is None or block is None else (where, block)


def _in_order(places: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Blocks in the order a forward pass runs them: encoders and towers, then the rest."""
    return sorted(places, key=lambda p: (not any(part.startswith(_RUNS_FIRST) for part in p[0].split(".")), p))


def _reached(units: Sequence[MatrixStat], depth: float) -> frozenset[tuple[str, int]] | None:
    """The last `depth` of the blocks, at least one; None if that is all of them."""
    if depth == 1:
        return None
    blocks = _in_order({place for u in units if (place := _place(u.name)) is not None})
    if not blocks:
        raise OptionError(f"backward_depth={depth}: no name of the report tells its block.")
    return frozenset(blocks[-max(1, math.floor(len(blocks) * depth + 1e-9)) :])


def _above_cut(name: str, reached: frozenset[tuple[str, int]], blocks: Sequence[tuple[str, int]]) -> bool:
    """Whether a norm can train without backward going below the cut.

    Outside the blocks there is the one before them (in the embeddings), the last of a stack, and the rest after all.
    """
    place = _place(name)
    if place is not None:
        return place in reached
    if any(part.startswith("embed") for part in name.split(".")):
        return False
    owners = {where.rpartition(".")[0]: (where, block) for where, block in blocks}  # the last block of each owner
    around = [owner for owner in owners if owner and name.startswith(f"{owner}.")]
    return owners[max(around, key=len)] in reached if around else True


# --- what trains whole -----------------------------------------------------------------------------------------------


def _saved(
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
        found = {u.name for u in units if names.in_head(u.name)}
        for group in tied:
            if group[0] in roles and any(names.in_head(name) for name in group[1:]):
                if options["backward_depth"] < 1:
                    raise OptionError(
                        f"backward_depth={options['backward_depth']}, but train_head=True trains {group[0]}, which the "
                        "head is tied to: backward then runs down to the embeddings, and nothing is saved."
                    )
                found.add(group[0])
        taken |= _found("train_head", found)
    if options["train_norms"]:
        modules = {names.module_name(u.name) for u in units if u.role == "norm" and not names.in_head(u.name)}
        found = {u.name for u in units if names.module_name(u.name) in modules and u.role in {"norm", "bias"}}
        taken |= _found("train_norms", found)
        if reached is not None:
            blocks = _in_order({place for u in units if (place := _place(u.name)) is not None})
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


# --- notices ---------------------------------------------------------------------------------------------------------


def _unused_options(options: Mapping[str, Any]) -> list[str]:
    """Options that were set and do nothing in this mode: allowed, so that one set of flags serves every mode."""
    mode = MODES[options["mode"]]
    idle = [] if mode.selective else ["spectrum_ratio", "snr_threshold"]
    idle += [] if mode.importance_rates else ["lr_ratio"]
    return [
        f"{name}={options[name]} has no effect in mode {mode.name!r} ({mode.summary})."
        for name in idle
        if options[name] != OPTIONS[name]
    ]


def _about(
    kept: Sequence[MatrixStat], reached: frozenset[tuple[str, int]] | None, options: Mapping[str, Any]
) -> list[str]:
    notes = []
    for kind in sorted({u.kind for u in kept if u.kind.rpartition(".")[2] in _FUSED and len(u.shape or ()) != 3}):
        notes.append(f"{kind} is stored as one fused matrix: its parts share one score and are chosen together.")
    for kind in sorted({u.kind for u in kept if u.shape and len(u.shape) == 3}):
        experts = next(u.shape[0] for u in kept if u.shape and u.kind == kind)
        notes.append(f"{kind} holds {experts} experts in one parameter: ranked by their mean score, chosen together.")
    if reached is not None:
        stacks = _in_order({(where, 0) for where in {names.stack(u.name) for u in kept} if where is not None})
        if len(stacks) > 1:
            order = ", ".join(stack for stack, _ in stacks)
            notes.append(f"backward_depth: the stacks of blocks are taken to run in the order {order}.")
        outside = [u.name for u in kept if _place(u.name) is None]
        if outside:
            notes.append(
                f"backward_depth: what lies outside the blocks is not taken ({len(outside)}, such as {outside[0]}): "
                "its name does not tell its depth."
            )
    return notes


# --- the published selection -----------------------------------------------------------------------------------------


def _published(
    report: SnrReport, units: Sequence[MatrixStat], candidates: Iterable[str] | None, options: Mapping[str, Any]
) -> Plan:
    """What the published script selects, entry for entry.

    int(n * percent / 100) of each kind, so that a kind of one is never taken below 100 %; kinds and ties in file order;
    norms are kinds like others; head and embeddings always; module names as regexes for `re.match`, which also match
    the modules' biases.
    Source: QuixiAI/spectrum@1996495 spectrum.py, generate_unfrozen_params_yaml.
    """
    linear = [u for u in units if u.role == "linear"]
    if candidates is not None and len(_narrow(linear, units, candidates)) < len(linear):
        raise OptionError(f"preset={options['preset']!r} selects among all matrices; the candidates leave some out.")
    notes = []
    if any(u.role == "norm" and u.score is None for u in units):
        # A norm is one row: no noise set, which the published scans write as Infinity.
        notes.append("norms are not scored in this report; they rank as infinite, as in every published scan.")
    scored = [u for u in units if u.score is not None or u.role in {"linear", "norm"}]
    kinds: dict[str, list[MatrixStat]] = {}
    for unit in scored:
        kinds.setdefault(unit.kind, []).append(unit)
    percent = round(options["spectrum_ratio"] * 100, 9)
    patterns = list(_PUBLISHED_ALWAYS)
    for members in kinds.values():
        order = sorted(members, key=_published_score, reverse=True)  # stable: ties keep their file order
        patterns += [u.name.removesuffix(".weight") for u in order[: int(len(members) * percent / 100)]]
    for pattern in _PUBLISHED_ALWAYS:
        if not any(re.match(pattern, u.name) for u in units):
            notes.append(f"{pattern} matches nothing in this report; it is written all the same, as published.")
    matches = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)).match
    tied_to = {name for group in report.tied for name in group[1:]}
    ranked_names = {u.name for u in scored}
    entries = []
    for unit in units:
        if unit.name in tied_to:
            continue
        if matches(unit.name):
            action = "train" if unit.role == "linear" else "save"
        elif unit.name in ranked_names:
            action = "freeze"
        else:
            continue
        entries.append(PlanEntry(unit.name, action, kind=unit.kind, shape=unit.shape, score=unit.score))
    return Plan(
        mode=options["mode"],
        entries=tuple(entries),
        options=options,
        criterion=report.criterion,
        fingerprint=report.fingerprint,
        model_id=report.model_id,
        revision=report.revision,
        total_parameters=_total(report),
        notes=tuple(notes),
        patterns=tuple(patterns),
    )


def _published_score(unit: MatrixStat) -> float:
    if unit.score is None and unit.role == "norm":
        return math.inf
    return score_of(_candidate(unit, None))


def unfrozen_yaml(plan: Plan) -> str:
    """The text of `unfrozen_parameters` as the published script writes it and axolotl reads it, a comment per kind.

    A plan of the preset `published` gives the published file byte for byte.

    Raises:
        OptionError: the plan trains adapters, which that form cannot say.
    """
    mode = get_mode(plan.mode)
    if not mode.real_weights:
        raise OptionError(f"the plan is of mode {mode.name!r}: unfrozen_parameters names real weights that train.")
    kind_of = {}
    for entry in plan.entries:
        kind_of[f"^{entry.name}$"] = kind_of[entry.name.removesuffix(".weight")] = entry.kind
    patterns = plan.unfrozen_parameters
    lines = [p for p in patterns if p in _PUBLISHED_ALWAYS] if plan.patterns else []
    text = "unfrozen_parameters:\n" + "".join(f"- {p}\n" for p in lines)
    for kind in dict.fromkeys(e.kind for e in plan.entries):
        text += f"# {kind} layers\n"
        text += "".join(f"- {p}\n" for p in patterns if p not in lines and kind_of[p] == kind)
    return text


# --- reading a plan --------------------------------------------------------------------------------------------------


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
        "",
        _kind_table(matrices, report),
    ]
    given_up = _given_up(plan)
    if given_up:
        lines += ["", f"What backward_depth={plan.options['backward_depth']} gives up ({len(given_up)} better scores):"]
        lines += [f"  {_score(e.score):>9}  {e.name}" for e in given_up]
    if plan.notes:
        lines += ["", "Notes:", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines)


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
    if not mode.selective:
        text = "everything, scores are not asked"
    elif options["snr_threshold"] is not None:
        text = f"criterion {plan.criterion}, every score above {options['snr_threshold']:.6g}"
    elif options["score_cuts"] is not None:
        high, medium = options["score_cuts"]
        text = f"criterion {plan.criterion}, high tier above {high:.6g}, medium tier above {medium:.6g}"
    elif options["trainable_parameters"] is not None:
        text = f"criterion {plan.criterion}, ranks fitted to {options['trainable_parameters']:,} parameters"
    else:
        whole = "each kind" if options["scope"] == "per_kind" else "all matrices together"
        share = _percent(options["spectrum_ratio"])
        text = f"criterion {plan.criterion}, the best {share} of {whole}, by {options['measure']}"
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
            _span([_score(min(scores)), _score(max(scores))]) if scores else "-",
            _score(max(left)) if left else "-",
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


def _score(value: float | None) -> str:
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
    for members in groups(_candidates_of(plan), options["scope"]).values():
        n_chosen = sum(plan.by_name[c.name].trains for c in members)
        missed += [entry for c in members[:n_chosen] if not (entry := plan.by_name[c.name]).trains]
    return missed


def _candidates_of(plan: Plan, scores: Mapping[str, float] | None = None) -> list[Candidate]:
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


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns; the first is flush left, the others flush right."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


# --- the difference of two plans -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanDiff:
    """How plan b differs from plan a.

    Attributes:
        started, stopped: names that train in b only, in a only.
        changed: (name, field, value in a, value in b) of those that train in both.
        settings: (name, value in a, value in b) of mode, model, criterion and options.
        parameters: trainable elements of a and of b.
    """

    started: tuple[str, ...]
    stopped: tuple[str, ...]
    changed: tuple[tuple[str, str, Any, Any], ...]
    settings: tuple[tuple[str, Any, Any], ...]
    parameters: tuple[int, int]

    def __bool__(self) -> bool:
        """False where both plans train the same in the same way, whatever their settings say."""
        return bool(self.started or self.stopped or self.changed)


def compare_plans(a: Plan, b: Plan) -> PlanDiff:
    """The difference of two plans as data; `diff_plans` is the text of it."""
    in_a, in_b = set(a.trainable_names), set(b.trainable_names)
    changed = [
        (name, part, mine, other)
        for name in sorted(in_a & in_b, key=natural_key)
        for part in ("action", "rank", "alpha", "lr_ratio", "group")
        if (mine := getattr(a.by_name[name], part)) != (other := getattr(b.by_name[name], part))
    ]
    settings = [
        (part, getattr(a, part), getattr(b, part))
        for part in ("mode", "model_id", "revision", "criterion")
        if getattr(a, part) != getattr(b, part)
    ]
    for name in dict.fromkeys([*a.options, *b.options]):
        values = a.options.get(name), b.options.get(name)
        if values[0] != values[1] and name not in {"mode", "criterion"}:
            settings.append((name, *values))
    return PlanDiff(
        started=tuple(sorted(in_b - in_a, key=natural_key)),
        stopped=tuple(sorted(in_a - in_b, key=natural_key)),
        changed=tuple(changed),
        settings=tuple(settings),
        parameters=(a.trainable_parameters, b.trainable_parameters),
    )


def diff_plans(a: Plan, b: Plan) -> str:
    """How plan b differs from plan a, as text: settings, then `+` what starts to train, `-` what stops, `~` changes."""
    diff = compare_plans(a, b)
    lines = [f"{name}: {mine} -> {other}" for name, mine, other in diff.settings]
    if not diff:
        return "\n".join([*lines, f"The same {len(a.trainable_names)} tensors train in the same way."])
    same = len(set(a.trainable_names) & set(b.trainable_names))
    lines.append(
        f"{same} tensors train in both, {len(diff.stopped)} in the first only, {len(diff.started)} in the second only; "
        f"trainable parameters {diff.parameters[0]:,} -> {diff.parameters[1]:,}."
    )
    lines += [f"- {name}  (score {_score(a.by_name[name].score)})" for name in diff.stopped]
    lines += [f"+ {name}  (score {_score(b.by_name[name].score)})" for name in diff.started]
    parts: dict[str, list[str]] = {}
    for name, part, mine, other in diff.changed:
        parts.setdefault(name, []).append(f"{part} {mine} -> {other}")
    lines += [f"~ {name}  {', '.join(changes)}" for name, changes in parts.items()]
    return "\n".join(lines)


# --- re-evaluation ---------------------------------------------------------------------------------------------------


def replan(plan: Plan, scores: Mapping[str, float], budget: int | None = None) -> Plan:
    """The plan again, with new scores of its matrices: what re-evaluation during training does.

    Same options, same candidates, tensors that train whole as they were. The budget is kept: no more parameters train
    than before (where matrices of other sizes rise to the top, the worst-scored lose their place), and no rank goes
    above the highest one of the plan, which is what the layers have allocated.

    Args:
        scores: {name: score} of exactly the plan's matrices.
        budget: trainable parameters not to go above; None for those of `plan`. Over many re-evaluations give those of
            the first plan: each may leave a remainder, which the next would lose.
    Raises:
        OptionError: the plan was not made for re-evaluation, a score is missing, or names no matrix of the plan.
    """
    options = dict(plan.options)
    if options.get("rescore_every") is None:
        raise OptionError("the plan was made without rescore_every: its matrices have no place to be activated in.")
    matrices = {e.name for e in plan.entries if e.action != "save"}
    for name in sorted(matrices ^ set(scores)):
        if name in matrices:
            raise OptionError(f"{name} of the plan has no new score.")
        raise OptionError(f"{name!r} has a new score and is no matrix of the plan." + near_matches(name, matrices))
    whole = tuple(e for e in plan.entries if e.action == "save")
    budget = (plan.trainable_parameters if budget is None else budget) - sum(e.trainable_numel for e in whole)
    pool = _candidates_of(plan, scores)
    if options["trainable_parameters"] is not None:
        options["trainable_parameters"] = budget
    draft = POLICIES[get_mode(plan.mode).select](pool, options, None)
    highest = max(e.rank or 0 for e in plan.entries)
    entries = {e.name: e for e in draft.entries}
    for e in draft.entries:
        if (e.rank or 0) > highest:
            entries[e.name] = dataclasses.replace(e, rank=highest, alpha=alpha_for(highest, options))
    used = sum(e.trainable_numel for e in entries.values())
    for candidate in reversed(ranked([c for c in pool if entries[c.name].trains])):
        if used <= budget:
            break
        entry = entries[candidate.name]
        used -= entry.trainable_numel
        entries[candidate.name] = dataclasses.replace(entry, active=False, rank=0, alpha=0.0, lr_ratio=1.0)
    return plan.replace(entries=(*entries.values(), *whole), notes=draft.notes)
