"""What the memory dry run predicts, against what a training step really takes; and the tables of docs/memory.md.

    python benchmarks/memory.py                  # every cell that is not there yet, the 8B dry run, the tables
    python benchmarks/memory.py --only minilm    # cells whose name contains a word
    python benchmarks/memory.py --tables         # no cells
    python benchmarks/tables.py                  # write the tables of docs/memory.md from the JSON

Each cell is one model, mode, ratio, checkpointing and batch. It takes two processes of their own: one predicts, with
fake tensors and from the config alone; one loads the model as for training, takes two optimizer steps, and reports the
peak of live storages (the same tracker, on real tensors) and how far its resident memory rose above what it was before
the model. Finished cells stay in benchmarks/results/memory.json and are not run again, unless with --again.

Resident memory is compared under MALLOC_ARENA_MAX=1, MALLOC_MMAP_THRESHOLD_=16384 and MALLOC_TRIM_THRESHOLD_=65536 on
one thread: freed blocks then go back to the kernel, so that what is resident is what is alive. Weights are copied out of
the file that transformers maps, whose pages would count as resident too, and the first large product, whose packing
buffers MKL keeps, comes before the baseline is taken. Where a CUDA device is present, each cell is also run there and
compared with torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
from models import folder_of

RESULT = common.RESULTS / "memory.json"
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
TOLERANCE = {"live": 0.02, "resident": 0.10}


@dataclass(frozen=True)
class Cell:
    """One comparison. `step` are fields of `memory.Step`, `options` of `make_plan`."""

    model: str
    mode: str
    options: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [self.model, self.mode, *(f"{k}={v}" for k, v in {**self.options, **self.step}.items())]
        return " ".join(words)


_HALF, _QUARTER = {"spectrum_ratio": 0.5}, {"spectrum_ratio": 0.25}
_SAVING = {"gradient_checkpointing": True}
_FUSED = {"optimizer": "adamw_torch_fused"}
CELLS = (
    Cell("smollm2", "full", {}, {"batch_size": 1, "max_length": 128}),
    Cell("smollm2", "full", {}, {"batch_size": 4, "max_length": 128, **_SAVING, **_FUSED}),
    Cell("smollm2", "spectrum", _HALF, {"batch_size": 2, "max_length": 128}),
    Cell("smollm2", "spectrum", _QUARTER, {"batch_size": 2, "max_length": 128, **_SAVING}),
    Cell("smollm2", "spectrum", {**_QUARTER, "backward_depth": 0.5}, {"batch_size": 2, "max_length": 128}),
    Cell("smollm2", "spectrum", _QUARTER, {"batch_size": 2, "max_length": 128, "trainer": "sft", **_SAVING}),
    Cell("smollm2", "spectrum", _QUARTER, {"batch_size": 2, "max_length": 128, "quantization": "nf4"}),
    Cell("smollm2", "lora", {}, {"batch_size": 2, "max_length": 128}),
    Cell("smollm2", "lora", {}, {"batch_size": 4, "max_length": 128, "quantization": "nf4", **_SAVING}),
    Cell("smollm2", "spectra_qlora", _HALF, {"batch_size": 2, "max_length": 128, "quantization": "int8"}),
    Cell("smollm2", "alors", _HALF, {"batch_size": 1, "max_length": 256, "gradient_accumulation_steps": 2}),
    Cell("smollm2", "alors", {**_HALF, "rescore_every": 10}, {"batch_size": 2, "max_length": 128}),
    Cell("minilm", "full", {}, {"batch_size": 16, "max_length": 128}),
    Cell("minilm", "spectrum", _HALF, {"batch_size": 16, "max_length": 128}),
    Cell("minilm", "spectrum", _QUARTER, {"batch_size": 32, "max_length": 128, **_SAVING}),
    Cell("minilm", "lora", {}, {"batch_size": 16, "max_length": 128, "attn_implementation": "eager"}),
    Cell("llama-350m", "full", {}, {"batch_size": 1, "max_length": 128, "optimizer": "adafactor", **_SAVING}),
    Cell("llama-350m", "spectrum", _HALF, {"batch_size": 1, "max_length": 128, **_SAVING}),
    Cell("llama-350m", "spectrum", _QUARTER, {"batch_size": 1, "max_length": 128}),
    Cell("llama-350m", "lora", {}, {"batch_size": 2, "max_length": 128, **_SAVING}),
    Cell("llama-350m", "alors", _HALF, {"batch_size": 2, "max_length": 128}),
    Cell("moe", "full", {}, {"batch_size": 2, "max_length": 128}),
    Cell("moe", "spectrum", _HALF, {"batch_size": 4, "max_length": 128, **_SAVING}),
    Cell("moe", "lora", {"r": 8}, {"batch_size": 4, "max_length": 128}),
    Cell("t5", "full", {}, {"batch_size": 4, "max_length": 128}),
    Cell("t5", "spectrum", _HALF, {"batch_size": 8, "max_length": 128, **_SAVING}),
    Cell("t5", "lora", {}, {"batch_size": 8, "max_length": 128}),
    Cell("t5", "full", {}, {"batch_size": 4, "max_length": 128, "optimizer": "sgd", "attn_implementation": "eager"}),
)
# MiniLM's folder names no head; it is trained as a classifier.
CLASSES = {"minilm": "AutoModelForSequenceClassification"}

# Written by hand from the config.json of these repositories; nothing is fetched.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-3.2-3B": ("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"],
    }),
    "meta-llama/Llama-3.1-8B": ("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"],
    }),
    "Qwen/Qwen2.5-7B": ("Qwen2Config", {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "architectures": ["Qwen2ForCausalLM"],
    }),
    "meta-llama/Llama-3.1-70B": ("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"],
    }),
}  # fmt: skip
# Settings of the tables: as `spectrum-peft train` has them, on one GPU.
TABLE_STEP = {
    "batch_size": 4, "max_length": 1024, "dtype": "bfloat16", "optimizer": "adamw_torch_fused", "trainer": "sft",
    **_SAVING,
}  # fmt: skip
# (mode, ratio, quantization) of a table's rows.
TABLE_ROWS = (
    ("full", None, None), *(("spectrum", ratio, None) for ratio in (1.0, 0.75, 0.5, 0.35, 0.25)),
    ("spectrum", 0.25, "nf4"), ("lora", None, None), ("lora", None, "nf4"), ("spectra_qlora", 0.5, "nf4"),
    ("alors", 0.5, "nf4"),
)  # fmt: skip
# GB for Llama-3.2-3B at batch 4, ratio by ratio, as a well-known tutorial for this method states them.
TUTORIAL = {1.0: 28, 0.75: 22, 0.5: 16, 0.35: 12, 0.25: 10}
# Ways to read the tutorial, which leaves most settings open.
READINGS = {
    "all in bfloat16, checkpointing, 512 tokens": {
        "max_length": 512, "mixed_precision": "no", "trainer": "transformers", **_SAVING,
    },
    "all in bfloat16, checkpointing, 2048 tokens": {
        "max_length": 2048, "mixed_precision": "no", "trainer": "transformers", **_SAVING,
    },
    "all in bfloat16, checkpointing, loss in chunks, 1024 tokens": {
        "max_length": 1024, "mixed_precision": "no", "trainer": "sft", **_SAVING,
    },
    "8-bit AdamW, else as the last": {
        "max_length": 1024, "mixed_precision": "no", "trainer": "sft", "optimizer": "adamw_8bit", **_SAVING,
    },
    "all in bfloat16, no checkpointing, 512 tokens": {
        "max_length": 512, "mixed_precision": "no", "trainer": "transformers",
    },
    "float32 steps under autocast, checkpointing, loss in chunks, 1024 tokens": {
        "max_length": 1024, "trainer": "sft", **_SAVING,
    },
}  # fmt: skip


# --- models ----------------------------------------------------------------------------------------------------------


def _plan_of(cell: Cell, folder: Path, model_class: Any) -> Any:
    from spectrum_peft import make_plan
    from spectrum_peft.memory import report_of_config

    return make_plan(report_of_config(folder, "random", model_class=model_class), mode=cell.mode, **cell.options)


def _class_of(cell: Cell) -> Any:
    import transformers

    return getattr(transformers, CLASSES[cell.model]) if cell.model in CLASSES else None


# --- in a process of its own -----------------------------------------------------------------------------------------


def predict(cell: Cell, device: str) -> dict[str, Any]:
    from spectrum_peft import estimate_memory

    folder, model_class = folder_of(cell.model), _class_of(cell)
    plan = _plan_of(cell, folder, model_class)
    began, cpu = time.perf_counter(), time.process_time()
    report = estimate_memory(folder, plan, model_class=model_class, dtype="float32", device=device, **cell.step)
    return _brief(report) | {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}


def measure(cell: Cell, device: str) -> dict[str, Any]:
    import torch

    from spectrum_peft import load_model_with_spectrum
    from spectrum_peft.devices import peak_memory, reset_peak_memory
    from spectrum_peft.memory import measure_memory

    torch.set_num_threads(1)
    folder, model_class = folder_of(cell.model), _class_of(cell)
    plan = _plan_of(cell, folder, model_class)
    step = dict(cell.step)
    options = {name: step.pop(name) for name in ("quantization",) if name in step}
    if "attn_implementation" in step:
        options["attn_implementation"] = step["attn_implementation"]
    _warm_up(step, options)
    gc.collect()
    _trim()
    baseline = common.resident() or 0
    model, tokenizer = load_model_with_spectrum(
        str(folder), plan, dtype="float32", model_class=model_class, device_map={"": device} if device != "cpu" else
        None, **options,
    )  # fmt: skip
    del tokenizer  # some 30 MiB that are no part of the step
    _out_of_the_file()
    gc.collect()
    _trim()
    loaded = common.resident() or 0
    common.reset_peak()
    if device != "cpu":
        reset_peak_memory()
    report = measure_memory(model, **step)
    found = _brief(report) | {
        "baseline_bytes": baseline,
        "modules": sum(1 for _ in model.modules()),
        "loaded_bytes": loaded - baseline,
        "resident_bytes": (common.peak_resident() or 0) - baseline,
    }
    if device != "cpu":
        found["allocated_bytes"] = peak_memory()
    return found


def _out_of_the_file() -> None:
    """Copy tensors into memory of the process: transformers maps the file, and its pages, read once, would stay resident.

    All tensors there are, not the model's parameters only: a second reference to one weight keeps the whole file mapped.
    """
    import torch

    copies: dict[Any, torch.Tensor] = {}
    for tensor in [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]:
        if tensor.is_floating_point() and tensor.device.type == "cpu":
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in copies:
                copies[key] = tensor.detach().clone()
            tensor.data = copies[key]


def _warm_up(step: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """A step of a very small model, so that what libraries load and allocate at their first use is in the baseline."""
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from spectrum_peft import load_model_with_spectrum, make_plan
    from spectrum_peft.memory import measure_memory, report_of_config

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        LlamaForCausalLM(config).save_pretrained(scratch)
        report = report_of_config(scratch)
        for mode in ("spectrum", "lora"):
            model, _ = load_model_with_spectrum(scratch, make_plan(report, mode=mode), dtype="float32", **options)
            measure_memory(model, **{**step, "batch_size": 2, "max_length": 16})
    # MKL keeps the buffers that it packs matrices into: 14 MiB on one thread, once a product was as large as this.
    torch.ones(512, 576) @ torch.ones(576, 49152)


def _trim() -> None:
    """Give freed memory back to the kernel, where the C library is glibc."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _brief(report: Any) -> dict[str, Any]:
    return {
        "peak_bytes": report.peak_bytes,
        "by_category": dict(report.by_category),
        "phase": report.phase,
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
        "host_bytes": report.host_bytes,
        "complete": report.complete,
        "notes": list(report.notes),
    }


