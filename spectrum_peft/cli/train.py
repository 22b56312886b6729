"""The verb `train`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import Rest, flags_of, switch
from ..errors import OptionError
from ..plan import MODES, USUAL_MODE, owners_of
from ..records import EXPORTED, write_text
from .options import (
    PLAN_HELP,
    REPORT_HELP,
    add_data_options,
    add_load_options,
    add_plan_options,
    check_writable,
    given_plan_options,
    required,
)
from .terminal import say
from .verb import Verb

# What chooses among matrices, of which the usual mode takes all.
_CHOOSE = ("report", "gradients", "criterion", "scope", "measure", "preset")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="MODEL", help="hub id or folder of the base")
    add("--output-dir", metavar="FOLDER", help="gets the model or adapter, the plan, the report and train_results.json")
    switch(parser, "--overwrite-output-dir", default=False, help="remove what another run left in the output folder")
    add(
        "--report",
        metavar="FILE",
        help=f"{REPORT_HELP}; without it the model is scanned where the mode chooses by score",
    )
    add("--plan", metavar="FILE", help=f"{PLAN_HELP}; it wins over the report and the plan options")
    add(
        "--gradients",
        metavar="FILE",
        help="of `probe`; without it the first training rows are probed where it is needed",
    )
    add("--calibration-samples", type=int, metavar="N", help="training rows that are probed; default 256")
    add(
        "--stop-at-step", type=int, metavar="N",
        help="stop there with a checkpoint, on the schedule of the whole run; --resume-from-checkpoint goes on",
    )  # fmt: skip
    switch(parser, "--force", default=False, help="use a report or plan although its fingerprint differs")
    switch(parser, "--init", default=False, help="write a commented YAML for --model that fits --memory, and stop")
    add("--memory", metavar="SIZE", help="with --init: of the card, 24GiB; default: of the one that is there")
    add(
        "--from-axolotl",
        metavar="FILE",
        help="write a YAML for an axolotl config, naming what is not understood, and stop",
    )
    add("-o", "--output", metavar="FILE", help="of --init and --from-axolotl; default: the terminal")
    switch(parser, "--help-trainer", default=False, help="list the flags of the task's own training arguments")
    add_data_options(parser)
    add(
        "--export",
        metavar="FORM",
        help="at the end, write the adapter to a folder inside the output folder: lora for plain peft, merged into the base",
    )
    switch(
        parser, "--dry-run", default=False, help="say plan, memory, rows, tokens and steps, and stop; writes nothing"
    )
    add(
        "--time-steps",
        type=int,
        metavar="N",
        help="with --dry-run: load the model, time N steps, and say how long all take",
    )
    add("--show-rows", type=int, metavar="N", help="print the first N rows token by token with what carries loss; stop")
    add("--eval-dataset", metavar="D", help="judge on these rows before and after training")
    add("--eval-split", metavar="S", help="judge on this split of --dataset (or of --eval-dataset)")
    add_load_options(parser)
    add_plan_options(parser, usual=USUAL_MODE)
    lora = parser.add_argument_group("adapters, as in peft.LoraConfig")
    add = lora.add_argument
    add("--lora-dropout", type=float, metavar="P")
    switch(lora, "--use-dora")
    add("--bias", help="none, all or lora_only")
    add("--target-modules", nargs="+", metavar="NAME", help="narrow the candidates to these modules")
    add("--exclude-modules", nargs="+", metavar="NAME", help="leave these modules out")
    add("--layers-to-transform", nargs="+", type=int, metavar="N", help="narrow the candidates to these blocks")
    add("--modules-to-save", nargs="+", metavar="NAME", help="train these modules whole")
    add(
        "--peft-config",
        metavar="FILE",
        help="a method of PEFT's own instead of a mode: peft_type and its fields, YAML or JSON",
    )


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..train.arguments import trainer_help
    from ..train.preview import shown_rows
    from ..train.run import describe_training, train

    if options.help_trainer:
        print(trainer_help(options.task or "causal_lm"))
        return
    if options.init or options.from_axolotl:
        _write_config(options)
        return
    for name in ("memory", "output"):
        if getattr(options, name) is not None:
            also = " and --from-axolotl; a run writes to --output-dir" if name == "output" else ""
            raise OptionError(f"--{name} is for --init{also}.")
    refuse_missing(options, rest, ("model", "dataset", "output_dir"))
    if options.time_steps is not None and not options.dry_run:
        raise OptionError("--time-steps is for --dry-run, which is missing.")
    if options.show_rows is not None and options.show_rows < 1:
        raise OptionError(f"--show-rows is {options.show_rows}, wanted at least 1.")
    if options.dry_run:
        from ..train.dry_run import dry_run

        dry_run(options, rest, _plan_options(options), flags_of(VERB.parser()))
        return
    if options.show_rows is not None:
        print(shown_rows(options, rest, _plan_options(options), flags_of(VERB.parser())))
        return
    check_writable(Path(options.output_dir) / "model.safetensors")
    results = train(options, rest, _plan_options(options), flags_of(VERB.parser()))
    print(describe_training(results))
    if options.export and not int(os.environ.get("RANK") or 0):
        from ..export import export_lora, merge_into_base

        written = Path(options.output_dir, EXPORTED[options.export])
        if options.export == "lora":
            export_lora(options.output_dir, written)
        else:
            merge_into_base(options.output_dir, out=written)
        print(f"wrote {written}")


def _plan_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, and the usual mode where neither --mode nor a plan nor a method of PEFT's own says another.

    Raises:
        OptionError: --mode is missing, and something else is of a mode that is not the usual one.
    """
    given = given_plan_options(options)
    if "mode" in given or options.plan or options.peft_config:
        return given
    choosing = {name: getattr(options, name) for name in _CHOOSE if getattr(options, name, None) is not None}
    for name, value in {**choosing, **given}.items():
        if name in _CHOOSE or USUAL_MODE not in owners_of(name):
            others = ", ".join(mode for mode in MODES if mode != USUAL_MODE)
            raise OptionError(
                f"--mode is missing: without it the mode is {USUAL_MODE}, in which --{name.replace('_', '-')} {value} means "
                f"nothing. The others are {others}."
            )
    return {"mode": USUAL_MODE, **given}


