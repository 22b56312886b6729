"""How flags and config files are read: argparse that raises, and a YAML or JSON mapping with the flags as keys.

Input errors are raised as `OptionError`, so that they end as one line and exit code 2. No torch.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OptionError, near_matches, quoted
from .records import read_mapping, record_of
from .records.schema import REAL, SCALAR, TRUTH, WHOLE, Wanted, listed

# Flags of `train` that go to LoraConfig as they are, beside the options of a plan.
LORA_FIELDS = (
    "lora_dropout", "use_dora", "bias", "target_modules", "exclude_modules", "layers_to_transform", "modules_to_save",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage: an input error is one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> Any:
        raise OptionError(reworded(message))


_REFUSED = re.compile(r"argument (?P<flags>\S+): (?P<what>.*)", re.DOTALL)
_TYPE = re.compile(r"invalid (?P<type>.+?) value: (?P<value>.*)", re.DOTALL)
_CHOICE = re.compile(r"invalid choice: (?P<value>.*?) \(choose from (?P<choices>.*)\)", re.DOTALL)
_TYPES = {"int": "a whole number", "float": "a number"}


def reworded(message: str) -> str:
    """What argparse says of a value, in the words of all other errors."""
    refused = _REFUSED.fullmatch(message)
    if refused is None:
        return message
    flag, what = refused["flags"].rpartition("/")[2], refused["what"]
    if match := _TYPE.fullmatch(what):
        return f"{flag} is {match['value']}, wanted {_TYPES.get(match['type'], match['type'])}."
    if match := _CHOICE.fullmatch(what):
        value, known = match["value"].strip("'"), match["choices"]
        return f"{flag} is {value!r}." + near_matches(value, re.findall(r"'([^']*)'", known) or known.split(", "))
    if what.startswith("Truthy value expected: got "):
        return f"{flag} is {what.removeprefix('Truthy value expected: got ').partition(' but')[0]!r}, wanted true or false."
    if what in ("expected one argument", "expected at least one argument"):
        return f"{flag} needs a value."
    return f"{flag} is {what}." if ", wanted " in what else f"{flag}: {what}"


def boolean(text: str) -> bool:
    """`--flag`, `--flag true`, `--flag false`, as the trainers' own flags read."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted true or false")
    return known[text.lower()]


def steps(text: str) -> int | str:
    return text if text == "epoch" else int(text)


steps.__name__ = "a number of steps, or 'epoch'"


def rate(text: str) -> float | str:
    """A learning rate, or `auto`."""
    return text if text == "auto" else float(text)


rate.__name__ = "a number, or 'auto'"


def switch(parser: Any, name: str, **kwargs: Any) -> None:
    parser.add_argument(name, type=boolean, nargs="?", const=True, metavar="BOOL", **kwargs)


@dataclass(frozen=True)
class Rest:
    """Flags for the trainer's own arguments: as written on the command line, and from the config file."""

    argv: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    source: str = "command line"


def dashed(argv: Iterable[str]) -> list[str]:
    """`--some_flag=x` and `--some-flag=x` are one flag; values stay as they are."""
    result = []
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            token = "--" + flag[2:].replace("_", "-") + equals + value
        result.append(token)
    return result


def take_config(argv: list[str]) -> tuple[str, dict[str, Any]] | None:
    """Find `--config FILE` (it stays in `argv`) and read the file."""
    finder = Parser(add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return None
    found: dict[str, Any] = {}
    data = read_mapping(path)
    if "record" in data:
        raise OptionError(f"{path}: is {record_of(path)}, wanted a file with flags as keys.")
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise OptionError(f"{path}: {name} stands twice, once with - and once with _; wanted once.")
        found[name] = value
    return path, found


def set_defaults_from(parser: argparse.ArgumentParser, source: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the file's values the parser's defaults, each checked as its flag would be.

    Returns:
        The keys that the parser does not know.
    """
    actions = keys_of(parser)
    unknown = {}
    for key, value in config.items():
        if key in actions:
            parser.set_defaults(**{actions[key].dest: checked_value(actions[key], key, value, source)})
        else:
            unknown[key] = value
    return unknown


# What a flag's type asks of a config file; other types read the value's text.
_KINDS: dict[Any, Wanted[Any]] = {float: REAL, int: WHOLE, boolean: TRUTH}


def checked_value(action: argparse.Action, key: str, value: Any, source: str) -> Any:
    """The value of a config file as argparse would have made it of the flag, held to types and limits.

    Raises:
        OptionError: names the key, the value and what was wanted.
    """
    if value is None:
        return None
    where = f"{source}: {key}"
    again = isinstance(action, argparse._AppendAction)  # a flag that may be given several times; one value is one time
    if again and not isinstance(value, list | dict):
        value = [value]
    many = again or action.nargs in ("+", "*") or isinstance(action.nargs, int)
    if many != isinstance(value, list) or isinstance(value, dict):
        raise OptionError(f"{where} is {quoted(value)}, wanted {'a list' if many else 'a single value'}.")
    items = [] if many and not value and action.nargs == "*" else listed(value, where)
    if isinstance(action.nargs, int) and len(items) != action.nargs:
        raise OptionError(f"{where} has {len(items)} values, wanted {action.nargs}.")
    checked = [_one_value(action, where, item) for item in items]
    return checked if many else checked[0]


def _one_value(action: argparse.Action, where: str, item: Any) -> Any:
    if action.type in _KINDS:
        return _KINDS[action.type](where, item)
    read = action.type if callable(action.type) else str
    try:
        return read(str(SCALAR(where, item)))
    except (ValueError, argparse.ArgumentTypeError) as error:
        if isinstance(error, OptionError):
            raise
        wanted = getattr(action.type, "__name__", "a value")
        raise OptionError(f"{where} is {quoted(item)}, wanted {wanted}.") from error


def keys_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """{key in a config file: action}: the flags without dashes, and positionals by name."""
    keys = {}
    for action in parser._actions:
        if action.dest in {"help", "config"}:
            continue
        for flag in action.option_strings or [action.dest]:
            if flag.startswith("--") or not flag.startswith("-"):
                keys[flag.removeprefix("--").replace("-", "_")] = action
    return keys


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]
