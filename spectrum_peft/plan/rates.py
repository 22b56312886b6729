"""Learning rates where the user set none, and words about those that were tried.

How often these defaults are near the best rates of the searches that were made is counted in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The usual rates are those of runs of thousands of steps, and shorter runs want higher ones: a rate that goes with
# 1 / sqrt(steps), and is the usual one from 4,000 on. It is also the theory's order where the number of steps is fixed
# beforehand: Nemirovski, Juditsky, Lan and Shapiro, Robust stochastic approximation, SIAM J. Optim. 19 (2009), section 2.
LONG_RUN = 4000
SHORTEST_SEARCHED = 25
# The rank that LoRA's usual rate is meant for; PEFT's default. Where lora_alpha grows with r, the best rates that were
# found fall with about 1 / sqrt(r); that is the scale by which Kalajdzievski (2023), arXiv:2312.03732, keeps what a LoRA puts
# out of one size.
LORA_RANK = 8
# Where only a share of a language model's matrices trains, the best rates that were found grow with about 1 / sqrt(share): a
# step of AdamW is about rate * sqrt(number of weights) long, so that this keeps it of one length. No smaller share was searched.
SMALLEST_SEARCHED = 0.25


def scaled_rate(usual: float, steps: int, r: int | None = None, ratio: float | None = None) -> float:
    """A mode's usual rate at the length, rank and share of one run; to two digits.

    Args:
        usual: that of `LONG_RUN` steps or more, at rank `LORA_RANK`, or with all matrices.
        r: rank of a LoRA; None where no LoRA trains.
        ratio: share of the matrices that trains, in (0, 1]; None where it makes no difference.
    """
    longer = LONG_RUN / min(max(steps, SHORTEST_SEARCHED), LONG_RUN)
    narrower = LORA_RANK / r if r else 1.0
    fewer = 1 / max(ratio, SMALLEST_SEARCHED) if ratio else 1.0
    return float(f"{usual * (longer * narrower * fewer) ** 0.5:.2g}")


def rank_of(given: Mapping[str, Any], default: int = LORA_RANK) -> int:
    """The rank that options or fields of a PEFT config name, for a default rate; the default where they name none that is one."""
    r = given.get("r", given.get("init_r"))
    return r if isinstance(r, int) and r > 0 else default


def edge_of(tried: Sequence[float], best: float) -> str:
    """Words for a best rate with no worse one tried beyond it, or none."""
    side = "highest" if best == max(tried) else "lowest" if best == min(tried) else ""
    return f"it is the {side} that was tried, so a {side[:-3]}er one may be better" if side else ""
