"""The verb `evaluate`."""

from __future__ import annotations

import argparse
import json

from ..arguments import Rest, flags_of, switch
from ..records import write_text
from .options import add_data_options, add_load_options, check_writable, required
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="folder of a trained adapter or model, or a hub id")
    add("-o", "--output", metavar="FILE", help="write the metrics there as JSON")
    add("--generate", nargs="+", metavar="METRIC", help="complete the prompts and judge the text: exact_match, rouge_l")
    add("--max-new-tokens", type=int, metavar="TOKENS", help="of a completion; default 256")
    switch(parser, "--help-trainer", default=False, help="list the flags of the task's own training arguments")
    add_data_options(parser)
    add_load_options(parser)


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..train.arguments import trainer_help
    from ..train.saved import evaluate_saved

    if options.help_trainer:
        print(trainer_help(options.task or "causal_lm"))
        return
    required(options, "model", "MODEL")
    required(options, "dataset", "--dataset")
    check_writable(options.output)
    metrics = evaluate_saved(options, rest, flags_of(VERB.parser()))
    text = json.dumps(metrics, indent=1) + "\n"
    if options.output:
        write_text(options.output, text)
    print(text, end="")


VERB = Verb(
    "evaluate",
    "evaluate MODEL --dataset D [-o FILE] [flags]",
    "loss, perplexity and accuracy of a model or adapter on a dataset",
    "evaluate out --dataset validation.jsonl -o metrics.json",
    add_arguments,
    run,
    passes_on=True,
)
