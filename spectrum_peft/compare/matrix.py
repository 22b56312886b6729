"""From what a user asks for to the cells of the comparison: which method, at which settings, with which seed.

A contestant is a way to train; a cell is a contestant with a seed. Controls are contestants that a claim must beat:
other choices of the same size, other adapters of the same budget. No torch here but where a control needs to know the
shapes of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from .. import names
from ..arguments import LORA_FIELDS
from ..errors import OptionError, near_matches, quoted
from ..plan import LONG_RUN, MODES, OPTIONS, Mode, get_mode, rank_of, ratio_of
from ..records import SnrReport
from ..records.schema import MOST_LISTED, SCALAR, WHOLE, Name, Wanted
from .settings import FILE_KEYS, HEADED, KEYS, Comparison, rate_or_auto, rate_text

# Keys of `train` on which all contestants must agree, or their figures say nothing of each other.
_COMMON = (
    "model", "revision", "task", "dataset", "dataset_split", "eval_dataset", "eval_split", "output_dir",
    "resume_from_checkpoint", "force",
)  # fmt: skip


# What a method of PEFT's own does not take beside its config.
_OURS = frozenset((*OPTIONS, *LORA_FIELDS)) - {"seed"}


@dataclass(frozen=True)
class Contestant:
    """A way to train.

    Attributes:
        label: its name in tables, unique.
        settings: keys of `train` that make it what it is: mode, ratio, criterion, rate, ...
        control: the control that it belongs to, or None.
        peft: fields of a PEFT config, for a method that is no mode of ours.
        also: further names under which the same settings were asked for; they are run once.
    """

    label: str
    settings: Mapping[str, Any]
    control: str | None = None
    peft: Mapping[str, Any] | None = None
    also: tuple[str, ...] = ()

    @property
    def mode(self) -> str:
        """Of ours, or the `peft_type`."""
        return str(self.settings["mode"] if self.peft is None else self.peft["peft_type"])


@dataclass(frozen=True)
class Cell:
    """One run: a contestant with a seed. The cell of the untrained base has no contestant's settings and no seed.

    Attributes:
        train: keys for `train --config`, without paths that only say where results go.
        arguments: flags for the trainer as they were written on the command line.
        measure: what is measured after training; see `cell.measure`.
        inputs: what stands behind the names in `train` and `measure`: digests of weights and of data files.
        until: the step where it stops for now, with a checkpoint; None: it runs to its end. The folder is the same.
    """

    label: str
    seed: int | None
    train: Mapping[str, Any]
    arguments: tuple[str, ...]
    measure: Mapping[str, Any]
    inputs: Mapping[str, str]
    contestant: Contestant | None = None
    until: int | None = None

    @property
    def peft(self) -> Mapping[str, Any] | None:
        return None if self.contestant is None else self.contestant.peft

    @property
    def digest(self) -> str:
        """Of everything that decides the cell's numbers; the label is not part of it."""
        settings = [self.train, self.arguments, self.measure, self.inputs, self.peft]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> str:
        """Name of the cell's folder: readable, and different for different settings."""
        plain = "".join(c if c.isalnum() or c in ".-" else "-" for c in self.label)
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{plain[:60]}{seed}-{self.digest[:10]}"


# --- contestants -----------------------------------------------------------------------------------------------------


class Shapes:
    """What the controls of equal size must know of the model; its headers are read when first asked."""

    def __init__(self, comparison: Comparison) -> None:
        self._train = comparison.train
        self._report: SnrReport | None = None

    def report(self) -> SnrReport:
        """Names and shapes, scored without reading a weight."""
        if self._report is None:
            from ..scan import scan_weights

            self._report = scan_weights(
                self._train["model"], "last", revision=self._train.get("revision"), download=True
            )
        return self._report

    def trainable(self, settings: Mapping[str, Any]) -> int:
        """How many parameters a contestant trains."""
        from ..plan import make_plan
        from ..tuner.config import SpectrumConfig, candidates_of

        fields = {**self._train, **settings, "criterion": "last"}
        known = {k: v for k, v in fields.items() if v is not None and k in SpectrumConfig.__dataclass_fields__}
        config = SpectrumConfig(**{k: v for k, v in known.items() if k not in ("report", "plan", "task_type")})
        plan = make_plan(self.report(), candidates=candidates_of(config, self.report()), **config.options())
        return plan.trainable_parameters

    def mlp_modules(self) -> list[str]:
        """The linear modules of the blocks that are no part of an attention."""
        found = [
            names.module_name(s.name)
            for s in self.report().stats
            if s.role == "linear" and names.block_index(s.name) is not None and "att" not in s.name.lower()
        ]
        if not found:
            raise OptionError("controls: mlp_only finds no linear module outside attention in this model.")
        return list(dict.fromkeys(found))


