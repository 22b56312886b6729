"""What a verb is, and how its command line is read.

Every verb takes `--config FILE`, a YAML or JSON mapping whose keys are the verb's flags; flags on the command line win.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..arguments import Parser, Rest, dashed, flags_of, keys_of, set_defaults_from, take_config
from ..errors import OptionError, near_matches

PROG = "spectrum-peft"


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Attributes:
        name: as it is typed.
        usage: the positional argument and the flags that cannot be left out.
        summary: one line for the list of verbs.
        example: a command that works, for `--help`.
        arguments: adds the verb's flags to its parser.
        action: (parsed flags, what the parser did not know) -> None.
        passes_on: what the parser does not know goes to the trainer's own arguments.
        reads_config: the config file holds more than flags; the verb gets all of it in `Rest.config`.
    """

    name: str
    usage: str
    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    action: Callable[[argparse.Namespace, Rest], None]
    passes_on: bool = False
    reads_config: bool = False

    def parser(self) -> argparse.ArgumentParser:
        """The verb's parser, with `--config`."""
        epilog = f"example:\n  {PROG} {self.example}"
        if self.passes_on:
            epilog += (
                "\n\nEvery other flag goes to the trainer's own arguments: TRL's SFTConfig (causal_lm), DPOConfig, KTOConfig, "
                "RewardConfig, GRPOConfig,\ntransformers' Seq2SeqTrainingArguments (seq2seq) or TrainingArguments (the others). "
                "--help-trainer with --task lists them."
            )
        parser = Parser(
            prog=f"{PROG} {self.name}", usage=f"{PROG} {self.usage}", description=self.summary, epilog=epilog
        )
        parser.add_argument("--config", metavar="FILE", help="YAML or JSON with these flags as keys; flags win")
        self.arguments(parser)
        return parser

    def run(self, argv: Sequence[str]) -> None:
        """Read a command line and do what it says.

        Raises:
            SpectrumError: a flag, a key of the config file, or what they name is wrong.
        """
        parser = self.parser()
        config = take_config(argv := dashed(argv))
        unknown = {} if not config else config[1] if self.reads_config else set_defaults_from(parser, *config)
        options, rest = parser.parse_known_args(argv)
        source = config[0] if config else "command line"
        if not self.passes_on:
            for key in unknown:
                raise OptionError(f"{source}: unknown key {key!r}." + near_matches(key, keys_of(parser)))
            if rest:
                raise OptionError(
                    f"{self.name}: unknown argument {rest[0]!r}." + near_matches(rest[0], flags_of(parser))
                )
        self.action(options, Rest(tuple(rest), unknown, source))