def _config_of(name: str) -> Any:
    import torch
    import transformers

    kind, fields = CONFIGS[name]
    return getattr(transformers, kind)(**fields, dtype=torch.bfloat16)


def dry_run(name: str, mode: str, ratio: float | None, step: Mapping[str, Any]) -> dict[str, Any]:
    """A dry run from a config of `CONFIGS`."""
    from spectrum_peft import estimate_memory, make_plan
    from spectrum_peft.memory import report_of_config

    config = _config_of(name)
    report = report_of_config(config, "random")
    plan = make_plan(report, mode=mode, **({} if ratio is None else {"spectrum_ratio": ratio}))
    began, cpu = time.perf_counter(), time.process_time()
    found = estimate_memory(config, plan, **step)
    return _brief(found) | {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}


CHILDREN = {"predict": predict, "measure": measure, "dry_run": dry_run}


def _in_child(job: str, *arguments: Any) -> dict[str, Any]:
    """Run a job in a fresh process; its result, with the process' peak of resident memory."""
    done = common.run_child(
        [sys.executable, str(Path(__file__).resolve()), "--child", job, json.dumps(arguments)], env=ENVIRONMENT
    )
    if done.returncode != 0:
        raise RuntimeError(f"{job} {arguments}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_peak_bytes": done.peak_bytes}


