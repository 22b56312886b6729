"""`report.html`: one file that needs nothing else. Pictures are inline SVG whose ink follows the reader's colour scheme."""

from __future__ import annotations

import html as markup
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plots
from ..records import Plan, SnrReport
from .figures import FIGURES, FORGETTING, columns, figure_of, of_base, order, reaches, shown, spread
from .settings import METRICS, rate_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (4.1, 3.2)  # inches: on a phone a letter of it is nearly as large as on paper, on a desk it grows
_GROWTH = 1.4
_COSTS = {
    "peak_memory_bytes": ("memory", "peak memory, GiB", 2**30),
    "seconds_per_step": ("time", "seconds of a step", 1),
    "trainable_parameters": ("parameters", "trained parameters", 1),
}
# Colours of a picture that depend on the paper.
_INK = {"#000000": "currentColor", "#ffffff": "var(--card)", "#e6e6e6": "var(--line)", "#0072b2": "var(--mark)"}
_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
_SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")


# --- pictures --------------------------------------------------------------------------------------------------------


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, tuple[str, Path]]:
    """Draw what there is to draw, each into an SVG file.

    Returns:
        {name: (what it shows, file)}.
    """
    figures: dict[str, tuple[str, Figure]] = {}
    metric, title = results["metric"], METRICS[results["metric"]].title
    have = [s for s in order(results) if s["metrics"].get(metric, {}).get("mean") is not None]
    if have:
        rows = [
            {
                "label": s["label"], "x": s["metrics"][metric]["mean"], "low": s["metrics"][metric]["low"],
                "high": s["metrics"][metric]["high"], "marked": s["label"] in results["best"],
                "values": _values(results, s["label"], metric),
            }
            for s in have
        ]  # fmt: skip
        base = (results["untrained"] or {}).get("metrics", {}).get(metric)
        xs = [r["x"] for r in rows]
        near = isinstance(base, float) and min(xs) - 2 * (max(xs) - min(xs)) <= base <= max(xs) + 2 * (
            max(xs) - min(xs)
        )
        reference = ("untrained", base) if near else None
        better = "higher" if METRICS[metric].higher else "lower"
        label = f"{title} ({better} is better)"
        figures["quality"] = (
            f"{title} of each contestant",
            plots.intervals(rows, x_label=label, reference=reference, width=4.8),
        )
    for name, (short, label, unit) in _COSTS.items():
        points = [
            {
                "label": s["label"], "x": s["figures"][name]["mean"] / unit, "y": s["metrics"][metric]["mean"],
                **({"low": y["low"], "high": y["high"]} if (y := s["metrics"][metric])["low"] is not None else {}),
            }
            for s in have if name in s["figures"]
        ]  # fmt: skip
        if points:
            figure = plots.trade_off(
                points, x_label=label, y_label=title, log_x=name == "trainable_parameters", higher=METRICS[metric].higher,
                size=_SIZE,
            )  # fmt: skip
            figures[short] = (f"{title} against {label.partition(',')[0]}", figure)
    for one in results.get("pictures", ()):
        figures[one["name"]] = (one["title"], plots.trade_off(**one["trade_off"], size=_SIZE))
    curves = [
        {"label": s["label"], "steps": [p[0] for p in c], "loss": [p[1] for p in c]}
        for s in order(results)
        if (c := s.get("loss_curve"))
    ]
    if curves:
        figures["curves"] = ("Training loss, mean over the seeds", plots.curves(curves, size=_SIZE))
    if results["scan"] is not None:
        scan = SnrReport.from_dict(results["scan"])
        text, plan = f"The scan: how high each matrix scores by {scan.criterion!r} within its kind", None
        if chosen := results.get("chosen"):
            plan = Plan.from_dict(chosen["plan"])
            text += f"; the dots are what {chosen['label']!r} trains"
        figures["scan"] = (text, plots.heat_map(scan, plan))
    drawn = {}
    for name, (text, figure) in figures.items():
        drawn[name] = (text, plots.save(figure, folder / f"{name}.svg"))
    return drawn


def _values(results: Mapping[str, Any], label: str, metric: str) -> list[float]:
    found = [r.get("metrics", {}).get(metric) for r in results["cells"] if r["label"] == label]
    values = [v for v in found if isinstance(v, float)]
    return values if len(values) > 1 else []


