"""The errors of spectrum_peft.

Every message names the file, tensor or field, the value that was seen and the value that was wanted. The command line
turns a `SpectrumError` into one line on standard error and exit code 2; anything else is a bug and exits with 1.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# An error is one line that a reader can take in, whatever stood in the file that it is about.
_MOST_QUOTED = 200
_MOST_SAID = 1000
_MOST_NAMES = 5000  # of a folder, looked at for one that is meant
# From an opening quote to its closing one; an apostrophe follows a letter.
_QUOTED = re.compile(r"(?<!\w)'([^']*)'")


def printable(text: str) -> str:
    """A text with escapes for what a terminal would obey, or cannot show: control characters, marks of direction, halves of
    surrogate pairs; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def quoted(value: Any) -> str:
    """What was seen, for an error: its `repr`, at most 200 characters of it, without building the rest."""
    if isinstance(value, str):
        rest = len(value) - _MOST_QUOTED
        return repr(value) if rest <= 0 else f"{value[:_MOST_QUOTED]!r}... ({rest} more characters)"
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 60, 60
    try:
        text = short.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}..."


def _shown(message: str) -> str:
    """One short line: names and values come from files that may hold anything."""
    half = _MOST_SAID // 2 - 5
    if len(message) > 20 * _MOST_SAID:  # before anything is looked for in it
        message = f"{message[: 10 * _MOST_SAID]} ... {message[-10 * _MOST_SAID :]}"
    message = _QUOTED.sub(lambda m: m[0] if len(m[1]) <= _MOST_QUOTED else f"'{m[1][:_MOST_QUOTED]}...'", message)
    message = printable(re.sub(r"[\t\r\n\v\f]+\s*", " ", message))
    return message if len(message) <= _MOST_SAID else f"{message[:half]} ... {message[-half:]}"


class SpectrumError(Exception):
    """Base of every error that is caused by an input: a file, a value, an option, a model that does not fit.

    The message becomes one line of at most 1,000 characters, with control characters as escapes; of what it quotes, 200.

    Args:
        shell: what the command line says instead, where the message speaks of calls that nobody makes there. Keywords, as in
            `spectrum_ratio=0.5`, become flags by themselves.
    """

    def __init__(self, *args: Any, shell: str | None = None) -> None:
        super().__init__(*(_shown(a) if isinstance(a, str) else a for a in args))
        self.shell = None if shell is None else _shown(shell)


class OptionError(SpectrumError, ValueError):
    """An option has a value outside its range, or two options exclude each other."""


class CheckpointError(SpectrumError, ValueError):
    """A checkpoint or record file is missing, truncated, of another format, or holds a value that cannot be used."""


class HubError(CheckpointError):
    """The hub cannot be reached, refuses, or answers something else than was asked for."""


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


def is_failure(error: BaseException) -> bool:
    """Whether something failed; False for what asks a program to end. A panic in a library's Rust is no `Exception` of Python."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def loading(source: object) -> Iterator[None]:
    """Around what a library loads from a user's folder: its errors, of whatever tree, are faults of the input there.

    Memory that runs out stays what it is: who catches it tries with less.

    Raises:
        CheckpointError: names the source and what the library said.
    """
    try:
        yield
    except (SpectrumError, MemoryError):
        raise
    except BaseException as error:
        if not is_failure(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise CheckpointError(f"{source}: cannot be loaded ({type(error).__name__}: {one_line(error)}).") from error


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


def first_of(names: Sequence[str], most: int) -> str:
    """`a, b, c and 4 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def near_here(path: str | os.PathLike[str]) -> str:
    """A clause to end an error message with: what lies where `path` does not, with nearly its name; `""` where nothing does."""
    path = Path(path)
    try:
        with os.scandir(path.parent) as entries:
            names = (entry.name for entry, _ in zip(entries, range(_MOST_NAMES), strict=False))
            there = sorted(name for name in names if name != path.name)  # that is a link to nowhere
    except (OSError, ValueError):  # no such folder either; a NUL in the name
        return ""
    pairs = {name: ((path.name, name), (path.stem, Path(name).stem)) for name in there}
    alike = {name: min(difflib.SequenceMatcher(None, *both).ratio() for both in pairs[name]) for name in there}
    least = max(0.55, max(alike.values(), default=0) - 0.15)
    near = sorted((name for name in there if alike[name] >= least), key=lambda name: -alike[name])[:3]
    return " Did you mean " + ", ".join(f"'{path.parent / name}'" for name in near) + "?" if near else ""


def no_such(what: str, path: str | os.PathLike[str]) -> str:
    """`plan.yml: no such file. Did you mean 'plan.yaml'?`"""
    return f"{os.fspath(path)}: no such {what}.{near_here(path)}"
