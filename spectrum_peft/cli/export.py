"""The verb `export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Rest, switch
from ..errors import OptionError, near_matches
from .options import check_writable, required
from .verb import Verb

# What the flags of one form are; the others have no use for them.
_FLAGS = {
    "lora": {"uniform_rank": "--uniform-rank"},
    "gguf": {"type": "--type", "modelfile": "--modelfile", "base": "--from"},
    "axolotl": {"quantization": "--quantization"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "adapter", nargs="?", help="folder of a trained adapter; for gguf a checkpoint, for axolotl a plan file will do"
    )
    add(
        "--format",
        help="lora: a folder that plain peft opens; gguf: a file for llama.cpp and Ollama; axolotl: a YAML file",
    )
    add("-o", "--output", metavar="OUT", help="the folder, or the file")
    switch(
        parser, "--uniform-rank", help="lora: pad to one rank and one alpha, which llama.cpp's converter needs; exact"
    )
    add("--type", help="gguf: of a checkpoint's matrices: f32, f16, bf16 or q8_0; default: as they are stored")
    switch(parser, "--modelfile", help="gguf: write Ollama's Modelfile beside the file")
    add(
        "--from",
        dest="base",
        metavar="BASE",
        help="gguf: Ollama model or .gguf that the Modelfile of an adapter starts from",
    )
    add("--quantization", help="axolotl: of the base: none, nf4, fp4 or int8; default: as the training run noted")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..export import export_axolotl, export_gguf, export_lora

    chosen = required(options, "format", "--format")
    if chosen not in _FLAGS:
        raise OptionError(f"--format is {chosen!r}." + near_matches(chosen, _FLAGS))
    for form, flags in _FLAGS.items():
        for name, flag in flags.items():
            if form != chosen and getattr(options, name) is not None:
                raise OptionError(f"{flag} is for --format {form}, and --format is {chosen}.")
    adapter = required(options, "adapter", "ADAPTER")
    output = required(options, "output", "-o")
    if chosen == "lora":
        export_lora(adapter, output, uniform_rank=bool(options.uniform_rank))
    elif chosen == "gguf":
        check_writable(output)
        export_gguf(adapter, output, type=options.type, modelfile=bool(options.modelfile), base=options.base)
    else:
        check_writable(output)
        export_axolotl(adapter, output, quantization=options.quantization)
    print(f"wrote {output}" + (f" and {Path(output).parent / 'Modelfile'}" if options.modelfile else ""))


VERB = Verb(
    "export",
    "export ADAPTER --format lora|gguf|axolotl -o OUT",
    "write an adapter as a LoRA for plain peft, it or a checkpoint for llama.cpp, or its plan for axolotl",
    "export out --format lora -o lora",
    add_arguments,
    run,
)
