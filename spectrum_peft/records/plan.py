"""What trains and by which means: one entry for each tensor, and the options that it was made with."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

from ..errors import CheckpointError, quoted
from ..hub import Snapshot
from .files import PLAN_FILE, SCHEMA_VERSION, as_plain
from .report import Fingerprint, SnrReport
from .schema import MOST_RANK, Count, Name, Place, Text, refuse_unknown
from .shared import SharedRecord

logger = logging.getLogger(__name__)

Action = Literal["train", "lora", "shared", "lorsa", "columns", "save", "freeze"]
ACTIONS: tuple[str, ...] = ("train", "lora", "shared", "lorsa", "columns", "save", "freeze")
# Actions that train the base parameter itself, and those that put a low-rank product beside it.
REAL_WEIGHT_ACTIONS = frozenset({"train", "save"})
ADAPTER_ACTIONS = frozenset({"lora", "shared", "lorsa", "columns"})


@dataclass(frozen=True)
class PlanEntry:
    """What happens to one parameter.

    Attributes:
        name: full parameter name in the base model, also where an adapter is put beside it.
        action: `train` (the weight itself), `lora`, `shared`, `lorsa`, `columns` (an adapter), `save` (a whole
            module trains through `modules_to_save`), `freeze`.
        rank, alpha: of the adapter; the update is scaled by alpha / rank (alpha / sqrt(rank) with rsLoRA).
        lr_ratio: this tensor's learning rate over the optimizer's.
        group: tensors of one group share an adapter factor; None alone. The label begins with what they share: `A:`, `B:` or
            `AB:`.
        shared: elements of this entry's factors that are its group's, which has them once.
        gain: a trained number of this entry scales the group's factor.
        components: `lorsa`: indexes of the singular components that train, ascending, 0 the largest; `rank` is the rank of
            their rotations then.
        columns, rows: `columns`: numbers of the input features, or of the output features, whose weights train, ascending; one
            of the two; `rank` is how many.
        transposed: the matrix is stored as (in, out); said where columns or rows are counted.
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
    columns: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    transposed: bool = False
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
    def inside(self) -> int:
        """Input features of a matrix whose columns are counted; 0 if its shape is not known."""
        return self.shape[0 if self.transposed else -1] if self.shape else 0

    @property
    def outside(self) -> int:
        """Output features of a matrix whose rows are counted; 0 if its shape is not known."""
        return self.shape[-1 if self.transposed else 0] if self.shape else 0

    @property
    def trainable_numel(self) -> int:
        """Elements that train for this entry on its own: the weight, both factors of a LoRA (per expert) and its gain,
        the shifts and rotations of singular components, some columns or some rows."""
        if not self.trains or not self.shape:
            return 0
        if self.action in REAL_WEIGHT_ACTIONS:
            return self.numel
        if self.components is not None:
            return len(self.components) * (1 + 2 * (self.rank or 0))
        if self.columns is not None:
            return len(self.columns) * self.outside
        if self.rows is not None:
            return len(self.rows) * self.inside
        experts = self.shape[0] if len(self.shape) == 3 else 1
        return experts * (self.rank or 0) * (self.shape[-1] + self.shape[-2]) + self.gain


