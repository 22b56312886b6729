"""Records in repositories of the hub: pushed under their model, its commit and their criterion, and found again by these."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, ClassVar, Self

from .. import hub
from ..errors import CheckpointError
from .files import REPORT_FILE, Record
from .whole import mode_of

# What must not leave this machine: where things lie on it.
_LOCAL_PATH = re.compile(r"(?<![\w.])(?:~?/[\w.~-]+(?:/[\w.~-]*)+|[A-Za-z]:\\\S+)")


class SharedRecord(Record):
    """A record that says which weights it is of."""

    _folder: ClassVar[str]

    # The fields of the records that are shared.
    model_id: Any
    revision: Any
    criterion: Any
    fingerprint: Any
    notes: Any

    def _file(self) -> str:
        """Its file name in a repository."""
        raise NotImplementedError

    @classmethod
    def _matches(cls, file: str, criterion: str | None, mode: str | None) -> bool:
        """Whether a file name is that of a record with these."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        model_id: str | None = None,
        kind: hub.Kind = "model",
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
    ) -> hub.Sent:
        """Put the record into a repository of the hub, as one file of its own; what else is there stays.

        Notes that name a path of this machine are left out.

        Args:
            repo_id: ORG/NAME, made where there is none. model_id: hub id of the model it is of, where the record has a folder.
            kind: of the repository, `model` or `dataset`. private: of one that is made.
            revision: branch that gets the commit. message: of the commit.
        Returns:
            the commit, its address and the file's path.
        Raises:
            OptionError: the model is no hub id. HubError: offline, not logged in, no access.
        """
        mine: Any = self
        notes = tuple(note for note in self.notes if not _LOCAL_PATH.search(note))
        of = model_id or self.model_id
        content = None if self.fingerprint is None else self.fingerprint.content
        where = hub.place(self._folder, of, self.revision, content, self._file())
        record = dataclasses.replace(mine, model_id=of, notes=notes)
        text = record.text(yaml=where.name.endswith(".yaml"))
        said = message or f"{self._kind.replace('_', ' ')} of {of}, criterion {self.criterion}"
        return hub.send(
            {where.path: text.encode()}, repo_id, message=said, kind=kind, private=private, revision=revision
        )

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        model_id: str | None = None,
        commit: str | None = None,
        criterion: str | None = None,
        mode: str | None = None,
        file: str | None = None,
        kind: hub.Kind = "model",
        revision: str | None = None,
    ) -> Self:
        """A record that somebody pushed.

        What it says of the weights is as true as who pushed it: `scan.check_report` holds a report to a model.

        Args:
            repo_id: ORG/NAME. model_id: the model it is of; None for the repository itself.
            commit: of the model, 40 hex digits; None where there is only one. criterion: None for `spectrum` of a report, and
                any of a plan. mode: of a plan; None for any.
            file: its path in the repository instead; a scan published with the original tool may be one.
            kind: `model` or `dataset`. revision: of the repository.
        Raises:
            HubError: no such repository, file or record, no access, offline. OptionError: several records fit.
            CheckpointError: the file is no such record, or is of another model than its place says.
        """
        return cls._from_snapshot(
            hub.resolve(repo_id, revision, kind), model_id, commit, criterion=criterion, mode=mode, file=file
        )

    @classmethod
    def named(
        cls,
        given: str | os.PathLike[str],
        *,
        model_id: str | None = None,
        criterion: str | None = None,
        mode: str | None = None,
    ) -> Self:
        """A record as a user names it: a file, or a repository of the hub that holds one.

        Args:
            given: path of a file; else ORG/NAME, or datasets/ORG/NAME, where nothing of that name lies here.
            model_id: the model that it is to be of; one that is no hub id, a folder, stands for the repository itself.
            criterion, mode: as `from_hub` takes them.
        Raises:
            CheckpointError: the file cannot be used. HubError, OptionError: as `from_hub`.
        """
        where = repository_named(given)
        if where is None:
            return cls.load(given)  # type: ignore[no-any-return]
        name, kind = where
        wanted = model_id if model_id is not None and hub.is_hub_id(model_id) and not mode_of(model_id) else None
        return cls.from_hub(name, model_id=wanted, criterion=criterion, mode=mode, kind=kind)

    @classmethod
    def _from_snapshot(
        cls,
        snapshot: hub.Snapshot,
        model_id: str | None,
        commit: str | None,
        *,
        criterion: str | None = None,
        mode: str | None = None,
        file: str | None = None,
    ) -> Self:
        model = model_id or snapshot.repo_id
        if file is not None:
            if file not in snapshot.files:
                raise hub.HubError(f"{snapshot.repo_id}: has no file {file!r} at commit {snapshot.commit[:12]}.")
            return cls._of_file(snapshot, file, model)
        kept = [p for p in hub.places(snapshot, cls._folder) if cls._matches(p.name, criterion, mode)]
        other = cls._elsewhere(snapshot, model)
        if other is not None and not any(p.model == model for p in kept):
            found = cls._of_file(snapshot, other, model)
            got = {"model_id": found.model_id, "criterion": found.criterion, "mode": getattr(found, "mode", None)}
            for name, value in {"model_id": model_id, "criterion": criterion, "mode": mode}.items():
                if value not in (None, got[name]):
                    raise hub.HubError(
                        f"{snapshot.repo_id}: its {other} has {name} {got[name]!r}, wanted {value!r}; it has no other."
                    )
            return found
        what = cls._kind.replace("_", " ") + (f" by {criterion!r}" if criterion else "")
        return cls._at(snapshot, hub.the_one(kept, snapshot.repo_id, what, model=model, commit=commit))

    @classmethod
    def all_of(cls, snapshot: hub.Snapshot, criterion: str) -> list[Self]:
        """The records that a model's repository has of its own model by a criterion.

        Raises:
            HubError: one cannot be fetched. CheckpointError: one is damaged, or of another model.
        """
        kept = [p for p in hub.places(snapshot, cls._folder) if p.model == snapshot.repo_id]
        found = [cls._at(snapshot, p) for p in kept if cls._matches(p.name, criterion, None)]
        other = cls._elsewhere(snapshot, snapshot.repo_id)
        found += [] if other is None else [cls._of_file(snapshot, other, snapshot.repo_id)]
        return [record for record in found if record.criterion == criterion and record.model_id == snapshot.repo_id]

    @classmethod
    def _at(cls, snapshot: hub.Snapshot, where: hub.Place) -> Self:
        """The record at a place, which is of what the place says."""
        found = cls.load(hub.small_file(snapshot, where.path))
        stated = found.revision if hub.is_commit(found.revision) else None
        if found.model_id != where.model or (hub.is_commit(where.state) and stated != where.state):
            raise CheckpointError(
                f"{snapshot.repo_id}/{where.path}: is of {found.model_id} at {found.revision}, wanted {where.model} at "
                f"{where.state}, as its place says."
            )
        return found  # type: ignore[no-any-return]

    @classmethod
    def _of_file(cls, snapshot: hub.Snapshot, file: str, model: str) -> Self:
        """The record in a file; one that does not say its model, a published scan, is of the one it was looked for."""
        found: Any = cls.load(hub.small_file(snapshot, file))
        named: Self = dataclasses.replace(found, model_id=found.model_id or model)
        return named

    @classmethod
    def _elsewhere(cls, snapshot: hub.Snapshot, model: str) -> str | None:
        """A file of another layout that holds such a record of the model."""
        return None


def repository_named(given: str | os.PathLike[str]) -> tuple[str, hub.Kind] | None:
    """(ORG/NAME, kind) of a text that names a repository of the hub; None for one that names a file.

    A name that lies here is a file, and so is one that ends as records do.
    """
    text = os.fspath(given)
    name = text.removeprefix("datasets/")
    if not isinstance(given, str) or not hub.is_hub_id(name) or text.endswith((".json", ".yaml", ".yml")):
        return None
    if mode_of(text):
        return None
    return name, "model" if name == text else "dataset"


def published_file(snapshot: hub.Snapshot, model: str) -> str | None:
    """The scan of a model as the original tool names it, wherever it lies; else the report that a run left.

    Source: QuixiAI/spectrum@1996495 spectrum.py, `snr_results_ORG-NAME.json`.
    """
    name = f"snr_results_{model.replace('/', '-')}.json"
    return next((path for path in sorted(snapshot.files) if path.rpartition("/")[2] == name), None) or (
        REPORT_FILE if REPORT_FILE in snapshot.files else None
    )
