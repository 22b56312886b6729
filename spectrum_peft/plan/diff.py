"""What differs between two plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..records import Plan
from .choose import natural_key
from .explain import shown_score


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
    lines += [f"- {name}  (score {shown_score(a.by_name[name].score)})" for name in diff.stopped]
    lines += [f"+ {name}  (score {shown_score(b.by_name[name].score)})" for name in diff.started]
    parts: dict[str, list[str]] = {}
    for name, part, mine, other in diff.changed:
        parts.setdefault(name, []).append(f"{part} {mine} -> {other}")
    lines += [f"~ {name}  {', '.join(changes)}" for name, changes in parts.items()]
    return "\n".join(lines)
