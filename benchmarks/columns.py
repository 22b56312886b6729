"""Real weights of some columns (`columns`) beside PEFT's LoRA of equally many parameters: memory, step time, quality.

    python benchmarks/columns.py             # bytes and step times, and dry runs at 8B shapes; about 10 minutes
    python benchmarks/columns.py --quality   # held-out loss of short runs, rates searched for both; about two hours
    python benchmarks/columns.py --quality banking77   # of one task; a quarter of an hour

Each part is merged into the result file. Step times are taken as in `modes.py`: all contestants alive at once, one thread
each, and a ratio is the median over the rounds. In the quality part one process trains one run after another from the same
base, on the same batches for a seed; a rate is searched on seed 0, the best is run with the other seeds. Runs that the
result file holds for the same settings are not run again. Which columns train follows from the plan's seed, so it is the same
in all runs of a way to choose.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
RATES = (4e-4, 8e-4)


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


@dataclass(frozen=True)
class Task:
    """A base, its training rows and held-out batches, all read once.

    Attributes:
        settings: what decides the figures, as it stands in the result; kept runs count where all of it is equal.
        base: the model that every run begins from; float32.
        task_type: PEFT's name of the task.
        train: (rows, seed) -> batches of `settings["batch"]` rows.
        held_out: the batches that a run is judged on.
    """

    settings: Mapping[str, Any]
    base: Any
    task_type: str
    train: Callable[[int, int], list[dict[str, Any]]]
    held_out: Sequence[Mapping[str, Any]]


def writing(data: str, steps: int, held_out: int) -> Task:
    """Answers of `gsm8k` or `dolly` by SmolLM2-135M."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spectrum_peft import calibration_batches
    from spectrum_peft.data import read_dataset

    folder = folder_of("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def batches(split: str, n: int, seed: int) -> list[dict[str, Any]]:
        rows: Any = read_dataset(str(DATA / data / f"{split}.jsonl"))
        rows = rows.remove_columns([c for c in rows.column_names if c not in ("prompt", "completion")])
        found: list[dict[str, Any]] = []
        # Of a long prompt the cut leaves no answer: others are drawn in place of a batch of such rows.
        while len(found) * modes.BATCH < n:
            more = calibration_batches(
                rows, tokenizer, n - len(found) * modes.BATCH, seed, batch_size=modes.BATCH, max_length=modes.LENGTH
            )
            found += [batch for batch in more if (batch["labels"][:, 1:] != -100).any()]
            seed += 10_000
        return found

    settings = {"task": data, "steps": steps, "batch": modes.BATCH, "length": modes.LENGTH, "held_out_rows": held_out}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return Task(
        settings, base, "CAUSAL_LM", lambda n, seed: batches("train", n, seed), batches("validation", held_out, 0)
    )


def classifying(data: str, steps: int, held_out: int) -> Task:
    """Classes of `banking77` by MiniLM, its head fitted beforehand on rows that are not trained on, as in `quality.py`."""
    import quality as suites
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config, train, judged = suites.prepare(suites.SUITES[f"adapters-{data}"], False, DATA, common.ROOT / "quality_runs")
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    base = AutoModelForSequenceClassification.from_pretrained(config["model"], dtype="float32")
    batch, length = 8, int(config["max_length"])

    def batches(path: Path, n: int, seed: int | None) -> list[dict[str, Any]]:
        import torch

        rows = [json.loads(line) for line in suites.lines_of(path)]
        rows = rows[:n] if seed is None else random.Random(seed).sample(rows, n)
        found = []
        for i in range(0, n, batch):
            some = rows[i : i + batch]
            texts = [row["text"] for row in some]
            encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            labels = torch.tensor([base.config.label2id[str(row["label"])] for row in some])
            found.append({**encoded, "labels": labels})
        return found

    settings = {"task": data, "steps": steps, "batch": batch, "length": length, "held_out_rows": held_out}
    return Task(settings, base, "SEQ_CLS", lambda n, seed: batches(train, n, seed), batches(judged, held_out, None))


# Of each: how it is made, steps of a run, rows that a run is judged on.
TASKS: dict[str, tuple[Callable[[str, int, int], Task], int, int]] = {
    "gsm8k": (writing, 60, 64),
    "dolly": (writing, 60, 64),
    "banking77": (classifying, 80, 1000),
}


def run(task: Task, config: Any, rate: float, seed: int) -> dict[str, Any]:
    """One training run from the base, linear decay of the rate after a tenth of warm-up; its figures on held-out rows."""
    import time

    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(task.base), copy.deepcopy(config))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    steps, batch_size = task.settings["steps"], task.settings["batch"]
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, (steps - n) / max(1, steps - warm))
    )
    batches = task.train(steps * batch_size, seed)
    random.Random(seed).shuffle(batches)
    model.train()
    began = time.process_time()
    for batch in batches[:steps]:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.process_time() - began
    return {
        "rate": rate, "seed": seed, **held_out_figures(model, task), "cpu_seconds": seconds,
        "trained": sum(p.numel() for p in trained),
    }  # fmt: skip


