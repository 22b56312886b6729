"""What each contestant needs, by a dry run of one step, and the settings under which it fits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..compare.matrix import Contestant
from ..errors import OptionError, SpectrumError
from ..memory import OPTIMIZERS, Step, estimate_memory, format_bytes, report_of_config
from ..plan import MODES
from ..records import SnrReport
from ..tuner.config import SpectrumConfig

logger = logging.getLogger(__name__)

MARGIN = 0.05  # of the memory stays free: what no dry run sees, see docs/memory.md
# Scores that need no weights; plans of the others are priced by those that begin below, through which backward is longest.
_WITHOUT_WEIGHTS = ("first", "last", "random", "spaced")


@dataclass(frozen=True)
class Price:
    """What a contestant needs.

    Attributes:
        settings: keys of `train` under which that is: micro-batch, accumulation, checkpointing, quantization.
        peak_bytes: of one step, by the dry run; None where the step cannot be run on fake tensors.
        trained, total: parameters.
        fits: into the memory less the margin.
    """

    contestant: Contestant
    settings: Mapping[str, Any]
    peak_bytes: int | None
    trained: int
    total: int
    fits: bool

    def line(self) -> str:
        micro, parts = self.settings["per_device_train_batch_size"], self.settings["gradient_accumulation_steps"]
        how = f"{micro} rows" + (f" x {parts}" if parts > 1 else "") + " a step"
        how += ", checkpointing" if self.settings["gradient_checkpointing"] else ""
        how += f", {self.settings['quantization']}" if "quantization" in self.settings else ""
        size = "no dry run" if self.peak_bytes is None else format_bytes(self.peak_bytes)
        state = "" if self.fits else "  DOES NOT FIT"
        return f"{self.contestant.label:<32} {size:>10}  {self.trained:>13,} trained  {how}{state}"


class Pricing:
    """Dry runs of one model.

    Args:
        config: of the model as it is loaded, with the task's head.
        train: keys of `train` that all runs share.
        step: fields of `memory.Step` that are the same for all: length, dtype, device, trainer.
        memory: bytes, of which the margin stays free; None: everything fits.
        model_class: of transformers, for the task.
    """

    def __init__(
        self, config: Any, train: Mapping[str, Any], step: Mapping[str, Any], memory: int | None, batch_size: int, task_type: str,
        model_class: Any = None,
    ) -> None:  # fmt: skip
        self.config, self.train, self.step, self.batch_size = config, train, dict(step), batch_size
        self.memory = memory
        self.limit = None if memory is None else int(memory * (1 - MARGIN))
        self.task_type = task_type
        self.where = {"model_class": model_class, "trust_remote_code": bool(train.get("trust_remote_code"))}
        self._reports: dict[str, SnrReport] = {}

    def report(self, criterion: str = "first") -> SnrReport:
        """Names and shapes of the model's matrices."""
        if criterion not in self._reports:
            self._reports[criterion] = report_of_config(self.config, criterion, **self.where)
        return self._reports[criterion]

    def price(self, contestant: Contestant) -> Price:
        """The first of these that fits, else the last, which is the smallest: without checkpointing, with it, the same two on a
        4-bit base where the base is not quantized as asked and the mode takes one; each with the largest micro-batch that fits.
        """
        quantizations = [self.train.get("quantization")]
        mode = MODES[contestant.mode] if contestant.peft is None else None
        if quantizations[0] in (None, "none") and self.limit is not None and not (mode and mode.whole_model):
            quantizations.append("nf4")
        if "quantization" in contestant.settings:
            quantizations = [contestant.settings["quantization"]]
        smallest: Price | None = None
        for quantization in quantizations:
            for checkpointing in (False, True):
                try:
                    found = self._largest(contestant, quantization, checkpointing)
                except SpectrumError as error:
                    if smallest is None:
                        raise
                    logger.info("%s, %s: %s", contestant.label, quantization, error)  # no such base of this model
                    continue
                if found.fits:
                    return found
                smallest = (
                    found if smallest is None or (found.peak_bytes or 0) < (smallest.peak_bytes or 0) else smallest
                )
        assert smallest is not None
        return smallest

    def _largest(self, contestant: Contestant, quantization: str | None, checkpointing: bool) -> Price:
        """With the largest micro-batch that fits; with one row where none does."""
        sizes = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
        low, high = 0, len(sizes) - 1
        best = self._priced(contestant, sizes[high], quantization, checkpointing)
        if best.fits or not high:
            return best
        best = self._priced(contestant, sizes[0], quantization, checkpointing)
        if not best.fits:
            return best
        while high - low > 1:
            middle = (low + high) // 2
            one = self._priced(contestant, sizes[middle], quantization, checkpointing)
            low, high, best = (middle, high, one) if one.fits else (low, middle, best)
        return best

    def _priced(self, contestant: Contestant, rows: int, quantization: str | None, checkpointing: bool) -> Price:
        quantization = None if quantization == "none" else quantization
        parts = self.batch_size // rows
        step = {
            **self.step, "batch_size": rows, "gradient_accumulation_steps": parts, "gradient_checkpointing": checkpointing,
            "quantization": quantization,
        }  # fmt: skip
        settings: dict[str, Any] = {
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": parts, "gradient_checkpointing": checkpointing,
        }  # fmt: skip
        if quantization is not None:
            settings["quantization"] = quantization
        if contestant.peft is not None:
            return Price(contestant, settings, None, 0, 0, True)
        found = estimate_memory(self.config, self._config(contestant), **step, **self.where)
        peak = found.peak_bytes if found.complete else None
        fits = self.limit is None or peak is None or peak <= self.limit
        return Price(contestant, settings, peak, found.trainable_parameters, found.total_parameters, fits)

    def _config(self, contestant: Contestant) -> SpectrumConfig:
        fields = {**self.train, **contestant.settings}
        known = {k: v for k, v in fields.items() if v is not None and k in SpectrumConfig.__dataclass_fields__}
        known = {
            k: v for k, v in known.items() if k not in ("report", "plan", "task_type", "gradients", "seed", "revision")
        }
        criterion = known.pop("criterion", None)
        if criterion in _WITHOUT_WEIGHTS:
            known["criterion"] = criterion
        else:
            criterion = "first"
            known["criterion"] = criterion
        gradients = None
        if MODES[contestant.mode].needs_data or known.get("columns_by") in ("activation", "fisher"):
            from ..memory import gradients_of_report

            gradients = gradients_of_report(self.report(criterion))
        # A run reads the checkpoint back where it needs the base, so that nothing of it is kept.
        known["keep_base"] = "none"
        return SpectrumConfig(**known, report=self.report(criterion), gradients=gradients, task_type=self.task_type)


