"""Files of rows in JSON: what pyarrow would end the process on, and where the fault is in one that it cannot read."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError, one_line, quoted
from ..records import parse_json
from ..records.files import MOST_DEPTH

_KINDS = {
    str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping",
}  # fmt: skip


# What editors for Windows put before a file in UTF-8; pyarrow reads over it.
_BOM = codecs.BOM_UTF8


def check_json(path: Path) -> None:
    """Refuse rows on which pyarrow ends the process: one that is no mapping before one that is, and deep nesting.

    Raises:
        DataError: names the line or row.
    """
    if not _by_line(path):
        for where, row in _rows(path):
            if not isinstance(row, dict):
                raise DataError(f"{path}: {where} is {quoted(row)}, wanted a mapping of columns.")
        return
    with path.open("rb") as file:
        for i, line in enumerate(map(bytes.strip, file), 1):
            line = line.removeprefix(_BOM) if i == 1 else line
            if line and not line.startswith(b"{"):
                shown = quoted(line.decode("utf-8", "replace"))
                raise DataError(f"{path}: line {i} is {shown}, wanted a mapping of columns.")
            if line.count(b"{") + line.count(b"[") > MOST_DEPTH:
                _parsed(line, f"{path}: line {i}")


def refuse_fault(path: Path) -> None:
    """Look for what pyarrow could not read, which counts rows from the beginning of a block; returns where nothing is found.

    Raises:
        DataError: names the line of the first fault: no JSON, or a value of another kind than the column has before.
    """
    first: dict[str, tuple[str, str]] = {}  # {place in a row: (kind of value, where it was first seen)}
    for where, row in _rows(path):
        for place, value in _places(row):
            kind = _KINDS.get(type(value))
            if kind is None:  # null fits everywhere
                continue
            wanted, seen = first.setdefault(place, (kind, where))
            if kind != wanted:
                raise DataError(f"{path}: {where}: {place} is {quoted(value)}, wanted {wanted} as in {seen}.")


# Bytes that are read at once, of a line or of a file that is one value: Python takes some ten times as many for it.
_MOST_TOGETHER = 1 << 28


def _by_line(path: Path) -> bool:
    """Whether each line is to hold a row; else the file is one list, or one mapping."""
    with path.open("rb") as file:
        first = file.readline(_MOST_TOGETHER).removeprefix(_BOM).strip()
    return first.startswith(b"{") and (first.endswith(b"}") or (path.suffix == ".jsonl" and first != b"{"))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(`line 3`, its row) of a file with a row in each line; (`row 3`, row) of one list of rows."""
    if not _by_line(path):
        if path.stat().st_size > _MOST_TOGETHER:
            raise DataError(
                f"{path}: is one value of more than {_MOST_TOGETHER >> 20} MiB, wanted a row in each line (.jsonl)."
            )
        data = _parsed(path.read_bytes(), str(path))
        yield from ((f"row {i}", row) for i, row in enumerate(data if isinstance(data, list) else [data], 1))
        return
    with path.open("rb") as file:
        for i, line in enumerate(iter(lambda: file.readline(_MOST_TOGETHER), b""), 1):
            if len(line) == _MOST_TOGETHER:
                raise DataError(f"{path}: line {i} has more than {_MOST_TOGETHER >> 20} MiB.")
            if line.strip():
                yield f"line {i}", _row(line.decode("utf-8-sig").strip(), f"{path}: line {i}")


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at character {error.colno}: {quoted(line)}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON that can be read: {one_line(error)}.") from error


def _parsed(text: bytes, where: str) -> Any:
    try:
        return parse_json(text.decode("utf-8-sig"), where, most=None)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {one_line(error)}") from error


def _places(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a row with its place, `messages[].content`; all items of a list have one place."""
    if place:
        yield place, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _places(item, f"{place}[]")
