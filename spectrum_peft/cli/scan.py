"""The verb `scan`."""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import Rest, switch
from ..records import SnrReport
from .options import check_writable, required, write_record
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="hub id, folder, .safetensors or .gguf file, or the folder of a trained adapter")
    add("-o", "--output", metavar="FILE", help="write the report there (.json or .yaml)")
    add(
        "--criterion", default="spectrum", help="spectrum, mp, mean_std, row_norm, kappa, random, last, first or spaced"
    )
    add("--score", nargs="+", default=["linear"], metavar="ROLE", help="which tensors to score; default linear")
    add("--device", default="auto", help="auto, cpu, cuda, ...; several: cuda:0,cuda:1")
    add("--jobs", type=int, metavar="N", help="matrices at a time; default: one for each core")
    add("--revision", help="branch, tag or commit of a hub model; the report says the commit")
    add("--kinds", metavar="KINDS", help="score only these kinds, q_proj,down_proj; of a hub model only these are read")
    add("--layers", metavar="LAYERS", help="score only these layers, 0-15 or 0,4,8-11")
    switch(
        parser, "--download", default=False, help="store a hub model in the hub's cache instead of reading it piecewise"
    )
    add("--seed", type=int, default=0, help="of the criterion `random`")
    switch(parser, "--cache", default=False, help="use a finished scan of the same weights")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..scan import scan_weights

    model = required(options, "model", "MODEL")
    check_writable(options.output)
    report = scan_weights(
        model,
        criterion=options.criterion,
        jobs=options.jobs,
        device=options.device,
        score=tuple(options.score),
        cache=options.cache,
        revision=options.revision,
        seed=options.seed,
        kinds=options.kinds,
        layers=options.layers,
        download=options.download,
    )
    print(describe_report(report))
    write_record(report, options.output)


def describe_report(report: SnrReport) -> str:
    """A table of the scores by kind: how many matrices, lowest, median and highest score, and the best one."""
    from ..plan import format_table

    header = ("kind", "matrices", "lowest", "median", "highest", "best")
    rows = []
    kinds: dict[str, list[Any]] = {}
    for stat in report.stats:
        if stat.score is not None:
            kinds.setdefault(stat.kind, []).append(stat)
    for kind, stats in kinds.items():
        ordered = sorted(stats, key=lambda s: s.score)
        middle = ordered[(len(ordered) - 1) // 2]
        scores = (f"{s.score:.4g}" for s in (ordered[0], middle, ordered[-1]))
        rows.append((kind, str(len(stats)), *scores, ordered[-1].name))
    scored = sum(map(len, kinds.values()))
    head = f"{report.model_id or 'model'}: {scored} of {len(report.stats)} tensors scored by {report.criterion!r}"
    return "\n".join([head, format_table(header, rows, last_is_text=True), *(f"note: {note}" for note in report.notes)])


VERB = Verb(
    "scan",
    "scan MODEL [-o FILE] [flags]",
    "score every matrix of a checkpoint, a folder's or the hub's; reads what it scores, loads and stores no model",
    "scan HuggingFaceTB/SmolLM2-135M-Instruct -o report.json",
    add_arguments,
    run,
)
