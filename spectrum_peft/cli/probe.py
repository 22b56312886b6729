"""The verb `probe`."""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments import Rest
from ..errors import OptionError
from ..records import GradientReport
from .options import add_data_options, add_load_options, check_writable, required, write_record
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="hub id or folder of a model, or the folder of a trained adapter")
    add("-o", "--output", metavar="FILE", help="write the gradients there (.json)")
    add("--samples", type=int, metavar="N", help="rows that are measured; default 256")
    add("--batch-size", type=int, metavar="N", help="samples at a time; the result does not depend on it; default 8")
    add("--directions", type=int, metavar="N", help="gradient directions that are compared; 0: none; default 8")
    add(
        "--svd-rank",
        type=int,
        metavar="K",
        help="singular components whose importance is measured, for mode lorsa; default 0",
    )
    add("--columns", metavar="BY", help="score each column by activation or fisher, for --columns-by; default: not")
    add("--seed", type=int, default=0, help="of the draw of rows and of the sketches")
    add_data_options(parser)
    add_load_options(parser)


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..train.saved import probe

    required(options, "model", "MODEL")
    required(options, "dataset", "--dataset")
    check_writable(options.output)
    for name in ("samples", "batch_size", "max_length"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}, wanted at least 1.")
    report = probe(options)
    print(describe_gradients(report))
    write_record(report, options.output)


def describe_gradients(report: GradientReport) -> str:
    """A table by kind: Fisher mass, and how alike neighbours' gradients are where they were compared."""
    from ..plan import format_table

    header = ("kind", "matrices", "lowest", "median", "highest", "neighbours alike", "best")
    rows = []
    alike = {}
    for s in report.similarities:
        steps = [s.subspace[i][i + 1] for i in range(len(s.names) - 1)]
        alike[s.kind] = f"{sum(steps) / len(steps):.2f}"
    kinds: dict[str, list[Any]] = {}
    for stat in report.stats:
        kinds.setdefault(stat.kind, []).append(stat)
    for kind, stats in kinds.items():
        ordered = sorted(stats, key=lambda s: report.scores[s.name])
        middle = ordered[(len(ordered) - 1) // 2]
        masses = (f"{report.scores[s.name]:.3g}" for s in (ordered[0], middle, ordered[-1]))
        rows.append((kind, str(len(stats)), *masses, alike.get(kind, "-"), ordered[-1].name))
    head = f"{report.model_id or 'model'}: Fisher mass of {len(report.stats)} matrices on {report.samples} samples"
    return "\n".join([f"{head}, mean loss {report.loss:.4f}", format_table(header, rows, last_is_text=True)])


VERB = Verb(
    "probe",
    "probe MODEL --dataset D [-o FILE] [flags]",
    "measure gradients on data: for --criterion fisher, and for modes that need data",
    "probe HuggingFaceTB/SmolLM2-135M-Instruct --dataset train.jsonl -o gradients.json",
    add_arguments,
    run,
)
