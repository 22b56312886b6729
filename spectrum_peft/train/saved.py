"""Models and adapters that were saved, opened again: the verbs `evaluate` and `probe`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from ..arguments import Rest
from ..data import read_rows
from ..errors import CheckpointError, DataError, OptionError
from ..probe import DEFAULT_SAMPLES, calibration_batches, probe_gradients
from ..records import RESULTS_FILE, GradientReport, checked, finite_only, is_file, read_mapping
from ..records.schema import Name
from ..scan import scan_weights
from ..tuner.config import SpectrumConfig
from ..tuner.loading import load_model_with_spectrum, load_trained, read_adapter_config
from . import generation
from .arguments import (
    DTYPES,
    config_of,
    default_arguments,
    dtype_of,
    quiet_progress,
    remote_options,
    renamed_columns,
    trainer_arguments,
)
from .calibration import calibration_rows
from .encoding import encoded_rows
from .fitting import fitting
from .heads import has_head, head_of, keywords_of
from .settle import data_choices, rewards_of
from .tasks import TASKS, Task, build_trainer, evaluate, loaded_as, task_named, task_of, task_of_head

# --- probe -----------------------------------------------------------------------------------------------------------


def _what_is_there(options: argparse.Namespace) -> tuple[dict[str, Any] | None, Any, Task]:
    """What `options.model` is, before it is loaded.

    Returns:
        (fields of its adapter's config, None where it is no adapter; config of the model, where an adapter comes with one
        that one, for it has the labels of its head; the task).
    """
    folder = Path(options.model)
    config_file = folder / "adapter_config.json"
    adapter = read_adapter_config(config_file) if is_file(config_file) else None
    described, name = options.model, options.task
    if adapter is not None:
        if not (folder / "config.json").is_file():
            described = adapter.get("base_model_name_or_path")
            if not described:
                raise CheckpointError(f"{config_file}: base_model_name_or_path is empty, wanted the base.")
    config = config_of(described, options)
    return adapter, config, loaded_as(task_named(name or _task_there(folder, adapter, config, described)), config)


def _task_there(folder: Path, adapter: dict[str, Any] | None, config: Any, described: str) -> str:
    """The task that a head was trained for as its run wrote it down, else the one of PEFT's task type or of the architecture."""
    stated = TASKS.get(str(_stated(folder / RESULTS_FILE).get("task")))
    if stated is not None and stated.head is not None:
        return stated.name
    kind = adapter.get("task_type") if adapter is not None else None
    if kind == "SEQ_CLS":
        return task_of_head(config.to_dict())
    found = next((t.name for t in TASKS.values() if t.task_type == kind), None)
    return found or task_of(config, described)