def _child(job: str, text: str) -> None:
    arguments = json.loads(text)
    if job != "dry_run":
        arguments[0] = Cell(**arguments[0])
    print(json.dumps(CHILDREN[job](*arguments)))


# --- the run ---------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"cell": asdict(cell), **common.commit()}
    row["predicted"] = _in_child("predict", asdict(cell), "cpu")
    row["measured"] = _in_child("measure", asdict(cell), "cpu")
    live, seen = row["predicted"]["peak_bytes"], row["measured"]
    row["live_error"] = live / seen["peak_bytes"] - 1
    row["resident_error"] = live / seen["resident_bytes"] - 1
    row["cuda"] = _on_cuda(cell)
    return row


def _on_cuda(cell: Cell) -> dict[str, Any] | str:
    from spectrum_peft.devices import default_device

    if default_device().type != "cuda":
        return "not run: no CUDA device on this machine"
    predicted, measured = _in_child("predict", asdict(cell), "cuda"), _in_child("measure", asdict(cell), "cuda")
    return {
        "predicted": predicted, "measured": measured,
        "error": predicted["peak_bytes"] / measured["allocated_bytes"] - 1,
    }  # fmt: skip


def _load() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.is_file() else {"cells": {}, "tables": {}, "tutorial": {}}


def _save(result: Mapping[str, Any]) -> None:
    data = {k: v for k, v in result.items() if k not in ("benchmark", "written", "machine")}
    common.save(RESULT, "memory", data)


