"""Real weights of some columns (`columns`) beside PEFT's LoRA of equally many parameters: memory, step time, quality.

    python benchmarks/columns.py             # bytes and step times, and dry runs at 8B shapes; about 10 minutes
    python benchmarks/columns.py --quality   # held-out loss of short runs, rates searched for both; about 15 minutes

Each part is merged into the result file. Step times are taken as in `modes.py`: all contestants alive at once, one thread
each, and a ratio is the median over the rounds. In the quality part one process trains one run after another from the same
base, on the same batches for a seed; a rate is searched on seed 0, the best is run with the other seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import modes
from models import folder_of
from modes import Contestant, Settings
from turns import context, start

RESULT = common.RESULTS / "columns.json"
DATA = common.ROOT.parent / "shared" / "data"
GOALS = {"activations": 0.82, "step": 1.0, "peak": 1.0}
COLUMNS = {"mode": "columns"}
# The first of each is what the others are divided by.
CONTESTS: dict[str, dict[str, Contestant]] = {
    "float32": {
        "LoRA of peft": Contestant(None),
        "columns": Contestant(COLUMNS),
        "columns, runs of 16": Contestant({**COLUMNS, "column_block": 16}),
    },
    "nf4": {"LoRA of peft": Contestant(None, nf4=True), "columns": Contestant(COLUMNS, nf4=True)},
}
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
# Where the search for a rate begins; it goes on by factors of two while the best is at the edge.
RATES = {"lora": (4e-4, 8e-4), "columns": (4e-4, 8e-4)}


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(models: Sequence[str], contests: Sequence[str], steps: int) -> dict[str, Any]:
    """Bytes and step times of every contest on every model; a contest whose processes do not fit is the user's to leave out."""
    settings = Settings(steps=steps)
    ctx = context(modes.preload())
    found: dict[str, Any] = {"settings": asdict(settings), "models": {}}
    for model in models:
        process, pipe = start(ctx, modes.prepare, model)
        folder, report = pipe.recv()
        process.join()
        for contest in contests:
            row = modes.compare(ctx, folder, report, CONTESTS[contest], settings, f"{model}/{contest}")
            first = next(iter(CONTESTS[contest]))
            row["over_lora"] = {
                name: {
                    **{key: facts[key] / row["contestants"][first][key] for key in ("activation_bytes", "peak_bytes")},
                    "step": modes.time_ratio([row], name, first),
                    "step_cpu": modes.time_ratio([row], name, first, "step_cpu_seconds"),
                }
                for name, facts in row["contestants"].items()
                if name != first
            }  # fmt: skip
            found["models"].setdefault(model, {})[contest] = row
            print(model, contest, json.dumps(row["over_lora"]), file=sys.stderr, flush=True)
    return found


def dry_runs() -> dict[str, Any]:
    """Of one step at 8B shapes, on a bfloat16 base and in 4 bit: LoRA of rank 16 on every matrix, and columns for it."""
    import tempfile

    from spectrum_peft import estimate_memory, make_plan
    from spectrum_peft.memory import report_of_config

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        report = report_of_config(folder)
        for quantization in (None, "nf4"):
            for checkpointing in (False, True):
                for mode in ("lora", "columns"):
                    memory = estimate_memory(
                        folder, make_plan(report, mode=mode), batch_size=1, max_length=1024, dtype="bfloat16",
                        quantization=quantization, gradient_checkpointing=checkpointing, device="cuda",
                        attn_implementation="sdpa",
                    )  # fmt: skip
                    name = f"{mode}, {quantization or 'bfloat16'}" + (", checkpointing" if checkpointing else "")
                    rows[name] = {
                        "trainable_parameters": memory.trainable_parameters,
                        "peak_bytes": memory.peak_bytes,
                        "by_category": dict(memory.by_category),
                        "phases": {phase: dict(parts) for phase, parts in memory.phases.items()},
                    }
    return rows


# --- quality ---------------------------------------------------------------------------------------------------------


class Task:
    """A base, its training rows and held-out batches, all read once.

    Args:
        data: `gsm8k` or `dolly`, on SmolLM2-135M.
    """

    def __init__(self, data: str, batch: int, length: int, held_out: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from spectrum_peft import calibration_batches
        from spectrum_peft.data import read_dataset

        self.data, self.batch = data, batch
        folder = folder_of("smollm2")
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def batches(split: str, n: int, seed: int) -> list[dict[str, Any]]:
            rows: Any = read_dataset(str(DATA / data / f"{split}.jsonl"))
            rows = rows.remove_columns([c for c in rows.column_names if c not in ("prompt", "completion")])
            return calibration_batches(rows, tokenizer, n, seed, batch_size=batch, max_length=length)

        self.train: Callable[[int, int], list[dict[str, Any]]] = lambda n, seed: batches("train", n, seed)
        self.held_out = batches("validation", held_out, 0)


def run(task: Task, config: Any, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """One training run from the base, linear decay of the rate after a tenth of warm-up; the loss on held-out rows by tokens."""
    import time

    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(task.base), copy.deepcopy(config))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, (steps - n) / max(1, steps - warm))
    )
    batches = task.train(steps * task.batch, seed)
    random.Random(seed).shuffle(batches)
    model.train()
    began = time.process_time()
    for batch in batches[:steps]:
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.process_time() - began
    return {
        "rate": rate, "seed": seed, "loss": held_out_loss(model, task.held_out), "cpu_seconds": seconds,
        "trained": sum(p.numel() for p in trained),
    }  # fmt: skip


