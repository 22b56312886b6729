"""The verb `plot`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Rest
from ..records import Plan
from .options import PLAN_HELP, REPORT_HELP, check_writable, report_of, required
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("report", nargs="?", help=REPORT_HELP)
    add("-o", "--output", metavar="FILE", help="the picture (.png, .pdf, .svg)")
    add("--plan", metavar="FILE", help=f"mark what it chose: {PLAN_HELP}")
    add(
        "--components",
        nargs="+",
        metavar="PLAN",
        help="draw which singular components these plans of mode lorsa chose instead",
    )
    add("--matrix", metavar="NAME", help="draw the singular values of one matrix instead; needs --model")
    add("--model", metavar="MODEL", help="where the matrix is read from; that the report is of, for auto")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from .. import plots

    output = required(options, "output", "-o")
    check_writable(output)
    if options.matrix:
        from ..scan import spectrum_of

        figure = plots.spectrum(spectrum_of(required(options, "model", "--model"), options.matrix))
    elif options.components:
        stems = [Path(path).stem for path in options.components]
        labels = stems if len(set(stems)) == len(stems) else options.components
        figure = plots.components(
            {label: Plan.load(path) for label, path in zip(labels, options.components, strict=True)}
        )
    else:
        required(options, "report", "REPORT")
        report = report_of(options, options.model, {})
        figure = plots.heat_map(report, plan=Plan.named(options.plan, model_id=options.model) if options.plan else None)
    plots.save(figure, output)
    print(f"wrote {output}")


VERB = Verb(
    "plot",
    "plot REPORT -o FILE [--plan PLAN]   |   plot --matrix NAME --model MODEL -o FILE   |   plot --components PLANS -o FILE",
    "draw the scores of a report by layer and kind, the spectrum of one matrix, or the components that plans chose",
    "plot report.json --plan plan.yaml -o scores.png",
    add_arguments,
    run,
)
