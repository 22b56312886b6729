"""The trainer's own arguments from flags and config files, with this project's defaults."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import TrainingArguments
from trl import TrlParser

from ..arguments import Parser, Rest, checked_value, flags_of, reworded, set_defaults_from
from ..data import COLUMNS
from ..devices import default_device, fast_dtype
from ..errors import CheckpointError, OptionError, near_here, near_matches, one_line, quoted
from ..records import is_file, mode_of
from ..records.schema import Wanted
from ..tuner.classes import check_config
from .tasks import TASKS, Task, task_named, task_of

DTYPES = ("float32", "bfloat16", "float16")


# --- the trainer's own arguments -------------------------------------------------------------------------------------


class _TrainerParser(TrlParser):
    """TRL's parser of dataclasses; it raises instead of printing its usage."""

    def error(self, message: str) -> Any:
        raise OptionError(reworded(message))


def _trainer_parser(task: str) -> _TrainerParser:
    return _TrainerParser([task_named(task).arguments_class()], allow_abbrev=False, prog="spectrum-peft train")


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
    parser.set_defaults(**defaults)
    for key, value in (rest.config or {}).items():
        parser.set_defaults(**{key: _key_value(parser, key, value, rest.source, known)})
    try:
        args, unknown = parser.parse_args_into_dataclasses(
            list(rest.argv), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"training arguments: {_refusal(error)}") from error
    if unknown:
        flags = [*known, *(flag for action in parser._actions for flag in action.option_strings)]
        dashes = [flag for flag in flags if "_" not in flag]  # each flag has a form with underscores too
        raise OptionError(f"unknown argument {unknown[0]!r}." + near_matches(unknown[0], dashes))
    _check_ranges(args)
    if args.include_num_input_tokens_seen == "all" and not _without_padding(args):
        args.include_num_input_tokens_seen = "non_padding"  # as TRL's own count, `num_tokens`
    return args


def _without_padding(args: Any) -> bool:
    """Whether TRL's trainer puts rows behind each other in one long row, without padding; there is no
    mask then, so that ends of texts would be taken for it."""
    packed = getattr(args, "packing", False) and str(args.packing_strategy).startswith("bfd")
    return bool(packed or getattr(args, "padding_free", False))


def _key_value(parser: _TrainerParser, key: str, value: Any, source: str, known: Sequence[str]) -> Any:
    """
    Raises:
        OptionError: a key that the arguments do not have, or a value that is none for it.
    """
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.dest != "help":
            actions.setdefault(action.dest, action)  # a switch that is on by default has a second action, `--no-...`
    if key not in actions:
        choices = [*actions, *(flag.removeprefix("--").replace("-", "_") for flag in known)]
        raise OptionError(f"{source}: unknown key {key!r}." + near_matches(key, choices))
    (arguments_class,) = parser.dataclass_types
    hint = typing.get_type_hints(arguments_class)[key]
    if value is None and type(None) not in typing.get_args(hint):  # an empty key is one that was not given
        return parser.get_default(key)
    if isinstance(value, dict | list) and type(value).__name__ in str(hint):
        _check_collection(f"{source}: {key}", value, hint)
        return value
    return checked_value(actions[key], key, value, source)


def keys_refused(task: str, config: Mapping[str, Any], known: argparse.ArgumentParser, source: str) -> dict[str, str]:
    """What `train` would refuse of a config file, each key by itself: {key: why}.

    Args:
        known: the parser of the verb.
        source: name of the file.
    """
    trainer, refused = _trainer_parser(task), {}
    for key, value in config.items():
        try:
            if set_defaults_from(known, source, {key: value}):
                _key_value(trainer, key, value, source, flags_of(known))
        except OptionError as error:
            refused[key] = str(error).removeprefix(f"{source}: ")
    return refused


_AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_generations",
    "max_completion_length", "num_iterations",
)  # fmt: skip
_FINITE = ("num_train_epochs", "weight_decay", "max_grad_norm", "adam_epsilon", "label_smoothing_factor", "beta")


