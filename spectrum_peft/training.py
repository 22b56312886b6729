"""What the verbs `train` and `evaluate` do, on the trainers of transformers and TRL."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments
from trl import TrlParser

from . import generation
from .arguments import LORA_FIELDS, Rest, checked_value
from .callback import SpectrumCallback
from .config import SpectrumConfig
from .errors import CheckpointError, DataError, OptionError, near_matches
from .loading import (
    check_quantizable,
    checked_peft_config,
    fast_dtype,
    load_model_with_peft,
    load_model_with_spectrum,
    load_tokenizer,
    load_trained,
)
from .machine import peak_resident, reset_peak
from .plan import OPTIONS, check_options, needs_gradients
from .policies import MODES, Mode, get_mode
from .probe import DEFAULT_SAMPLES, calibration_batches, probe_gradients
from .records import GradientReport, Plan, SnrReport, read_mapping, write_text
from .scan import scan_weights
from .tasks import (
    COLUMNS,
    TASKS,
    Task,
    build_trainer,
    evaluate,
    has_classifier,
    label_ids,
    label_names,
    read_dataset,
    select_columns,
    task_of,
)

logger = logging.getLogger(__name__)

RESULTS = "train_results.json"
_DTYPES = ("float32", "bfloat16", "float16")


# --- the trainer's own arguments -------------------------------------------------------------------------------------


class _TrainerParser(TrlParser):
    """TRL's parser of dataclasses; it raises instead of printing its usage."""

    def error(self, message: str) -> Any:
        raise OptionError(message)


def _trainer_parser(task: str) -> _TrainerParser:
    return _TrainerParser([_task(task).arguments_class()], allow_abbrev=False, prog="spectrum-peft train")


def _task(name: str) -> Task:
    if name not in TASKS:
        raise OptionError(f"task is {name!r}." + near_matches(name, TASKS))
    return TASKS[name]


def trainer_help(task: str) -> str:
    """The flags of a task's own training arguments, with their defaults."""
    return _trainer_parser(task).format_help()


def trainer_arguments(
    task: str, rest: Rest, defaults: Mapping[str, Any], known: Sequence[str] = ()
) -> TrainingArguments:
    """Build a task's training arguments: ours as defaults, then the config file, then the command line.

    Args:
        known: flags of the verb itself, for near matches.
    Raises:
        OptionError: an unknown flag or key, a value that the arguments refuse.
    """
    parser = _trainer_parser(task)
    (arguments_class,) = parser.dataclass_types
    parser.set_defaults(**defaults)
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.dest != "help":
            actions.setdefault(action.dest, action)  # a switch that is on by default has a second action, `--no-...`
    types = {name: str(hint) for name, hint in typing.get_type_hints(arguments_class).items()}
    for key, value in (rest.config or {}).items():
        if key not in actions:
            choices = [*actions, *(flag.removeprefix("--").replace("-", "_") for flag in known)]
            raise OptionError(f"{rest.source}: unknown key {key!r}." + near_matches(key, choices))
        if not any(isinstance(value, kind) and kind.__name__ in types[key] for kind in (dict, list)):
            value = checked_value(actions[key], key, value, rest.source)
        parser.set_defaults(**{key: value})
    try:
        args, unknown = parser.parse_args_into_dataclasses(
            list(rest.argv), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"training arguments: {error}") from error
    if unknown:
        flags = [*known, *(flag for action in parser._actions for flag in action.option_strings)]
        dashes = [flag for flag in flags if "_" not in flag]  # each flag has a form with underscores too
        raise OptionError(f"unknown argument {unknown[0]!r}." + near_matches(unknown[0], dashes))
    return args


def _given(rest: Rest) -> set[str]:
    """Names of the trainer's arguments that the user set."""
    flags = (token[2:].partition("=")[0].replace("-", "_") for token in rest.argv if token.startswith("--"))
    return {*flags, *(rest.config or {})}


