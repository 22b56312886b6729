"""Everything about a run that can be known before the model is loaded, checked."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
import transformers
from transformers import TrainingArguments

from ..arguments import LORA_FIELDS, Rest
from ..data import check_loss_on, read_rows
from ..errors import OptionError, near_matches
from ..plan import LORA_RANK, MODES, Mode, check_options, checked_plan, get_mode, rank_of, ratio_of
from ..records import EXPORTED, Plan, read_mapping
from ..tuner.classes import refuse_class
from ..tuner.loading import QUANTIZATIONS, check_quantizable, checked_peft_config
from ..tuner.stored_bases import loading_of
from .arguments import (
    config_of,
    default_arguments,
    dtype_of,
    given_fields,
    renamed_columns,
    take_auto_rate,
    trainer_arguments,
)
from .callback import slower_by
from .checkpoints import checkpoint_to_resume, refuse_other_sharing
from .encoding import DataChoices
from .heads import check_labels, has_head, head_of, with_head
from .needs import check_needs
from .processes import asked_for, check_fsdp_version, check_launch
from .rate_race import check_can_race
from .rewards import FLAG, reward_functions
from .tasks import Task, loaded_as, task_named, task_of


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run is, settled before a weight is read.

    Attributes:
        name: of the mode, or of the method of PEFT's own.
        mode: row of the table; None for a method of PEFT's own.
        peft: fields of a PEFT config, `peft_type` among them; None for our modes.
        why: one line on the dtype.
        train_rows, eval_rows: with the task's standard columns; no evaluation rows where no set was named.
        head: keywords of the loader that size and name a head; none where the task has none.
        new_head: the checkpoint has none, so that it begins at random.
        config: of the model as it is loaded: the checkpoint's, with that head.
        data: what of the rows is shown and learnt.
        rewards: functions and folders of models that judge what is written, for tasks that take them.
        race: `learning_rate: auto`: the rate is found before the first step.
        rate_given: the user set the learning rate.
    """

    name: str
    mode: Mode | None
    peft: dict[str, Any] | None
    plan: Plan | None
    task: Task
    dtype: torch.dtype
    why: str
    args: TrainingArguments
    resume: str | None
    train_rows: datasets.Dataset
    eval_rows: datasets.Dataset | None
    head: dict[str, Any]
    new_head: bool
    config: Any
    data: DataChoices
    rewards: tuple[Any, ...] = ()
    race: bool = False
    rate_given: bool = False
    r: int = LORA_RANK
    ratio: float = 1.0


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
    check_launch()
    plan = checked_plan(_plan_named(options, plan_options), options.plan) if options.plan else None
    own = _peft_fields(options, plan_options) if options.peft_config else None
    checked = check_options(**plan_options)
    mode = None if own else get_mode(plan.mode if plan else checked["mode"])
    name = own["peft_type"] if own else mode.name
    _check_export(vars(options).get("export"), mode, own, options.quantization)
    config = config_of(options.model, options)
    task = loaded_as(task_named(options.task or task_of(config, options.model)), config)
    if options.quantization not in (None, "none", *QUANTIZATIONS):
        raise OptionError(
            f"quantization is {options.quantization!r}." + near_matches(options.quantization, QUANTIZATIONS)
        )
    if mode is not None and options.quantization not in (None, "none"):
        check_quantizable(mode)
    dtype, why = dtype_of(options)
    chosen = plan.options if plan else checked
    r, ratio = rank_of(own or chosen), 1.0 if task.head else ratio_of(chosen, 1.0)
    rate = (mode or MODES["lora"]).default_lr / slower_by(task.arguments_class())  # `settle_rate` knows the steps
    rest, race = take_auto_rate(rest)
    args = trainer_arguments(task.name, rest, default_arguments(options, task, rate, dtype), flags)
    check_fsdp_version(args)
    if not 0 <= args.learning_rate < math.inf:
        raise OptionError(f"learning_rate is {args.learning_rate:g}, wanted a rate of at least 0.")
    if options.max_length is not None and options.max_length < 1:
        raise OptionError(f"max_length is {options.max_length}, wanted a whole number of at least 1.")
    if options.lora_dropout is not None and not 0 <= options.lora_dropout < 1:
        raise OptionError(f"lora_dropout is {options.lora_dropout:g}, wanted a share in [0, 1).")
    if options.stop_at_step is not None and options.stop_at_step < 1:
        raise OptionError(f"stop_at_step is {options.stop_at_step}, wanted at least 1.")
    if plan is not None:
        _refuse_other_options(plan, plan_options, options.plan)
    resume = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    refuse_other_sharing(resume, asked_for(args))
    eval_source = options.eval_dataset or (options.dataset if options.eval_split else None)
    if args.eval_strategy != "no" and eval_source is None:
        raise OptionError(
            f"eval_strategy is {args.eval_strategy.value!r}, but there is no --eval-dataset or --eval-split."
        )
    if own and own["peft_type"] == "ADALORA" and own.setdefault("total_step", args.max_steps) <= 0:
        raise OptionError(f"{options.peft_config}: AdaLoRA needs total_step; give it, or --max-steps.")
    if own:
        checked_peft_config(own)
    revision = {"revision": options.revision} if options.revision else {}
    refuse_class(options.model, config, getattr(transformers, task.auto_class), **revision)
    loading_of(config, options.model, None if options.quantization == "none" else options.quantization)
    check_needs(args, options, config, task.auto_class)

    train_rows, eval_rows = rows or _read_rows(options, task.name, args)
    data = data_choices(options, args)
    if data.loss_on in ("assistant", "completion") and "text" in train_rows.column_names:
        raise OptionError(f"--loss-on is {data.loss_on!r}, and {options.dataset} holds text, which has no turns.")
    head: dict[str, Any] = {}
    if task.head is not None:
        head = head_of(task.head, train_rows, config, options.dataset, options.model)
        if eval_rows is not None:
            check_labels(task.head, eval_rows, list(head.get("label2id", ())), eval_source)
    new_head = bool(head) and not has_head(config, task.head)
    if race and resume is None:
        check_can_race(task.trainer_class(), args)
    rewards = rewards_of(options, task, train_rows)
    return Run(
        name,
        mode,
        own,
        plan,
        task,
        dtype,
        why,
        args,
        resume,
        train_rows,
        eval_rows,
        head,
        new_head,
        with_head(config, head),
        data,
        rewards,
        race,
        "learning_rate" in given_fields(rest),
        r,
        ratio,
    )