def step_of(options: Mapping[str, Any], *, device: str, dtype: str, trainer: str, max_length: int) -> dict[str, Any]:
    """Fields of `memory.Step` that all contestants share, as their trainer will have them."""
    optimizer = str(options.get("optim") or "adamw_torch_fused")
    attention = options.get("attn_implementation")
    return {
        "device": device, "dtype": dtype, "trainer": trainer, "max_length": max_length,
        "optimizer": optimizer if optimizer in OPTIMIZERS else Step.optimizer,
        "attn_implementation": attention if attention in ("sdpa", "eager") else Step.attn_implementation,
    }  # fmt: skip


def those_that_fit(prices: Sequence[Price], memory: int | None) -> list[Price]:
    """
    Raises:
        OptionError: none does; the message says which needs least, and how much.
    """
    fitting = [p for p in prices if p.fits]
    if fitting:
        return fitting
    least = min(prices, key=lambda p: p.peak_bytes or 0)
    raise OptionError(
        f"memory is {format_bytes(memory or 0)}, into which nothing fits less {MARGIN:.0%}: the smallest is "
        f"{least.contestant.label!r} ({', '.join(f'{k}={v}' for k, v in least.settings.items())}), which needs "
        f"{format_bytes(least.peak_bytes or 0)}."
    )


def renamed(price: Price) -> Price:
    """With the base's quantization in the name, where it is not the one that was asked for."""
    bits = price.settings.get("quantization")
    if bits is None or price.contestant.settings.get("quantization") is not None:
        return price
    return replace(price, contestant=replace(price.contestant, label=f"{price.contestant.label} on {bits}"))
