"""Where results are kept, and those of a scan that may be killed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from ..errors import CheckpointError, OptionError, near_matches, one_line
from ..records import SnrReport, is_stream
from ..weights import WeightSource
from .criteria import Criterion, MatrixScore
from .only import Only

logger = logging.getLogger(__name__)

# Goes into the key of stored results: to be raised when a criterion's numbers change.
_CACHE_VERSION = 3


# Folders of the cache: the demo's model, scans that were cut off, finished ones, decompositions.
KINDS = ("models", "partial", "reports", "svd")


def cache_folder() -> Path:
    """`$SPECTRUM_PEFT_CACHE`, else `spectrum_peft` in the user's cache folder."""
    own = os.environ.get("SPECTRUM_PEFT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectrum_peft"


def cache_sizes() -> dict[str, int]:
    """Bytes that are kept, by kind: those folders of `cache_folder()` that `KINDS` names; another one is not ours."""
    kinds = [path for kind in KINDS if (path := cache_folder() / kind).is_dir()]
    return {kind.name: sum(f.stat().st_size for f in kind.rglob("*") if f.is_file()) for kind in kinds}


def clear_cache(kinds: Iterable[str] = ()) -> None:
    """Remove what is kept of some kinds, of all for none.

    Raises:
        OptionError: nothing of such a kind is kept; its folder is a link.
    """
    known = cache_sizes()
    for kind in kinds:
        if kind not in known:
            raise OptionError(f"{kind!r} is not kept in {cache_folder()}." + near_matches(kind, known))
    for kind in list(kinds) or known:
        path = cache_folder() / kind
        if path.is_symlink():
            raise OptionError(f"{path}: is a link, to {path.resolve()}; remove what is kept there yourself.")
        shutil.rmtree(path)


def result_key(source: WeightSource, row: Criterion, device: torch.device) -> str:
    """sha256 over all that a matrix's result depends on."""
    return key_of(source.identity(), row, device)


def key_of(identity: str, row: Criterion, device: torch.device) -> str:
    return hashlib.sha256(json.dumps([_CACHE_VERSION, identity, row.name, device.type]).encode()).hexdigest()


# --- finished scans --------------------------------------------------------------------------------------------------


def kept_file(key: str, roles: Sequence[str], limits: Only) -> Path:
    """Where a finished scan is kept."""
    part = "" if not limits else "-" + hashlib.sha256(str(limits).encode()).hexdigest()[:12]
    return cache_folder() / "reports" / f"{key}-{'-'.join(roles) or 'none'}{part}.json"


def keep(report: SnrReport, path: Path) -> None:
    try:
        report.save(path)
    except CheckpointError as error:
        logger.warning("the finished scan could not be kept: %s", error)


def kept_results(
    path: Path, criterion: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, MatrixScore], str | None] | None:
    """The results in a kept report, if it has one for each matrix that is wanted and nothing else; its fingerprint's content.

    Only what a scan computes is taken; names, shapes and the rest are the checkpoint's to say.

    Args:
        shapes: of the matrices that are wanted, by name.
    Returns:
        None where there is no such file, or where it cannot be believed, which is logged: it will be written again.
    """
    if not path.is_file():
        return None
    try:
        report: SnrReport = SnrReport.load(path)
    except CheckpointError as error:
        logger.warning("the kept scan is not used: %s", error)
        return None
    stats = {s.name: s for s in report.stats if s.score is not None}
    found = {
        s.name: MatrixScore(s.score, s.n_signal, s.s_max, s.power_law) for s in stats.values() if s.score is not None
    }
    problem = None
    if report.criterion != criterion:
        problem = f"criterion is {report.criterion!r}, wanted {criterion!r}"
    elif found.keys() != shapes.keys():
        name = min(found.keys() ^ shapes.keys())
        problem = f"has scores of {len(found)} matrices, wanted {len(shapes)}; {name} is in one of them only"
    else:
        for name, shape in shapes.items():
            if stats[name].shape != shape:
                problem = f"{name}: shape is {stats[name].shape}, wanted {shape}"
            elif not is_plausible(found[name], shape):
                problem = f"{name}: {found[name]} is no result of a matrix of shape {shape}"
    if problem:
        logger.warning("the kept scan is not used: %s: %s", path, problem)
        return None
    return found, report.fingerprint.content


def is_plausible(result: MatrixScore, shape: tuple[int, ...]) -> bool:
    """Whether these are numbers that a matrix of this shape may have."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    signal, largest, exponent = result.n_signal, result.s_max, result.power_law
    least = min(shape) if len(shape) > 1 else 1
    return (
        number(result.score)
        and result.score >= 0
        and (signal is None or (type(signal) is int and 0 <= signal <= least))
        and (largest is None or (number(largest) and 0 <= largest < math.inf))
        and (exponent is None or (number(exponent) and exponent > 1))
    )


# --- scans that were stopped -----------------------------------------------------------------------------------------


class PartialResults:
    """One line of JSON per scored matrix, appended as it is done; what a killed scan left is read first.

    A cache folder that cannot be written costs the resumption, not the scan: it is logged. A line that is cut off, or whose
    numbers are none of its matrix, is passed over: that matrix is scored again.

    Args:
        shapes: of the matrices that are wanted, by name.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self._shapes = shapes
        self.results: dict[str, MatrixScore] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> PartialResults:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if is_stream(self.path):
                raise OSError("it is a device or a pipe")
            if self.path.is_file():
                for line in self.path.read_text(encoding="utf-8").splitlines():
                    self._take(line)
            self._file = self.path.open("a", encoding="utf-8")
            # The kill may have come in the middle of a line.
            self._file.write("\n" if self._file.tell() else "")
        except (OSError, ValueError) as error:  # ValueError: what is there is no text
            self._give_up(error)
        return self

    def _take(self, line: str) -> None:
        try:
            name, value, n_signal, s_max, alpha = json.loads(line)
            result = MatrixScore(float(value), n_signal, s_max, alpha)
        except (ValueError, TypeError, RecursionError):  # cut off by a kill, or the empty line after it, or damaged
            return
        # Of other roles than those that this scan was asked for, perhaps: not wanted now.
        if isinstance(name, str) and name in self._shapes and is_plausible(result, self._shapes[name]):
            self.results[name] = result

    def add(self, name: str, result: MatrixScore) -> None:
        self.results[name] = result
        if self._file:
            value = "inf" if math.isinf(result.score) else result.score
            try:
                self._file.write(json.dumps([name, value, result.n_signal, result.s_max, result.power_law]) + "\n")
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("a killed scan could not be resumed: %s cannot be used (%s)", self.path, one_line(error))
        self._close()

    def _close(self) -> None:
        if self._file:
            with suppress(OSError):  # what is left in its buffer finds no room
                self._file.close()
            self._file = None

    def completed(self) -> None:
        self._close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        self._close()
