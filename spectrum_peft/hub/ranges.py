"""Bytes of a file of a commit, by HTTP ranges: a broken connection goes on where it broke, a changed file is refused."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from ..errors import HubError, one_line
from .asking import HubFile, Snapshot, asked, transport_error

# Connections in a row that may fail before a byte comes. The first waits follow the least that huggingface_hub waits.
_TRIES, _FIRST_WAIT, _LONGEST_WAIT = 6, 0.25, 8.0


# Set by who reads in a thread of its own: what ends its reading, in the middle of a file or of a wait.
STOP: ContextVar[threading.Event | None] = ContextVar("STOP", default=None)


class _Pieces:
    """Buffers one behind the other that are filled in order, each made when its first byte comes and handed on with its last.

    Attributes:
        left: bytes that are still to come.
    """

    def __init__(self, sizes: Sequence[int], filled: Callable[[bytearray], object]) -> None:
        self.left = sum(sizes)
        self._sizes, self._filled = deque(sizes), filled
        self._buffer: bytearray | None = None
        self._at = 0
        self._pass_on()

    def write(self, came: bytes) -> None:
        rest = memoryview(came)
        self.left -= len(rest)
        while len(rest):
            self._buffer = bytearray(self._sizes[0]) if self._buffer is None else self._buffer
            count = min(len(rest), len(self._buffer) - self._at)
            self._buffer[self._at : self._at + count] = rest[:count]
            self._at, rest = self._at + count, rest[count:]
            self._pass_on()

    def _pass_on(self) -> None:
        while self._sizes and self._at == self._sizes[0]:  # several where some are empty
            size, buffer = self._sizes.popleft(), self._buffer
            self._buffer, self._at = None, 0
            self._filled(bytearray(size) if buffer is None else buffer)


class RangeReader:
    """The files of one commit. Safe to use from several threads.

    Attributes:
        received: bytes of files that came, headers and repeated ones included.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.received = 0
        self._lock = threading.Lock()

    def read(self, name: str, begin: int, end: int) -> bytearray:
        """What the file `name` holds from byte `begin` up to byte `end`; as `read_run`."""
        found: list[bytearray] = []
        self.read_run(name, begin, [end - begin], found.append)
        return found[0]

    def read_run(self, name: str, begin: int, sizes: Sequence[int], filled: Callable[[bytearray], object]) -> None:
        """Pieces of a file that lie one behind the other from byte `begin` on, by one request.

        Args:
            sizes: bytes of each. filled: is handed each as soon as it has come, in order; it must not raise.
        Raises:
            HubError: no access; the file is not the one that the commit listed; ranges are ignored; nothing comes any more.
        """
        pieces = _Pieces(sizes, filled)
        failures = 0
        stop = STOP.get() or threading.Event()
        end = begin + pieces.left
        while pieces.left:
            where, at = f"{self.snapshot.repo_id}/{name}", end - pieces.left
            if stop.is_set():
                raise HubError(f"{where}: reading was stopped at byte {at}.")
            problem = self._once(name, at, pieces)
            if problem is None:
                continue
            failures = 0 if end - pieces.left > at else failures + 1
            if failures == _TRIES:
                raise HubError(
                    f"{where}: the connection broke {failures} times in a row at byte {at} ({problem}); what was scored is kept, "
                    "the same command goes on from there."
                )
            if failures:
                stop.wait(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (failures - 1)))

    def _once(self, name: str, begin: int, pieces: _Pieces) -> str | None:
        """One request for all that is left: why it ended early, or None."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        snapshot, file = self.snapshot, self.snapshot.files[name]
        end = begin + pieces.left
        kind = None if snapshot.kind == "model" else snapshot.kind
        url = hf_hub_url(snapshot.repo_id, name, revision=snapshot.commit, repo_type=kind)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        problem = None
        with (
            asked(snapshot.repo_id, snapshot.commit, snapshot.kind),
            http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
        ):
            hf_raise_for_status(response)
            self._check(response, name, file, begin, end)
            # An error must not leave this block: huggingface_hub would take it for one of the connection's beginning.
            try:
                for came in response.iter_raw():
                    if (stop := STOP.get()) and stop.is_set():
                        problem = "stopped"
                        break
                    if len(came) > pieces.left:
                        problem = "more bytes than were asked for"
                        break
                    with self._lock:
                        self.received += len(came)
                    pieces.write(came)
            except HfHubHTTPError:
                raise
            except transport_error() as error:
                problem = one_line(error) or type(error).__name__
        return problem or ("the answer ended early" if pieces.left else None)

    def _check(self, response: Any, name: str, file: HubFile, begin: int, end: int) -> None:
        """
        Raises:
            HubError: this is not that range of that file.
        """
        where = f"{self.snapshot.repo_id}/{name}"
        answers = [*response.history, response]
        commit = next((c for a in answers if (c := a.headers.get("X-Repo-Commit"))), self.snapshot.commit)
        if commit != self.snapshot.commit:
            raise HubError(f"{where}: the hub answers with commit {commit}, wanted {self.snapshot.commit}.")
        # Where the file itself comes from, another server with etags of its own, the hub's answer before says it.
        etag = next((e for a in answers if (e := a.headers.get("X-Linked-Etag"))), answers[0].headers.get("ETag"))
        if etag is not None and etag.removeprefix("W/").strip('"') != file.etag:
            raise HubError(
                f"{where}: its etag is {etag}, wanted {file.etag} as commit {self.snapshot.commit[:12]} lists it: the file "
                "changed, or another one is sent; nothing of it is used. Scan again."
            )
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise HubError(f"{where}: the server sends it as {encoding}, wanted its bytes as they are.")
        if response.status_code == 200 and (begin, end) == (0, file.size):
            return
        if response.status_code != 206:
            raise HubError(
                f"{where}: the server ignores ranges (status {response.status_code}, wanted 206), so one tensor cannot be read "
                "alone: fetch the files (download=True)."
            )
        said, wanted = response.headers.get("Content-Range"), f"bytes {begin}-{end - 1}/{file.size}"
        if said != wanted:
            raise HubError(f"{where}: the server sends the range {said!r}, wanted {wanted!r}.")
