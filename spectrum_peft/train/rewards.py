"""Reward functions of the user, which run as they are: this is code of whoever gives it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError, SpectrumError, near_matches, one_line
from ..records import is_file

Reward = Callable[..., Any]
FLAG = "--reward-function"


def reward_functions(names: Sequence[str], *, strings: bool) -> list[Reward | str]:
    """What `--reward-function` names, loaded.

    Args:
        names: `package.module:function`, `file.py:function`, or the folder of a reward model (a checkpoint with one output).
        strings: the prompts of the rows were strings, so that the functions get strings, whatever the chat template made of them.
    Returns:
        functions as TRL calls them, (prompts, completions, the other columns by name, ...) -> a number for each completion, or
        None where a function does not apply; and folders of reward models as they were given.
    Raises:
        OptionError: not there, not to be imported, or no function; a function returns something else (later, when it is called).
    """
    found: list[Reward | str] = []
    for name in names:
        if is_file(Path(name) / "adapter_config.json"):
            raise OptionError(
                f"{FLAG} {name}: is an adapter, wanted a whole model: `spectrum-peft merge` makes one of it."
            )
        model = is_file(Path(name) / "config.json")
        found.append(name if model else _guarded(_named(name), name, strings))
    return found


def _named(name: str) -> Reward:
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise OptionError(
            f"{FLAG} is {name!r}, wanted module:function, file.py:function, or the folder of a reward model (with config.json)."
        )
    module = _module(source, name)
    found = getattr(module, attribute, None)
    if found is None:
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise OptionError(f"{FLAG} {name}: {source} has no {attribute!r}." + near_matches(attribute, known))
    if not callable(found):
        raise OptionError(f"{FLAG} {name}: {attribute} is a {type(found).__name__}, wanted a function.")
    return found  # type: ignore[no-any-return]


def _module(source: str, name: str) -> Any:
    """The module or file, run once."""
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source)
        if not path.is_file():
            raise OptionError(f"{FLAG} {name}: {source}: no such file.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # its name ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look their module up
        spec.loader.exec_module(module)
        return module
    except SpectrumError:
        raise
    except Exception as error:  # it is a program
        raise OptionError(
            f"{FLAG} {name}: {source} cannot be imported ({type(error).__name__}: {one_line(error)})."
        ) from error


def _guarded(function: Reward, name: str, strings: bool) -> Reward:
    """The same function, whose failures are one line, and which gets strings where the rows held strings."""

    def plain(values: Any) -> Any:
        return [v if isinstance(v, str) else v[-1]["content"] for v in values] if strings else values

    def refused(what: str) -> OptionError:
        return OptionError(f"{FLAG} {name}: {what}, wanted a list of a number or None for each completion.")

    def checked(values: Any, count: int) -> Any:
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise refused(f"returned a {type(values).__name__}")
        if len(values) != count:
            raise refused(f"returned {len(values)} values for {count} completions")
        for value in values:
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                raise refused(f"returned {value!r}")
        return values

    def arguments(keywords: dict[str, Any]) -> dict[str, Any]:
        return {**keywords, **{n: plain(keywords[n]) for n in ("prompts", "completions") if n in keywords}}

    def failed(error: Exception) -> OptionError:
        return OptionError(f"{FLAG} {name}: raised {type(error).__name__}: {one_line(error)} (--debug shows where).")

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(**keywords: Any) -> Any:
            try:
                values = await function(**arguments(keywords))
            except Exception as error:
                raise failed(error) from error
            return checked(values, len(keywords["completions"]))

        return awaited

    @functools.wraps(function)
    def called(**keywords: Any) -> Any:
        try:
            values = function(**arguments(keywords))
        except Exception as error:
            raise failed(error) from error
        return checked(values, len(keywords["completions"]))

    return called
