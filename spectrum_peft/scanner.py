"""`SpectrumScanner`: the short way over scan and plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import OptionError, near_matches
from .plan import check_options, make_plan
from .records import REAL_WEIGHT_ACTIONS, Plan, SnrReport
from .scan import scan_weights

# Bytes of one element as loaded for training. Quantized files are dequantized by the loader, to float32 by default.
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_ADAMW_STATES = 2  # running mean of the gradient and of its square


class SpectrumScanner:
    """Scan a checkpoint, choose what trains, and say what that saves.

    Args:
        model_name: hub id, folder, `.safetensors` or `.gguf` file.
        spectrum_ratio: share of the matrices of each kind that are chosen; None for 0.5, unless another option
            chooses.
        dtype: that the model will be loaded in, for the memory estimate: `float32`, `bfloat16`, `float16`, a torch
            dtype, or None for the checkpoint's.
        report: an earlier scan of this model; without it the first need of one scans.
        revision: of a hub model.
        jobs, device: of the scan.
        options: any option of `make_plan`.
    Raises:
        OptionError: an option is unknown, outside its range or excludes another.
    """

    def __init__(
        self,
        model_name: str | os.PathLike[str],
        spectrum_ratio: float | None = None,
        dtype: Any = None,
        *,
        report: SnrReport | None = None,
        revision: str | None = None,
        jobs: int | None = None,
        device: str = "auto",
        **options: Any,
    ) -> None:
        if spectrum_ratio is not None:
            options["spectrum_ratio"] = spectrum_ratio
        checked = check_options(**options)
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        if name is not None and name not in _BYTES:
            raise OptionError(f"dtype is {dtype!r}." + near_matches(name, _BYTES))
        self.model_name = str(model_name)
        self.options = options
        self.dtype = name
        self._scan_options: dict[str, Any] = {
            "criterion": checked["criterion"],
            "seed": checked["seed"],
            "revision": revision,
            "jobs": jobs,
            "device": device,
        }
        self._report = report
        self._plan: Plan | None = None

    def scan(self) -> SnrReport:
        """Read the weights and score them. Each call reads them anew; `report` keeps the last result."""
        self._report = scan_weights(self.model_name, **self._scan_options)
        self._plan = None
        return self._report

    @property
    def report(self) -> SnrReport:
        """The result of the scan, which is done now if it was not yet."""
        return self._report if self._report is not None else self.scan()

    @property
    def plan(self) -> Plan:
        """What trains, by the report and the options."""
        if self._plan is None:
            self._plan = make_plan(self.report, **self.options)
        return self._plan

    def scan_and_save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan, with `unfrozen_parameters` as axolotl reads them; YAML for `.yaml`, JSON otherwise."""
        return self.plan.save(path)

    def summary(self) -> str:
        """Four lines: what was scanned, what is chosen, what trains, what that saves against full fine-tuning."""
        plan = self.plan
        scored = [s for s in self.report.stats if s.score is not None]
        candidates = [e for e in plan.entries if e.action != "save"]
        chosen = [e for e in candidates if e.trains]
        total, trained = self.report.total_parameters, plan.trainable_parameters
        full, ours = self._bytes(full=True), self._bytes(full=False)
        return "\n".join(
            [
                f"Parameter groups scanned: {len({s.kind for s in scored})} ({len(scored)} matrices)",
                f"Training: {len(chosen)} / {len(candidates)} matrices ({_share(len(chosen), len(candidates))})",
                f"Trainable parameters: {trained:,} / {total:,} ({_share(trained, total)})",
                f"Estimated memory saving against full fine-tuning: {_share(full - ours, full)} "
                f"({_gib(full)} to {_gib(ours)}: weights + gradients + AdamW, without activations)",
            ]
        )

    def _bytes(self, full: bool) -> int:
        """Weights, gradients and AdamW states of a training run; activations and logits are not in it.

        A frozen element takes its dtype's bytes. One that trains takes weight, gradient and two AdamW states, each in
        the dtype it trains in; an adapter's are float32 and come on top of the frozen base.
        """
        plan = self.plan
        base = _BYTES[self.dtype or self._stored_dtype()]
        trains = base if plan.options["trainable_dtype"] == "base" else _BYTES["float32"]
        total = self.report.total_parameters
        if full:
            return total * trains * (2 + _ADAMW_STATES)
        real = sum(e.trainable_numel for e in plan.entries if e.action in REAL_WEIGHT_ACTIONS)
        adapters = plan.trainable_parameters - real
        frozen = total - real
        return frozen * base + real * trains * (2 + _ADAMW_STATES) + adapters * _BYTES["float32"] * (2 + _ADAMW_STATES)

    def _stored_dtype(self) -> str:
        """The dtype that holds most elements of the checkpoint; float32 where the file is quantized."""
        numel: dict[str, int] = {}
        for stat in self.report.stats:
            numel[stat.dtype] = numel.get(stat.dtype, 0) + stat.numel
        most = max(numel, key=lambda name: numel[name])
        return most if most in _BYTES else "float32"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
