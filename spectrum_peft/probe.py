"""Gradients on data: a model and calibration batches become a `GradientReport`.

One forward and one backward for each batch; nothing trains, and the model is afterwards what it was before. What is wanted
about a gradient is measured as it passes: hooks see the input x and the output gradient g of every candidate matrix, and
hand both to collectors, so that no layer's gradient is kept and, but where a collector forms one for a moment, none is made.

For y = x W^T the derivative of one sample's loss by W is the sum over its tokens t of g_t x_t^T. The weight itself is not
asked, so 4-bit bases, whose weight has no gradient, are measured like float ones: by their dequantized weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import names
from .errors import DataError, OptionError, near_matches
from .records import GradientReport, GradientStat, Similarity
from .scan import cache_folder
from .svd import SingularTriplets, cached_svd
from .tasks import IGNORED, label_ids, label_names, select_columns
from .weights import LiveWeights, TensorInfo, keep_4bit_differentiable, matrix_of

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

DEFAULT_SAMPLES = 256
_BATCH_SIZE = 8
_MAX_LENGTH = 512
# Singular values of a sketch's core below this many units of rounding of the largest are no directions.
_NEGLIGIBLE = 10


# --- what is measured ------------------------------------------------------------------------------------------------


class Collector(Protocol):
    """Something that is measured on gradients as they pass, and ends as fields of a `GradientStat`."""

    as_computed: bool

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        """One batch at one matrix (out, in).

        Args:
            name: of the parameter.
            x: inputs, (samples, tokens, in).
            g: derivatives of each sample's own loss by the outputs, (samples, tokens, out); zero at padding. Both float32,
                or float64 where the model is; what is `as_computed` gets the dtype that the model computes in.
        """
        ...

    def see_whole(self, name: str, gradient: Tensor) -> None:
        """One sample's derivative by a parameter that no module's input and output speak of (fused experts), as stored."""
        ...

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        """What goes into the `GradientStat` of a matrix, by field; all samples have been seen."""
        ...


class FisherMass:
    """The empirical Fisher mass: the squared derivative of one sample's loss, its mean over samples and elements.

    |sum_t g_t x_t^T|_F^2 is also the sum over pairs of tokens of (x_t . x_u)(g_t . g_u), which is cheaper where a sample has
    fewer tokens than the matrix has rows and columns; else the product is formed, of one sample at a time.
    Source: Kunstner et al. (2019), arXiv:1905.12558, equation 3 (the empirical Fisher; its diagonal, averaged).
    """

    as_computed = False

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        for one_x, one_g in zip(x, g, strict=True):
            tokens, width, height = len(one_x), one_x.shape[1], one_g.shape[1]
            if tokens * (width + height) < width * height:
                square = ((one_x @ one_x.T) * (one_g @ one_g.T)).sum(dtype=torch.float64)
            else:
                square = (one_g.T @ one_x).square_().sum(dtype=torch.float64)
            self._add(name, square)

    def see_whole(self, name: str, gradient: Tensor) -> None:
        self._add(name, gradient.square().sum(dtype=torch.float64))

    def _add(self, name: str, square: Tensor) -> None:
        self._totals[name] = square + self._totals[name] if name in self._totals else square

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        # A sum over pairs of tokens may round to a little below zero.
        total = max(0.0, float(self._totals[name])) if name in self._totals else 0.0
        return {"fisher": total / samples / numel}


class MeanGradients:
    """Sketches of the mean gradients, from which each comes back as a product of low rank.

    Two products with fixed random matrices are kept of a mean gradient G (out, in), X = G P and Y = G^T Q, which add up over
    batches; then G is about X (Q^T X)^+ Y^T, exactly so where its rank is at most `sketch`, and else with an error near that
    of the best approximation of that rank.
    Source: Nakatsukasa (2020), arXiv:2009.11392, equation 1.2 (generalized Nystroem, its second sketch half as wide again).

    Args:
        sketch: columns of P.
        seed: of the random matrices.
    """

    as_computed = False

    def __init__(self, sketch: int, seed: int = 0) -> None:
        self.sketch, self.seed = sketch, seed
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._random: dict[tuple[int, int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def _matrices(self, width: int, height: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """P (in, sketch) and Q (out, 1.5 sketch): the same for all matrices of one shape."""
        key = (width, height, like.dtype, like.device)
        if key not in self._random:
            columns = min(self.sketch, width, height)
            wider = min(columns + (columns + 1) // 2, height)
            generator = torch.Generator().manual_seed(_seed(self.seed, width, height))
            pair = (torch.randn(rows, n, generator=generator) for rows, n in ((width, columns), (height, wider)))
            p, q = (m.to(dtype=like.dtype, device=like.device) for m in pair)
            self._random[key] = (p, q)
        return self._random[key]

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        p, q = self._matrices(x.shape[-1], g.shape[-1], x)
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        if name not in self._kept:
            self._kept[name] = (x.new_zeros(g.shape[1], p.shape[1]), x.new_zeros(x.shape[1], q.shape[1]))
        left, right = self._kept[name]
        left.addmm_(g.T, x @ p)
        right.addmm_(x.T, g @ q)

    def see_whole(self, name: str, gradient: Tensor) -> None:
        """Fused experts are not compared with each other."""

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        return {}

    def svd(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """(U, s, V) of the sum of the gradients that were seen: U (out, rank), V (in, rank), float64 on the CPU.

        Of rank 0 where all of it was zero.
        """
        x, y = (t.double().cpu() for t in self._kept[name])
        kept = self._kept[name][0]
        q = self._matrices(y.shape[0], x.shape[0], kept)[1].double().cpu()
        u, s, vh = torch.linalg.svd(q.T @ x, full_matrices=False)
        rank = int((s > _NEGLIGIBLE * torch.finfo(kept.dtype).eps * s[0]).sum())
        left, right = x @ (vh[:rank].T / s[:rank]), y @ u[:, :rank]
        ql, rl = torch.linalg.qr(left)
        qr, rr = torch.linalg.qr(right)
        inner_u, values, inner_vh = torch.linalg.svd(rl @ rr.T)
        return ql @ inner_u, values, qr @ inner_vh.T

    def has(self, name: str) -> bool:
        """Whether the gradient of a matrix was seen by its module's input and output."""
        return name in self._kept

    def similarities(
        self, members: Sequence[str], side: str, directions: int
    ) -> tuple[list[list[float]], list[list[float]]]:
        """(subspace, cosine) tables of matrices of one shape.

        subspace: |V_a^T V_b|_F^2 / n for the n strongest directions of each on the given side, n at most `directions` and the
        rank of either: the mean squared cosine of the principal angles, n / width by chance. cosine: <G_a, G_b> of the
        low-rank products over their norms. A gradient that is zero is like no other.

        Args:
            side: `in` or `out`.
        """
        parts = [self.svd(name) for name in members]
        subspace = [[1.0] * len(members) for _ in members]
        cosine = [[1.0] * len(members) for _ in members]
        for i, (ua, sa, va) in enumerate(parts):
            for j, (ub, sb, vb) in enumerate(parts[:i]):
                count = min(directions, len(sa), len(sb))
                mine, other = (va, vb) if side == "in" else (ua, ub)
                overlap = (mine[:, :count].T @ other[:, :count]).square().sum().item() / count if count else 0.0
                product = ((ua.T @ ub) * (sa[:, None] * sb) * (va.T @ vb)).sum().item()
                norms = sa.norm().item() * sb.norm().item()
                subspace[i][j] = subspace[j][i] = min(1.0, overlap)
                cosine[i][j] = cosine[j][i] = product / norms if norms else 0.0
        return subspace, cosine