def run(only: str, again: bool, *, tables: bool) -> None:
    result = _load()
    result["settings"] = {"environment": ENVIRONMENT, "tolerance": TOLERANCE, "table_step": TABLE_STEP}
    for cell in CELLS:
        if only in cell.name and (again or cell.name not in result["cells"]):
            result["cells"][cell.name] = row = run_cell(cell)
            _save(result)
            print(
                f"{cell.name}: predicted {_gib(row['predicted']['peak_bytes'])}, live {row['live_error']:+.2%}, "
                f"resident {row['resident_error']:+.2%}",
                flush=True,
            )
    if tables:
        _run_tables(result, again)
    misses = [
        name for name, row in result["cells"].items()
        if abs(row["live_error"]) > TOLERANCE["live"] or abs(row["resident_error"]) > TOLERANCE["resident"]
    ]  # fmt: skip
    print(f"{len(result['cells'])} of {len(CELLS)} cells; outside the tolerance: {misses or 'none'}")


def _run_tables(result: dict[str, Any], again: bool) -> None:
    if again or "8b" not in result:
        row = _in_child("dry_run", "meta-llama/Llama-3.1-8B", "full", None, TABLE_STEP)
        result["8b"] = row | common.commit()
        _save(result)
        print(
            f"8B dry run: {row['seconds']:.1f} s, {row['cpu_seconds']:.1f} s of CPU, {_gib(row['process_peak_bytes'])}"
        )
    for name in CONFIGS:
        rows = result["tables"].setdefault(name, {})
        for mode, ratio, quantization in TABLE_ROWS:
            key = _row_name(mode, ratio, quantization)
            if again or key not in rows:
                rows[key] = dry_run(name, mode, ratio, {**TABLE_STEP, "quantization": quantization})
                _save(result)
                print(f"{name} {key}: {_gib(rows[key]['peak_bytes'])}", flush=True)
    for reading, step in READINGS.items():
        rows = result["tutorial"].setdefault(reading, {})
        for ratio in TUTORIAL:
            if again or str(ratio) not in rows:
                settings = {"batch_size": 4, "dtype": "bfloat16", "optimizer": "adamw_torch_fused", **step}
                rows[str(ratio)] = dry_run("meta-llama/Llama-3.2-3B", "spectrum", ratio, settings)
                _save(result)
                print(f"tutorial, {reading}, {ratio}: {_gib(rows[str(ratio)]['peak_bytes'])}", flush=True)


