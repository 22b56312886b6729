"""Weights in, `SnrReport` out: one matrix at a time, several at once, going on where a killed scan stopped.

The model is never loaded: tensors are read from the files as they are scored. A job has a matrix of its own and one
thread: solvers side by side are faster than one that uses all cores, and where other work holds a core, the solver's
threads wait for each other (4.6 s were seen for an eigenvalue problem of 14 ms).
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import names
from ..devices import devices_named
from ..errors import CheckpointError, OptionError, near_matches, one_line
from ..machine import cores
from ..records import Fingerprint, MatrixStat, SnrReport
from ..weights import TensorInfo, WeightSource, open_weights
from ..weights.neighbours import Group, groups_of
from ..weights.source import structure_of
from ..weights.threads import one_torch_thread
from . import criteria
from .ahead import Ahead
from .cache import PartialResults, cache_folder, keep, kept_file, kept_results, key_of, result_key
from .criteria import Criterion, MatrixScore
from .gram import one_openblas_thread, without_tf32
from .only import Only, only

logger = logging.getLogger(__name__)

# More jobs than this by default would hold more matrices in memory than a scan is worth.
_MOST_JOBS = 16
# The longest side of a matrix that is scored: 16 times the largest vocabulary of an open model.
_MOST_ROWS = 1 << 22
_LARGE = 1 << 30  # bytes, above which the free memory is asked for first
_AHEAD = 256 << 20  # bytes of matrices that are fetched over the network before they are scored

Read = Callable[[str], Tensor]


def scan_weights(
    model_or_path: Any,
    criterion: str = "spectrum",
    jobs: int | None = None,
    device: str = "auto",
    score: Iterable[str] = ("linear",),
    cache: bool = False,
    revision: str | None = None,
    seed: int = 0,
    kinds: str | Iterable[str] | None = None,
    layers: str | Iterable[int] | None = None,
    download: bool = False,
) -> SnrReport:
    """List every tensor of a checkpoint and score its matrices.

    Results are stored as they come, under the weights' identity in `cache_folder()`; a scan that was killed takes them
    up again. They are removed when the scan completes.

    Of a hub id only the headers and the matrices that are scored are read, by HTTP ranges, the next ones while others are
    scored, and none of them is stored. Its revision is resolved to a commit first; all is read from that one.

    Args:
        model_or_path: whatever `open_weights` opens: a model, folder, file, adapter folder or hub id.
        criterion: key of `criteria.CRITERIA`.
        jobs: matrices at once; None for one a core, at most 16. Memory grows with it.
        device: `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`; `auto` is the accelerator where there is one. Several of one kind,
            `cuda:0,cuda:1`, take the matrices in turn. Matrices are read ahead while an accelerator computes.
        score: roles to score, of `names.ROLES`; 1-D tensors are scored as a matrix of one row. The rest is listed.
        cache: keep the finished report under the weights' identity, and return a kept one without scanning.
        revision: of a hub id.
        seed: of the criterion `random`.
        kinds: score only matrices of these kinds, `"q_proj,down_proj"` or a list; None for all.
        layers: score only matrices in these blocks, `"0-15"`, `"0,4,8-11"` or numbers; None for all.
        download: fetch the files of a hub id into the hub's cache first, and read them there.
    Raises:
        OptionError: unknown criterion, role, device, kind or layer; jobs below 1; the criterion needs data.
        HubError: the hub cannot be reached or refuses; a file changed while it was read.
        CheckpointError: the weights cannot be read, or hold NaN or Inf (by name).
    """
    return scan_or_take(model_or_path, criterion, jobs, device, score, cache, revision, seed, kinds, layers, download)


def scan_or_take(
    model_or_path: Any,
    criterion: str,
    jobs: int | None,
    device: str,
    score: Iterable[str],
    cache: bool,
    revision: str | None,
    seed: int,
    kinds: str | Iterable[str] | None,
    layers: str | Iterable[int] | None,
    download: bool,
    other: Callable[[WeightSource], SnrReport | None] | None = None,
) -> SnrReport:
    """`scan_weights`; where no finished scan is kept here, `other` is asked for a report before anything is scored."""
    row = criteria.criterion_named(criterion)
    if row.needs_data:
        raise OptionError(
            f"criterion {criterion!r} needs gradients on data, which a scan of weights does not have: scan with the default "
            "criterion, and give make_plan gradients=probe_gradients(model, batches), or SpectrumConfig calibration_data.",
            shell=f"criterion {criterion!r} needs gradients on data, which a scan of weights does not have: scan with the "
            "default criterion, and give `spectrum-peft plan` gradients=FILE, which `spectrum-peft probe` writes.",
        )
    roles = _checked_roles(score)
    jobs = _checked_jobs(jobs)
    devices = devices_named(device)
    where = devices[0]
    limits = only(kinds, layers)
    source = open_weights(model_or_path, revision, download)
    tensors = source.tensors()
    meant = limits.of(tensors) if limits else tensors
    wanted = [(name, info) for info in meant if _scorable(info, roles) for name in _units(info)]
    if limits and not wanted:
        raise OptionError(f"no tensor of the roles {roles} is {limits}; nothing to score.")

    def report_of(found: dict[str, MatrixScore], content: str | None = None) -> SnrReport:
        # The ends of every tensor make the content; a scan of a part reads over the network only what it scores.
        if source.received is None or (content is None and row.needs_weights and "linear" in roles and not limits):
            fingerprint = source.fingerprint()
        else:
            fingerprint = Fingerprint(structure_of(tensors), content, source.kind)
        return _report(source, tensors, row, found, limits, fingerprint)

    if not row.needs_weights:
        return report_of({name: criteria.score(None, criterion, name=name, seed=seed) for name, _ in wanted})

    key = result_key(source, row, where)
    shapes = {name: info.shape if info.experts is None else info.shape[1:] for name, info in wanted}
    kept = kept_file(key, roles, limits)
    before = kept_results(kept, row.name, shapes) if cache else None
    if before is not None:
        logger.info("taking the finished scan of the same weights from %s", kept)
        return report_of(*before)
    found = other(source) if other is not None else None
    if found is not None:
        return found
    for name, shape in shapes.items():
        _refuse_giants(name, shape)

    place = {name: devices[i % len(devices)] for i, (name, _) in enumerate(wanted)}

    def one(read: Read, name: str, info: TensorInfo) -> MatrixScore:
        matrix = read(name).to(place[name])
        try:
            return criteria.score(matrix.T if info.transposed else matrix, criterion, name=name, seed=seed)
        except CheckpointError as error:
            raise CheckpointError(f"{source.model_id or 'model'}: {error}") from None
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise CheckpointError(
                f"{source.model_id or 'model'}: {name}: its singular values cannot be computed ({one_line(error)}); its "
                "values are too large, or too far apart."
            ) from error

    what = source.model_id or "the model"
    if wanted:
        logger.info("scanning %s: %d matrices, criterion %s", what, len(wanted), criterion)
    else:
        logger.info("reading names and shapes of %s; no scores are asked for", what)
    unfinished = PartialResults(cache_folder() / "partial" / f"{key}.jsonl", shapes)
    with unfinished as partial, one_torch_thread(), one_openblas_thread(), without_tf32(), torch.no_grad():
        rest = [(name, info) for name, info in wanted if name not in partial.results]
        if len(rest) < len(wanted):
            logger.info(
                "going on with a stopped scan: %d of %d matrices are done", len(wanted) - len(rest), len(wanted)
            )
        began = time.monotonic()
        ahead = _reads_ahead(source, where)
        # The fingerprint asks for the small tensors between matrices; a scan of some kinds or layers makes none.
        groups = groups_of(source, [name for name, _ in rest], not limits) if ahead else []
        for name, result in _side_by_side(one, source, wanted, rest, jobs, groups):
            partial.add(name, result)
        report = report_of({name: partial.results[name] for name, _ in wanted})
        if source.received is not None:
            logger.info("%s", _traffic(source.received, tensors, time.monotonic() - began))
        if cache:
            keep(report, kept)
            content = report.fingerprint.content
            if source.received is not None and content is not None:  # found again when the files lie here
                keep(report, kept_file(key_of(content, row, where), roles, limits))
        partial.completed()
    return report


def _reads_ahead(source: WeightSource, device: torch.device) -> bool:
    """Whether matrices are read while others are scored: over a network, and from a disk while an accelerator computes.
    What is in memory lies where it is; on the CPU, the jobs read and compute beside each other."""
    return source.received is not None or (device.type != "cpu" and source.kind != "live")


def _refuse_giants(name: str, shape: Sequence[int]) -> None:
    """
    Raises:
        CheckpointError: no weight matrix that could be: a file of holes takes no room, and its values all there is.
    """
    if max(shape) > _MOST_ROWS:
        raise CheckpointError(f"{name}: has the shape {tuple(shape)}, wanted sides of at most {_MOST_ROWS:,}.")
    needed = 8 * math.prod(shape)  # as read, and once more in float32
    if needed > _LARGE:
        import psutil

        free = psutil.virtual_memory().available
        if needed > free:
            raise CheckpointError(
                f"{name}: takes {needed / 2**30:.1f} GiB to score, of which {free / 2**30:.1f} are free; not enough."
            )


def _checked_roles(score: Iterable[str]) -> tuple[str, ...]:
    if isinstance(score, str):
        raise OptionError(f"score is {score!r}, wanted a tuple of roles such as ('linear',).")
    asked = set(score)
    for role in sorted(asked - set(names.ROLES)):
        raise OptionError(f"score names the role {role!r}, which is none.{near_matches(str(role), names.ROLES)}")
    return tuple(role for role in names.ROLES if role in asked)


def _checked_jobs(jobs: int | None) -> int:
    if jobs is None:
        return min(cores(), _MOST_JOBS)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise OptionError(f"jobs is {jobs!r}, wanted an integer from 1 up.")
    return jobs


def _scorable(info: TensorInfo, roles: Sequence[str]) -> bool:
    return info.role in roles and (len(info.shape) in (1, 2) or info.experts is not None) and info.numel > 0


def _units(info: TensorInfo) -> list[str]:
    """What is scored of a parameter: itself, or each of its experts."""
    return [info.name] if info.experts is None else [f"{info.name}[{e}]" for e in range(info.experts)]


def _report(
    source: WeightSource,
    tensors: list[TensorInfo],
    row: Criterion,
    found: dict[str, MatrixScore],
    limits: Only,
    fingerprint: Fingerprint,
) -> SnrReport:
    kinds = names.kinds([t.name for t in tensors])
    stats = []
    for info in tensors:
        shape = info.shape if info.experts is None else info.shape[1:]
        for name in _units(info):
            result = found.get(name)
            stats.append(
                MatrixStat(
                    name=name,
                    kind=kinds[info.name],
                    shape=shape,
                    numel=math.prod(shape),
                    dtype=info.dtype,
                    score=result.score if result else None,
                    n_signal=result.n_signal if result else None,
                    s_max=result.s_max if result else None,
                    role=info.role,
                    power_law=result.power_law if result else None,
                    transposed=info.transposed,
                    tower=info.tower,
                )
            )
    notes = (*source.notes, f"only matrices {limits} were scored") if limits else source.notes
    return SnrReport(
        tuple(stats), row.name, fingerprint, source.model_id, source.revision, tied=source.tied, notes=notes
    )


def _side_by_side(
    one: Callable[[Read, str, TensorInfo], MatrixScore],
    source: WeightSource,
    wanted: list[tuple[str, TensorInfo]],
    todo: list[tuple[str, TensorInfo]],
    jobs: int,
    groups: Sequence[Group],
) -> Iterator[tuple[str, MatrixScore]]:
    """Results as they come; the first error stops the rest and is raised.

    Args:
        groups: what is read ahead together, in this order; none where a job reads its matrix when it is its turn.
    """
    far = source.received is not None
    if groups:
        infos = dict(todo)
        todo = [(name, infos[name]) for group in groups for name in group.names]
    with (
        _progress(wanted, todo, far) as (fetched, scored),
        ThreadPoolExecutor(jobs, thread_name_prefix="scan") as pool,
        _reader(source, todo, fetched, groups) as read,
    ):
        running: dict[Future[MatrixScore], str] = {pool.submit(one, read, name, info): name for name, info in todo}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
                scored()
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _reader(
    source: WeightSource,
    todo: list[tuple[str, TensorInfo]],
    fetched: Callable[[int], object],
    groups: Sequence[Group],
) -> Iterator[Read]:
    """How a job gets its matrix: read when it is its turn, or taken from those that were fetched before."""
    if not groups:
        yield source.read
        return
    with Ahead(source.read, groups, {name: _bytes(info) for name, info in todo}, _AHEAD, fetched) as reading:
        yield reading.take


def _bytes(info: TensorInfo) -> int:
    """Stored bytes of what is scored at once."""
    return info.stored_bytes // (info.experts or 1)


@contextmanager
def _progress(
    wanted: list[tuple[str, TensorInfo]], todo: list[tuple[str, TensorInfo]], far: bool
) -> Iterator[tuple[Callable[[int], object], Callable[[], object]]]:
    """A bar on standard error where that is a terminal: of matrices, or of bytes where those are what takes the time.

    Yields:
        what to call with the bytes that came, and what to call when a matrix is scored.
    """
    if not sys.stderr.isatty():
        yield lambda _: None, lambda: None
        return
    from tqdm import tqdm

    if not far:
        done = len(wanted) - len(todo)
        with tqdm(total=len(wanted), initial=done, unit="matrix", desc="scan", file=sys.stderr) as bar:
            yield lambda _: None, bar.update
        return
    total, rest = (sum(_bytes(info) for _, info in some) for some in (wanted, todo))
    count = len(wanted) - len(todo)
    with tqdm(
        total=total, initial=total - rest, unit="B", unit_scale=True, unit_divisor=1024, desc="scan", file=sys.stderr
    ) as bar:

        def scored() -> None:
            nonlocal count
            count += 1
            bar.set_postfix_str(f"{count}/{len(wanted)} matrices scored", refresh=False)

        yield bar.update, scored


def _traffic(received: int, tensors: list[TensorInfo], seconds: float) -> str:
    stored = sum(t.stored_bytes for t in tensors)
    return (
        f"read {received / 1e6:,.1f} MB from the hub in {seconds:.0f} s ({received / 1e6 / max(seconds, 1e-3):.1f} MB/s), of a "
        f"checkpoint of {stored / 1e6:,.1f} MB; none of it was stored"
    )
