"""The verb `completion`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ..arguments import Rest
from ..errors import OptionError, near_matches
from .options import required
from .verb import PROG, Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", nargs="?", help="bash, zsh, fish, tcsh or powershell")


def verb_over(verbs: Mapping[str, Verb]) -> Verb:
    """The verb that writes completions for some verbs."""

    def run(options: argparse.Namespace, rest: Rest) -> None:
        import shtab

        shell = required(options, "shell", "SHELL")
        if shell not in shtab.SUPPORTED_SHELLS:
            raise OptionError(f"shell is {shell!r}." + near_matches(shell, shtab.SUPPORTED_SHELLS))
        parser = argparse.ArgumentParser(prog=PROG)
        choices = parser.add_subparsers()
        for name, verb in verbs.items():
            own = choices.add_parser(name, help=verb.summary)
            config = own.add_argument("--config", help="YAML or JSON with these flags as keys; flags win")
            config.complete = shtab.FILE  # type: ignore[attr-defined]
            verb.arguments(own)
        print(shtab.complete(parser, shell))

    return Verb(
        "completion",
        "completion SHELL",
        "the script that lets a shell complete verbs and flags: bash, zsh, fish, tcsh or powershell",
        "completion bash",
        add_arguments,
        run,
    )