def _check_export(
    wanted: str | None, mode: Mode | None, own: Mapping[str, Any] | None, quantization: str | None
) -> None:
    """
    Raises:
        OptionError: the run will have no result of the form that `--export` asks for.
    """
    if wanted is None:
        return
    if wanted not in EXPORTED:
        raise OptionError(f"--export is {wanted!r}." + near_matches(wanted, EXPORTED))
    if own is not None and own["peft_type"] != "LORA":
        raise OptionError(
            f"--export {wanted}: the result of PEFT's {own['peft_type']} is no product of two factors; leave it out."
        )
    if mode is None or mode.action != "train":
        return
    if wanted == "lora":
        raise OptionError(f"--export lora: mode {mode.name!r} trains real weights, of which there is no LoRA.")
    if quantization in (None, "none"):
        raise OptionError(f"--export merged: mode {mode.name!r} writes a plain checkpoint already; leave it out.")


def rewards_of(options: argparse.Namespace, task: Task, rows: datasets.Dataset) -> tuple[Any, ...]:
    """
    Raises:
        OptionError: a task that takes reward functions has none, or another has some; what `reward_functions` refuses.
    """
    given = options.reward_function
    if not task.rewarded:
        if given:
            raise OptionError(f"{FLAG} is for task 'grpo', and the task is {task.name!r}.")
        return ()
    if not given:
        raise OptionError(f"{FLAG} is missing: task {task.name!r} learns from what it returns (file.py:function).")
    return tuple(reward_functions(given, strings=isinstance(rows[0]["prompt"], str)))


def data_choices(options: argparse.Namespace, args: Any) -> DataChoices:
    """What is learnt, by `--loss-on` or by TRL's own two flags for the same, which are taken off its arguments."""
    loss_on = check_loss_on(options.loss_on)
    if getattr(args, "assistant_only_loss", False):
        loss_on, args.assistant_only_loss = loss_on or "assistant", False
    if getattr(args, "completion_only_loss", None) is not None:
        loss_on = loss_on or ("completion" if args.completion_only_loss else "all")
        args.completion_only_loss = None
    return DataChoices(loss_on, options.apply_chat_template is not False)


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


def _plan_named(options: argparse.Namespace, plan_options: Mapping[str, Any]) -> Plan:
    """The plan of `--plan`; of a repository that has several, the one of the mode and the criterion that are given."""
    wanted = {name: plan_options.get(name) for name in ("mode", "criterion")}
    return Plan.named(options.plan, model_id=options.model, **wanted)


def _read_rows(options: argparse.Namespace, task: str, args: TrainingArguments) -> Rows:
    renamed = renamed_columns(options)
    if getattr(args, "dataset_text_field", "text") != "text":  # TRL's name for the same wish
        renamed.setdefault("text", args.dataset_text_field)
        args.dataset_text_field = "text"
    train_rows = read_rows(options.dataset, options.dataset_split or "train", task, renamed, args.seed)
    source = options.eval_dataset or (options.dataset if options.eval_split else None)
    if source is None:
        return train_rows, None
    return train_rows, read_rows(source, options.eval_split or "train", task, renamed, args.seed)


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
