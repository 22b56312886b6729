"""What an error says on the command line: the options that Python spells `spectrum_ratio=0.5` as the flags of the command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import SpectrumError, one_line
from .verb import Verb

# A keyword with its value as messages write it: quoted, a list, a call, a word, or nothing.
_KEYWORD = re.compile(
    r"(?<![\w.-])(?P<name>[a-z][a-z_0-9]*)=(?P<value>\[[^\]]*\]|\([^)]*\)|'[^']*'|[A-Za-z_][\w.]*\([^()]*\)|\w(?:[\w.+-]*\w)?|)"
    r"(?:\.\.\.)?"
)


def flags_by_name(verb: Verb | None, others: Iterable[Verb]) -> dict[str, str]:
    """{keyword of Python: flag} of one verb, and of the others what it does not have."""
    found: dict[str, str] = {}
    for one in (*([verb] if verb else []), *others):
        for action in one.parser()._actions:
            long = [flag for flag in action.option_strings if flag.startswith("--")]
            if long:
                found.setdefault(action.dest, long[0])
    return found


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """A message with flags for the keywords that are some; what no flag stands for stays."""

    def typed(match: re.Match[str]) -> str:
        flag, value = flags.get(match["name"]), match["value"]
        if flag is None:
            return match[0]
        if value in ("", "True") or value.endswith("...") or (value[-1:] == ")" and value[:1] != "("):
            return flag
        words = re.findall(r"'[^']*'|[^\s,\[\]()]+", value)
        return " ".join([flag, *("false" if word == "False" else word.strip("'") for word in words)])

    return _KEYWORD.sub(typed, message)


def wording(error: SpectrumError, flags: Mapping[str, str]) -> str:
    """The one line of an error for the command line."""
    if error.shell:
        return as_typed(error.shell, flags)
    message = as_typed(one_line(error), flags)
    name, is_, rest = message.partition(" is ")
    return f"{flags[name]}{is_}{rest}" if is_ and name in flags else message
