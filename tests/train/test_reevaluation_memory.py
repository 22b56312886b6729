"""Ranks that are evaluated again and again leave nothing behind: no tensor, and no bytes that Python does not know of."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from architectures import ARCHITECTURES
from peft import get_peft_model
from running import LIBRARIES, trainer

from spectrum_peft import SpectrumCallback, SpectrumConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from long import allocated

pytestmark = LIBRARIES
TIMES = 20


def _kept() -> tuple[int, int]:
    """Tensors that live, bytes that are allocated (0 without glibc)."""
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()), allocated() or 0


def test_evaluating_ranks_again_keeps_no_tensor_and_no_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = SpectrumConfig(mode="alors", spectrum_ratio=0.5, r=4, rescore_every=1, task_type="CAUSAL_LM")
    model = get_peft_model(ARCHITECTURES["llama"].build(), config)
    callback = SpectrumCallback()
    run = trainer(model, tmp_path, [callback], max_steps=1)
    run.train()
    run.state.max_steps = 1000

    def again(times: int) -> None:
        for _ in range(times):
            run.state.global_step += 1
            callback.on_step_end(run.args, run.state, run.control, model=run.model, optimizer=run.optimizer)

    again(5)  # threads, caches
    tensors, held = _kept()
    again(TIMES)
    now = _kept()
    assert len(callback.history) == 5 + TIMES
    assert now[0] <= tensors
    # What such a leak would keep each time is at least the smallest of the matrices that are scored.
    matrix = min(4 * stat.numel for stat in config.report.stats if stat.score is not None)
    assert now[1] - held < TIMES * matrix
