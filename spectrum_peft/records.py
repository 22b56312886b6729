"""The records that the stages hand to each other: plain frozen data, no torch, no I/O but their own files.

`scan` writes an `SnrReport`, `plan` turns it into a `Plan`, the tuner, the callback and the export read the plan. A record
saved and loaded again is equal to the first; the same record gives the same bytes. JSON and YAML by the file's ending.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from . import names
from .errors import CheckpointError, MismatchError

SCHEMA_VERSION = 1

Action = Literal["train", "lora", "shared", "lorsa", "save", "freeze"]
ACTIONS: tuple[str, ...] = ("train", "lora", "shared", "lorsa", "save", "freeze")
# Actions that train the base parameter itself, and those that put a low-rank product beside it.
REAL_WEIGHT_ACTIONS = frozenset({"train", "save"})
ADAPTER_ACTIONS = frozenset({"lora", "shared", "lorsa"})


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

    structure: str | None
    content: str | None
    source: str

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
                    raise MismatchError(message + " Make it anew from this checkpoint, or pass force=True (--force).")
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
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    numel: int
    dtype: str
    score: float | None
    n_signal: int | None
    s_max: float | None
    role: str = "linear"
    power_law: float | None = None


class _Record:
    """Saving and loading, shared by the records that are files."""

    _kind: str = ""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "record") -> Any:
        raise NotImplementedError

    @cached_property
    def digest(self) -> str:
        """sha256 of the record's canonical JSON, 64 hex digits."""
        return hashlib.sha256(_to_json(self.to_dict()).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record: YAML for `.yaml`/`.yml`, JSON otherwise; to a temporary name first, then renamed.

        Raises:
            CheckpointError: the folder cannot be written; a value is NaN (the message names the field).
        """
        path = Path(path)
        data = self.to_dict()
        _refuse_nan(data, self._kind)
        text = _to_yaml(data) if path.suffix in {".yaml", ".yml"} else _to_json(data, indent=1)
        write_text(path, text)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Any:
        """Read a record back.

        Raises:
            CheckpointError: not there, empty, not JSON or YAML of this kind, or of a newer schema.
        """
        return cls.from_dict(read_mapping(path), source=str(path))

    @classmethod
    def _check_header(cls, data: Mapping[str, Any], source: str) -> None:
        kind, version = data.get("record"), data.get("schema_version")
        if kind != cls._kind:
            raise CheckpointError(f"{source}: field 'record' is {kind!r}, wanted {cls._kind!r}.")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{source}: schema_version is {version!r}, this version reads up to {SCHEMA_VERSION}."
            )


@dataclass(frozen=True)
class SnrReport(_Record):
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
    criterion: str
    fingerprint: Fingerprint
    model_id: str | None = None
    revision: str | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    _kind = "snr_report"

    @cached_property
    def scores(self) -> dict[str, float]:
        """{name: score} of the scored matrices, in report order."""
        return {s.name: s.score for s in self.stats if s.score is not None}

    @property
    def total_parameters(self) -> int:
        """Number of elements of all tensors, tied ones once."""
        extra = {name for group in self.tied for name in group[1:]}
        return sum(s.numel for s in self.stats if s.name not in extra)

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
            "stats": [_plain(s) for s in self.stats],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "report") -> SnrReport:
        """A report as `to_dict` writes it, or a published scan in either of its layouts (`published_report`)."""
        if "record" not in data and _published_rows(data) is not None:
            return published_report(data, source)
        cls._check_header(data, source)
        return cls(
            stats=_rows(MatrixStat, data, "stats", source),
            criterion=str(_field(data, "criterion", source)),
            fingerprint=_build(Fingerprint, _field(data, "fingerprint", source), f"{source}: fingerprint"),
            model_id=data.get("model_id"),
            revision=data.get("revision"),
            tied=tuple(tuple(group) for group in data.get("tied") or ()),
            notes=tuple(data.get("notes") or ()),
        )


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
            raise CheckpointError(f"{source}: the SNR of {module!r} is {value!r}, wanted a number or Infinity.")
        name = f"{module}.weight"
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


def _is_number(value: Any, least: float, most: float = math.inf) -> bool:
    """A finite one from `least` to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most


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
class GradientReport(_Record):
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
            "settings": _plain(dict(self.settings)),
            "stats": [_plain(s) for s in self.stats],
            "similarities": [_plain(s) for s in self.similarities],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "gradient report") -> GradientReport:
        cls._check_header(data, source)
        fingerprint = data.get("fingerprint")
        stats = _rows(GradientStat, data, "stats", source)
        similarities = _rows(Similarity, data, "similarities", source)
        if not stats:
            raise CheckpointError(f"{source}: stats is empty, wanted a row for each matrix that was probed.")
        for stat in stats:
            for where, values in (
                ("fisher", () if stat.fisher is None else (stat.fisher,)),
                ("singular_values", stat.singular_values),
                ("importance", stat.importance),
            ):
                for value in values:
                    if not _is_number(value, 0):
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
                if not all(_is_number(value, -1.001, 1.001) for row in table for value in row):
                    raise CheckpointError(f"{source}: {where} of {group.kind} {group.shape} holds what is no likeness.")
        return cls(
            stats=stats,
            similarities=similarities,
            samples=int(_field(data, "samples", source)),
            loss=float(_field(data, "loss", source)),
            fingerprint=None if fingerprint is None else _build(Fingerprint, fingerprint, f"{source}: fingerprint"),
            settings=_revive(dict(data.get("settings") or {})),
            model_id=data.get("model_id"),
        )


