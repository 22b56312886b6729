"""The weights of a base checkpoint as a trained adapter leaves them, as one more source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

import torch

from ..records import Fingerprint
from .adapters import AdapterState
from .files import FileWeights, as_matrix
from .layouts import skeletons_for
from .source import TensorInfo, WeightSource, split_expert
from .updates import Update, Value


def seen_as_trained(files: FileWeights, adapter: AdapterState) -> FileWeights:
    """A checkpoint under the names of the class that an adapter was trained on, which may be another than config.json names:
    a text class on a vision-language checkpoint, a new head on a body.

    The adapter says its class, or its task does; the first of them that has every parameter that the adapter changes.
    """
    if files.folder is None:
        return files
    wanted = adapter.changed_parameters()

    def lacking(found: FileWeights) -> int:
        have = {info.name for info in found.tensors()} | {name for group in found.tied for name in group}
        have |= set(found.layout.new) if found.layout is not None else set()
        return len(wanted - have)

    best, least = files, lacking(files)
    for skeleton in skeletons_for(files.folder, adapter.classes(), adapter.config.get("task_type")) if least else ():
        found = files.seen_by(skeleton)
        if lacking(found) < least:
            best, least = found, lacking(found)
    return best


class AdaptedWeights:
    """The weights of a base checkpoint as a trained adapter leaves them: W + dW, or the adapter's own W.

    Args:
        adapter: as its folder says it. base: the checkpoint it was trained on.
        folder, model_id, revision: of the adapter, for the report.
    Raises:
        MismatchError: the adapter does not fit its base.
    """

    kind: Literal["file"] = "file"

    def __init__(
        self, adapter: AdapterState, base: WeightSource, *, folder: Path, model_id: str, revision: str | None = None
    ) -> None:
        self.folder, self.model_id, self.revision = folder, model_id, revision
        base = seen_as_trained(base, adapter) if isinstance(base, FileWeights) else base
        self._adapter, self._base = adapter, base
        self.tied = self._base.tied
        self._infos = {info.name: info for info in self._base.tensors()}
        self._updates: dict[str, list[Update]] = {}
        model_type = self._base.config.get("model_type") if isinstance(self._base, FileWeights) else None
        new = []
        for update in self._adapter.updates(self._infos.values(), model_type):
            if isinstance(update, Value) and update.new:
                new.append(update.name)
                continue
            self._updates.setdefault(update.name, []).append(update)
            if isinstance(update, Value):  # a table may have grown
                self._infos[update.name] = dataclasses.replace(self._infos[update.name], shape=update.stored.shape)
        self.notes = (*self._base.notes, f"scores are of the weights with the adapter in {folder} applied")
        if new:
            self.notes += (f"the adapter brings {len(new)} tensors that its base lacks, not listed here: {new[0]} ...",)

    @property
    def received(self) -> int | None:
        return self._base.received

    def tensors(self) -> list[TensorInfo]:
        return list(self._infos.values())

    def read(self, name: str) -> torch.Tensor:
        base, expert = split_expert(name)
        updates = self._updates.get(base, [])
        if not any(isinstance(update, Value) for update in updates):
            weight = self._base.read(name)
        for update in updates:
            if isinstance(update, Value):
                whole = update.stored.whole()
                weight = whole if expert is None else whole[expert]
                continue
            rows, columns = as_matrix(weight.shape)
            weight = update.change()(weight.reshape(rows, columns), (expert or 0) * rows).reshape(weight.shape)
        return weight

    def fingerprint(self) -> Fingerprint:
        base = self._base.fingerprint()
        return Fingerprint(base.structure, self._with(base.content) if base.content else None, "file")

    def identity(self) -> str:
        return self._with(self._base.identity())

    def _with(self, base: str) -> str:
        """What tells the adapter over that base from all others."""
        digest = hashlib.sha256(base.encode())
        for key, stored in self._adapter.tensors.items():
            digest.update(json.dumps([key, str(stored.dtype), list(stored.shape)]).encode())
            digest.update(stored.whole().view(torch.uint8).numpy().data)
        digest.update(json.dumps(self._adapter.config, sort_keys=True, default=str).encode())
        return digest.hexdigest()
