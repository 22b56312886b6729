"""probe_gradients: a model and batches become a `GradientReport`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import names
from ..devices import exact
from ..errors import DataError, OptionError, near_matches
from ..records import GradientReport, GradientStat, Similarity
from ..scan import SingularTriplets, cache_folder, cached_svd, score_values
from ..weights import LiveWeights, TensorInfo, matrix_of
from .collectors import Collector, ColumnScores, ComponentImportance, FisherMass, MeanGradients
from .passes import Probe, undisturbed, with_bar

DEFAULT_SAMPLES = 256
COLUMNS_BY = ("activation", "fisher")


def probe_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    candidates: Iterable[str] | None = None,
    directions: int = 8,
    sketch: int = 32,
    svd_rank: int = 0,
    fisher: bool = True,
    columns: str | None = None,
    seed: int = 0,
) -> GradientReport:
    """Measure the gradients of a model's matrices on calibration batches.

    A sample's loss is the mean over its own label tokens (of its class, for a classifier), so that the result does not depend
    on how samples are put into batches. The model runs in eval mode. Active adapters stay on: measured is then the gradient
    by W at W + dW; inside `disable_adapter()` it is that of the base. Weights, gradients, `requires_grad`, train and eval mode,
    hooks and random states are as they were afterwards; only a 4-bit weight that bitsandbytes had repacked for inference is
    in its usual layout again, without which it has no backward. Besides what a step of full fine-tuning holds for its
    backward, memory holds the gradient of one matrix at most, and the sketches.

    Args:
        model: float or bitsandbytes 4-bit or 8-bit, plain or with PEFT layers; its output has `logits`.
        batches: dicts that the model accepts, with `labels`: (samples, tokens) of token ids, `-100` where nothing is to be
            predicted, or (samples,) of class ids. See `calibration_batches`.
        candidates: full parameter names; None for every linear matrix but the head. Where a batch cannot be told apart by
            samples (fused experts), its samples run one by one.
        directions: of the strongest gradient directions that `Similarity.subspace` compares; 0: nothing is compared, and no
            sketch kept.
        sketch: rank of the sketches; 2.5 times that many vectors of each side are kept of a matrix.
        svd_rank: singular components of each matrix whose importance is measured, the largest first; 0: none. Of the matrix
            that the layer computes with, dequantized on 4 bit; memory holds their vectors meanwhile, 4 svd_rank (out + in)
            bytes of a matrix, and `$SPECTRUM_PEFT_CACHE` keeps them.
        fisher: measure the Fisher mass, which the criterion `fisher` scores by; without it a report has none, and the probe
            takes a fifth less time (SmolLM2-135M on 2 cores).
        columns: what each column of a matrix is scored by, `activation` or `fisher`; None: not at all.
        seed: of the sketches' random matrices.
    Raises:
        DataError: no batch, a batch without labels, a loss or gradient that is NaN or infinite (by batch), or no candidate
            that got a gradient.
        OptionError: a candidate that the model lacks; directions above sketch; svd_rank below 0; nothing to measure.
    """
    if svd_rank < 0:
        raise OptionError(f"svd_rank is {svd_rank}, wanted at least 0.")
    if not 0 <= directions <= sketch:
        raise OptionError(f"directions is {directions} and sketch is {sketch}, wanted 0 <= directions <= sketch.")
    if not (fisher or directions or svd_rank or columns):
        raise OptionError("fisher is False, directions and svd_rank are 0: wanted something to measure.")
    if columns not in (None, *COLUMNS_BY):
        raise OptionError(f"columns is {columns!r}." + near_matches(str(columns), COLUMNS_BY))
    source = LiveWeights(model)
    infos = _candidates(source, candidates)
    means = MeanGradients(sketch, seed) if directions else None
    collectors: list[Collector] = [*([FisherMass()] if fisher else []), *([means] if means else [])]
    if svd_rank:
        collectors.append(ComponentImportance(_bases(source, infos, svd_rank)))
    if columns:
        collectors.append(ColumnScores(columns))
    with undisturbed(model):
        probe = Probe(model, source, infos, collectors)
        try:
            for number, batch in enumerate(with_bar(batches, "probe", "batch")):
                probe.take(batch, number)
        finally:
            probe.remove()
    probe.check()
    kinds = names.kinds([t.name for t in source.tensors()])
    stats = []
    for name, info in infos.items():
        fields: dict[str, Any] = {}
        for collector in collectors:
            fields |= collector.fields(name, math.prod(info.shape), probe.samples)
        measured = [v for value in fields.values() for v in (value if isinstance(value, tuple) else (value,))]
        if bad := [v for v in measured if not math.isfinite(v)]:
            raise DataError(f"calibration: the gradient of {name} is {bad[0]} on these samples.")
        stats.append(GradientStat(name, kinds[name], tuple(info.shape), **fields))
    return GradientReport(
        stats=tuple(stats),
        similarities=() if means is None else tuple(_similarities(means, stats, source, infos, directions)),
        samples=probe.samples,
        loss=probe.loss / probe.samples,
        fingerprint=source.fingerprint(),
        settings={
            "directions": directions,
            "sketch": sketch,
            "svd_rank": svd_rank,
            "columns": columns,
            "seed": seed,
            "dtype": str(getattr(model, "dtype", next(model.parameters()).dtype)).removeprefix("torch."),
            "quantization": next((t.dtype for t in infos.values() if t.dtype in {"nf4", "fp4", "int8"}), None),
            "adapted": source.adapted,
        },
        model_id=source.model_id,
    )


def column_energies(
    model: nn.Module, candidates: Iterable[str] | None = None, criterion: str = "spectrum"
) -> GradientReport:
    """How much of each column lies in the signal part of its matrix' spectrum, sum_i s_i^2 V_ij^2 over the s_i above the edge.

    Of weights alone: the report is of no samples. Fused experts are left out.

    Raises:
        OptionError: the criterion draws no edge.
        DataError: a matrix holds NaN or Inf.
    """
    source = LiveWeights(model)
    infos = {n: t for n, t in _candidates(source, candidates).items() if len(t.shape) == 2}
    kinds = names.kinds([t.name for t in source.tensors()])
    stats = []
    for name in with_bar(list(infos), "columns", "matrix"):
        matrix = matrix_of(source.place(name)[0])
        if not torch.isfinite(matrix).all():
            raise DataError(f"{name}: holds NaN or Inf, wanted a finite matrix to decompose.")
        full = exact(matrix).double()
        values, vectors = torch.linalg.eigh(full.T @ full)
        signal = score_values(
            values.cpu().clamp(min=0).sqrt().flip(0)[: min(matrix.shape)], matrix.shape, criterion
        ).n_signal
        if signal is None:
            raise OptionError(
                f"criterion {criterion!r} draws no edge between signal and noise; columns_by='spectrum' wants one."
            )
        kept = len(values) - signal
        energies = (vectors[:, kept:].square() * values[kept:].clamp(min=0)).sum(1)
        stats.append(GradientStat(name, kinds[name], tuple(infos[name].shape), columns=tuple(energies.tolist())))
    return GradientReport(
        tuple(stats), (), samples=0, loss=math.nan, settings={"columns": "spectrum", "criterion": criterion}
    )


def _candidates(source: LiveWeights, wanted: Iterable[str] | None) -> dict[str, TensorInfo]:
    linear = {t.name: t for t in source.tensors() if t.role == "linear"}
    kept = set(linear if wanted is None else wanted)
    for name in sorted(kept - set(linear)):
        raise OptionError(f"candidates: {name!r} is no linear matrix of the model." + near_matches(name, linear))
    chosen = {name: info for name, info in linear.items() if name in kept}
    if not chosen:
        raise OptionError("candidates: the model has no linear matrix that a plan could choose.")
    return chosen


def _bases(source: LiveWeights, infos: Mapping[str, TensorInfo], svd_rank: int) -> dict[str, SingularTriplets]:
    """{parameter: singular triplets of the matrix that its layer computes with}; fused experts are left out."""
    folder = cache_folder() / "svd"
    matrices = [name for name, info in infos.items() if len(info.shape) == 2 and name.endswith(".weight")]

    def one(name: str) -> SingularTriplets:
        matrix = matrix_of(source.place(name)[0])
        if not torch.isfinite(matrix).all():
            raise DataError(f"{name}: holds NaN or Inf, wanted a finite matrix to decompose.")
        return cached_svd(matrix, min(svd_rank, *matrix.shape), folder)

    return {name: one(name) for name in with_bar(matrices, "decompose", "matrix")}


def _similarities(
    means: MeanGradients,
    stats: Sequence[GradientStat],
    source: LiveWeights,
    infos: Mapping[str, TensorInfo],
    directions: int,
) -> Iterator[Similarity]:
    """One table for each kind and shape with more than one member that was measured in a module of its own."""
    config = getattr(source.model, "config", None)
    hidden = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "hidden_size", None)
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for stat in stats:
        if means.has(stat.name):
            alike.setdefault((stat.kind, stat.shape), []).append(stat.name)
    for (kind, shape), members in alike.items():
        if len(members) > 1:
            layer = shape[::-1] if infos[members[0]].transposed else shape
            side = names.residual_side(kind, layer, hidden)
            width = layer[1] if side == "in" else layer[0]
            tables = means.similarities(members, side, directions)
            subspace, cosine = (tuple(tuple(round(v, 6) for v in row) for row in table) for table in tables)
            yield Similarity(kind, shape, side, width, tuple(members), subspace, cosine)