def quiet_progress() -> None:
    """No progress bars in a file or a pipe."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _renamed(options: argparse.Namespace) -> dict[str, str]:
    """{standard column: name in the dataset} of the `--...-column` flags that were given."""
    return {name: value for name in COLUMNS if (value := getattr(options, f"{name}_column")) is not None}


# --- what a checkpoint is --------------------------------------------------------------------------------------------


def _config_of(model: str, options: argparse.Namespace) -> Any:
    """transformers' config of a folder or hub id.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if model.endswith(".gguf"):
        raise CheckpointError(
            f"{model}: a .gguf can be scanned, not trained. Convert it to a folder of safetensors first: load it with "
            "transformers (from_pretrained(folder, gguf_file=name)) and save the weights."
        )
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise CheckpointError(f"{model}: no config.json there, so it is not a checkpoint folder.")
    try:
        return transformers.AutoConfig.from_pretrained(
            model, revision=options.revision, trust_remote_code=bool(options.trust_remote_code)
        )
    except (OSError, ValueError) as error:
        where = (
            "cannot be loaded as a model" if Path(model).exists() else "no such folder, and not loadable from the hub"
        )
        raise CheckpointError(f"{model}: {where} ({_first_line(error)})") from error


def _dtype_of(options: argparse.Namespace) -> tuple[torch.dtype, str]:
    """The dtype to load in, and one line that says why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.dtype in (None, "auto"):
        dtype = fast_dtype()
        why = "multiplies bfloat16 fast" if dtype == torch.bfloat16 else "does not multiply bfloat16 fast"
        return dtype, f"{str(dtype).removeprefix('torch.')} on {device}, which {why} (--dtype to change)"
    if options.dtype not in _DTYPES:
        raise OptionError(f"dtype is {options.dtype!r}." + near_matches(options.dtype, (*_DTYPES, "auto")))
    return getattr(torch, options.dtype), f"{options.dtype} on {device}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# --- train -----------------------------------------------------------------------------------------------------------


class StepClock(TrainerCallback):
    """Times each optimizer step on its own: data, logging, saving and evaluation between steps are not in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run is, settled before a weight is read.

    Attributes:
        name: of the mode, or of the method of PEFT's own.
        mode: row of the table; None for a method of PEFT's own.
        peft: fields of a PEFT config, `peft_type` among them; None for our modes.
        why: one line on the dtype.
        train_rows, eval_rows: with the task's standard columns; no evaluation rows where no set was named.
        head: keywords of the loader that size and name a classification head.
        new_head: the checkpoint has none, so that it begins at random.
    """

    name: str
    mode: Mode | None
    peft: dict[str, Any] | None
    plan: Plan | None
    task: Task
    dtype: torch.dtype
    why: str
    args: TrainingArguments
    resume: str | bool | None
    train_rows: datasets.Dataset
    eval_rows: datasets.Dataset | None
    head: dict[str, Any]
    new_head: bool


Rows = tuple[datasets.Dataset, datasets.Dataset | None]


def settle(
    options: argparse.Namespace,
    rest: Rest,
    plan_options: Mapping[str, Any],
    flags: Sequence[str] = (),
    rows: Rows | None = None,
) -> Run:
    """Check everything about a run that can be checked without its weights; the arguments are those of `train`.

    Args:
        rows: training and evaluation rows of the same datasets, where an earlier call has read them.
    Raises:
        OptionError, CheckpointError, DataError: whatever is wrong with flags, checkpoint folder or datasets.
    """
    plan = Plan.load(options.plan) if options.plan else None
    own = _peft_fields(options, plan_options) if options.peft_config else None
    checked = check_options(**plan_options)
    mode = None if own else get_mode(plan.mode if plan else checked["mode"])
    name = own["peft_type"] if own else mode.name
    config = _config_of(options.model, options)
    task = _task(options.task or task_of(config, options.model))
    if mode is not None and options.quantization not in (None, "none"):
        check_quantizable(mode)
    dtype, why = _dtype_of(options)
    rate = MODES["lora"].default_lr if mode is None else mode.default_lr
    args = trainer_arguments(task.name, rest, _defaults(options, task, rate, dtype), flags)
    if args.learning_rate < 0:
        raise OptionError(f"learning_rate is {args.learning_rate:g}, wanted a rate of at least 0.")
    if plan is not None:
        _refuse_other_options(plan, plan_options, options.plan)
    resume = _resume(args.resume_from_checkpoint)
    eval_source = options.eval_dataset or (options.dataset if options.eval_split else None)
    if args.eval_strategy != "no" and eval_source is None:
        raise OptionError(
            f"eval_strategy is {args.eval_strategy.value!r}, but there is no --eval-dataset or --eval-split."
        )
    if own and own["peft_type"] == "ADALORA" and own.setdefault("total_step", args.max_steps) <= 0:
        raise OptionError(f"{options.peft_config}: AdaLoRA needs total_step; give it, or --max-steps.")
    if own:
        checked_peft_config(own)

    train_rows, eval_rows = rows or _read_rows(options, task.name, args)
    head: dict[str, Any] = {}
    if "label" in train_rows.column_names:
        labels = label_names(train_rows, config if has_classifier(config) else None, options.dataset)
        ids = {name: i for i, name in enumerate(labels)}
        head = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": ids}
        if eval_rows is not None:
            _check_labels(eval_rows, labels, eval_source)
    new_head = bool(head) and not has_classifier(config)
    return Run(name, mode, own, plan, task, dtype, why, args, resume, train_rows, eval_rows, head, new_head)


def _check_labels(rows: Any, labels: Sequence[str], source: str) -> None:
    """
    Raises:
        DataError: evaluation rows hold a label that is none of the model's.
    """
    try:
        label_ids(rows, labels)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _refuse_other_options(plan: Plan, given: Mapping[str, Any], source: str) -> None:
    """A plan is final: an option beside it that says something else would be of no effect.

    Raises:
        OptionError: names the first of them.
    """
    for name, value in given.items():
        fixed = plan.options.get(name)
        value = tuple(value) if isinstance(value, list) else value
        if name not in ("mode", "seed") and fixed != value:
            raise OptionError(
                f"--{name.replace('_', '-')} is {value!r}, but {source} was made with {fixed!r}. Make another plan, or leave "
                "the flag out."
            )


def _read_rows(options: argparse.Namespace, task: str, args: TrainingArguments) -> Rows:
    renamed = _renamed(options)
    if getattr(args, "dataset_text_field", "text") != "text":  # TRL's name for the same wish
        renamed.setdefault("text", args.dataset_text_field)
        args.dataset_text_field = "text"
    train_rows = read_dataset(options.dataset, options.dataset_split or "train")
    train_rows = select_columns(train_rows, task, options.dataset, renamed)
    source = options.eval_dataset or (options.dataset if options.eval_split else None)
    if source is None:
        return train_rows, None
    return train_rows, select_columns(read_dataset(source, options.eval_split or "train"), task, source, renamed)


def task_for(options: argparse.Namespace) -> str:
    """The task that was named, else the one that the checkpoint's architecture says."""
    return _task(options.task or task_of(_config_of(options.model, options), options.model)).name


