"""What a file may say: types of fields with their limits, and one function that holds data to them.

msgspec checks plain data against the annotations of our dataclasses; docs/decisions.md says why it and not pydantic.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from ..errors import CheckpointError, OptionError, SpectrumError, quoted

T = TypeVar("T")
V = TypeVar("V")

# msgspec 0.22 frees the regex of a text once too often where a list or a mapping may stand in its place: `Name | list[Name]` ends
# the process. `Name` may stand inside of collections, and beside numbers and None.
# Names are printed, so that they hold nothing that a terminal obeys.
_SHOWN = r"^[^\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]*\Z"
Name = Annotated[str, Meta(min_length=1, max_length=500, pattern=_SHOWN)]
Text = Annotated[str, Meta(max_length=10_000)]
# A path or a hub id, which may be a long one.
Place = Annotated[str, Meta(max_length=4096)]

# 2^48 elements are 1 PB in float32; a sum of 2^16 of them is below 2^64.
Count = Annotated[int, Meta(ge=0, le=1 << 48)]
Shape = Annotated[tuple[Count, ...], Meta(max_length=8)]
MatrixShape = Annotated[tuple[Count, ...], Meta(min_length=2, max_length=8)]
# The largest side of a matrix of any open model is 2^18 or so; a rank above a quarter of it is no low rank.
MOST_RANK = 1 << 16
Rank = Annotated[int, Meta(ge=0, le=MOST_RANK)]
_MOST = 1.79e308
Finite = Annotated[int, Meta()] | Annotated[float, Meta(ge=-_MOST, le=_MOST)]
NotNegative = Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0.0, le=_MOST)]
Scale = Annotated[int, Meta(ge=0, le=10**9)] | Annotated[float, Meta(ge=0.0, le=1e9)]
# A likeness of two vectors, with what rounding may add to 1.
Likeness = Annotated[int, Meta(ge=-1, le=1)] | Annotated[float, Meta(ge=-1.001, le=1.001)]

_WORDS = {
    "object": "a mapping", "array": "a list", "int": "a whole number", "float": "a number", "str": "text",
    "bool": "true or false", "null": "nothing",
}  # fmt: skip
_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+)\]|\[(\.\.\.)\]")


def checked(data: Any, kind: type[T], source: object, error: type[SpectrumError] = CheckpointError) -> T:
    """Plain data as the type that it is wanted as; nothing is converted but lists to tuples and mappings to dataclasses.

    Args:
        source: for messages.
        error: that is raised.
    Raises:
        CheckpointError: a field is missing, of another type, or outside its limits; the first one is named with what was seen.
    """
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as problem:
        if isinstance(problem.__cause__, SpectrumError):
            raise error(f"{source}: {problem.__cause__}") from None
        raise error(f"{source}: {_in_words(str(problem), data)}") from None


@dataclasses.dataclass(frozen=True)
class Wanted(Generic[V]):
    """One value of a config file, or a keyword: its type with limits, and how a message says them.

    Text is read where a number or a truth is wanted: YAML takes 1e-4 for text.
    """

    kind: Any
    words: str

    def __call__(self, name: str, value: Any) -> V:
        """
        Raises:
            OptionError: the value is of another type, outside the limits, or NaN.
        """
        try:
            found: V = msgspec.convert(value, self.kind, strict=False)
        except msgspec.ValidationError:
            found = math.nan  # type: ignore[assignment]
        if found != found:
            raise OptionError(f"{name} is {quoted(value)}, wanted {self.words}.")
        return found


# What stands in a config file where a flag takes one value; numbers may be infinite (`max_grad_norm`).
REAL = Wanted[float](float, "a number")
WHOLE = Wanted[int](Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)], "int")
TRUTH = Wanted[bool](bool, "true or false")
SCALAR = Wanted[Any](
    Annotated[str, Meta(max_length=10_000)] | int | float | bool, "a single value of at most 10,000 characters"
)
WORD = Wanted[str](Annotated[str, Meta(min_length=1, max_length=4096)], "a name")
MOST_LISTED = 10_000


def number_within(above: float, at_most: float | None = None, whole: bool = False) -> Wanted[Any]:
    """A number above one bound and at most another; whole ones may be asked for."""
    words = f"a{' whole' if whole else ''} number above {above:g}" + (f", at most {at_most:g}" if at_most else "")
    most = at_most or ((1 << 63) - 1 if whole else _MOST)
    return Wanted(Annotated[int if whole else float, Meta(gt=above, le=most)], words)


def listed(value: Any, name: str) -> list[Any]:
    """A list, or a single value as a list of one.

    Raises:
        OptionError: it is empty, or too long.
    """
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not 0 < len(items) <= MOST_LISTED:
        seen = "an empty list" if not items else f"a list of {len(items):,} values"
        raise OptionError(
            f"{name} is {seen}, wanted at least one value{f', at most {MOST_LISTED:,}' if items else ''}."
        )
    return items


def _in_words(said: str, data: Any) -> str:
    """What msgspec says, in the words of a user who sees the file: the place, what stands there, what was wanted."""
    what, _, where = said.partition(" - at `")
    in_key = where.startswith("key` in `")
    path = where.removeprefix("key` in `").rstrip("`").removeprefix("$")
    place, value, known = path.lstrip("."), data, not in_key
    for field, index, anywhere in _STEP.findall(path):
        known = known and not anywhere
        if known:
            value = value[int(index)] if index else value[field]
    missing = re.search(r"missing required field `(.*)`", what)
    if missing:
        return f"{place + ': ' if place else ''}field {missing[1]!r} is missing."
    if in_key:
        return f"a key of {place or 'the mapping'} is not what it should be: {_wanted(what)}."
    if what.startswith("Invalid enum value"):
        return f"{place} is {quoted(value)}, which is none of those that are known."
    seen = f"is {quoted(value)}" if known else "holds a value of another kind"
    return f"{place or 'it'} {seen}, wanted {_wanted(what)}."


def _wanted(what: str) -> str:
    what = re.sub(r" matching regex .*", " without control characters", what, flags=re.DOTALL)
    what = what.removeprefix("Expected ").partition(", got")[0].replace("int | float", "float")
    kinds = re.sub(r"`([^`]*)`", lambda m: " or ".join(_WORDS.get(k, k) for k in m[1].split(" | ")), what)
    return kinds.replace(" >= ", " of at least ").replace(" <= ", " of at most ").replace(" > ", " above ")


def refuse_unknown(cls: type[Any], rows: Iterable[Mapping[str, Any]], where: str, also: Iterable[str] = ()) -> None:
    """
    Raises:
        CheckpointError: a row has a field that the dataclass lacks: another version's, or misspelt.
    """
    known = {f.name for f in dataclasses.fields(cls)} | set(also)
    for i, row in enumerate(rows):
        for name in row:
            if name not in known:
                raise CheckpointError(f"{where.format(i)}: unknown field {quoted(name)}, known are {sorted(known)}.")
