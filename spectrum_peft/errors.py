"""The errors of spectrum_peft.

Every message names the file, tensor or field, the value that was seen and the value that was wanted. The command line
turns a `SpectrumError` into one line on standard error and exit code 2; anything else is a bug and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpectrumError(Exception):
    """Base of every error that is caused by an input: a file, a value, an option, a model that does not fit."""


class OptionError(SpectrumError, ValueError):
    """An option has a value outside its range, or two options exclude each other."""


class CheckpointError(SpectrumError, ValueError):
    """A checkpoint or record file is missing, truncated, of another format, or holds a value that cannot be used."""


class MismatchError(SpectrumError, ValueError):
    """Two things that must belong together do not: plan and model, report and checkpoint, adapter file and plan."""


class DataError(SpectrumError, ValueError):
    """A dataset is missing, cannot be read, or lacks a column or a value that the task needs."""


class InstallError(SpectrumError, ImportError):
    """An optional package is not installed; the message has the line that installs it."""


class ComparisonError(SpectrumError, RuntimeError):
    """Runs of a comparison failed; the message names the first, its last line and its log. The others are reported."""


class TrainingSetupError(SpectrumError, RuntimeError):
    """The trainer, the optimizer or a callback is set up so that the plan would not be carried out."""


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def near_matches(name: str, choices: Iterable[str], n: int = 3) -> str:
    """A clause to end an error message with: the `n` known names most like `name`, or all of them when there are few.

    Returns:
        `" Did you mean 'a', 'b'?"`, or `" Known: 'a', 'b'."` for up to twelve choices with no near match, or `""`.
    """
    known = sorted(set(choices))
    near = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    if near:
        return " Did you mean " + ", ".join(f"'{c}'" for c in near) + "?"
    if 0 < len(known) <= 12:
        return " Known: " + ", ".join(f"'{c}'" for c in known) + "."
    return ""
