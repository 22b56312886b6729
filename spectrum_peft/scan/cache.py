"""Where results are kept, and those of a scan that may be killed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from pathlib import Path
from typing import TextIO

import torch

from ..weights import WeightSource
from .criteria import Criterion, MatrixScore

logger = logging.getLogger(__name__)

# Goes into the key of stored results: to be raised when a criterion's numbers change.
_CACHE_VERSION = 1


def cache_folder() -> Path:
    """`$SPECTRUM_PEFT_CACHE`, else `spectrum_peft` in the user's cache folder."""
    own = os.environ.get("SPECTRUM_PEFT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectrum_peft"


def result_key(source: WeightSource, row: Criterion, device: torch.device) -> str:
    """sha256 over all that a matrix's result depends on."""
    return hashlib.sha256(json.dumps([_CACHE_VERSION, source.identity(), row.name, device.type]).encode()).hexdigest()


class PartialResults:
    """One line of JSON per scored matrix, appended as it is done; what a killed scan left is read first.

    A cache folder that cannot be written costs the resumption, not the scan: it is logged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, MatrixScore] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> PartialResults:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                for line in self.path.read_text(encoding="utf-8").splitlines():
                    self._take(line)
            self._file = self.path.open("a", encoding="utf-8")
            # The kill may have come in the middle of a line.
            self._file.write("\n" if self._file.tell() else "")
        except OSError as error:
            logger.warning(
                "a killed scan could not be resumed: %s cannot be written (%s)", self.path, error.strerror or error
            )
        return self

    def _take(self, line: str) -> None:
        try:
            name, value, n_signal, s_max, alpha = json.loads(line)
        except ValueError:  # the last line of a killed scan, or the empty one after it: that matrix is scored again
            return
        self.results[name] = MatrixScore(float(value), n_signal, s_max, alpha)

    def add(self, name: str, result: MatrixScore) -> None:
        self.results[name] = result
        if self._file:
            value = "inf" if math.isinf(result.score) else result.score
            self._file.write(json.dumps([name, value, result.n_signal, result.s_max, result.power_law]) + "\n")
            self._file.flush()

    def completed(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
            self.path.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
