"""How a record is written and read: JSON or YAML, the same bytes for the same record, whole files only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError, one_line

SCHEMA_VERSION = 1


class Record:
    """Saving and loading, shared by the records that are files."""

    _kind: str = ""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "record") -> Any:
        raise NotImplementedError

    @cached_property
    def digest(self) -> str:
        """sha256 of the record's canonical JSON, 64 hex digits."""
        return hashlib.sha256(_to_json(self.to_dict()).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record: YAML for `.yaml`/`.yml`, JSON otherwise; to a temporary name first, then renamed.

        Raises:
            CheckpointError: the folder cannot be written; a value is NaN (the message names the field).
        """
        path = Path(path)
        data = self.to_dict()
        _refuse_nan(data, self._kind)
        text = _to_yaml(data) if path.suffix in {".yaml", ".yml"} else _to_json(data, indent=1)
        write_text(path, text)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Any:
        """Read a record back.

        Raises:
            CheckpointError: not there, empty, not JSON or YAML of this kind, or of a newer schema.
        """
        return cls.from_dict(read_mapping(path), source=str(path))

    @classmethod
    def _check_header(cls, data: Mapping[str, Any], source: str) -> None:
        kind, version = data.get("record"), data.get("schema_version")
        if kind != cls._kind:
            raise CheckpointError(f"{source}: field 'record' is {kind!r}, wanted {cls._kind!r}.")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{source}: schema_version is {version!r}, this version reads up to {SCHEMA_VERSION}."
            )


def is_number(value: Any, least: float, most: float = math.inf) -> bool:
    """A finite one from `least` to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most


# --- plain data ------------------------------------------------------------------------------------------------------


def as_plain(value: Any) -> Any:
    """Records, tuples and infinities as JSON knows them; None fields of a record are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        defaults = {f.name: f.default for f in dataclasses.fields(value)}
        return {
            k: as_plain(v)
            for k in defaults
            if (v := getattr(value, k)) != defaults[k] or defaults[k] is dataclasses.MISSING
        }
    if isinstance(value, Mapping):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def finite_only(value: Any) -> Any:
    """Plain data with infinite and undefined numbers as strings, as in all JSON of ours."""
    if isinstance(value, Mapping):
        return {k: finite_only(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def revived(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: revived(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(revived(v) for v in value)
    return {"inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value


def _refuse_nan(value: Any, where: str) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise CheckpointError(f"{where} is nan, wanted a number or inf.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_nan(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            label = item.get("name", i) if isinstance(item, Mapping) else i
            _refuse_nan(item, f"{where}[{label}]")


def _to_json(data: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(data, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def _to_yaml(data: Mapping[str, Any]) -> str:
    import yaml  # 60 ms that a scan to JSON need not pay

    rows = {k: v for k, v in data.items() if k in {"entries", "stats"}}
    head = {k: v for k, v in data.items() if k not in rows}
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)
    for key, items in rows.items():  # one line an entry: a plan of 200 matrices stays readable and diffable
        body = "".join("- " + yaml.safe_dump(i, default_flow_style=True, sort_keys=False, width=10**6) for i in items)
        text += f"{key}:\n{body}" if items else f"{key}: []\n"
    return text


_T = TypeVar("_T")


def wanted_field(data: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in data:
        raise CheckpointError(f"{source}: field {key!r} is missing.")
    return data[key]


def built(cls: type[_T], row: Any, where: str) -> _T:
    if not isinstance(row, Mapping):
        raise CheckpointError(f"{where} is {row!r}, wanted a mapping.")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(row) - known)
    if unknown:
        raise CheckpointError(f"{where}: unknown field {unknown[0]!r}, known are {sorted(known)}.")
    try:
        return cls(**{k: revived(v) for k, v in row.items()})
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}.") from error


def built_rows(cls: type[_T], data: Mapping[str, Any], key: str, source: str) -> tuple[_T, ...]:
    rows = wanted_field(data, key, source)
    if not isinstance(rows, list | tuple):
        raise CheckpointError(f"{source}: field {key!r} is a {type(rows).__name__}, wanted a list.")
    return tuple(built(cls, row, f"{source}: {key}[{i}]") for i, row in enumerate(rows))


# --- files -----------------------------------------------------------------------------------------------------------


class _TwiceError(Exception):
    """A key of a mapping stands twice; without this the last one would win in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(repr(next(key for i, key in enumerate(keys) if key in keys[:i])))
    return found


@cache
def _yaml_loader() -> Any:
    """The safe loader, that of C where it was built, which refuses a key that stands twice."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in seen:
                        raise _TwiceError(f"{key.value!r} (line {key.start_mark.line + 1})")
                    seen.add((key.tag, key.value))
            return super().construct_mapping(node, deep)

    return Loader


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping; YAML by the safe loader only.

    Raises:
        CheckpointError: not there, empty, cannot be parsed (a YAML tag that asks for an object included), no mapping, a key
            that stands twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error}).") from error
    if not text.strip():
        raise CheckpointError(f"{path}: the file is empty.")
    try:
        if path.suffix in {".yaml", ".yml"}:
            import yaml

            try:
                data = yaml.load(text, Loader=_yaml_loader())
            except yaml.YAMLError as error:
                raise CheckpointError(f"{path}: not plain YAML: {one_line(error)}.") from error
        else:
            data = json.loads(text, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise CheckpointError(f"{path}: the key {error} stands twice in one mapping, wanted once.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, wanted a mapping.")
    return data


def move_over(new: Path, path: Path) -> None:
    """Rename a file over another. Windows refuses while somebody has that one open: some time is given to a reader to end.

    Raises:
        PermissionError: it stays open for two seconds.
    """
    for pause in (0.05, 0.25, 0.7, 1.0):
        try:
            new.replace(path)
            return
        except PermissionError:
            time.sleep(pause)
    new.replace(path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file or nothing: to a temporary name in the same folder, then renamed.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}).") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        move_over(Path(temporary), path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}).") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
