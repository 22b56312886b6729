"""`SpectrumScanner`: the short way over scan and plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import OptionError, near_matches
from .plan import check_options, make_plan
from .records import Plan, SnrReport
from .scan import report_named, scan_weights

_DTYPES = ("float32", "bfloat16", "float16")


class SpectrumScanner:
    """Scan a checkpoint, choose what trains, and say what that saves.

    Args:
        model_name: hub id, folder, `.safetensors` or `.gguf` file.
        spectrum_ratio: share of the matrices of each kind that are chosen; None for 0.5, unless another option
            chooses.
        dtype: that the model will be loaded in, for the memory estimate: `float32`, `bfloat16`, `float16` or a torch
            dtype; None for bfloat16.
        report: an earlier scan of this model, as `scan.report_named` takes it: a record, a file, `auto`, a repository of the
            hub; without it the first need of one scans.
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
        report: SnrReport | str | os.PathLike[str] | None = None,
        revision: str | None = None,
        jobs: int | None = None,
        device: str = "auto",
        **options: Any,
    ) -> None:
        if spectrum_ratio is not None:
            options["spectrum_ratio"] = spectrum_ratio
        checked = check_options(**options)
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        if name is not None and name not in _DTYPES:
            raise OptionError(f"dtype is {dtype!r}." + near_matches(name, _DTYPES))
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
        self._given = report
        self._report: SnrReport | None = None
        self._plan: Plan | None = None

    def scan(self) -> SnrReport:
        """Read the weights and score them. Each call reads them anew; `report` keeps the last result."""
        self._report = scan_weights(self.model_name, **self._scan_options)
        self._plan = None
        return self._report

    @property
    def report(self) -> SnrReport:
        """The report that was given, or the result of the scan, which is done now if it was not yet."""
        if self._report is None and self._given is not None:
            known = {k: v for k, v in self._scan_options.items() if k in ("criterion", "revision", "seed")}
            self._report = report_named(self._given, self.model_name, **known)
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
        """Four lines: what was scanned, what is chosen, what trains, what that saves against full fine-tuning.

        The saving comes from two dry runs of a training step, seconds for a model of some billion parameters.
        """
        plan = self.plan
        scored = [s for s in self.report.stats if s.score is not None]
        candidates = [e for e in plan.entries if e.action != "save"]
        chosen = [e for e in candidates if e.trains]
        total, trained = self.report.total_parameters, plan.trainable_parameters
        return "\n".join(
            [
                f"Parameter groups scanned: {len({s.kind for s in scored})} ({len(scored)} matrices)",
                f"Training: {len(chosen)} / {len(candidates)} matrices ({_share(len(chosen), len(candidates))})",
                f"Trainable parameters: {trained:,} / {total:,} ({_share(trained, total)})",
                self._saving(),
            ]
        )

    def _saving(self) -> str:
        """The peaks of two dry runs, of the plan and of full fine-tuning, as `spectrum-peft train` would run them."""
        folder = Path(self.model_name).expanduser()
        if folder.is_file() and folder.suffix == ".safetensors":
            folder = folder.parent
        if folder.is_dir() and not (folder / "config.json").is_file():
            return f"Estimated memory saving: not known, {folder} holds no config.json"
        # What trains costs nothing to say; this imports torch's and transformers' modelling side.
        from .memory import describe_step, estimate_memory, format_bytes, usual_step

        source = str(folder) if folder.exists() else self.model_name
        revision = self._scan_options["revision"]
        step = {**usual_step(source, revision=revision), **({} if self.dtype is None else {"dtype": self.dtype})}
        everything = make_plan(self.report, mode="full", trainable_dtype=self.plan.options["trainable_dtype"])
        ours, full = (estimate_memory(source, plan, revision=revision, **step) for plan in (self.plan, everything))
        less = full.peak_bytes - ours.peak_bytes
        return (
            f"Estimated memory saving against full fine-tuning: {_share(less, full.peak_bytes)} "
            f"({format_bytes(full.peak_bytes)} to {format_bytes(ours.peak_bytes)} at the peak of a step; {describe_step(full)})"
        )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
