"""The largest plan within a budget, and memory as tables and text."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, SpectrumError
from ..plan import MODES, OPTIONS, check_options, format_table, get_mode, make_plan
from ..records import GradientReport, MemoryReport, Plan, SnrReport
from ..scan import report_named
from .estimate import estimate_memory, gradients_of_report, least_weights
from .step import EIGHT_BIT_ADAM

logger = logging.getLogger(__name__)

MARGIN = 0.05  # share of a budget that stays free

# Shares of a matrix' columns that are tried: each step is two fifths more than the one before.
_SHARES = tuple(2 ** (-n / 2) for n in range(16, -1, -1))
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(budget: str, name: str = "budget") -> int:
    """`24GiB`, `24 GB`, `512MiB` as bytes; GiB is 2**30, GB is 10**9.

    Raises:
        OptionError: no unit, an unknown one, no number, or nothing above zero.
    """
    match = re.fullmatch(r"\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(budget))
    if match is None:
        raise OptionError(f"{name} is {budget!r}, wanted a size such as '24GiB'.")
    number, unit = float(match[1]), match[2].upper()
    if not unit:
        raise OptionError(
            f"{name} is {budget!r}: the unit is missing, wanted '{match[1]}GiB' (2**30) or '{match[1]}GB' (10**9), say."
        )
    if unit not in _UNITS:
        raise OptionError(f"{name} is {budget!r}: unit {match[2]!r} is not known, wanted GiB, GB, MiB or MB.")
    if not 0 < number < math.inf:
        raise OptionError(f"{name} is {budget!r}, wanted more than 0.")
    return int(number * _UNITS[unit])


@dataclass(frozen=True)
class Fit:
    """What fits a budget.

    Attributes:
        plan: the largest that fits.
        memory: its dry run.
        step: the settings it was found with, fields of `Step`.
        next_plan: the next larger one, which does not fit; None where everything fits.
        tried: (mode, ratio or None, peak bytes) of all dry runs, in their order.
    """

    plan: Plan
    memory: MemoryReport
    step: Mapping[str, Any]
    next_plan: Plan | None
    tried: tuple[tuple[str, float | None, int], ...]


def fit_to_memory(
    model: Any,
    report: SnrReport | str | os.PathLike[str],
    *,
    mode: str | Sequence[str] = "spectrum",
    budget: str = "24GiB",
    margin: float = MARGIN,
    **options: Any,
) -> Plan:
    """The plan with the largest ratio whose predicted peak is within the budget less a margin; see `find_fit`."""
    return find_fit(model, report, mode=mode, budget=budget, margin=margin, **options).plan


def find_fit(
    model: Any,
    report: SnrReport | str | os.PathLike[str],
    *,
    mode: str | Sequence[str] = "spectrum",
    budget: str = "24GiB",
    margin: float = MARGIN,
    gradients: GradientReport | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Fit:
    """Search the largest plan that fits, with few dry runs.

    The ratios where the plan changes are listed, and searched by interpolation, since the peak grows nearly linearly
    with what trains. A mode that takes every matrix has one plan, which fits or does not.

    Args:
        model: as in `estimate_memory`.
        report: with the scores that a ratio chooses by, as `scan.report_named` takes it: a record, a file, `auto`, a repository
            of the hub; `report_of_config` makes one without weights.
        mode: key of `plan.MODES`, or several, best first: the first of which any plan fits is taken.
        budget: with a unit, `24GiB` or `24GB`. What CUDA's context takes must be left out of it, or be in the margin.
        margin: share of the budget that stays free, in [0, 1).
        gradients: for modes that need data, as `make_plan` takes them.
        options: of `make_plan`, and of `estimate_memory`. `gradient_checkpointing="auto"` tries without and then with,
            `batch_size="auto"` the largest power of two up to 64 at which the smallest plan fits.
    Raises:
        OptionError: the budget has no unit, or is not above zero; no mode is given; nothing fits: the message says the
            smallest need, whether the weights alone are above the budget, and what would help.
    """
    limit = refuse_small_budget(model, budget, margin, options)
    plan_options = {k: v for k, v in options.items() if k in OPTIONS}
    settings = {k: v for k, v in options.items() if k not in OPTIONS}
    modes = [mode] if isinstance(mode, str) else list(mode)
    if not modes:
        raise OptionError("mode is empty, wanted one or several of " + ", ".join(MODES) + ".")
    for one in modes:
        get_mode(one)
    where = {k: settings.pop(k) for k in ("model_class", "revision", "trust_remote_code") if k in settings}
    report = _report_of(report, model, plan_options, where)
    search = _Search(model, report, gradients, limit, where)
    checkpointing = settings.pop("gradient_checkpointing", False)
    batch = settings.pop("batch_size", 1)
    for one in modes:
        for checkpointed in (False, True) if checkpointing == "auto" else (checkpointing,):
            for size in (64, 32, 16, 8, 4, 2, 1) if batch == "auto" else (batch,):
                tried = {**settings, "gradient_checkpointing": checkpointed, "batch_size": size}
                found = search.run({**plan_options, "mode": one}, tried)
                if found is not None:
                    return found
    raise OptionError(search.why_nothing_fits(budget, margin, {**plan_options, "mode": modes[-1]}, tried))


def refuse_small_budget(model: Any, budget: str, margin: float, settings: Mapping[str, Any]) -> int:
    """
    Args:
        settings: of `estimate_memory`; those that have no say in what the weights take are not looked at.
    Returns:
        the budget less the margin, in bytes.
    Raises:
        OptionError: the margin is no share; the budget has no unit, or the weights alone, however little trains, are above it.
    """
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
        raise OptionError(f"margin is {margin!r}, wanted a share in [0, 1): 0.05 leaves 5 % of the budget free.")
    limit = int(parse_bytes(budget) * (1 - margin))
    known = ("dtype", "quantization", "sharding", "devices", "model_class", "revision", "trust_remote_code")
    told = {name: settings[name] for name in known if name in settings}
    least = least_weights(model, **told)
    if least <= limit:
        return limit
    text = f"{_nothing_fits(budget, margin)}: the weights alone, before anything trains, take {format_bytes(least)}"
    if told.get("quantization") is None:
        text += f"; with quantization='nf4' at least {format_bytes(least_weights(model, **{**told, 'quantization': 'nf4'}))}"
    raise OptionError(f"{text}.")


def _nothing_fits(budget: str, margin: float) -> str:
    return f"nothing fits {budget}" + (f" less {margin:.0%} margin" if margin else "")


def _report_of(given: Any, model: Any, options: Mapping[str, Any], where: Mapping[str, Any]) -> SnrReport:
    return report_named(
        given, model, options.get("criterion"), where.get("revision"), options.get("seed", OPTIONS["seed"])
    )


class _Search:
    """Dry runs of plans of one report on one model, each made once."""

    def __init__(self, model: Any, report: SnrReport, gradients: Any, limit: int, where: Mapping[str, Any]) -> None:
        self.model, self.report, self.gradients, self.limit, self.where = model, report, gradients, limit, where
        self.tried: list[tuple[str, float | None, int]] = []
        self._known: dict[tuple[str, str], MemoryReport] = {}

    def memory(self, plan: Plan, settings: Mapping[str, Any]) -> MemoryReport:
        key = (plan.digest, repr(sorted(settings.items())))
        if key not in self._known:
            found = estimate_memory(self.model, plan, **settings, **self.where)
            if not found.complete:
                logger.warning("%s", found.notes[0])
            self._known[key] = found
            self.tried.append((plan.mode, plan.options.get("spectrum_ratio"), found.peak_bytes))
            ratio = plan.options.get("spectrum_ratio")
            logger.info(
                "mode %s%s: %s",
                plan.mode,
                "" if ratio is None else f", ratio {ratio:.3g}",
                format_bytes(found.peak_bytes),
            )
        return self._known[key]

    def run(self, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Fit | None:
        """The largest plan within the limit, or None where the smallest is above it."""
        plans = self.plans(options)
        peaks: dict[int, int] = {}

        def peak(at: int) -> int:
            peaks[at] = self.memory(plans[at], settings).peak_bytes
            return peaks[at]

        low, high = 0, len(plans) - 1
        if peak(low) > self.limit:
            return None
        if peak(high) <= self.limit:
            low = high
        while high - low > 1:
            # Where the line through both ends meets the limit, pulled off the ends so that the bracket always shrinks.
            guess = low + (high - low) * (self.limit - peaks[low]) / max(1, peaks[high] - peaks[low])
            at = min(max(round(guess), low + 1), high - 1)
            if peak(at) <= self.limit:
                low = at
                if low + 1 < high and peak(low + 1) > self.limit:
                    high = low + 1
            else:
                high = at
                if high - 1 > low and peak(high - 1) <= self.limit:
                    low = high - 1
        memory = self.memory(plans[low], settings)
        ratio = plans[low].options.get("spectrum_ratio")
        which = f"mode {plans[low].mode!r}" + ("" if ratio is None else f" at ratio {ratio:.3g}")
        note = (
            f"fitted to {format_bytes(self.limit)}: {which}, predicted peak {format_bytes(peaks[low])} "
            + ("" if memory.complete else "WITHOUT ACTIVATIONS, so that it may not fit, ")
            + "with "
            + ", ".join(f"{k}={v}" for k, v in sorted(settings.items()))
        )
        return Fit(
            plan=plans[low].replace(notes=(*plans[low].notes, note)),
            memory=memory,
            step=dict(settings),
            next_plan=plans[low + 1] if low + 1 < len(plans) else None,
            tried=tuple(self.tried),
        )

    def plans(self, options: Mapping[str, Any]) -> list[Plan]:
        """The distinct plans of a mode from the smallest ratio to 1; one plan where no ratio chooses."""
        checked = check_options(**options)
        if MODES[checked["mode"]].of_each and not {"spectrum_ratio", "n_columns", "r"} & set(options):
            steps = (make_plan(self.report, gradients=self.gradients, **options, spectrum_ratio=r) for r in _SHARES)
            return list({plan.digest: plan for plan in steps}.values())
        if checked["spectrum_ratio"] is None or "spectrum_ratio" in options or not MODES[checked["mode"]].selective:
            return [make_plan(self.report, gradients=self.gradients, **options)]
        whole = make_plan(self.report, gradients=self.gradients, **{**options, "spectrum_ratio": 1.0})
        sizes: Counter[str] = Counter()
        for entry in whole.entries:
            if entry.action != "save":
                sizes[entry.kind if checked["scope"] == "per_kind" else ""] += 1
        if checked["measure"] == "count":
            ratios = sorted({k / n for n in set(sizes.values()) for k in range(1, n + 1)})
        else:
            ratios = [k / 200 for k in range(1, 201)]
        found: list[Plan] = []
        for ratio in ratios:
            plan = make_plan(self.report, gradients=self.gradients, **{**options, "spectrum_ratio": ratio})
            if not found or plan.digest != found[-1].digest:
                found.append(plan)
        return found

    def why_nothing_fits(
        self, budget: str, margin: float, options: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> str:
        smallest = self.plans(options)[0]
        need = self.memory(smallest, settings)
        text = (
            f"{_nothing_fits(budget, margin)}: the smallest plan of mode {smallest.mode!r} needs {format_bytes(need.peak_bytes)} "
            f"({', '.join(f'{name} {format_bytes(size)}' for name, size in need.by_category.items())})."
        )
        helps = []
        for change in self._changes(settings):
            other = {**settings, **change}
            try:
                size = self.memory(smallest, other).peak_bytes
            except SpectrumError as error:  # a change that this model or plan does not take is no advice
                logger.info("%s: %s", ", ".join(f"{k}={v}" for k, v in change.items()), error)
                continue
            if size < need.peak_bytes:
                fits = "fits" if size <= self.limit else "does not fit alone"
                helps.append(
                    f"{', '.join(f'{k}={v!r}' for k, v in change.items())} needs {format_bytes(size)} ({fits})"
                )
        return f"{text} What helps: {'; '.join(helps)}." if helps else f"{text} No setting tried needs less."

    @staticmethod
    def _changes(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if not settings.get("gradient_checkpointing"):
            yield {"gradient_checkpointing": True}
        if settings.get("batch_size", 1) > 1:
            yield {"batch_size": 1}
        if settings.get("max_length", 1024) > 256:
            yield {"max_length": settings.get("max_length", 1024) // 2}
        if settings.get("trainer", "transformers") != "sft":
            yield {"trainer": "sft"}
        if settings.get("optimizer", "adamw_torch") not in EIGHT_BIT_ADAM:
            yield {"optimizer": "adamw_8bit"}
        if settings.get("quantization") is None:
            yield {"quantization": "nf4"}


# What `spectrum-peft memory` shows: every ratio of the mode with real weights, then the adapter modes.
RATIOS = (1.0, 0.75, 0.5, 0.35, 0.25)


@dataclass(frozen=True)
class Row:
    """One line of a memory table."""

    plan: Plan
    memory: MemoryReport


def memory_table(
    model: Any,
    report: SnrReport | str | os.PathLike[str],
    *,
    ratios: Sequence[float] = RATIOS,
    modes: Sequence[str] | None = None,
    quantization: str | None = "nf4",
    gradients: GradientReport | str | os.PathLike[str] | None = None,
    plan_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Row]:
    """Dry runs of a mode at several ratios and of the adapter modes; adapters on a quantized base too.

    Args:
        report: as in `find_fit`.
        ratios: of the modes with real weights; adapter modes take the middle one.
        modes: keys of `plan.MODES`; None for all that the model can have, a warning for each that it cannot.
        quantization: of the bases of adapter modes besides the float one; None for the float one only.
        gradients: for modes that need data; without them they are counted with those of `gradients_of_report`, and the
            memory report says so.
        plan_options: of `make_plan`, for every row that takes them.
        settings: of `estimate_memory`, for every row.
    """
    rows = []
    options = dict(plan_options or {})
    report = _report_of(report, model, options, settings)
    for mode in MODES if modes is None else modes:
        row = get_mode(mode)
        own = {k: v for k, v in options.items() if _applies(k, v, mode)}
        bases = [settings.get("quantization")]
        if not row.real_weights and quantization is not None and quantization not in bases:
            bases.append(quantization)
        wanted: Sequence[float | None] = [None]
        if row.selective:
            wanted = ratios if row.real_weights else [options.get("spectrum_ratio") or sorted(ratios)[len(ratios) // 2]]
        assumed = row.needs_data and gradients is None
        known = (
            gradients_of_report(report, **{k: v for k, v in own.items() if k == "svd_rank"}) if assumed else gradients
        )
        for ratio in wanted:
            try:
                plan = make_plan(
                    report, gradients=known, **own, mode=mode, **({} if ratio is None else {"spectrum_ratio": ratio})
                )
            except OptionError as error:
                if modes is not None:
                    raise
                logger.warning("mode %s is left out: %s", mode, error)
                break
            for base in bases:
                if base is not None and row.whole_model:
                    continue
                memory = estimate_memory(model, plan, **{**settings, "quantization": base})
                if assumed:
                    note = f"mode {mode}: without gradients on data, as if no matrix were like another"
                    memory = dataclasses.replace(memory, notes=(*memory.notes, note))
                rows.append(Row(plan, memory))
    return rows


def _applies(option: str, value: Any, mode: str) -> bool:
    if option in ("mode", "spectrum_ratio"):
        return False
    try:
        check_options(**{option: value, "mode": mode})
    except OptionError:
        return False
    return True


def describe_table(rows: Sequence[Row]) -> str:
    """A memory table as text: mode, base, ratio, what trains, and the peak with its largest parts."""
    header = [
        "mode",
        "base",
        "ratio",
        "trainable",
        "share",
        "peak",
        "weights",
        "optimizer",
        "gradients",
        "activations",
        "logits",
    ]
    lines = []
    for row in rows:
        part = row.memory.by_category
        ratio = row.plan.options.get("spectrum_ratio") if MODES[row.plan.mode].selective else None
        trains, total = row.memory.trainable_parameters, row.memory.total_parameters
        lines.append(
            [
                row.plan.mode,
                str(row.memory.settings.get("quantization") or row.memory.settings.get("dtype")),
                "-" if ratio is None else f"{ratio:g}",
                f"{trains:,}",
                f"{100 * trains / total:.1f} %" if total else "?",
                format_bytes(row.memory.peak_bytes) + ("" if row.memory.complete else " +?"),
                format_bytes(sum(part.get(n, 0) for n in ("weights", "quantized_weights", "adapters"))),
                format_bytes(part.get("optimizer", 0)),
                format_bytes(part.get("gradients", 0)),
                format_bytes(part.get("activations", 0) + part.get("temporaries", 0) + part.get("inputs", 0)),
                format_bytes(part.get("logits", 0)),
            ]
        )
    return format_table(header, lines)


def describe_step(report: MemoryReport) -> str:
    """How the step of a report was run: `batch 8 of 1024 tokens, bfloat16, adamw_torch_fused, checkpointing`."""
    step = report.settings
    words = [f"batch {step['batch_size']} of {step['max_length']} tokens", str(step["dtype"]), str(step["optimizer"])]
    words += ["checkpointing"] if step["gradient_checkpointing"] else []
    words += [f"{step['quantization']} base"] if step["quantization"] else []
    return ", ".join(words)


def describe_memory(report: MemoryReport) -> str:
    """A memory report as text: the peak, where it is, what it is made of."""
    per = f" on each of {report.devices} devices" if report.devices > 1 else ""
    lines = [
        f"peak {format_bytes(report.peak_bytes)}{per}, in {report.phase}"
        + (f" ({report.where})" if report.where else "")
    ]
    width = max(len(name) for name in report.by_category)
    for name, size in report.by_category.items():
        lines.append(
            f"  {name.replace('_', ' '):<{width}}  {format_bytes(size):>10}  {100 * size / report.peak_bytes:5.1f} %"
        )
    if report.host_bytes and "host_copies" not in report.by_category:
        lines.append(f"in main memory: {format_bytes(report.host_bytes)} of originals (keep_base)")
    lines.append(f"trains {report.trainable_parameters:,} of {report.total_parameters:,} parameters")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def format_bytes(size: int) -> str:
    """`14.97 GiB`, `512.0 MiB`."""
    if abs(size) >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB"
