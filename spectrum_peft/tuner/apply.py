"""From a config to a plan that fits the model at hand, and from a plan to what must train; then the check that it does.

Nothing here puts layers into a model (that is `model.py`); plain models are only frozen.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .. import names
from ..errors import CheckpointError, MismatchError, OptionError, near_matches
from ..plan import COLUMNS_BY_DATA, MODES, OPTIONS, make_plan, needs_gradients, worth_probing
from ..probe import column_energies, probe_gradients
from ..records import ADAPTER_ACTIONS, REAL_WEIGHT_ACTIONS, GradientReport, Plan, PlanEntry, SnrReport
from ..scan import scan_weights
from ..weights import (
    FileWeights,
    checkpoint_folder,
    new_parameters,
    open_weights,
    output_head,
    refuse_partitioned,
    role_of,
    skeleton_like,
    tower_in,
    towers_of,
    without_adapters,
)
from .config import SpectrumConfig, candidates_of
from .layers import SpectrumLayer
from .stored_bases import refuse_kept_quantized

logger = logging.getLogger(__name__)

_TASKS_WITH_A_NEW_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_CLASSES_WITH_A_NEW_HEAD = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


def base_of(model: nn.Module) -> nn.Module:
    """The user's model inside a PeftModel or a tuner, with adapters still in it; a plain model is returned as it is."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def base_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """{full name in the base model: (module that owns the parameter, name there)}, as if no adapter were there.

    A tied tensor appears under each of its names. A parameter that a `SpectrumLayer` holds appears under its base name.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
        if isinstance(module, SpectrumLayer):
            for name in module.originals:
                yield f"{prefix}{name}", (module.base_layer, name)
        if isinstance(module, BaseTunerLayer):
            yield from walk(module.base_layer, prefix)
            return
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from walk(module.original_module, prefix)
            return
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}{name}", (module, name)
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{prefix}{name}.")

    return dict(walk(base_of(model), ""))


def plan_parameters(model: nn.Module, adapter_name: str | None = None) -> dict[str, str]:
    """{parameter name in `model`: name of the plan entry it belongs to}.

    With tuner layers: the parameters of `adapter_name` (None: of the active ones). On a plain model: every parameter.
    """
    found: dict[str, str] = {}

    def add(module: nn.Module, full: str, entry: str) -> None:
        for name, _ in module.named_parameters(prefix=full, remove_duplicate=False):
            found[name] = entry

    def wanted(module: Any, name: str) -> bool:
        return name == adapter_name if adapter_name else name in module.active_adapters

    def visit(module: nn.Module, full: str, clean: str) -> None:
        if isinstance(module, BaseTunerLayer):
            if isinstance(module, SpectrumLayer):
                for adapter, held in module.lora_spectrum.items():
                    if wanted(module, adapter):
                        for name, _ in held.named_parameters():
                            found[f"{full}lora_spectrum.{adapter}.{name}"] = f"{clean}{name}"
            else:
                leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
                for attribute in module.adapter_layer_names:
                    container = getattr(module, attribute)
                    if not isinstance(container, nn.ModuleDict | nn.ParameterDict):
                        continue
                    for adapter, child in container.items():
                        if not wanted(module, adapter):
                            continue
                        if isinstance(child, nn.Parameter):
                            found[f"{full}{attribute}.{adapter}"] = f"{clean}{leaf}"
                        else:
                            add(child, f"{full}{attribute}.{adapter}", f"{clean}{leaf}")
            visit(module.base_layer, f"{full}base_layer.", clean)
            return
        if isinstance(module, AuxiliaryTrainingWrapper):
            if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
                for adapter, child in module.modules_to_save.items():
                    if wanted(module, adapter):
                        for name, _ in child.named_parameters():
                            found[f"{full}modules_to_save.{adapter}.{name}"] = f"{clean}{name}"
            else:  # rows of an embedding (trainable_token_indices)
                for name, parameter in module.named_parameters():
                    if "original_module" not in name and "base_layer" not in name and parameter.requires_grad:
                        found[f"{full}{name}"] = f"{clean}weight"
            return
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{full}{name}.", f"{clean}{name}.")
        for name, parameter in module._parameters.items():
            if parameter is not None and (not wrapped or parameter.requires_grad):
                found[f"{full}{name}"] = f"{clean}{name}"

    wrapped = any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in model.modules())
    inner = base_of(model)
    start = next((f"{name}." if name else "" for name, module in model.named_modules() if module is inner), "")
    visit(inner, start, "")
    return found


