"""Reports and plans in a repository: where they are put, and how one is found by model, commit and criterion."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import HubError, OptionError, near_matches
from .asking import Snapshot, is_commit, is_hub_id

_NO_COMMIT = re.compile(r"content-[0-9a-f]{12}|unknown")


@dataclass(frozen=True)
class Place:
    """Where a record is kept: `FOLDER/ORG--MODEL/COMMIT/NAME`.

    Attributes:
        model: hub id of the model that it is of. state: the commit of the model; `content-` and the beginning of the
            fingerprint for one that has none; `unknown`. name: of the file.
    """

    folder: str
    model: str
    state: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.model.replace('/', '--')}/{self.state}/{self.name}"


def place(folder: str, model: str | None, commit: str | None, content: str | None, name: str) -> Place:
    """Where a record of a model goes.

    Raises:
        OptionError: the model is no hub id: nobody who finds the record could know what it is of.
    """
    if model is None or not is_hub_id(model):
        raise OptionError(
            f"model_id is {model!r}: a record on the hub is found by the hub id of its model, which this one does not say; "
            "give it as ORG/MODEL."
        )
    state = commit if commit is not None and is_commit(commit) else f"content-{content[:12]}" if content else "unknown"
    return Place(folder, model, state, name)


def places(snapshot: Snapshot, folder: str) -> list[Place]:
    """The records that a repository keeps in a folder."""
    found = []
    for path in snapshot.files:
        parts = path.split("/")
        if len(parts) == 4 and parts[0] == folder and (is_commit(parts[2]) or _NO_COMMIT.fullmatch(parts[2])):
            found.append(Place(folder, parts[1].replace("--", "/", 1), parts[2], parts[3]))
    return found


def the_one(found: Iterable[Place], repo_id: str, what: str, *, model: str, commit: str | None) -> Place:
    """The one place that is of a model, and of a commit of it if that is given.

    Raises:
        HubError: there is none. OptionError: there are several, which are named.
    """
    all_of_them = list(found)
    mine = [p for p in all_of_them if p.model == model]
    if commit is not None:
        mine = [p for p in mine if p.state == commit]
    if len(mine) == 1:
        return mine[0]
    if not mine:
        of = model + (f" at commit {commit}" if commit else "")
        others = {p.model for p in all_of_them}
        hint = near_matches(model, others) if model != repo_id else ""
        if model == repo_id and others:  # nobody said which model
            hint = f" It has those of {', '.join(sorted(others)[:4])}: name the model."
        kept = sorted({p.state for p in all_of_them if p.model == model})
        there = f" It has those of {', '.join(kept[:4])}." if kept else hint
        raise HubError(f"{repo_id}: has no {what} of {of}.{there}")
    shown = ", ".join(sorted(p.path for p in mine)[:6])
    raise OptionError(
        f"{repo_id}: has {len(mine)} of {model}, wanted one: {shown}. Name one by its file, or its commit."
    )
