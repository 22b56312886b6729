"""How good a model is on batches: loss, perplexity, accuracy, and what goes with each kind of head."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..data import IGNORED
from ..errors import DataError, InstallError
from .fitting import fitting


def require_scikit_learn() -> None:
    """Raise an InstallError with the install line unless scikit-learn can be imported."""
    if importlib.util.find_spec("sklearn") is None:
        raise InstallError("macro-F1 needs scikit-learn: pip install 'spectrum-peft[eval]'.")


def classification_scores(predictions: Any, labels: Any) -> dict[str, float]:
    """Accuracy and macro-F1 (the mean of the F1 of the classes that occur) of class ids.

    Args:
        predictions, labels: (examples,) integers.
    """
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
    }


def _judge_tokens(model: Any, batches: Iterable[Mapping[str, Any]], shift: int) -> dict[str, float]:
    """Loss, perplexity and accuracy over all target tokens, each token with the same weight.

    A mean of batch means would weigh the tokens of short texts more; the sums here do not depend on the batch size.

    Args:
        batches: with `labels` (batch, length), `IGNORED` where nothing is to be predicted.
        shift: 1 for models whose logits at a position speak of the next token, 0 for decoders with shifted inputs.
    Raises:
        DataError: no batch has a token to predict. CheckpointError: the loss is no finite number.
    """
    import torch

    from .finite import refuse_not_finite

    loss = correct = tokens = 0.0
    for batch in batches:
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        labels = batch["labels"][:, shift:]
        inputs = {k: v for k, v in batch.items() if k != "labels" or not shift}  # decoders make their inputs from them
        with torch.no_grad(), fitting(model):
            logits = model(**inputs).logits
        logits = logits[:, : logits.shape[1] - shift][labels != IGNORED].float()
        targets = labels[labels != IGNORED]
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        correct += (logits.argmax(-1) == targets).sum().item()
        tokens += targets.numel()
    if not tokens:
        raise DataError("the dataset has no token to predict: every label is masked.")
    mean = loss / tokens
    refuse_not_finite(mean, model)
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,  # float64 ends at exp(709)
        "token_accuracy": correct / tokens,
        "tokens": int(tokens),
    }


def judge_causal_lm(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    return _judge_tokens(model, batches, shift=1)


def judge_seq2seq(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    return _judge_tokens(model, batches, shift=0)


def several_scores(predictions: Any, labels: Any) -> dict[str, float]:
    """F1 over all pairs of an example and a label (micro), its mean over labels (macro), and the share of examples whose set
    of labels is met exactly.

    Args:
        predictions, labels: (examples, labels) of 0 and 1.
    """
    from sklearn.metrics import accuracy_score, f1_score

    micro, macro = (float(f1_score(labels, predictions, average=how, zero_division=0.0)) for how in ("micro", "macro"))
    return {"micro_f1": micro, "macro_f1": macro, "exact_sets": float(accuracy_score(labels, predictions))}


def number_scores(predictions: Any, labels: Any) -> dict[str, float]:
    """Mean absolute error, and R2: 1 less the share of the labels' variance that is left; NaN for fewer than two examples.

    Args:
        predictions, labels: (examples,) numbers.
    """
    from sklearn.metrics import mean_absolute_error, r2_score

    r2 = float(r2_score(labels, predictions)) if len(labels) > 1 else math.nan
    return {"mean_absolute_error": float(mean_absolute_error(labels, predictions)), "r2": r2}


def _of_tags(logits: Any, labels: Any) -> dict[str, float]:
    counted = labels != IGNORED
    return classification_scores(logits.argmax(-1)[counted], labels[counted])


# Kind of head -> (logits (examples, outputs) or (examples, tokens, labels), labels) -> scores; NumPy arrays.
SCORES: dict[str, Callable[[Any, Any], dict[str, float]]] = {
    "classes": lambda logits, labels: classification_scores(logits.argmax(-1), labels),
    "several": lambda logits, labels: several_scores((logits > 0).astype(int), labels.astype(int)),
    "number": lambda logits, labels: number_scores(logits.reshape(-1), labels.reshape(-1)),
    "tokens": _of_tags,
}


def judge_head(head: str, model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Loss and `SCORES` of a model with a head, and how many `examples` there were, or `tags`.

    The loss is a mean over examples, over tags for `tokens`: cross-entropy; with several labels the sum of their binary
    cross-entropies divided by how many labels there are; the squared error of numbers.

    Raises:
        DataError: there is no label in any batch. CheckpointError: the loss is no finite number.
    """
    import numpy as np
    import torch
    from torch.nn import functional

    from .finite import refuse_not_finite

    losses: dict[str, Callable[[Any, Any], Any]] = {
        "classes": lambda z, y: functional.cross_entropy(z, y, reduction="sum"),
        "several": lambda z, y: functional.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1).sum(),
        "number": lambda z, y: functional.mse_loss(z.reshape(-1), y.reshape(-1), reduction="sum"),
        "tokens": lambda z, y: functional.cross_entropy(z, y, reduction="sum"),
    }
    loss = 0.0
    found, wanted = [], []
    for batch in batches:
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        labels = batch.pop("labels")
        with torch.no_grad(), fitting(model):
            logits = model(**batch).logits.float()
        if head == "tokens":
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
        loss += losses[head](logits, labels).item()
        found.append(logits.cpu().numpy())
        wanted.append(labels.cpu().numpy())
    examples = sum(map(len, wanted))
    if not examples:
        raise DataError("the dataset has no label to judge by.")
    refuse_not_finite(loss / examples, model)
    scores = SCORES[head](np.concatenate(found), np.concatenate(wanted))
    return {"loss": loss / examples, **scores, "tags" if head == "tokens" else "examples": examples}
