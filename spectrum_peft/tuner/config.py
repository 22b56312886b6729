"""`SpectrumConfig`: what the user asks for, as PEFT configs say it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from .. import names
from ..errors import OptionError, near_matches
from ..plan import MODES, OPTIONS, check_options, checked_plan, columns_of_rank, get_mode, in_towers, with_columns
from ..records import ADAPTER_ACTIONS, GradientReport, Plan, SnrReport, with_usual_modes
from ..records.schema import MOST_RANK
from ..scan import report_named
from .lora_fields import check_lora_fields
from .plain_lora import write_plain

# Actions whose size the user sets by a rank, module by module.
_BY_RANK = ("lora", "columns")
PEFT_TYPE = "SPECTRUM"


@dataclass
class SpectrumConfig(LoraConfig):
    """Configuration of selective fine-tuning by weight spectrum; one word, `mode`, switches the method.

    All fields of `peft.LoraConfig` stay; what each does here, or that it is refused, is in `lora_fields.FIELDS`.
    `target_modules`, `target_parameters`, `exclude_modules` and `layers_to_transform` narrow the candidates before the ratio
    is applied (default: every Linear and Conv1D but the output head). `modules_to_save` and `trainable_token_indices` train as
    in PEFT and appear in the plan with action `save`.

    Args:
        mode: key of `plan.MODES`: `full`, `spectrum`, `lora`, `spectra_qlora`, `alors`, `sgm`, `lorsa`, `columns`.
        criterion: key of `criteria.CRITERIA`; what a matrix scores.
        spectrum_ratio: share of the matrices of each kind that are chosen, in (0, 1].
        snr_threshold: takes every matrix that scores above it, instead of a ratio.
        scope: `per_kind` (as published) or `global`.
        measure: `count` or `parameters`; what the ratio is a share of.
        coverage: the blocks are cut into this many runs, and the best-scored of each is taken in turn; None: by score alone.
        backward_depth: share of the blocks, counted from the output, that may be chosen; backward stops below them.
        train_embeddings, train_head, train_norms: train these too; all are frozen unless asked for.
        towers: of a model that sees or hears, where matrices are chosen: `language` (the default, where a decoder writes the
            text), `vision`, `audio`, or `all`, which is the default everywhere else.
        train_projectors: train, whole, what leads from one tower to another.
        keep_base: where the original of a weight that trains is kept for `disable_adapter()` and `unmerge`: `host` (a
            copy in main memory), `file` (read back from the checkpoint when needed), `none` (refuse), `auto` (`file`
            where the local checkpoint holds exactly the loaded values, else `host`).
        trainable_dtype: `float32`, or `base` for the dtype of the model as loaded.
        r, lora_alpha: rank and scale of adapters (the scale is lora_alpha / r in every tier); lora_alpha None is 2 * r.
        r_high, r_medium: ranks of the two tiers of `alors`; None: r, and max(1, r // 4).
        trainable_parameters: `alors`: an exact number of adapter parameters instead of a ratio.
        score_cuts: `alors`: (high, medium) scores instead of a ratio.
        lr_ratio: `alors`: bounds of the learning-rate ratio, which grows with importance.
        rescore_every: steps between two evaluations of the ranks during training, or `epoch`; None: never.
        similarity: `sgm`: what makes two matrices alike, `subspace` or `cosine`.
        similarity_threshold, n_groups: `sgm`: how alike the members of a group are at least, or how many groups a kind has.
        share: `sgm`: `residual_side` shares the factor that faces the residual stream, `both` shares both.
        group_gain: `sgm`: a trained number per matrix that scales the group's update.
        n_components, component_scope: `lorsa`: singular components that train, of each matrix (`layer`), or on average over
            all matrices (`global`).
        svd_rank: `lorsa`: how many leading components are looked at.
        rotation_rank: `lorsa`: rank of the rotations of their singular vectors.
        n_columns: `columns`: how many columns of each matrix train; None: a share `spectrum_ratio` of them, or else as many as
            have the parameters of a LoRA of rank r (of `rank_pattern`, by module).
        columns_by: `columns`: which ones: `random`, or by a column's energy in the signal part of the `spectrum`, by the mean
            square of the input feature (`activation`) or by its `fisher` mass, both on calibration data.
        column_block: `columns`: they come in runs of this many.
        rows_of: `columns`: names, or ends of names, of modules of which rows train instead.
        coupled: `columns`: those rows are the hidden features that another matrix' columns take; without `rows_of` those of
            every matrix for which there is one.
        head_width: `columns`: hidden features of an attention come in whole heads of so many; None: of the model's, where
            `coupled`.
        calibration_data: batches, dicts that the model accepts, with labels; for modes and criteria that need gradients.
            Used once, never saved.
        gradients: a GradientReport or a path to one, instead of calibration_data.
        seed: of the `random` criterion and of new adapter rows.
        preset: `published` chooses as the published script does, entry for entry.
        report: an SnrReport, a path to one, `auto` (`find_report`), or a repository of the hub that has one of the model.
            Without it the model is scanned.
        plan: a Plan, or a path to one. It wins over report and options.
        force: use a report or plan although its fingerprint differs from the model's.

    Raises:
        OptionError: an option is unknown, outside its range, or excludes another.
    """

    r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "The adapters' update is scaled by lora_alpha / r; default 2 * r."}
    )
    mode: str = field(default="spectrum", metadata={"help": "Training mode, a key of plan.MODES."})
    criterion: str = field(default="spectrum", metadata={"help": "Score of a matrix, a key of criteria.CRITERIA."})
    spectrum_ratio: float | None = field(default=None, metadata={"help": "Share of each kind to choose; default 0.5."})
    snr_threshold: float | None = field(default=None, metadata={"help": "Choose every matrix above this score."})
    scope: str = field(default="per_kind", metadata={"help": "per_kind or global."})
    measure: str = field(default="count", metadata={"help": "count or parameters."})
    coverage: int | None = field(default=None, metadata={"help": "Bins of the depth, the best of each taken in turn."})
    backward_depth: float = field(default=1.0, metadata={"help": "Share of the blocks, from the output, to choose in."})
    train_embeddings: bool = field(default=False, metadata={"help": "Train the embeddings too."})
    train_head: bool = field(default=False, metadata={"help": "Train the output head too."})
    train_norms: bool = field(default=False, metadata={"help": "Train the norms too."})
    towers: str | None = field(default=None, metadata={"help": "language, vision, audio or all."})
    train_projectors: bool = field(default=False, metadata={"help": "Train what leads from one tower to another too."})
    keep_base: str = field(default="auto", metadata={"help": "auto, host, file or none."})
    trainable_dtype: str = field(default="float32", metadata={"help": "float32 or base."})
    r_high: int | None = field(default=None, metadata={"help": "alors: rank of the high tier."})
    r_medium: int | None = field(default=None, metadata={"help": "alors: rank of the medium tier."})
    trainable_parameters: int | None = field(default=None, metadata={"help": "alors: exact budget."})
    score_cuts: tuple[float, float] | None = field(default=None, metadata={"help": "alors: (high, medium) scores."})
    lr_ratio: tuple[float, float] = field(default=(0.5, 2.0), metadata={"help": "alors: bounds of the rate ratio."})
    rescore_every: int | str | None = field(default=None, metadata={"help": "Steps, 'epoch', or None."})
    similarity: str = field(default="subspace", metadata={"help": "sgm: subspace or cosine."})
    similarity_threshold: float | None = field(default=None, metadata={"help": "sgm: least likeness within a group."})
    n_groups: int | None = field(default=None, metadata={"help": "sgm: groups of each kind and shape."})
    share: str = field(default="residual_side", metadata={"help": "sgm: residual_side or both."})
    group_gain: bool = field(default=False, metadata={"help": "sgm: a trained gain for each matrix."})
    n_components: int = field(default=64, metadata={"help": "lorsa: singular components that train."})
    component_scope: str = field(default="layer", metadata={"help": "lorsa: layer or global."})
    svd_rank: int = field(default=256, metadata={"help": "lorsa: leading components that are looked at."})
    rotation_rank: int = field(default=4, metadata={"help": "lorsa: rank of the rotations."})
    n_columns: int | None = field(default=None, metadata={"help": "columns: how many of each matrix train."})
    columns_by: str = field(default="random", metadata={"help": "columns: random, spectrum, activation or fisher."})
    column_block: int = field(default=1, metadata={"help": "columns: length of their contiguous runs."})
    rows_of: list[str] | None = field(default=None, metadata={"help": "columns: modules of which rows train."})
    coupled: bool = field(default=False, metadata={"help": "columns: rows follow the columns of another matrix."})
    head_width: int | None = field(default=None, metadata={"help": "columns: features of a head, taken whole."})
    seed: int = field(default=0, metadata={"help": "Seed of random choices and of new adapter rows."})
    preset: str | None = field(default=None, metadata={"help": "'published': choose as the published script does."})
    report: Any = field(default=None, metadata={"help": "SnrReport, a path to one, auto, or a hub repository."})
    plan: Any = field(default=None, metadata={"help": "Plan or a path to one; wins over report and options."})
    gradients: Any = field(default=None, metadata={"help": "GradientReport or a path to one."})
    calibration_data: Any = field(default=None, metadata={"help": "Batches with labels; used once, never saved."})
    force: bool = field(default=False, metadata={"help": "Use a report or plan of another fingerprint."})

    # Set by the tuner: the modules that get a layer. Not a field: it follows from the plan.
    planned_modules = frozenset[str]()
    # Set with the plan: embeddings of which single rows train.
    row_modules = frozenset[str]()
    # Set by the tuner: {module: the module that trains whole and whose tensor it shares}, the input embeddings' ties left out.
    twins: ClassVar[Mapping[str, str]] = {}
    # Set by the tuner: the planned modules that plain PEFT takes for something else in a model of this type.
    retargeted = frozenset[str]()
    # Set by the tuner: the planned modules whose tensors plain PEFT would not find again in a LoRA's file.
    misread = frozenset[str]()
    # The plan came inside an adapter_config.json, so the adapter's tensors are in a file beside it.
    plan_from_file = False

    def __post_init__(self) -> None:
        if isinstance(self.lr_ratio, list):
            self.lr_ratio = tuple(self.lr_ratio)
        if isinstance(self.score_cuts, list):
            self.score_cuts = tuple(self.score_cuts)
        if isinstance(self.plan, str | os.PathLike):
            self.plan = checked_plan(Plan.named(self.plan), str(self.plan))
        elif isinstance(self.plan, Mapping):
            where = "adapter_config.json: plan"
            self.plan = checked_plan(Plan.from_dict(self.plan, where), where)
            self.plan_from_file = True
        if self.plan is not None:
            self._take_options_of_plan(self.plan)
            self.report = None if self.report == "auto" else self.report  # it was for a plan to be made
        else:
            self.options()  # refuses what is outside its range
            if self.rank_pattern or self.alpha_pattern:
                self._check_patterns()
        if self.gradients is not None and self.calibration_data is not None:
            raise OptionError(
                "gradients and calibration_data are both given; the second is what the first comes from, give one."
            )
        check_lora_fields(self)
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType[PEFT_TYPE]

    def _check_patterns(self) -> None:
        """Ranks and scales by hand go with adapters whose rank is the user's to choose, module by module."""
        mode = get_mode(self.mode)
        fitting = [m.name for m in MODES.values() if m.action in _BY_RANK and "r_high" not in m.own_options]
        if mode.action in ADAPTER_ACTIONS and mode.name not in fitting:
            raise OptionError(
                f"rank_pattern or alpha_pattern is given together with mode={self.mode!r}, which sets ranks and scales itself. "
                f"Leave them out, or use one of the modes {', '.join(map(repr, fitting))}."
            )
        if self.rescore_every is not None:
            raise OptionError(
                f"rank_pattern or alpha_pattern is given together with rescore_every={self.rescore_every!r}, which moves ranks. "
                "Leave out one of them."
            )
        others = ("alpha_pattern", "n_columns", "spectrum_ratio", "coupled")
        if mode.action == "columns" and any(getattr(self, n) for n in others):
            given = next(n for n in others if getattr(self, n))
            raise OptionError(
                f"{given}={getattr(self, given)!r}: in mode 'columns' rank_pattern says how many columns a module has, beside r, "
                "and there is no scale. Leave one of them out."
            )
        for pattern, rank in (self.rank_pattern or {}).items():
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MOST_RANK:
                raise OptionError(
                    f"rank_pattern: {pattern!r} has rank {rank!r}, wanted a whole number from 1 to {MOST_RANK}."
                )

    def with_patterns(self, plan: Plan, gradients: GradientReport | None = None) -> Plan:
        """The plan with the ranks and scales of `rank_pattern` and `alpha_pattern`, matched as PEFT matches them.

        As in PEFT a rank of its own does not change alpha: the scale is then lora_alpha / rank. In mode `columns` a module has
        as many columns as have the parameters of a LoRA of its rank.

        Raises:
            OptionError: a pattern that matches no adapter of the plan.
        """
        action = get_mode(self.mode).action
        if not (self.rank_pattern or self.alpha_pattern) or action not in _BY_RANK:
            return plan
        ranks, alphas = self.rank_pattern or {}, self.alpha_pattern or {}
        modules = {e.name: names.module_name(e.name) for e in plan.entries if e.action in (action, "freeze")}
        for where, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            for pattern in patterns:
                if not any(get_pattern_key([pattern], module) == pattern for module in modules.values()):
                    raise OptionError(f"{where}: {pattern!r} matches no module that could have an adapter.")
        entries = []
        for entry in plan.entries:
            by_rank = get_pattern_key(list(ranks), modules.get(entry.name, ""))
            if entry.action == "columns" and by_rank in ranks:
                rows = entry.rows is not None
                count = columns_of_rank(entry, ranks[by_rank], rows=rows)
                entry = with_columns(entry, count, plan.options, gradients, rows=rows)
            elif entry.action == "lora" and entry.rank:
                by_alpha = get_pattern_key(list(alphas), modules[entry.name])
                alpha = float(alphas.get(by_alpha, self.lora_alpha or 2 * self.r))
                entry = dataclasses.replace(entry, rank=ranks.get(by_rank, entry.rank), alpha=alpha)
            entries.append(entry)
        return plan.replace(entries=tuple(entries))

    def options(self) -> dict[str, Any]:
        """The plan's options as given here, validated, with defaults filled in."""
        return check_options(**{name: getattr(self, name) for name in OPTIONS if hasattr(self, name)})

    def _take_options_of_plan(self, plan: Plan) -> None:
        """The plan wins: fields that it fixes read as it says, so that a printed config does not lie."""
        if self.mode not in {"spectrum", plan.mode}:
            raise OptionError(f"mode is {self.mode!r}, but the plan that was given is of mode {plan.mode!r}.")
        self.mode = plan.mode
        for name, value in plan.options.items():
            if name in OPTIONS and hasattr(self, name):
                setattr(self, name, value)

    def resolved_report(self, model: Any = None, **how: Any) -> SnrReport | None:
        """The report given, wherever it is: a record, a file, a repository of the hub, or `auto`; see `scan.report_named`.

        Args:
            model: that it is of, in memory, a folder or a hub id; `auto` asks for one. how: more of `report_named`.
        """
        if self.report is None:
            return None
        criterion = None if self.criterion == OPTIONS["criterion"] else self.criterion  # the default is no wish
        scored = get_mode(self.mode).selective
        return report_named(self.report, model, criterion, seed=self.seed, scored=scored, force=self.force, **how)

    def resolved_gradients(self) -> GradientReport | None:
        """The gradients given, read from their file where that is a path."""
        if self.gradients is None or isinstance(self.gradients, GradientReport):
            return self.gradients
        gradients: GradientReport = GradientReport.load(self.gradients)
        return gradients

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `adapter_config.json`: the plan travels inside, reports and data stay behind."""
        bare = copy.copy(self)
        bare.plan = bare.report = bare.gradients = bare.calibration_data = None
        data: dict[str, Any] = LoraConfig.to_dict(bare)  # type: ignore[no-untyped-call]
        data["plan"] = None if self.plan is None else self.plan.to_dict()
        return data

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; the config of what is a plain LoRA is written as one, with `spectrum_adapter.json` beside it."""
        super().save_pretrained(save_directory, **kwargs)
        with_usual_modes(Path(save_directory))  # PEFT writes the tensors first
        write_plain(self, Path(save_directory))


class UnknownField(OptionError, TypeError):
    """A keyword that `SpectrumConfig` does not have; a `TypeError`, as of any call, so that PEFT can leave out what a newer
    version has saved."""


def _with_near_matches(init: Callable[..., None]) -> Callable[..., None]:
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                # Names that other tools have for the same.
                same = {"rank": "r", "alpha": "lora_alpha", "ratio": "spectrum_ratio", "dropout": "lora_dropout"}.get(
                    name
                )
                hint = f" Did you mean {same!r}?" if same else near_matches(name, known)
                raise UnknownField(f"SpectrumConfig has no field {name!r}.{hint}")
        init(self, *args, **kwargs)

    return checked


SpectrumConfig.__init__ = _with_near_matches(SpectrumConfig.__init__)  # type: ignore[method-assign]


def candidates_of(config: SpectrumConfig, report: SnrReport) -> list[str] | None:
    """The matrices that `target_modules`, `target_parameters`, `exclude_modules` and `layers_to_transform` leave, as names of
    the report. As in PEFT, `target_parameters` alone means them alone, and beside `target_modules` adds to these.

    Returns:
        None where none of these fields is set: every Linear and Conv1D but the output head.
    Raises:
        OptionError: the fields leave nothing, or one name in a list of targets matches nothing.
    """
    every = config.target_modules in (None, "all-linear")
    by_parameter = config.target_parameters or []
    narrowed = (
        config.exclude_modules or config.layers_to_transform is not None or config.modules_to_save or by_parameter
    )
    if MODES[config.mode].whole_model or (every and not narrowed):
        return None
    linear = [s for s in report.stats if s.role == "linear"]
    if every and not by_parameter:
        linear = in_towers(linear, config.towers)
    owners = {s.name: _owner(s.name) for s in linear}
    only_parameters = bool(by_parameter) and config.target_modules is None
    kept = set() if only_parameters else set(_narrowed(config, dict.fromkeys(owners.values())))
    found = dict.fromkeys(name.partition("[")[0] for name in owners)
    asked = _by_parameter(by_parameter, found)
    inside = {name.partition("[")[0] for name, owner in owners.items() if owner in kept}
    return [name for name in found if name in inside or name in asked]


def _by_parameter(wanted: Iterable[str], present: Iterable[str]) -> set[str]:
    """The matrices that names or ends of names of parameters mean."""
    present = list(present)
    asked = set()
    for end in wanted:
        matches = {name for name in present if f".{name}".endswith(f".{end}")}
        if not matches:
            leaves = {".".join(name.split(".")[-3:]) for name in present}
            raise OptionError(f"target_parameters: {end!r} matches no matrix of the model." + near_matches(end, leaves))
        asked |= matches
    return asked


def _owner(name: str) -> str:
    """What a user calls the target: the module of a weight, the parameter itself where experts are fused into one."""
    name = name.partition("[")[0]
    return names.module_name(name) if name.endswith(".weight") else name


def refuse_unknown_targets(targets: Iterable[str], owners: Iterable[str]) -> None:
    """
    Args:
        owners: full names of the modules that there are to target.
    Raises:
        OptionError: a target is the name, or the end of one, of none of them.
    """
    owners = list(owners)
    for wanted in sorted(targets):
        if not any(name == wanted or name.endswith(f".{wanted}") for name in owners):
            leaves = {name.rpartition(".")[2] for name in owners}
            said = f"{wanted!r} matches no Linear of the model." + near_matches(wanted, leaves)
            raise OptionError(f"target_modules: {said}", shell=f"--target-modules: {said}")


def _narrowed(config: LoraConfig, owners: Iterable[str]) -> list[str]:
    owners = list(owners)
    probe = copy.copy(config)
    if probe.target_modules in (None, "all-linear"):  # by leaf, so that layers_to_transform applies as well
        probe.target_modules = sorted({name.rpartition(".")[2] for name in owners})
    if isinstance(config.target_modules, list | set | tuple):
        refuse_unknown_targets(config.target_modules, owners)
    kept = [name for name in owners if check_target_module_exists(probe, name)]
    if not kept:
        raise OptionError(
            f"target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} leave none of {len(owners)} candidate modules."
        )
    return kept
