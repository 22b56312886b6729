"""Who takes part: ways to train that stand for the questions one has, each at several learning rates.

Which kinds of matrices train is one of the questions: the MLPs', the attention's or all, at as many trained parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import names
from ..compare.matrix import Contestant, usual_rate
from ..errors import OptionError, near_matches
from ..plan import MODES
from ..records import SnrReport
from .settings import Asked

RANK, RATIO = 16, 0.25
# The names of the two that every final has: what is usual, and what choosing must beat.
LORA, RANDOM = "lora r16", "real 0.25 random"
# Beside the default rate of the mode, which is within a factor of two of the best in most searches (docs/results.md): a
# logarithmic grid, the likeliest first. The race goes on beyond an edge that is best.
_FACTORS = (1.0, 1 / 3, 3.0, 1 / 9)


def rates_of(contestant: Contestant, asked: Asked, steps: int) -> tuple[float, ...]:
    """The rates that a contestant begins with in runs of so many steps, the default of its mode first; one that names its own has
    that one.
    """
    if contestant.settings.get("learning_rate") is not None:
        return (float(contestant.settings["learning_rate"]),)
    if asked.values["learning_rates"]:
        return tuple(asked.values["learning_rates"])
    return tuple(float(f"{default_rate(contestant, asked.task, steps) * factor:.2g}") for factor in _FACTORS)


def default_rate(contestant: Contestant, task: str, steps: int) -> float:
    """That of its mode, in a run of so many steps; of PEFT's own methods that of LoRA."""
    mode = MODES["lora" if contestant.peft is not None else contestant.mode]
    return usual_rate(mode, contestant.settings, task, steps, contestant.peft)


def next_rate(rates: Sequence[float], best: float) -> float | None:
    """The rate beyond the edge of a logarithmic grid at which the best one lies; None where it lies inside, or alone."""
    grid = sorted(set(rates))
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    beyond = grid[-1] * grid[-1] / grid[-2] if best == grid[-1] else grid[0] * grid[0] / grid[1]
    decade = 10.0 ** math.floor(math.log10(beyond))
    near = min((decade, 3 * decade, 10 * decade), key=lambda rate: abs(math.log(rate / beyond)))
    return float(
        f"{near if abs(near / beyond - 1) < 0.2 else beyond:.3g}"
    )  # 1 and 3 in each decade, where the grid is so


def usual(report: SnrReport, quantized: bool) -> list[Contestant]:
    """The contestants of a model, the most telling first: where time is short, those at the end are left out.

    Args:
        report: names and shapes of the model's matrices.
        quantized: the base is, so that no mode can train all of it.
    """
    kinds = {kind: [s for s in _linear(report) if own(s.name)] for kind, own in _KINDS.items()}
    whole = _linear(report)
    rows = [
        Contestant(LORA, {"mode": "lora", "r": RANK}, "lora"),
        Contestant(RANDOM, {"mode": "spectrum", "spectrum_ratio": RATIO, "criterion": "random"}, "random"),
        Contestant("real 0.25 spaced", {"mode": "spectrum", "spectrum_ratio": RATIO, "criterion": "spaced"}),
        Contestant("full", {"mode": "full"}),
        *_adapters_of_kinds(kinds, whole),
        Contestant("columns r16", {"mode": "columns", "r": RANK}),
        Contestant(
            "lora r32, upper half",
            {"mode": "spectra_qlora", "spectrum_ratio": 1.0, "criterion": "last", "backward_depth": 0.5, "r": 2 * RANK},
        ),
        *_real_weights_of_kinds(kinds, whole),
        Contestant("lora r4", {"mode": "lora", "r": 4}),
        Contestant("lora r64", {"mode": "lora", "r": 64}),
    ]
    return [c for c in rows if not (quantized and MODES[c.mode].whole_model)]


def _linear(report: SnrReport) -> list[Any]:
    return [s for s in report.stats if s.role == "linear" and names.block_index(s.name) is not None and s.shape]


_KINDS: dict[str, Callable[[str], bool]] = {
    "mlp": lambda name: "att" not in name.lower(),
    "attention": lambda name: "att" in name.lower(),
}


def _modules(stats: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(names.module_name(s.name) for s in stats))


def _adapters_of_kinds(kinds: Mapping[str, Sequence[Any]], whole: Sequence[Any]) -> list[Contestant]:
    """LoRA on one kind, of the rank at which it trains what rank 16 does on all: r (n + m) parameters a matrix."""
    made = []
    of_all = sum(sum(s.shape) for s in whole)
    for kind, own in kinds.items():
        size = sum(sum(s.shape) for s in own)
        if not size or size == of_all:
            continue
        rank = max(1, round(RANK * of_all / size))
        made.append(Contestant(f"lora r{rank}, {kind}", {"mode": "lora", "r": rank, "target_modules": _modules(own)}))
    return made


def _real_weights_of_kinds(kinds: Mapping[str, Sequence[Any]], whole: Sequence[Any]) -> list[Contestant]:
    """A part of one kind that is as large as a quarter of all; a kind that is smaller than that is left out."""
    made = []
    of_all = sum(s.shape[0] * s.shape[1] for s in whole)
    for kind, own in kinds.items():
        size = sum(s.shape[0] * s.shape[1] for s in own)
        ratio = RATIO * of_all / size if size else 2.0
        if ratio <= 1 and size < of_all:
            settings = {
                "mode": "spectrum", "spectrum_ratio": round(ratio, 3), "criterion": "spaced", "target_modules": _modules(own),
            }  # fmt: skip
            made.append(Contestant(f"real {ratio:.2g} spaced, {kind}", settings))
    return made


def chosen(
    asked: Asked, report: SnrReport, given: Callable[[list[Mapping[str, Any]]], list[Contestant]]
) -> list[Contestant]:
    """Those that the user named, or all; plain LoRA and a random choice are always among them, first.

    Args:
        given: makes contestants of mappings, as a comparison does.
    Raises:
        OptionError: no contestant of that name.
    """
    quantized = asked.train.get("quantization") not in (None, "none")
    known = {c.label: c for c in usual(report, quantized)}
    wanted = asked.values["contestants"]
    if wanted is None:
        return list(known.values())
    if not isinstance(wanted, list) or not wanted:
        raise OptionError(f"{asked.source}: contestants is {wanted!r}, wanted a list of names or mappings.")
    rows = []
    for row in wanted:
        if isinstance(row, str):
            if row not in known:
                raise OptionError(f"{asked.source}: contestants: {row!r} is none." + near_matches(row, known))
            rows.append(known[row])
    mappings = [row for row in wanted if not isinstance(row, str)]
    own = given(mappings) if mappings else []
    controls = [known[name] for name in (LORA, RANDOM)]
    found = {c.label: c for c in (*controls, *rows, *own)}
    return list(found.values())