def _by_criterion(criterion: str) -> Callable[[Comparison, Shapes], list[Contestant]]:
    def build(comparison: Comparison, shapes: Shapes) -> list[Contestant]:
        if criterion in comparison.asked["criteria"]:
            return []  # it is in the matrix already
        return [
            replace(c, control=criterion)
            for mode in _modes(comparison)
            if mode.selective
            for c in _of_mode(comparison, mode, [criterion])
        ]

    return build


def _uniform_rank(comparison: Comparison, shapes: Shapes) -> list[Contestant]:
    """LoRA of one rank on every matrix, with as many parameters and the scale of what chooses or has tiers."""
    made = []
    base = int(comparison.train.get("r") or OPTIONS["r"])
    scale = (comparison.train.get("lora_alpha") or 2 * base) / base
    for mode in _modes(comparison):
        if not (mode.selective and mode.action == "lora") or mode.needs_data:
            continue
        for reference in _of_mode(comparison, mode, comparison.asked["criteria"][:1], rated=False):
            one, two = (shapes.trainable({"mode": "lora", "r": r, "lora_alpha": r}) for r in (1, 2))
            rank = max(1, round((shapes.trainable(reference.settings) - one) / (two - one)) + 1)
            settings = {"mode": "lora", "r": rank, "lora_alpha": max(1, round(scale * rank))}
            made += _rated(comparison, f"lora r{rank}, as many as {reference.label}", settings, "lora", "uniform_rank")
    if not made:
        raise OptionError("controls: uniform_rank needs one of the modes that choose and train LoRA among modes.")
    return made


def _lora_with(label: str, **settings: Any) -> Callable[[Comparison, Shapes], list[Contestant]]:
    return lambda comparison, shapes: _rated(comparison, label, {"mode": "lora", **settings}, "lora", label)


def _mlp_only(comparison: Comparison, shapes: Shapes) -> list[Contestant]:
    settings = {"mode": "lora", "target_modules": shapes.mlp_modules()}
    return _rated(comparison, "lora, MLP only", settings, "lora", "mlp_only")