def _problem(entry: PlanEntry) -> str | None:
    """What a plan entry says that cannot be carried out, or not be meant; None if nothing."""
    if entry.action not in ACTIONS:
        return f"action is {quoted(entry.action)}, wanted one of {ACTIONS}"
    if not entry.trains:
        return None
    if not 0 < entry.lr_ratio < math.inf:
        return f"lr_ratio is {entry.lr_ratio}, wanted a number above 0"
    if entry.action not in ADAPTER_ACTIONS:
        return None
    if entry.rank is None or not 1 <= entry.rank <= MOST_RANK:
        return f"rank is {entry.rank}, wanted 1 to {MOST_RANK} for action {entry.action!r}"
    if entry.alpha is None or not 0 < entry.alpha < math.inf:
        return f"alpha is {entry.alpha}, wanted a number above 0 for action {entry.action!r}"
    shape = entry.shape
    if shape is not None and len(shape) not in (2, 3):
        return f"shape is {shape}, wanted a matrix, or one for each expert, for action {entry.action!r}"
    if shape is not None and entry.rank > max(1024, *shape[-2:]):  # the factors would be larger than the matrix, by far
        return f"rank is {entry.rank} for the shape {shape}, wanted at most {max(1024, *shape[-2:])}"
    if (entry.components is not None) != (entry.action == "lorsa"):
        return f"components is {quoted(entry.components)} with action {entry.action!r}, wanted them for 'lorsa' and only there"
    chosen = entry.components or ()
    if any(a >= b for a, b in pairwise(chosen)) or (shape is not None and chosen and chosen[-1] >= min(shape[-2:])):
        return (
            f"components is {quoted(chosen)} for the shape {shape}, wanted indexes that ascend, below its smaller side"
        )
    if (entry.columns is not None) + (entry.rows is not None) != (entry.action == "columns"):
        both = "" if entry.rows is None else f" and rows {quoted(entry.rows)}"
        return f"columns is {quoted(entry.columns)}{both} with action {entry.action!r}, wanted them for 'columns' and only there"
    for what, numbers, width in (("columns", entry.columns, entry.inside), ("rows", entry.rows, entry.outside)):
        if numbers is not None and (
            len(numbers) != entry.rank
            or numbers[0] < 0
            or any(a >= b for a, b in pairwise(numbers))
            or (shape is not None and (len(shape) != 2 or numbers[-1] >= width))
        ):
            return (
                f"{what} is {quoted(numbers)} for the shape {shape}, wanted {entry.rank} numbers of its {what}, as rank says, "
                "that ascend"
            )
    return None


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
class Plan(SharedRecord):
    """What trains, how, at what rank, scale and learning rate. Plain data: it says everything, it does nothing.

    Attributes:
        mode: key of `plan.MODES`.
        entries: every candidate, frozen ones too, in model order; then `save` entries.
        options: the options the plan was made with, after defaults.
        criterion, fingerprint, model_id, revision: of the report it was made from.
        total_parameters: of the base model, tied tensors once; 0 if not known.
        notes: notices for the reader (clamped ranks, fewer blocks than asked for, fused qkv).
        patterns: regexes of `unfrozen_parameters` where a preset fixes them; empty: derived from the entries.
    """

    mode: Name
    entries: tuple[PlanEntry, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    criterion: Name = "spectrum"
    fingerprint: Fingerprint | None = None
    model_id: Place | None = None
    revision: Place | None = None
    total_parameters: Count = 0
    notes: tuple[Text, ...] = ()
    patterns: tuple[Name, ...] = ()

    _kind = "plan"
    _folder = "spectrum_plans"
    # Who puts a plan into words knows modes and options, which records do not: `plan.explain` is registered here.
    _words: ClassVar[Callable[[Plan, SnrReport | None], str] | None] = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for entry in self.entries:
            if entry.name in seen:
                raise CheckpointError(f"plan entry {entry.name} stands twice; a parameter has one entry.")
            seen.add(entry.name)
            problem = _problem(entry)
            if problem:
                raise CheckpointError(f"plan entry {entry.name}: {problem}.")

    def _file(self) -> str:
        return f"{self.criterion}-{self.mode}-{self.digest[:8]}.yaml"

    @classmethod
    def _matches(cls, file: str, criterion: str | None, mode: str | None) -> bool:
        parts = file.removesuffix(".yaml").rsplit("-", 2)
        return len(parts) == 3 and criterion in (None, parts[0]) and mode in (None, parts[1])

    @classmethod
    def _elsewhere(cls, snapshot: Snapshot, model: str) -> str | None:
        return PLAN_FILE if PLAN_FILE in snapshot.files else None  # what a run left, where its folder was pushed

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
                *(e.columns or ()),
                *(("rows", *e.rows) if e.rows else ()),
                *["gain"] * e.gain,
            )
            for e in self.entries
            if e.action != "freeze"
        ]
        return hashlib.sha256(json.dumps([self.mode, sorted(acts)]).encode()).hexdigest()

    @classmethod
    def put_into_words_by(cls, words: Callable[[Plan, SnrReport | None], str]) -> None:
        cls._words = staticmethod(words)

    def explain(self, report: SnrReport | None = None) -> str:
        """What the plan trains and why, as `spectrum-peft plan` prints it.

        Args:
            report: the one the plan was made from; adds how many singular values stand out in the chosen matrices.
        Raises:
            MismatchError: the report is of another checkpoint.
        """
        words = type(self)._words
        assert words is not None, "spectrum_peft.plan puts plans into words, and is not imported"
        return words(self, report)

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{html.escape(self.explain())}</pre>"

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
            "options": as_plain(dict(self.options)),
            "total_parameters": self.total_parameters,
            "notes": list(self.notes),
            "entries": [as_plain(e) for e in self.entries],
            "unfrozen_parameters": self.unfrozen_parameters,
            "patterns": list(self.patterns),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "plan") -> Plan:
        found: Plan = cls._checked(data, source, also=("unfrozen_parameters",))
        refuse_unknown(PlanEntry, data["entries"], f"{source}: entries[{{}}]")
        listed = data.get("unfrozen_parameters")
        if listed is not None and listed != found.unfrozen_parameters:
            logger.warning(
                "%s: unfrozen_parameters, a list for other tools, is not what its entries train; they count", source
            )
        return found
