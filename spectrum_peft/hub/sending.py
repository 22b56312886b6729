"""Files into a repository, by one commit: what is there already is not sent again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import HubError, OptionError, quoted
from .asking import Kind, asked, is_hub_id, offline, patiently

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """What was sent.

    Attributes:
        commit: of the repository afterwards, 40 hex digits. url: of that commit. files: paths in the repository.
    """

    repo_id: str
    commit: str
    url: str
    files: tuple[str, ...]
    kind: Kind = "model"


def send(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    message: str,
    kind: Kind = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Sent:
    """Commit files to a repository, which is made where there is none; others that it holds stay.

    Large files go first, each by itself, and are found there when the same call is made again after it broke; the commit, and
    with it everything that a reader sees, comes last.

    Args:
        files: path in the repository -> file here, or bytes. repo_id: ORG/NAME.
        message: of the commit. private: of a repository that is made; None for the account's default.
        revision: branch that gets the commit, None for the main one. token: None for the stored one.
    Raises:
        OptionError: no such form of an id. HubError: offline, not logged in, no access, an upload that broke.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not is_hub_id(repo_id):
        raise OptionError(f"the repository to push to is {quoted(repo_id)}, wanted ORG/NAME.")
    if offline():
        raise HubError(f"{repo_id!r}: nothing is pushed, HF_HUB_OFFLINE forbids to ask the hub.")
    if (token or get_token()) is None:
        raise HubError(f"{repo_id!r}: nothing is pushed, nobody is logged in (hf auth login, or HF_TOKEN).")
    api = HfApi(token=token)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    with asked(repo_id, revision, kind):
        patiently(lambda: api.create_repo(repo_id, private=private, repo_type=kind, exist_ok=True))
        try:
            info = api.create_commit(repo_id, operations, commit_message=message, repo_type=kind, revision=revision)
        except (ValueError, RuntimeError) as error:  # of its own where a card or an upload is refused
            if isinstance(error, OSError):
                raise
            raise HubError(f"{repo_id!r}: {error}") from error
    return Sent(repo_id, info.oid, str(info.commit_url), tuple(files), kind)
