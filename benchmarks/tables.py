"""Write the measured tables of README.md and docs/ from the JSON in benchmarks/results/: python benchmarks/tables.py

Between `<!-- table: NAME -->` and `<!-- end -->` stands what this script writes; `--check` fails where it would change a file.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

WHEN = {
    "full": "you have the memory, or want the reference to compare with",
    "spectrum": "you want real weights, a plain checkpoint, and a fraction of the optimizer's memory",
    "lora": "the usual baseline; on a 4-bit base this is QLoRA",
    "spectra_qlora": "on a 4-bit base: QLoRA with half of its adapter memory, at ratio 0.5",
    "alors": "one budget, spent where the scores are high; ranks may move during training",
    "sgm": "adapter files have to be small: blocks with like gradients share a factor; needs calibration data",
    "lorsa": "a task is to fit in a few thousand trained numbers, fewer than LoRA of rank 1 has; needs calibration data",
    "columns": "LoRA's size with less kept for backward, on a 4-bit base too; what is learnt are real weights, merged by adding",
}
# Which contestant of benchmarks/modes.py stands for a mode; "4-bit" rows are compared with full training in float32, too.
CONTESTANT = {
    "full": "full", "spectrum": "spectrum 0.25", "lora": "lora", "spectra_qlora": "spectra_qlora 0.5", "alors": "alors 0.5",
}  # fmt: skip

_ON_NF4 = {"spectra_qlora 0.5", "alors 0.5"}
_RATIO = 0.25  # of `spectrum` in the table of modes


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows))


def machine(data: Mapping[str, Any]) -> str:
    facts = data["machine"]
    return f"{facts['cpu']}, {facts['cores']} cores, {data['written'][:10]}"


def modes() -> str:
    """What each mode trains, costs and is for."""
    sys.path.insert(0, str(ROOT))
    from spectrum_peft.plan import LONG_RUN, MODES

    if not (RESULTS / "modes.json").exists():
        rows = [
            [f"`{m.name}`", m.summary, f"{m.rate_for(LONG_RUN, ratio=_RATIO):g}", WHEN[m.name]] for m in MODES.values()
        ]
        return (
            table(["mode", "what trains", "rate of long runs", "when"], rows)
            + "\nCosts: `python benchmarks/modes.py`.\n"
        )
    data = result("modes")
    contestants = data["models"]["smollm2-135m"]["contestants"]
    rows = []
    for name, mode in MODES.items():
        found = contestants.get(CONTESTANT.get(name, "")) or measured_beside(name)
        base = "4-bit" if CONTESTANT.get(name) in _ON_NF4 else "float32"
        costs = ["not measured", "", ""] if found is None else costs_of(found, base)
        if name == "columns" and found is not None:  # its steps were timed on one thread
            costs[1] = "[its page](docs/columns.md)"
        rate = f"{mode.rate_for(LONG_RUN, ratio=_RATIO):g}"
        rows.append([f"`{name}`", mode.summary, *costs, rate, WHEN[name]])
        if name == "lora" and "lora, nf4" in contestants:  # what spectra_qlora is to be held against
            costs = costs_of(contestants["lora, nf4"], "4-bit")
            when = "the usual way where the weights do not fit in 16 bit"
            rows.append(["`lora`", "the same on a 4-bit base: QLoRA", *costs, rate, when])
    heads = [
        "mode",
        "what trains",
        "trained",
        "step",
        "weights + gradients + AdamW",
        "rate of long runs",
        "take it when",
    ]
    settings = data["settings"]
    return table(heads, rows) + (
        f"\nSmolLM2-135M, batch {settings['batch']} x {settings['length']} tokens, median of {settings['repeats']} repeats "
        f"(`python benchmarks/modes.py`; {machine(data)}). `spectrum` at ratio 0.25, `spectra_qlora` and `alors` at 0.5, "
        "`sgm` and `lorsa` at 1.0 (`benchmarks/adapters.py`, another run), `columns` for rank 16 (`benchmarks/columns.py`). "
        "Rates are those of 4,000 steps or more; [shorter runs](docs/learning_rate.md) take higher ones.\n"
    )


def costs_of(found: Mapping[str, Any], base: str) -> list[str]:
    """The cells of a contestant: trained parameters, step, bytes of the state and the base that they are of."""
    state = sum(found[k] for k in ("weight_bytes", "gradient_bytes", "optimizer_bytes"))
    trained = f"{found['trainable_parameters'] / 1e6:.1f} M"
    step = f"{found['step']['median']:.2f} s" if "step" in found else ""
    return [trained, step, f"{state / 2**20:,.0f} MiB ({base})"]


def measured_beside(name: str) -> dict[str, Any] | None:
    """A contestant of benchmarks/adapters.py, which measures as benchmarks/modes.py does, its step over all repeats; `columns`
    of benchmarks/columns.py, which times steps in another way."""
    if name == "columns":
        if not (RESULTS / "columns.json").exists():
            return None
        cost: dict[str, Any] = result("columns")["cost"]["models"]["smollm2-135m"]["float32"]["contestants"]["columns"]
        return cost
    if not (RESULTS / "adapters.json").exists():
        return None
    repeats = result("adapters")["parts"]["steps"]
    if name not in repeats[0]["contestants"]:
        return None
    found: dict[str, Any] = repeats[0]["contestants"][name]
    steps = [statistics.median(repeat["contestants"][name]["step_seconds"]) for repeat in repeats]
    return {**found, "step": {"median": statistics.median(steps)}}


def demo() -> str:
    """What `make demo` prints at its end."""
    data = result("demo")
    rows = [
        [
            f"`{r['mode']}`", f"{r['learning_rate']:g}", f"{r['trainable_parameters']:,}",
            f"{r['trainable_parameters'] / r['total_parameters']:.1%}", f"{r['seconds_per_step']:.2f} s",
            f"{r['peak_memory_bytes'] / 2**30:.2f} GiB", f"{r['before']['loss']:.4f}", f"{r['after']['loss']:.4f}",
        ]
        for r in data["runs"]
    ]  # fmt: skip
    heads = ["mode", "learning rate", "trained", "of all", "step", "peak memory", "held-out loss before", "after"]
    text = table(heads, rows)
    text += f"\n{data['steps']} steps each, {data['seconds'] / 60:.1f} minutes in all ({machine(data)}).\n"
    sys.path.insert(0, str(ROOT))
    from spectrum_peft.plan import MODES

    today = {r["mode"]: MODES[r["mode"]].rate_for(data["steps"], ratio=data["ratio"]) for r in data["runs"]}
    if any(abs(today[r["mode"]] / r["learning_rate"] - 1) > 0.01 for r in data["runs"]):
        rates = ", ".join(f"{rate:.2g} for `{mode}`" for mode, rate in today.items())
        text += f"The rates are those of an earlier default; `make demo` takes others today ({rates}).\n"
    return text


def claims() -> str:
    """The stated goals of the modes beside what was seen."""
    rows = [
        [c["model"], c["claim"], str(c["wanted"]), _short(c["seen"]), "yes" if c["pass"] else "no"]
        for c in result("modes")["claims"]
    ]
    return table(["model", "compared", "goal", "seen", "holds"], rows)


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def scan(short: bool = False) -> str:
    """Speed and memory of the scan; short: what a goal was set for."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import scan as benchmark

    data = result("scan")
    rows = [
        [what, measured, goal, {True: "yes", False: "no", None: ""}[reached]]
        for what, measured, goal, reached in benchmark.rows(data["parts"])
        if goal or not short
    ]
    return table(["measured", "", "goal", "reached"], rows) + f"\n(`python benchmarks/scan.py`; {machine(data)})\n"


