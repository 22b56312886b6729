"""Shared adapters (`sgm`) and adapters in the singular basis (`lorsa`): what they cost, and what they are worth.

    python benchmarks/adapters.py --timing            # step times, bytes, set-up; about 20 minutes on two quiet cores
    python benchmarks/adapters.py --quality --quick   # at most 3 hours on two cores
    python benchmarks/adapters.py --quality           # about 40 hours

The two parts never run together: training beside a timing would be what is timed. Step times are taken as in `modes.py`,
all contestants alive at once and in turn, and a ratio is the median over the rounds. Quality goes through
`spectrum-peft compare`: every run is a process and a folder of its own, and a stopped benchmark goes on where it was. Each
method is trained at three learning rates on nine tenths of the training rows and judged on the last tenth; the best rate
then trains on all of them, with every seed, and is judged on the validation rows, which nothing was chosen by.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import modes
from modes import Contestant, Settings

RANK, COMPONENTS, ROTATION = 16, 64, 4
DATA = common.ROOT.parent / "shared" / "data"
LAYERS = ((576, 576), (1536, 576), (4096, 11008), (11008, 4096))
GOALS = {"step": 1.15, "wide": 1.05, "bytes": 0.2, "setup": 180.0, "sgm": 0.75, "sgm both": 0.35}

# --- timing: whole models --------------------------------------------------------------------------------------------

_ALL = {"spectrum_ratio": 1.0}  # the same modules for all
ADAPTERS: dict[str, dict[str, Any]] = {
    "lorsa": {"mode": "lorsa", **_ALL, "n_components": COMPONENTS, "rotation_rank": ROTATION},
    "spectra_qlora": {"mode": "spectra_qlora", **_ALL},
    "sgm": {"mode": "sgm", **_ALL},
    "sgm both": {"mode": "sgm", **_ALL, "share": "both"},
}


def known_adapters() -> dict[str, dict[str, Any]]:
    """Those whose mode this version has."""
    from spectrum_peft.policies import MODES

    return {name: options for name, options in ADAPTERS.items() if options["mode"] in MODES}


def probe(pipe: Any, folder: str, path: str, data: str) -> None:
    """Measure gradients for the contestants, once; sends nothing but that it is done. In a process of its own."""
    from spectrum_peft import probe_gradients

    model, batches = model_and_batches(folder, data, samples=32)
    probe_gradients(model, batches, svd_rank=256).save(path)
    pipe.send("ready")


def model_and_batches(folder: str, data: str, samples: int, length: int = 256) -> tuple[Any, list[Any]]:
    """SmolLM2 in float32, and calibration batches: math word problems where the data are there, else text about Python."""
    from transformers import AutoTokenizer

    from spectrum_peft import calibration_batches
    from spectrum_peft.demo import topics
    from spectrum_peft.tasks import read_dataset

    rows: Any = Path(data) / "gsm8k" / "train.jsonl"
    rows = read_dataset(str(rows)) if rows.is_file() else [{"text": text} for text in topics()[0]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return modes.load_base(folder, nf4=False), calibration_batches(rows, tokenizer, samples, max_length=length)


def setup(pipe: Any, folder: str, data: str, cache: str) -> None:
    """From a checkpoint and 256 samples to a model that trains, with an empty cache; sends the seconds of each part."""
    os.environ["SPECTRUM_PEFT_CACHE"] = cache
    from peft import get_peft_model

    from spectrum_peft import SpectrumConfig, scan_weights, svd
    from spectrum_peft.tuner import apply

    model, batches = model_and_batches(folder, data, samples=256)
    seconds: dict[str, float] = {"svd": 0.0}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began

        return run

    svd.truncated_svd = timed("svd", svd.truncated_svd)
    apply.probe_gradients = timed("probe", apply.probe_gradients)
    began = time.perf_counter()
    report = timed("scan", scan_weights)(folder)
    config = SpectrumConfig(**ADAPTERS["lorsa"], report=report, calibration_data=batches, task_type="CAUSAL_LM")
    get_peft_model(model, config)
    total = time.perf_counter() - began
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    size = sum(path.stat().st_size for path in (Path(cache) / "svd").iterdir())
    samples = sum(len(batch["labels"]) for batch in batches)
    pipe.send(
        {
            "seconds": total, "parts": seconds, "samples": samples, "tokens": tokens, "cache_bytes": size,
            "cpu_seconds": time.process_time(),
        }
    )  # fmt: skip


def sizes(pipe: Any, folder: str, report: str, gradients: str) -> None:
    """Sends {adapter: what trains and what its file holds}, in bytes. In a process of its own."""
    from peft import get_peft_model

    from spectrum_peft import SpectrumConfig

    found = {}
    configs = {name: SpectrumConfig(**options, report=report, gradients=gradients, r=RANK, task_type="CAUSAL_LM")
               for name, options in known_adapters().items()}  # fmt: skip
    for name, config in {"LoRA of peft": modes.lora_config(Settings(steps=0, rank=RANK)), **configs}.items():
        model = get_peft_model(modes.load_base(folder, nf4=False), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            file = (Path(scratch) / "adapter_model.safetensors").stat().st_size
        found[name] = {
            "trained_parameters": sum(p.numel() for p in trained),
            "trained_bytes": sum(p.numel() * p.element_size() for p in trained),
            "file_bytes": file,
        }
        del model
    pipe.send(found)


def alone(ctx: Any, target: Callable[..., None], *arguments: Any) -> Any:
    """What a function sends, run in a process of its own."""
    process, pipe = modes.start(ctx, target, *arguments)
    try:
        return pipe.recv()
    except EOFError:
        raise modes.ContestantFailed(f"{target.__name__}: its error is above") from None
    finally:
        process.join()


# --- timing: one layer, one decomposition ----------------------------------------------------------------------------


def layer_pair(out: int, inside: int) -> dict[str, Any]:
    """PEFT's LoRA and a `lorsa` layer over one matrix; the basis is any orthonormal one, the time is the same."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    from spectrum_peft.records import PlanEntry
    from spectrum_peft.tuner import lorsa

    torch.manual_seed(0)
    base = torch.nn.Linear(inside, out, bias=False).requires_grad_(False)
    plain = Linear(base, "default", LoraConfig(), r=RANK, lora_alpha=2 * RANK)
    ours = Linear(base, "default", LoraConfig(), r=ROTATION, lora_alpha=ROTATION)
    entry = PlanEntry(
        "w.weight", "lorsa", rank=ROTATION, alpha=1.0, shape=(out, inside), components=tuple(range(COMPONENTS))
    )
    lorsa.install(ours, "default", entry, svd_rank=COMPONENTS, seed=0, keeps_dtype=True, from_file=True)
    basis: Any = ours.lora_A["default"]
    for side, width in (("left", out), ("right", inside)):
        getattr(basis, side).data.copy_(torch.linalg.qr(torch.randn(width, COMPONENTS)).Q.T)
    basis.values.data.copy_(torch.linspace(5, 1, COMPONENTS))
    for parameter in ours.lora_B["default"].parameters():
        parameter.data.normal_(std=0.01)
    return {"LoRA": plain, "lorsa": ours}


