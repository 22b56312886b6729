"""What a probe found: one row for each matrix, and how alike the gradients of pairs are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from msgspec import Meta

from ..errors import CheckpointError
from .files import SCHEMA_VERSION, Record, as_plain
from .report import Fingerprint
from .schema import Count, Finite, Likeness, MatrixShape, Name, NotNegative, Place, refuse_unknown


@dataclass(frozen=True)
class GradientStat:
    """What calibration batches said about one parameter.

    Attributes:
        name, kind, shape: as in `MatrixStat`; a fused expert parameter is one, of shape (experts, ., .).
        fisher: mean over samples and elements of the squared derivative of a sample's loss: the empirical Fisher mass of
            one parameter of it; None where it was not measured.
        singular_values: of the weight that the layer computes with, the largest first; empty where no basis was asked for.
        importance: s_i^2 E[(dL/ds_i)^2] for each of them, the mean over samples.
        columns: a score of each input feature, see `collectors.ColumnScores`; empty where none was asked for.
    """

    name: Name
    kind: Annotated[str, Meta(max_length=500)]
    shape: MatrixShape
    fisher: NotNegative | None = None
    singular_values: tuple[NotNegative, ...] = ()
    importance: tuple[NotNegative, ...] = ()
    columns: tuple[NotNegative, ...] = ()

    def __post_init__(self) -> None:
        if len(self.importance) != len(self.singular_values):
            raise CheckpointError(
                f"{self.name} has {len(self.importance)} importances and {len(self.singular_values)} singular values, wanted "
                "as many."
            )


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

    kind: Annotated[str, Meta(max_length=500)]
    shape: MatrixShape
    side: Literal["in", "out"]
    width: Count
    names: tuple[Name, ...]
    subspace: tuple[tuple[Likeness, ...], ...]
    cosine: tuple[tuple[Likeness, ...], ...]

    def __post_init__(self) -> None:
        for where, table in (("subspace", self.subspace), ("cosine", self.cosine)):
            rows = [len(row) for row in table]
            if rows != [len(self.names)] * len(self.names):
                raise CheckpointError(
                    f"{where} of {self.kind} {self.shape} has rows of {rows}, wanted {len(self.names)} of {len(self.names)}, one "
                    "for each name."
                )


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
    samples: Annotated[int, Meta(ge=1)]
    loss: Finite
    fingerprint: Fingerprint | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_id: Place | None = None

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
        found: GradientReport = cls._checked(data, source)
        refuse_unknown(GradientStat, data["stats"], f"{source}: stats[{{}}]")
        refuse_unknown(Similarity, data["similarities"], f"{source}: similarities[{{}}]")
        if not found.stats:
            raise CheckpointError(f"{source}: stats is empty, wanted a row for each matrix that was probed.")
        return found
