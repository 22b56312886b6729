"""Everything that is to be measured on a GPU, in chunks that each end within eight minutes.

    python benchmarks/gpu.py --list               # the chunks, and what of each is done
    python benchmarks/gpu.py                      # all that is not done, chunk by chunk, what is worth most first
    python benchmarks/gpu.py --minutes 12         # what is done by then
    python benchmarks/gpu.py scan-8b steps-1b-nf4 # these only
    python benchmarks/gpu.py --predict            # the memory that was foreseen, beside what was measured; needs no card
    SPECTRUM_GPU_REHEARSAL=1 python benchmarks/gpu.py   # all of it on the CPU, with very small models: does it run to its end?

A chunk is a list of cells, and a process of its own. Its JSON in benchmarks/results/gpu/ is written after each cell, and the
next run goes on from there: chunks may be run in any order, and stopped. A cell that the time is over for is stopped and noted,
and tried again by the next run; one that fails is a figure (delete its chunk's JSON to try it again).

- `tests`: those that are marked `gpu`, function by function.
- `scan-*`: singular values of every shape in a model by the scan's way, beside `torch.linalg.svdvals` on the same device, and
  the eigenvalues of the Gram matrix on the device and on the CPU.
- `steps-*`: seconds of a step, tokens a second and peak memory of every mode, of PEFT's LoRA (QLoRA on nf4) and of full
  fine-tuning, with random weights made on the device (smollm2: the real ones). The memory that the dry run predicts is added
  at the end, by the CPU.
- `suites`: the suites of benchmarks/quality.py, whole grids, `--jobs` of them side by side; the results are quality-*.json there.

A rehearsal writes into another folder and its figures are no figures: `benchmarks/tables.py` does not read them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
from memory import CONFIGS
from models import folder_of

from spectrum_peft.records import write_text

REHEARSAL = os.environ.get("SPECTRUM_GPU_REHEARSAL") == "1"
OUT = common.ROOT / "gpu_rehearsal" if REHEARSAL else common.RESULTS / "gpu"
LIMIT = 8 * 60.0  # seconds that a chunk may take
LONG = 5.0  # seconds of a run that is not repeated
SHORTEST = 20.0  # a chunk is not begun with less: a process has to start, and a model to be made
ENDING = 12.0  # until all that a chunk has started is gone
BATCH, LENGTH, STEPS = (1, 32, 1) if REHEARSAL else (1, 2048, 8)

_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {  # config.json of meta-llama/Llama-3.2-1B
        **_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "3b": CONFIGS["meta-llama/Llama-3.2-3B"][1],
    "8b": CONFIGS["meta-llama/Llama-3.1-8B"][1],
}  # fmt: skip
_TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
MODELS = ("smollm2", "1b", "8b", "3b")  # in this order
# {contestant: options of SpectrumConfig; None: PEFT's own LoRA}. Scores are random: which matrices train costs the same.
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "full": {"mode": "full"},
    "peft lora": None,
    "spectrum 0.25": {"mode": "spectrum", "spectrum_ratio": 0.25},
    "lora": {"mode": "lora"},
    "spectra_qlora 0.5": {"mode": "spectra_qlora", "spectrum_ratio": 0.5},
    "alors 0.5": {"mode": "alors", "spectrum_ratio": 0.5},
    "columns": {"mode": "columns"},
    "sgm": {"mode": "sgm", "spectrum_ratio": 1.0},
    "lorsa": {"mode": "lorsa", "n_components": 64, "svd_rank": 128},
}
_NEEDS_DATA = ("sgm", "lorsa")


def config_of(model: str) -> Any:
    """transformers' config of a model here, in bfloat16; the tiny one's in a rehearsal."""
    import torch
    import transformers

    if model == "smollm2" and not REHEARSAL:
        return transformers.AutoConfig.from_pretrained(folder_of("smollm2"), dtype=torch.bfloat16)
    fields = _TINY if REHEARSAL else SHAPES[model]
    return transformers.LlamaConfig(**{**fields, "architectures": ["LlamaForCausalLM"]}, dtype=torch.bfloat16)


# --- the scan --------------------------------------------------------------------------------------------------------


def scan_cell(model: str, shape: str) -> dict[str, Any]:
    """One shape's matrix: (median) seconds of each way, and how far the scan's largest value is from svdvals'."""
    import torch

    from spectrum_peft.devices import default_device
    from spectrum_peft.scan.criteria import singular_values
    from spectrum_peft.scan.gram import _torch_gram, without_tf32

    device = default_device()
    rows, columns = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(rows, columns, generator=generator) * 0.02).to(device, torch.bfloat16)
    ours, exact = singular_values(matrix), torch.linalg.svdvals(matrix.float()).double().cpu()
    with without_tf32():
        gram = _torch_gram(matrix, torch.float32, 1.0)
    lower = torch.tril(gram) + torch.tril(gram, -1).T
    return {
        "matrices": sum(1 for s in _shapes(model) if s == (rows, columns)),
        "scan_seconds": timed(lambda: singular_values(matrix)),
        "svdvals_seconds": timed(lambda: torch.linalg.svdvals(matrix.float())),
        "eigenvalues_on_the_device_seconds": timed(lambda: torch.linalg.eigvalsh(lower)),
        "eigenvalues_on_the_cpu_seconds": timed(lambda: torch.linalg.eigvalsh(lower.cpu())),
        "largest_value_apart": float((ours[0] - exact[0]).abs() / exact[0]),
    }