def onto() -> str:
    """Held-out loss after merging onto the original and onto the dequantized weights."""
    data = result("onto")
    rows = [
        [f"`{mode}`" if mode != "base" else "untrained base", what, f"{metrics['loss']:.4f}", f"{metrics['token_accuracy']:.4f}"]
        for mode, row in data["held_out_loss"].items() for what, metrics in row.items()
    ]  # fmt: skip
    return table(["trained", "judged as", "held-out loss", "token accuracy"], rows) + (
        f"\nSmolLM2-135M, {data['steps']} steps on the documentation topics (`python benchmarks/onto.py`; {machine(data)}).\n"
    )


def merge() -> str:
    """Memory and time of a merge, beside a copy of the same files."""
    data = result("merge")
    made, runs = data["checkpoint"], data["runs"]
    what = {
        "copy": "copying the files",
        "lora": f"merging a LoRA of rank {made['lora']['rank']} on {made['lora']['matrices']} of {made['matrices']} matrices",
        "real_weights": f"merging real weights of {made['real_weights']['matrices']} matrices",
    }
    rows = [
        [
            text, _short(runs[name]["seconds"]["median"]), _short(runs[name]["seconds_over_copy"]),
            _short(runs[name]["cpu_seconds_over_copy"]),
            "" if name == "copy" else f"{runs[name]['above_interpreter_bytes'] / 2**20:,.0f} MiB",
        ]
        for name, text in what.items()
    ]  # fmt: skip
    others = statistics.median(load for name in what for load in runs[name]["other_load_cores"])
    return table(
        ["run", "seconds", "over the copy", "CPU time over the copy", "peak above the interpreter's"], rows
    ) + (
        f"\n{made['parameters'] / 1e9:.2f} billion parameters in bfloat16, files in the page cache, other work on {others:.1f} "
        f"cores (`python benchmarks/merge.py`; {machine(data)}).\n"
    )


def memory(name: str) -> str:
    """Accuracy of the memory dry run, and what it says of known models."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import memory as benchmark

    data = result("memory")
    heads, rows = benchmark.rows(name, data)
    return table(heads, rows) if heads else f"{rows[0][0]} ({machine(data)})\n"


def similarity(part: str) -> str:
    """How alike blocks' gradients are, how well sketches tell, and what sharing a factor saves."""
    data = result("similarity")
    if part == "kinds":
        heads = [
            "kind",
            "side",
            "neighbours, mean (least to most)",
            "all pairs",
            "by chance",
            "largest cosine",
            "mean |cosine|",
        ]
        rows = [
            [
                f"`{k['kind']}`", k["side"],
                f"{k['neighbours']['mean']:.2f} ({k['neighbours']['min']:.2f} to {k['neighbours']['max']:.2f})",
                f"{k['all_pairs']:.2f}", f"{k['chance']:.3f}", f"{k['cosine_max']:.2f}", f"{k['cosine_mean_absolute']:.3f}",
            ]
            for k in data["kinds"]
        ]  # fmt: skip
        note = f"{data['samples']} samples of {data['data']}, cut at {data['max_length']} tokens; `benchmarks/similarity.py`."
        return f"{table(heads, rows)}\n{note}\n"
    if part == "sketches":
        heads = [
            "rank of the sketch",
            "subspace, largest error",
            "mean",
            "cosine, largest error",
            "mean",
            "same groups",
        ]
        keys = ("subspace_max", "subspace_mean", "cosine_max", "cosine_mean", "same_groups")
        return table(heads, [[n, *(f"{e[k]:.3f}" for k in keys)] for n, e in data["sketches"].items()])
    heads = ["ratio", "similarity, threshold", "share", "groups", "largest", "alone", "trained", "of `spectra_qlora`"]
    rows = []
    for p in data["plans"]:
        how = f"{p.get('similarity', 'subspace')}, {p.get('similarity_threshold', 'default')}"
        rows.append(
            [
                f"{p['spectrum_ratio']:g}", how, p.get("share", "residual_side"), str(p["groups"]), str(p["largest_group"]),
                str(p["alone"]), f"{p['trainable_parameters']:,}", f"{p['share_of_spectra_qlora']:.2f}",
            ]
        )  # fmt: skip
    return table(heads, rows)