# --- the plan for this model -----------------------------------------------------------------------------------------


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """Every layer computes, and is read, as the base; `requires_grad` stays as it is."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def settle_plan(model: nn.Module, config: SpectrumConfig, *, layers: bool = False) -> Plan:
    """The plan that `config` means for the base model, with the model's own parameter names.

    Adapters that are on it already are of no consequence. The plan wins, the report comes next, else the model is scanned
    (a finished scan of the same weights is used again, and said so). What `modules_to_save`,
    `trainable_token_indices`, `bias` and a new task head add has action `save`.
    Raises:
        MismatchError: report or plan of another checkpoint; an entry that matches nothing.
        OptionError: the config leaves nothing to choose from.
        CheckpointError: the model computes with quantized weights on which nothing trains here.
    """
    refuse_partitioned(model)
    refuse_kept_quantized(base_of(model))
    with _adapters_off(model):
        return _settled(model, config, layers)


def _settled(model: nn.Module, config: SpectrumConfig, layers: bool) -> Plan:
    present = base_parameters(model)
    if config.plan is not None:
        plan = config.plan
        _check_fingerprint(plan.fingerprint, model, "the plan", config.force)
        plan = _with_model_names(plan, model, present)
        if not config.plan_from_file:
            unfit = unfit_matrices(model, plan.mode, layers=layers)
            left = {e.name: unfit[e.name] for e in plan.entries if e.name in unfit}
            plan = plan.replace(
                entries=tuple(e for e in plan.entries if e.name not in left), notes=(*plan.notes, *_summed_up(left))
            )
        _settle_tokens(model, config, plan, present)
        return _with_saved(model, config, plan, present)
    report = config.resolved_report(base_of(model))
    options = config.options()
    if report is None:
        by_data = options["criterion"] == "fisher"  # whose scores the gradients hold: names and shapes will do
        score = ("linear",) if MODES[config.mode].selective and not by_data else ()
        criterion = OPTIONS["criterion"] if by_data else options["criterion"]
        report = scan_weights(base_of(model), criterion, score=score, cache=bool(score), seed=config.seed)
    else:
        _check_fingerprint(report.fingerprint, model, "the report", config.force)
    report = _without(_report_with_model_names(report, model, present), new_parameters(model) or ())
    unfit = unfit_matrices(model, config.mode, layers=layers)
    fit = _without(report, unfit)
    if unfit and not any(s.role == "linear" for s in fit.stats) and any(s.role == "linear" for s in report.stats):
        name, why = next(iter(unfit.items()))
        raise OptionError(f"mode {config.mode!r} can train none of the model's matrices; the first is {name}: {why}.")
    report = fit
    candidates = candidates_of(config, report)
    if options["coupled"] and options["head_width"] is None:
        options["head_width"] = _head_width(base_of(model))
    gradients = None
    if needs_gradients(options):
        gradients = _gradients(model, config, options, worth_probing(report, candidates, options))
    elif options["columns_by"] == "spectrum":
        gradients = config.resolved_gradients() or column_energies(base_of(model), candidates, options["criterion"])
    plan = config.with_patterns(make_plan(report, gradients=gradients, candidates=candidates, **options), gradients)
    left = {name: why for name, why in unfit.items() if name in {s.name for s in report.stats}}
    plan = plan.replace(notes=(*plan.notes, *_summed_up(left)))
    config.report = report
    _settle_tokens(model, config, plan, present)
    return _with_saved(model, config, plan, present)


def _head_width(model: nn.Module) -> int | None:
    """Hidden features of one head of an attention, as the model's config says it; None where it does not."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width, heads = (getattr(config, key, None) for key in ("hidden_size", "num_attention_heads"))
    return said or (width // heads if width and heads else None)


def _with_saved(model: nn.Module, config: SpectrumConfig, plan: Plan, present: dict[str, Any]) -> Plan:
    """The plan with what trains in whole modules: what it trains anyway inside of them, and what the config adds."""
    inside = [
        dataclasses.replace(e, action="save")
        if e.action == "train" and names.lies_in(e.name, config.modules_to_save)
        else e
        for e in plan.entries
    ]
    head = output_head(base_of(model))
    for entry in inside:  # embeddings and heads that are called neither
        owner = present[entry.name][0] if entry.name in present else None
        whole = isinstance(owner, nn.Embedding | nn.EmbeddingBag) or (owner is head and owner is not None)
        if (
            entry.action in REAL_WEIGHT_ACTIONS
            and entry.trains
            and whole
            and not names.lies_in(entry.name, config.modules_to_save)
        ):
            if names.role(entry.name, entry.shape) == "linear":
                config.modules_to_save = [*(config.modules_to_save or ()), names.module_name(entry.name)]
    new = () if config.plan_from_file else new_to_train(model, config, present)
    listed = {e.name for e in inside if e.trains}
    plan = plan.replace(entries=tuple(e for e in inside if e.trains or e.name not in new))
    rest = tuple(name for name in new if name not in listed)
    return plan.replace(entries=(*plan.entries, *_saved_entries(model, config, plan, present, rest)))


def new_to_train(model: nn.Module, config: SpectrumConfig, present: dict[str, Any]) -> tuple[str, ...]:
    """Parameters that the model's checkpoint lacks, which train and are saved whole; a log line names them.

    What `exclude_modules` names stays as it is, random, with a warning.
    """
    new = [name for name in new_parameters(base_of(model)) or () if name in present]
    excluded = [name for name in new if _is_excluded(names.module_name(name), config.exclude_modules)]
    if excluded:
        logger.warning(
            "%d parameters are in no checkpoint and exclude_modules keeps them frozen, so they stay random: %s",
            len(excluded),
            ", ".join(excluded),
        )
    kept = tuple(name for name in new if name not in excluded)
    if kept:
        logger.info(
            "%d parameters are in no checkpoint; they train and are saved whole: %s", len(kept), ", ".join(kept)
        )
    return kept


def _is_excluded(module: str, excluded: Any) -> bool:
    """Whether PEFT's `exclude_modules` names a module: a regex, or names and their endings."""
    if isinstance(excluded, str):
        return re.fullmatch(excluded, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in excluded or ())


def _gradients(
    model: nn.Module,
    config: SpectrumConfig,
    options: Mapping[str, Any],
    candidates: Iterable[str] | None,
) -> GradientReport | None:
    """The gradients that were given, or those of the calibration data, which is then dropped; None without either."""
    gradients = config.resolved_gradients()
    if gradients is not None:
        _check_fingerprint(gradients.fingerprint, model, "the gradients", config.force)
        return dataclasses.replace(gradients, fingerprint=None)  # checked here, where `force` is known
    if config.calibration_data is None:
        return None
    own = MODES[config.mode].own_options
    gradients = probe_gradients(
        base_of(model),
        config.calibration_data,
        candidates=candidates,
        seed=options["seed"],
        svd_rank=options["svd_rank"] if "svd_rank" in own else 0,
        fisher=options["criterion"] == "fisher" or not own & {"svd_rank", "columns_by"},
        columns=options["columns_by"] if options["columns_by"] in COLUMNS_BY_DATA else None,
        **({} if "similarity" in own else {"directions": 0}),
    )
    config.gradients, config.calibration_data = gradients, None
    return gradients


def _check_fingerprint(fingerprint: Any, model: nn.Module, what: str, force: bool) -> None:
    if fingerprint is None or fingerprint.content is fingerprint.structure is None:
        logger.debug("%s carries no fingerprint; it is used as it is", what)
        return
    note = fingerprint.check(open_weights(base_of(model)).fingerprint(), this=what, that="this model", force=force)
    if note:
        logger.info(note)


def _names_here(model: nn.Module, wanted: Iterable[str], present: dict[str, Any]) -> dict[str, str | None]:
    """{name in a report or plan: name in this model, None where this class leaves the stored tensor alone}.

    Where names alone do not say it, by the stored tensors of the checkpoint that both were made of: a plan made from a
    folder fits every class that opens it.
    """
    wanted = list(wanted)
    found: dict[str, str | None] = dict(_aligned(wanted, present, base_of(model)))
    folder = checkpoint_folder(model)
    if folder is None or all(name in found for name in wanted):
        return found
    try:
        theirs = open_weights(folder)
        skeleton = skeleton_like(base_of(model))
        if not isinstance(theirs, FileWeights) or skeleton is None:
            return found
        here = {stored: name for name, stored in theirs.seen_by(skeleton).made_of().items()}
        return {name: here.get(stored) for name, stored in theirs.made_of().items() if name in wanted} | found
    except CheckpointError as error:
        logger.debug("%s: names could not be told from the files: %s", folder, error)
        return found


def _report_with_model_names(report: SnrReport, model: nn.Module, present: dict[str, Any]) -> SnrReport:
    """A report that may be of files, with the model's names, and the roles of its modules where names say less."""
    found = _names_here(model, (s.name.partition("[")[0] for s in report.stats), present)
    head, towers = output_head(base_of(model)), towers_of(base_of(model))
    stats = []
    for stat in report.stats:
        base, bracket, expert = stat.name.partition("[")
        if base in found:
            name = found[base]
            if name is None:
                continue
            role = stat.role
            if role == "linear" and not bracket:
                role = role_of(name, stat.shape, present[name][0], head)
            turned = stat.transposed or (len(stat.shape or ()) == 2 and type(present[name][0]).__name__ == "Conv1D")
            tower = tower_in(towers, name) if towers else stat.tower
            full = name + bracket + expert
            stats.append(dataclasses.replace(stat, name=full, role=role, transposed=turned, tower=tower))
        elif stat.role == "linear" and names.block_index(base) is not None:
            raise MismatchError(f"the report lists {base}, which the model lacks." + near_matches(base, present))
    if not any(s.role == "linear" for s in report.stats):
        raise OptionError("the report lists no linear matrix that a plan could choose.")
    if not any(s.role == "linear" for s in stats):
        raise MismatchError(f"none of the report's {len(report.stats)} tensors is in this model.")
    tied = tuple(tuple(found.get(n) or n for n in group) for group in report.tied)
    return dataclasses.replace(report, stats=tuple(stats), tied=tied)


def _aligned(wanted: Iterable[str], present: dict[str, Any], model: nn.Module) -> dict[str, str]:
    """{name: the model's own name}; names of an older version of the model's class as the class itself translates them.

    That is transformers' `_checkpoint_conversion_mapping` {pattern: replacement}, which PEFT applies to an adapter's tensors.
    """
    wanted = list(wanted)
    found = names.align(wanted, present)
    renamings = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    for name in wanted if renamings else ():
        for pattern, replacement in renamings.items():
            new, count = re.subn(pattern, replacement, name)
            if name not in found and count and new in present:
                found[name] = new
    return found


def unfit_matrices(model: nn.Module, mode: str, *, layers: bool) -> dict[str, str]:
    """{matrix of the base model that the mode cannot train: why}.

    Args:
        layers: PEFT's layers go around what trains; a matrix that lies at several places of the model (Zamba's shared block)
            would be changed at one of them only.
    Raises:
        OptionError: there is one, and the mode trains every parameter.
    """
    base = base_of(model)
    adapters = MODES[mode].action in ADAPTER_ACTIONS
    found = dict(without_adapters(base)) if adapters else {}
    if layers or adapters:
        for name, group in _tied_names(model).items():
            owner, leaf = base_parameters(model)[name]
            role = role_of(name, tuple(owner._parameters[leaf].shape), owner, output_head(base))  # type: ignore[union-attr]
            if role == "linear":
                others = " and ".join(other for other in group if other != name)
                found[name] = f"the same tensor is {others}, and a layer around one place would not change the other"
    if found and MODES[mode].whole_model:
        name, why = next(iter(found.items()))
        raise OptionError(
            f"mode {mode!r} trains every parameter, and {name} cannot: {why}. Train the plain model, without a PeftModel."
        )
    return found


def _summed_up(left: Mapping[str, str]) -> Iterator[str]:
    """Notes for a plan, one for each reason, as far as it is the same."""
    for why in dict.fromkeys(left.values()):
        mine = [name for name, reason in left.items() if reason == why]
        yield f"{len(mine)} matrices are left out, first {mine[0]}: {why}."


def _without(report: SnrReport, new: Iterable[str]) -> SnrReport:
    """The report without matrices that are random: there is nothing to score, and an adapter beside one would have a base
    that no file holds."""
    new = set(new)
    return dataclasses.replace(
        report,
        stats=tuple(
            s if s.name.partition("[")[0] not in new or s.role != "linear" else dataclasses.replace(s, role="other")
            for s in report.stats
        ),
    )


def _with_model_names(plan: Plan, model: nn.Module, present: dict[str, Any]) -> Plan:
    found = _names_here(model, (e.name for e in plan.entries), present)
    entries = []
    for entry in plan.entries:
        name = found.get(entry.name)
        if name is not None:
            entries.append(dataclasses.replace(entry, name=name))
        elif entry.trains:
            raise MismatchError(
                f"the plan trains {entry.name}, which the model lacks." + near_matches(entry.name, present)
            )
    return plan.replace(entries=tuple(entries))


def report_for(model: nn.Module, report: SnrReport) -> SnrReport:
    """A report of files under the names of a class that opens them, without what no file gives.

    Args:
        model: of that class; its weights may lie on the meta device.
    """
    return _without(_report_with_model_names(report, model, base_parameters(model)), new_parameters(model) or ())


def plan_for(model: nn.Module, plan: Plan) -> Plan:
    """A plan of files under the names of a class that opens them; `model` as in `report_for`."""
    return _with_model_names(plan, model, base_parameters(model))


def head_modules(model: nn.Module, present: dict[str, Any]) -> list[str]:
    """Modules of the output head of a model class that adds a new one to a pretrained body; else empty."""
    if not type(base_of(model)).__name__.endswith(_CLASSES_WITH_A_NEW_HEAD):
        return []
    found = {names.module_name(n): None for n in present if names.role(n, (0, 0)) == "head" or _is_head_bias(n)}
    return list(found)


def _is_head_bias(name: str) -> bool:
    return name.endswith(".bias") and names.role(f"{names.module_name(name)}.weight", (0, 0)) == "head"


def token_layers(model: nn.Module, config: SpectrumConfig, present: dict[str, Any] | None = None) -> list[str]:
    """Embeddings of which `trainable_token_indices` trains single rows, as the user calls them (a suffix of the name)."""
    tokens = config.trainable_token_indices
    if not tokens:
        return []
    if isinstance(tokens, dict):
        return list(tokens)
    name = _input_embedding(model, present or base_parameters(model))
    if name is None:
        raise OptionError(
            "trainable_token_indices is a list, and the model names no input embedding; wanted {module: indices}."
        )
    return [name]


def _settle_tokens(model: nn.Module, config: SpectrumConfig, plan: Plan, present: dict[str, Any]) -> None:
    """Where `trainable_token_indices` meets whole embeddings, or a head tied to them, train each tensor in one way.

    TRL asks for the rows of new chat tokens and for the whole head, whatever the mode and whether or not the two are one
    tensor. On a tied model PEFT 0.21.2 puts one wrapper into the other then, and the first forward fails.
    """
    layers = token_layers(model, config, present)
    config.row_modules = frozenset[str]()
    if not layers:
        return
    options, saved = plan.options, list(config.modules_to_save or ())
    rows = {name for name in present if any(f".{names.module_name(name)}".endswith(f".{layer}") for layer in layers)}
    tied = {other for name, group in _tied_names(model).items() if name in rows for other in group} - rows
    asked = MODES[plan.mode].whole_model or options.get("train_embeddings") or options.get("preset")
    if asked or (options.get("train_head") and tied) or any(_lists(saved, name) for name in rows):
        logger.info("trainable_token_indices of %s left out: the whole embedding trains", ", ".join(layers))
        config.trainable_token_indices = None
    else:
        config.row_modules = frozenset(names.module_name(name) for name in rows)
    doubled = [m for m in saved if any(_lists([m], name) for name in tied)]
    if doubled:
        logger.info("modules_to_save: %s left out: it is the embedding, whose rows train", ", ".join(doubled))
        config.modules_to_save = [m for m in saved if m not in doubled] or None


def _lists(modules: list[str], name: str) -> bool:
    """Whether `modules_to_save` names the module of a parameter."""
    return any(f".{names.module_name(name)}".endswith(f".{m}") for m in modules)


def _saved_entries(
    model: nn.Module, config: SpectrumConfig, plan: Plan, present: dict[str, Any], new: Iterable[str] = ()
) -> Iterator[PlanEntry]:
    known = {e.name for e in plan.entries if e.action != "freeze"}
    shapes = {
        name: tuple(getattr(owner, leaf).shape)
        for name, (owner, leaf) in present.items()
        if getattr(owner, leaf) is not None
    }

    def entry(name: str) -> PlanEntry:
        known.add(name)
        return PlanEntry(name, "save", kind=names.kinds([name])[name], shape=shapes.get(name))

    asked = [m for m in config.modules_to_save or () if m not in ("classifier", "score")]
    for wanted in asked:
        if not any(names.lies_in(name, [wanted]) for name in present):
            modules = {part.rpartition(".")[2] for name in present for part in names.parents(name)}
            raise OptionError(
                f"modules_to_save: {wanted!r} matches no module of the model." + near_matches(wanted, modules)
            )
    heads = head_modules(model, present) if config.task_type in (None, *_TASKS_WITH_A_NEW_HEAD) else []
    for name in present:
        if name not in known and (
            names.lies_in(name, config.modules_to_save) or names.module_name(name) in heads or name in set(new)
        ):
            yield entry(name)
    layers = token_layers(model, config, present)
    for name in present:
        if name not in known and any(names.module_name(name).endswith(layer) for layer in layers):
            yield entry(name)
    if config.bias != "none":
        adapted = {names.module_name(e.name) for e in plan.entries if e.trains}
        for name in present:
            if (
                name not in known
                and name.endswith("bias")
                and (config.bias == "all" or names.module_name(name) in adapted)
            ):
                yield entry(name)


def _input_embedding(model: nn.Module, present: dict[str, Any]) -> str | None:
    """Base name of the module that the model calls its input embedding; None where it names none with a weight."""
    embedding: Any = input_embedding(model)
    if embedding is None:
        return None
    embedding = getattr(embedding, "original_module", embedding)
    return next((names.module_name(n) for n, (owner, _) in present.items() if owner is embedding), None)


# --- plain models ----------------------------------------------------------------------------------------------------


def freeze_to_plan(model: nn.Module, plan: Plan) -> None:
    """Set `requires_grad` on a plain model so that exactly the plan's parameters train.

    Raises:
        MismatchError: an entry matches nothing; a chosen weight is quantized.
        OptionError: the plan's mode puts adapters beside weights, which needs `get_peft_model`.
    """
    if not MODES[plan.mode].plain_model:
        raise OptionError(
            f"mode {plan.mode!r} puts adapters into the model; use get_peft_model(model, SpectrumConfig(mode={plan.mode!r}, "
            "...)) or the trainer's peft_config. A callback on a plain model takes "
            + ", ".join(repr(name) for name, mode in MODES.items() if mode.plain_model)
            + "."
        )
    present = base_parameters(model)
    wanted = set(plan.trainable_names)
    for name in sorted(wanted - set(present)):
        raise MismatchError(f"the plan trains {name}, which the model lacks." + near_matches(name, present))
    for name in sorted(wanted):
        owner, leaf = present[name]
        parameter = owner._parameters[leaf]
        if parameter is None or not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise MismatchError(
                f"{name} is quantized ({type(parameter).__name__}), so its real weights cannot train. Load the base with "
                "quantization_config_for(plan, model), which leaves the chosen modules in 16 or 32 bit."
            )
    chosen = {id(present[name][0]._parameters[present[name][1]]) for name in wanted}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def trainable_mismatch(model: nn.Module, plan: Plan) -> str | None:
    """None if exactly the plan's parameters train, else one line that names the first ones that should not, or do not."""
    belongs = plan_parameters(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trains = {id(p) for p in parameters.values() if p.requires_grad}
    entries = with_groups(plan, {belongs[n] for n, p in parameters.items() if n in belongs and id(p) in trains})
    stray = sorted(n for n, p in parameters.items() if n not in belongs and p.requires_grad)
    wanted = set(plan.trainable_names)
    # Slots that re-evaluation may fill are trainable tensors for DDP's sake; the optimizer's step leaves them out.
    entries -= {e.name for e in plan.entries if e.action in ADAPTER_ACTIONS and not e.active}
    tied = _tied_names(model)
    entries |= {other for name in entries for other in tied.get(name, ())} & wanted
    missing = sorted(wanted - entries)
    extra = sorted(name for name in entries - wanted if not set(tied.get(name, ())) & wanted)
    if not (missing or extra or stray):
        return None
    parts = [
        f"{len(found)} {what}, first {found[0]}"
        for found, what in (
            (missing, "planned parameters do not train"),
            (extra, "parameters train that the plan freezes"),
            (stray, "trainable parameters are in no plan"),
        )
        if found
    ]
    return "; ".join(parts)


def with_groups(plan: Plan, names_: Iterable[str]) -> set[str]:
    """The entries named, and those of their groups: a member that shares both factors has no parameter of its own."""
    found = set(names_)
    groups = {e.group for e in plan.entries if e.name in found and e.group is not None}
    return found | {e.name for e in plan.entries if e.group in groups}


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    by_tensor: dict[int, list[str]] = {}
    for name, (owner, leaf) in base_parameters(model).items():
        parameter = owner._parameters.get(leaf)
        if parameter is not None:
            by_tensor.setdefault(id(parameter), []).append(name)
    return {name: group for group in by_tensor.values() if len(group) > 1 for name in group}


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that the model calls its input embedding, with its wrapper; None where it names none."""
    try:
        found = base_of(model).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # no transformers model, or one without tokens
        return None
    return found if isinstance(found, nn.Module) else None


def tied_modules(model: nn.Module, module: str) -> list[str]:
    """Modules whose weight is the same tensor as a module's, by their base names."""
    tied = _tied_names(model).get(f"{module}.weight", ())
    return sorted(names.module_name(other) for other in tied if other != f"{module}.weight")


def modules_tied_to_embedding(model: nn.Module) -> list[str]:
    """Modules whose weight is the input embeddings' own tensor, whatever adapters are around them; by their base names."""
    name = _input_embedding(model, base_parameters(model))
    return [] if name is None else tied_modules(model, name)


def real_weight_entries(plan: Plan) -> list[PlanEntry]:
    """Entries whose base parameter itself trains, in plan order."""
    return [e for e in plan.entries if e.trains and e.action in REAL_WEIGHT_ACTIONS]