def _row_name(mode: str, ratio: float | None, quantization: str | None) -> str:
    return " ".join([mode, *([f"{ratio:g}"] if ratio is not None else []), *([quantization] if quantization else [])])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# --- the tables of the documentation ---------------------------------------------------------------------------------

# Tables of docs/memory.md, each between its markers; benchmarks/tables.py writes them there.
TABLES = {
    "memory_accuracy": "accuracy", "memory_8b": "one dry run", "memory_3b": "meta-llama/Llama-3.2-3B",
    "memory_llama_8b": "meta-llama/Llama-3.1-8B", "memory_qwen_7b": "Qwen/Qwen2.5-7B",
    "memory_70b": "meta-llama/Llama-3.1-70B", "memory_tutorial": "tutorial",
}  # fmt: skip


def rows(name: str, data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of one of `TABLES`; without heads, a sentence."""
    what = TABLES[name]
    if what == "accuracy":
        return _accuracy(data["cells"])
    if what == "tutorial":
        return _tutorial(data["tutorial"])
    if what == "one dry run":
        row = data["8b"]
        return [], [
            [
                f"One dry run of Llama-3.1-8B took {row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s of CPU time) and "
                f"{_gib(row['process_peak_bytes'])} of resident memory, Python and its libraries included."
            ]
        ]
    return _modes(data["tables"][what])


def _accuracy(cells: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    heads = ["cell", "predicted", "live, measured", "error", "resident, measured", "error"]
    return heads, [
        [
            name, _gib(row["predicted"]["peak_bytes"]), _gib(row["measured"]["peak_bytes"]), f"{row['live_error']:+.2%}",
            _gib(row["measured"]["resident_bytes"]), f"{row['resident_error']:+.1%}",
        ]
        for name, row in cells.items()
    ]  # fmt: skip


def _modes(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    heads = ["mode", "trains", "peak", "in", "weights", "optimizer", "gradients", "activations and rest"]
    made = []
    for key, row in found.items():
        part = row["by_category"]
        weights = sum(part.get(n, 0) for n in ("weights", "quantized_weights", "adapters"))
        rest = row["peak_bytes"] - weights - part.get("optimizer", 0) - part.get("gradients", 0)
        trains, total = row["trainable_parameters"], row["total_parameters"]
        made.append(
            [
                key, f"{trains / 1e6:,.0f} M ({trains / total:.1%})", _gib(row["peak_bytes"]), row["phase"],
                _gib(weights), _gib(part.get("optimizer", 0)), _gib(part.get("gradients", 0)), _gib(rest),
            ]
        )  # fmt: skip
    return heads, made


def _tutorial(readings: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    heads = ["ratio", *(f"{ratio:g}" for ratio in TUTORIAL)]
    made = [["the tutorial", *(f"{gb} GB" for gb in TUTORIAL.values())]]
    made += [
        [reading, *(f"{found[str(ratio)]['peak_bytes'] / 1e9:.1f} GB" for ratio in TUTORIAL)]
        for reading, found in readings.items()
    ]
    return heads, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="cells whose name contains it, and no tables")
    parser.add_argument("--again", action="store_true", help="run finished cells again")
    parser.add_argument("--tables", action="store_true", help="the tables only, no cells")
    parser.add_argument("--child", nargs=2, metavar=("JOB", "ARGUMENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*options.child)
    else:
        os.environ.update({k: v for k, v in ENVIRONMENT.items() if not k.startswith("MALLOC")})
        run("\0" if options.tables else options.only, options.again, tables=not options.only)


if __name__ == "__main__":
    main()
