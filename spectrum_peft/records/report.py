"""What a scan found: one row for each tensor, with the fingerprint of the weights that it is of."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from msgspec import Meta

from .. import names
from ..errors import CheckpointError, MismatchError, quoted
from ..hub import Snapshot
from .files import SCHEMA_VERSION, as_plain
from .schema import Count, Name, NotNegative, Place, Shape, Text, checked, refuse_unknown
from .shared import SharedRecord, published_file


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a checkpoint.

    Attributes:
        structure: sha256 of the sorted (name, shape) of the matrices in the blocks, names without the base-model
            prefix, so that a folder and the same weights loaded under another head agree.
        content: sha256 over each tensor's name, dtype, shape, first and last 64 KiB as stored; None where the stored
            bytes are not at hand (a live model without a local folder, a published scan, a `.gguf`).
        source: `file`, `live`, `gguf` or `published`.
    """

    structure: Annotated[str, Meta(max_length=64)] | None
    content: Annotated[str, Meta(max_length=64)] | None
    source: Literal["file", "live", "gguf", "published"]

    def check(self, other: Fingerprint, *, this: str, that: str, force: bool = False) -> str | None:
        """Compare two fingerprints as far as both know themselves.

        Returns:
            None when the contents agree, else a line to log: what was compared and what could not be.
        Raises:
            MismatchError: they differ and `force` is false.
        """
        for part in ("content", "structure"):
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine is None or theirs is None:
                continue
            if mine != theirs:
                message = f"{this} does not belong to {that}: fingerprint {part} is {mine[:12]}, wanted {theirs[:12]}."
                if not force:
                    raise MismatchError(message + " Make it anew from this checkpoint, or give force=True.")
                return message + " Used all the same (force)."
            if part == "content":
                return None
        known = (
            "only names and shapes could be compared"
            if self.structure and other.structure
            else "nothing could be compared"
        )
        return f"{this} and {that}: {known}, the stored bytes of one of them are not at hand."


@dataclass(frozen=True)
class MatrixStat:
    """One tensor of a checkpoint as the scan saw it.

    Attributes:
        name: full parameter name in the base model; one expert of a fused parameter is `name[e]`.
        kind: name without its numbers and `.weight` (`self_attn.q_proj`); selection ranks within a kind.
        shape: as stored for a Linear, (out, in); a GPT-2 Conv1D keeps its stored (in, out). None if not known.
        numel: number of elements; 0 if not known.
        dtype: as stored, `bfloat16`; `unknown` for a published scan.
        score: the criterion's value; infinite is allowed; None if not scored.
        n_signal: how many singular values the criterion calls signal; None where it has no edge.
        s_max: largest singular value; None where no spectrum was computed.
        role: one of `names.ROLES`.
        power_law: exponent fitted to the tail of the eigenvalue density; None where there is no spectrum.
        transposed: stored as (in, out), as a Conv1D's.
        tower: one of `names.Tower` in a model that sees or hears, else None.
    """

    name: Name
    kind: Annotated[str, Meta(max_length=500)]
    shape: Shape | None
    numel: Annotated[int, Meta(ge=0)]
    dtype: Name
    score: int | float | None
    n_signal: Count | None
    s_max: NotNegative | None
    role: names.Role = "linear"
    power_law: NotNegative | None = None
    transposed: bool = False
    tower: names.Tower | None = None


