"""A report that is there already: kept here, or pushed by somebody to the model's own repository; and whether it is believed."""

from __future__ import annotations

import logging
import os
from typing import Any

from .. import hub
from ..errors import CheckpointError, HubError, MismatchError, OptionError, near_matches
from ..records import Fingerprint, SnrReport, repository_named
from ..weights import WeightSource, open_weights
from ..weights.source import structure_of
from .scan import scan_or_take, scan_weights

logger = logging.getLogger(__name__)


def check_report(report: SnrReport, model_or_path: Any, revision: str | None = None, force: bool = False) -> str:
    """Whether a report is of the weights of a model, as far as that can be told without scanning them.

    What is compared is the identity of the weights, never the scores: those are as true as who made the report.

    Args:
        model_or_path: whatever `open_weights` opens; of a hub id headers are read, and where there is no commit to compare the
            first and last 64 KiB of each tensor.
        force: say what differs instead of raising.
    Returns:
        What was compared and what could not be, a line for the reader.
    Raises:
        MismatchError: they differ.
    """
    return believed(report, open_weights(model_or_path, revision, download=False), force)


def believed(report: SnrReport, source: WeightSource, force: bool = False) -> str:
    """`check_report` of weights that are open."""
    this, that = "the report", source.model_id or "the model"
    names_only = Fingerprint(structure_of(source.tensors()), None, source.kind)
    if report.fingerprint.source == "published":
        present = {t.name for t in source.tensors()}
        lacking = [s.name for s in report.stats if s.name not in present]
        if not lacking:
            return f"{this} is a published scan, which says names and scores only: {that} has all {len(report.stats)} names"
        message = f"{this} does not belong to {that}: it scores {lacking[0]!r}, which that does not have."
        if not force:
            raise MismatchError(message + near_matches(lacking[0], present))
        return message + " Used all the same (force)"
    # Names and shapes are in the headers: before more is read, and whatever a commit promises.
    report.fingerprint.check(names_only, this=this, that=that, force=force)
    if _same_files(report, source):
        return (
            f"{this} is of commit {str(report.revision)[:12]}, whose safetensors files are those of {that} at "
            f"{str(source.revision)[:12]}"
        )
    note = report.fingerprint.check(source.fingerprint(), this=this, that=that, force=force)
    return note or f"{this} and {that}: names, shapes and the first and last 64 KiB of each tensor agree"


def _same_files(report: SnrReport, source: WeightSource) -> bool:
    """Whether two commits of one repository hold the same weights, by what the hub lists; false where it cannot be asked."""
    if source.kind == "live":  # what it was loaded from need not be what it holds
        return False
    ours, theirs = source.revision, report.revision
    if report.model_id != source.model_id or not (hub.is_commit(ours) and hub.is_commit(theirs)):
        return False
    if ours == theirs:
        return True
    if hub.offline():
        return False
    try:
        listed = [hub.resolve(str(source.model_id), commit).files for commit in (ours, theirs)]
    except HubError:
        return False
    files = [{n: f for n, f in some.items() if n.endswith(".safetensors") and "/" not in n} for some in listed]
    return bool(files[0]) and files[0] == files[1]


def find_report(
    model_or_path: Any,
    criterion: str = "spectrum",
    revision: str | None = None,
    seed: int = 0,
    download: bool = False,
) -> SnrReport:
    """A report of a model's matrices from where it costs least: kept here, in the model's own repository, else a scan of it.

    What is taken, and what it was held to, is logged. A report that is not of these weights is passed over.

    Args:
        model_or_path, criterion, revision, seed, download: as `scan_weights` takes them.
    Raises:
        as `scan_weights`.
    """
    return scan_or_take(
        model_or_path, criterion, None, "auto", ("linear",), True, revision, seed, None, None, download,
        lambda source: _of_its_repository(criterion, source),
    )  # fmt: skip


def report_named(
    given: SnrReport | str | os.PathLike[str] | None,
    model_or_path: Any = None,
    criterion: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    *,
    download: bool = False,
    scored: bool = True,
    force: bool = False,
) -> SnrReport:
    """The report that a user names, wherever one is taken: the same words mean the same everywhere.

    Args:
        given: a report; the path of one; `auto`, which is `find_report` of the model; a repository of the hub, `ORG/NAME` or
            `datasets/ORG/NAME`, whose report of the model is held to the model's weights; None for a scan of the model, or a
            finished one that is kept here.
        model_or_path: as `scan_weights` takes it; None where no model is known: `auto` and None are refused then.
        criterion: that the report is to be by, None for `spectrum`; `fisher`, whose scores come with gradients, and
            scored=False need names and shapes only, which are read instead of scanned.
        revision, seed, download: as `scan_weights` takes them. force: as `check_report` takes it.
    Raises:
        OptionError: `auto` without a model. MismatchError: the repository's report is of other weights.
        as `SnrReport.named` and `scan_weights`.
    """
    if isinstance(given, SnrReport):
        return given
    if given is None or given == "auto":
        if model_or_path is None:
            raise OptionError(
                "report is 'auto', which is of a model, and none is given: find_report(MODEL) gives its report.",
                shell="REPORT is auto, which is of a model: name it by --model.",
            )
        if criterion == "fisher":
            criterion, scored = None, False
        by = criterion or "spectrum"
        if given is not None and scored:
            return find_report(model_or_path, by, revision, seed, download)
        return scan_weights(
            model_or_path,
            by,
            score=("linear",) if scored else (),
            cache=scored,
            revision=revision,
            seed=seed,
            download=download,
        )
    wanted = None if criterion == "fisher" else criterion
    if model_or_path is None or repository_named(given) is None:
        return SnrReport.named(given, criterion=wanted)
    source = open_weights(model_or_path, revision, download)
    report = SnrReport.named(given, model_id=source.model_id, criterion=wanted)
    logger.info("taking the report in %s: %s", given, believed(report, source, force))
    return report


def _of_its_repository(criterion: str, source: WeightSource) -> SnrReport | None:
    """The report in the main branch of the repository that the weights are from, if it is of these weights."""
    model = source.model_id
    live = source.kind == "live"  # its weights say where they are from, no commit does
    if model is None or (source.revision is None and not live) or not hub.is_hub_id(model) or hub.offline():
        return None
    try:
        snapshot = hub.resolve(model)
        reports = SnrReport.all_of(snapshot, criterion)
    except (HubError, CheckpointError) as error:
        logger.warning("no report is taken from the repository of %s: %s", model, error)
        return None
    if not reports:
        logger.info("%s has no report by %r in its repository", model, criterion)
    if reports and live and source.fingerprint().content is None:
        logger.warning(
            "no report is taken from the repository of %s: the weights in memory are not those of its files", model
        )
        return None
    for report in sorted(reports, key=lambda r: r.revision != source.revision):
        try:
            line = believed(report, source)
        except MismatchError as error:
            logger.warning("a report in the repository of %s is not used: %s", model, error)
            continue
        logger.info("taking the report in the repository of %s: %s", model, line)
        return report
    return None