def _peft_fields(options: argparse.Namespace, plan_options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `--peft-config`, which goes with none of our own options."""
    given = [name for name in (*LORA_FIELDS, "plan", "report") if getattr(options, name) is not None]
    given += [name for name in plan_options if name != "seed"]
    if given:
        raise OptionError(f"--peft-config and {given[0]} are both given: a method of PEFT's own takes only its config.")
    fields = read_mapping(options.peft_config)
    if "peft_type" not in fields:
        raise OptionError(f"{options.peft_config}: peft_type is missing, wanted a name such as ADALORA.")
    return {**fields, "peft_type": str(fields["peft_type"]).upper()}


class _Finite(TrainerCallback):
    """Ends a run whose loss or weights have become NaN: what follows would be NaN, too, and nothing would say so."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise DataError(f"the loss is {float(loss)} at step {state.global_step}; nothing was saved. " + _NOT_FINITE)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in (1, state.max_steps):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                    raise DataError(f"{name} holds NaN or Inf after step {state.global_step}. " + _NOT_FINITE)


_NOT_FINITE = (
    "A lower learning rate may help; `spectrum-peft scan` tells whether the checkpoint itself holds such values."
)


class _Reallocation(TrainerCallback):
    """AdaLoRA moves its ranks after each optimizer step, while the gradients are still there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


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
        and after where there is an evaluation set. Memory in bytes, time in seconds. The peak is that of loading and
        training, without the two evaluations (on systems other than Linux the first one counts).
    """
    quiet_progress()
    run = settle(options, rest, plan_options, flags)
    args, task = run.args, run.task.name
    method = f"PEFT's {run.name}" if run.mode is None else f"mode {run.name}"
    usual = "that of mode 'lora'" if run.mode is None else f"the default of mode {run.name!r}"
    source = "set by you" if "learning_rate" in _given(rest) else usual
    print(f"{method}, task {task}, {run.why}")
    print(f"learning rate {args.learning_rate:g} ({source})")

    transformers.set_seed(args.seed)  # a new head and new adapters are random
    memory_before = peak_memory()
    model, tokenizer, report, setup = _load(run, options, plan_options)
    if tokenizer is None:
        raise CheckpointError(f"{options.model}: has no tokenizer, which training on text needs.")
    memory_loaded = peak_memory()
    clock = StepClock()
    callbacks: list[TrainerCallback] = [clock, _Finite()]
    callback = None
    if run.peft is None:
        callback = SpectrumCallback()
        callback.report = report
        callbacks.insert(0, callback)
    elif hasattr(model.base_model, "update_and_allocate"):
        callbacks.append(_Reallocation())
    trainer = build_trainer(
        task,
        model=model,
        tokenizer=tokenizer,
        args=args,
        train_dataset=run.train_rows,
        eval_dataset=run.eval_rows,
        max_length=options.max_length,
        callbacks=callbacks,
    )
    if not len(trainer.train_dataset):
        raise DataError(
            f"{options.dataset}: none of its {len(run.train_rows)} rows is left to train on: in each the prompt alone fills the "
            f"{getattr(args, 'max_length', options.max_length)} tokens of max_length."
        )
    before = evaluate(task, trainer, trainer.eval_dataset) if run.eval_rows is not None else None
    rounded = _kept_in_float32(trainer) if hasattr(model, "spectrum_plan") else []
    reset_peak_memory()
    trainer.train(resume_from_checkpoint=run.resume)
    peak = max(memory_loaded, peak_memory())
    for parameter, stored in rounded:
        parameter.data = parameter.data.to(stored)
    after = evaluate(task, trainer, trainer.eval_dataset) if run.eval_rows is not None else None

    plan = callback.plan if callback is not None else None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if plan is not None and plan.options.get("rescore_every") is not None:
        trained = plan.trainable_parameters  # what is allocated is more than what is live
    output = Path(args.output_dir)
    trainer.save_model(str(output))
    results = {
        "mode": run.name,
        "task": task,
        "model": options.model,
        "dtype": str(run.dtype).removeprefix("torch."),
        "quantization": options.quantization,
        "new_head": run.new_head,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "trainable_parameters": trained,
        "total_parameters": sum(map(_elements, model.parameters())),
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
            trainer.model.config.save_pretrained(output)
        if callback is not None:
            callback.write_records(output)
        write_text(output / RESULTS, json.dumps(_finite(results), indent=1) + "\n")
    return results


def _load(
    run: Run, options: argparse.Namespace, plan_options: Mapping[str, Any]
) -> tuple[Any, Any, SnrReport | None, dict[str, float]]:
    """Model, tokenizer, report, and the seconds of the scan and of all that makes the model ready to train."""
    kwargs: dict[str, Any] = {
        "dtype": run.dtype,
        "quantization": options.quantization,
        "model_class": getattr(transformers, run.task.auto_class),
        **run.head,
    }
    kwargs |= _remote(options)
    if options.attn_implementation:
        kwargs["attn_implementation"] = options.attn_implementation
    began = time.perf_counter()
    if run.peft is not None:
        model, tokenizer = load_model_with_peft(options.model, {"task_type": run.task.task_type, **run.peft}, **kwargs)
        return model, tokenizer, None, {"scan": 0.0, "model": time.perf_counter() - began}
    assert run.mode is not None
    report = None if run.plan else _report(options, plan_options, run.mode.selective)
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
    print(f"probing gradients on the first {len(rows)} training rows (--gradients gives a report of `probe` instead)")
    limit = options.max_length or getattr(run.args, "max_length", None)
    return calibration_batches(
        rows,
        n=len(rows),
        tokenizer=load_tokenizer(options.model, **_remote(options)),
        task=run.task.name,
        batch_size=min(run.args.per_device_train_batch_size, len(rows)),
        labels=list(run.head["label2id"]) if run.head else None,
        **({} if limit is None else {"max_length": limit}),
    )


def _remote(options: argparse.Namespace) -> dict[str, Any]:
    """Which version of a hub model to load, and whether to run its code, as `from_pretrained` wants it."""
    return {name: value for name in ("revision", "trust_remote_code") if (value := getattr(options, name))}


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


def _defaults(options: argparse.Namespace, row: Task, rate: float, dtype: torch.dtype) -> dict[str, Any]:
    """Defaults of the training arguments: the mode's rate, and mixed precision only in the dtype that was loaded."""
    defaults: dict[str, Any] = {
        "output_dir": options.output_dir,
        "learning_rate": rate,
        "include_num_input_tokens_seen": True,
        "logging_nan_inf_filter": False,  # it logs a NaN as 0
        "disable_tqdm": not sys.stderr.isatty(),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }
    if not torch.cuda.is_available():
        defaults["use_cpu"] = True
    if options.seed is not None:
        defaults["seed"] = options.seed
    fields = {f.name for f in dataclasses.fields(row.arguments_class())}
    if options.max_length is not None and "max_length" in fields:
        defaults["max_length"] = options.max_length
    return defaults


def _report(options: argparse.Namespace, plan_options: Mapping[str, Any], scored: bool) -> SnrReport:
    """The report that was given, else a scan; a mode that takes everything needs names and shapes, no scores."""
    if options.report:
        return SnrReport.load(options.report)
    criterion = plan_options.get("criterion", OPTIONS["criterion"])
    if criterion == "fisher":  # its scores come with the gradients
        criterion, scored = OPTIONS["criterion"], False
    if scored:
        print(f"no --report was given: scanning {options.model}")
    return scan_weights(
        options.model,
        criterion=criterion,
        score=("linear",) if scored else (),
        cache=True,
        revision=options.revision,
        seed=plan_options.get("seed", OPTIONS["seed"]),
    )


def _resume(value: str | None) -> str | bool | None:
    if value is None or value.lower() in {"false", "no"}:
        return None
    if value.lower() in {"true", "yes", "last"}:
        return True
    if not Path(value).is_dir():
        raise OptionError(f"resume_from_checkpoint is {value!r}, wanted a checkpoint folder or true.")
    return value


def describe_training(results: Mapping[str, Any]) -> str:
    """A few lines for the reader of the terminal."""
    trained, total = results["trainable_parameters"], results["total_parameters"]
    lines = [
        f"trained {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %) for {results['steps']} steps, "
        f"{results['seconds_per_step'] or 0:.3g} s a step, peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB"
    ]
    if results["before"]:
        for name, value in results["after"].items():
            if name not in {"tokens", "examples"}:
                lines.append(f"{name}: {results['before'][name]:.4f} -> {value:.4f}")
    return "\n".join(lines)


def peak_memory() -> int:
    """Highest resident memory of this process so far in bytes; on a CUDA device, the highest allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if (peak := peak_resident()) is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Let the peak begin again with what is held now (on a CUDA device, and on Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def _elements(parameter: torch.nn.Parameter) -> int:
    """Number of weights; a 4-bit parameter stores two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def _finite(value: Any) -> Any:
    """Infinity as the string `inf`, as in all JSON of ours."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


# --- probe -----------------------------------------------------------------------------------------------------------


def _what_is_there(options: argparse.Namespace) -> tuple[dict[str, Any] | None, Any, Task]:
    """What `options.model` is, before it is loaded.

    Returns:
        (fields of its adapter's config, None where it is no adapter; config of the model, where an adapter comes with one
        that one, for it has the labels of its head; the task).
    """
    folder = Path(options.model)
    adapter = read_mapping(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    described, name = options.model, options.task
    if adapter is not None:
        name = name or next((t.name for t in TASKS.values() if t.task_type == adapter.get("task_type")), None)
        if not (folder / "config.json").is_file():
            described = adapter["base_model_name_or_path"]
    config = _config_of(described, options)
    return adapter, config, _task(name or task_of(config, described))


def probe(options: argparse.Namespace) -> GradientReport:
    """What the verb `probe` does: load a model or a trained adapter, draw rows, measure its gradients on them."""
    quiet_progress()
    adapter, config, task = _what_is_there(options)
    dtype, why = _dtype_of(options)
    print(f"task {task.name}, {why}", file=sys.stderr)
    rows = read_dataset(options.dataset, options.dataset_split or "train")
    rows = select_columns(rows, task.name, options.dataset, _renamed(options))
    kwargs, labels = _remote(options), None
    if options.attn_implementation:
        kwargs["attn_implementation"] = options.attn_implementation
    if task.labelled:
        has_head = adapter is not None or has_classifier(config)
        labels = label_names(rows, config if has_head else None, options.dataset)
        kwargs["num_labels"] = len(labels)
    transformers.set_seed(options.seed)  # a new head is random
    model_class = getattr(transformers, task.auto_class)
    model, tokenizer = load_trained(
        options.model, dtype=dtype, quantization=options.quantization, model_class=model_class, **kwargs
    )
    if tokenizer is None:
        raise CheckpointError(f"{options.model}: has no tokenizer, which a probe on text needs.")
    given = {name: value for name in ("batch_size", "max_length") if (value := getattr(options, name)) is not None}
    samples = DEFAULT_SAMPLES if options.samples is None else options.samples
    batches = calibration_batches(rows, tokenizer, samples, options.seed, task=task.name, labels=labels, **given)
    directions = {} if options.directions is None else {"directions": options.directions}
    return probe_gradients(model, batches, seed=options.seed, svd_rank=options.svd_rank or 0, **directions)


# --- evaluate --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Saved:
    """What training has saved, or a base, opened to be judged.

    Attributes:
        config: of the checkpoint; for classification it names the labels.
        options, rest, flags: as `evaluate_saved` takes them.
    """

    model: Any
    tokenizer: Any
    task: Task
    config: Any
    options: argparse.Namespace
    rest: Rest
    flags: Sequence[str]

    def rows(self, source: str, split: str | None = None) -> datasets.Dataset:
        """Rows of a dataset with the task's standard columns."""
        rows = read_dataset(source, split or "train")
        return select_columns(rows, self.task.name, source, _renamed(self.options))

    def metrics(self, rows: datasets.Dataset) -> dict[str, float]:
        """The metrics of `tasks.evaluate`."""
        with tempfile.TemporaryDirectory() as scratch:
            options = argparse.Namespace(**{**vars(self.options), "output_dir": scratch, "seed": None})
            defaults = _defaults(options, self.task, 0.0, self.model.dtype)
            defaults |= {"bf16": False, "fp16": False, "gradient_checkpointing": False}
            args = trainer_arguments(self.task.name, self.rest, defaults, self.flags)
            trainer = build_trainer(
                self.task.name,
                model=self.model,
                tokenizer=self.tokenizer,
                args=args,
                train_dataset=rows,
                max_length=options.max_length,
            )
            return evaluate(self.task.name, trainer, trainer.train_dataset)


def open_saved(options: argparse.Namespace, rest: Rest, flags: Sequence[str] = ()) -> Saved:
    """Load `options.model`: a trained adapter on its base, a trained model, or a base.

    A quantized base alone gets an untrained adapter, which changes no value: the trainers take it only with one.
    """
    folder = Path(options.model)
    adapter, config, task = _what_is_there(options)
    stated = read_mapping(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    quantization = options.quantization or (stated.get("quantization") if adapter is not None else None)
    if options.dtype is None and stated.get("dtype") in _DTYPES:
        dtype, why = getattr(torch, stated["dtype"]), f"{stated['dtype']} as in training"
    else:
        dtype, why = _dtype_of(options)
    on = f", on a base in {quantization}" if quantization not in (None, "none") else ""
    print(f"task {task.name}, {why}{on}", file=sys.stderr)
    kwargs: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
    kwargs["model_class"] = getattr(transformers, task.auto_class)
    if task.labelled:
        kwargs |= {"num_labels": config.num_labels, "id2label": config.id2label, "label2id": config.label2id}
    kwargs |= _remote(options)
    if adapter is None and quantization not in (None, "none"):
        report = scan_weights(options.model, "last", revision=options.revision)
        untrained = SpectrumConfig(mode="lora", r=1, report=report, task_type=task.task_type)
        model, tokenizer = load_model_with_spectrum(options.model, untrained, **kwargs)
    else:
        model, tokenizer = load_trained(options.model, **kwargs)
    if tokenizer is None:
        raise CheckpointError(f"{options.model}: has no tokenizer, which evaluation on text needs.")
    return Saved(model, tokenizer, task, config, options, rest, flags)


def evaluate_saved(options: argparse.Namespace, rest: Rest, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Judge a trained adapter, a trained model or a base on a dataset.

    Returns:
        The metrics of `tasks.evaluate`, and of `generation.METRICS` those asked for, with `model`, `task` and `dataset`.
    """
    quiet_progress()
    for name in options.generate or ():
        generation.check_metric(name)
    saved = open_saved(options, rest, flags)
    rows = saved.rows(options.dataset, options.dataset_split)
    if saved.task.labelled:
        label_names(rows, saved.config, options.dataset)
    metrics = saved.metrics(rows)
    if options.generate:
        metrics |= generation.judge(
            saved.model, saved.tokenizer, rows, options.generate,
            max_new_tokens=options.max_new_tokens or generation.MAX_NEW_TOKENS, source=options.dataset,
        )  # fmt: skip
    return _finite({"model": options.model, "task": saved.task.name, "dataset": options.dataset, **metrics})