def adapters(part: str) -> str:
    """What the adapters of `sgm` and `lorsa` cost beside LoRA; what a decomposition takes."""
    data = result("adapters")
    if part == "claims":
        rows = []
        for c in data["claims"]:
            extent = f" ({c['min']:.2f} to {c['max']:.2f})" if "min" in c else ""
            rows.append([c["claim"], f"<= {c['wanted']:g}", f"{c['seen']:.3g}{extent}", "yes" if c["pass"] else "no"])
        return table(["compared", "goal", "seen", "holds"], rows) + (
            f"\nSmolLM2-135M, all matrices of its blocks (`python benchmarks/adapters.py`; {machine(data)}).\n"
        )
    if part == "setup":
        rows = []
        for one in data["parts"]["setup"]:
            parts = one["parts"]
            seconds = [
                one["seconds"],
                parts["scan"],
                parts["svd"],
                parts["probe"] - parts["svd"],
                one["forward_and_backward"],
            ]
            what = f"{one['samples']} samples cut at {one['max_length']}, {one.get('dtype', 'float32')}"
            rows.append([what, f"{one['tokens']:,}", *(f"{x:.0f} s" for x in seconds), f"{one['common']:.2f}"])
        heads = [
            "calibration",
            "tokens",
            "set-up",
            "scan",
            "SVD",
            "importance",
            "plain forward and backward",
            "same components",
        ]
        return table(heads, rows)
    if part == "layers":
        rows = [
            [
                f"{layer['shape'][0]} x {layer['shape'][1]}", f"{layer['ratio']['median']:.2f}",
                f"{layer['ratio']['min']:.2f} to {layer['ratio']['max']:.2f}",
            ]
            for layer in data["parts"]["layers"]
        ]  # fmt: skip
        return table(["one layer, 256 tokens", "over LoRA r = 16", "least to most"], rows)
    ranks = sorted({row["k"] for row in data["parts"]["svd"]})
    rows = []
    for size in sorted({row["size"] for row in data["parts"]["svd"]}):
        seconds = {row["k"]: row["seconds"] for row in data["parts"]["svd"] if row["size"] == size}
        rows.append([f"{size} x {size}", *(f"{seconds[k]:.3f} s" for k in ranks)])
    return table(["matrix", *(f"k = {k}" for k in ranks)], rows)


def components(part: str) -> str:
    """Which components tasks choose, and what they have in common with themselves and with each other; how values decay."""
    data = result("components")
    if part == "decay":
        return table(
            ["model", "squared singular values in the largest tenth, median", "least to most", "matrices"],
            [
                [name, f"{d['median']:.0%}", f"{d['min']:.0%} to {d['max']:.0%}", str(d["n"])]
                for name, d in data["decay"].items()
            ],
        )
    first, *_, last = data["edges"]
    ranges = [f"{a} to {b - 1}" for a, b in pairwise(data["edges"])]
    rows = []
    for name, task in data["tasks"].items():
        found = [statistics.fmean(values) for values in zip(*(h["chosen"] for h in task["halves"]), strict=True)]
        weight = [statistics.fmean(values) for values in zip(*(h["importance"] for h in task["halves"]), strict=True)]
        others = task["in_common_with"]
        rows.append(
            [
                f"{name} ({task['data']})", " + ".join(str(h["samples"]) for h in task["halves"]),
                *(f"{x:.0%}" for x in (*found, *weight)), f"{task['in_common']:.0%}",
                f"{min(others.values()):.0%} to {max(others.values()):.0%}",
            ]
        )  # fmt: skip
    lot = data["chance"]
    in_common = f"{lot['in_common']:.0%}"
    rows.append(["random choice", "", *(f"{x:.0%}" for x in lot["ranges"]), *[""] * len(ranges), in_common, in_common])
    heads = ["task", "samples", *(f"chosen {r}" for r in ranges), *(f"importance {r}" for r in ranges)]
    note = (
        f"{data['model']}, {data['components']} of the {last - first} largest components of each matrix of the default ratio; "
        f"means of two halves; `benchmarks/components.py`."
    )
    return f"{table([*heads, 'in common with its other half', 'with another task'], rows)}\n{note}\n"


def columns(part: str) -> str:
    """Some columns of every matrix beside PEFT's LoRA: a measured step and a dry run, or held-out losses."""
    data = result("columns")
    mib = 2**20
    if part == "quality":
        return columns_quality(data)
    rows = []
    measured = [(model, base, run) for model, runs in data["cost"]["models"].items() for base, run in runs.items()]
    for model, base, run in measured:
        for name, facts in run["contestants"].items():
            over = run["over_lora"].get(name, {})
            steps = [f"{over[key]['median']:.3f}" if over.get(key) else "1" for key in ("step", "step_cpu")]
            sizes = [f"{facts[key] / mib:,.0f} MiB" for key in ("activation_bytes", "peak_bytes")]
            model_name = {"smollm2-135m": "SmolLM2-135M", "llama-350m": "Llama of 350M"}.get(model, model)
            rows.append([f"{model_name}, {base}", name, f"{facts['trainable_parameters']:,}", *sizes, *steps])
    for name, memory in data["dry runs"].items():
        mode, _, base = name.partition(", ")
        sizes = [f"{size / mib:,.0f} MiB" for size in (memory["by_category"]["activations"], memory["peak_bytes"])]
        rows.append([f"8B, {base} (dry run)", f"`{mode}`", f"{memory['trainable_parameters']:,}", *sizes, "", ""])
    load = max(run["other_load_cores"] for _, _, run in measured)
    settings = data["cost"]["settings"]
    heads = ["base", "", "trained", "kept for backward", "peak", "time of a step over LoRA's", "CPU time"]
    return table(heads, rows) + (
        f"\nMeasured: batch {settings['batch']} x {settings['length']} tokens, {settings['steps']} steps in turn, one thread, "
        f"while other processes kept {load:.2f} cores busy; dry runs: 1 x 1024 tokens on CUDA (`python benchmarks/columns.py`; "
        f"{machine(data)}).\n"
    )