@dataclass(frozen=True)
class PlanEntry:
    """What happens to one parameter.

    Attributes:
        name: full parameter name in the base model, also where an adapter is put beside it.
        action: `train` (the weight itself), `lora`, `shared`, `lorsa` (an adapter), `save` (a whole module trains
            through `modules_to_save`), `freeze`.
        rank, alpha: of the adapter; the update is scaled by alpha / rank (alpha / sqrt(rank) with rsLoRA).
        lr_ratio: this tensor's learning rate over the optimizer's.
        group: tensors of one group share an adapter factor; None alone. The label begins with what they share: `A:`, `B:` or
            `AB:`.
        shared: elements of this entry's factors that are its group's, which has them once.
        gain: a trained number of this entry scales the group's factor.
        components: `lorsa`: indexes of the singular components that train, ascending, 0 the largest; `rank` is the rank of
            their rotations then.
        active: False holds a place that re-evaluation may fill; nothing of it trains.
        kind, shape, score: as in the report, so that a plan explains itself.
    """

    name: str
    action: str
    rank: int | None = None
    alpha: float | None = None
    lr_ratio: float = 1.0
    group: str | None = None
    active: bool = True
    kind: str = ""
    shape: tuple[int, ...] | None = None
    score: float | None = None
    components: tuple[int, ...] | None = None
    shared: int = 0
    gain: bool = False

    @property
    def trains(self) -> bool:
        return self.active and self.action != "freeze"

    @property
    def numel(self) -> int:
        """Elements of the base parameter; 0 if its shape is not known."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def trainable_numel(self) -> int:
        """Elements that train for this entry on its own: the weight, both factors of a LoRA (per expert) and its gain, or
        the shifts and rotations of singular components."""
        if not self.trains or not self.shape:
            return 0
        if self.action in REAL_WEIGHT_ACTIONS:
            return self.numel
        if self.components is not None:
            return len(self.components) * (1 + 2 * (self.rank or 0))
        experts = self.shape[0] if len(self.shape) == 3 else 1
        return experts * (self.rank or 0) * (self.shape[-1] + self.shape[-2]) + self.gain


def count_trainable(entries: Iterable[PlanEntry]) -> int:
    """Elements that train for some entries together: what a group shares counts once."""
    total = 0
    seen: set[str] = set()
    for entry in entries:
        total += entry.trainable_numel
        if entry.trains and entry.group is not None:
            total -= entry.shared if entry.group in seen else 0
            seen.add(entry.group)
    return total


@dataclass(frozen=True)
class Plan(_Record):
    """What trains, how, at what rank, scale and learning rate. Plain data: it says everything, it does nothing.

    Attributes:
        mode: key of `policies.MODES`.
        entries: every candidate, frozen ones too, in model order; then `save` entries.
        options: the options the plan was made with, after defaults.
        criterion, fingerprint, model_id, revision: of the report it was made from.
        total_parameters: of the base model, tied tensors once; 0 if not known.
        notes: notices for the reader (clamped ranks, fewer blocks than asked for, fused qkv).
        patterns: regexes of `unfrozen_parameters` where a preset fixes them; empty: derived from the entries.
    """

    mode: str
    entries: tuple[PlanEntry, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    criterion: str = "spectrum"
    fingerprint: Fingerprint | None = None
    model_id: str | None = None
    revision: str | None = None
    total_parameters: int = 0
    notes: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    _kind = "plan"

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for entry in self.entries:
            if entry.action not in ACTIONS:
                raise CheckpointError(f"plan entry {entry.name}: action is {entry.action!r}, wanted one of {ACTIONS}.")
            if entry.name in seen:
                raise CheckpointError(f"plan entry {entry.name} stands twice; a parameter has one entry.")
            seen.add(entry.name)

    @cached_property
    def trainable_names(self) -> list[str]:
        """Sorted full parameter names of the base model that train or carry a live adapter."""
        return sorted(e.name for e in self.entries if e.trains)

    @cached_property
    def by_name(self) -> dict[str, PlanEntry]:
        return {e.name: e for e in self.entries}

    @property
    def trainable_parameters(self) -> int:
        """Elements that the optimizer will see; factors shared in a group count once, the other side per layer."""
        return count_trainable(self.entries)

    @property
    def unfrozen_parameters(self) -> list[str]:
        """Regexes as axolotl and the published script read them (`re.match` on parameter names); real weights only."""
        if self.patterns:
            return list(self.patterns)
        return [f"^{e.name}$" for e in self.entries if e.trains and e.action in REAL_WEIGHT_ACTIONS]

    @cached_property
    def digest(self) -> str:
        """sha256, 64 hex digits, of what the plan does: mode, and every entry that has a place in the model.

        Scores, notes and options are left out: two scans may differ in a last bit and still mean the same training.
        """
        acts = [
            (
                e.name,
                e.action,
                e.rank,
                e.alpha,
                e.lr_ratio,
                e.group,
                e.active,
                *(e.components or ()),
                *["gain"] * e.gain,
            )
            for e in self.entries
            if e.action != "freeze"
        ]
        return hashlib.sha256(json.dumps([self.mode, sorted(acts)]).encode()).hexdigest()

    def replace(self, **changes: Any) -> Plan:
        """A copy with some fields changed; this one stays."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "record": self._kind,
            "schema_version": SCHEMA_VERSION,
            "mode": self.mode,
            "model_id": self.model_id,
            "revision": self.revision,
            "criterion": self.criterion,
            "fingerprint": None if self.fingerprint is None else dataclasses.asdict(self.fingerprint),
            "options": _plain(dict(self.options)),
            "total_parameters": self.total_parameters,
            "notes": list(self.notes),
            "entries": [_plain(e) for e in self.entries],
            "unfrozen_parameters": self.unfrozen_parameters,
            "patterns": list(self.patterns),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "plan") -> Plan:
        cls._check_header(data, source)
        fingerprint = data.get("fingerprint")
        return cls(
            mode=str(_field(data, "mode", source)),
            entries=_rows(PlanEntry, data, "entries", source),
            options=_revive(dict(data.get("options") or {})),
            criterion=str(data.get("criterion")),
            fingerprint=None if fingerprint is None else _build(Fingerprint, fingerprint, f"{source}: fingerprint"),
            model_id=data.get("model_id"),
            revision=data.get("revision"),
            total_parameters=int(data.get("total_parameters") or 0),
            notes=tuple(data.get("notes") or ()),
            patterns=tuple(data.get("patterns") or ()),
        )