class ComponentImportance:
    """What each singular component of a matrix has to do with the loss: s_i^2 E[(dL/ds_i)^2], the mean over samples.

    dL/ds_i = u_i^T G v_i is the sum over a sample's tokens of (g_t . u_i)(x_t . v_i), so that no gradient is formed. Where the
    model computes in bfloat16 the products with the singular vectors do, too: they are most of the work. The sums are float32.

    Args:
        bases: {parameter: its leading singular triplets}; what is not in it is not measured.
    """

    as_computed = True

    def __init__(self, bases: Mapping[str, SingularTriplets]) -> None:
        self.bases = bases
        self._squares: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor, g: Tensor) -> None:
        if name not in self.bases:
            return
        basis = self.bases[name]
        wide = torch.promote_types(x.dtype, torch.float32)
        # float16 has no room for the derivatives.
        dtype = x.dtype if x.dtype == torch.bfloat16 else wide
        right, left = (rows.to(device=x.device, dtype=dtype) for rows in (basis.right, basis.left))
        read, written = (x.to(dtype) @ right.T).to(wide), (g.to(dtype) @ left.T).to(wide)
        slopes = read.mul_(written).sum(dim=1)
        square = slopes.double().square_().sum(dim=0)
        self._squares[name] = square + self._squares[name] if name in self._squares else square

    def see_whole(self, name: str, gradient: Tensor) -> None:
        """Fused experts have no basis of their own."""

    def fields(self, name: str, numel: int, samples: int) -> dict[str, Any]:
        if name not in self.bases:
            return {}
        values = self.bases[name].values.double().cpu()
        mean = self._squares[name].cpu() / samples if name in self._squares else torch.zeros_like(values)
        return {"singular_values": tuple(values.tolist()), "importance": tuple((values.square() * mean).tolist())}


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# --- the probe -------------------------------------------------------------------------------------------------------


