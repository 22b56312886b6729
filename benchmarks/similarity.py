"""How alike are the gradients of the blocks, in which sense, and what does sharing a factor save?

    python benchmarks/similarity.py [--samples 128] [--data FILE.jsonl]

SmolLM2-135M on instructions with answers: the exact mean gradient of every matrix, by autograd with weight gradients, gives
both similarity tables; the probe's sketches are judged against them; then the groups and the parameters of `sgm` at several
thresholds. The data are rows with `prompt` and `completion`; by default those of Dolly beside the checkout. About ten minutes
on two quiet cores and 4 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import common
import torch
from datasets import Dataset
from sklearn.metrics import adjusted_rand_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectrum_peft import GradientReport, calibration_batches, make_plan, names, plots, probe_gradients, scan_weights
from spectrum_peft.demo import smollm2_folder
from spectrum_peft.probe.collectors import MeanGradients
from spectrum_peft.records import Similarity

DIRECTIONS = 8
DATA = common.ROOT.parent / "shared" / "data" / "dolly" / "train.jsonl"


def exact_means(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{name: mean over samples of the gradient of a sample's mean token loss}, from autograd."""
    model.zero_grad()
    samples = sum(len(b["labels"]) for b in batches)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        (losses.view(labels.shape).sum(1) / (labels != -100).sum(1)).sum().div(samples).backward()
    found = {n: p.grad for n, p in model.named_parameters() if names.role(n, p.shape) == "linear"}
    return found


def exact_table(record: Similarity, means: dict[str, torch.Tensor]) -> Similarity:
    """The tables of one kind from whole gradients and all their singular vectors of the residual side."""
    parts = []
    for name in record.names:
        gradient = means[name].double() if record.side == "in" else means[name].double().T
        parts.append(torch.linalg.eigh(gradient.T @ gradient).eigenvectors[:, -DIRECTIONS:])
    flat = torch.stack([means[name].flatten().double() for name in record.names])
    flat /= flat.norm(dim=1, keepdim=True)
    subspace = [[float((a.T @ b).square().sum()) / DIRECTIONS for b in parts] for a in parts]
    cosine = (flat @ flat.T).tolist()
    fixed = (tuple(tuple(round(v, 6) for v in row) for row in table) for table in (subspace, cosine))
    return Similarity(record.kind, record.shape, record.side, record.width, record.names, *fixed)


def off_diagonal(table: Any) -> torch.Tensor:
    values = torch.tensor(table, dtype=torch.float64)
    return values[~torch.eye(len(values), dtype=torch.bool)]


def described(exact: Similarity) -> dict[str, Any]:
    subspace = torch.tensor(exact.subspace)
    steps = subspace.diagonal(1)
    cosine = off_diagonal(exact.cosine)
    return {
        "kind": exact.kind,
        "side": exact.side,
        "chance": DIRECTIONS / exact.width,
        "neighbours": common.spread(steps.tolist()) | {"mean": float(steps.mean())},
        "all_pairs": float(off_diagonal(exact.subspace).mean()),
        "cosine_max": float(cosine.max()),
        "cosine_mean_absolute": float(cosine.abs().mean()),
    }


def sketched(tables: list[Similarity], means: dict[str, torch.Tensor], sketch: int) -> list[Similarity]:
    """The same tables from sketches of a rank."""
    found = []
    for exact in tables:
        kept = MeanGradients(sketch)
        for name in exact.names:
            gradient = means[name][None]
            kept.see(name, gradient, torch.eye(gradient.shape[1])[None])
        subspace, cosine = kept.similarities(exact.names, exact.side, DIRECTIONS)
        found.append(dataclasses.replace(exact, subspace=subspace, cosine=cosine))
    return found


def sketch_errors(exact: list[Similarity], found: list[Similarity]) -> dict[str, float]:
    """Largest and mean error of both tables, over all pairs of all kinds."""
    errors = {}
    for which in ("subspace", "cosine"):
        off = [
            off_diagonal(getattr(a, which)) - off_diagonal(getattr(b, which)) for a, b in zip(found, exact, strict=True)
        ]
        errors |= {
            f"{which}_max": float(torch.cat(off).abs().max()),
            f"{which}_mean": float(torch.cat(off).abs().mean()),
        }
    return errors


