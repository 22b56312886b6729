"""What somebody's tokenizer, or chat template, raises, in words: both are programs that came with a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError, SpectrumError, is_failure, one_line


@contextmanager
def tokenizing(what: str = "the tokenizer refuses a text") -> Iterator[None]:
    """Around everything that a tokenizer does with a user's text.

    Args:
        what: is said before the reason.
    Raises:
        DataError: of whatever was raised but what ends a program, and memory that is full.
    """
    try:
        yield
    except (SpectrumError, MemoryError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise DataError(f"{what} ({one_line(error)[:200] or type(error).__name__}).") from error