def probe_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    candidates: Iterable[str] | None = None,
    directions: int = 8,
    sketch: int = 32,
    svd_rank: int = 0,
    fisher: bool = True,
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
    if not (fisher or directions or svd_rank):
        raise OptionError("fisher is False, directions and svd_rank are 0: wanted something to measure.")
    source = LiveWeights(model)
    infos = _candidates(source, candidates)
    means = MeanGradients(sketch, seed) if directions else None
    collectors: list[Collector] = [*([FisherMass()] if fisher else []), *([means] if means else [])]
    if svd_rank:
        collectors.append(ComponentImportance(_bases(source, infos, svd_rank)))
    with _undisturbed(model):
        probe = _Probe(model, source, infos, collectors)
        try:
            for number, batch in enumerate(_with_bar(batches, "probe", "batch")):
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
            "seed": seed,
            "dtype": str(getattr(model, "dtype", next(model.parameters()).dtype)).removeprefix("torch."),
            "quantization": next((t.dtype for t in infos.values() if t.dtype in {"nf4", "fp4", "int8"}), None),
            "adapted": source.adapted,
        },
        model_id=source.model_id,
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

    return {name: one(name) for name in _with_bar(matrices, "decompose", "matrix")}


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


# --- running the model -----------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, nothing trains, random states of their own; all as before at the end, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    keep_4bit_differentiable(model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
        try:
            model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, training in modes:
                module.training = training


