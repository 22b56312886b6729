"""Who goes on after a rung, and why the others do not: plain decisions on numbers.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943) with a test below the cut: a run is stopped because it is told
apart from the best on the same rows, or because there is room for so many only. The first has a stated error. The test is a
paired one, row by row, as in Moore & Lee (1994), "Efficient algorithms for minimizing cross validation error". It speaks of the
runs as they are at this length; that a run which is behind may overtake is what the room above the cut is for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT = 3  # one of so many goes on: with lengths that grow by as much, each rung costs about the same


@dataclass(frozen=True)
class Entry:
    """A run at the end of a rung.

    Attributes:
        contestant: its label. rate: its learning rate.
        value: the metric, None where the run failed.
        rows: (rows,) the score of each row; None where the metric has none.
    """

    contestant: str
    rate: float
    value: float | None
    rows: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Verdict:
    """What becomes of a run.

    Attributes:
        fate: `goes on`, `kept` (a control at its best rate, which goes on whatever its place), `worse` (told apart from the
            best), `no room` (not told apart, and others are before it) or `failed`.
        p: chance that a run as good as the best is this far behind it on such rows; None where that cannot be said.
    """

    entry: Entry
    fate: str
    p: float | None

    @property
    def stays(self) -> bool:
        return self.fate in ("goes on", "kept")


def chance_behind(mine: Sequence[float], best: Sequence[float], higher: bool) -> float:
    """One-sided p of Student's paired t-test that the mean of `mine` is as good as that of `best`.

    Args:
        mine, best: (rows,) of the same rows.
    Returns:
        In [0, 1]; 0.5 where no row differs, 0 or 1 where all differ by the same.
    """
    differences = [(a - b if higher else b - a) for a, b in zip(mine, best, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1)) if n > 1 else 0.0
    if n < 2 or spread < 1e-12 * max(1e-300, abs(mean)):
        return 0.5 if mean == 0 or n < 2 else float(mean > 0)
    from scipy.special import stdtr

    return float(stdtr(n - 1, mean / (spread / math.sqrt(n))))


def judge(
    entries: Sequence[Entry],
    *,
    higher: bool,
    room: int,
    error: float,
    kept: Collection[str] = (),
    ties: int = 0,
    one_each: bool = False,
) -> list[Verdict]:
    """The verdict on every run of a rung, the best first.

    The first `room` go on whatever the test says, since who is behind now may be ahead later. Of the n runs each one after those
    is tested against the best at `error` / (n - 1): the chance that the one that is truly best at this length on rows like these
    is stopped as `worse` is at most `error` (Bonferroni; the best that is seen may be any of them). Of those that are not told
    apart, `ties` go on, too.

    Args:
        higher: larger values are better.
        error: of this rung.
        kept: contestants whose best rate goes on in any case, and takes no room.
        one_each: of each contestant the best rate alone goes on.
    """
    able = _in_order(entries, higher)
    verdicts = []
    level = error / max(1, len(able) - 1)
    seen: set[str] = set()
    for i, entry in enumerate(able):
        p = None
        if i and entry.rows and able[0].rows and len(entry.rows) == len(able[0].rows):
            p = chance_behind(entry.rows, able[0].rows, higher)
        if entry.contestant in kept and entry.contestant not in seen:
            fate = "kept"
        elif one_each and entry.contestant in seen:
            fate = "no room"
        elif room > 0:
            fate, room = "goes on", room - 1
        elif p is not None and p < level:
            fate = "worse"
        elif ties > 0 and p is not None:
            fate, ties = "goes on", ties - 1
        else:
            fate = "no room"
        seen.add(entry.contestant)
        verdicts.append(Verdict(entry, fate, p))
    return verdicts + [Verdict(e, "failed", None) for e in entries if e not in able]


def _in_order(entries: Sequence[Entry], higher: bool) -> list[Entry]:
    """Those with a value, the best first."""
    able = [(e.value, e) for e in entries if e.value is not None and math.isfinite(e.value)]
    return [e for _, e in sorted(able, key=lambda x: (-x[0] if higher else x[0], x[1].contestant, x[1].rate))]


def best_rates(entries: Sequence[Entry], higher: bool) -> Mapping[str, Entry]:
    """{contestant: its best run}, the best contestant first."""
    found: dict[str, Entry] = {}
    for entry in _in_order(entries, higher):
        found.setdefault(entry.contestant, entry)
    return found


def as_plain(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [
        {"contestant": v.entry.contestant, "rate": v.entry.rate, "value": v.entry.value, "fate": v.fate, "p": v.p}
        for v in verdicts
    ]