def _adalora(comparison: Comparison, shapes: Shapes) -> list[Contestant]:
    """From half as many ranks again down to the common rank; a tenth of the steps before, three tenths after the cuts."""
    steps = _flag_value(comparison, "max_steps")
    steps = None if steps is None else WHOLE(f"{comparison.source}: max_steps", steps)
    if steps is None or steps < 1:
        raise OptionError("controls: adalora plans its ranks over the whole run: give max_steps.")
    r = int(comparison.train.get("r") or OPTIONS["r"])
    peft = {
        "peft_type": "ADALORA", "target_modules": "all-linear", "target_r": r, "init_r": r + r // 2,
        "lora_alpha": comparison.train.get("lora_alpha") or 2 * r, "tinit": steps // 10,
        "tfinal": max(1, 3 * steps // 10), "total_step": steps,
    }  # fmt: skip
    return _rated(comparison, "adalora", {}, "lora", "adalora", peft)


def _flag_value(comparison: Comparison, name: str) -> Any:
    """A trainer's argument, from the command line or else from the file."""
    flag = f"--{name.replace('_', '-')}"
    words = list(comparison.arguments)
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return comparison.train.get(name)


# The name of each, and what makes its contestants.
CONTROLS: dict[str, Callable[[Comparison, Shapes], list[Contestant]]] = {
    "random": _by_criterion("random"),
    "last": _by_criterion("last"),
    "first": _by_criterion("first"),
    "spaced": _by_criterion("spaced"),
    "kappa": _by_criterion("kappa"),
    "uniform_rank": _uniform_rank,
    "mlp_only": _mlp_only,
    "rslora": _lora_with("rslora", use_rslora=True),
    "dora": _lora_with("dora", use_dora=True),
    "adalora": _adalora,
}


# What a file may say of a contestant; its other keys are flags of `train`, which are checked there.
CONTESTANTS = Wanted[list[dict[str, Any]]](
    Annotated[list[dict[str, Any]], Meta(max_length=MOST_LISTED)], "a list of mappings"
)
_NAME = Wanted[str](Name, "a name of at most 500 characters, none of them a control character")


class _PeftFields(TypedDict):
    peft_type: Name


_PEFT = Wanted[Any](_PeftFields, "the fields of a PEFT config, peft_type among them")


def _modes(comparison: Comparison) -> list[Mode]:
    return [get_mode(name) for name in comparison.asked["modes"]]


def _of_mode(comparison: Comparison, mode: Mode, criteria: Sequence[str], rated: bool = True) -> list[Contestant]:
    """The contestants of one mode: every ratio and criterion that means something in it, at every rate."""
    if not mode.selective:
        return _rated(comparison, mode.name, {"mode": mode.name}, mode.name)
    other = [n for n in ("snr_threshold", "score_cuts", "trainable_parameters") if comparison.train.get(n) is not None]
    made = []
    for ratio in [None] if other else comparison.asked["ratios"]:
        for criterion in criteria:
            share = {} if ratio is None else {"spectrum_ratio": ratio}
            label = mode.name + ("" if ratio is None else f" {ratio:g}")
            label += "" if criterion == OPTIONS["criterion"] else f" by {criterion}"
            settings = {"mode": mode.name, **share, "criterion": criterion}
            made += _rated(comparison, label, settings, mode.name) if rated else [Contestant(label, settings)]
    return made


def usual_rate(
    mode: Mode, chosen: Mapping[str, Any], task: str, steps: int, peft: Mapping[str, Any] | None = None
) -> float:
    """The default rate of a contestant, in a run of so many steps.

    Args:
        mode: its own; that of a method of PEFT's own is LoRA.
        chosen: keys of `train`.
        peft: fields of a PEFT config, for a method that is no mode of ours.
    """
    rank = rank_of(chosen, OPTIONS["r"]) if peft is None else rank_of(peft)
    return mode.rate_for(steps, rank, 1.0 if task in HEADED else ratio_of(chosen))


def _rated(
    comparison: Comparison,
    label: str,
    settings: Mapping[str, Any],
    mode: str,
    control: str | None = None,
    peft: Mapping[str, Any] | None = None,
) -> list[Contestant]:
    """One contestant for each learning rate; the rate is in the name where there is more than one."""
    rates = comparison.asked["learning_rates"]
    if isinstance(rates, Mapping):
        rates = rates.get(label, rates.get(mode))
    factors = comparison.asked["learning_rate_factors"]
    if not rates and factors == [1.0]:
        return [Contestant(label, dict(settings), control, peft)]  # the run takes its mode's own
    chosen = {**comparison.train, **settings}
    rates = rates or [usual_rate(get_mode(mode), chosen, comparison.task, comparison.steps or LONG_RUN, peft)]
    rates = [r if r == "auto" else float(f"{r * factor:.6g}") for r in rates for factor in factors]
    rates = list(dict.fromkeys(rates))
    return [
        Contestant(
            label if len(rates) == 1 else f"{label} at {rate_text(rate)}",
            {**settings, "learning_rate": rate},
            control,
            peft,
        )
        for rate in rates
    ]


def _given(comparison: Comparison, row: Mapping[str, Any], number: int) -> list[Contestant]:
    """A contestant that the config file spells out."""
    where = f"{comparison.source}: contestants, number {number}"
    if not row.get("name"):
        raise OptionError(f"{where} is {quoted(row)}, wanted a mapping with a name.")
    name = _NAME(f"{where}: name", str(SCALAR(f"{where}: name", row["name"])))
    settings = {str(k).replace("-", "_"): v for k, v in row.items() if k not in ("name", "peft")}
    peft = row.get("peft")
    if "ratio" in settings:
        settings["spectrum_ratio"] = settings.pop("ratio")
    if (peft is None) == ("mode" not in settings):
        raise OptionError(f"{where} ({name}): wanted either mode or peft.")
    if "seed" in settings:
        raise OptionError(f"{where} ({name}): seed is {quoted(settings['seed'])}; seeds are those of the comparison.")
    for key in settings:
        if key in _COMMON or key in KEYS or key.endswith("_column"):
            raise OptionError(
                f"{where} ({name}): {key} is {quoted(settings[key])}, but all contestants share it; give it for all."
            )
    if peft is not None:
        _PEFT(f"{where} ({name}): peft", peft)
    mode = get_mode(settings["mode"]).name if peft is None else "lora"
    if "learning_rate" in settings:
        rate = rate_or_auto(f"{where}: learning_rate", settings["learning_rate"])
        return [Contestant(name, {**settings, "learning_rate": rate}, None, peft)]
    return _rated(comparison, name, settings, mode, None, peft)


def contestants_of(comparison: Comparison, shapes: Shapes | None = None) -> list[Contestant]:
    """All contestants, in the order of the tables; of two with the same settings the first.

    Raises:
        OptionError: there is none, two have one name, a key of learning_rates is no mode and no contestant.
    """
    shapes = shapes or Shapes(comparison)
    made = [c for mode in _modes(comparison) for c in _of_mode(comparison, mode, comparison.asked["criteria"])]
    for control in comparison.asked["controls"]:
        made += CONTROLS[control](comparison, shapes)
    for number, row in enumerate(comparison.asked["contestants"], 1):
        made += _given(comparison, row, number)
    rates = comparison.asked["learning_rates"]
    if isinstance(rates, Mapping):
        known = (
            {c.label for c in made} | {c.label.rpartition(" at ")[0] for c in made if " at " in c.label} | set(MODES)
        )
        for key in rates:
            if key not in known:
                raise OptionError(
                    f"{comparison.source}: learning_rates: {key!r} is no mode." + near_matches(key, known)
                )
    kept: dict[str, Contestant] = {}
    labels: set[str] = set()
    for c in made:
        same = json.dumps([c.settings, c.peft], sort_keys=True)
        if same in kept:
            first = kept[same]
            if c.label not in (first.label, *first.also):
                kept[same] = replace(first, also=(*first.also, c.label))
            continue
        if c.label in labels:
            raise OptionError(f"{comparison.source}: two contestants are called {c.label!r}.")
        kept[same] = c
        labels.add(c.label)
    reference = comparison.asked["reference"]
    for c in kept.values():
        if reference in c.also and reference not in labels:
            raise OptionError(
                f"{comparison.source}: reference: {reference!r} is the same as {c.label!r}, which stands in the tables."
            )
    if reference is not None and reference not in labels:
        raise OptionError(
            f"{comparison.source}: reference: {reference!r} is no contestant."
            + near_matches(str(reference), sorted(labels))
        )
    if not kept:
        raise OptionError(f"{comparison.source}: there is nothing to compare: modes and contestants are empty.")
    return list(kept.values())


# --- cells -----------------------------------------------------------------------------------------------------------


def measures_of(comparison: Comparison) -> dict[str, Any]:
    """What every cell measures besides training; see `cell.measure`."""
    asked, wanted = comparison.asked, {}
    if asked["general_text"]:
        wanted["forgetting"] = {"dataset": asked["general_text"], "split": asked["general_split"]}
    if asked["generate"]:
        wanted["generation"] = {
            "metrics": asked["generate"], "rows": asked["generate_rows"], "max_new_tokens": asked["max_new_tokens"],
        }  # fmt: skip
    if asked["generation_speed"]:
        wanted["speed"] = {"tokens": 32}
    return wanted


def cells_of(comparison: Comparison, contestants: Sequence[Contestant], inputs: Mapping[str, str]) -> list[Cell]:
    """Every contestant with every seed: seed by seed, so that a comparison that is stopped has whole rounds.

    Args:
        inputs: digests of what the names in the settings stand for.
    Returns:
        The cells; before them the untrained base where something is measured that training itself does not tell.
    """
    measure = measures_of(comparison)
    shared = {k: v for k, v in comparison.train.items() if v is not None}
    cells = []
    if measure:
        cells.append(Cell("untrained", None, shared, comparison.arguments, measure, inputs))
    for seed in comparison.asked["seeds"]:
        for c in contestants:
            mine = shared if c.peft is None else {k: v for k, v in shared.items() if k not in _OURS}
            train = {**mine, **c.settings, "seed": seed}
            cells.append(Cell(c.label, seed, train, comparison.arguments, measure, {**inputs, **_files(train)}, c))
    return cells


def _files(train: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that a run's settings name."""
    named = {key: train[key] for key in FILE_KEYS if isinstance(train.get(key), str)}
    return {key: digest for key, name in named.items() if (digest := file_digest(name))}


def file_digest(source: str) -> str | None:
    """sha256 of a local dataset file; None for a hub id or a folder, whose name must do."""
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