def _with_bar(items: Iterable[_T], what: str, unit: str) -> Iterable[_T]:
    """The items, with a bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, unit=unit, desc=what, file=sys.stderr)


@dataclasses.dataclass
class _Call:
    """One forward through a module: its input, and later the derivative by its output."""

    x: Tensor
    g: Tensor | None = None


class _Probe:
    """Hooks on the candidates' modules, and the batches run through them.

    A matrix whose module is called is measured by its input and output, batch by batch. What else there is, fused experts and
    weights that are multiplied elsewhere, is measured by the parameter's own gradient, sample by sample, each taken when it
    is there and dropped before the next.
    """

    def __init__(
        self, model: nn.Module, source: LiveWeights, infos: Mapping[str, TensorInfo], collectors: Sequence[Collector]
    ) -> None:
        self.model, self.collectors = model, collectors
        self.samples, self.loss = 0, 0.0
        self.batches = 0
        self.reached: set[str] = set()
        self._places = {name: source.place(name) for name in infos}
        self._infos = infos
        self._calls: dict[str, list[_Call]] = {}
        self._size = (1, 1)  # samples and tokens of the batch at hand
        self._shift: int | None = None
        # An encoder-decoder makes its decoder's inputs from them, of a model that is not transformers' nothing is known; others
        # need them until `_shift` is known.
        self._needs_labels = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", True))
        self._looking = False
        self._one_by_one: bool | None = None  # None: no batch was looked at yet
        self._whole: dict[str, Tensor | None] = {}  # what was in the parameter's `grad`
        self._handles = []
        for name, (module, _) in self._places.items():
            if len(infos[name].shape) == 2:
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(partial(self._after, name), with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for name, kept in self._whole.items():
            parameter = self._places[name][1]
            parameter.requires_grad_(False)
            parameter.grad = kept
        self._calls.clear()

    def check(self) -> None:
        """Raises: DataError: nothing was measured."""
        if not self.batches:
            raise DataError("calibration: there is no batch; give at least one, with labels.")
        if not self.samples:
            raise DataError("calibration: no sample has a token to predict, every label is masked (-100).")
        if not self.reached:
            raise DataError(
                f"calibration: none of {len(self._infos)} candidate matrices got a gradient, first "
                f"{next(iter(self._infos))}; the loss does not depend on them."
            )
        idle = [name for name in self._infos if name not in self.reached]
        if idle:
            logger.info(
                "%d of %d matrices have no part in the loss, their Fisher mass is 0, first %s",
                len(idle),
                len(self._infos),
                idle[0],
            )

    # --- batches ----------------------------------------------------------------------------------------------------

    def take(self, batch: Mapping[str, Any], number: int) -> None:
        """Run one batch forward and backward.

        Raises:
            DataError: no labels, a loss that is NaN or infinite.
        """
        self.batches += 1
        if "labels" not in batch:
            raise DataError(f"calibration batch {number}: has {sorted(batch)}, wanted labels too.")
        where = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        inputs = {k: torch.as_tensor(v).to(where) for k, v in batch.items() if isinstance(v, Tensor | list | tuple)}
        labels = inputs["labels"]
        if labels.is_floating_point() or labels.dim() not in (1, 2):
            raise DataError(
                f"calibration batch {number}: labels are {labels.dtype} {tuple(labels.shape)}, wanted (samples,) class ids or "
                "(samples, tokens) token ids."
            )
        samples = len(labels)
        if self._one_by_one is None:
            self._look(inputs)
        if not self._one_by_one or samples == 1:
            self._run(inputs, f"calibration batch {number}")
            return
        for i in range(samples):
            if any(len(v) != samples for v in inputs.values() if v.dim()):
                raise DataError(
                    f"calibration batch {number}: cannot be taken apart by samples; give batches of one sample."
                )
            self._run(
                {k: v[i : i + 1] if v.dim() else v for k, v in inputs.items()}, f"calibration batch {number}, row {i}"
            )

    def _look(self, inputs: Mapping[str, Tensor]) -> None:
        """Find out which modules are called, and whether what they see can be told apart by samples."""
        self._one_by_one = False
        self._looking = True
        self._size = _size(inputs)
        with torch.no_grad():
            self.model(**_for_model(inputs, self._needs_labels))
        self._looking = False
        for name, (_, parameter) in self._places.items():
            if name in self._calls or not parameter.is_floating_point():
                continue
            if not isinstance(parameter, nn.Parameter):
                raise DataError(f"{name}: lies in a layer that trains it whole; probe the model without that adapter.")
            self._one_by_one = True
            self._whole[name] = parameter.grad
            parameter.grad = None
            parameter.requires_grad_(True)
            hook = partial(self._taken_whole, name)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        self._calls.clear()

    def _run(self, inputs: Mapping[str, Tensor], where: str) -> None:
        self._size = _size(inputs)
        output = self.model(**_for_model(inputs, self._needs_labels or self._shift is None))
        losses, counted = self._losses(output, inputs["labels"], where)
        del output
        for i, value in enumerate(losses.tolist()):
            if not math.isfinite(value):
                raise DataError(f"{where}: the loss of sample {i} is {value}, wanted a finite number.")
        if not counted.all():
            logger.info("%s: %d samples have no token to predict and do not count", where, int((~counted).sum()))
        self.samples += int(counted.sum())
        self.loss += losses.detach().sum().item()
        # Samples do not meet in a forward pass, so each row's derivative by the sum is that by its own loss.
        losses.sum().backward()
        for name in list(self._calls):  # those of whose calls some had no part in the loss
            self._hand_over(name)

    def _losses(self, output: Any, labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """(losses, whether there was anything to predict) of the samples."""
        logits = getattr(output, "logits", None)
        if logits is None:
            raise DataError(f"{where}: the model returns {type(output).__name__} without logits, wanted them.")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits.device)
        if logits.shape[:-1] != labels.shape:
            raise DataError(f"{where}: labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}.")
        if labels.dim() == 1:
            if logits.shape[-1] < 2:
                raise DataError(
                    f"{where}: the model has one output, of which class ids say nothing. Probe the language model it came "
                    "from, and give the report as gradients=."
                )
            if (top := int(labels.max())) >= logits.shape[-1]:
                raise DataError(f"{where}: a class id is {top}, and the model has {logits.shape[-1]} classes.")
            return functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED), labels != IGNORED
        if self._shift is None:
            self._shift = _shift(logits.detach(), labels, getattr(output, "loss", None))
        return _token_losses(logits, labels, self._shift)

    # --- hooks ------------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where nothing upstream has a derivative, one begins here, so that backward comes through."""
        if self._looking or not torch.is_grad_enabled():
            return None
        args, kwargs = tuple(map(_with_grad, args)), {k: _with_grad(v) for k, v in kwargs.items()}
        return args, kwargs

    def _after(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        calls = self._calls.setdefault(name, [])
        if self._looking:
            calls.append(_Call(x))
            self._one_by_one = self._one_by_one or not self._by_samples(name, x)
            return
        if not self._by_samples(name, x):
            raise DataError(f"{name}: an input of shape {tuple(x.shape)} is not told apart by {self._size[0]} samples.")
        call = _Call(x.detach())
        calls.append(call)
        output.register_hook(partial(self._arrived, name, call))

    def _by_samples(self, name: str, x: Tensor) -> bool:
        samples, tokens = self._size
        if samples == 1 or (x.dim() > 2 and len(x) == samples):
            return True
        # Rows of one expert are as many as were routed to it, and may be as many as anything by chance.
        if x.dim() != 2 or "experts" in name.split("."):
            return False
        return len(x) == samples * tokens or (len(x) == samples and names.block_index(name) is None)

    def _arrived(self, name: str, call: _Call, g: Tensor) -> None:
        call.g = g
        if all(c.g is not None for c in self._calls[name]):
            self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        """Give a matrix's calls to the collectors; where it was called several times, their tokens stand side by side."""
        calls = [c for c in self._calls.pop(name) if c.g is not None]
        if not calls:
            return
        self.reached.add(name)
        x, g = (
            torch.cat([t.reshape(self._size[0], -1, t.shape[-1]) for t in side], dim=1)
            for side in ([c.x for c in calls], [c.g for c in calls])
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        given: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        for collector in self.collectors:
            dtype = x.dtype if collector.as_computed else wide
            if dtype not in given:
                given[dtype] = (x.to(dtype), g.to(dtype))
            collector.see(name, *given[dtype])

    def _taken_whole(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.reached.add(name)
        gradient = parameter.grad.to(torch.promote_types(parameter.grad.dtype, torch.float32))
        parameter.grad = None
        for collector in self.collectors:
            collector.see_whole(name, gradient)


def _with_grad(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_(True)
    return value


def _size(inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """(samples, tokens) of a batch."""
    return len(inputs["labels"]), max(v.shape[1] for v in inputs.values() if v.dim() > 1)


def _for_model(inputs: Mapping[str, Tensor], labels: bool) -> dict[str, Tensor]:
    """Without labels the model spares itself a loss. Class ids are left out always: with them, a classifier would write its
    kind of problem into its config."""
    return {k: v for k, v in inputs.items() if k != "labels" or (labels and v.dim() > 1)}


def _token_losses(logits: Tensor, labels: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """(mean over a sample's label tokens, whether it has any): (samples,) each.

    Args:
        shift: 1 where the logits at a position speak of the next token, 0 where of its own.
    """
    logits, targets = logits[:, : logits.shape[1] - shift], labels[:, shift:]
    tokens = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    count = (targets != IGNORED).sum(1)
    return tokens.view(targets.shape).sum(1) / count.clamp(min=1), count > 0


def _shift(logits: Tensor, labels: Tensor, stated: Tensor | None) -> int:
    """Whether the labels are those of the next token (1) or of the same (0): as the model's own loss has it."""
    if stated is None:
        return 1
    own = stated.detach().float().item()

    def mean(shift: int) -> float:
        losses, _ = _token_losses(logits, labels, shift)
        count = (labels[:, shift:] != IGNORED).sum(1)
        return ((losses * count).sum() / count.sum().clamp(min=1)).item()

    found = {shift: mean(shift) for shift in (1, 0)}
    best = min(found, key=lambda shift: abs(found[shift] - own))
    if abs(found[best] - own) > 1e-2 * max(1.0, abs(own)):
        logger.info(
            "the model's own loss is %.6g, the cross-entropy of its labels %.6g; the latter is probed", own, found[best]
        )
    return best


# --- data ------------------------------------------------------------------------------------------------------------


def calibration_batches(
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    n: int = DEFAULT_SAMPLES,
    seed: int = 0,
    *,
    batch_size: int = _BATCH_SIZE,
    max_length: int = _MAX_LENGTH,
    task: str | None = None,
    labels: Sequence[str] | None = None,
) -> list[dict[str, Tensor]]:
    """Rows of a dataset as batches for `probe_gradients`: ids, attention mask and labels on the CPU, padded on the right.

    Rows in the forms that training takes: `text`; `prompt` and `completion`, of which only the completion is learnt; `messages`,
    through the tokenizer's chat template; `text` and `label`; or `input_ids`, with `labels` where they differ. Language
    modelling ends a text with the tokenizer's end token, as TRL does. Use rows of the training set, never of validation.

    Args:
        dataset: of which `n` rows are drawn; all, with a logged line, where it has fewer.
        seed: of the draw.
        batch_size: samples of a batch; the results do not depend on it, memory does.
        max_length: in tokens; longer rows are cut.
        task: `causal_lm`, `seq2seq` or `classification`; None: classification where there is a label, else causal_lm.
        labels: names of the classes in the order of the model's ids, `list(model.config.label2id)`; None: numbered as
            `label_names` finds them in the column, which is the model's order only where it was trained on the same column.
    Raises:
        DataError: fewer rows than one batch, no usable column, a label that is none of `labels`.
        OptionError: n below 1.
    """
    if n < 1 or batch_size < 1:
        raise OptionError(f"n is {n} and batch_size is {batch_size}, wanted at least 1.")
    if not hasattr(dataset, "column_names"):
        from datasets import Dataset

        dataset = Dataset.from_list([dict(row) for row in dataset])
    if len(dataset) < min(n, batch_size):
        raise DataError(
            f"calibration: {len(dataset)} rows, wanted at least one batch of {min(n, batch_size)}; give more rows or a "
            "smaller batch_size."
        )
    if len(dataset) < n:
        logger.info("calibration: %d rows asked for, the dataset has %d", n, len(dataset))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(dataset), generator=generator)[:n].sort().values.tolist()
    encoded = _encoded(dataset, drawn, tokenizer, min(max_length, tokenizer.model_max_length), task, labels)
    encoded.sort(key=lambda row: len(row["input_ids"]))  # rows of a length together: little padding
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return [_padded(encoded[i : i + batch_size], padding) for i in range(0, len(encoded), batch_size)]


def _encoded(
    dataset: Dataset, drawn: Sequence[int], tokenizer: Any, limit: int, task: str | None, labels: Sequence[str] | None
) -> list[dict[str, Any]]:
    """{input_ids, labels} of the drawn rows, plain lists."""
    if "input_ids" in dataset.column_names:
        rows = dataset.select(drawn)
        given = "labels" if "labels" in dataset.column_names else "input_ids"
        return [
            {
                "input_ids": list(r["input_ids"])[:limit],
                "labels": v if isinstance(v := r[given], int) else list(v)[:limit],
            }
            for r in rows
        ]
    task = task or ("classification" if "label" in dataset.column_names else "causal_lm")
    dataset = select_columns(dataset, task, "calibration data")
    to_id = (
        label_ids(dataset, labels or label_names(dataset, None, "calibration data"))
        if task == "classification"
        else None
    )
    return [_encode(row, tokenizer, limit, task, to_id) for row in dataset.select(drawn)]


def _encode(row: Mapping[str, Any], tokenizer: Any, limit: int, task: str, to_id: Any) -> dict[str, Any]:
    if to_id is not None:
        ids = tokenizer(row["text"], truncation=True, max_length=limit)["input_ids"]
        return {"input_ids": ids, "labels": to_id(row["label"])}
    if task == "seq2seq":
        both = tokenizer(row["prompt"], text_target=row["completion"], truncation=True, max_length=limit)
        return {"input_ids": both["input_ids"], "labels": both["labels"]}
    if "messages" in row:
        chat = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=True, tokenize=True)
        ids, known = list(chat["input_ids"]), 0
    elif "text" in row:
        ids, known = _ended(tokenizer(row["text"])["input_ids"], tokenizer), 0
    elif isinstance(row["prompt"], str):
        known = len(tokenizer(row["prompt"])["input_ids"])
        ids = _ended(tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer)
    else:
        start = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True, tokenize=True
        )
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True, tokenize=True)
        ids, known = list(whole["input_ids"]), len(start["input_ids"])
    return {"input_ids": ids[:limit], "labels": ([IGNORED] * known + ids[known:])[: min(limit, len(ids))]}


def _ended(ids: Sequence[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (len(ids) and ids[-1] == end) else [*ids, end]


def _padded(rows: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Tensor]:
    def filled(values: Sequence[Sequence[int]], value: int) -> Tensor:
        width = max(map(len, values))
        return torch.tensor([[*v, *[value] * (width - len(v))] for v in values])

    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": filled(ids, padding),
        "attention_mask": filled([[1] * len(v) for v in ids], 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else filled(labels, IGNORED),
    }