def columns_quality(data: Mapping[str, Any]) -> str:
    """Of each task and method: the best rate, the mean over seeds at it, and the differences to LoRA and to the random choice."""
    sys.path.insert(0, str(ROOT))
    from spectrum_peft.compare.statistics import interval

    rows, notes = [], []
    for found in (value for key, value in data.items() if key.startswith("quality ")):
        best = {name: best_run(runs)["rate"] for name, runs in found["runs"].items()}
        for figure in ("loss", "accuracy"):
            by_seed = {
                name: {
                    run["seed"]: run[figure]
                    for run in runs
                    if run["rate"] == best[name] and run.get(figure) is not None
                }
                for name, runs in found["runs"].items()
            }
            for name, values in by_seed.items():
                if not values:
                    continue
                tried = [run["rate"] for run in found["runs"][name]]
                edge = ", at the edge" if best[name] in (min(tried), max(tried)) else ""
                differences = []
                for reference in ("lora", "columns"):
                    theirs = by_seed.get(reference, {})
                    both = [values[seed] - theirs[seed] for seed in values if seed in theirs]
                    differences.append(_spread(interval(both, 0.95), "+") if both and name != reference else "")
                rows.append([
                    f"{found['task']}, {figure}", name, f"{found['runs'][name][0]['trained']:,}", f"{best[name]:g}{edge}",
                    str(len(values)), f"{statistics.fmean(values.values()):.4f}", *differences,
                ])  # fmt: skip
        accuracy = f", accuracy {found['untrained_accuracy']:.4f}" if "untrained_accuracy" in found else ""
        notes.append(
            f"{found['task']}: {found['steps']} steps of {found['batch']} x at most {found['length']} tokens, judged on "
            f"{found['held_out_rows']} held-out rows; untrained loss {found['untrained']:.4f}{accuracy}"
        )
    heads = [
        "task, figure",
        "",
        "trained",
        "best rate",
        "seeds",
        "mean",
        "less that of `lora`",
        "less that of `columns`",
    ]
    return table(heads, rows) + (
        f"\n{'. '.join(notes)}. gsm8k and dolly on SmolLM2-135M, banking77 on MiniLM with a head that was fitted beforehand. "
        "Differences are paired by seed, with the 95 % interval of Student's t. Rates were searched by the loss of the first "
        f"seed (`python benchmarks/columns.py --quality`; {machine(data)}).\n"
    )


