"""The verb `doctor`."""

from __future__ import annotations

import argparse
import json

from ..arguments import Rest, switch
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    switch(parser, "--json", default=False, help="as JSON")
    switch(parser, "--offline", default=False, help="ask nothing of the network")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..doctor import describe, examine

    findings = examine(offline=bool(options.offline))
    print(json.dumps([f._asdict() for f in findings], indent=1) if options.json else describe(findings))


VERB = Verb(
    "doctor",
    "doctor [--json] [--offline]",
    "versions, devices, kernels that run, memory, hub and cache of this machine; for reports of faults",
    "doctor",
    add_arguments,
    run,
)
