"""What can be asked of a tune: its keys, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compare.settings import HEADED, METRICS, TEXT, Metric
from ..errors import OptionError, near_matches, quoted
from ..memory import parse_bytes
from ..records.schema import number_within

# What `tune` reads itself; every other key goes to the verb `train` and to the trainer's own arguments.
KEYS: dict[str, str] = {
    "memory": "of the device, say 24GiB; default: what is free of it now",
    "hours": "of work, over all processes; default: no limit",
    "metric": "loss, accuracy, macro_f1, exact_match, rouge_l, ..., or your own module:function; default as in compare",
    "better": "of your own function: higher or lower; default higher",
    "batch_size": "rows of an optimizer step; micro-batches are found by the memory; default 8",
    "contestants": "names of those that are there by default, or mappings as in compare; default: all that fit",
    "learning_rates": "the grid for all; default: four rates for each contestant, about the default of its mode",
    "finalists": "contestants that run at full length, beside plain LoRA and a random choice; default 3",
    "seeds": "of the finals; default 0, 1, 2",
    "race_seed": "of every run of the race; default 1000",
    "search_rows": "training rows that the search judges by; default a tenth, at most 200",
    "error": "chance, over the whole race, that the best is stopped by a test; default 0.05",
    "storage": "URL of a database that several processes share; default a file in the output folder",
    "max_new_tokens": "of a completion; default 256",
}
_SEED = number_within(-1, at_most=2**32 - 1, whole=True)
# Keys of `train` that a tune finds, or that would make its runs other than they are priced.
_FOUND = {
    "mode": "contestants", "spectrum_ratio": "contestants", "ratio": "contestants", "criterion": "contestants",
    "r": "contestants", "lora_alpha": "contestants", "plan": "contestants", "report": None, "peft_config": "contestants",
    "learning_rate": "learning_rates", "seed": "seeds", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size", "gradient_checkpointing": None, "resume_from_checkpoint": None, "force": None,
    "stop_at_step": None, "output_dir": None, "overwrite_output_dir": None, "eval_strategy": None, "save_strategy": None,
}  # fmt: skip
FEWEST_ROWS = 16  # that a set must have to be judged by: below, a paired test tells nothing
MOST_SEARCH_ROWS = 200
RACE_SEED = 1000  # of every run of the race, where none is given; none of them is one of the finals


@dataclass(frozen=True)
class Asked:
    """A tune, checked.

    Attributes:
        train: keys for `train` that all runs share.
        values: of `KEYS`, defaults filled in; `memory` in bytes or None, `hours` or None.
        task: of the checkpoint.
        higher: larger values of the metric are better.
        source: the config file, the command line or the function, for messages.
    """

    train: Mapping[str, Any]
    values: Mapping[str, Any]
    task: str
    higher: bool
    output: Path
    source: str

    @property
    def metric(self) -> str:
        return str(self.values["metric"])


def read_tune(given: Mapping[str, Any], *, train: Mapping[str, Any], task: str, output: Path, source: str) -> Asked:
    """Check what was asked for.

    Args:
        given: values of `KEYS` that were given.
        train, task, output, source: see `Asked`.
    Raises:
        OptionError: an unknown name, a value outside its range, a metric that the task has not, a key that the tune finds.
    """
    for key in given:
        if key not in KEYS:
            raise OptionError(f"{source}: unknown key {key!r}." + near_matches(key, KEYS))
    for key, instead in _FOUND.items():
        if train.get(key) is not None and (key, train[key]) != ("report", "auto"):
            hint = f"use {instead}" if instead else "leave it out" + (", or say auto" if key == "report" else "")
            raise OptionError(f"{source}: {key} is one run's, and tune makes many: {hint}.")
    values: dict[str, Any] = {
        "memory": None, "hours": None, "metric": HEADED.get(task, "loss"), "better": None,
        "batch_size": 8, "contestants": None, "learning_rates": None, "finalists": 3, "seeds": [0, 1, 2], "search_rows": None,
        "race_seed": RACE_SEED,
        "error": 0.05, "storage": None, "max_new_tokens": 256,
    }  # fmt: skip
    values |= {key: value for key, value in given.items() if value is not None}
    checks: dict[str, Callable[[str, Any], Any]] = {
        "memory": lambda n, v: None if v is None else parse_bytes(v, n),
        "hours": lambda n, v: None if v is None else number_within(0)(n, v),
        "batch_size": number_within(0, whole=True),
        "learning_rates": lambda n, v: None if v is None else _several(n, v, number_within(0)),
        "finalists": number_within(0, whole=True),
        "seeds": lambda n, v: _several(n, v, _SEED),
        "race_seed": _SEED,
        "search_rows": lambda n, v: None if v is None else number_within(FEWEST_ROWS - 1, whole=True)(n, v),
        "error": number_within(0, 0.5),
        "max_new_tokens": number_within(0, whole=True),
    }
    for name, check in checks.items():
        values[name] = check(f"{source}: {name}", values[name])
    if len(values["seeds"]) < 3:
        raise OptionError(
            f"{source}: seeds are {values['seeds']}, wanted at least three: fewer have no interval to speak of."
        )
    if values["race_seed"] in values["seeds"]:
        raise OptionError(f"{source}: seeds hold {values['race_seed']}, which is race_seed; wanted others.")
    return Asked(dict(train), values, task, _direction(values, task, source), output, source)


def _several(name: str, value: Any, check: Callable[[str, Any], Any]) -> list[Any]:
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    checked = [check(name, item) for item in items]
    if not checked or len(set(checked)) < len(checked):
        raise OptionError(f"{name} is {value!r}, wanted values that differ, at least one.")
    return checked


_OWN = "module:function"


def _direction(values: Mapping[str, Any], task: str, source: str) -> bool:
    """Whether larger is better; a user's function becomes known to the tables.

    Raises:
        OptionError: the task has no such metric.
    """
    metric, better = values["metric"], values["better"]
    if not isinstance(metric, str):
        raise OptionError(f"{source}: metric is {quoted(metric)}, wanted a name.")
    if better not in (None, "higher", "lower"):
        raise OptionError(f"{source}: better is {better!r}, wanted higher or lower.")
    if ":" in metric:
        from ..compare.scores import user_metric

        user_metric(metric)
        METRICS[metric] = Metric(metric.rpartition(":")[2], better != "lower", None)
        return better != "lower"
    if task not in TEXT and task not in HEADED:
        raise OptionError(f"{source}: task is {task!r}, and tune judges {', '.join(sorted({*TEXT, *HEADED}))} only.")
    known = [
        name
        for name, m in METRICS.items()
        if ":" not in name and (task in TEXT if m.tasks is None else task in m.tasks)
    ]
    if metric not in known:
        if metric in METRICS:
            raise OptionError(
                f"{source}: metric is {metric!r}, which the task {task!r} has not. Known: {', '.join([*known, _OWN])}."
            )
        raise OptionError(f"{source}: metric is {metric!r}." + near_matches(metric, [*known, _OWN]))
    if better is not None and (better == "higher") != METRICS[metric].higher:
        raise OptionError(
            f"{source}: better is {better!r}, which is for a function of your own; {metric} has a direction."
        )
    return METRICS[metric].higher


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
