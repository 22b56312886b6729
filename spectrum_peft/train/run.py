"""The verb `train`, on the trainers of transformers and TRL."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from ..arguments import LORA_FIELDS, Rest
from ..card import write_card
from ..devices import peak_memory, reset_peak_memory
from ..errors import CheckpointError, DataError, OptionError
from ..plan import MODES, OPTIONS, check_options, needs_gradients
from ..probe import DEFAULT_SAMPLES, calibration_batches
from ..records import RESULTS_FILE, SnrReport, finite_only, with_usual_modes, write_text
from ..scan import report_named
from ..tuner.classes import weightless
from ..tuner.config import SpectrumConfig, refuse_unknown_targets
from ..tuner.loading import load_model_with_peft, load_model_with_spectrum
from ..tuner.tokenizer import load_tokenizer
from .arguments import quiet_progress, remote_options
from .calibration import calibration_rows
from .callback import SpectrumCallback, slower_by
from .checkpoints import resuming, saving
from .fitting import known_tokens
from .fused_heads import found_by_trl
from .history import write_history
from .output import check_output, clear_killed, clear_output, sources_read
from .preview import told_run
from .processes import check_rows_agree, gather_when_saving
from .progress import say_it_in_words
from .pushing import check_base, pushed
from .rate_race import LearningRateRace, heat_steps
from .settle import Run, settle
from .steps import steps_of
from .tasks import Task, build_trainer, evaluate, examples_of
from .tracking import report_plan
from .watch import FiniteLoss, RankLog, StepClock, StopAt, UsualModes

logger = logging.getLogger(__name__)


def train(
    options: argparse.Namespace, rest: Rest, plan_options: dict[str, Any], flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Load, train, judge, save.

    Args:
        options: flags of the verb `train`.
        rest: what goes to the trainer's own arguments.
        plan_options: those of `make_plan` that were given.
        flags: of the verb, for near matches.
    Returns:
        What is written to `train_results.json`: what was trained, how fast, at what peak memory, and the metrics before
        and after where there is an evaluation set. `input_tokens` is without padding. Memory in bytes, time in seconds. The
        peak is that of loading and training, without the two evaluations (on systems other than Linux the first one counts).
    """
    quiet_progress()
    run = settle(options, rest, plan_options, flags)
    args, task = run.args, run.task.name
    output = Path(args.output_dir)
    # The trainer's own pushes send whatever lies in the folder; ours comes at the end.
    pushes, args.push_to_hub = args.push_to_hub, False
    if pushes:
        check_base(
            options.model, real_weights=run.mode is not None and run.mode.plain_model and not options.quantization
        )
    check_output(
        output,
        overwrite=bool(options.overwrite_output_dir),
        resumed=run.resume is not None,
        sources=sources_read(options),
    )
    clear_killed(output)
    print(introduction(run, options.mode is not None))
    check_rows_agree(run.train_rows)
    run, counts = told_run(run, options)
    print(settle_rate(run, 0 if run.rate_given else steps_of(run, options, len(run.train_rows))))
    transformers.set_seed(args.seed)  # a new head and new adapters are random
    memory_before = peak_memory()
    model, tokenizer, report, setup = load_run(run, options, plan_options)
    if tokenizer is None:
        raise CheckpointError(f"{options.model}: has no tokenizer, which training on text needs.")
    memory_loaded = peak_memory()
    # Counted before a trainer puts a copy of the adapter beside it, to compare with.
    total = sum(map(_elements, model.parameters()))
    clock = StepClock()
    callbacks: list[TrainerCallback] = [clock, FiniteLoss(), UsualModes()]
    callback = None
    caches = getattr(model.config, "use_cache", None)
    if run.peft is None:
        callback = SpectrumCallback()
        callback.sums_up = False
        callback.report = report
        callbacks.insert(0, callback)
    elif hasattr(model.base_model, "update_and_allocate"):
        callbacks.append(RankLog())
    if options.stop_at_step is not None:
        callbacks.append(StopAt(options.stop_at_step))
    trainer = build_trainer(
        task,
        model=model,
        tokenizer=tokenizer,
        args=args,
        train_dataset=run.train_rows,
        eval_dataset=run.eval_rows,
        max_length=options.max_length,
        callbacks=callbacks,
        data=run.data,
        rewards=run.rewards,
    )
    say_it_in_words(trainer)
    if callback is not None and args.report_to not in ([], ["none"]):
        report_plan(trainer)
    race = LearningRateRace(trainer) if run.race else None
    if race is not None:
        trainer.add_callback(race)
    if not len(trainer.train_dataset):
        raise DataError(
            f"{options.dataset}: none of its {len(run.train_rows)} rows is left to train on: in each {too_long(run.task)} "
            f"the {getattr(args, 'max_length', options.max_length)} tokens of max_length."
        )
    gone = len(run.train_rows) - len(trainer.train_dataset) // examples_of(run.task, run.train_rows)
    foreseen = counts["training"].read - counts["training"].left if counts else 0
    if run.task.drops is not None and run.task.name != "causal_lm" and gone > 0 and gone != foreseen:
        print(f"training: {gone:,} of {len(run.train_rows):,} rows dropped, in which {too_long(run.task)} max_length")
    with known_tokens(model):
        before = evaluate(task, trainer, trainer.eval_dataset) if run.eval_rows is not None else None
    rounded = _kept_in_float32(trainer) if hasattr(model, "spectrum_plan") else []
    reset_peak_memory()
    if options.overwrite_output_dir and run.resume is None and trainer.is_world_process_zero():
        clear_output(output, checkpoints=True)
    with saving(args.output_dir), resuming(run.resume), known_tokens(model), found_by_trl(model):
        trainer.train(resume_from_checkpoint=run.resume)
    peak = max(memory_loaded, peak_memory())
    for parameter, stored in rounded:
        parameter.data = parameter.data.to(stored)
    after = evaluate(task, trainer, trainer.eval_dataset) if run.eval_rows is not None else None

    plan = callback.plan if callback is not None else None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if plan is not None and plan.options.get("rescore_every") is not None:
        trained = plan.trainable_parameters  # what is allocated is more than what is live
    if caches is not None:  # the trainer switches it off for training, and the saved model is for use
        model.config.use_cache = caches
    if trainer.is_world_process_zero():
        clear_output(output, checkpoints=False)
    gather_when_saving(trainer)
    with saving(args.output_dir):
        trainer.save_model(str(output))
        with_usual_modes(output)
    results = {
        "mode": run.name,
        "task": task,
        "model": options.model,
        "dataset": options.dataset,
        "rows": {name: dataclasses.asdict(found) for name, found in counts.items()},
        "dtype": str(run.dtype).removeprefix("torch."),
        "quantization": options.quantization,
        "new_head": run.new_head,
        "learning_rate": args.learning_rate,
        "learning_rate_race": race.record() if race is not None else None,
        "seed": args.seed,
        "trainable_parameters": trained,
        "total_parameters": total,
        "setup_seconds": setup,
        "steps": trainer.state.global_step,
        "seconds_per_step": statistics.median(clock.seconds) if clock.seconds else None,
        "step_seconds": clock.seconds,
        "input_tokens": int(trainer.state.num_input_tokens_seen),
        "peak_memory_bytes": peak,
        "peak_memory_before_loading_bytes": memory_before,
        "saved_bytes": sum(file.stat().st_size for file in output.glob("*.safetensors")),
        "before": before,
        "after": after,
        "log_history": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        if hasattr(trainer.model, "peft_config") and run.head:
            # The names of the classes: an adapter's own files have no place for them.
            with saving(args.output_dir):
                trainer.model.config.save_pretrained(output)
        if callback is not None:
            callback.write_records(output)
        write_text(output / RESULTS_FILE, json.dumps(finite_only(results), indent=1) + "\n")
        write_history(trainer.state.log_history, output, run.name)
        write_card(output)
        if pushes:
            print(pushed(output, args))
    return results


def too_long(task: Task) -> str:
    return "an answer is longer than" if task.drops == "long" else "the prompt alone fills"


def introduction(run: Run, chosen: bool) -> str:
    """One line: mode, task and dtype; another where nobody chose the mode."""
    method = f"PEFT's {run.name}" if run.mode is None else f"mode {run.name}"
    line = f"{method}, task {run.task.name}, {run.why}"
    if run.mode is not None and run.plan is None and not chosen:
        line += "\nno --mode was given, and none was shown to be the best one: `spectrum-peft tune` finds yours on your data"
    return line


def settle_rate(run: Run, steps: int) -> str:
    """Set the learning rate that a run of so many steps usually takes, where the user gave none; one line that says which.

    Raises:
        OptionError: the rate is to be raced for, and the run is too short.
    """
    mode, slower = run.mode or MODES["lora"], slower_by(type(run.args))
    whose = "that of mode 'lora'" if run.mode is None else f"the default of mode {run.name!r}"
    if slower != 1:  # nothing was measured of how these go with the length of a run, the rank or the ratio
        usual, why = mode.default_lr / slower, f"{whose}, over {slower:g} for {run.task.name}"
    else:
        usual, why = mode.rate_for(steps, run.r, run.ratio), f"{whose} for {steps:,} steps"
        if mode.by_rank:
            why += f" at rank {run.r}"
        elif mode.by_ratio and run.ratio < 1:
            why += f" at ratio {run.ratio:g}"
    if run.rate_given:
        return f"learning rate {run.args.learning_rate:g} (set by you)"
    run.args.learning_rate = usual
    if not run.race:
        return f"learning rate {usual:g} ({why})"
    if run.resume is not None:
        return "learning rate auto: the one that the checkpoint's run found"
    heat_steps(steps)
    return f"learning rate auto: a race that begins at {usual:g} ({why})"


def load_run(
    run: Run, options: argparse.Namespace, plan_options: Mapping[str, Any]
) -> tuple[Any, Any, SnrReport | None, dict[str, float]]:
    """Model, tokenizer, report, and the seconds of the scan and of all that makes the model ready to train."""
    kwargs: dict[str, Any] = {
        "dtype": run.dtype,
        "quantization": options.quantization,
        "model_class": getattr(transformers, run.task.auto_class),
        **run.head,
    }
    kwargs |= remote_options(options)
    if options.attn_implementation:
        kwargs["attn_implementation"] = options.attn_implementation
    began = time.perf_counter()
    if run.peft is not None:
        model, tokenizer = load_model_with_peft(options.model, {"task_type": run.task.task_type, **run.peft}, **kwargs)
        return model, tokenizer, None, {"scan": 0.0, "model": time.perf_counter() - began}
    assert run.mode is not None
    report = None if run.plan else report_for(options, plan_options, run.mode.selective)
    scanned = time.perf_counter()
    spectrum = SpectrumConfig(
        **plan_options,
        **{name: value for name in LORA_FIELDS if (value := getattr(options, name)) is not None},
        report=report,
        plan=run.plan,
        gradients=options.gradients,
        calibration_data=_calibration(run, options, plan_options),
        force=options.force,
        task_type=run.task.task_type,
    )
    model, tokenizer = load_model_with_spectrum(options.model, spectrum, **kwargs)
    return model, tokenizer, report, {"scan": scanned - began, "model": time.perf_counter() - scanned}


def _calibration(
    run: Run, options: argparse.Namespace, plan_options: Mapping[str, Any]
) -> list[dict[str, torch.Tensor]] | None:
    """The first training rows as batches, where the plan needs gradients and no report of them was given."""
    if run.plan is not None or options.gradients or not needs_gradients(check_options(**plan_options)):
        return None
    samples = DEFAULT_SAMPLES if options.calibration_samples is None else options.calibration_samples
    if samples < 1:
        raise OptionError(f"--calibration-samples is {samples}, wanted at least 1.")
    rows = run.train_rows.select(range(min(samples, len(run.train_rows))))
    tokenizer = load_tokenizer(options.model, **remote_options(options))
    labels = list(run.head.get("label2id", ()))
    rows, task = calibration_rows(run.task, rows, tokenizer, options.max_length, labels, run.data)
    if not len(rows):
        raise DataError(
            f"{options.dataset}: none of its first {samples} rows is wanted, so that there is nothing to probe."
        )
    print(f"probing gradients on the first {len(rows)} training rows (--gradients gives a report of `probe` instead)")
    limit = options.max_length or getattr(run.args, "max_length", None)
    return calibration_batches(
        rows,
        n=len(rows),
        tokenizer=tokenizer,
        task=task,
        batch_size=min(run.args.per_device_train_batch_size, len(rows)),
        labels=labels or None,
        **({} if limit is None else {"max_length": limit}),
    )


def _kept_in_float32(trainer: Any) -> list[tuple[torch.nn.Parameter, torch.dtype]]:
    """Give the real weights that train a float32 value, where they are stored in less and mixed precision is on.

    In bfloat16 most steps of fine-tuning are smaller than half of a value's last place and would be lost. A tuner layer
    does this by itself (`trainable_dtype`); in a plain model the products fit only under autocast.

    Returns:
        Each such parameter with its dtype as loaded, to round it once when training has ended.
    """
    model, args = trainer.model, trainer.args
    short = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not short:
        return []
    if model.spectrum_plan.options["trainable_dtype"] == "base" or not (args.bf16 or args.fp16):
        logger.warning("%d tensors train in %s: steps below half of a last place are lost", len(short), short[0].dtype)
        return []
    kept = [(p, p.dtype) for p in short]
    for parameter in short:
        parameter.data = parameter.data.float()
    return kept


def report_for(options: argparse.Namespace, plan_options: Mapping[str, Any], scored: bool) -> SnrReport:
    """The report that was given, else a scan; a mode that takes everything needs names and shapes, no scores.

    Raises:
        OptionError: `--target-modules` names what the model does not have, which is seen before a scan.
    """
    if options.report is None and options.target_modules and scored:
        built = weightless(options.model, **remote_options(options))
        if built is not None:
            there = [*dict(built.named_modules()), *dict(built.named_parameters())]  # fused experts are no modules
            refuse_unknown_targets(options.target_modules, there)
    return report_named(
        options.report,
        options.model,
        plan_options.get("criterion"),
        options.revision,
        plan_options.get("seed", OPTIONS["seed"]),
        download=True,  # the model is loaded next
        scored=scored,
        force=options.force,
    )


def describe_training(results: Mapping[str, Any]) -> str:
    """A few lines for the reader of the terminal."""
    trained, total = results["trainable_parameters"], results["total_parameters"]
    peak, before = results["peak_memory_bytes"], results.get("peak_memory_before_loading_bytes")
    already = f" ({before / 2**30:.2f} GiB of it before the model was loaded)" if before else ""
    lines = [
        f"trained {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %) for {results['steps']} steps, "
        f"{results['seconds_per_step'] or 0:.3g} s a step (median), peak memory {peak / 2**30:.2f} GiB{already}"
    ]
    if results["before"]:
        for name, value in results["after"].items():
            if name not in {"tokens", "examples", "tags"}:
                lines.append(f"{name}: {results['before'][name]:.4f} -> {value:.4f}")
    return "\n".join(lines)


def _elements(parameter: torch.nn.Parameter) -> int:
    """Number of weights; a 4-bit parameter stores two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()
