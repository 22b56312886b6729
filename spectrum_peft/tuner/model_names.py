"""A report, or a plan, under the names of the model at hand: files and classes call the same tensors differently."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .. import names
from ..errors import CheckpointError, MismatchError, OptionError, near_matches
from ..records import MatrixStat, Plan, SnrReport
from ..weights import (
    FileWeights,
    checkpoint_folder,
    new_parameters,
    open_weights,
    output_head,
    role_of,
    skeleton_like,
    tower_in,
    towers_of,
)
from .parameters import base_of, base_parameters

logger = logging.getLogger(__name__)


def report_for(model: nn.Module, report: SnrReport) -> SnrReport:
    """A report of files under the names of a class that opens them, without what no file gives.

    Args:
        model: of that class; its weights may lie on the meta device.
    """
    return without(report_with_model_names(report, model, base_parameters(model)), new_parameters(model) or ())


def plan_for(model: nn.Module, plan: Plan) -> Plan:
    """A plan of files under the names of a class that opens them; `model` as in `report_for`."""
    return plan_with_model_names(plan, model, base_parameters(model))


def report_with_model_names(report: SnrReport, model: nn.Module, present: dict[str, Any]) -> SnrReport:
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
            if not bracket:
                _check_shape(stat, name, present)
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


def plan_with_model_names(plan: Plan, model: nn.Module, present: dict[str, Any]) -> Plan:
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


def _check_shape(stat: MatrixStat, name: str, present: Mapping[str, Any]) -> None:
    """A plan counts and shares out by the sides that its report has; a plan itself, forced, may be of a model of another width.

    Raises:
        MismatchError: a matrix of a block has other sides in the model. Tables and heads may have got rows; what is packed or
            shared out has the shape of its storage, and is not looked at.
    """
    shape = stat.shape
    if shape is None or len(shape) != 2 or name not in present or names.block_index(name) is None:
        return
    owner, leaf = present[name]
    parameter = owner._parameters.get(leaf)
    if parameter is None or parameter.ndim != 2 or not parameter.is_floating_point() or not parameter.numel():
        return
    if sorted(parameter.shape) != sorted(shape):
        sides = " x ".join(map(str, shape))
        raise MismatchError(f"the report says that {stat.name} is {sides}, the model's is {tuple(parameter.shape)}.")


def without(report: SnrReport, new: Iterable[str]) -> SnrReport:
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
        told = {name: here.get(stored) for name, stored in theirs.made_of().items() if name in wanted}
        return found | told | {name: name for name in wanted if name in present}
    except CheckpointError as error:
        logger.debug("%s: names could not be told from the files: %s", folder, error)
        return found


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
