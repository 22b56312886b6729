"""Which singular components does a task ask for, and do the published claims about them hold here?

    python benchmarks/components.py [--samples 32] [--data FOLDER]

Claimed for LoRSA: tasks of form use components 20 to 80, tasks of meaning the top 20, sentiment spreads; and singular values
decay faster in larger models. Six tasks on SmolLM2-135M, two of them on the same sentences; each is probed twice, on samples
that have no row in common: what two halves of one task share says how much of a difference between tasks is the draw. The
datasets are folders with train.jsonl; by default those beside the checkout. About ten minutes on two quiet cores, 3 GB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from quality import lines_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectrum_peft import (
    GradientReport,
    Plan,
    calibration_batches,
    make_plan,
    names,
    plots,
    probe_gradients,
    scan_weights,
)
from spectrum_peft.demo import minilm_folder, smollm2_folder

DATA = common.ROOT.parent / "shared" / "data"
RANK, COMPONENTS = 256, 64  # looked at in each matrix, taken of them on average
EDGES = (0, 20, 80, RANK)  # of the claims
Row = dict[str, str]


def _classified(title: str) -> Callable[[Row], Row]:
    return lambda row: {"prompt": f"{row['text']}\n{title}:", "completion": f" {row['label'].replace('_', ' ')}"}


def _restored(row: Row) -> Row:
    """Capitals and punctuation back into a sentence: a task of form, whose content is the sentence's."""
    bare = row["text"].lower().translate(str.maketrans("", "", string.punctuation))
    return {"prompt": f"{bare}\nWith capitals and punctuation:", "completion": f" {row['text']}"}


def _as_it_is(row: Row) -> Row:
    return {key: row[key] for key in ("text", "prompt", "completion") if key in row}


# {task: (dataset, what a row becomes)}
TASKS: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "intents": ("banking77", _classified("Intent")),
    "punctuation": ("banking77", _restored),
    "sentiment": ("goemotions_sentiment", _classified("Sentiment")),
    "word problems": ("gsm8k", _as_it_is),
    "instructions": ("dolly", _as_it_is),
    "prose": ("wikitext2_small", _as_it_is),
}


def halves(path: Path, form: Callable[[Row], Row], samples: int) -> tuple[list[Row], list[Row]]:
    """Two disjoint draws of rows, the same in every run."""
    rows = [json.loads(line) for line in lines_of(path)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [form(rows[i]) for i in order[: 2 * samples]]
    return drawn[::2], drawn[1::2]


def by_range(gradients: GradientReport, plan: Plan) -> dict[str, list[float]]:
    """Shares of the chosen components, and of the importance, in each range of indexes; each matrix counts by what it chose."""
    ranges = list(itertools.pairwise(EDGES))
    chosen = plots.chosen_components(plan)
    taken = [sum(a <= c < b for found in chosen.values() for c in found) for a, b in ranges]
    weight = [
        statistics.mean(sum(stat[a:b]) / sum(stat) for stat in (gradients.by_name[name].importance for name in chosen))
        for a, b in ranges
    ]
    return {"chosen": [t / sum(taken) for t in taken], "importance": weight}


def chance(plans: Sequence[Plan]) -> dict[str, Any]:
    """What random choice would give: shares of the ranges, and what two choices have in common."""
    there = [0] * (len(EDGES) - 1)
    common_share = []
    for plan in plans:
        for name, found in plots.chosen_components(plan).items():
            looked_at = min(RANK, *plan.by_name[name].shape)
            for n, (a, b) in enumerate(itertools.pairwise(EDGES)):
                there[n] += max(0, min(b, looked_at) - a)
            common_share.append(len(found) / looked_at)
    return {"ranges": [n / sum(there) for n in there], "in_common": statistics.mean(common_share)}


def decay(folder: str) -> dict[str, Any]:
    """Share of the squared singular values in the largest tenth of them, over the linear layers of a checkpoint."""
    shares = []
    for name, weight in load_file(Path(folder) / "model.safetensors").items():
        if names.role(name, weight.shape) == "linear":
            squared = torch.linalg.svdvals(weight.float()).double().square()
            shares.append(float(squared[: max(1, len(squared) // 10)].sum() / squared.sum()))
    return common.spread(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="of each half of a task")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "components.json")
    parser.add_argument("--picture", type=Path, default=common.ROOT / "docs" / "images" / "lorsa_components.png")
    options = parser.parse_args()
    for data, _ in TASKS.values():
        if not (options.data / data / "train.jsonl").is_file():
            print(
                f"{options.data / data}: no train.jsonl there; --data names the folder of the datasets. Nothing was measured."
            )
            return
    folder = str(smollm2_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report = scan_weights(folder)
    found: dict[str, dict[str, Any]] = {}
    plans: dict[str, list[Plan]] = {}
    for task, (data, form) in TASKS.items():
        rows = halves(options.data / data / "train.jsonl", form, options.samples)
        plans[task], parts = [], []
        for half in rows:
            batches = calibration_batches(half, tokenizer, options.samples, max_length=options.max_length)
            gradients = probe_gradients(model, batches, directions=0, svd_rank=RANK)
            plan = make_plan(report, mode="lorsa", n_components=COMPONENTS, svd_rank=RANK, gradients=gradients)
            plans[task].append(plan)
            parts.append({"samples": gradients.samples, "loss": gradients.loss, **by_range(gradients, plan)})
        found[task] = {"data": data, "halves": parts, "in_common": plots.component_overlap(*plans[task])}
        print(json.dumps({task: found[task]}), flush=True)
    for task, mine in plans.items():
        found[task]["in_common_with"] = {
            other: statistics.mean(plots.component_overlap(a, b) for a, b in itertools.product(mine, theirs))
            for other, theirs in plans.items()
            if other != task
        }
    result: Mapping[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "max_length": options.max_length,
        "edges": EDGES,
        "components": COMPONENTS,
        "chance": chance([plan for both in plans.values() for plan in both]),
        "tasks": found,
        "decay": {"all-MiniLM-L6-v2": decay(str(minilm_folder())), "SmolLM2-135M-Instruct": decay(folder)},
    }
    common.save(options.out, "components", result)
    plots.save(plots.components({task: both[0] for task, both in plans.items()}), options.picture)


if __name__ == "__main__":
    main()
