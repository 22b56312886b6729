"""Weights in, `SnrReport` out: one matrix at a time, several at once, going on where a killed scan stopped.

The model is never loaded: tensors are read from the files as they are scored. A job has a matrix of its own and one
thread: solvers side by side are faster than one that uses all cores, and where other work holds a core, the solver's
threads wait for each other (4.6 s were seen for an eigenvalue problem of 14 ms).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from . import criteria, names
from .adapters import AdapterState, Update, Value
from .criteria import Criterion, MatrixScore
from .errors import CheckpointError, OptionError, near_matches
from .machine import cores
from .records import Fingerprint, MatrixStat, SnrReport
from .threads import one_torch_thread
from .weights import (
    FileWeights,
    TensorInfo,
    WeightSource,
    as_matrix,
    holds_adapter,
    locate,
    open_located,
    open_weights,
    split_expert,
)

logger = logging.getLogger(__name__)

# More jobs than this by default would hold more matrices in memory than a scan is worth.
_MOST_JOBS = 16
# Goes into the key of stored results: to be raised when a criterion's numbers change.
_CACHE_VERSION = 1


def cache_folder() -> Path:
    """`$SPECTRUM_PEFT_CACHE`, else `spectrum_peft` in the user's cache folder."""
    own = os.environ.get("SPECTRUM_PEFT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectrum_peft"


def scan_weights(
    model_or_path: Any,
    criterion: str = "spectrum",
    jobs: int | None = None,
    device: str = "auto",
    score: Iterable[str] = ("linear",),
    cache: bool = False,
    revision: str | None = None,
    seed: int = 0,
) -> SnrReport:
    """List every tensor of a checkpoint and score its matrices.

    Results are stored as they come, under the weights' identity in `cache_folder()`; a scan that was killed takes them
    up again. They are removed when the scan completes.

    Args:
        model_or_path: whatever `open_source` opens: a model, folder, file, adapter folder or hub id.
        criterion: key of `criteria.CRITERIA`.
        jobs: matrices at once; None for one a core, at most 16. Memory grows with it.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` is cuda where there is one.
        score: roles to score, of `names.ROLES`; 1-D tensors are scored as a matrix of one row. The rest is listed.
        cache: keep the finished report under the weights' identity, and return a kept one without scanning.
        revision: of a hub id.
        seed: of the criterion `random`.
    Raises:
        OptionError: unknown criterion, role or device; jobs below 1; the criterion needs data.
        CheckpointError: the weights cannot be read, or hold NaN or Inf (by name).
    """
    row = criteria.criterion_named(criterion)
    if row.needs_data:
        raise OptionError(
            f"criterion {criterion!r} needs gradients on data, which a scan of weights does not have: scan with the default "
            "criterion, and give make_plan gradients=probe_gradients(model, batches), or SpectrumConfig calibration_data."
        )
    roles = _checked_roles(score)
    jobs = _checked_jobs(jobs)
    where = _device(device)
    source = open_source(model_or_path, revision)
    tensors = source.tensors()
    wanted = [(name, info) for info in tensors if _scorable(info, roles) for name in _units(info)]

    if not row.needs_weights:
        found = {name: criteria.score(None, criterion, name=name, seed=seed) for name, _ in wanted}
        return _report(source, tensors, row, found)

    key = _key(source, row, where)
    kept = cache_folder() / "reports" / f"{key}-{'-'.join(roles) or 'none'}.json"
    if cache and kept.is_file():
        logger.info("taking the finished scan of the same weights from %s", kept)
        report: SnrReport = SnrReport.load(kept)
        # The same values may have come from another folder, or from the same one cast: who they are is asked again.
        return dataclasses.replace(
            report,
            fingerprint=source.fingerprint(),
            model_id=source.model_id,
            revision=source.revision,
            notes=source.notes,
        )

    def one(name: str, info: TensorInfo) -> MatrixScore:
        matrix = source.read(name).to(where)
        try:
            return criteria.score(matrix.T if info.transposed else matrix, criterion, name=name, seed=seed)
        except CheckpointError as error:
            raise CheckpointError(f"{source.model_id or 'model'}: {error}") from None

    with _Partial(cache_folder() / "partial" / f"{key}.jsonl") as partial, one_torch_thread(), torch.no_grad():
        rest = [(name, info) for name, info in wanted if name not in partial.results]
        if len(rest) < len(wanted):
            logger.info(
                "going on with a stopped scan: %d of %d matrices are done", len(wanted) - len(rest), len(wanted)
            )
        for name, result in _side_by_side(one, rest, jobs, done=len(wanted) - len(rest)):
            partial.add(name, result)
        report = _report(source, tensors, row, {name: partial.results[name] for name, _ in wanted})
        if cache:
            report.save(kept)
        partial.completed()
    return report


def _checked_roles(score: Iterable[str]) -> tuple[str, ...]:
    if isinstance(score, str):
        raise OptionError(f"score is {score!r}, wanted a tuple of roles such as ('linear',).")
    asked = set(score)
    for role in sorted(asked - set(names.ROLES)):
        raise OptionError(
            f"score names the role {role!r}, wanted one of the known.{near_matches(str(role), names.ROLES)}"
        )
    return tuple(role for role in names.ROLES if role in asked)


def _checked_jobs(jobs: int | None) -> int:
    if jobs is None:
        return min(cores(), _MOST_JOBS)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise OptionError(f"jobs is {jobs!r}, wanted an integer from 1 up.")
    return jobs


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device is {device!r}, wanted 'auto', 'cpu', 'cuda' or 'cuda:N'.") from error
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device is {device!r}, but torch sees {torch.cuda.device_count()} CUDA devices.")
    return where


def _scorable(info: TensorInfo, roles: Sequence[str]) -> bool:
    return info.role in roles and (len(info.shape) in (1, 2) or info.experts is not None) and info.numel > 0


def _units(info: TensorInfo) -> list[str]:
    """What is scored of a parameter: itself, or each of its experts."""
    return [info.name] if info.experts is None else [f"{info.name}[{e}]" for e in range(info.experts)]


def _report(
    source: WeightSource, tensors: list[TensorInfo], row: Criterion, found: dict[str, MatrixScore]
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
                )
            )
    fingerprint = source.fingerprint()
    return SnrReport(
        tuple(stats), row.name, fingerprint, source.model_id, source.revision, tied=source.tied, notes=source.notes
    )


