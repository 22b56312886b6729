"""Heads: how many outputs a task needs, what they are called, and which loss transformers computes on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..data import label_ids, label_names
from ..errors import DataError, OptionError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

# Kind of head -> the loss as `problem_type` of a config names it; None: the class of the model has one loss only.
PROBLEMS: dict[str, str | None] = {
    "classes": "single_label_classification",
    "several": "multi_label_classification",
    "number": "regression",
    "tokens": None,
    "reward": None,
}
ONE_OUTPUT = ("number", "reward")
_COLUMN = {"classes": "label", "several": "label", "tokens": "tags"}


def has_head(config: PretrainedConfig, head: str | None) -> bool:
    """Whether the checkpoint comes with a head of this kind; without one a new one is drawn at random."""
    ending = "ForTokenClassification" if head == "tokens" else "ForSequenceClassification"
    return any(name.endswith(ending) for name in config.architectures or ())


def head_of(
    head: str, rows: Dataset, config: PretrainedConfig, source: str, model: str, *, known: bool | None = None
) -> dict[str, Any]:
    """Keywords of the loader that size and name a head for rows.

    Args:
        head: key of `PROBLEMS`. config: of the checkpoint. source, model: for errors.
        known: the config is that of a head that was trained; None: where its architecture says so.
    Raises:
        DataError: labels that do not fit the checkpoint's head. OptionError: its head has several outputs and one is wanted.
    """
    known = has_head(config, head) if known is None else known
    keywords: dict[str, Any] = {}
    if head in ONE_OUTPUT:
        if known and config.num_labels != 1:
            what = "a reward" if head == "reward" else "a number"
            raise OptionError(f"{model}: its head has {config.num_labels} outputs, and {what} is one.")
        keywords["num_labels"] = 1
    else:
        labels = label_names(rows, config if known else None, source, _COLUMN[head])
        keywords["num_labels"] = len(labels)
        keywords["id2label"] = dict(enumerate(labels))
        keywords["label2id"] = {name: i for i, name in enumerate(labels)}
    return keywords | problem_of(head, config)


def with_head(config: PretrainedConfig, head: Mapping[str, Any]) -> PretrainedConfig:
    """The config of the model as the loader makes it.

    Args:
        config: of the checkpoint. head: keywords as of `head_of`; empty for a task without a head.
    """
    if not head:
        return config
    config = copy.deepcopy(config)
    for name, value in head.items():
        setattr(config, name, value)
    if config.pad_token_id is None:  # the trainer takes the tokenizer's
        config.pad_token_id = 0
    return config


def problem_of(head: str, config: PretrainedConfig) -> dict[str, Any]:
    """The loss that the config has to name, where transformers would take another for this head."""
    problem, own = PROBLEMS[head], getattr(config, "problem_type", None)
    usual = head == "classes" and own is None  # transformers sees it from the labels' dtype
    return {} if problem is None or usual or own == problem else {"problem_type": problem}


def keywords_of(head: str, config: PretrainedConfig) -> dict[str, Any]:
    """Keywords of the loader for a head that was trained, as its config has it."""
    named = {} if head in ONE_OUTPUT else {"id2label": config.id2label, "label2id": config.label2id}
    return {"num_labels": config.num_labels, **named, **problem_of(head, config)}


def labels_of(config: PretrainedConfig) -> list[str]:
    """Names of the labels in the order of their ids."""
    return [config.id2label[i] for i in range(config.num_labels)]


def check_labels(head: str, rows: Dataset, labels: list[str], source: str) -> None:
    """
    Raises:
        DataError: rows hold a label that is none of `labels`.
    """
    if head in _COLUMN:
        try:
            label_ids(rows, labels, _COLUMN[head])
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
