"""What a model's own code raises where its config does not fit its weights, or its tokenizer its embedding, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CheckpointError, SpectrumError, is_failure, one_line


@contextmanager
def known_tokens(model: Any) -> Iterator[None]:
    """Around a run of a model on tokens of a tokenizer: one that has more of them may still be used for texts without those.

    Raises:
        CheckpointError: a token has no row in the embedding. On a CPU; of a GPU this is an error of the device, and passes.
    """
    try:
        yield
    except IndexError as error:
        if "index out of range in self" not in str(error):
            raise
        embedding = model.get_input_embeddings()
        rows = "" if embedding is None else f" of {embedding.weight.shape[0]:,} rows"
        raise CheckpointError(
            f"{name_of(model)}: a token or a position lies outside of its embedding{rows}. Is the tokenizer this model's, and is "
            "the text no longer than the model takes?"
        ) from error


@contextmanager
def fitting(model: Any) -> Iterator[None]:
    """Around a run of a model that was loaded: heads that do not divide the width, say, show when it runs, not before.

    Raises:
        CheckpointError: torch met shapes that do not go together, or `known_tokens`. Memory that is full and what a device says
            are errors of classes of their own, and pass.
    """
    try:
        with known_tokens(model):
            yield
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        said = one_line(error)[:200]
        raise CheckpointError(
            f"{name_of(model)}: cannot be run: {said}. Does its config.json fit its weights?"
        ) from error


@contextmanager
def writing(model: Any) -> Iterator[None]:
    """`fitting` around a model that writes: what its generation_config.json asks for shows when it begins, in any class of error.

    Raises:
        CheckpointError: it cannot write as it is asked to. What the system says of an output passes.
    """
    try:
        with fitting(model):
            yield
    except (SpectrumError, MemoryError, OSError, RuntimeError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        said = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise CheckpointError(
            f"{name_of(model)}: cannot write ({said}). Do its generation_config.json and its tokenizer fit it?"
        ) from error


def name_of(model: Any) -> str:
    """What a model was loaded by, for a message about it."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or "the model"