def _shapes(model: str) -> list[tuple[int, int]]:
    from spectrum_peft.memory import report_of_config

    return [m.shape for m in report_of_config(config_of(model)).stats if m.role == "linear"]


def scan_cells(model: str) -> list[str]:
    cells = sorted({f"{rows}x{columns}" for rows, columns in _shapes(model)})
    return [*cells, "whole"] if model == "smollm2" else cells


def whole_scan() -> dict[str, Any]:
    """The real model's files, scanned; the second of two runs, with nothing kept between them."""
    from spectrum_peft import scan_weights

    folder = folder_of("smollm2")
    layers = "0" if REHEARSAL else None
    seconds = [timed(lambda: scan_weights(folder, layers=layers), repeats=1) for _ in range(2)]
    return {"scan_seconds": seconds[1]}


def timed(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of a few runs, after one that is not counted; the device has finished when the clock is read.

    Where one takes long it is the figure: what the first has beside it is little then, and a card's minutes are few.
    """
    import statistics

    from spectrum_peft.devices import synchronize

    found: list[float] = []
    while len(found) < repeats + (repeats > 1):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        found.append(time.perf_counter() - began)
        if found[0] > LONG:
            return found[0]
    return statistics.median(found[repeats > 1 :])


# --- steps -----------------------------------------------------------------------------------------------------------


def made(model: str, settings: Any = None) -> Any:
    """The model in bfloat16 on the device, of random weights unless it is the real one; as `settings` quantize it."""
    import torch
    import transformers

    from spectrum_peft.devices import default_device

    device, config = default_device(), config_of(model)
    torch.manual_seed(0)
    if model == "smollm2" and not REHEARSAL:
        made = transformers.AutoModelForCausalLM.from_pretrained(folder_of("smollm2"), dtype=torch.bfloat16).to(device)
    else:
        with device:
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if settings is None:
        return made
    import bitsandbytes as bnb

    skipped = set(settings.llm_int8_skip_modules)
    for name, module in list(made.named_modules()):
        if type(module) is not torch.nn.Linear or name in skipped or name.rpartition(".")[2] in skipped:
            continue
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                compress_statistics=True,
            )  # fmt: skip
        weight = module.weight.data
        module.weight = None
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
            device
        )
        made.set_submodule(name, layer)
    made.is_loaded_in_4bit = made.is_quantized = True
    made.quantization_method = made.config.quantization_config = settings
    return made


def step_cell(model: str, base: str, checkpointing: bool, name: str) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    from spectrum_peft import SpectrumConfig, make_plan
    from spectrum_peft.devices import default_device, memory_is_measured, peak_memory, reset_peak_memory
    from spectrum_peft.memory import measure_memory, report_of_config
    from spectrum_peft.tuner.loading import made_trainable, quantization_config_for

    device, options = default_device(), CONTESTANTS[name]
    ids = torch.randint(0, config_of(model).vocab_size, (BATCH, LENGTH), device=device)
    batch = {"input_ids": ids, "labels": ids}
    plan, config = None, None
    if options is not None and name in _NEEDS_DATA:
        config = SpectrumConfig(**options, calibration_data=[batch], task_type="CAUSAL_LM")
    elif options is not None:
        plan = make_plan(report_of_config(config_of(model), "random"), **options)
        config = SpectrumConfig(plan=plan, task_type="CAUSAL_LM")
    settings = quantization_config_for(plan, config_of(model), "nf4", torch.bfloat16) if base == "nf4" else None
    loaded = made(model, settings)
    began = time.perf_counter()
    if config is None:
        trained = get_peft_model(
            loaded, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    else:
        trained = made_trainable(loaded, config)
        plan = getattr(trained, "spectrum_plan", None) or trained.peft_config["default"].plan
    prepared = time.perf_counter() - began
    tuner = getattr(trained, "base_model", None)
    if hasattr(tuner, "attended"):
        tuner.attended()
    trained.train()
    trained.config.use_cache = False
    if hasattr(trained, "spectrum_plan"):  # as `train` holds what a plain model trains under autocast
        for parameter in trained.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    if checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    free_memory()
    reset_peak_memory()
    training = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = trained(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(step, STEPS)
    row = {
        "trainable_parameters": sum(p.numel() for p in training),
        "prepared_seconds": prepared,
        "seconds_per_step": seconds,
        "tokens_per_second": BATCH * LENGTH / seconds,
        "peak_bytes": peak_memory() if memory_is_measured() else None,
    }
    if plan is not None:
        if row["peak_bytes"] is None:  # a CPU does not count; the tracker does
            optimizer.state.clear()
            row["peak_bytes"] = measure_memory(trained, plan, **_how(checkpointing)).peak_bytes
        if name in _NEEDS_DATA:  # which cannot be made again without the gradients
            OUT.mkdir(parents=True, exist_ok=True)
            plan.save(_plan_file(model, base, checkpointing, name))
    return row


def _how(checkpointing: bool) -> dict[str, Any]:
    """The step, as `estimate_memory` and `measure_memory` are told of it."""
    return {
        "batch_size": BATCH, "max_length": LENGTH, "optimizer": "adamw_torch_fused", "mixed_precision": "bf16",
        "gradient_checkpointing": checkpointing, "padding": False,
    }  # fmt: skip


def _plan_file(model: str, base: str, checkpointing: bool, name: str) -> Path:
    return OUT / f"plan-{model}-{base}{'-checkpointing' if checkpointing else ''}-{name}.yaml"


def predicted(
    model: str, base: str, checkpointing: bool, name: str, row: Mapping[str, Any], kind: str
) -> dict[str, Any]:
    """What the dry run says of a step that was measured: its peak, and how far that is off.

    Args:
        row: figures of the step. kind: of the device that they are from.
    """
    from spectrum_peft import Plan, estimate_memory, make_plan
    from spectrum_peft.errors import SpectrumError
    from spectrum_peft.memory import report_of_config

    options = CONTESTANTS[name]
    if options is None or row.get("peak_bytes") is None:
        return {}
    if name in _NEEDS_DATA:
        plan = Plan.load(_plan_file(model, base, checkpointing, name))
    else:
        plan = make_plan(report_of_config(config_of(model), "random"), **options)
    try:
        peak = estimate_memory(
            config_of(model), plan, dtype="bfloat16", device="cpu" if kind == "cpu" else "cuda",
            quantization="nf4" if base == "nf4" else None, **_how(checkpointing),
        ).peak_bytes  # fmt: skip
    except SpectrumError as error:
        return {"not_predicted": str(error)}
    return {"predicted_bytes": peak, "error": peak / row["peak_bytes"] - 1}


def predict(names: Sequence[str], end: float) -> int:
    """Add what the dry run says to the figures that have none yet; returns how many are left when the time is over."""
    left = 0
    for name in names:
        at = re.fullmatch(r"steps-(\w+)-(bf16|nf4)(-checkpointing)?", name)
        if at is None or not file_of(name).is_file():
            continue
        data = json.loads(file_of(name).read_text())
        for cell, row in data["cells"].items():
            if (
                row.get("peak_bytes") is None
                or {"predicted_bytes", "not_predicted"} & set(row)
                or CONTESTANTS[cell] is None
            ):
                continue
            if time.monotonic() > end:
                left += 1
                continue
            row |= predicted(at[1], at[2], bool(at[3]), cell, row, data["kind"])
            write_text(file_of(name), json.dumps(data, indent=1, allow_nan=False) + "\n")
    return left


def free_memory() -> None:
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


# --- tests and quality: processes of their own, which say how far they are ----------------------------------------------

_STOPPED = {"stopped": "the chunk's time was over"}


@contextmanager
def _group(words: Sequence[str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """A process and all that it starts; they end with the block, so that none stays on the card."""
    with subprocess.Popen(words, text=True, start_new_session=True, cwd=common.ROOT, **how) as child:
        try:
            yield child
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, sign)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(5)


def _lines(output: Any, end: float) -> Iterator[str]:
    """Lines as they come, until there are no more.

    Raises:
        TimeoutError: the time is over.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in output:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.05, end - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield line


def test_cells() -> list[str]:
    """Functions of tests/gpu, and other files with tests that are marked; a rehearsal runs the former."""
    folder = common.ROOT / "tests"
    cells = []
    for path in sorted((folder / "gpu").glob("test_*.py")):
        name = path.relative_to(common.ROOT).as_posix()
        cells += [f"{name}::{function}" for function in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]
    if not REHEARSAL:
        others = (p for p in sorted(folder.glob("*/test_*.py")) if p.parent.name not in ("gpu", "benchmarks"))
        cells += [p.relative_to(common.ROOT).as_posix() for p in others if "pytest.mark.gpu" in p.read_text()]
    return cells


def run_tests(cells: Sequence[str], end: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells of `test_cells` and how many tests of each passed, failed and were skipped, from one process."""
    marked = "not gpu and not slow" if REHEARSAL else "gpu"
    words = [sys.executable, "-m", "pytest", "-v", "-rf", "-p", "no:cacheprovider", "-m", marked, *cells]
    rows = {cell: {"passed": 0, "failed": 0, "skipped": 0, "said": []} for cell in cells}
    current, last = None, ""
    with _group(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        try:
            for line in _lines(child.stdout, end):
                last = line.strip() or last
                if (at := re.match(r"(FAILED|ERROR) (\S+(?: \S+)*?) - (.*)", line)) is not None:
                    if (cell := _cell_of(at[2], rows)) is not None:
                        rows[cell]["said"].append(f"{at[2].rpartition('::')[2]}: {at[3]}"[:300])
                elif (at := re.match(r"(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)) is not None:
                    current = _cell_of(at[1], rows)
                    if current is not None:
                        rows[current][{"ERROR": "failed"}.get(at[2], at[2].lower())] += 1
        except TimeoutError:
            seen = list(rows)[: list(rows).index(current)] if current is not None else []
            for cell in cells:
                yield cell, rows[cell] if cell in seen else dict(_STOPPED)
            return
        code = child.wait()
    for cell in cells:
        yield cell, rows[cell] if code in (0, 1, 5) else {"failed": last[:300]}


def _cell_of(test: str, cells: Mapping[str, Any]) -> str | None:
    file, _, function = test.partition("::")
    return next((cell for cell in (f"{file}::{function.partition('[')[0]}", file) if cell in cells), None)


def run_suites(jobs: int, data: Path | None, names: Sequence[str], end: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Go on with suites, `jobs` of them at a time; what their cells found is kept in the work folder."""
    from quality import DATA, SUITES, TOPICS

    folder = data or DATA
    absent = {n for n in names if SUITES[n].data != TOPICS and not (folder / SUITES[n].data / "train.jsonl").is_file()}
    for name in sorted(absent):
        yield name, {"stopped": f"no dataset {SUITES[name].data} in {folder}; --data names the folder"}
    names = [name for name in names if name not in absent]
    if not names:
        return
    words = [sys.executable, str(common.ROOT / "benchmarks" / "quality.py"), *names, "-o", str(OUT)]
    words += ["--work", str(common.ROOT / "quality_runs_gpu"), "--jobs", str(jobs)]
    words += [] if data is None else ["--data", str(data)]
    if REHEARSAL:  # a cell there takes a minute; that the suites, their data and their grids are found is what is tried
        words.append("--list")
    left = list(names)
    with tempfile.TemporaryFile("w+") as said, _group(words, stdout=said, stderr=said) as child:
        while left:
            ended = child.poll()
            for name in [n for n in left if (OUT / f"quality-{n}.json").is_file()]:
                left.remove(name)
                yield name, {"finished": True}
            if ended is not None or time.monotonic() > end:
                break
            time.sleep(0.2)
        said.seek(0)
        lines = said.read().strip().splitlines() or [""]
    for name in left:
        listed = [line for line in lines if line.split()[:1] == [name]] if REHEARSAL else []
        if ended is None:
            yield name, dict(_STOPPED)
        elif ended == 0 and listed:
            yield name, {"listed": listed[0]}
        else:  # to be tried again: its finished cells are kept
            yield name, {"stopped": f"ended with {ended}: {lines[-1][:300]}"}


# --- chunks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A part of the measurements with a JSON of its own.

    Attributes:
        cells: makes their names.
        run: a cell's figures; runs in a process that serves one chunk.
        together: (cells, end) to figures as they come, of cells that one process of another kind runs; instead of `run`.
    """

    cells: Callable[[], list[str]]
    run: Callable[[str], dict[str, Any]] = lambda cell: {}
    together: Callable[[list[str], float], Iterator[tuple[str, dict[str, Any]]]] | None = None


def _contestants(model: str, base: str) -> list[str]:
    """All of them; a rehearsal tries each on one model, and the others with two."""
    tried = CONTESTANTS if not REHEARSAL or model == MODELS[0] else ("full", "lora")
    return [name for name in tried if base == "bf16" or name != "full"]


def _chunks(jobs: int = 1, data: Path | None = None) -> dict[str, Chunk]:
    """All of them, what is worth most first.

    Args:
        jobs: suites side by side. data: folder of their datasets; None for that of benchmarks/quality.py.
    """
    from quality import SUITES

    found: dict[str, Chunk] = {"tests": Chunk(test_cells, together=run_tests)}

    def steps(model: str, base: str, checkpointing: bool) -> None:
        found[f"steps-{model}-{base}{'-checkpointing' if checkpointing else ''}"] = Chunk(
            lambda: _contestants(model, base), lambda cell: step_cell(model, base, checkpointing, cell)
        )

    def scan(model: str) -> None:
        found[f"scan-{model}"] = Chunk(
            lambda: scan_cells(model), lambda cell: whole_scan() if cell == "whole" else scan_cell(model, cell)
        )

    for (
        model
    ) in MODELS:  # so that every table has figures early; the scan of the larger ones is slow where torch's own is
        for base in ("bf16", "nf4"):
            steps(model, base, True)
        if model in ("smollm2", "1b"):
            scan(model)
    for model in MODELS[2:]:
        scan(model)
    for model in MODELS:
        for base in ("bf16", "nf4"):
            steps(model, base, False)
    found["suites"] = Chunk(lambda: list(SUITES), together=partial(run_suites, jobs, data))
    return found


def file_of(chunk: str) -> Path:
    return OUT / f"{chunk}.json"


def kept(chunk: str) -> dict[str, Any]:
    """{cell: its figures} of the runs before; those that were stopped are to be tried again."""
    path = file_of(chunk)
    cells = json.loads(path.read_text())["cells"] if path.is_file() else {}
    return {name: row for name, row in cells.items() if "stopped" not in row}


def run_chunk(name: str, chunk: Chunk, limit: float) -> bool:
    """Go on with a chunk until it is done or the time is over; whether it is done."""
    end, done = time.monotonic() + limit, kept(name)
    todo = [cell for cell in chunk.cells() if cell not in done]
    while todo and time.monotonic() < end:
        for cell, row in (chunk.together or partial(_served, name))(list(todo), end):
            todo.remove(cell)
            done[cell] = row
            _write(name, done)
            print(f"{name} {cell}: {_brief(row)}", flush=True)
        if chunk.together is not None:  # which has said something of each
            break
    return not todo and all("stopped" not in row for row in done.values())


def _served(name: str, cells: Sequence[str], end: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells and their figures from one process, until all are done, the process dies (which is the cell's figure) or the time
    is over. Starting a process and a GPU's context takes as long as many a cell."""
    words = [sys.executable, str(Path(__file__).resolve()), "--serve", name, *cells]
    with tempfile.TemporaryFile("w+") as said, _group(words, stdout=subprocess.PIPE, stderr=said) as child:
        figures = (line.removeprefix(_MARK) for line in _lines(child.stdout, end) if line.startswith(_MARK))
        for cell in cells:
            try:
                line = next(figures, None)
            except TimeoutError:
                yield cell, dict(_STOPPED)
                return
            if line is None:
                if child.wait() == 0:  # it gave up after the cell before; the others are for the next one
                    return
                said.seek(0)
                text = said.read().strip().splitlines()
                yield cell, {"failed": text[-1][:300] if text else f"exit {child.returncode}"}
                return
            yield cell, json.loads(line)


def _serve(chunk: Chunk, cells: Sequence[str]) -> None:
    """Run cells one after the other; what fails, memory that is full above all, is a figure, too."""
    for cell in cells:
        try:
            row = chunk.run(cell)
        except Exception as error:
            kind = type(error).__name__
            full = kind == "OutOfMemoryError"
            row = {"failed": "out of memory" if full else f"{kind}: {' '.join(str(error).split())}"[:300]}
            if kind == "AcceleratorError":  # after which a process can do nothing more on its card
                print(_MARK + json.dumps(row, allow_nan=False), flush=True)
                return
        print(_MARK + json.dumps(row, allow_nan=False), flush=True)
        free_memory()


_MARK = "cell: "  # before a line of figures, among whatever libraries print


def _write(name: str, cells: Mapping[str, Any]) -> None:
    import torch

    from spectrum_peft.devices import default_device, name_of

    device = default_device()
    facts = {"device": name_of(device), "kind": device.type, "torch": torch.__version__, "rehearsal": REHEARSAL}
    settings = {"batch_size": BATCH, "max_length": LENGTH, "steps": STEPS}
    OUT.mkdir(parents=True, exist_ok=True)
    common.save(
        file_of(name), "gpu", {"chunk": name, **facts, **common.commit(), "settings": settings, "cells": dict(cells)}
    )


def _brief(row: Mapping[str, Any]) -> str:
    shown = [row.get(name) for name in ("failed", "stopped", "said") if row.get(name)]
    for name in ("scan_seconds", "seconds_per_step"):
        if row.get(name) is not None:
            shown.append(f"{row[name]:.3g} s")
    return ", ".join(map(str, shown)) or "done"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chunks", nargs="*", metavar="CHUNK", help="default: all")
    parser.add_argument("--list", action="store_true", help="say what there is and what is done; run nothing")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a chunk may take")
    parser.add_argument(
        "--minutes", type=float, help="that all chunks together may take; what is not done by then is left"
    )
    parser.add_argument("--jobs", type=int, default=8, help="suites of benchmarks/quality.py side by side")
    parser.add_argument("--data", type=Path, help="folder of their datasets; default: that of benchmarks/quality.py")
    parser.add_argument(
        "--predict", action="store_true", help="add the dry run's memory to what was measured; nothing else"
    )
    parser.add_argument("--serve", nargs="+", metavar="CELL", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    end = time.monotonic() + (float("inf") if options.minutes is None else 60 * options.minutes)
    chunks = _chunks(options.jobs, options.data)
    if options.serve:
        _serve(chunks[options.serve[0]], options.serve[1:])
        return 0
    for name in options.chunks:
        if name not in chunks:
            parser.error(f"{name!r} is no chunk; there are {', '.join(chunks)}")
    names = options.chunks or list(chunks)
    if options.list:
        for name in names:
            cells = chunks[name].cells()
            print(f"{name:<36} {sum(c in kept(name) for c in cells):3d} of {len(cells)} cells")
        return 0
    if options.predict:
        print(f"{predict(names, end)} figures are left without the dry run's")
        return 0
    from spectrum_peft.devices import default_device

    if default_device().type == "cpu" and not REHEARSAL:
        parser.error("no accelerator here; SPECTRUM_GPU_REHEARSAL=1 tries all of it on the CPU with very small models")
    left = []
    for name in names:
        limit = min(options.limit, end - time.monotonic() - ENDING)
        if name == "tests" and options.minutes is not None and len(names) > 1:  # the figures are to have their part
            limit = min(limit, 20 * options.minutes)
        if limit < SHORTEST or not run_chunk(name, chunks[name], limit):
            left.append(name)
    unforeseen = predict(names, end)
    print(
        f"{len(names) - len(left)} of {len(names)} chunks are done"
        + (f"; to go on with: {', '.join(left)}" if left else "")
        + (f"; {unforeseen} figures want gpu.py --predict, on any machine" if unforeseen else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