def probe(options: argparse.Namespace) -> GradientReport:
    """What the verb `probe` does: load a model or a trained adapter, draw rows, measure its gradients on them."""
    quiet_progress()
    adapter, config, task = _what_is_there(options)
    dtype, why = dtype_of(options)
    print(f"task {task.name}, {why}", file=sys.stderr)
    rows = read_rows(options.dataset, options.dataset_split or "train", task.name, renamed_columns(options))
    kwargs, labels = remote_options(options), []
    if options.attn_implementation:
        kwargs["attn_implementation"] = options.attn_implementation
    if task.head is not None:
        known = adapter is not None or has_head(config, task.head)
        kwargs |= head_of(task.head, rows, config, options.dataset, options.model, known=known)
        labels = list(kwargs.get("label2id", ()))
    transformers.set_seed(options.seed)  # a new head is random
    model_class = getattr(transformers, task.auto_class)
    model, tokenizer = load_trained(
        options.model, dtype=dtype, quantization=options.quantization, model_class=model_class, **kwargs
    )
    if tokenizer is None:
        raise CheckpointError(f"{options.model}: has no tokenizer, which a probe on text needs.")
    choices = data_choices(options, None)
    rows, name = calibration_rows(task, rows, tokenizer, options.max_length, labels, choices)
    if name == "causal_lm":
        rows = encoded_rows(rows, tokenizer, choices)
    given = {name: value for name in ("batch_size", "max_length") if (value := getattr(options, name)) is not None}
    samples = DEFAULT_SAMPLES if options.samples is None else options.samples
    batches = calibration_batches(rows, tokenizer, samples, options.seed, task=name, labels=labels or None, **given)
    asked = {
        name: value for name in ("directions", "svd_rank", "columns") if (value := getattr(options, name)) is not None
    }
    with fitting(model):
        return probe_gradients(model, batches, seed=options.seed, **asked)


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
        return read_rows(source, split or "train", self.task.name, renamed_columns(self.options))

    def metrics(self, rows: datasets.Dataset) -> dict[str, float]:
        """The metrics of `tasks.evaluate`."""
        with self._trainer(rows) as trainer:
            return evaluate(self.task.name, trainer, trainer.train_dataset)

    def metrics_of_rows(self, rows: datasets.Dataset) -> list[dict[str, float]]:
        """The same of each row alone; of one without a token to predict, zeros.

        Of language modelling the rows are those that the trainer keeps: the same ones whatever the model is.
        """
        found = []
        with self._trainer(rows) as trainer:
            for i in range(len(trainer.train_dataset)):
                try:
                    found.append(evaluate(self.task.name, trainer, trainer.train_dataset.select([i])))
                except DataError:
                    found.append({"loss": 0.0, "perplexity": 1.0, "token_accuracy": 0.0, "tokens": 0})
        return found

    @contextlib.contextmanager
    def _trainer(self, rows: datasets.Dataset) -> Iterator[Any]:
        """A trainer that has prepared these rows."""
        with tempfile.TemporaryDirectory() as scratch:
            options = argparse.Namespace(**{**vars(self.options), "output_dir": scratch, "seed": None})
            defaults = default_arguments(options, self.task, 0.0, self.model.dtype)
            defaults |= {"bf16": False, "fp16": False, "gradient_checkpointing": False}
            args = trainer_arguments(self.task.name, self.rest, defaults, self.flags)
            yield build_trainer(
                self.task.name,
                model=self.model,
                tokenizer=self.tokenizer,
                args=args,
                train_dataset=rows,
                max_length=options.max_length,
                data=data_choices(options, args),
                rewards=rewards_of(options, self.task, rows),
            )


@dataclasses.dataclass(frozen=True)
class _Stated:
    """The fields of train_results.json that are read."""

    dtype: Name | None = None
    quantization: Name | None = None
    task: Name | None = None


def _stated(path: Path) -> dict[str, Any]:
    """What the training run wrote down, or nothing where there is no such file."""
    fields = read_mapping(path) if is_file(path) else {}
    checked(fields, _Stated, path)
    return fields


def open_saved(options: argparse.Namespace, rest: Rest, flags: Sequence[str] = ()) -> Saved:
    """Load `options.model`: a trained adapter on its base, a trained model, or a base.

    A quantized base alone gets an untrained adapter, which changes no value: the trainers take it only with one.
    """
    folder = Path(options.model)
    adapter, config, task = _what_is_there(options)
    stated = _stated(folder / RESULTS_FILE)
    quantization = options.quantization or (stated.get("quantization") if adapter is not None else None)
    if options.dtype is None and stated.get("dtype") in DTYPES:
        dtype, why = getattr(torch, stated["dtype"]), f"{stated['dtype']} as in training"
    else:
        dtype, why = dtype_of(options)
    on = f", on a base in {quantization}" if quantization not in (None, "none") else ""
    print(f"task {task.name}, {why}{on}", file=sys.stderr)
    kwargs: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
    kwargs["model_class"] = getattr(transformers, task.auto_class)
    if task.head is not None:
        kwargs |= keywords_of(task.head, config)
    kwargs |= remote_options(options)
    if adapter is None and quantization not in (None, "none"):
        report = scan_weights(options.model, "last", revision=options.revision, download=True)
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
    _, config, task = _what_is_there(options)
    if task.relative:
        raise OptionError(
            f"task is {task.name!r}, which is judged beside the model as it was before training: --eval-dataset of `train` "
            "does it. A saved model is judged as causal_lm."
        )
    rows = read_rows(options.dataset, options.dataset_split or "train", task.name, renamed_columns(options))
    if task.head is not None:
        head_of(task.head, rows, config, options.dataset, options.model, known=True)
    saved = open_saved(options, rest, flags)
    metrics = saved.metrics(rows)
    if options.generate:
        metrics |= generation.judge(
            saved.model, saved.tokenizer, rows, options.generate,
            max_new_tokens=options.max_new_tokens or generation.MAX_NEW_TOKENS, source=options.dataset,
            template=options.apply_chat_template is not False,
        )  # fmt: skip
    return finite_only({"model": options.model, "task": saved.task.name, "dataset": options.dataset, **metrics})
