"""What a trained model scores on each row of a set: the figure that a search goes by, row for row, so that two models can be
held against each other on the same rows.

torch is imported inside functions, as in `cell`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DataError, OptionError, one_line
from .settings import METRICS

# Metrics that are a mean over rows; macro-F1 is one over classes, and its rows are right or wrong.
_OF_ROWS = {
    "loss": "loss",
    "perplexity": "loss",
    "token_accuracy": "token_accuracy",
    "accuracy": "accuracy",
    "macro_f1": "accuracy",
}


def user_metric(name: str) -> Callable[..., Any]:
    """The function behind `module:function`; the folder where the command runs is looked in, too.

    Raises:
        OptionError: no such module, nothing callable of that name in it.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise whatever it likes
        raise OptionError(f"metric is {name!r}: {type(error).__name__}: {one_line(error)}.") from error
    if not callable(found):
        raise OptionError(f"metric is {name!r}: {function} is a {type(found).__name__}, wanted a function.")
    return found


def score_rows(saved: Any, rows: Any, metric: str, max_new_tokens: int, source: str) -> dict[str, Any]:
    """Judge a model on a set, row by row.

    Args:
        saved: of `train.saved.open_saved`.
        rows: with the standard columns of the task.
        metric: key of `METRICS`, or a user's `module:function` of (model, tokenizer, rows) that returns one number, or one for
            each row, whose mean is taken.
    Returns:
        `value`: the metric; `rows`: one number for each row, or None where there are none. Their mean is the metric, but for
        perplexity (they are losses) and macro-F1 (1 where the row is right). A loss is weighed by the row's tokens, so that the
        mean is that over all tokens.
    Raises:
        DataError: the user's function raised, or what it returned is not finite.
    """
    if ":" in metric:
        return _by_user(saved, rows, metric)
    if METRICS[metric].tasks is None:
        return _by_completion(saved, rows, metric, max_new_tokens, source)
    found = saved.metrics_of_rows(rows)
    if metric in ("loss", "perplexity", "token_accuracy") and "tokens" in found[0]:
        weights = [row["tokens"] for row in found]
        mean = sum(weights) / len(weights)
        of_rows = [row[_OF_ROWS[metric]] * w / mean for row, w in zip(found, weights, strict=True)]
    else:
        of_rows = [row[_OF_ROWS[metric]] for row in found]
    value = sum(of_rows) / len(of_rows)
    if metric == "perplexity":
        value = math.exp(min(value, 700.0))
    if metric == "macro_f1":
        value = saved.metrics(rows)["macro_f1"]
    return {"value": value, "rows": of_rows}


def _by_completion(saved: Any, rows: Any, metric: str, max_new_tokens: int, source: str) -> dict[str, Any]:
    from ..train import generation

    template = saved.options.apply_chat_template is not False
    prompts, references, chat = generation.prompts_of(rows, saved.tokenizer, source, template=template)
    texts = generation.complete(saved.model, saved.tokenizer, prompts, max_new_tokens=max_new_tokens, chat=chat)
    judge = generation.METRICS[metric]
    of_rows = [judge([text], [reference])[metric] for text, reference in zip(texts, references, strict=True)]
    return {"value": sum(of_rows) / len(of_rows), "rows": of_rows}


def _by_user(saved: Any, rows: Any, metric: str) -> dict[str, Any]:
    function = user_metric(metric)
    try:
        answer = function(saved.model, saved.tokenizer, rows)
        several = isinstance(answer, Sequence) or getattr(answer, "ndim", 0)
        numbers = [float(x) for x in answer] if several else [float(answer)]
    except Exception as error:
        raise DataError(f"{metric} raised {type(error).__name__}: {one_line(error)}.") from error
    if several and len(numbers) != len(rows):
        raise DataError(
            f"{metric} returned {len(numbers)} numbers for {len(rows)} rows, wanted one for each, or one in all."
        )
    if not all(map(math.isfinite, numbers)):
        raise DataError(
            f"{metric} returned {next(x for x in numbers if not math.isfinite(x))}, wanted a finite number."
        )
    return {"value": sum(numbers) / len(numbers), "rows": numbers if several else None}
