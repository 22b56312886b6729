"""How figures are named, ordered and written: columns, units, the csv and the table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from typing import Any

from .settings import METRICS, rate_text

# Columns of the tables and of the csv: name -> (title, unit). Metrics and forgetting stand before them.
FIGURES: dict[str, tuple[str, str]] = {
    "trainable_parameters": ("trained", ""),
    "seconds_per_step": ("step", "s"),
    "tokens_per_second": ("tokens/s", "1/s"),
    "peak_memory_bytes": ("peak memory", "bytes"),
    "setup_seconds": ("set-up", "s"),
    "train_seconds": ("training", "s"),
    "saved_bytes": ("on disk", "bytes"),
    "generation_tokens_per_second": ("generation", "1/s"),
    "merged_generation_tokens_per_second": ("generation, merged", "1/s"),
}


FORGETTING = {"general_loss": "general loss", "forgetting": "forgetting"}


def as_csv(results: Mapping[str, Any]) -> str:
    """One line for each cell, failed ones too."""
    metrics = [name for name in METRICS if any(name in r.get("metrics", {}) for r in results["cells"])]
    plain = [
        "label", "mode", "ratio", "criterion", "control", "learning_rate", "seed", *metrics, *FORGETTING, *FIGURES,
        "step_seconds_low", "step_seconds_high", "setup_seconds_scan", "steps", "total_parameters", "error", "log",
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(plain)
    for row in results["cells"]:
        flat = {**row, **row.get("metrics", {})}
        writer.writerow([_cell(flat.get(name)) for name in plain])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A value for a spreadsheet: text that would be taken for a formula gets a quotation mark in front.

    Source: OWASP, "CSV Injection".
    """
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in set("=+-@") else value


def columns(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, title) of what the table of contestants shows: only what was measured; what it is ranked by first."""
    first = results["metric"]
    names = [first, *(n for n in METRICS if n != first)]
    shown = [(n, METRICS[n].title) for n in names if any(n in s["metrics"] for s in results["contestants"])]
    reference = results["config"].get("reference")
    if reference and _differences(results):
        shown.insert(1, ("difference", f"difference to {reference}"))
    others = {**FORGETTING, **{name: title for name, (title, _) in FIGURES.items()}}
    return shown + [(n, t) for n, t in others.items() if any(n in s["figures"] for s in results["contestants"])]


def _form(name: str, size: float) -> tuple[float, str, str]:
    """(divisor, format, unit) that a figure of this size is shown in."""
    if name == "trainable_parameters":
        return (1e6, ".3g", " M") if size >= 1e5 else (1, ",.0f", "")
    if name.endswith("_bytes"):
        unit = 2**20
        return (2**30, ".2f", " GiB") if size >= 2**30 else (unit, ",.0f" if size >= 100 * unit else ".3g", " MiB")
    if name == "train_seconds":
        return (1, ".0f" if size >= 10 else ".2g", " s") if size < 600 else (60, ".1f", " min")
    if "seconds" in name and "tokens" not in name:
        return 1, ".3g", " s"
    if name.endswith("tokens_per_second"):
        return (1, ",.0f", "") if size >= 100 else (1, ".3g", "")
    return (1, ".4f", "") if size < 100 else (1, ".4g", "")


def shown(name: str, value: float | None) -> str:
    """A figure for a reader."""
    if value is None:
        return ""
    divisor, form, unit = _form(name, abs(value))
    return f"{value / divisor:{'+' if name in ('forgetting', 'difference') else ''}{form}}{unit}"


def spread(name: str, figure: Mapping[str, Any]) -> str:
    """The half width of an interval, in the unit that the mean is shown in; nothing where it says nothing."""
    if name == "difference" and figure.get("low") is None:
        return "(one seed)"
    if figure.get("low") is None or name in ("trainable_parameters", "saved_bytes"):
        return ""
    divisor, form, _ = _form(name, abs(figure["mean"]))
    return f"± {(figure['high'] - figure['mean']) / divisor:{form}}"


def figure_of(summary: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    found = summary["metrics"].get(name, summary["figures"].get(name))
    return found if found is None or isinstance(found, Mapping) else None


def of_base(results: Mapping[str, Any], name: str) -> float | None:
    """A figure of the base before training; None where it has none, or one that is no number."""
    base = results["untrained"]
    value = base["metrics"].get(name, base.get(name))
    return value if isinstance(value, int | float) else None


def reaches(results: Mapping[str, Any]) -> str:
    """What marks the best and those beside it."""
    text = f"the best in {METRICS[results['metric']].title}, or an interval that reaches its own"
    return text + (
        "; a difference taken seed by seed may still tell two of them apart" if _differences(results) else ""
    )


def _differences(results: Mapping[str, Any]) -> bool:
    return any("difference" in s["figures"] for s in results["contestants"])


def order(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Contestants by the metric that ranks, best first; those without one at the end."""
    metric, higher = results["metric"], METRICS[results["metric"]].higher
    have = [s for s in results["contestants"] if s["metrics"].get(metric, {}).get("mean") is not None]
    rest = [s for s in results["contestants"] if s not in have]
    return [*sorted(have, key=lambda s: s["metrics"][metric]["mean"], reverse=higher), *rest]


def _plain(text: str) -> str:
    """Names are the user's: in Markdown they shall not end a cell, nor be markup."""
    return re.sub(r"[\\|<*`]", r"\\\g<0>", text)


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table of contestants, and what a reader must know."""
    heads = [(name, _plain(title)) for name, title in columns(results)]
    lines = [
        "| " + " | ".join(["contestant", "rate", *(title for _, title in heads)]) + " |",
        "| --- " * (len(heads) + 2) + "|",
    ]
    for summary in order(results):
        cells = []
        for name, _ in heads:
            figure = figure_of(summary, name)
            text = "" if figure is None else f"{shown(name, figure['mean'])} {spread(name, figure)}".strip()
            cells.append("not finite" if figure and figure.get("not_finite") else text)
        mark = " *" if summary["label"] in results["best"] else ""
        failed = f" ({len(summary['failed'])} failed)" if summary["failed"] else ""
        rate = summary["settings"].get("learning_rate")
        lines.append("| " + " | ".join([f"{_plain(summary['label'])}{mark}{failed}", rate_text(rate), *cells]) + " |")
    if results["untrained"]:
        values = [shown(name, of_base(results, name)) for name, _ in heads]
        lines.append("| " + " | ".join(["*untrained base*", "", *values]) + " |")
    if results["best"]:
        lines += ["", f"\\* {reaches(results)}"]
    for one in results.get("sections", ()):
        lines += ["", f"**{_plain(one['title'])}**", "", "| " + " | ".join(map(_plain, one["heads"])) + " |"]
        lines += ["| --- " * len(one["heads"]) + "|"]
        lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in one["rows"]]
    machine = results["machine"]
    lines += ["", *(f"- {_plain(note)}" for note in results["notes"])]
    lines.append(
        f"- {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(
            f"{k} {machine['packages'][k]}" for k in ("torch", "transformers", "peft") if k in machine["packages"]
        )
        + (f"; commit {machine['commit'][:10]}" if machine.get("commit") else "")
    )
    return "\n".join(lines) + "\n"
