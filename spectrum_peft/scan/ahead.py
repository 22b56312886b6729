"""Tensors that are fetched while others are scored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..hub import STOP
from ..weights.neighbours import Group

# Connections side by side: one seldom fills a line.
_CONNECTIONS = 4


class Ahead:
    """Reads tensors in the order in which they will be asked for; `with` stops it.

    Args:
        read: gives a tensor by its name. groups: what is fetched together, in order. sizes: {name: bytes}.
        budget: bytes of tensors that are being fetched or wait to be taken; the next group is fetched whatever its size.
        fetched: called with the size of each tensor that has come.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        groups: Sequence[Group],
        sizes: Mapping[str, int],
        budget: int,
        fetched: Callable[[int], object],
    ) -> None:
        self._read, self._budget, self._fetched = read, budget, fetched
        self._todo = [(group, sum(sizes[name] for name in group.names)) for group in reversed(groups)]
        self._sizes = sizes
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

    def _next(self) -> Group | None:
        with self._changed:
            while (
                not self._stop.is_set() and self._todo and self._held and self._held + self._todo[-1][1] > self._budget
            ):
                self._changed.wait()
            if self._stop.is_set() or not self._todo:
                return None
            group, size = self._todo.pop()
            self._held += size
            return group

    def _fetch(self) -> None:
        STOP.set(self._stop)
        while (group := self._next()) is not None:
            came: set[str] = set()

            def arrived(name: str, came: set[str] = came) -> None:
                came.add(name)
                try:
                    self._put(name, self._read(name))
                except Exception as error:  # raised where the tensor is asked for
                    self._put(name, error)

            try:
                group.fetch(arrived)
            except Exception as error:
                for name in group.names:
                    if name not in came:
                        self._put(name, error)

    def _put(self, name: str, found: Tensor | Exception) -> None:
        with self._changed:
            if self._stop.is_set():
                return
            self._ready[name] = found
            self._changed.notify_all()
        self._fetched(self._sizes[name])

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