def refuse_missing(options: argparse.Namespace, rest: Rest, names: Sequence[str]) -> None:
    """
    Raises:
        OptionError: names what is missing, and the keys and flags that are not known: one may have been meant for the other.
    """
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is None]
    if not missing:
        return
    said = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
    if rest.config or rest.argv:
        from ..train.arguments import unknown_names

        said += "".join(f" {line}" for line in unknown_names(options.task, rest, flags_of(VERB.parser())))
    raise OptionError(said)


def _write_config(options: argparse.Namespace) -> None:
    check_writable(options.output)
    if options.from_axolotl:
        from ..train.axolotl import imported

        text, lines = imported(options.from_axolotl, VERB.parser())
        for line in lines:
            say(line)
    else:
        from ..train.arguments import config_of, task_for
        from ..train.recipe import card_here, init, with_some_head

        model = required(options, "model", "--model")
        task, memory = task_for(options), options.memory or card_here()
        config = with_some_head(config_of(model, options), task)
        text = init(model, config, task, memory, say)
    if options.output:
        write_text(options.output, text)
        print(f"wrote {options.output}")
    else:
        print(text, end="")


VERB = Verb(
    "train",
    "train --model MODEL --dataset D --output-dir FOLDER [flags]",
    "train a model in any mode; takes every flag of the trainer's own arguments too",
    "train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset train.jsonl --mode spectrum --ratio 0.25 "
    "--output-dir out --num-train-epochs 1",
    add_arguments,
    run,
    passes_on=True,
)
