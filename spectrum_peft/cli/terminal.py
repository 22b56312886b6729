"""What a command prints, with escapes for what a terminal would obey: names, values and written text come from anybody's files.

`main` puts it around standard output and standard error, so that no verb and no library has to think of it. Records and
`-o` do not go through it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# Control characters but line breaks and tabs, marks of direction, halves of surrogate pairs. What is only hard to see, such as
# the joiners of Persian or of emoji, is text and stays.
_OBEYED = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_OUTPUT = re.compile(_OBEYED)
# Progress bars go back in their line and up one. Libraries colour their messages, and names in files could: colours are left out.
_MESSAGES = re.compile(rf"(?P<kept>\r|\x1b\[A)|(?P<colour>\x1b\[[0-9;]{{0,20}}m)|{_OBEYED}")


def escaped(text: str, pattern: re.Pattern[str] = _OUTPUT) -> str:
    """The text with what a terminal would obey as Python writes it, `\\x1b`; the line ends of Windows become plain ones."""
    if text.isascii() and text.isprintable():
        return text
    return pattern.sub(_shown_as, text.replace("\r\n", "\n"))


def _shown_as(match: re.Match[str]) -> str:
    found = match.groupdict()
    if found.get("colour"):
        return ""
    return found.get("kept") or ascii(match[0])[1:-1]


class _Shown:
    """A text stream that hands on what may be shown; everything else is the stream's own."""

    def __init__(self, stream: TextIO, pattern: re.Pattern[str]) -> None:
        self._stream, self._pattern = stream, pattern

    def write(self, text: str) -> int:
        self._stream.write(escaped(text, self._pattern))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Escaping(logging.Formatter):
    """Of log lines, which are no progress bars."""

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def say(line: str) -> None:
    """A line of a verb's own on standard error."""
    print(escaped(line), file=sys.stderr)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Everything that is printed inside goes through `escaped`."""
    out: Any = _Shown(sys.stdout, _OUTPUT)
    messages: Any = _Shown(sys.stderr, _MESSAGES)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
        yield
