"""Bytes that each of two processes sends in a training step, by DDP and by FSDP2, counted at the collectives.

    python benchmarks/ranks.py      # on CPUs, by gloo; a minute

The model is very small: what is sent is so many bytes for a weight, whatever the size. Counted is what a ring sends: of an
all-reduce of S bytes over N processes 2 S (N - 1) / N each, of a reduce-scatter S (N - 1) / N, of an all-gather of shards of s
bytes s (N - 1). Source: Thakur, Rabenseifner and Gropp (2005), Optimization of collective communication operations in MPICH.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

PROCESSES, STEPS = 2, 3
_NO_TRAFFIC = ("wait_tensor.default", "_wrap_tensor_autograd.default")
_SHAPES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "spectrum": {"spectrum_ratio": 0.25}, "spectra_qlora": {"spectrum_ratio": 0.5}, "alors": {"spectrum_ratio": 0.5},
    "sgm": {"spectrum_ratio": 1.0, "similarity_threshold": -1.0}, "lorsa": {"n_components": 32, "svd_rank": 64},
}  # fmt: skip


def run(output: Path) -> None:
    """Two processes, which torchrun starts, count for all modes; then the result is written."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES), __file__]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(common.ROOT)}
        subprocess.run([sys.executable, *words, "--count", str(out)], env=env, check=True)
        found = json.loads(out.read_text())
    common.save(output, "ranks", {**common.commit(), "processes": PROCESSES, "shapes": _SHAPES, "modes": found})


def _count(mode: str, sharing: str) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    import transformers
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils._python_dispatch import TorchDispatchMode

    from spectrum_peft import SpectrumConfig
    from spectrum_peft.tuner.loading import made_trainable

    class Sent(TorchDispatchMode):
        """Adds up what the collectives that run under it send."""

        sent = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if name.startswith(("c10d.", "_c10d_functional.")) and not name.endswith(_NO_TRAFFIC):
                self.sent += _sent(name.replace("_", ""), args)
            return func(*args, **(kwargs or {}))

    def _bytes(value: Any) -> int:
        if isinstance(value, (list, tuple)):
            return sum(map(_bytes, value))
        return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0

    def _sent(name: str, args: Any) -> float:
        others = PROCESSES - 1
        own = (
            args[0] if name.startswith("c10dfunctional") else args[1]
        )  # what goes in; c10d's own take first what comes out
        if "allreduce" in name:
            return 2 * _bytes(args[0]) * others / PROCESSES
        if "reducescatter" in name:
            return _bytes(own) * others / PROCESSES
        if "allgather" in name:
            return _bytes(own) * others
        if "broadcast" in name:
            return _bytes(args[0]) * (dist.get_rank() == 0)
        raise NotImplementedError(name)

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPES))
    ids = torch.randint(0, 256, (2, 16))
    data = {"calibration_data": [{"input_ids": ids, "labels": ids}]} if mode in ("sgm", "lorsa") else {}
    model = made_trainable(model, SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **OPTIONS.get(mode, {}), **data))
    tuner = getattr(model, "base_model", None)
    if hasattr(tuner, "attended"):
        tuner.attended()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    model.train()
    if sharing == "ddp":
        run: Any = DistributedDataParallel(model)
    else:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for block in base.model.layers:  # and the rest with the root, as accelerate shares a model out
            fully_shard(block)
        run = fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in run.parameters() if p.requires_grad], lr=1e-4)
    found = []
    for _ in range(STEPS):
        with Sent() as counter:
            run(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(counter.sent)
    half = (PROCESSES - 1) / PROCESSES
    inner = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".layers." in n)
    # A block is gathered for forward and again for backward; the rest stays gathered in between.
    predicted = 2 * trained * half if sharing == "ddp" else (weights + inner + trained) * half
    return {
        "weights_bytes": weights, "trained_bytes": trained, "sent_bytes": found[-1], "predicted_bytes": predicted,
    }  # fmt: skip


def _all(out: Path) -> None:
    import torch.distributed as dist

    from spectrum_peft.plan import MODES

    dist.init_process_group("gloo")
    found = {mode: {sharing: _count(mode, sharing) for sharing in ("ddp", "fsdp2")} for mode in MODES}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS / "ranks.json")
    options = parser.parse_args()
    if options.count:
        _all(options.count)
    else:
        run(options.output)


if __name__ == "__main__":
    main()
