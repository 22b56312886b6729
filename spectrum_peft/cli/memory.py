"""The verb `memory`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..arguments import Rest, boolean, switch
from ..errors import OptionError
from ..records import Plan, write_text
from .options import (
    PLAN_HELP,
    REPORT_HELP,
    add_load_options,
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
    add("model", nargs="?", help="hub id or folder; only its config is read")
    add("--plan", metavar="FILE", help=f"the memory of this one: {PLAN_HELP}")
    add("--fit", metavar="SIZE", help="the largest ratio that fits into it, say 24GiB; -o writes its plan")
    add("--margin", type=float, metavar="SHARE", help="of the size that stays free; default 0.05")
    add(
        "--report",
        metavar="FILE",
        help=f"{REPORT_HELP}; without it the plans take the first blocks of each kind, through which backward is longest",
    )
    add("--gradients", metavar="FILE", help="of `probe`; for modes that need data")
    add("-o", "--output", metavar="FILE", help="with --fit the plan, else the memory report, or the table as JSON")
    group = parser.add_argument_group("the step (defaults: what `train` does without flags, on one GPU)")
    add = group.add_argument
    add("--batch-size", type=_number_or_auto, metavar="N|auto", help="sequences at a time, on one device")
    add("--max-length", type=int, metavar="TOKENS", help="of a sequence")
    add("--optimizer", help="adamw_torch_fused, adamw_torch, adafactor, sgd or adamw_8bit")
    add(
        "--gradient-checkpointing", type=_boolean_or_auto, nargs="?", const=True, metavar="BOOL|auto",
        help="auto, with --fit: where nothing fits without",
    )  # fmt: skip
    add("--gradient-accumulation-steps", type=int, metavar="N")
    add("--device", help="whose kernels and allocator: cuda or cpu")
    add("--trainer", help="sft (TRL: the loss in chunks) or transformers (all logits at once)")
    add("--mixed-precision", help="auto (that of a 16-bit dtype), no, bf16 or fp16")
    switch(group, "--padding", help="batches hold padding, so that attention has a mask; default true")
    switch(group, "--peft", help="wrap by PEFT in every mode, as the trainers' peft_config does")
    switch(group, "--reference", help="of dpo and kto: the model as it was before is held beside it")
    add("--sharding", help="data_parallel, zero1, zero2, zero3 or fsdp2")
    add("--devices", type=int, metavar="N", help="that the training is sharded over")
    add_load_options(parser)
    add_plan_options(parser, several_modes=True)


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _boolean_or_auto(text: str) -> bool | str:
    return text if text == "auto" else boolean(text)


_number_or_auto.__name__ = "a whole number, or 'auto'"
# Flags of `memory` that describe the step, under the names of `memory.Step` and `estimate_memory`.
_STEP = (
    "batch_size", "max_length", "dtype", "optimizer", "gradient_checkpointing", "gradient_accumulation_steps",
    "quantization", "attn_implementation", "device", "trainer", "mixed_precision", "padding", "peft", "reference",
    "sharding", "devices",
)  # fmt: skip


def _has_cuda() -> bool:
    from ..devices import default_device

    return default_device().type == "cuda"


def run(options: argparse.Namespace, rest: Rest) -> None:
    from .. import memory
    from ..plan import checked_plan

    model = required(options, "model", "MODEL")
    if options.plan and options.fit:
        raise OptionError("--plan and --fit are both given: a plan is fixed, and a fit makes one. Give one of them.")
    check_writable(options.output)
    where: dict[str, Any] = {"revision": options.revision, "trust_remote_code": bool(options.trust_remote_code)}
    given = {name: value for name in _STEP if (value := getattr(options, name)) is not None}
    for name in ("batch_size", "gradient_checkpointing"):
        if given.get(name) == "auto" and not options.fit:
            raise OptionError(f"--{name.replace('_', '-')} auto is for --fit, which looks for what fits.")
    if options.fit:
        memory.parse_bytes(options.fit, "--fit")
    fixed = {name: value for name, value in given.items() if value != "auto" or name == "dtype"}
    memory.Step(**{name: value for name, value in fixed.items() if name not in ("sharding", "devices")})
    settings = {**memory.usual_step(model, **where), **given, **where}
    if options.fit:  # before anything is scanned for
        margin = memory.MARGIN if options.margin is None else options.margin
        memory.refuse_small_budget(model, options.fit, margin, settings)
    plan = checked_plan(Plan.named(options.plan, model_id=model), options.plan) if options.plan else None
    counted = settings.get("device", memory.Step.device)
    if counted == "cuda" and "device" not in given and not _has_cuda():
        print("counted for a CUDA GPU, of which this machine has none; --device cpu counts for the CPU")
    else:
        print(f"counted for {'a CUDA GPU' if counted == 'cuda' else 'the CPU'}")
    print("each step: " + ", ".join(f"{k}={v}" for k, v in settings.items() if k not in where))
    if plan is not None:
        found = memory.estimate_memory(model, plan, **settings)
        print(memory.describe_memory(found))
        write_record(found, options.output)
        return
    chosen = given_plan_options(options)
    if options.report or (options.fit and options.output):  # a plan to train by needs scores
        report = report_of(options, model, chosen)
    else:
        report = memory.report_of_config(model, chosen.get("criterion", "first"), seed=chosen.get("seed", 0), **where)
    modes = chosen.pop("mode", None)
    if options.fit:
        fit = memory.find_fit(
            model, report, mode=modes or "spectrum", budget=options.fit, gradients=options.gradients,
            margin=margin, **chosen, **settings,
        )  # fmt: skip
        print(fit.plan.notes[-1])
        print(memory.describe_memory(fit.memory))
        write_record(fit.plan, options.output)
        return
    ratio = chosen.pop("spectrum_ratio", None)
    ratios = {} if ratio is None else {"ratios": [ratio]}
    rows = memory.memory_table(
        model, report, modes=modes, **ratios, gradients=options.gradients, plan_options=chosen,
        **settings,
    )  # fmt: skip
    print(memory.describe_table(rows))
    for note in dict.fromkeys(note for row in rows for note in row.memory.notes):
        print(f"note: {note}")
    if options.output:
        write_text(options.output, json.dumps([row.memory.to_dict() for row in rows], indent=1) + "\n")
        print(f"wrote {options.output}")


VERB = Verb(
    "memory",
    "memory MODEL [--plan FILE | --fit SIZE] [-o FILE] [flags]",
    "what training needs at its peak, by a dry run; the largest ratio that fits a card; a table of modes and ratios",
    "memory meta-llama/Llama-3.1-8B --fit 24GiB --batch-size 2 --max-length 1024",
    add_arguments,
    run,
)
