"""How good a model is on batches: loss, perplexity, accuracy."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..data import IGNORED
from ..errors import DataError, InstallError


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
        DataError: no batch has a token to predict.
    """
    import torch

    loss = correct = tokens = 0.0
    for batch in batches:
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        labels = batch["labels"][:, shift:]
        inputs = {k: v for k, v in batch.items() if k != "labels" or not shift}  # decoders make their inputs from them
        with torch.no_grad():
            logits = model(**inputs).logits
        logits = logits[:, : logits.shape[1] - shift][labels != IGNORED].float()
        targets = labels[labels != IGNORED]
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double().item()
        correct += (logits.argmax(-1) == targets).sum().item()
        tokens += targets.numel()
    if not tokens:
        raise DataError("the dataset has no token to predict: every label is masked.")
    mean = loss / tokens
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


def judge_classification(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    import torch

    loss = 0.0
    predictions: list[int] = []
    labels: list[int] = []
    for batch in batches:
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        targets = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits.float()
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double().item()
        predictions += logits.argmax(-1).tolist()
        labels += targets.tolist()
    return {"loss": loss / len(labels), **classification_scores(predictions, labels), "examples": len(labels)}