def grouped(report: Any, gradients: GradientReport, tables: list[Similarity]) -> list[str]:
    """The group of each chosen matrix by these tables, at the defaults; one alone is its own group."""
    plan = make_plan(report, mode="sgm", gradients=dataclasses.replace(gradients, similarities=tuple(tables)))
    return [entry.group or entry.name for entry in plan.entries if entry.trains]


def shared(report: Any, gradients: GradientReport, **options: Any) -> dict[str, Any]:
    """Groups and parameters of a plan, and the latter as a share of `spectra_qlora` at the same rank and ratio."""
    ratio = options.pop("spectrum_ratio", 0.5)
    plain = make_plan(report, mode="spectra_qlora", spectrum_ratio=ratio)
    plan = make_plan(report, mode="sgm", gradients=gradients, spectrum_ratio=ratio, **options)
    groups: dict[str, int] = {}
    for entry in plan.entries:
        if entry.trains:
            key = entry.group or "alone"
            groups[key] = groups.get(key, 0) + 1
    alone = groups.pop("alone", 0)
    return {
        "spectrum_ratio": ratio,
        **options,
        "groups": len(groups),
        "largest_group": max(groups.values(), default=0),
        "alone": alone,
        "trainable_parameters": plan.trainable_parameters,
        "share_of_spectra_qlora": plan.trainable_parameters / plain.trainable_parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "similarity.json")
    parser.add_argument("--gradients", type=Path, help="keep what the probe found there")
    parser.add_argument("--picture", type=Path, default=common.ROOT / "docs" / "images" / "sgm_similarity.png")
    options = parser.parse_args()
    if not options.data.is_file():
        print(
            f"{options.data}: no such file; --data names a .jsonl of instructions with answers. Nothing was measured."
        )
        return
    rows = Dataset.from_list([json.loads(line) for line in options.data.read_text().splitlines()])
    folder = str(smollm2_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = calibration_batches(rows, tokenizer, options.samples, max_length=options.max_length)
    batches = [{k: v[(b["labels"][:, 1:] != -100).any(1)] for k, v in b.items()} for b in batches]
    batches = [b for b in batches if len(b["labels"])]
    began = time.perf_counter()
    gradients = probe_gradients(model, batches, directions=DIRECTIONS)
    seconds = time.perf_counter() - began
    print(f"probed {gradients.samples} samples in {seconds:.0f} s", flush=True)
    means = exact_means(model, batches)
    tables = [exact_table(s, means) for s in gradients.similarities]
    print("exact tables", flush=True)
    report = scan_weights(folder)
    groups = grouped(report, gradients, tables)
    sketches = {}
    for n in (16, 32, 48, 64):
        found = sketched(tables, means, n)
        same = float(adjusted_rand_score(groups, grouped(report, gradients, found)))
        sketches[str(n)] = sketch_errors(tables, found) | {"same_groups": same}
    if options.gradients is not None:
        gradients.save(options.gradients)
    plans = [shared(report, gradients, spectrum_ratio=r) for r in (0.25, 0.5, 1.0)]
    plans += [shared(report, gradients, share="both", spectrum_ratio=r) for r in (0.25, 0.5, 1.0)]
    plans += [shared(report, gradients, similarity_threshold=t) for t in (0.05, 0.15, 0.25, 0.35, 0.5)]
    plans += [shared(report, gradients, share="both", similarity_threshold=t) for t in (0.05, 0.15, 0.25, 0.35)]
    plans += [shared(report, gradients, similarity="cosine", share="both")]
    data = {
        "model": "SmolLM2-135M-Instruct",
        "data": f"{options.data.parent.name}/{options.data.name}",
        "samples": gradients.samples,
        "max_length": options.max_length,
        "loss": gradients.loss,
        "probe_seconds": seconds,
        "kinds": [described(t) for t in tables],
        "sketches": sketches,
        "plans": plans,
    }
    common.save(options.out, "similarity", data)
    plots.save(
        plots.similarities(GradientReport(gradients.stats, tuple(tables), gradients.samples, gradients.loss)),
        options.picture,
    )
    print(json.dumps({k: data[k] for k in ("kinds", "sketches", "plans")}, indent=1))


if __name__ == "__main__":
    main()
