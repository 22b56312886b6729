"""The verb `merge`."""

from __future__ import annotations

import argparse

from ..arguments import Rest, switch
from .options import required
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", nargs="?", help="folder of a trained adapter, ours or a plain LoRA")
    add("--base", metavar="MODEL", help="folder or hub id; default: the base that the adapter names")
    add("-o", "--output", metavar="FOLDER", help="gets the merged checkpoint; must not exist, or be empty")
    add("--onto", default="original", help="original, or dequantized: the weights that a quantized base computed with")
    add("--dtype", help="of every floating tensor, bfloat16, ...; default: each keeps its own")
    add("--quantization", help="for --onto dequantized: how the base was loaded; default: as the training run noted")
    switch(parser, "--force", default=False, help="merge although the base is not the one that the plan was made for")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..export import merge_into_base

    report = merge_into_base(
        required(options, "adapter", "ADAPTER"),
        options.base,
        required(options, "output", "-o"),
        onto=options.onto,
        dtype=options.dtype,
        force=options.force,
        quantization=options.quantization,
    )
    print(report)


VERB = Verb(
    "merge",
    "merge ADAPTER -o FOLDER [--base MODEL] [flags]",
    "write a plain checkpoint: the base's shards with a trained adapter merged in",
    "merge out --base HuggingFaceTB/SmolLM2-135M-Instruct -o merged",
    add_arguments,
    run,
)
