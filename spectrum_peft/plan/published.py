"""The published tool's choice, exactly, and the YAML file that it writes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import OptionError
from ..records import MatrixStat, Plan, PlanEntry, SnrReport
from .candidates import as_candidate, narrowed, total_parameters
from .choose import score_of
from .modes import get_mode

# Added by the published script whatever the scores say.
_PUBLISHED_ALWAYS = ("^lm_head.weight$", "^model.embed_tokens.weight$")


def published_plan(
    report: SnrReport, units: Sequence[MatrixStat], candidates: Iterable[str] | None, options: Mapping[str, Any]
) -> Plan:
    """What the published script selects, entry for entry.

    int(n * percent / 100) of each kind, so that a kind of one is never taken below 100 %; kinds and ties in file order;
    norms are kinds like others; head and embeddings always; module names as regexes for `re.match`, which also match
    the modules' biases.
    Source: QuixiAI/spectrum@1996495 spectrum.py, generate_unfrozen_params_yaml.
    """
    linear = [u for u in units if u.role == "linear"]
    if candidates is not None and len(narrowed(linear, units, candidates)) < len(linear):
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
        total_parameters=total_parameters(report),
        notes=tuple(notes),
        patterns=tuple(patterns),
    )


def _published_score(unit: MatrixStat) -> float:
    if unit.score is None and unit.role == "norm":
        return math.inf
    return score_of(as_candidate(unit, None))


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