def _check_ranges(args: TrainingArguments) -> None:
    """What transformers and TRL take as it is and stumble over later, a division by zero or a run without steps.

    Raises:
        OptionError: names the flag.
    """
    for name in _AT_LEAST_ONE:
        value = getattr(args, name, None)
        if isinstance(value, int) and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} is {value}, wanted at least 1.")
    for name in _FINITE:
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise OptionError(f"--{name.replace('_', '-')} is {value:g}, wanted a number of at least 0.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs == 0):
        raise OptionError(
            f"--max-steps is {args.max_steps} and --num-train-epochs {args.num_train_epochs:g}: nothing to train."
        )


_NO_NAME = re.compile(r"(?P<value>'[^']*'|\S+) is not a valid (?P<what>\w+), please select one of \[(?P<choices>.*)\]")
_NO_PACKAGE = re.compile(r"No package metadata was found for The '(?P<name>[\w-]+)")


def _refusal(error: BaseException) -> str:
    """What transformers says of a value or a package that is not there, with near matches and the way to install it."""
    text = one_line(error)
    if match := _NO_NAME.search(text):
        value = match["value"].strip("'")
        return f"{value!r} is no {match['what']}." + near_matches(value, re.findall(r"'([^']*)'", match["choices"]))
    if match := _NO_PACKAGE.search(text):
        return f"the package {match['name']} is not installed: pip install {match['name']}."
    return text


_MOST_UNKNOWN = 4


def unknown_names(task: str | None, rest: Rest, known: Sequence[str] = ()) -> list[str]:
    """A sentence for each key and flag that no trainer's arguments have.

    Args:
        task: None for all of them, where it is not known yet.
        known: flags of the verb itself, for near matches.
    """
    rows = [task_named(task)] if task else TASKS.values()
    fields = {f.name for row in rows for f in dataclasses.fields(row.arguments_class())}
    keys = [*fields, *(flag.removeprefix("--").replace("-", "_") for flag in known)]
    said = [
        f"{rest.source}: unknown key {key!r}.{near_matches(key, keys)}"
        for key in rest.config or {}
        if key not in fields
    ]
    for token in rest.argv:
        name = token[2:].partition("=")[0].replace("-", "_")
        if token.startswith("--") and name.removeprefix("no_") not in fields and name not in fields:
            flags = [*known, *(f"--{key.replace('_', '-')}" for key in fields)]
            said.append(f"Unknown argument {token!r}.{near_matches(token, flags)}")
    rest_of_them = [f"{len(said) - _MOST_UNKNOWN} more are unknown."] if len(said) > _MOST_UNKNOWN else []
    return said[:_MOST_UNKNOWN] + rest_of_them


def _check_collection(where: str, value: Any, hint: Any) -> None:
    """
    Raises:
        OptionError: a list or a mapping that the argument's own annotation does not allow.
    """
    # Some annotations (a text or an enumeration, two kinds of lists) are none that msgspec can check.
    with contextlib.suppress(TypeError):
        Wanted(hint, str(hint).replace("typing.", ""))(where, value)


def take_auto_rate(rest: Rest) -> tuple[Rest, bool]:
    """Take `learning_rate: auto` off the trainer's arguments, where it says a number; the command line wins over the file.

    Returns:
        The rest, and whether the rate is to be raced for.
    Raises:
        OptionError: the rate is another word.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--learning-rate", "--learning_rate")
    found, others = finder.parse_known_args(list(rest.argv))
    config = dict(rest.config or {})
    given = found.learning_rate if found.learning_rate is not None else config.get("learning_rate")
    if isinstance(given, str) and given != "auto":
        try:
            float(given)
        except ValueError:
            where = "--learning-rate" if found.learning_rate is not None else f"{rest.source}: learning_rate"
            raise OptionError(f"{where} is {quoted(given)}, wanted a number, or auto.") from None
    if config.get("learning_rate") == "auto":
        del config["learning_rate"]
    number = [] if found.learning_rate in (None, "auto") else ["--learning-rate", found.learning_rate]
    return dataclasses.replace(rest, argv=(*others, *number), config=config), given == "auto"


def given_fields(rest: Rest) -> set[str]:
    """Names of the trainer's arguments that the user set."""
    flags = (token[2:].partition("=")[0].replace("-", "_") for token in rest.argv if token.startswith("--"))
    return {*flags, *(rest.config or {})}


def quiet_progress() -> None:
    """No progress bars in a file or a pipe."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def renamed_columns(options: argparse.Namespace) -> dict[str, str]:
    """{standard column: name in the dataset} of the `--...-column` flags that were given."""
    return {name: value for name in COLUMNS if (value := getattr(options, f"{name}_column")) is not None}


# --- what a checkpoint is --------------------------------------------------------------------------------------------


def config_of(model: str, options: argparse.Namespace) -> Any:
    """transformers' config of a folder or hub id.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if model.endswith(".gguf"):
        raise CheckpointError(
            f"{model}: a .gguf can be scanned, not trained. Convert it to a folder of safetensors first: load it with "
            "transformers (from_pretrained(folder, gguf_file=name)) and save the weights."
        )
    check_config(model)
    there = mode_of(model) != 0
    if there and not is_file(Path(model) / "config.json"):
        raise CheckpointError(f"{model}: no config.json there, so it is not a checkpoint folder.")
    try:
        return transformers.AutoConfig.from_pretrained(
            model, revision=options.revision, trust_remote_code=bool(options.trust_remote_code)
        )
    except Exception as error:  # each config class has its own errors for fields of wrong types
        if there:
            raise CheckpointError(f"{model}: cannot be loaded as a model ({_first_line(error)})") from error
        raise CheckpointError(
            f"{model}: no such folder, and not loadable from the hub ({_first_line(error)}){near_here(model)}"
        ) from error


def dtype_of(options: argparse.Namespace) -> tuple[torch.dtype, str]:
    """The dtype to load in, and one line that says why."""
    device = default_device().type
    if options.dtype in (None, "auto"):
        dtype = fast_dtype()
        why = "multiplies bfloat16 fast" if dtype == torch.bfloat16 else "does not multiply bfloat16 fast"
        return dtype, f"{str(dtype).removeprefix('torch.')} on {device}, which {why} (--dtype to change)"
    if options.dtype not in DTYPES:
        raise OptionError(f"dtype is {options.dtype!r}." + near_matches(options.dtype, (*DTYPES, "auto")))
    return getattr(torch, options.dtype), f"{options.dtype} on {device}"


def remote_options(options: argparse.Namespace) -> dict[str, Any]:
    """Which version of a hub model to load, and whether to run its code, as `from_pretrained` wants it."""
    return {name: value for name in ("revision", "trust_remote_code") if (value := getattr(options, name))}


def _first_line(error: BaseException) -> str:
    """The first line of what a library says; the next one, too, where it ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def task_for(options: argparse.Namespace) -> str:
    """The task that was named, else the one that the checkpoint's architecture says."""
    return task_named(options.task or task_of(config_of(options.model, options), options.model)).name


def default_arguments(options: argparse.Namespace, row: Task, rate: float, dtype: torch.dtype) -> dict[str, Any]:
    """Defaults of the training arguments: the mode's rate, and mixed precision only in the dtype that was loaded."""
    defaults: dict[str, Any] = {
        "output_dir": options.output_dir,
        "learning_rate": rate,
        "include_num_input_tokens_seen": not row.rewarded,  # a trainer that writes its own inputs has nothing to count before
        "logging_nan_inf_filter": False,  # it logs a NaN as 0
        "disable_tqdm": not sys.stderr.isatty(),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }
    if default_device().type == "cpu":
        defaults["use_cpu"] = True
    if options.seed is not None:
        defaults["seed"] = options.seed
    fields = {f.name for f in dataclasses.fields(row.arguments_class())}
    if options.max_length is not None and "max_length" in fields:
        defaults["max_length"] = options.max_length
    return defaults
