"""`train --dry-run`: everything that a run will be, without running it. Nothing is written but the cache of scans."""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..arguments import LORA_FIELDS, Rest
from ..data import RowCounts
from ..devices import default_device
from ..errors import OptionError
from ..memory import OPTIMIZERS, describe_memory, estimate_memory, gradients_of_report
from ..plan import check_options, explain, make_plan, needs_gradients
from ..records import Plan, SnrReport
from ..tuner.config import SpectrumConfig, candidates_of
from .arguments import quiet_progress
from .output import check_output, sources_read
from .preview import counted, encoded_run, first_rows, lines_of, step_length, tokenizer_of
from .progress import duration
from .rate_race import SHARE, heat_steps
from .run import introduction, load_run, report_for, settle_rate
from .settle import Run, settle
from .steps import steps_of
from .tasks import build_trainer
from .watch import StepClock


def dry_run(options: argparse.Namespace, rest: Rest, plan_options: dict[str, Any], flags: Sequence[str] = ()) -> None:
    """Print what would train, from which rows, in how many steps, and with how much memory.

    Args:
        options, rest, plan_options, flags: as those of `run.train`.
    Raises:
        OptionError, DataError, CheckpointError: what `train` would refuse before it loads the model.
    """
    quiet_progress()
    run = settle(options, rest, plan_options, flags)
    check_output(
        Path(run.args.output_dir or ""), overwrite=bool(options.overwrite_output_dir), resumed=run.resume is not None,
        sources=sources_read(options),
    )  # fmt: skip
    print(introduction(run, options.mode is not None))
    counts = counted(run, options)
    for line in lines_of(counts):
        print(line)
    if options.show_rows is not None:
        print(first_rows(run, options))
    steps = steps_of(run, options, counts["training"].left)
    print(_steps_line(run, steps))
    print(settle_rate(run, steps))
    if run.race and run.resume is None:
        print(f"learning rate race: short runs of {heat_steps(steps)} steps, together at most {SHARE:.0%} of the run's")
    if run.peft is not None:
        print(f"plan and memory: not known beforehand for PEFT's {run.name}")
    else:
        plan, report, assumed = _planned(run, options, plan_options)
        print(explain(plan, report))
        print(_memory_of(run, options, plan, counts["training"]))
        if assumed:
            print("note: the plan needs gradients, which a run measures first; here no matrix is like another")
    print(_time_line(run, options, plan_options, steps))
    print("dry run: nothing was trained and nothing written")


def _steps_line(run: Run, steps: int) -> str:
    args = run.args
    parts = [f"{args.per_device_train_batch_size} on each of {args.world_size} devices"]
    if args.world_size == 1:
        parts = [f"batches of {args.per_device_train_batch_size}"]
    if args.gradient_accumulation_steps > 1:
        parts.append(f"{args.gradient_accumulation_steps} of them for a step")
    parts.append("--max-steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs")
    return f"steps: {steps:,} ({', '.join(parts)})"


# --- plan and memory -------------------------------------------------------------------------------------------------


def _planned(
    run: Run, options: argparse.Namespace, plan_options: dict[str, Any]
) -> tuple[Plan, SnrReport | None, bool]:
    """The plan, the report that it was made from, and whether gradients had to be assumed for it."""
    if run.plan is not None:
        return run.plan, None, False
    assert run.mode is not None
    report = report_for(options, plan_options, run.mode.selective)
    assumed = not options.gradients and needs_gradients(check_options(**plan_options))
    settings = SpectrumConfig(
        **plan_options,
        **{name: value for name in LORA_FIELDS if (value := getattr(options, name)) is not None},
        report=report,
        gradients=gradients_of_report(report) if assumed else options.gradients,
        force=options.force,
        task_type=run.task.task_type,
    )
    gradients, candidates = settings.resolved_gradients(), candidates_of(settings, report)
    return make_plan(report, gradients=gradients, candidates=candidates, **settings.options()), report, assumed


def _memory_of(run: Run, options: argparse.Namespace, plan: Plan, counts: RowCounts) -> str:
    """What a step needs at its peak, on the device that there is."""
    args: Any = run.args
    length = step_length(run, counts)
    notes = []
    if run.task.rewarded:
        length += args.max_completion_length
        notes.append("the cache of what is written is not counted")
    spectrum = SpectrumConfig(
        plan=plan,
        keep_base="none",
        task_type=run.task.task_type,
        **{name: value for name in LORA_FIELDS if (value := getattr(options, name)) is not None},
    )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in OPTIMIZERS:
        notes.append(f"the optimizer is counted as adamw_torch_fused, for {optimizer} is not modelled")
        optimizer = "adamw_torch_fused"
    attention = options.attn_implementation if options.attn_implementation in ("sdpa", "eager") else None
    trl = run.task.arguments[0] == "trl" and run.task.head is None
    reference = run.task.relative and not args.precompute_ref_log_probs
    found = estimate_memory(
        run.config,
        spectrum,
        batch_size=args.per_device_train_batch_size * run.task.together,
        max_length=length,
        dtype=run.dtype,
        optimizer=optimizer,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        quantization=options.quantization,
        attn_implementation=attention,
        model_class=getattr(transformers, run.task.auto_class),
        trust_remote_code=bool(options.trust_remote_code),
        device="cuda" if default_device().type == "cuda" else "cpu",
        trainer="sft" if trl else "transformers",
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        max_grad_norm=args.max_grad_norm,
        reference=reference,
    )
    if reference:
        notes.append("the model as it was before, which the loss holds it beside, is counted")
    if run.task.together > 1:
        notes.append("both answers of a pair are counted")
    return "\n".join([f"memory of a step: {describe_memory(found)}", *(f"note: {note}" for note in notes)])


# --- time ------------------------------------------------------------------------------------------------------------


def _time_line(run: Run, options: argparse.Namespace, plan_options: dict[str, Any], steps: int) -> str:
    if options.time_steps is None:
        return "time: not known; --time-steps 3 loads the model and measures three steps"
    seconds = measured_step(run, options, plan_options, options.time_steps)
    whole = duration(seconds * steps)
    measured = f"{seconds:.3g} s, measured on {options.time_steps}"
    return f"time: about {whole} for {steps:,} steps of {measured}; loading, evaluation and saving come on top"


def measured_step(run: Run, options: argparse.Namespace, plan_options: dict[str, Any], n: int) -> float:
    """Seconds of a step: the median of `n` real ones, of which the first does not count where there are more.

    The run's own trainer on the run's own rows, in a folder that goes.

    Raises:
        OptionError: fewer than one step asked for.
    """
    if n < 1:
        raise OptionError(f"--time-steps is {n}, wanted at least 1.")
    run = encoded_run(run, options)
    transformers.set_seed(run.args.seed)
    model, tokenizer, _, _ = load_run(run, options, plan_options)
    clock = StepClock()
    args: Any = copy.copy(run.args)
    args.max_steps, args.report_to, args.push_to_hub = n, [], False
    args.save_strategy, args.eval_strategy, args.logging_strategy = (
        SaveStrategy.NO,
        IntervalStrategy.NO,
        IntervalStrategy.NO,
    )
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        trainer = build_trainer(
            run.task.name,
            model=model,
            tokenizer=tokenizer or tokenizer_of(run, options),
            args=args,
            train_dataset=run.train_rows,
            max_length=options.max_length,
            callbacks=[clock],
            data=run.data,
            rewards=run.rewards,
        )
        trainer.pop_callback(transformers.PrinterCallback)
        trainer.train()
    return statistics.median(clock.seconds[1:] or clock.seconds)