@dataclass(frozen=True)
class MemoryReport(_Record):
    """What one training step needs at its worst moment, and what that is made of. All sizes in bytes.

    Attributes:
        mode: of the plan.
        peak_bytes: most that lives at once on the training device; the sum of `by_category`.
        by_category: {category: bytes} at the peak; `memory.CATEGORIES` says what each one is.
        phase: where in the step the peak is, one of `memory.PHASES`.
        where: the operation and the module or parameter at the peak, for the reader.
        phases: {phase: {category: bytes}} at the worst moment of each phase.
        host_bytes: copies of original weights in main memory; part of the peak where that is the training device.
        trainable_parameters, trainable_bytes: elements and bytes of what the optimizer trains.
        total_parameters: elements of the base model, tied tensors once.
        largest_block_bytes: weights of the largest repeated block, and `largest_block_gradients` of its trainable ones:
            what has to be whole at once where the rest is sharded.
        settings: what the step was run with.
        devices: over how many devices the numbers are spread; they are those of one device.
        complete: False where activations could not be counted.
        notes: what the reader must know.
    """

    mode: str
    peak_bytes: int
    by_category: Mapping[str, int]
    phase: str
    where: str
    phases: Mapping[str, Mapping[str, int]]
    host_bytes: int
    trainable_parameters: int
    trainable_bytes: int
    total_parameters: int
    largest_block_bytes: int
    largest_block_gradients: int
    settings: Mapping[str, Any]
    devices: int = 1
    complete: bool = True
    notes: tuple[str, ...] = ()

    _kind = "memory_report"

    def to_dict(self) -> dict[str, Any]:
        return {
            "record": self._kind,
            "schema_version": SCHEMA_VERSION,
            **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "memory report") -> MemoryReport:
        cls._check_header(data, source)
        return _build(cls, {k: v for k, v in data.items() if k not in {"record", "schema_version"}}, source)


