"""How many optimizer steps a run will have."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..errors import DataError
from .preview import encoded_run
from .settle import Run
from .tasks import examples_of


def steps_of(run: Run, options: argparse.Namespace, rows: int) -> int:
    """Optimizer steps of the run, as transformers 5.24 counts them in `Trainer.set_initial_training_values`, and TRL 1.16 for
    tasks that are rewarded (`GRPOTrainer._get_train_sampler`: each prompt is there once for each of its completions).

    Args:
        rows: that are left to train on.
    Raises:
        DataError: they make no batch.
    """
    args: Any = run.args
    if args.max_steps > 0:
        return int(args.max_steps)
    batch = args.per_device_train_batch_size * max(1, args.n_gpu)
    if run.task.rewarded:
        at_once = args.generation_batch_size // args.num_generations
        prompts = rows // at_once * at_once
        batches = prompts * args.num_generations * args.num_iterations // (batch * args.world_size)
    else:
        sequences = _sequences(run, options, rows)
        round_ = math.floor if args.dataloader_drop_last else math.ceil
        batches = round_(sequences / (batch * args.world_size))
    if not batches:
        raise DataError(f"{options.dataset}: {rows} rows make no batch of {batch} on each of {args.world_size}.")
    updates = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * updates)


def _sequences(run: Run, options: argparse.Namespace, rows: int) -> int:
    """Rows of the trainer: packed ones, or each answer of a pair where they are judged one by one."""
    args: Any = run.args
    if getattr(args, "packing", False):
        from trl import pack_dataset

        done = "input_ids" in run.train_rows.column_names
        encoded = run.train_rows if done else encoded_run(run, options).train_rows
        packed = pack_dataset(encoded.select_columns(["input_ids", "labels"]), args.max_length, args.packing_strategy)
        return len(packed)
    return rows * examples_of(run.task, run.train_rows)
