"""One forward and one backward for each batch; nothing trains, and the model is afterwards what it was before.

What is wanted about a gradient is measured as it passes: hooks see the input x and the output gradient g of every candidate
matrix, and hand both to collectors, so that no layer's gradient is kept and, but where a collector forms one for a moment,
none is made.

For y = x W^T the derivative of one sample's loss by W is the sum over its tokens t of g_t x_t^T. The weight itself is not
asked, so 4-bit bases, whose weight has no gradient, are measured like float ones: by their dequantized weight.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import names
from ..data import IGNORED
from ..devices import default_device, generators
from ..errors import DataError
from ..weights import LiveWeights, TensorInfo, settle_quantized
from .collectors import Collector

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, nothing trains, random states of their own; all as before at the end, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    settle_quantized(model)
    with torch.random.fork_rng(devices=generators(), device_type=default_device().type), torch.enable_grad():
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


def with_bar(items: Iterable[_T], what: str, unit: str) -> Iterable[_T]:
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


class Probe:
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
        for i, value in enumerate(losses.cpu().tolist()):
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
