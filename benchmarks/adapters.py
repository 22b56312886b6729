"""Shared adapters (`sgm`) and adapters in the singular basis (`lorsa`): what they cost, and what they are worth.

    python benchmarks/adapters.py                     # step times, bytes, set-up; about 20 minutes on two quiet cores
    python benchmarks/adapters.py --quality --quick   # scores: the suites adapters-* of quality.py, small grids

The two parts never run together: training beside a timing would be what is timed. Step times are taken as in `modes.py`,
all contestants alive at once and in turn, and a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import modes
import quality
from modes import Contestant, Settings
from turns import alone, context

RANK, COMPONENTS, ROTATION = 16, 64, 4
DATA = common.ROOT.parent / "shared" / "data"
# Tokens that calibration samples are cut at, and the dtype of the base.
SETUPS = ((256, "float32"), (64, "float32"), (256, "bfloat16"))
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
    from spectrum_peft.plan import MODES

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
    from spectrum_peft.data import read_dataset
    from spectrum_peft.demo import topics

    rows: Any = Path(data) / "gsm8k" / "train.jsonl"
    rows = read_dataset(str(rows)) if rows.is_file() else [{"text": text} for text in topics()[0]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return modes.load_base(folder, nf4=False), calibration_batches(rows, tokenizer, samples, max_length=length)


def setup(pipe: Any, folder: str, data: str, cache: str, length: int, dtype: str) -> None:
    """From a checkpoint and 256 samples to a model that trains, with an empty cache; sends the seconds of each part."""
    os.environ["SPECTRUM_PEFT_CACHE"] = cache
    import torch
    from peft import get_peft_model

    from spectrum_peft import SpectrumConfig, scan_weights
    from spectrum_peft.scan.svd import truncated_svd
    from spectrum_peft.tuner import apply

    model, batches = model_and_batches(folder, data, samples=256, length=length)
    model.to(getattr(torch, dtype))
    seconds: dict[str, float] = {"svd": 0.0}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began

        return run

    truncated_svd = timed("svd", truncated_svd)
    apply.probe_gradients = timed("probe", apply.probe_gradients)
    began, cpu = time.perf_counter(), time.process_time()
    report = timed("scan", scan_weights)(folder)
    config = SpectrumConfig(**ADAPTERS["lorsa"], report=report, calibration_data=batches, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    total, cpu = time.perf_counter() - began, time.process_time() - cpu
    entries = tuned.peft_config["default"].plan.entries
    tuned.unload()
    pipe.send(
        {
            "seconds": total, "parts": seconds, "samples": sum(len(batch["labels"]) for batch in batches),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches), "max_length": length,
            "dtype": dtype, "cpu_seconds": cpu,
            "cache_bytes": sum(path.stat().st_size for path in (Path(cache) / "svd").iterdir()),
            "chosen": {entry.name: entry.components for entry in entries if entry.components},
            "forward_and_backward": forward_and_backward(model, batches),
        }
    )  # fmt: skip


def forward_and_backward(model: Any, batches: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a plain pass over the batches, to the embeddings and with no weight's gradient: what no probe can beat."""
    import torch

    model.eval().requires_grad_(False)
    began = time.perf_counter()
    for batch in batches:
        inputs = model.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
        logits = model(inputs_embeds=inputs, attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()
    return time.perf_counter() - began


def common_share(first: Mapping[str, Sequence[int]], second: Mapping[str, Sequence[int]]) -> float:
    """How much of what one set-up chose the other chose, too: mean over the matrices."""
    return statistics.fmean(len({*first[name]} & {*second[name]}) / len(first[name]) for name in first)


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

    from spectrum_peft.scan.svd import truncated_svd

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


def setups(ctx: Any, folder: str, data: str) -> list[dict[str, Any]]:
    """Of whole rows and of their beginnings; `common`: how much of what the whole rows chose is chosen again."""
    from spectrum_peft.devices import fast_dtype

    found = []
    for length, dtype in SETUPS:
        if dtype == "bfloat16" and str(fast_dtype("cpu")) != "torch.bfloat16":
            continue  # hundreds of times slower there
        with tempfile.TemporaryDirectory() as scratch:
            found.append(alone(ctx, setup, folder, data, scratch, length, dtype))
    chosen = [one.pop("chosen") for one in found]
    return [{**one, "common": common_share(chosen[0], mine)} for one, mine in zip(found, chosen, strict=True)]


def draw_svd(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """What a decomposition costs against the size of a square matrix, one line for each k."""
    from spectrum_peft import plots

    points = [{"label": f"k = {row['k']}", "x": row["size"], "y": row["seconds"]} for row in rows]
    figure = plots.trade_off(
        points, x_label="rows, and as many columns", y_label="seconds of one decomposition", log_x=True,
        title="Truncated SVD by a randomized range finder, float32",
    )  # fmt: skip
    [axes] = figure.axes
    plots.log_scale(axes, "y")
    return plots.save(figure, path)


def run_timing(data: str, quick: bool) -> dict[str, Any]:
    facts = common.machine()
    common.warn_if_busy()
    settings = Settings(steps=3 if quick else 8, rank=RANK)
    ctx = context(modes.preload())
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
        parts["setup"] = setups(ctx, folder, data)
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
        if min(layer["shape"]) >= 4096:
            spread = layer["ratio"]
            add(f"forward and backward of lorsa over LoRA, one layer of {layer['shape'][0]} x {layer['shape'][1]}",
                spread["median"], GOALS["wide"], {"min": round(spread["min"], 4), "max": round(spread["max"], 4)})  # fmt: skip
    for one in parts["setup"]:
        what = f"{one['samples']} samples cut at {one['max_length']} tokens ({one['tokens']:,} in all), {one['dtype']}"
        add(f"set-up of lorsa for SmolLM2-135M, seconds: {what}", one["seconds"], GOALS["setup"])
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--timing", action="store_true", help="step times, bytes, set-up; the default")
    part.add_argument("--quality", action="store_true", help="the suites adapters-* of quality.py")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, or the small grids")
    parser.add_argument("--setup", action="store_true", help="time the set-up again, and keep the rest of the results")
    part.add_argument("--draw", action="store_true", help="draw the kept times of decompositions; run nothing")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with a folder for each dataset")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "adapters.json", help="of the timing")
    parser.add_argument("--picture", type=Path, default=common.ROOT / "docs" / "images" / "lorsa_setup.png")
    options = parser.parse_args(arguments)
    if options.quality:
        names = [name for name in quality.SUITES if name.startswith("adapters-")]
        quality.main([*names, "--data", str(options.data), *(["--quick"] if options.quick else [])])
        return 0
    if options.draw:
        print(draw_svd(json.loads(options.output.read_text())["parts"]["svd"], options.picture))
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.setup:
        result = json.loads(options.output.read_text())
        ctx = context(modes.preload())
        folder, _ = alone(ctx, modes.prepare, "smollm2-135m")
        result["parts"]["setup"] = setups(ctx, folder, str(options.data))
        result["claims"] = claims(result["parts"])
    else:
        result = run_timing(str(options.data), options.quick)
    for row in result["claims"]:
        print(f"{'pass' if row['pass'] else 'FAIL'}  {row['claim']}: {row['seen']:.4g}, wanted <= {row['wanted']:.4g}")
    print(draw_svd(result["parts"]["svd"], options.picture))
    print(common.save(options.output, "adapters", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
