"""How long a merge takes beside copying the same files, and how much memory it needs.

    python benchmarks/merge.py                      # Llama-3.2-1B's shapes in bfloat16, about 6 GB of disk, a minute
    python benchmarks/merge.py --layers 2 --repeats 1

A synthetic checkpoint is written to a temporary folder, with a LoRA (rank 16, float32) on every second matrix and an
adapter with real weights (float32) on every fourth. Each merge, and each copy, runs in a process of its own; in every
round all of them run once, in an order that turns. Files are in the page cache: the copy is then limited by memory and
by the file system's own work, which is the hardest case for the merge. What is timed ends when the call returns; the
time with the flush to the disk is given beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import torch

from spectrum_peft.records import write_text
from spectrum_peft.weights import open_weights
from spectrum_peft.weights.writer import SafetensorsWriter, header_bytes

HIDDEN, INNER, KEY_VALUE, VOCABULARY, RANK, ALPHA = 2048, 8192, 512, 128256, 16, 32
LIMIT = 2**30  # bytes above the interpreter's; the goal
TIMES = ("seconds", "seconds_with_flush", "cpu_seconds")
Shape = tuple[int, ...]


def shapes_of(layers: int) -> dict[str, Shape]:
    """Names and shapes of Llama-3.2-1B with fewer or all of its 16 blocks; the head is tied."""
    result: dict[str, Shape] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}"
        attention = {"q_proj": HIDDEN, "k_proj": KEY_VALUE, "v_proj": KEY_VALUE, "o_proj": HIDDEN}
        result |= {f"{block}.self_attn.{leaf}.weight": (rows, HIDDEN) for leaf, rows in attention.items()}
        result |= {f"{block}.mlp.{leaf}_proj.weight": (INNER, HIDDEN) for leaf in ("gate", "up")}
        result[f"{block}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        result |= {f"{block}.{leaf}.weight": (HIDDEN,) for leaf in ("input_layernorm", "post_attention_layernorm")}
    return result | {"model.norm.weight": (HIDDEN,)}


def write_random(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, scale: float) -> int:
    """A safetensors file of random values, one tensor in memory at a time; returns the size of the data in bytes."""
    generator = torch.Generator().manual_seed(0)
    layout = {name: (dtype, shape) for name, shape in shapes.items()}
    size = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
    # Random numbers are slow to draw; a tensor takes a window of one long row of them.
    pool = (torch.randn(1 << 22, generator=generator) * scale).to(dtype)
    with SafetensorsWriter(path, header_bytes(layout, {"format": "pt"}, layout), size) as writer:
        at = 0
        for i, shape in enumerate(shapes.values()):
            numel = math.prod(shape)
            rolled = pool.roll(i * 977)
            writer.write(rolled.repeat(-(-numel // len(pool)))[:numel], at)
            at += numel * dtype.itemsize
    return size


def make(folder: Path, layers: int) -> dict[str, Any]:
    """The checkpoint and both adapters; returns what was made."""
    shapes = shapes_of(layers)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and "layers" in name]
    base = folder / "base"
    base.mkdir()
    size = write_random(base / "model.safetensors", shapes, torch.bfloat16, 0.02)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    write_text(base / "config.json", json.dumps(config))
    chosen, real = matrices[::2], matrices[::4]
    factors: dict[str, Shape] = {}
    for name in chosen:
        rows, columns = shapes[name]
        module = "base_model.model." + name.removesuffix(".weight")
        factors |= {f"{module}.lora_A.weight": (RANK, columns), f"{module}.lora_B.weight": (rows, RANK)}
    held = {f"base_model.model.{n.removesuffix('weight')}lora_spectrum.weight": shapes[n] for n in real}
    for name, kind, tensors in (("lora", "LORA", factors), ("real_weights", "SPECTRUM", held)):
        adapter = folder / name
        adapter.mkdir()
        fields = {"peft_type": kind, "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": str(base)}
        write_text(adapter / "adapter_config.json", json.dumps(fields))
        write_random(adapter / "adapter_model.safetensors", tensors, torch.float32, 0.02)
    numel = sum(math.prod(shape) for shape in shapes.values())
    return {
        "parameters": numel,
        "layers": layers,
        "base_bytes": size,
        "matrices": len(matrices),
        "lora": {"matrices": len(chosen), "rank": RANK},
        "real_weights": {
            "matrices": len(real),
            "share_of_parameters": sum(math.prod(shapes[n]) for n in real) / numel,
        },
    }


_PRELUDE = "import os, sys, time, json; sys.path.insert(0, {root!r}); "
_TIMED = (
    "began, cpu = time.perf_counter(), time.process_time(); {call}; "
    "called, cpu = time.perf_counter() - began, time.process_time() - cpu; "
    "os.sync(); print(json.dumps([called, time.perf_counter() - began, cpu, {result}]))"
)
PROGRAMS = {
    # What any process with torch and this package takes before it does anything.
    "interpreter": "import spectrum_peft.export",
    # The fastest that Python has: the kernel copies.
    "copy": "import shutil; " + _TIMED.format(call="shutil.copytree({base!r}, {out!r})", result="None"),
    **{
        name: "from spectrum_peft.export import merge_into_base; "
        + _TIMED.format(call=f"r = merge_into_base({{folder!r}} + '/{name}', None, {{out!r}})", result="r.rounding")
        for name in ("lora", "real_weights")
    },
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """One program in a process of its own."""
    out = folder / "out"
    code = (_PRELUDE + PROGRAMS[name]).format(
        root=str(common.ROOT), base=str(folder / "base"), folder=str(folder), out=str(out)
    )
    os.sync()
    other = common.OtherLoad()
    child = common.run_child([sys.executable, "-c", code])
    if child.returncode:
        raise SystemExit(f"{name} failed:\n{child.stderr}")
    result: dict[str, Any] = {"peak_bytes": child.peak_bytes, "other_load_cores": other.cores(child.cpu_seconds)}
    if child.stdout:
        result |= zip((*TIMES, "rounding"), json.loads(child.stdout), strict=True)
    if name in ("lora", "real_weights"):
        check(name, folder)
    shutil.rmtree(out, ignore_errors=True)
    return result


def check(name: str, folder: Path) -> None:
    """That the merge computed what it should: three tensors by another formula, one frozen tensor by its bytes."""
    base, merged = open_weights(folder / "base"), open_weights(folder / "out")
    from safetensors import safe_open

    with safe_open(folder / name / "adapter_model.safetensors", "pt") as file:
        keys = [k for k in file.keys() if "lora_B" not in k]
        for key in (keys[0], keys[len(keys) // 2], keys[-1]):
            target = key.removeprefix("base_model.model.").replace("lora_spectrum.", "").replace("lora_A.", "")
            if name == "lora":
                a, b = (file.get_tensor(key.replace("lora_A", f"lora_{x}")).double() for x in "AB")
                exact = base.read(target).double() + ALPHA / RANK * (b @ a)
            else:
                exact = file.get_tensor(key).double()
            off = (merged.read(target).double() - exact).abs()
            best = (exact.bfloat16().double() - exact).abs()
            assert bool((off <= best + 1e-7).all()), f"{name}: {target} is off by {float(off.max())}"
    frozen = "model.layers.0.input_layernorm.weight"
    assert torch.equal(base.read(frozen).view(torch.int16), merged.read(frozen).view(torch.int16)), frozen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="blocks of the synthetic checkpoint; 16 is the 1B shape")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; default: the system's")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS / "merge.json")
    options = parser.parse_args()
    common.warn_if_busy()
    facts = common.machine()
    with tempfile.TemporaryDirectory(prefix="merge_benchmark_", dir=options.folder) as scratch:
        folder = Path(scratch)
        made = make(folder, options.layers)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PROGRAMS}
        order = list(PROGRAMS)
        for i in range(options.repeats):
            for name in order[i % len(order) :] + order[: i % len(order)]:
                runs[name].append(run(name, folder))
    result = {"machine": facts, "checkpoint": made, "page_cache": "warm", "repeats": options.repeats, **summary(runs)}
    common.save(options.output, "merge", result)
    print_table(result)
    print(f"wrote {options.output}")


def summary(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    interpreter = max(r["peak_bytes"] for r in runs["interpreter"])
    rows = {}
    for name, measured in runs.items():
        row: dict[str, Any] = {"peak_bytes": max(r["peak_bytes"] for r in measured)}
        row["above_interpreter_bytes"] = row["peak_bytes"] - interpreter
        row["other_load_cores"] = [r["other_load_cores"] for r in measured]
        for key in TIMES:
            if key in measured[0]:
                row[key] = common.spread([r[key] for r in measured])
                row[f"{key}_over_copy"] = row[key]["median"] / common.spread([r[key] for r in runs["copy"]])["median"]
        if name in ("lora", "real_weights"):
            row["rounding"] = measured[0]["rounding"]
            row["memory_goal_met"] = row["above_interpreter_bytes"] < LIMIT
        rows[name] = row
    return {"runs": rows}


def print_table(result: Mapping[str, Any]) -> None:
    made = result["checkpoint"]
    print(f"{made['parameters'] / 1e9:.2f} billion parameters, {made['base_bytes'] / 2**30:.2f} GiB in bfloat16")
    titles = ("seconds", "with flush", "cpu")
    print(f"{'':14}" + "".join(f"{title:>12}{'over copy':>11}" for title in titles) + f"{'peak MiB':>10}{'above':>8}")
    for name, row in result["runs"].items():
        memory = f"{row['peak_bytes'] / 2**20:>10.0f}{row['above_interpreter_bytes'] / 2**20:>8.0f}"
        if "seconds" not in row:
            print(f"{name:14}{'':69}{memory}")
            continue
        times = "".join(f"{row[key]['median']:>12.2f}{row[f'{key}_over_copy']:>11.2f}" for key in TIMES)
        print(f"{name:14}{times}{memory}")


if __name__ == "__main__":
    main()
