"""The verb `export`."""

from __future__ import annotations

import argparse

from ..arguments import Rest, switch
from ..errors import OptionError, near_matches
from .options import check_writable, required
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", nargs="?", help="folder of a trained adapter; for axolotl a plan file will do")
    add("--format", help="lora: a folder that plain peft opens; axolotl: a YAML file")
    add("-o", "--output", metavar="OUT", help="the folder, or the file")
    switch(
        parser, "--uniform-rank", help="lora: pad to one rank and one alpha, which llama.cpp's converter needs; exact"
    )
    add("--quantization", help="axolotl: of the base: none, nf4, fp4 or int8; default: as the training run noted")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..export import export_axolotl, export_lora

    adapter = required(options, "adapter", "ADAPTER")
    output = required(options, "output", "-o")
    chosen = required(options, "format", "--format")
    if chosen == "lora":
        if options.quantization is not None:
            raise OptionError("--quantization is for --format axolotl; a LoRA is the same on every base.")
        export_lora(adapter, output, uniform_rank=bool(options.uniform_rank))
    elif chosen == "axolotl":
        if options.uniform_rank is not None:
            raise OptionError("--uniform-rank is for --format lora; axolotl knows ranks by pattern.")
        check_writable(output)
        export_axolotl(adapter, output, quantization=options.quantization)
    else:
        raise OptionError(f"--format is {chosen!r}." + near_matches(chosen, ("lora", "axolotl")))
    print(f"wrote {output}")


VERB = Verb(
    "export",
    "export ADAPTER --format lora|axolotl -o OUT",
    "write an adapter as a LoRA for plain peft, or its plan as a config for axolotl",
    "export out --format lora -o lora",
    add_arguments,
    run,
)
