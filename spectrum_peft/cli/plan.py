"""The verb `plan`."""

from __future__ import annotations

import argparse
import stat

from ..arguments import Rest
from ..errors import OptionError
from ..records import Plan, mode_of
from .options import (
    REPORT_HELP,
    add_plan_options,
    check_writable,
    given_plan_options,
    report_of,
    required,
    write_record,
)
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("report", nargs="?", help=REPORT_HELP)
    add("--model", metavar="MODEL", help="that the report is of, for auto and for a repository that has several")
    add("--revision", help="of a hub model")
    add("-o", "--output", metavar="FILE", help="write the plan there (.yaml or .json)")
    add("--gradients", metavar="FILE", help="of `probe`; for --criterion fisher and modes that need data")
    add("--diff", nargs=2, metavar=("A", "B"), help="compare two plans instead")
    add_plan_options(parser)


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..plan import check_options, diff_plans, explain, make_plan, needs_gradients

    if options.diff:
        print(diff_plans(*(Plan.named(path) for path in options.diff)))
        return
    _refuse_folder(required(options, "report", "REPORT"))
    check_writable(options.output)
    given = given_plan_options(options)
    if options.gradients is None and needs_gradients(check_options(**given)):
        raise OptionError(
            "this plan is made by gradients on data: `spectrum-peft probe MODEL --dataset D -o gradients.json` measures them, "
            "--gradients gradients.json gives them."
        )
    report = report_of(options, options.model, given)
    plan = make_plan(report, gradients=options.gradients, **given)
    print(explain(plan, report))
    write_record(plan, options.output)


def _refuse_folder(name: str) -> None:
    """
    Raises:
        OptionError: a folder, perhaps that of a model, is named where a report is wanted.
    """
    if stat.S_ISDIR(mode_of(name)):
        raise OptionError(
            f"{name}: is a folder, wanted a report of `scan`: `spectrum-peft scan {name} -o report.json` writes one of a model."
        )


VERB = Verb(
    "plan",
    "plan REPORT [-o FILE] [flags]   |   plan --diff A B",
    "decide what trains, from a report; or compare two plans",
    "plan report.json --mode spectrum --ratio 0.25 -o plan.yaml",
    add_arguments,
    run,
)
