"""The verb `demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Rest
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", metavar="FOLDER", default="demo_output", help="default demo_output")
    add("--steps", type=int, default=None, help="optimizer steps of each mode")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from .. import demo

    demo.run(Path(options.output), **({} if options.steps is None else {"steps": options.steps}))


VERB = Verb(
    "demo",
    "demo [-o FOLDER]",
    "scan, plan and train a real 135M model three ways, with a table and pictures at the end",
    "demo -o demo_output",
    add_arguments,
    run,
)
