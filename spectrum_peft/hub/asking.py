"""Which commit a revision is, which files it has, and what the hub's refusals mean."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from ..errors import HubError, near_here, one_line, quoted

Kind = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Answers that pass: too many requests, and a server that is busy or being restarted.
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_TRIES, _LONGEST_WAIT = 5, 300.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class HubFile:
    """A file of a commit.

    Attributes:
        size: bytes. etag: what the hub calls its content: the sha256 of a large file, the id of git's blob of another.
    """

    size: int
    etag: str


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository.

    Attributes:
        commit: 40 hex digits. files: by path in the repository.
    """

    repo_id: str
    commit: str
    files: Mapping[str, HubFile]
    kind: Kind = "model"


def offline() -> bool:
    """Whether huggingface_hub was told not to ask (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_hub_id(text: str) -> bool:
    """Whether a text has the form ORG/NAME."""
    return _HUB_ID.fullmatch(text) is not None and len(text) <= 200


# Endings of files that people name, and that no repository of a model or of rows has.
_FILES = re.compile(r"\.(json|jsonl|ya?ml|csv|parquet|txt|gguf|safetensors|bin|pt|pth|ckpt|pkl|py)$", re.IGNORECASE)


def may_be_id(text: str) -> bool:
    """Whether a text could be meant for the hub: ORG/NAME, or the one word of some old repositories, and no file's name."""
    return (is_hub_id(text) or is_hub_id(f"x/{text}")) and not _FILES.search(text)


def resolve(repo_id: str, revision: str | None = None, kind: Kind = "model") -> Snapshot:
    """The commit that a branch, a tag or nothing (the main branch) stands for now, and its files: one request.

    Raises:
        HubError: offline, not reached, no such repository or revision, no access.
    """
    from huggingface_hub import HfApi

    with asked(repo_id, revision, kind):
        info = patiently(
            lambda: HfApi().repo_info(repo_id, revision=revision, repo_type=kind, files_metadata=True, timeout=30)
        )
    files = {
        s.rfilename: HubFile(s.size or 0, str(s.lfs["sha256"] if s.lfs else s.blob_id)) for s in info.siblings or ()
    }
    if info.sha is None:
        raise HubError(f"{repo_id}: the hub names no commit for {revision or 'its main branch'}.")
    return Snapshot(repo_id, info.sha, files, kind)


def small_file(snapshot: Snapshot, name: str) -> Path:
    """A file of the commit, through the hub's own cache.

    Raises:
        HubError: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    with asked(snapshot.repo_id, snapshot.commit, snapshot.kind):
        return Path(
            patiently(
                lambda: hf_hub_download(snapshot.repo_id, name, revision=snapshot.commit, repo_type=snapshot.kind)
            )
        )


def cached_file(repo_id: str, name: str, commit: str, kind: Kind = "model") -> Path | None:
    """A file of a commit that the hub's cache holds; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name, revision=commit, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def transport_error() -> type[Exception]:
    """The base of what the client raises where a connection fails; another library's in other versions of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def patiently(call: Callable[[], _T]) -> _T:
    """What a call returns, tried again where the hub is busy (for as long as it says) or a connection fails.

    huggingface_hub does this itself for files, not for what it is told about a repository.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import parse_ratelimit_headers

    for attempt in range(_TRIES):
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in _PASSING or attempt == _TRIES - 1:
                raise
            said = error.response.headers.get("Retry-After", "")
            window = parse_ratelimit_headers(error.response.headers)
            wait = float(said) + 0.5 if said.isascii() and said.isdecimal() else 0.5 * 2**attempt
            if window is not None and window.remaining == 0:
                wait = window.reset_in_seconds + 0.5
        except transport_error():
            if attempt == _TRIES - 1:
                raise
            wait = 0.5 * 2**attempt
        time.sleep(min(wait, _LONGEST_WAIT))
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def asked(repo_id: str, revision: str | None = None, kind: Kind = "model") -> Iterator[None]:
    """Around requests about a repository: huggingface_hub's errors become ours, one for each thing that a user can do.

    Raises:
        HubError: says what the hub refuses and what helps.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    name = f"{repo_id!r}" if kind == "model" else f"the dataset {repo_id!r}"
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except HubError:
        raise
    except hub.HFValidationError as error:
        raise HubError(f"{quoted(repo_id)} is neither a file, a folder nor a hub id: {one_line(error)}") from error
    except hub.OfflineModeIsEnabled as error:
        raise HubError(f"{name}{at} is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask the hub.") from error
    except hub.GatedRepoError as error:
        token = (
            "the token that was sent has no access" if get_token() else "no token was sent (hf auth login, HF_TOKEN)"
        )
        raise HubError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{repo_id} and log in; {token}."
        ) from error
    except hub.DisabledRepoError as error:
        raise HubError(f"{name} is disabled on the hub; nobody can read it.") from error
    except hub.RepositoryNotFoundError as error:
        if get_token():
            raise HubError(
                f"{name}: no such file or folder here, and the hub has no such repository, or it is private and the token "
                "that was sent may not read it."
            ) from error
        raise HubError(
            f"{name}: no such file or folder here, and the hub shows no such repository to who is not logged in: it is "
            f"missing, or private (hf auth login, HF_TOKEN).{near_here(repo_id)}"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise HubError(f"{name}: the hub has no revision {revision!r} of it.") from error
    except hub.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE forbids to ask the hub" if offline() else "the hub cannot be reached"
        raise HubError(
            f"{name}{at}: no such file or folder here, not in the hub's cache, and {why}.{near_here(repo_id)}"
        ) from error
    except hub.EntryNotFoundError as error:
        raise HubError(f"{name}{at}: {one_line(error)[:300]}") from error
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        what = {
            401: "it takes the token for invalid (hf auth login, HF_TOKEN)",
            403: "the token may not do this",
            429: "too many requests; it was waited for as long as it asked for, several times",
        }.get(status, one_line(error)[:300])
        raise HubError(f"{name}{at}: the hub refuses ({status}): {what}.") from error
    except (transport_error(), OSError) as error:
        if type(error).__name__ == "TooManyRedirects":
            raise HubError(f"{name}{at}: the hub at {constants.ENDPOINT} redirects in a circle.") from error
        raise HubError(
            f"{name}{at}: no such file or folder here, not in the hub's cache, and the hub cannot be reached "
            f"({constants.ENDPOINT}: {one_line(error)[:200]}).{near_here(repo_id)}"
        ) from error