# --- plain data ------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Records, tuples and infinities as JSON knows them; None fields of a record are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        defaults = {f.name: f.default for f in dataclasses.fields(value)}
        return {
            k: _plain(v)
            for k in defaults
            if (v := getattr(value, k)) != defaults[k] or defaults[k] is dataclasses.MISSING
        }
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _revive(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _revive(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_revive(v) for v in value)
    return {"inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value


def _refuse_nan(value: Any, where: str) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise CheckpointError(f"{where} is nan, wanted a number or inf.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_nan(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            label = item.get("name", i) if isinstance(item, Mapping) else i
            _refuse_nan(item, f"{where}[{label}]")


def _to_json(data: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(data, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def _to_yaml(data: Mapping[str, Any]) -> str:
    import yaml  # 60 ms that a scan to JSON need not pay

    rows = {k: v for k, v in data.items() if k in {"entries", "stats"}}
    head = {k: v for k, v in data.items() if k not in rows}
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)
    for key, items in rows.items():  # one line an entry: a plan of 200 matrices stays readable and diffable
        body = "".join("- " + yaml.safe_dump(i, default_flow_style=True, sort_keys=False, width=10**6) for i in items)
        text += f"{key}:\n{body}" if items else f"{key}: []\n"
    return text


_T = TypeVar("_T")


def _field(data: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in data:
        raise CheckpointError(f"{source}: field {key!r} is missing.")
    return data[key]


def _build(cls: type[_T], row: Any, where: str) -> _T:
    if not isinstance(row, Mapping):
        raise CheckpointError(f"{where} is {row!r}, wanted a mapping.")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(row) - known)
    if unknown:
        raise CheckpointError(f"{where}: unknown field {unknown[0]!r}, known are {sorted(known)}.")
    try:
        return cls(**{k: _revive(v) for k, v in row.items()})
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}.") from error


def _rows(cls: type[_T], data: Mapping[str, Any], key: str, source: str) -> tuple[_T, ...]:
    rows = _field(data, key, source)
    if not isinstance(rows, list | tuple):
        raise CheckpointError(f"{source}: field {key!r} is a {type(rows).__name__}, wanted a list.")
    return tuple(_build(cls, row, f"{source}: {key}[{i}]") for i, row in enumerate(rows))


# --- files -----------------------------------------------------------------------------------------------------------


class _TwiceError(Exception):
    """A key of a mapping stands twice; without this the last one would win in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(repr(next(key for i, key in enumerate(keys) if key in keys[:i])))
    return found


@cache
def _yaml_loader() -> Any:
    """The safe loader, that of C where it was built, which refuses a key that stands twice."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in seen:
                        raise _TwiceError(f"{key.value!r} (line {key.start_mark.line + 1})")
                    seen.add((key.tag, key.value))
            return super().construct_mapping(node, deep)

    return Loader


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping; YAML by the safe loader only.

    Raises:
        CheckpointError: not there, empty, cannot be parsed (a YAML tag that asks for an object included), no mapping, a key
            that stands twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error}).") from error
    if not text.strip():
        raise CheckpointError(f"{path}: the file is empty.")
    try:
        if path.suffix in {".yaml", ".yml"}:
            import yaml

            try:
                data = yaml.load(text, Loader=_yaml_loader())
            except yaml.YAMLError as error:
                raise CheckpointError(f"{path}: not plain YAML: {_one_line(error)}.") from error
        else:
            data = json.loads(text, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise CheckpointError(f"{path}: the key {error} stands twice in one mapping, wanted once.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, wanted a mapping.")
    return data


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file or nothing: to a temporary name in the same folder, then renamed.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}).") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
