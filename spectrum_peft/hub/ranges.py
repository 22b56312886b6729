"""Bytes of a file of a commit, by HTTP ranges: a broken connection goes on where it broke, a changed file is refused."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

from ..errors import HubError, one_line
from .asking import HubFile, Snapshot, asked, transport_error

# Connections in a row that may fail before a byte comes. The first waits follow the least that huggingface_hub waits.
_TRIES, _FIRST_WAIT, _LONGEST_WAIT = 6, 0.25, 8.0


# Set by who reads in a thread of its own: what ends its reading, in the middle of a file or of a wait.
STOP: ContextVar[threading.Event | None] = ContextVar("STOP", default=None)


class RangeReader:
    """The files of one commit. Safe to use from several threads.

    Attributes:
        received: bytes of files that came, headers and repeated ones included.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.received = 0
        self._lock = threading.Lock()

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """Fill `view`, bytes, with what the file `name` holds from byte `begin` on.

        Raises:
            HubError: no access; the file is not the one that the commit listed; ranges are ignored; nothing comes any more.
        """
        done = failures = 0
        stop = STOP.get() or threading.Event()
        while done < len(view):
            if stop.is_set():
                raise HubError(f"{self.snapshot.repo_id}/{name}: reading was stopped at byte {begin + done}.")
            came, problem = self._once(name, begin + done, view[done:])
            done += came
            if problem is None:
                continue
            failures = 0 if came else failures + 1
            if failures == _TRIES:
                where = f"{self.snapshot.repo_id}/{name}"
                raise HubError(
                    f"{where}: the connection broke {failures} times in a row at byte {begin + done} ({problem}); what was "
                    "scored is kept, the same command goes on from there."
                )
            if failures:
                stop.wait(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (failures - 1)))

    def _once(self, name: str, begin: int, view: memoryview) -> tuple[int, str | None]:
        """One request: (bytes that came, why it ended early or None)."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        snapshot, file = self.snapshot, self.snapshot.files[name]
        end = begin + len(view)
        kind = None if snapshot.kind == "model" else snapshot.kind
        url = hf_hub_url(snapshot.repo_id, name, revision=snapshot.commit, repo_type=kind)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        done = 0
        problem = None
        with (
            asked(snapshot.repo_id, snapshot.commit, snapshot.kind),
            http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
        ):
            hf_raise_for_status(response)
            self._check(response, name, file, begin, end)
            # An error must not leave this block: huggingface_hub would take it for one of the connection's beginning.
            try:
                for piece in response.iter_raw():
                    if (stop := STOP.get()) and stop.is_set():
                        problem = "stopped"
                        break
                    if done + len(piece) > len(view):
                        problem = "more bytes than were asked for"
                        break
                    view[done : done + len(piece)] = piece
                    done += len(piece)
                    with self._lock:
                        self.received += len(piece)
            except HfHubHTTPError:
                raise
            except transport_error() as error:
                problem = one_line(error) or type(error).__name__
        return done, problem or (None if done == len(view) else "the answer ended early")

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
