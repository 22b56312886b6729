"""What a probe found: one row for each matrix, and how alike the gradients of pairs are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import CheckpointError
from .files import SCHEMA_VERSION, Record, as_plain, built, built_rows, is_number, revived, wanted_field
from .report import Fingerprint


@dataclass(frozen=True)
class GradientStat:
    """What calibration batches said about one parameter.

    Attributes:
        name, kind, shape: as in `MatrixStat`; a fused expert parameter is one, of shape (experts, ., .).
        fisher: mean over samples and elements of the squared derivative of a sample's loss: the empirical Fisher mass of
            one parameter of it; None where it was not measured.
        singular_values: of the weight that the layer computes with, the largest first; empty where no basis was asked for.
        importance: s_i^2 E[(dL/ds_i)^2] for each of them, the mean over samples.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fisher: float | None = None
    singular_values: tuple[float, ...] = ()
    importance: tuple[float, ...] = ()


@dataclass(frozen=True)
class Similarity:
    """How alike the gradients of matrices of one kind and shape are, pair by pair.

    Attributes:
        kind, shape: what the matrices have in common.
        side: `in` or `out`, the side of the matrix that faces the residual stream.
        width: of the matrix on that side.
        names: of the matrices, in model order; they index the rows and columns of both tables.
        subspace: overlap of the strongest gradient directions on that side, in [0, 1]; 1 on the diagonal.
        cosine: of the whole gradients, in [-1, 1].
    """

    kind: str
    shape: tuple[int, ...]
    side: str
    width: int
    names: tuple[str, ...]
    subspace: tuple[tuple[float, ...], ...]
    cosine: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class GradientReport(Record):
    """What a model's gradients on calibration batches say about its matrices.

    Attributes:
        stats: one for each candidate, in model order.
        similarities: one for each kind and shape with more than one member.
        samples: how many samples the means are over.
        loss: mean over them.
        fingerprint: of the weights.
        settings: what the probe was run with (directions, sketch, svd_rank, seed, dtype, quantization).
        model_id: as in the report.
    """

    stats: tuple[GradientStat, ...]
    similarities: tuple[Similarity, ...]
    samples: int
    loss: float
    fingerprint: Fingerprint | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_id: str | None = None

    _kind = "gradient_report"

    @cached_property
    def scores(self) -> dict[str, float]:
        """{name: Fisher mass per parameter}: the criterion `fisher`; empty where it was not measured."""
        return {s.name: s.fisher for s in self.stats if s.fisher is not None}

    @cached_property
    def by_name(self) -> dict[str, GradientStat]:
        return {s.name: s for s in self.stats}

    def renamed(self, found: Mapping[str, str]) -> GradientReport:
        """The same under other names of the parameters, {old: new}."""
        stats = tuple(dataclasses.replace(s, name=found[s.name]) for s in self.stats)
        similarities = tuple(
            dataclasses.replace(s, names=tuple(found.get(name, name) for name in s.names)) for s in self.similarities
        )
        return dataclasses.replace(self, stats=stats, similarities=similarities)

    def to_dict(self) -> dict[str, Any]:
        return {
            "record": self._kind,
            "schema_version": SCHEMA_VERSION,
            "model_id": self.model_id,
            "fingerprint": None if self.fingerprint is None else dataclasses.asdict(self.fingerprint),
            "samples": self.samples,
            "loss": self.loss,
            "settings": as_plain(dict(self.settings)),
            "stats": [as_plain(s) for s in self.stats],
            "similarities": [as_plain(s) for s in self.similarities],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "gradient report") -> GradientReport:
        cls._check_header(data, source)
        fingerprint = data.get("fingerprint")
        stats = built_rows(GradientStat, data, "stats", source)
        similarities = built_rows(Similarity, data, "similarities", source)
        if not stats:
            raise CheckpointError(f"{source}: stats is empty, wanted a row for each matrix that was probed.")
        for stat in stats:
            for where, values in (
                ("fisher", () if stat.fisher is None else (stat.fisher,)),
                ("singular_values", stat.singular_values),
                ("importance", stat.importance),
            ):
                for value in values:
                    if not is_number(value, 0):
                        raise CheckpointError(
                            f"{source}: {where} of {stat.name} holds {value!r}, wanted finite numbers of at least 0."
                        )
            if len(stat.importance) != len(stat.singular_values):
                raise CheckpointError(
                    f"{source}: {stat.name} has {len(stat.importance)} importances and {len(stat.singular_values)} singular "
                    "values, wanted as many."
                )
        for group in similarities:
            for where, table in (("subspace", group.subspace), ("cosine", group.cosine)):
                rows = [len(row) for row in table]
                if rows != [len(group.names)] * len(group.names):
                    raise CheckpointError(
                        f"{source}: {where} of {group.kind} {group.shape} has rows of {rows}, wanted {len(group.names)} of "
                        f"{len(group.names)}, one for each name."
                    )
                if not all(is_number(value, -1.001, 1.001) for row in table for value in row):
                    raise CheckpointError(f"{source}: {where} of {group.kind} {group.shape} holds what is no likeness.")
        return cls(
            stats=stats,
            similarities=similarities,
            samples=int(wanted_field(data, "samples", source)),
            loss=float(wanted_field(data, "loss", source)),
            fingerprint=None if fingerprint is None else built(Fingerprint, fingerprint, f"{source}: fingerprint"),
            settings=revived(dict(data.get("settings") or {})),
            model_id=data.get("model_id"),
        )
