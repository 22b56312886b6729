"""How a record is written and read: JSON or YAML, the same bytes for the same record, whole files only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Union, get_args, get_origin, get_type_hints

from ..errors import CheckpointError, no_such, one_line, quoted
from .schema import checked, refuse_unknown
from .whole import mode_of, write_text

SCHEMA_VERSION = 1
# What a run leaves beside its weights.
PLAN_FILE, REPORT_FILE, RESULTS_FILE = "spectrum_plan.yaml", "spectrum_report.json", "train_results.json"
# What only this package reads of an adapter that is a plain LoRA, beside its adapter_config.json.
BESIDE_FILE = "spectrum_adapter.json"
# The folders, inside that of a run, of what `train --export` makes of its adapter.
EXPORTED = {"lora": "exported_lora", "merged": "exported_merged"}


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
        write_text(path, self.text(yaml=path.suffix in {".yaml", ".yml"}))
        return path

    def text(self, yaml: bool = False) -> str:
        """What `save` writes.

        Raises:
            CheckpointError: a value is NaN (the message names the field).
        """
        data = self.to_dict()
        _refuse_nan(data, self._kind)
        return _to_yaml(data) if yaml else _to_json(data, indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Any:
        """Read a record back.

        Raises:
            CheckpointError: not there, empty, not JSON or YAML of this kind, or of a newer schema.
        """
        return cls.from_dict(read_mapping(path), source=str(path))

    @classmethod
    def _checked(cls, data: Mapping[str, Any], source: str, also: Iterable[str] = ()) -> Any:
        """The record that plain data say, held to the types of its fields.

        Args:
            also: fields of the file that follow from the others and are not read.
        Raises:
            CheckpointError: another kind of record, or of a newer schema; a field is unknown, missing or of another type; NaN.
        """
        kind, version = data.get("record"), data.get("schema_version")
        if kind != cls._kind:
            raise CheckpointError(f"{source}: {_what_it_is(kind)}, wanted {_KINDS[cls._kind]}.")
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise CheckpointError(
                f"{source}: schema_version is {quoted(version)}, this version reads up to {SCHEMA_VERSION}."
            )
        fields = {key: value for key, value in data.items() if key not in {"record", "schema_version", *also}}
        refuse_unknown(cls, [fields], source)
        _refuse_nan(fields, f"{source}: {cls._kind}")
        return checked(revived(fields, cls), cls, source)


# What a record is called, and who writes it.
_KINDS = {
    "snr_report": "a report of `scan`",
    "gradient_report": "gradients of `probe`",
    "plan": "a plan, which `plan` writes",
    "memory_report": "a report of `memory`",
}


def _what_it_is(kind: Any) -> str:
    if isinstance(kind, str) and kind in _KINDS:
        return f"is {_KINDS[kind]}"
    return f"field 'record' is {quoted(kind)}"


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


def revived(value: Any, kind: Any) -> Any:
    """`as_plain` undone: lists are tuples, and "inf" is a number where the type wants one and no text.

    Args:
        kind: type that the value is to have; Any where none is stated, and there "inf" stays text.
    """
    kinds = _members(kind)
    if isinstance(value, Mapping):
        fields = next((_fields(k) for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)
        within = _argument(kind, -1)
        return {k: revived(v, within if fields is None else fields.get(k, Any)) for k, v in value.items()}
    if isinstance(value, list):
        within = _argument(kind, 0)
        return tuple(revived(v, within) for v in value)
    if isinstance(value, str) and float in kinds and str not in kinds:
        return {"inf": math.inf, "-inf": -math.inf}.get(value, value)
    return value


@cache
def _fields(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _members(kind: Any) -> tuple[Any, ...]:
    """What a union may be, without annotations; of any other type itself."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(member for part in get_args(kind) for member in _members(part))
    return (kind,)


@cache
def _argument(kind: Any, place: int) -> Any:
    """Type of what a list, tuple or mapping holds."""
    for member in _members(kind):
        if arguments := [a for a in get_args(member) if a is not Ellipsis]:
            return arguments[place]
    return Any


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


