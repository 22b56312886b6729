"""From a config to a plan that fits the model at hand.

Nothing here puts layers into a model (that is `model.py`) or freezes one (`freezing.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .. import names
from ..errors import OptionError, near_matches
from ..plan import COLUMNS_BY_DATA, MODES, OPTIONS, make_plan, needs_gradients, worth_probing
from ..probe import column_energies, probe_gradients
from ..records import ADAPTER_ACTIONS, REAL_WEIGHT_ACTIONS, GradientReport, Plan, PlanEntry
from ..scan import scan_weights
from ..weights import (
    LiveWeights,
    new_parameters,
    output_head,
    refuse_partitioned,
    role_of,
    without_adapters,
)
from .config import SpectrumConfig, candidates_of
from .model_names import plan_with_model_names, report_with_model_names, without
from .parameters import base_of, base_parameters, embedding_module, tied_names
from .stored_bases import refuse_kept_quantized

logger = logging.getLogger(__name__)

_TASKS_WITH_A_NEW_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_CLASSES_WITH_A_NEW_HEAD = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


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
        plan = plan_with_model_names(plan, model, present)
        if not config.plan_from_file:
            unfit = unfit_matrices(model, plan.mode, layers=layers)
            left = {e.name: unfit[e.name] for e in plan.entries if e.name in unfit}
            plan = plan.replace(
                entries=tuple(e for e in plan.entries if e.name not in left), notes=(*plan.notes, *_summed_up(left))
            )
        _settle_tokens(model, config, plan, present)
        return _with_saved(model, config, plan, present)
    new = new_parameters(model) or ()
    report = config.resolved_report(base_of(model))
    options = config.options()
    if report is None:
        by_data = options["criterion"] == "fisher"  # whose scores the gradients hold: names and shapes will do
        score = ("linear",) if MODES[config.mode].selective and not by_data else ()
        criterion = OPTIONS["criterion"] if by_data else options["criterion"]
        report = scan_weights(base_of(model), criterion, score=score, cache=bool(score), seed=config.seed)
    else:
        _check_fingerprint(report.fingerprint, model, "the report", config.force)
    report = without(report_with_model_names(report, model, present), new)
    unfit = unfit_matrices(model, config.mode, layers=layers)
    fit = without(report, unfit)
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
    live = LiveWeights(base_of(model))
    note = fingerprint.check(live.fingerprint(), this=what, that="this model", force=force)
    if note and (fingerprint.content is None or fingerprint.content != live.folder_content):
        logger.info(note)  # else it is of the very folder that the model was loaded from, beside which a head is new


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
        for name, group in tied_names(model).items():
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
    name = embedding_module(model, present or base_parameters(model))
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
    tied = {other for name, group in tied_names(model).items() if name in rows for other in group} - rows
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
