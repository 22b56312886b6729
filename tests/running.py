"""What the tests of training share: a little text, trainers' arguments, readings of a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from spectrum_peft.plan import MODES

datasets.disable_progress_bars()

# Warnings of the libraries about each other; nothing that is done here could avoid them.
LIBRARIES = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # asked by peft of transformers
    "ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning",  # set and called by TRL, peft
)
IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))
QUIET = {
    "per_device_train_batch_size": 4, "max_steps": 2, "report_to": [], "logging_strategy": "no", "save_strategy": "no",
    "use_cpu": True, "disable_tqdm": True, "seed": 0, "learning_rate": 1e-3, "bf16": False,
}  # fmt: skip
ADAPTER_MODES = [name for name, mode in MODES.items() if not mode.plain_model]
QUANTIZABLE = [name for name, mode in MODES.items() if not mode.whole_model]


def options_of(mode: str, batches: list[dict[str, torch.Tensor]] | None = None) -> dict[str, Any]:
    """Options that fit a mode: half of the matrices where it chooses, and data where it needs some.

    Args:
        batches: of the model, with labels; None: tokens for a causal language model.
    """
    row = MODES[mode]
    options: dict[str, Any] = {"spectrum_ratio": 0.5} if row.selective else {}
    if row.needs_data:
        options["calibration_data"] = [{"input_ids": IDS, "labels": IDS}] if batches is None else batches
    if "similarity_threshold" in row.own_options:  # the blocks of a random model have little in common
        options |= {"spectrum_ratio": 1.0, "similarity_threshold": -1.0}
    if row.own_options & {"svd_rank", "n_columns"}:  # fused experts are no single matrices
        options["exclude_modules"] = ["experts.gate_up_proj", "experts.down_proj"]
    if "svd_rank" in row.own_options:  # small matrices
        options |= {"n_components": 32, "svd_rank": 64, "spectrum_ratio": 1.0}
    return options


def only_fast(params: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """Parameters of a test, those that are not in `fast` marked slow: the default run takes a sample."""
    fast = list(fast)
    marked = []
    for value in params:
        cells = value if isinstance(value, tuple) else (value,)
        marked.append(pytest.param(*cells, marks=[] if value in fast else [pytest.mark.slow]))
    return marked


def token_rows(count: int = 32, length: int = 10, seed: int = 0) -> Dataset:
    """Rows of random byte tokens, already labelled, for `Trainer`."""
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def text_rows(count: int = 32) -> Dataset:
    """Sentences, for TRL's trainers."""
    return Dataset.from_dict({"text": [f"{i} squared is {i * i}" for i in range(count)]})


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), **{**QUIET, **changes})


def trainer(
    model: Any, folder: Path | str, callbacks: list[Any], rows: Dataset | None = None, **changes: Any
) -> Trainer:
    """transformers' Trainer on token rows."""
    rows = token_rows() if rows is None else rows
    own = ("optimizers", "optimizer_cls_and_kwargs", "eval_dataset")
    extra = {key: changes.pop(key) for key in own if key in changes}
    return Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows, callbacks=callbacks, **extra)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """In eval mode, without a gradient; the training flag is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        result = model(input_ids=ids).logits
    model.train(training)
    return result


def values(model: Any, *, trainable: bool | None = None) -> dict[str, torch.Tensor]:
    """{name: copy of the value}; of all parameters, or of those that do or do not train."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if trainable is None or p.requires_grad == trainable
    }


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and every bit; NaN equals NaN here, and 0.0 does not equal -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same names, each with the same bytes."""
    alone = sorted(set(a) ^ set(b))
    differing = [name for name in a if name in b and not same_bytes(a[name], b[name])]
    if alone or differing:
        raise AssertionError(f"{len(alone)} names in one only: {alone[:3]}; {len(differing)} differ: {differing[:3]}")