# --- files -----------------------------------------------------------------------------------------------------------

# What a file may hold. A plan of 100,000 entries is 22 MB of JSON and 1.3 million values; a gradient report of 400 layers with 7
# kinds of matrices has 2 * 7 * 400^2 likenesses, some 45 MB. A value of YAML takes some hundred bytes while it is read.
MOST_BYTES = 1 << 28
MOST_VALUES = 1 << 23
MOST_YAML_VALUES = 1 << 21
MOST_DEPTH = 64
_MOST_INTEGER = 1 << 64
# Names of what a tokenizer is made of, and of what else lies beside weights and is read whole.
TOKENIZER_FILES = re.compile(
    r"tokenizer.*|vocab\..*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model|.*\.tiktoken|.*\.spm"
    r"|chat_template\..*|additional_chat_templates"
)
_CONFIGS = re.compile(r"config\.json|generation_config\.json|(.*_)?processor_config\.json|preprocessor_config\.json")
# Folders of several templates, and of original files; not read, or by names of their own.
_FOLDERS = {"additional_chat_templates", "tokenizer"}
_SURROGATE = re.compile("[\ud800-\udfff]")


class _RefusedError(Exception):
    """What a file holds is more, or other, than plain data of a reasonable size."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise _RefusedError(f"the key {quoted(twice)} stands twice in one mapping, wanted once")
    return found


@cache
def _yaml_loader() -> Any:
    """The safe loader, that of C where it was built, for what JSON can say too: no dates, no sets, no bytes, every key once."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    plain = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}

    class Loader(base):  # type: ignore[misc]
        yaml_constructors: ClassVar = {
            tag: made for tag, made in base.yaml_constructors.items() if tag is None or tag in plain
        }
        yaml_implicit_resolvers: ClassVar = {
            first: [(tag, regex) for tag, regex in found if tag in plain or tag.endswith(":merge")]
            for first, found in base.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in seen:
                        where = f"{quoted(key.value)} (line {key.start_mark.line + 1})"
                        raise _RefusedError(f"the key {where} stands twice in one mapping, wanted once")
                    seen.add((key.tag, key.value))
            return super().construct_mapping(node, deep)

    return Loader


def _check_yaml(text: str) -> None:
    """Follow the parser's events, which takes no memory: how deep, how many values once every alias is followed.

    Raises:
        _RefusedError, yaml.YAMLError
    """
    import yaml

    values = 0
    sizes: dict[str, int] = {}  # of what has an anchor
    open_: list[tuple[str | None, int]] = []  # collections that we are in: anchor, values before it
    for event in yaml.parse(text, Loader=_yaml_loader()):
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_):
                raise _RefusedError(f"the alias {quoted(event.anchor)} stands inside of what it names")
            values += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
        _check_size(values, MOST_YAML_VALUES, len(open_))


def _check_size(values: int, most: int, depth: int) -> None:
    if values > most:
        raise _RefusedError(f"holds more than {most:,} values")
    if depth > MOST_DEPTH:
        raise _RefusedError(f"is nested deeper than {MOST_DEPTH} levels")


def _check_plain(data: Any) -> None:
    """Refuse what no later stage could take: depth, numbers and text that cannot be written again, keys that are no text."""
    rest: list[tuple[Any, int]] = [(data, 0)]
    while rest:
        value, depth = rest.pop()
        if isinstance(value, str):
            if not value.isascii() and _SURROGATE.search(value):
                raise _RefusedError(f"holds half of a surrogate pair in {quoted(value)}, wanted Unicode text")
        elif isinstance(value, int):
            if not -_MOST_INTEGER < value < _MOST_INTEGER:
                raise _RefusedError("holds an integer of more than 64 bits")
        elif isinstance(value, dict | list):
            _check_size(0, 0, depth := depth + 1)
            if isinstance(value, dict):
                for key in value:
                    if not isinstance(key, str):
                        raise _RefusedError(f"has the key {quoted(key)}, a {type(key).__name__}, wanted text")
                    rest.append((key, depth))
            rest.extend((item, depth) for item in (value.values() if isinstance(value, dict) else value))


