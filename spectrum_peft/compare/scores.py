"""What a trained model scores on each row of a set: the figure that a search goes by, row for row, so that two models can be
held against each other on the same rows.

torch is imported inside functions, as in `cell`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DataError, OptionError, one_line, quoted
from .settings import METRICS

# What a row scores where the metric is no mean over rows, and the sign that makes it point the same way.
_STANDS_FOR = {
    "perplexity": ("loss", 1),
    "macro_f1": ("accuracy", 1),
    "micro_f1": ("exact_sets", 1),
    "r2": ("loss", -1),
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
        `value`: the metric; `rows`: one number for each row, or None where there are none. Their mean is the metric where that is
        a mean over rows; for perplexity and R2 they are losses, for an F1 1 where the row is right. What is a mean over tokens
        is weighed by the row's tokens.
    Raises:
        DataError: the user's function raised, or what it returned is not finite.
    """
    if ":" in metric:
        return _by_user(saved, rows, metric)
    if METRICS[metric].tasks is None:
        return _by_completion(saved, rows, metric, max_new_tokens, source)
    found = saved.metrics_of_rows(rows)
    name, sign = _STANDS_FOR.get(metric, (metric, 1))
    if any(name not in row for row in found):
        return {"value": saved.metrics(rows)[metric], "rows": None}
    if "tokens" not in found[0]:
        return {"value": saved.metrics(rows)[metric], "rows": [sign * row[name] for row in found]}
    weights = [row["tokens"] for row in found]
    mean = sum(weights) / len(weights)
    of_rows = [row[name] * w / mean for row, w in zip(found, weights, strict=True)]
    value = sum(of_rows) / len(of_rows)
    return {"value": math.exp(min(value, 700.0)) if metric == "perplexity" else value, "rows": of_rows}


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
    except Exception as error:
        raise DataError(f"{metric} raised {type(error).__name__}: {one_line(error)}.") from error
    several = isinstance(answer, Sequence) or getattr(answer, "ndim", 0)
    try:
        if isinstance(answer, str | bytes):  # a sequence, and what float() reads
            raise TypeError("text is no number")
        numbers = [float(x) for x in answer] if several else [float(answer)]
    except Exception as error:  # of whatever class the user's own objects raise
        raise DataError(f"{metric} returned {quoted(answer)}, wanted a number, or one for each row.") from error
    if several and len(numbers) != len(rows):
        raise DataError(
            f"{metric} returned {len(numbers)} numbers for {len(rows)} rows, wanted one for each, or one in all."
        )
    if not all(map(math.isfinite, numbers)):
        raise DataError(
            f"{metric} returned {next(x for x in numbers if not math.isfinite(x))}, wanted a finite number."
        )
    return {"value": sum(numbers) / len(numbers), "rows": numbers if several else None}