def inline(svg: str, name: str, text: str) -> str:
    """An SVG file of matplotlib as a part of a page: black ink becomes the page's, white paper is taken away.

    Args:
        name: goes in front of every id, which are unique only within one file.
        text: what the picture shows, for those who do not see it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    width = re.search(r'\bwidth="([\d.]+)pt"', head)
    assert box is not None and width is not None
    most = 4 / 3 * float(width[1]) * (1 if name == "scan" else _GROWTH)  # a point is 4/3 pixels
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" '
        f'aria-label="{markup.escape(text)}" style="max-width: {most:.0f}px"'
    )

    def ink(match: re.Match[str]) -> str:
        style = match[1]
        if style == "fill: #ffffff":
            return 'style="fill: none"'
        dot = "fill: #ffffff; stroke: #000000" in style or style == "stroke: #000000"
        if name == "scan" and dot:  # lies on colours that are the same in any scheme
            return match[0]
        for colour, variable in _INK.items():
            style = style.replace(colour, variable)
        return f'style="{style}"'

    return f"{head}>" + re.sub(r'style="([^"]*)"', ink, rest)


# --- the page --------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return markup.escape(str(value))


def _cell(text: str, key: Any = None, kind: str = "td", more: str = "") -> str:
    sort = "" if key is None else f' data-key="{_text(key)}"'
    return f"<{kind}{sort}{more}>{text}</{kind}>"


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[str], name: str) -> str:
    """A table that sorts by a click on a head.

    Args:
        heads: (title, explanation).
        rows: whole <tr> elements.
    """
    head = "".join(f'<th scope="col" title="{_text(why)}"><button>{_text(title)}</button></th>' for title, why in heads)
    body = "\n".join(rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table class="sortable" id="{name}">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
        '<p class="hint more-columns" hidden>There are more columns to the right: scroll the table sideways.</p>'
    )


_WHY = {
    "seconds_per_step": "median time of an optimizer step, the first one left out",
    "tokens_per_second": "input tokens over the time of all steps",
    "peak_memory_bytes": "highest resident memory of loading and training, the whole process",
    "setup_seconds": "scan, and loading with everything that the method prepares before the first step",
    "train_seconds": "all optimizer steps together",
    "saved_bytes": "what was saved: the adapter, or the model where real weights train",
    "general_loss": "loss on the general text after training",
    "forgetting": "by how much the loss on the general text has grown",
    "trainable_parameters": "parameters that train",
    "difference": "taken seed by seed; an interval that holds 0 shows no difference",
}


def _contestants(results: Mapping[str, Any]) -> str:
    heads = columns(results)
    titles = [("contestant", "a way to train"), ("rate", "learning rate"), *((t, _WHY.get(n, t)) for n, t in heads)]
    rows = []
    for place, summary in enumerate(order(results)):
        best = summary["label"] in results["best"]
        tags = f'<span class="tag best" title="{_text(reaches(results))}">≈ best</span>' if best else ""
        tags += '<span class="tag">control</span>' if summary["control"] else ""
        if summary["failed"]:
            tags += f'<span class="tag bad">{len(summary["failed"])} failed</span>'
        rate = summary["settings"].get("learning_rate")
        cells = [
            _cell(f"{_text(summary['label'])} {tags}", place, "th", ' scope="row"'),
            _cell(rate_text(rate), rate),
        ]
        for name, _ in heads:
            figure = figure_of(summary, name)
            if figure is None:
                cells.append(_cell("", ""))
            elif figure.get("not_finite"):
                cells.append(_cell('<span class="tag bad">not finite</span>', ""))
            else:
                half = spread(name, figure)
                half = f' <span class="spread">{_text(half)}</span>' if half else ""
                cells.append(_cell(_text(shown(name, figure["mean"])) + half, figure["mean"]))
        start = '<tr class="best">' if best else "<tr>"
        rows.append(f"{start}{''.join(cells)}</tr>")
    if results["untrained"]:
        cells = [_cell("untrained base", len(rows), "th", ' scope="row"'), _cell("", "")]
        for name, _ in heads:
            value = of_base(results, name)
            cells.append(_cell(_text(shown(name, value)), "" if value is None else value))
        rows.append(f'<tr class="base">{"".join(cells)}</tr>')
    return _table(titles, rows, "contestants")


def _sections(results: Mapping[str, Any]) -> str:
    """Further tables, which others than the comparison have added: {title, heads, rows}, all text."""
    found = ""
    for i, one in enumerate(results.get("sections", ())):
        rows = ["<tr>" + "".join(_cell(_text(text), text) for text in row) + "</tr>" for row in one["rows"]]
        found += f"<h2>{_text(one['title'])}</h2>{_table([(head, '') for head in one['heads']], rows, f'section-{i}')}"
    return found


def _runs(results: Mapping[str, Any]) -> str:
    metrics = [n for n in METRICS if any(n in r.get("metrics", {}) for r in results["cells"])]
    others = [n for n in (*FORGETTING, *FIGURES) if any(r.get(n) is not None for r in results["cells"])]
    titles = {**{n: METRICS[n].title for n in metrics}, **FORGETTING, **{n: t for n, (t, _) in FIGURES.items()}}
    heads = [("run", ""), ("seed", ""), *((titles[n], _WHY.get(n, "")) for n in (*metrics, *others)), ("state", "")]
    rows = []
    for place, r in enumerate(results["cells"]):
        cells = [_cell(_text(r["label"]), place, "th", ' scope="row"'), _cell(_text(r["seed"]), r["seed"])]
        for name in (*metrics, *others):
            value = r.get("metrics", {}).get(name) if name in metrics else r.get(name)
            text = shown(name, value) if isinstance(value, int | float) else str(value or "")
            if name == "seconds_per_step" and value is not None:
                text += f" ({r['step_seconds_low']:.3g} to {r['step_seconds_high']:.3g})"
            cells.append(_cell(_text(text), "" if value is None else value))
        if r["error"] is None:
            cells.append(_cell("finished", 0))
        else:
            cells.append(_cell(f'<span class="tag bad">failed</span> {_text(r["error"])}', 1, more=' class="words"'))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(heads, rows, "runs")


def _failures(results: Mapping[str, Any]) -> str:
    failed = [r for r in results["cells"] if r["error"] is not None]
    if not failed:
        return ""
    items = "".join(
        f"<li><b>{_text(r['label'])}, seed {_text(r['seed'])}</b>: {_text(r['error'])}<br><code>{_text(r['log'])}</code></li>"
        for r in failed
    )
    return f"<h2>Failed runs</h2><ul>{items}</ul>"


def _facts(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    commit = machine.get("commit")
    facts = {
        "processor": f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['cpu_flags'])})",
        "memory": f"{machine['memory_bytes'] / 2**30:.1f} GiB",
        "system": f"{machine['system']}, Python {machine['python']}",
        "packages": ", ".join(f"{k} {v}" for k, v in machine["packages"].items()),
        "spectrum_peft": results["spectrum_peft"]
        + (f", commit {commit[:12]}{' with changes' if machine['changed_since_commit'] else ''}" if commit else ""),
        "written": results["written"],
    }
    rows = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    config = _text(json.dumps(results["config"], indent=1, default=str))
    return f"<dl>{rows}</dl><details><summary>Configuration</summary><pre>{config}</pre></details>"


def html(results: Mapping[str, Any], pictures: Mapping[str, tuple[str, Path]]) -> str:
    """The page.

    Args:
        pictures: of `draw`.
    """
    train = results["config"]["train"]
    data = Path(str(train["dataset"]))
    title = f"{Path(str(train['model'])).name} on {data.parent.name}/{data.stem}".replace(" on /", " on ")
    notes = "".join(f"<li>{_text(note)}</li>" for note in results["notes"])
    drawn = "".join(
        f'<figure class="plot{" broad" if name in ("scan", "quality") else ""}{" wide-only" if name == "scan" else ""}">'
        f"{inline(path.read_text(encoding='utf-8'), name, text)}<figcaption>{_text(text)}</figcaption></figure>"
        for name, (text, path) in pictures.items()
    )
    runs = len(results["cells"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}: comparison</title>
<style>
{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">spectrum-peft compare</p>
<h1>{_text(title)}</h1>
<p>{len(results["contestants"])} ways to train, {runs} runs, ranked by {_text(METRICS[results["metric"]].title)}.</p>
</header>
<ul class="notes">{notes}</ul>
<h2>Contestants</h2>
{_contestants(results)}
<p class="hint">Click a head to sort. After ± is half of the interval.</p>
{_failures(results)}
<h2>Pictures</h2>
<div class="plots">{drawn}</div>
{_sections(results)}
<h2>Runs</h2>
{_runs(results)}
<h2>Machine</h2>
{_facts(results)}
</main>
<script>
{_SCRIPT}</script>
</body>
</html>
"""