def parse_json(text: str, source: object, most: int | None = MOST_VALUES) -> Any:
    """Plain data of JSON.

    Args:
        source: for messages.
        most: values that it may hold, None for any number.
    Raises:
        CheckpointError: not JSON, a key that stands twice, more values or deeper than wanted, an integer of more than 64 bits.
    """
    try:
        if most is not None:  # before they are made; a comma in a text counts as one
            _check_size(text.count(",") + text.count("[") + text.count("{"), most, 0)
        data = json.loads(text, object_pairs_hook=_unique)
        _check_plain(data)
    except RecursionError:
        raise CheckpointError(f"{source}: is nested deeper than {MOST_DEPTH} levels.") from None
    except _RefusedError as error:
        raise CheckpointError(f"{source}: {error}.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{source}: not JSON: {error}.") from error
    except ValueError as error:  # Python's own limit of digits
        raise CheckpointError(f"{source}: holds an integer of more than 64 bits.") from error
    return data


def _parse_yaml(text: str, source: object) -> Any:
    import yaml

    try:
        _check_yaml(text)
        data = yaml.load(text, Loader=_yaml_loader())
        _check_plain(data)
    except _RefusedError as error:
        raise CheckpointError(f"{source}: {error}.") from None
    # A scalar with a tag that it does not fit (`!!int x`) raises whatever Python's own conversion does.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source}: not plain YAML: {one_line(error)}.") from error
    return data


def _pieces(file: BinaryIO, most: int) -> Iterator[bytes]:
    """A file bit by bit, until at least `most` bytes have come."""
    while most > 0 and (piece := file.read(min(most, 1 << 20))):
        most -= len(piece)
        yield piece


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file of at most `MOST_BYTES`.

    Raises:
        CheckpointError: not there, larger, or not UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            # A read of so many bytes would set as many aside; a pipe has no size to ask for.
            size = os.fstat(file.fileno()).st_size
            raw = file.read(size + 1) if 0 < size <= MOST_BYTES else b"".join(_pieces(file, MOST_BYTES + 1))
        if len(raw) > MOST_BYTES:
            raise CheckpointError(f"{path}: is larger than {MOST_BYTES >> 20} MiB.")
        return raw.decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(no_such("file", path)) from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, wanted a file.") from None
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, a NUL in the name
        raise CheckpointError(f"{path}: cannot be read as text ({error}).") from error


def check_files_beside(folder: str | os.PathLike[str]) -> None:
    """Before a library reads the small files of a folder, each of them whole: configs, a tokenizer, templates.

    Raises:
        CheckpointError: one is no regular file, or larger than `MOST_BYTES`.
    """
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if TOKENIZER_FILES.fullmatch(e.name) or _CONFIGS.fullmatch(e.name))
    for path in (Path(folder, name) for name in names):
        mode = mode_of(path)
        if stat.S_ISDIR(mode) and path.name in _FOLDERS:
            continue
        if mode and not stat.S_ISREG(mode):
            raise CheckpointError(
                f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}, wanted a file."
            )
        if mode and path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path}: is larger than {MOST_BYTES >> 20} MiB.")


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping of plain data; YAML by the safe loader only.

    Raises:
        CheckpointError: not there, empty, cannot be parsed (a YAML tag that asks for an object included), no mapping, a key
            that stands twice or is no text, more or deeper than the limits above.
    """
    text = read_text(path)
    if not text.strip():
        raise CheckpointError(f"{path}: the file is empty.")
    yaml = os.fspath(path).endswith((".yaml", ".yml"))
    data = _parse_yaml(text, path) if yaml else parse_json(text, path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, wanted a mapping.")
    return data


def record_of(path: str | os.PathLike[str]) -> str:
    """What a JSON or YAML file is, in words: `a plan, which `plan` writes`, or `a file of settings or rows`."""
    try:
        kind = read_mapping(path).get("record")
    except CheckpointError:
        kind = None
    return _KINDS.get(str(kind), "a file of settings or rows")
