"""What a model's own code raises where its config does not fit its weights, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CheckpointError, one_line


@contextmanager
def fitting(model: Any) -> Iterator[None]:
    """Around a run of a model that was loaded: heads that do not divide the width, say, show when it runs, not before.

    Raises:
        CheckpointError: torch met shapes that do not go together. Memory that is full and what a device says are errors of
            classes of their own, and pass.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or "the model"
        said = one_line(error)[:200]
        raise CheckpointError(f"{name}: cannot be run: {said}. Does its config.json fit its weights?") from error
