"""Ranks within a number of trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import OptionError
from .choose import Candidate, half, natural_key


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