# --- a trained adapter -----------------------------------------------------------------------------------------------


def open_source(model_or_path: Any, revision: str | None = None) -> WeightSource:
    """`weights.open_weights`, and adapter folders: the weights of the base with the adapter applied.

    Raises:
        CheckpointError: see `open_weights` and `AdapterState`. MismatchError: the adapter does not fit its base.
    """
    if isinstance(model_or_path, str | os.PathLike):
        path, model_id, found = locate(model_or_path, revision)
        if path.is_dir() and holds_adapter(path):
            return AdaptedWeights(path, model_id, found)
        return open_located(path, model_id, found)
    return open_weights(model_or_path, revision)


class AdaptedWeights:
    """The weights of a base checkpoint as a trained adapter leaves them: W + dW, or the adapter's own W.

    Args:
        folder: of the adapter; the base is its `base_model_name_or_path`.
    """

    kind: Literal["file"] = "file"

    def __init__(self, folder: Path, model_id: str, revision: str | None = None) -> None:
        self.folder, self.model_id, self.revision = folder, model_id, revision
        self._adapter = AdapterState.from_folder(folder)
        if self._adapter.base is None:
            raise CheckpointError(
                f"{folder / 'adapter_config.json'}: base_model_name_or_path is empty, wanted the base's folder or hub"
                " id."
            )
        self._base = open_weights(self._adapter.base, self._adapter.config.get("revision"))
        self.tied = self._base.tied
        self._infos = {info.name: info for info in self._base.tensors()}
        self._updates: dict[str, list[Update]] = {}
        model_type = self._base.config.get("model_type") if isinstance(self._base, FileWeights) else None
        new = []
        for update in self._adapter.updates(self._infos.values(), model_type):
            if isinstance(update, Value) and update.new:
                new.append(update.name)
                continue
            self._updates.setdefault(update.name, []).append(update)
            if isinstance(update, Value):  # a table may have grown
                self._infos[update.name] = dataclasses.replace(self._infos[update.name], shape=update.stored.shape)
        self.notes = (*self._base.notes, f"scores are of the weights with the adapter in {folder} applied")
        if new:
            self.notes += (f"the adapter brings {len(new)} tensors that its base lacks, not listed here: {new[0]} ...",)

    def tensors(self) -> list[TensorInfo]:
        return list(self._infos.values())

    def read(self, name: str) -> torch.Tensor:
        base, expert = split_expert(name)
        updates = self._updates.get(base, [])
        if not any(isinstance(update, Value) for update in updates):
            weight = self._base.read(name)
        for update in updates:
            if isinstance(update, Value):
                whole = update.stored.whole()
                weight = whole if expert is None else whole[expert]
                continue
            rows, columns = as_matrix(weight.shape)
            weight = update.change()(weight.reshape(rows, columns), (expert or 0) * rows).reshape(weight.shape)
        return weight

    def fingerprint(self) -> Fingerprint:
        structure, content = self._base.fingerprint().structure, self._base.fingerprint().content
        return Fingerprint(structure, self.identity() if content else None, "file")

    def identity(self) -> str:
        digest = hashlib.sha256(self._base.identity().encode())
        for key, stored in self._adapter.tensors.items():
            digest.update(json.dumps([key, str(stored.dtype), list(stored.shape)]).encode())
            digest.update(stored.whole().view(torch.uint8).numpy().data)
        digest.update(json.dumps(self._adapter.config, sort_keys=True, default=str).encode())
        return digest.hexdigest()


