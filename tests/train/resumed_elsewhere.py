"""A script of asserts: runs that go on with another number of processes.

    torchrun --nproc_per_node N resumed_elsewhere.py OUT CASE...

Of each case (as in two_processes.py): from the checkpoint that another number of processes left at step 2, if there is one, to
step 4; then from the start to step 4, with a checkpoint at step 2 for others. Weights and losses of both must be the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from running import values
from two_processes import WORLD, trained, whole


def ends(run: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    return whole(values(run.model)), [row["loss"] for row in run.state.log_history if "loss" in row]


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == WORLD
    for case in cases:
        here, there = (out / f"{case.replace(':', '-')}-{count}" for count in (WORLD, 3 - WORLD))
        straight, losses = ends(trained(out / "base", case, here, saves=True)[0])
        if (there / "checkpoint-2").is_dir():
            found, after = ends(trained(out / "base", case, here / "resumed", there / "checkpoint-2")[0])
            apart = {n: float((found[n] - straight[n]).abs().max()) for n in straight}
            worst = max(apart, key=lambda n: apart[n])
            assert apart[worst] < 1e-6, (case, worst, apart[worst])
            assert max(abs(a - b) for a, b in zip(after[-2:], losses[-2:], strict=True)) < 1e-5, (after, losses)
            print(f"went on: {case}, {3 - WORLD} -> {WORLD}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