def layer_times(out: int, inside: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of both, in turn: the ratio of each round's two times."""
    import torch

    pair = layer_pair(out, inside)
    x = torch.randn(tokens, inside, requires_grad=True)
    g = torch.randn(tokens, out)
    repeats = max(1, 2**24 // (out * inside))
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    load, cpu = common.OtherLoad(), time.process_time()
    for n in range(rounds + 1):
        for name in sorted(pair, reverse=bool(n % 2)):
            began = time.perf_counter()
            for _ in range(repeats):
                pair[name](x).backward(g)
            seconds[name].append((time.perf_counter() - began) / repeats)
    kept = {name: times[1:] for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(kept["lorsa"], kept["LoRA"], strict=True)]
    return {
        "shape": [out, inside], "tokens": tokens, "ratio": common.spread(ratios),
        **{f"{name} seconds": common.spread(times) for name, times in kept.items()},
        "other_load_cores": load.cores(time.process_time() - cpu),
    }  # fmt: skip


def svd_times(quick: bool) -> list[dict[str, Any]]:
    """Seconds of one truncated SVD against size and k, of a matrix with a decaying spectrum, and its error at index k / 4."""
    import torch

    from spectrum_peft.svd import truncated_svd

    rows = []
    for size in (512, 1024, 2048) if quick else (512, 1024, 2048, 4096):
        torch.manual_seed(0)
        matrix = torch.randn(size, size) * torch.logspace(0, -1, size)
        values = torch.linalg.svdvals(matrix.double()) if size <= 2048 else None
        for k in (16, 64, 256):
            times = []
            for _ in range(1 if size > 2048 else 3):
                began = time.perf_counter()
                found = truncated_svd(matrix, k)
                times.append(time.perf_counter() - began)
            row = {"size": size, "k": k, "seconds": statistics.median(times)}
            if values is not None:
                off = (found.values.double() / values[:k] - 1).abs()
                row |= {"worst_error": float(off.max()), "error_of_first_quarter": float(off[: k // 4].max())}
            rows.append(row)
    return rows


def run_timing(data: str, quick: bool) -> dict[str, Any]:
    facts = common.machine()
    common.warn_if_busy()
    settings = Settings(steps=3 if quick else 8, rank=RANK)
    ctx = modes.context([])
    folder, report = alone(ctx, modes.prepare, "smollm2-135m")
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        gradients = str(Path(scratch) / "gradients.json")
        alone(ctx, probe, folder, gradients, data)
        parts["sizes"] = alone(ctx, sizes, folder, report, gradients)
        contestants = {"LoRA of peft": Contestant(None)} | {
            name: Contestant({**options, "gradients": gradients}) for name, options in known_adapters().items()
        }
        repeats = [
            modes.compare(ctx, folder, report, contestants, settings, f"adapters/{n}") for n in range(1 if quick else 3)
        ]
        parts["steps"] = repeats
        parts["setup"] = alone(ctx, setup, folder, data, str(Path(scratch) / "cache"))
    parts["layers"] = [layer_times(*shape, tokens=256, rounds=3 if quick else 15) for shape in LAYERS]
    parts["svd"] = svd_times(quick)
    return {"machine": facts, "settings": {**vars(settings), "components": COMPONENTS, "rotation_rank": ROTATION},
            "parts": parts, "claims": claims(parts)}  # fmt: skip


def claims(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was wanted of costs, what was seen."""
    rows: list[dict[str, Any]] = []

    def add(claim: str, seen: float, most: float, extent: Mapping[str, float] | None = None) -> None:
        rows.append({"claim": claim, "wanted": most, "seen": round(seen, 4), **(extent or {}), "pass": seen <= most})

    base = "LoRA of peft"
    ratio = modes.time_ratio(parts["steps"], "lorsa", base)
    if ratio is not None:
        add("step time of lorsa over LoRA, SmolLM2-135M", ratio["median"], GOALS["step"],
            {"min": round(ratio["min"], 4), "max": round(ratio["max"], 4)})  # fmt: skip
    first = parts["steps"][0]["contestants"]

    def state(name: str) -> int:
        return int(first[name]["trainable_bytes"] + first[name]["optimizer_bytes"])

    add("trainable and optimizer bytes of lorsa over LoRA", state("lorsa") / state(base), GOALS["bytes"])
    for layer in parts["layers"]:
        goal = GOALS["wide"] if min(layer["shape"]) >= 4096 else GOALS["step"]
        spread = layer["ratio"]
        add(f"forward and backward of lorsa over LoRA, one layer of {layer['shape'][0]} x {layer['shape'][1]}",
            spread["median"], goal, {"min": round(spread["min"], 4), "max": round(spread["max"], 4)})  # fmt: skip
    add("set-up of lorsa for SmolLM2-135M, seconds", parts["setup"]["seconds"], GOALS["setup"])
    for name in ("sgm", "sgm both"):
        if name in parts["sizes"]:
            trained = {n: parts["sizes"][n]["trained_parameters"] for n in (name, "spectra_qlora")}
            add(
                f"trained parameters of {name} over spectra_qlora",
                trained[name] / trained["spectra_qlora"],
                GOALS[name],
            )
            add(f"file of {name} over what it trains", parts["sizes"][name]["file_bytes"] / parts["sizes"][name]["trained_bytes"],
                1.02)  # fmt: skip
    return rows


# --- quality ---------------------------------------------------------------------------------------------------------

_LORA_RATES = [3e-4, 1e-3, 3e-3]
_SINGULAR_RATES = [1e-3, 3e-3, 1e-2]
# Every budget of every method; `rates` are its three learning rates. Of LoRA there is nothing below rank 1.
METHODS: list[dict[str, Any]] = [
    {"name": "full", "mode": "full", "rates": [1e-5, 3e-5, 1e-4]},
    *({"name": f"LoRA r{r}", "peft": {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"},
       "rates": _LORA_RATES} for r in (1, 4, 16)),
    {"name": "DoRA r4", "rates": _LORA_RATES,
     "peft": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True}},
    {"name": "AdaLoRA r4", "rates": _LORA_RATES,
     "peft": {"peft_type": "ADALORA", "init_r": 6, "target_r": 4, "lora_alpha": 8, "target_modules": "all-linear"}},
    *({"name": f"spectra_qlora r{r}", "mode": "spectra_qlora", "r": r, "rates": _LORA_RATES} for r in (1, 4, 16)),
    {"name": "sgm r4", "mode": "sgm", "r": 4, "rates": _LORA_RATES},
    {"name": "sgm both r16", "mode": "sgm", "r": 16, "share": "both", "rates": _LORA_RATES},
    *({"name": f"lorsa {n}, r{r}", "mode": "lorsa", "n_components": n, "rotation_rank": r, "spectrum_ratio": 1.0,
       "rates": _SINGULAR_RATES} for n, r in ((8, 1), (64, 1), (64, 4), (128, 16))),
]  # fmt: skip
_MINILM = {
    "task": "classification",
    "max_length": 64,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
}
_SMOLLM2 = {"task": "causal_lm", "max_length": 256, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
# rows: of training and of validation, None for all. hours: of the whole dataset's part on two cores, an estimate.
DATASETS: dict[str, dict[str, Any]] = {
    "banking77": {"model": "minilm", "train": _MINILM, "metric": "accuracy", "seeds": [0, 1, 2]},
    "goemotions_sentiment": {"model": "minilm", "train": _MINILM, "metric": "accuracy", "seeds": [0, 1, 2]},
    "gsm8k": {"model": "smollm2-135m", "train": _SMOLLM2, "metric": "loss", "seeds": [0]},
}
FULL = {
    "banking77": {"rows": (None, None), "steps": 750}, "goemotions_sentiment": {"rows": (None, None), "steps": 750},
    "gsm8k": {"rows": (None, 300), "steps": 500},
}  # fmt: skip
QUICK = {
    "banking77": {"rows": (4000, 500), "steps": 120}, "goemotions_sentiment": {"rows": (4000, 500), "steps": 120},
    "gsm8k": {"rows": (200, 40), "steps": 25},
}  # fmt: skip
QUICK_METHODS = {
    "banking77": [m["name"] for m in METHODS],
    "goemotions_sentiment": ["full", "LoRA r1", "LoRA r4", "sgm r4", "lorsa 64, r4"],
    "gsm8k": ["LoRA r1", "LoRA r4", "sgm r4", "lorsa 64, r4"],
}


def model_folder(name: str) -> Path:
    from spectrum_peft.demo import minilm_folder, smollm2_folder

    return minilm_folder() if name == "minilm" else smollm2_folder()


def written_rows(source: Path, target: Path, rows: int | None, begin: float = 0.0, end: float = 1.0) -> str:
    """The file of a share of the first `rows` rows of a dataset; shuffled once, always the same."""
    import random

    lines = source.read_text().splitlines()
    random.Random(0).shuffle(lines)
    lines = lines[:rows]
    target.write_text("\n".join(lines[round(begin * len(lines)) : round(end * len(lines))]) + "\n")
    return str(target)


def contestants(methods: Sequence[Mapping[str, Any]], steps: int, rates: Mapping[str, Sequence[float]]) -> list[Any]:
    """Rows for the key `contestants` of `compare`: each method at each of its rates."""
    from spectrum_peft.policies import MODES

    rows = []
    for method in methods:
        if method.get("mode", "full") not in MODES:
            continue
        settings = {k: v for k, v in method.items() if k not in ("rates", "name")}
        if "peft" in settings and settings["peft"]["peft_type"] == "ADALORA":
            schedule = {"tinit": steps // 10, "tfinal": max(1, 3 * steps // 10), "total_step": steps}
            settings["peft"] = {**settings["peft"], **schedule}
        for rate in rates[method["name"]]:
            rows.append({"name": f"{method['name']} @ {rate:g}", **settings, "learning_rate": rate})
    return rows


def compare(folder: Path, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """One comparison by the command line, resumed where it was stopped; its results."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    output = folder / name
    command = [sys.executable, "-m", "spectrum_peft", "compare", "--config", str(path), "-o", str(output)]
    done = subprocess.run(command, cwd=common.ROOT, check=False)
    results = output / "results.json"
    if not results.is_file():
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode} and wrote no results")
    return json.loads(results.read_text())


def run_quality(
    names: Sequence[str], data: Path, quick: bool, only: Sequence[str] | None, cells: Path
) -> dict[str, Any]:
    facts = common.machine()
    found: dict[str, Any] = {}
    left: list[str] = []
    for name in names:
        row, size = DATASETS[name], (QUICK if quick else FULL)[name]
        wanted = only or (QUICK_METHODS[name] if quick else [m["name"] for m in METHODS])
        methods = [m for m in METHODS if m["name"] in wanted]
        left += [f"{name}: {m['name']}" for m in METHODS if m not in methods]
        folder = cells / ("quick" if quick else "full") / name
        folder.mkdir(parents=True, exist_ok=True)
        train, held = size["rows"]
        source = data / name / "train.jsonl"
        files = {
            "search": written_rows(source, folder / "search.jsonl", train, 0.0, 0.9),
            "judge": written_rows(source, folder / "judge.jsonl", train, 0.9, 1.0),
            "train": written_rows(source, folder / "train.jsonl", train),
            "validation": written_rows(data / name / "validation.jsonl", folder / "validation.jsonl", held),
        }
        shared = {
            **row["train"], "model": str(model_folder(row["model"])), "dtype": "float32", "max_steps": size["steps"],
            "lr_scheduler_type": "linear", "warmup_steps": size["steps"] // 10, "modes": [], "controls": [],
            "metric": row["metric"],
        }  # fmt: skip
        rates = {m["name"]: m["rates"] for m in methods}
        searched = compare(
            folder, "search",
            {**shared, "dataset": files["search"], "eval_dataset": files["judge"], "seeds": [0],
             "contestants": contestants(methods, size["steps"], rates)},
        )  # fmt: skip
        best = best_rates(searched, row["metric"])
        if not best:
            raise RuntimeError(f"{name}: every run of the search failed; their logs are in {folder / 'search' / 'cells'}")
        chosen = [m for m in methods if m["name"] in best]
        judged = compare(
            folder, "final",
            {**shared, "dataset": files["train"], "eval_dataset": files["validation"], "seeds": row["seeds"],
             "contestants": contestants(chosen, size["steps"], {name: [rate] for name, rate in best.items()})},
        )  # fmt: skip
        found[name] = {
            "metric": row["metric"], "model": row["model"], "steps": size["steps"], "rows": [train, held],
            "rates": {"tried": rates, "taken": best}, "search": figures(searched, row["metric"]),
            "final": figures(judged, row["metric"]),
        }  # fmt: skip
    return {"machine": facts, "quick": quick, "datasets": found, "not_run": left}


def best_rates(results: Mapping[str, Any], metric: str) -> dict[str, float]:
    """{method: the rate with the best metric on the split of the training rows}; a method whose runs all failed is not in it."""
    from spectrum_peft.compare.matrix import METRICS

    best: dict[str, tuple[float, float]] = {}
    for row in results["contestants"]:
        value = row["metrics"].get(metric, {}).get("mean")
        if value is None:
            continue
        name = row["label"].partition(" @ ")[0]
        key = (value if METRICS[metric].higher else -value, row["settings"]["learning_rate"])
        best[name] = max(best.get(name, key), key)
    return {name: rate for name, (_, rate) in best.items()}


def figures(results: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """Of each contestant: the metric with its spread over the seeds, and what it trained."""
    rows = []
    for contestant in results["contestants"]:
        mine = [c for c in results["cells"] if c["label"] == contestant["label"] and c["error"] is None]
        values = [c["metrics"][metric] for c in mine]
        rows.append(
            {
                "method": contestant["label"].partition(" @ ")[0],
                "learning_rate": contestant["settings"]["learning_rate"],
                "values": values,
                **({"metric": common.spread(values)} if values else {}),
                "trained_parameters": mine[0]["trainable_parameters"] if mine else None,
                "step_seconds": statistics.median(c["seconds_per_step"] for c in mine) if mine else None,
                "failed": contestant["failed"],
            }
        )
    return rows


def quality_plot(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """One picture for each dataset: score against trained parameters, the spread over seeds as bars."""
    from spectrum_peft import plots

    written = []
    for name, data in result["datasets"].items():
        points = [
            {"label": row["method"].partition(" ")[0], "x": row["trained_parameters"], "y": row["metric"]["median"],
             "low": row["metric"]["min"], "high": row["metric"]["max"]}
            for row in data["final"] if "metric" in row
        ]  # fmt: skip
        figure = plots.trade_off(points, x_label="trained parameters (with the new head)", y_label=data["metric"],
                                 title=f"{name}, {data['model']}: validation, median and range over seeds",
                                 log_x=True)  # fmt: skip
        written.append(plots.save(figure, folder / f"adapters_{name}.png"))
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = parser.add_mutually_exclusive_group(required=True)
    part.add_argument("--timing", action="store_true", help="step times, bytes, set-up")
    part.add_argument("--quality", action="store_true", help="scores on three datasets")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, or the small grid")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with a folder for each dataset")
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--methods", nargs="+", choices=[m["name"] for m in METHODS], help="only these")
    parser.add_argument("--cells", type=Path, help="where runs are kept; default: in the cache folder")
    parser.add_argument("--output", type=Path, help="default: results/adapters_timing.json or adapters_quality.json")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    kind = "adapters_timing" if options.timing else "adapters_quality"
    output = options.output or common.RESULTS / f"{kind}.json"
    if options.timing:
        result = run_timing(str(options.data), options.quick)
        for row in result["claims"]:
            print(
                f"{'pass' if row['pass'] else 'FAIL'}  {row['claim']}: {row['seen']:.4g}, wanted <= {row['wanted']:.4g}"
            )
    else:
        from spectrum_peft.scan import cache_folder

        cells = options.cells or cache_folder() / "benchmarks" / "adapters"
        result = run_quality(options.datasets, options.data, options.quick, options.methods, cells.resolve())
        for path in quality_plot(result, output.parent):
            print(path)
    print(common.save(output, kind, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