# --- several matrices at once ----------------------------------------------------------------------------------------


def _side_by_side(
    one: Callable[[str, TensorInfo], MatrixScore], todo: list[tuple[str, TensorInfo]], jobs: int, done: int
) -> Iterator[tuple[str, MatrixScore]]:
    """Results as they come; the first error stops the rest and is raised."""
    with _progress(len(todo) + done, done) as advance, ThreadPoolExecutor(jobs, thread_name_prefix="scan") as pool:
        running: dict[Future[MatrixScore], str] = {pool.submit(one, name, info): name for name, info in todo}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
                advance()
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[], Any]]:
    """A bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="matrix", desc="scan", file=sys.stderr) as bar:
        yield bar.update


# --- results of a scan that may be killed ----------------------------------------------------------------------------


def _key(source: WeightSource, row: Criterion, device: torch.device) -> str:
    """sha256 over all that a matrix's result depends on."""
    return hashlib.sha256(json.dumps([_CACHE_VERSION, source.identity(), row.name, device.type]).encode()).hexdigest()


class _Partial:
    """One line of JSON per scored matrix, appended as it is done; what a killed scan left is read first.

    A cache folder that cannot be written costs the resumption, not the scan: it is logged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, MatrixScore] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> _Partial:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                for line in self.path.read_text(encoding="utf-8").splitlines():
                    self._take(line)
            self._file = self.path.open("a", encoding="utf-8")
            # The kill may have come in the middle of a line.
            self._file.write("\n" if self._file.tell() else "")
        except OSError as error:
            logger.warning(
                "a killed scan could not be resumed: %s cannot be written (%s)", self.path, error.strerror or error
            )
        return self

    def _take(self, line: str) -> None:
        try:
            name, value, n_signal, s_max, alpha = json.loads(line)
        except ValueError:  # the last line of a killed scan, or the empty one after it: that matrix is scored again
            return
        self.results[name] = MatrixScore(float(value), n_signal, s_max, alpha)

    def add(self, name: str, result: MatrixScore) -> None:
        self.results[name] = result
        if self._file:
            value = "inf" if math.isinf(result.score) else result.score
            self._file.write(json.dumps([name, value, result.n_signal, result.s_max, result.power_law]) + "\n")
            self._file.flush()

    def completed(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
            self.path.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


# --- one spectrum ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix and where two criteria draw the line.

    Attributes:
        name: full parameter name, or `name[e]`. shape: (n, m).
        values: (min(n, m),) float64, descending.
        published_edge, marchenko_pastur_edge: see `criteria`.
    """

    name: str
    shape: tuple[int, int]
    values: torch.Tensor
    published_edge: float
    marchenko_pastur_edge: float


def spectrum_of(model_or_path: Any, name: str, revision: str | None = None) -> Spectrum:
    """All singular values of one matrix of a checkpoint or model.

    Args:
        model_or_path: see `open_source`. name: full parameter name; a fused parameter needs an expert, `name[3]`.
    Raises:
        CheckpointError: no such tensor (near names are shown), or not a matrix.
    """
    source = open_source(model_or_path, revision)
    base, expert = split_expert(name)
    info = next((t for t in source.tensors() if t.name == base), None)
    if info is not None and info.experts and expert is None:
        raise CheckpointError(f"{name}: holds {info.experts} experts, wanted one of them, such as '{name}[0]'.")
    matrix = source.read(name)
    values = criteria.singular_values(matrix, name=name)
    shape = (matrix.shape[0], matrix.shape[1])
    return Spectrum(
        name, shape, values, criteria.published_edge(values, shape), criteria.marchenko_pastur_edge(values, shape)
    )