def held_out_loss(model: Any, batches: Sequence[Mapping[str, Any]]) -> float:
    import torch

    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch, use_cache=False).loss) * count
            tokens += count
    return total / tokens


def quality(data: str, steps: int, seeds: Sequence[int], held_out: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Search each method's rate on the first seed, run the best with the others; `keep` gets what is there after each run."""
    import torch
    from peft import LoraConfig

    from spectrum_peft import SpectrumConfig

    torch.set_num_threads(1)
    task = Task(data, modes.BATCH, modes.LENGTH, held_out)
    with_data = {"calibration_data": task.train(16, 1000)}
    configs: dict[str, Any] = {
        "lora": LoraConfig(r=modes.RANK, lora_alpha=2 * modes.RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        "columns": SpectrumConfig(**COLUMNS, task_type="CAUSAL_LM"),
        "columns by activation": SpectrumConfig(**COLUMNS, columns_by="activation", **with_data, task_type="CAUSAL_LM"),
        "columns by fisher": SpectrumConfig(**COLUMNS, columns_by="fisher", **with_data, task_type="CAUSAL_LM"),
        "columns by spectrum": SpectrumConfig(**COLUMNS, columns_by="spectrum", criterion="mp", task_type="CAUSAL_LM"),
    }
    found: dict[str, Any] = {
        "task": data, "steps": steps, "batch": modes.BATCH, "length": modes.LENGTH, "held_out_rows": held_out,
        "untrained": held_out_loss(task.base, task.held_out), "runs": {}, "best": {},
    }  # fmt: skip

    def one(name: str, rate: float, seed: int) -> float:
        row = run(task, configs[name], rate, steps, seed)
        found["runs"].setdefault(name, []).append(row)
        print(data, name, row, file=sys.stderr, flush=True)
        keep(found)
        return float(row["loss"])

    for name in ("lora", "columns"):
        losses = {rate: one(name, rate, seeds[0]) for rate in RATES[name]}
        while (best := min(losses, key=lambda rate: losses[rate])) in (min(losses), max(losses)):
            rate = best / 2 if best == min(losses) else best * 2
            losses[rate] = one(name, rate, seeds[0])
        found["best"][name] = best
    for seed in seeds[1:]:
        for name in ("lora", "columns"):
            one(name, found["best"][name], seed)
    for name in configs:  # the other ways to choose, at the rate of the random choice
        if name not in RATES:
            one(name, found["best"]["columns"], seeds[0])
    losses = {name: [r["loss"] for r in found["runs"][name] if r["rate"] == found["best"][name]] for name in RATES}
    differences = [a - b for a, b in zip(losses["columns"], losses["lora"], strict=True)]
    found["columns_minus_lora"] = {
        "mean": statistics.fmean(differences),
        "by_seed": differences,
        **({"sd": statistics.stdev(differences)} if len(differences) > 1 else {}),
    }
    keep(found)


# --- result ----------------------------------------------------------------------------------------------------------


def merged(path: Path, part: str, data: Any) -> None:
    """Put a part into the result file beside the parts that are there."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    parts = {key: value for key, value in known.items() if key not in ("benchmark", "written", "machine")}
    common.save(path, "columns", {**parts, "goals": GOALS, part: data})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quality", nargs="*", choices=("gsm8k", "dolly"), help="train on these instead; default gsm8k"
    )
    parser.add_argument("--models", nargs="+", choices=modes.MODELS, default=list(modes.MODELS))
    parser.add_argument("--contests", nargs="+", choices=list(CONTESTS), default=list(CONTESTS))
    parser.add_argument("--no-dry-runs", action="store_true", help="leave the 8B shapes out")
    parser.add_argument("--steps", type=int, default=None, help="timed steps, default 5; of a quality run, default 40")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=48, help="rows that a run is judged on")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.quality is not None:
        for data in options.quality or ["gsm8k"]:
            quality(
                data, options.steps or 40, range(options.seeds), options.held_out,
                lambda found, data=data: merged(options.output, f"quality {data}", found),
            )  # fmt: skip
        return 0
    common.warn_if_busy()
    if not options.no_dry_runs:
        merged(options.output, "dry runs", dry_runs())
    merged(options.output, "cost", cost(options.models, options.contests, options.steps or 5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