def held_out_figures(model: Any, task: Task) -> dict[str, float | None]:
    """Loss by tokens, or by rows of a classifier, and then the share of rows that it gets right, too; None: not finite."""
    import torch

    model.eval()
    classifies = task.task_type == "SEQ_CLS"
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in task.held_out:
            found, labels = model(**batch), batch["labels"]
            counted = len(labels) if classifies else int((labels[:, 1:] != -100).sum())
            total += float(found.loss) * counted
            count += counted
            if classifies:
                right += int((found.logits.argmax(-1) == labels).sum())
    loss = total / count if math.isfinite(total) else None  # its rate was too high; JSON has no such number
    return {"loss": loss, **({"accuracy": right / count} if classifies else {})}


def contestants(task: Task) -> dict[str, Any]:
    """PEFT's LoRA on every linear, and columns of as many parameters, chosen in every way. Where LoRA's default scale is
    meant, it is the usual one, alpha = 2 r."""
    from peft import LoraConfig

    from spectrum_peft import SpectrumConfig

    ways: dict[str, dict[str, Any]] = {
        "columns": {},
        "columns by activation": {"columns_by": "activation", "calibration_data": task.train(16, 1000)},
        "columns by fisher": {"columns_by": "fisher", "calibration_data": task.train(16, 1000)},
        "columns by spectrum": {"columns_by": "spectrum", "criterion": "mp"},
        "columns and rows, coupled": {
            "coupled": True,
            "head_width": 1,
        },  # single features, so that as many parameters train
    }
    return {
        "lora": LoraConfig(
            r=modes.RANK, lora_alpha=2 * modes.RANK, target_modules="all-linear", task_type=task.task_type
        ),
        **{name: SpectrumConfig(**COLUMNS, **way, task_type=task.task_type) for name, way in ways.items()},
    }


def quality(
    task: Task, seeds: Sequence[int], known: Mapping[str, Any], keep: Callable[[Mapping[str, Any]], None]
) -> None:
    """Search each method's rate on the first seed, run the best with the others; LoRA and the random choice come first.

    Args:
        known: what an earlier call kept; its runs are taken up where they are of the same task and settings.
        keep: gets what is there after each run.
    """
    same = all(known.get(key) == value for key, value in task.settings.items())
    figures = held_out_figures(task.base, task)
    untrained = {"untrained": figures.pop("loss"), **{f"untrained_{key}": value for key, value in figures.items()}}
    found: dict[str, Any] = {**task.settings, **untrained, "runs": dict(known["runs"]) if same else {}}
    configs = contestants(task)

    def one(name: str, rate: float, seed: int) -> float:
        rows = found["runs"].setdefault(name, [])
        row = next((row for row in rows if row["rate"] == rate and row["seed"] == seed), None)
        if row is None:
            row = run(task, configs[name], rate, seed)
            rows.append(row)
            print(task.settings["task"], name, row, file=sys.stderr, flush=True)
            keep(found)
        return math.inf if row["loss"] is None else float(row["loss"])

    rates: dict[str, float] = {}
    scored = [name for name in configs if name not in ("lora", "columns")]
    for names in (["lora", "columns"], scored):
        for name in names:
            # What is chosen by a score has a rate of its own; where it lies is not known, but near that of the random choice.
            first = RATES if name not in scored else (rates["columns"] / 2, rates["columns"])
            losses = {rate: one(name, rate, seeds[0]) for rate in first}
            while (best := min(losses, key=lambda rate: losses[rate])) in (min(losses), max(losses)):
                rate = best / 2 if best == min(losses) else best * 2
                losses[rate] = one(name, rate, seeds[0])
            rates[name] = best
        for seed in seeds[1:]:
            for name in names:
                one(name, rates[name], seed)


# --- result ----------------------------------------------------------------------------------------------------------


def merged(path: Path, part: str, data: Any) -> None:
    """Put a part into the result file beside the parts that are there."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    parts = {key: value for key, value in known.items() if key not in ("benchmark", "written", "machine")}
    common.save(path, "columns", {**parts, "goals": GOALS, part: data})


def part(path: Path, name: str) -> dict[str, Any]:
    """A part of the result file; empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()).get(name, {}) if path.is_file() else {}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", nargs="*", choices=list(TASKS), help="train on these instead; default all of them")
    parser.add_argument("--models", nargs="+", choices=modes.MODELS, default=list(modes.MODELS))
    parser.add_argument("--contests", nargs="+", choices=list(CONTESTS), default=list(CONTESTS))
    parser.add_argument("--no-dry-runs", action="store_true", help="leave the 8B shapes out")
    parser.add_argument("--steps", type=int, help="timed steps, default 5; of a quality run, default as in TASKS")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, help="rows that a run is judged on; default as in TASKS")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.quality is not None:
        import torch

        torch.set_num_threads(1)
        for data in options.quality or list(TASKS):
            make, steps, held_out = TASKS[data]
            task = make(data, options.steps or steps, options.held_out or held_out)
            name = f"quality {data}"
            quality(
                task, range(options.seeds), part(options.output, name),
                lambda found, name=name: merged(options.output, name, found),
            )  # fmt: skip
        return 0
    common.warn_if_busy()
    if not options.no_dry_runs:
        merged(options.output, "dry runs", dry_runs())
    merged(options.output, "cost", cost(options.models, options.contests, options.steps or 5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
