"""Tensors that are fetched while others are scored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from ..hub import STOP

# Connections side by side: one seldom fills a line.
_CONNECTIONS = 4


class Ahead:
    """Reads tensors in the order in which they will be asked for; `with` stops it.

    Args:
        read: gives a tensor by its name. names: in order. sizes: bytes of each.
        budget: bytes of tensors that are being fetched or wait to be taken; the next one is fetched whatever its size.
        fetched: called with the size of each tensor that has come.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        names: Sequence[str],
        sizes: Sequence[int],
        budget: int,
        fetched: Callable[[int], object],
    ) -> None:
        self._read, self._budget, self._fetched = read, budget, fetched
        self._todo = list(zip(names, sizes, strict=True))[::-1]
        self._sizes = dict(self._todo)
        self._held = 0
        self._ready: dict[str, Tensor | Exception] = {}
        self._changed = threading.Condition()
        self._stop = threading.Event()
        # Not waited for: one that hangs on a dead connection must not hold up the end of a scan.
        self._threads = [
            threading.Thread(target=self._fetch, name=f"ahead-{i}", daemon=True) for i in range(_CONNECTIONS)
        ]

    def __enter__(self) -> Ahead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stop.set()
            self._ready.clear()
            self._changed.notify_all()

    def _next(self) -> tuple[str, int] | None:
        with self._changed:
            while (
                not self._stop.is_set() and self._todo and self._held and self._held + self._todo[-1][1] > self._budget
            ):
                self._changed.wait()
            if self._stop.is_set() or not self._todo:
                return None
            name, size = self._todo.pop()
            self._held += size
            return name, size

    def _fetch(self) -> None:
        STOP.set(self._stop)
        while (todo := self._next()) is not None:
            name, size = todo
            found: Tensor | Exception
            try:
                found = self._read(name)
            except Exception as error:  # raised where the tensor is asked for
                found = error
            with self._changed:
                if self._stop.is_set():
                    return
                self._ready[name] = found
                self._changed.notify_all()
            self._fetched(size)

    def take(self, name: str) -> Tensor:
        """A tensor, once, as soon as it is there.

        Raises:
            Exception: what reading it raised.
        """
        with self._changed:
            while name not in self._ready and not self._stop.is_set():
                self._changed.wait()
            if self._stop.is_set():
                raise RuntimeError("the scan was stopped")
            found = self._ready.pop(name)
            self._held -= self._sizes[name]
            self._changed.notify_all()
        if isinstance(found, Exception):
            raise found
        return found
