"""The ranks of a plan, decided anew by other scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..errors import OptionError, near_matches
from ..records import Plan
from .candidates import candidates_of_plan
from .choose import alpha_for, ranked
from .modes import get_mode
from .policies import POLICIES


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
    pool = candidates_of_plan(plan, scores)
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
