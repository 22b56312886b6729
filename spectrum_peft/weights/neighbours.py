"""Which tensors come over a network together: neighbours in a file, by one request.

A mixture that stores a tensor for each expert has thousands of small ones, side by side; how they are put together in the
model's parameters is another order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import FileWeights
from .remote import HubShards
from .source import SAMPLE, WeightSource

_MOST = 64 << 20  # bytes of a request for more than one tensor
_SMALL = 2 * SAMPLE  # bytes between two tensors that may come along: of tensors that the fingerprint asks for anyway

Range = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Tensors that are fetched together.

    Attributes:
        names: in the order in which they come.
        fetch: asks for them, and calls what it is given with each name as soon as the tensor can be read without asking.
    """

    names: tuple[str, ...]
    fetch: Callable[[Callable[[str], object]], object]


@dataclass
class _Run:
    """Bytes of a file without a hole, and the tensors that are complete with the end of a range.

    Attributes:
        path: None for one tensor that is read by itself, whatever that takes.
    """

    path: Path | None
    ranges: list[Range]
    names: dict[int, list[str]]  # by the end of the last range

    @property
    def size(self) -> int:
        return self.ranges[-1][1] - self.ranges[0][0]

    def extended(self, other: _Run, between: Sequence[Range]) -> _Run:
        return _Run(self.path, [*self.ranges, *between, *other.ranges], {**self.names, **other.names})


def groups_of(source: WeightSource, names: Sequence[str], small: bool) -> list[Group]:
    """Tensors in groups; of files on the hub in the order of their bytes.

    Args:
        names: as `source.read` takes them. small: whether small tensors between them may come along.
    """
    if not isinstance(source, FileWeights) or not isinstance(source.shards, HubShards):
        return [_alone(name) for name in names]
    found: list[_Run] = []
    spans = {path: [(s.begin, s.end) for s in source.spans(path).values()] if small else [] for path in source.files}
    for run in _runs(source, names, spans):
        last = found[-1] if found else None
        if last is not None and last.path is not None and last.path == run.path:
            between = _between(last.ranges[-1][1], run.ranges[0][0], spans[last.path])
            if between is not None and run.ranges[-1][1] - last.ranges[0][0] <= _MOST:
                found[-1] = last.extended(run, between)
                continue
        found.append(run)
    return [_group(source.shards, run) for run in found]


def _runs(source: FileWeights, names: Sequence[str], spans: dict[Path, list[Range]]) -> Iterator[_Run]:
    """The tensors in the order of their bytes, those that lie among each other's, an expert's gate and up around its down,
    as one."""
    where = {name: source.ranges(name) for name in names}
    first = {
        name: min((str(path), begin) for path, begin, _ in ranges) if ranges else ("", 0)
        for name, ranges in where.items()
    }
    members: list[str] = []
    end = 0

    def done() -> Iterator[_Run]:
        ranges = sorted({(begin, end) for name in members for _, begin, end in where[name]})
        paths = {path for name in members for path, _, _ in where[name]}
        filled = ranges[:1]
        for one in ranges[1:] if len(paths) == 1 else ():
            between = _between(filled[-1][1], one[0], spans[next(iter(paths))])
            if between is None:
                break
            filled += [*between, one]
        if len(paths) != 1 or filled[-1:] != ranges[-1:]:
            yield from (_Run(None, [], {0: [name]}) for name in members)
            return
        complete: dict[int, list[str]] = {}
        for name in members:
            complete.setdefault(max(end for _, _, end in where[name]), []).append(name)
        yield _Run(paths.pop(), filled, complete)

    for name in sorted(names, key=first.__getitem__):
        path, begin = first[name]
        if members and (path, begin) >= (first[members[0]][0], end):
            yield from done()
            members = []
        end = max([end if members else 0, *(last for place, _, last in where[name] if str(place) == path)])
        members.append(name)
    if members:
        yield from done()


def _between(begin: int, end: int, spans: Sequence[Range]) -> Sequence[Range] | None:
    """The small tensors that fill the bytes between two others; None where others do, or the two overlap."""
    if begin == end:
        return []
    if not begin < end <= begin + _SMALL:
        return None
    inside = spans[bisect_left(spans, (begin, begin)) : bisect_left(spans, (end, end))]
    return inside if inside and (inside[0][0], inside[-1][1]) == (begin, end) else None


def _alone(name: str) -> Group:
    return Group((name,), lambda arrived: arrived(name))


def _group(shards: HubShards, run: _Run) -> Group:
    names = [name for end in sorted(run.names) for name in run.names[end]]
    if run.path is None or (len(run.ranges) == 1 and len(names) == 1):
        return _alone(names[0])
    path, ranges = run.path, run.ranges

    def fetch(arrived: Callable[[str], object]) -> None:
        def each(i: int) -> None:
            for name in run.names.get(ranges[i][1], ()):
                arrived(name)

        shards.fetch(path, ranges, each)

    return Group(tuple(names), fetch)