@dataclass(frozen=True)
class SnrReport(SharedRecord):
    """What a scan found: every tensor of a checkpoint, the candidates with their score.

    Attributes:
        stats: all tensors in checkpoint order (fused experts one by one).
        criterion: key of `criteria.CRITERIA`.
        fingerprint: of the weights that were scanned.
        model_id, revision: where they came from; None for a model in memory without a name.
        tied: groups of names that are one tensor, as (kept name, other names...).
        notes: what a reader must know, such as `4-bit weights were dequantized one by one`.
    """

    stats: tuple[MatrixStat, ...]
    criterion: Name
    fingerprint: Fingerprint
    model_id: Place | None = None
    revision: Place | None = None
    tied: tuple[Annotated[tuple[Name, ...], Meta(min_length=1)], ...] = ()
    notes: tuple[Text, ...] = ()

    _kind = "snr_report"
    _folder = "spectrum_reports"

    @cached_property
    def scores(self) -> dict[str, float]:
        """{name: score} of the scored matrices, in report order."""
        return {s.name: s.score for s in self.stats if s.score is not None}

    def _file(self) -> str:
        # One of some kinds or layers only does not take the place of the whole.
        part = any(s.role == "linear" and s.score is None for s in self.stats)
        return f"{self.criterion}-part-{self.digest[:8]}.json" if part else f"{self.criterion}.json"

    @classmethod
    def _matches(cls, file: str, criterion: str | None, mode: str | None) -> bool:
        return file == f"{criterion or 'spectrum'}.json"

    @classmethod
    def _elsewhere(cls, snapshot: Snapshot, model: str) -> str | None:
        return published_file(snapshot, model)

    @property
    def total_parameters(self) -> int:
        """Number of elements of all tensors, tied ones once."""
        extra = {name for group in self.tied for name in group[1:]}
        return sum(s.numel for s in self.stats if s.name not in extra)

    def _repr_html_(self) -> str:
        """For notebooks: of each kind how many matrices were scored, and between which scores."""
        kinds: dict[str, list[float]] = {}
        for stat in self.stats:
            if stat.score is not None:
                kinds.setdefault(stat.kind, []).append(stat.score)
        rows = "".join(
            f"<tr><td>{html.escape(kind)}</td><td>{len(scores)}</td><td>{min(scores):.4g} to {max(scores):.4g}</td></tr>"
            for kind, scores in sorted(kinds.items())
        )
        title = html.escape(f"{self.model_id or 'a model in memory'}, criterion {self.criterion}")
        head = "<tr><th>kind</th><th>scored</th><th>scores</th></tr>"
        return f"<table><caption>{title}</caption>{head}{rows}</table>"

    def to_dict(self) -> dict[str, Any]:
        return {
            "record": self._kind,
            "schema_version": SCHEMA_VERSION,
            "model_id": self.model_id,
            "revision": self.revision,
            "criterion": self.criterion,
            "fingerprint": dataclasses.asdict(self.fingerprint),
            "tied": [list(group) for group in self.tied],
            "notes": list(self.notes),
            "stats": [as_plain(s) for s in self.stats],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "report") -> SnrReport:
        """A report as `to_dict` writes it, or a published scan in either of its layouts (`published_report`)."""
        if "record" not in data and _published_rows(data) is not None:
            return published_report(data, source)
        found: SnrReport = cls._checked(data, source)
        refuse_unknown(MatrixStat, data["stats"], f"{source}: stats[{{}}]")
        return found


def published_report(data: Mapping[str, Any], source: str = "published scan") -> SnrReport:
    """A scan published with the original tool as a report: module names get `.weight`, what it does not say stays None.

    Args:
        data: `{module: {"snr": x, "type": kind}}`, or grouped and sorted, `{kind: {module: snr}}`; `Infinity` is allowed.
    Raises:
        CheckpointError: another layout, a score that is no number or NaN, a module that stands twice.
    Source: QuixiAI/spectrum@13dcd40, folder model_snr_results.
    """
    rows = _published_rows(data)
    if not rows:
        raise CheckpointError(
            f"{source}: no published scan: wanted {{module: {{snr, type}}}} or {{kind: {{module: snr}}}}."
        )
    scores: dict[str, float] = {}
    for module, value in rows:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise CheckpointError(f"{source}: the SNR of {module!r} is {quoted(value)}, wanted a number or Infinity.")
        name = checked(f"{module}.weight", Name, f"{source}: a name")
        if name in scores:
            raise CheckpointError(f"{source}: {module!r} stands twice, wanted it once.")
        scores[name] = float(value)
    kinds = names.kinds(scores)
    stats = tuple(
        MatrixStat(name, kinds[name], None, 0, "unknown", value, None, None, role=names.role(name, None))
        for name, value in scores.items()
    )
    return SnrReport(stats, criterion="spectrum", fingerprint=Fingerprint(None, None, "published"))


def _published_rows(data: Mapping[str, Any]) -> list[tuple[str, Any]] | None:
    """(module, SNR) in file order, or None if this is neither published layout."""
    if not data or not all(isinstance(group, Mapping) and group for group in data.values()):
        return None
    if all("snr" in row for row in data.values()):
        return [(module, row["snr"]) for module, row in data.items()]
    if any("snr" in group or any(isinstance(v, Mapping | list) for v in group.values()) for group in data.values()):
        return None
    return [(module, value) for group in data.values() for module, value in group.items()]