def best_run(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one with the least loss among those of the first seed, by which rates are searched."""
    return min(
        (run for run in runs if run["seed"] == runs[0]["seed"]),
        key=lambda run: math.inf if run["loss"] is None else run["loss"],
    )


def quality(suite: str) -> str:
    """Every contestant of a suite at the rate that was best for it, and its difference to one of them, paired by seed."""
    sys.path.insert(0, str(ROOT))
    from spectrum_peft.compare.settings import METRICS
    from spectrum_peft.compare.statistics import interval, paired

    names = [name for name in (f"gpu/quality-{suite}", f"quality-{suite}") if (RESULTS / f"{name}.json").exists()]
    name = names[0] if names else f"quality-{suite}-quick"
    data = result(name)
    metric = data["metric"]
    runs: dict[str, dict[int, float]] = {}
    for cell in data["cells"]:
        if cell["error"] is None:
            runs.setdefault(cell["label"], {})[cell["seed"]] = cell["metrics"][metric]
    finished = [c for c in data["contestants"] if c["label"] in runs]
    finished.sort(key=lambda c: statistics.fmean(runs[c["label"]].values()), reverse=METRICS[metric].higher)
    reference = data["reference"]
    forgetting = any("forgetting" in c["figures"] for c in finished)
    rows = []
    for c in finished:
        label, figures = c["label"], c["figures"]
        values = runs[label]
        edge = ", at the edge" if label in data["rates_at_the_edge_of_the_search"] else ""
        row = [
            f"`{label}`", f"{figures['trainable_parameters']['mean']:,.0f}",
            f"{c['settings']['learning_rate']:g}{edge}", _spread(interval(list(values.values()), 0.95), ""),
            "reference" if label == reference else _spread(paired(data["cells"], label, reference, metric, 0.95), "+"),
        ]  # fmt: skip
        if metric != "loss":
            row.append(f"{c['metrics']['loss']['mean']:.3f}")
        if forgetting:
            row.append(_spread(figures["forgetting"], "+"))
        rows.append(row)
    title = METRICS[metric].title
    heads = ["trained how", "parameters", "learning rate", title, f"difference to `{reference}`"]
    heads += [METRICS["loss"].title] if metric != "loss" else []
    text = table([*heads, *(["forgetting"] if forgetting else [])], rows)
    failed = sum(len(c["failed"]) for c in data["contestants"])
    untrained = (data["untrained"] or {}).get("metrics", {}).get(metric)
    train = data["config"]["train"]
    facts = [
        f"{_MODELS[train['model']]}, {train['max_steps']} steps of {train['per_device_train_batch_size']} rows",
        f"judged on {data['evaluation_rows']} rows",
        f"{len(data['config']['seeds'])} {'seeds' if len(data['config']['seeds']) > 1 else 'seed'}",
        *([f"untrained {untrained:.3f}"] if untrained is not None else []),
        *([f"{failed} runs failed"] if failed else []),
        *(["the small grid"] if data["quick"] else []),
    ]  # fmt: skip
    return f"{text}\n{'; '.join(facts)} (`benchmarks/quality.py {suite}`; {machine(data)}).\n"


def rates() -> str:
    """The best rate of every search of the suites, and how often three rules come within a factor of two of it.

    The rules: the mode's usual rate of long runs, at the rank and the ratio; the default, which is the usual one times
    sqrt(LONG_RUN / steps); and the same with LONG_RUN fitted, by the mean of logarithms, on all other data sets. Suites on one
    data set share runs, so a data set is left out as a whole.
    """
    sys.path.insert(0, str(ROOT))
    from spectrum_peft.compare.settings import HEADED
    from spectrum_peft.plan import LONG_RUN, OPTIONS, get_mode, ratio_of

    found: dict[tuple[str, str], _Best] = {}
    for path in sorted(RESULTS.glob("quality-*.json")):
        data = json.loads(path.read_text())
        train = data["config"]["train"]
        settings = {c["label"]: c["settings"] for c in data["contestants"]}
        for cell in data["cells"]:
            label, kind = cell["label"], str(cell["mode"]).lower()
            if label not in data["rates"] or kind == "adalora":  # AdaLoRA: no default of ours is meant for it
                continue
            mode = get_mode(kind)
            means = {"train": "real weights", "lora": "LoRA", "shared": "LoRA"}.get(mode.action, mode.action)
            r = int(named[1]) if (named := re.search(r" r(\d+)$", label)) else OPTIONS["r"]
            ratio = 1.0 if data["task"] in HEADED else ratio_of(settings[label])
            found[train["dataset"], label] = _Best(
                train["dataset"], _MODELS[train["model"]], train["max_steps"], label, means, float(data["rates"][label]),
                mode.rate_for(LONG_RUN, r, ratio), mode.rate_for(train["max_steps"], r, ratio),
                label in data["rates_at_the_edge_of_the_search"],
            )  # fmt: skip
    best = sorted(found.values())
    rows, hits = [], {"usual": 0, "default": 0, "fitted": 0}
    for b in best:
        guesses = {
            "usual": b.usual, "default": b.default,
            "fitted": _fitted_rate(b, [other for other in best if other.dataset != b.dataset]),
        }  # fmt: skip
        for name, guess in guesses.items():
            hits[name] += 0.5 <= guess / b.rate <= 2
        edge = ", at the edge" if b.edge else ""
        rows.append([
            f"{b.dataset}, {b.model}, {b.steps} steps", f"`{b.label}`", b.means, f"{b.rate:g}{edge}", f"{b.usual:g}",
            f"{b.default:g}", f"{guesses['fitted']:.2g}",
        ])  # fmt: skip
    heads = [
        "data, model, length",
        "trained how",
        "means",
        "best rate",
        "usual in long runs",
        "default",
        "from the other data sets",
    ]
    return (
        f"{table(heads, rows)}\nWithin a factor of two of the best rate, of {len(best)}: the usual rate of long runs "
        f"{hits['usual']}, the default {hits['default']} ({hits['default'] / len(best):.0%}), the same rule fitted on the other "
        f"data sets {hits['fitted']} ({hits['fitted'] / len(best):.0%}).\n"
    )


class _Best(NamedTuple):
    """The best rate of one search."""

    dataset: str
    model: str
    steps: int
    label: str
    means: str
    rate: float
    usual: float
    default: float
    edge: bool


def _fitted_rate(asked: _Best, others: list[_Best]) -> float:
    scale = np.mean([math.log(b.rate / b.usual * b.steps**0.5) for b in others])
    return float(asked.usual * math.exp(scale) / asked.steps**0.5)


def tuned() -> str:
    """Where tunes ended beside the whole grid, on the evaluation rows, and what share of its steps they took."""
    rows, facts = [], []
    data = result("tune")
    for name, part in data["parts"].items():
        if not part["tunes"]:
            continue
        facts.append(
            f"{name}: {_MODELS.get(part['model'], part['model'])}, "
            f"{part['steps']} steps of {part['batch']} rows, {len(part['grid'])} cells of the "
            f"grid with {len(part['seeds'])} seeds, {part['judged']} search and evaluation rows"
        )
        best = f"{part['best']['contestant']} at {part['best']['rate']:g}"
        for one in part["tunes"]:
            rows.append([
                name, str(one["race_seed"]), f"{one['contestant']} at {one['rate']:g}", best, _spread(one["to_best"], "+"),
                "yes" if one["within_noise"] else "no", _spread(one["to_best_default"], "+"),
                "yes" if one["not_worse_than_default"] else "no", f"{one['share']:.2f}",
            ])  # fmt: skip
    heads = [
        "data", "race's seed", "tune ends with", "the grid's best", "worse by (95 %)", "within noise",
        "worse than the best default by", "no worse", "steps, of the grid's",
    ]  # fmt: skip
    return f"{table(heads, rows)}\n{'; '.join(facts)} (`benchmarks/tune.py`; {machine(data)}).\n"


def tune_estimates() -> str:
    """What a tune says before its first run, beside what was measured."""
    rows = []
    data = result("tune")
    for name, part in data["parts"].items():
        memory = {one["contestant"]: one for one in part.get("memory", ())}
        tunes = part["tunes"]
        for label in tunes[0]["steps_met"] if tunes else ():
            met = tunes[0]["steps_met"][label]
            said = [one["expected_step"][label] for one in tunes]
            sizes = memory.get(label)
            rows.append([
                name, label, *([f"{sizes[k] / 2**20:,.0f} MiB" for k in ("predicted", "measured")] if sizes else ["", ""]),
                f"{sizes['predicted'] / sizes['measured'] - 1:+.1%}" if sizes else "",
                ", ".join(f"{s:.3g}" for s in said) + " s", f"{met:.3g} s", ", ".join(f"{s / met - 1:+.0%}" for s in said),
            ])  # fmt: skip
        for one in tunes:
            off = one["expected_seconds"] / one["seconds"] - 1
            rows.append([
                name, f"the whole tune, seed {one['race_seed']}", "", "", "", f"{one['expected_seconds'] / 3600:.2f} h",
                f"{one['seconds'] / 3600:.2f} h", f"{off:+.0%}",
            ])  # fmt: skip
    heads = ["data", "contestant", "memory, said", "measured", "error", "a step, said", "measured", "error"]
    return f"{table(heads, rows)}\n(`benchmarks/tune.py`; {machine(data)})\n"


def raced() -> str:
    """The rate that `--learning-rate auto` finds beside the default and the best of a grid of whole runs."""
    data = result("race")
    rows = []
    for one in data["runs"]:
        rows.append([
            f"{one['suite']}, {one['steps']} steps", f"`{one['contestant']}`, seed {one['seed']}",
            *(f"{one[f'{k}_rate']:.2g}: {one[f'{k}_loss']:.4f}" for k in ("default", "raced", "best")),
            f"{one['raced_loss'] - one['best_loss']:+.4f}", f"{one['race_steps'] / one['steps']:.0%}",
        ])  # fmt: skip
    heads = [
        "data", "trained how", "at the default rate", "at the raced one", "at the grid's best", "raced less best",
        "steps of the race",
    ]  # fmt: skip
    near = sum(0.5 <= one["raced_rate"] / one["best_rate"] <= 2 for one in data["runs"])
    better = sum(one["raced_loss"] <= one["default_loss"] for one in data["runs"])
    return (
        f"{table(heads, rows)}\nHeld-out loss. The raced rate is within a factor of two of the grid's best in {near} of "
        f"{len(rows)} runs, and no worse than the default in {better} (`benchmarks/race.py`; {machine(data)}).\n"
    )


def _spread(found: Mapping[str, Any] | None, sign: str) -> str:
    """Mean and 95 % interval; an interval of one run is left out."""
    if found is None:
        return ""
    text = f"{found['mean']:{sign}.3f}"
    return text if found["low"] is None else f"{text} ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"


_MODELS = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
_SUITES = [
    f"{what}-{data}"
    for what, on in {
        "choice": ("banking77", "goemotions", "gsm8k", "dolly"), "controls": ("gsm8k", "dolly", "wikitext", "topics"),
        "modes": ("banking77", "dolly", "wikitext"),
        "ratios": ("banking77", "dolly"), "summaries": ("dolly",), "adapters": ("banking77", "goemotions", "gsm8k"),
    }.items()
    for data in on
]  # fmt: skip
_MEMORY = ("accuracy", "8b", "3b", "llama_8b", "qwen_7b", "70b", "tutorial")


def dispatches() -> str:
    """Tests of computed numbers under the kernels of other processors (`tests/dispatches.py`)."""
    data = result("dispatches")
    rows = [
        [
            name, run["torch"].lower(), run["environment"]["ONEDNN_MAX_CPU_ISA"].lower(), ", ".join(run["blas"]),
            run["environment"]["OMP_NUM_THREADS"], str(run.get("passed", 0)), str(run.get("failed", 0)),
            f"{run['seconds']:.0f} s",
        ]
        for name, run in data["runs"].items()
    ]  # fmt: skip
    heads = ["run", "torch's kernels", "oneDNN up to", "BLAS", "threads", "passed", "failed", "time"]
    return table(heads, rows) + f"\n(`make test-dispatch`; {machine(data)})\n"


def fuzz() -> str:
    """Damaged files for every reader (`tests/fuzz/campaign.py`)."""
    data = result("fuzz")
    rows = [
        [name, f"{row['taken'] + row['refused']:,}", f"{row['refused']:,}", str(len(row["faults"]))]
        for name, row in data["readers"].items()
    ]
    total = [sum(row[kind] for row in data["readers"].values()) for kind in ("taken", "refused")]
    rows.append(
        ["all", f"{sum(total):,}", f"{total[1]:,}", str(sum(len(r["faults"]) for r in data["readers"].values()))]
    )
    said = f"seed {data['seed']}, {data['seconds'] / 60:.0f} minutes"
    return table(["what is read", "inputs", "refused", "faults"], rows) + f"\n(`make fuzz`; {said}; {machine(data)})\n"


def kills() -> str:
    """Processes ended by SIGKILL at random moments (`tests/fuzz/kills.py`)."""
    data = result("kills")
    rows = [[name, str(row["kills"]), str(row["finished"]), str(row["faults"])] for name, row in data["verbs"].items()]
    said = f"seed {data['seed']}, {data['seconds'] / 60:.1f} minutes"
    return (
        table(["command", "kills", "ended before", "faults"], rows)
        + f"\n(`python tests/fuzz/kills.py`; {said}; {machine(data)})\n"
    )


def hub() -> str:
    """What a scan over the network reads, holds and takes, against a stand-in."""
    data = result("hub")
    parts, goals = data["parts"], data["goals"]
    rows = []
    for part, name in (
        ("whole", "Llama-2-7B, {blocks} blocks"),
        ("bytes", "Llama-2-7B's shapes"),
        ("real", "SmolLM2-135M"),
    ):
        found = parts.get(part)
        if found is None:
            continue
        name = name.format(**found)
        scored, ratio = found["scored_bytes"] / 1e6, found["ratio"]
        rows.append(
            [f"{name}: bytes sent over {scored:,.0f} MB scored", f"{ratio:.4f}", f"<= {goals['bytes_ratio']}",
             _yes(ratio <= goals["bytes_ratio"])]
        )  # fmt: skip
        peak, disk = found["peak_bytes"], found["disk_bytes"]
        rows.append(
            [f"{name}: peak of the process", f"{peak / 2**30:.2f} GiB", "< 1.5 GiB", _yes(peak < goals["peak_bytes"])]
        )
        rows.append(
            [f"{name}: on the disk afterwards", f"{disk / 1e3:,.0f} kB", "< 50 MB", _yes(disk < goals["disk_bytes"])]
        )
    for rate, found in parts["overlap"].items():
        median = statistics.median
        halves = f"fetching {found['fetching_seconds']:.1f} s, scoring {median(found['scoring_seconds']):.1f} s"
        spread = found["overlap"]
        rows.append([f"SmolLM2-135M at {rate}: {halves}", f"{median(found['seconds']):.1f} s together", "", ""])
        seen = f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"
        reached = _yes(spread["median"] <= goals["overlap"])
        rows.append([f"SmolLM2-135M at {rate}: over the slower half", seen, f"<= {goals['overlap']}", reached])
    busy = max(max(found["other_cores"]) for found in parts["overlap"].values())
    note = f"other processes, the server included, held up to {busy:.1f} of these cores"
    made_by = f"(`python benchmarks/hub.py`; {machine(data)}; {note})"
    return table(["measured", "", "goal", "reached"], rows) + f"\n{made_by}\n"


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def long_runs() -> str:
    """What stays bounded when there is much of something (`benchmarks/long.py`)."""
    data = result("long")
    rows = []
    for name, title in {"steps": "mode `alors`", "control": "plain LoRA by peft, for comparison"}.items():
        if name not in data:
            continue
        run = data[name]
        moved = f", re-evaluated {run['re_evaluations']} times" if run["re_evaluations"] else ""
        grown = (run["memory"][-1] - run["memory"][len(run["memory"]) // 2]) / 2**20
        held = run.get("allocated_bytes_per_step")
        count = "" if held is None else f"what is allocated grows by {held / 1024:.2f} KiB a step, "
        rows.append([
            f"{run['steps']:,} steps, {title}", f"saved and evaluated {run['saved']} times{moved}",
            f"{count}memory grows by {run['slope_bytes_per_step'] / 1024:.1f} KiB a step in the second half ({grown:.1f} MiB), "
            f"{run['open_files'][1] - run['open_files'][0]} more files open",
        ])  # fmt: skip
    crowd = data["adapters"]
    first, last = (1000 * crowd[k]["median"] for k in ("first_tenth", "last_tenth"))
    rows.append([
        f"{crowd['adapters']:,} adapters in a folder", "each scanned and exported, in one process",
        f"{first:.0f} ms each at first, {last:.0f} ms at last; memory grows by "
        f"{crowd['slope_bytes_per_adapter'] / 1024:.1f} KiB an adapter, {crowd['files_left_open']} files left open",
    ])  # fmt: skip
    plan = data["entries"]
    rows.append([
        f"{plan['entries']:,} plan entries", f"{plan['bytes'] / 1e6:.0f} MB of JSON",
        f"{plan['save_seconds']:.0f} s to save, {plan['load_seconds']:.0f} s to load, peak {plan['peak_bytes'] / 2**20:.0f} MiB",
    ])  # fmt: skip
    blocks = data.get("layers", {"layers": [0, 0], "commands": {}})
    few, many = blocks["layers"]
    for name, row in blocks["commands"].items():
        times, peaks = row["cpu_seconds"], [peak / 2**20 for peak in row["peak_bytes"]]
        rows.append([
            f"{many} blocks: {name}", f"{times[1]:.0f} s of CPU time, {times[0]:.0f} s for {few} blocks",
            f"peak {peaks[1]:.0f} MiB, {peaks[0]:.0f} MiB for {few} blocks",
        ])  # fmt: skip
    return table(["much of", "", "what it took"], rows) + f"\n(`python benchmarks/long.py`; {machine(data)})\n"


def families() -> str:
    """A row for each family; a reason is a number below the table."""
    data = result("families")
    columns, rows, reasons = data["columns"], [], {}
    for name, row in data["families"].items():
        if "cells" not in row:
            continue
        cells = []
        for column in columns:
            outcome, why = row["cells"][column]
            note = f" {reasons.setdefault(_reason(why), len(reasons) + 1)}" if why else ""
            cells.append(outcome + note)
        rows.append([f"`{name}`", f"`{row['class']}`", *cells])
    counts = {c: sum(r["cells"][c][0] == "ok" for r in data["families"].values() if "cells" in r) for c in columns}
    whole = sum(all(o == "ok" for o, _ in r["cells"].values()) for r in data["families"].values() if "cells" in r)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    said = f"{whole} of {len(rows)} families pass everything; " + ", ".join(f"{c} {n}" for c, n in counts.items())
    listed = "".join(f"{number}. {why}\n" for why, number in reasons.items())
    return f"{said} ({versions}).\n\n{table(['type', 'class', *columns], rows)}\n{listed}"


def families_missing() -> str:
    """What was not built, and why."""
    rows = [[f"`{name}`", f"`{row['class']}`", _reason(row["not_built"])] for name, row in result("families")["families"].items()
            if "not_built" in row]  # fmt: skip
    return table(["type", "class", "why"], rows)


def _reason(text: str) -> str:
    """One line for a table: what names a tensor or a size of one family goes, what is long is cut."""
    text = re.sub(r"\s+", " ", text).replace("|", "/").replace("<", "&lt;")
    return text if len(text) <= 220 else text[:217] + "..."


GPU = RESULTS / "gpu"
NOT_MEASURED = "not measured"
_GPU_MODELS = ("smollm2", "1b", "3b", "8b")
_REAL = "smollm2"  # which has files; of the others only the shapes are real


def gpu_chunk(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """What benchmarks/gpu.py wrote of a chunk; None where it did not, or only rehearsed."""
    path = (folder or GPU) / f"{name}.json"
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text())
    return None if data["rehearsal"] else data


def gpu_cells(name: str) -> dict[str, Any]:
    return (gpu_chunk(name) or {"cells": {}})["cells"]


def gpu_scan() -> str:
    """A scan of each model's matrices, shape by shape and so many of each, beside torch's singular values."""
    rows = []
    for model in _GPU_MODELS:
        cells = gpu_cells(f"scan-{model}")
        shapes = {name: row for name, row in cells.items() if name != "whole" and "matrices" in row}
        whole = cells.get("whole", {}).get("scan_seconds")
        shown = f"{whole:.3g} s" if whole is not None else NOT_MEASURED if model == _REAL else ""
        if not shapes:
            rows.append([model, *[NOT_MEASURED] * 4, shown])
            continue
        sums = {
            key: sum(row["matrices"] * row[f"{key}_seconds"] for row in shapes.values())
            for key in ("scan", "svdvals", "eigenvalues_on_the_device", "eigenvalues_on_the_cpu")
        }
        rows.append([model, *(f"{seconds:.3g} s" for seconds in sums.values()), shown])
    heads = ["model", "scan", "`torch.linalg.svdvals`", "of it eigenvalues on the device", "eigenvalues on the CPU"]
    heads.append("its files, by `scan_weights`")
    return table(heads, rows) + _on_gpu([f"scan-{model}" for model in _GPU_MODELS])


def gpu_tests() -> str:
    """How the marked tests ended, file by file; what failed, by name."""
    files: dict[str, list[dict[str, Any]]] = {}
    for cell, row in gpu_cells("tests").items():
        files.setdefault(cell.partition("::")[0], []).append(row)
    rows = []
    for file, found in files.items():
        counts = [
            str(sum(int(row.get(key) or 0) for row in found if "said" in row))
            for key in ("passed", "failed", "skipped")
        ]
        stopped = sum("said" not in row for row in found)
        said = [line for row in found for line in row.get("said", ())]
        rows.append([f"`{file}`", *counts, str(stopped), "; ".join(said)])
    rows = rows or [["`tests/gpu`", *[NOT_MEASURED] * 4, ""]]
    return table(["marked tests", "passed", "failed", "skipped", "functions not run", "what failed"], rows) + _on_gpu(
        ["tests"]
    )


def gpu_suites() -> str:
    """Which suites of quality were finished on the card; their figures are in the tables of quality."""
    rows = []
    for name, row in gpu_cells("suites").items():
        done = "finished" if "finished" in row else row.get("stopped", row.get("failed", row.get("listed", "")))
        rows.append([f"`{name}`", done])
    return table(["suite", ""], rows or [["every suite", NOT_MEASURED]]) + _on_gpu(["suites"])


def gpu_steps(base: str, checkpointing: bool = True) -> str:
    """Step time and peak memory of every mode, beside what the dry run says."""
    names = [f"steps-{model}-{base}{'-checkpointing' if checkpointing else ''}" for model in _GPU_MODELS]
    found = {model: gpu_cells(name) for model, name in zip(_GPU_MODELS, names, strict=True)}
    contestants = list(dict.fromkeys(name for cells in found.values() for name in cells)) or ["every mode"]
    rows = []
    for name in contestants:
        row = [f"`{name}`"]
        for model in _GPU_MODELS:
            cell = found[model].get(name, {})
            if "seconds_per_step" in cell:
                text = f"{cell['seconds_per_step']:.3g} s, {cell['tokens_per_second']:,.0f} tokens/s"
                text += f", {cell['peak_bytes'] / 2**30:.1f} GiB" if cell["peak_bytes"] is not None else ""
                row.append(text + (f" ({cell['error']:+.1%})" if "error" in cell else ""))
            else:
                row.append(cell.get("failed", cell.get("stopped", NOT_MEASURED)))
        rows.append(row)
    return table(["", *_GPU_MODELS], rows) + _on_gpu(names)


def _on_gpu(names: list[str]) -> str:
    found = [data for name in names if (data := gpu_chunk(name)) is not None]
    if not found:
        return "\n(`make gpu`; no card was at hand yet)\n"
    return f"\n(`make gpu`; {found[0]['device']}, torch {found[0]['torch']}, {found[0]['written'][:10]})\n"


def ranks() -> str:
    """Bytes that one of two processes sends in a step, over those of the weights."""
    data = result("ranks")
    rows = []
    for mode, by in data["modes"].items():
        row = [f"`{mode}`", f"{by['ddp']['trained_bytes'] / by['ddp']['weights_bytes']:.1%}"]
        for sharing in ("ddp", "fsdp2"):
            figures = by[sharing]
            row += [f"{figures[f'{key}_bytes'] / 1e3:,.1f} kB" for key in ("sent", "predicted")]
        rows.append(row)
    heads = ["mode", "of the weights train", "DDP sends", "by the formula", "FSDP2 sends", "by the formula"]
    weights = next(iter(data["modes"].values()))["ddp"]["weights_bytes"]
    return (
        table(heads, rows)
        + f"\n(`python benchmarks/ranks.py`; gloo, a Llama of {weights / 1e3:,.0f} kB in float32; {data['written'][:10]})\n"
    )


def scaling() -> str:
    """GiB on each card, for two sizes, by number of cards and by how the model is shared out."""
    cells = result("scaling")["cells"]
    shown = {"data_parallel": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
    rows = []
    for name, cell in cells.items():
        if not name.split()[-1].isdecimal():
            counts = list(cell["sharded"]["fsdp2"])
            each = [" / ".join(_gib(cell["sharded"][sharding][n]) for n in counts) for sharding in shown]
            rows.append([name, _gib(cell["peak_bytes"]), *each])
    counts = " / ".join(next(iter(cells.values()))["sharded"]["fsdp2"])
    return table(["", "1 card", *(f"{name} on {counts}" for name in shown.values())], rows) + _computed()


def scaling_long() -> str:
    """Memory of a step of many tokens, and how many fit on cards of two sizes."""
    data = result("scaling")
    rows = []
    for way, by in data["most_tokens"].items():
        if len(by) < len(data["gib"]):
            continue
        peak = data["cells"][f"8B {way} {data['long']}"]["peak_bytes"]
        rows.append(
            [way, f"{_gib(peak)} GiB", *(f"{one['tokens']:,}" if one["tokens"] else "none" for one in by.values())]
        )
    heads = ["", f"peak at {data['long']:,} tokens", *(f"most tokens on {gib} GiB" for gib in data["gib"])]
    return table(heads, rows) + _computed()


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _computed() -> str:
    return f"\n(`python benchmarks/scaling.py`; dry runs, {result('scaling')['written'][:10]})\n"


TABLES: dict[str, Callable[[], str]] = {
    "hub": hub,
    "gpu_scan": gpu_scan, "ranks": ranks, "scaling": scaling, "scaling_long": scaling_long,
    **{f"gpu_steps_{base}": partial(gpu_steps, base) for base in ("bf16", "nf4")},
    **{f"gpu_steps_{base}_plain": partial(gpu_steps, base, False) for base in ("bf16", "nf4")},
    "gpu_tests": gpu_tests, "gpu_suites": gpu_suites,
    "families": families,
    "families_missing": families_missing,
    "modes": modes, "claims": claims, "demo": demo, "scan": scan, "rates": rates,
    "scan_short": partial(scan, short=True), "dispatches": dispatches, "fuzz": fuzz, "kills": kills,
    "tune": tuned, "tune_estimates": tune_estimates, "race": raced,
    "long": long_runs, "onto": onto, "merge": merge,
    **{f"similarity_{part}": partial(similarity, part) for part in ("kinds", "sketches", "sharing")},
    **{f"memory_{part}": partial(memory, f"memory_{part}") for part in _MEMORY},
    **{f"adapters_{part}": partial(adapters, part) for part in ("claims", "setup", "layers", "svd")},
    **{f"columns_{part}": partial(columns, part) for part in ("cost", "quality")},
    **{f"components_{part}": partial(components, part) for part in ("tasks", "decay")},
    **{f"quality_{suite.replace('-', '_')}": partial(quality, suite) for suite in _SUITES},
}  # fmt: skip


def written(text: str) -> str:
    """The page with every table made anew; a table without a result file stays empty."""

    def fill(match: re.Match[str]) -> str:
        make = TABLES[match[2]]
        try:
            return f"{match[1]}{make()}{match[4]}"
        except FileNotFoundError:
            return f"{match[1]}{match[4]}"

    return PLACE.sub(fill, text)


def main() -> int:
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = written(text)
        if new != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    print(f"{'differ from the results' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'none'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
