"""Long runs and crowded places: what must stay bounded when there is much of something.

    python benchmarks/long.py                                  # about 10 minutes on two cores
    python benchmarks/long.py --parts steps --steps 200

steps: one run in mode `alors` on a tiny model, saved, evaluated and re-evaluated again and again; between them are read what is
allocated, by the C library's own count, and resident memory that no file stands behind, which has free pieces in it, too. A
slope is that of a line through the second half.
control: the same with plain LoRA by peft, without re-evaluation and without this package: what the libraries keep.
adapters: a folder with many adapters of one base; each is scanned and exported in turn in one process, and one is merged.
layers: a model of many narrow blocks through scan, plan, train and merge, each command in its own process, beside one with a
tenth of the blocks.
entries: a plan of many entries, saved and loaded as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np

HIDDEN, INNER = 64, 128
CHARACTERS = 128


def build(folder: Path, layers: int, hidden: int = HIDDEN) -> Path:
    """A random Llama of some blocks, with a tokenizer of one token for each character of ASCII; and rows to train on."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CHARACTERS, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(CHARACTERS)}, unk_token="\x03"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "\x00", "bos_token": "\x01", "eos_token": "\x02", "unk_token": "\x03"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "base")
    rows = [{"text": f"{n} squared is {n * n}"} for n in range(32)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "base"


def command(*words: object) -> None:
    """A command of `spectrum-peft` in this process, without what it prints."""
    from spectrum_peft.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(word) for word in words]) == 0, words


def slope(at: list[int], values: list[int]) -> float:
    """Of the least-squares line through the second half of some readings, units for each step."""
    half = len(at) // 2
    return float(np.polyfit(at[half:], values[half:], 1)[0])


def in_use() -> int:
    """Resident memory that no file stands behind."""
    import psutil

    return common.private() or int(psutil.Process().memory_info().rss)


class _Counts(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33, malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int | None:
    """Bytes that are allocated now and not freed, by glibc's count; None elsewhere. With `COUNTED` in the environment, torch's,
    Python's and arrow's are all among them."""
    counts = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if counts is None:
        return None
    counts.restype = _Counts
    found = counts()
    return int(found.uordblks + found.hblkhd)


COUNTED = {"PYTHONMALLOC": "malloc", "ARROW_DEFAULT_MEMORY_POOL": "system"}


# --- parts -----------------------------------------------------------------------------------------------------------


def steps(folder: Path, steps: int, every: int, ours: bool = True) -> dict[str, Any]:
    """
    Args:
        every: steps from one re-evaluation, and from one saving and evaluation, to the next.
        ours: mode `alors`; else peft's LoRA, which knows nothing of this package.
    """
    import psutil
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from spectrum_peft import SpectrumCallback, SpectrumConfig
    from spectrum_peft.data import read_dataset
    from spectrum_peft.tuner.loading import load_model_with_spectrum

    at: list[int] = []
    memory: list[int] = []
    held: list[int] = []
    files: list[int] = []

    class Reads(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == every // 2:  # between two of them
                at.append(state.global_step)
                memory.append(in_use())
                gc.collect()  # cycles that are not collected yet are no leak
                held.append(allocated() or 0)
                files.append(psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0)

    base = build(folder, layers=4)
    tokenizer = AutoTokenizer.from_pretrained(base)
    callback = SpectrumCallback()
    if ours:
        config = SpectrumConfig(mode="alors", spectrum_ratio=0.5, r=8, rescore_every=every, task_type="CAUSAL_LM")
        model, _ = load_model_with_spectrum(str(base), config, dtype=torch.float32)
    else:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = read_dataset(str(folder / "rows.jsonl"))
    arguments = SFTConfig(
        output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, max_length=32,
        save_strategy="steps", save_steps=every, save_total_limit=2, eval_strategy="steps", eval_steps=every,
        logging_steps=every, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows.select(range(8)), processing_class=tokenizer,
        callbacks=[*([callback] if ours else []), Reads()],
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return {
        "steps": steps,
        "every": every,
        "seconds": trainer.state.log_history[-1]["train_runtime"],
        "re_evaluations": len(callback.history),
        "saved": steps // every,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "at": at,
        "memory": memory,
        "slope_bytes_per_step": slope(at, memory),
        "allocated": held if all(held) else None,
        "allocated_bytes_per_step": slope(at, held) if all(held) else None,
        "open_files": [files[0], max(files)],
    }


def adapters(folder: Path, count: int) -> dict[str, Any]:
    import psutil
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from spectrum_peft.export import export_lora, merge_into_base
    from spectrum_peft.scan import scan_weights

    base = build(folder, layers=4)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    crowd = folder / "adapters"
    model.save_pretrained(crowd / "0")
    for i in range(1, count):
        shutil.copytree(crowd / "0", crowd / str(i))
    del model
    seconds, memory = [], []
    out = folder / "out"
    files = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
    for i in range(count):
        began = time.perf_counter()
        scan_weights(str(crowd / str(i)), "last")
        export_lora(crowd / str(i), out)
        seconds.append(time.perf_counter() - began)
        memory.append(in_use())
        shutil.rmtree(out)
    opened = (psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0) - files
    began = time.perf_counter()
    merge_into_base(crowd / str(count - 1), base, out)
    tenth = max(1, count // 10)
    return {
        "adapters": count,
        "seconds": sum(seconds),
        "first_tenth": common.spread(seconds[:tenth]),
        "last_tenth": common.spread(seconds[-tenth:]),
        "merge_seconds": time.perf_counter() - began,
        "memory": [memory[0], memory[-1]],
        "slope_bytes_per_adapter": slope(list(range(count)), memory),
        "files_left_open": opened,
    }


def layers(folder: Path, count: int) -> dict[str, Any]:
    """Each command for `count` blocks and for a tenth of them."""
    found: dict[str, Any] = {"layers": [count // 10, count], "commands": {}}
    for blocks in found["layers"]:
        here = folder / str(blocks)
        base = build(here, blocks, hidden=32)
        rows, report, run = here / "rows.jsonl", here / "report.json", here / "run"
        train = ["--max-steps", 2, "--per-device-train-batch-size", 2, "--max-length", 32, "--dtype", "float32"]
        train += ["--report-to", "none", "--plan", here / "plan.json"]
        lines: dict[str, list[object]] = {
            "scan": ["scan", base, "-o", report],
            "plan": ["plan", report, "--mode", "alors", "--r", 4, "-o", here / "plan.json"],
            "train, 2 steps": ["train", "--model", base, "--dataset", rows, "--output-dir", run, *train],
            "merge": ["merge", run, "--base", base, "-o", here / "merged"],
        }
        for name, words in lines.items():
            done = common.run_child(
                [sys.executable, "-m", "spectrum_peft", *map(str, words)], env={"PYTHONPATH": str(common.ROOT)}
            )
            assert done.returncode == 0, done.stderr[-2000:]
            row = found["commands"].setdefault(name, {"seconds": [], "cpu_seconds": [], "peak_bytes": []})
            row["seconds"].append(done.seconds)
            row["cpu_seconds"].append(done.cpu_seconds)
            row["peak_bytes"].append(done.peak_bytes)
    return found


def entries(folder: Path, count: int) -> dict[str, Any]:
    from spectrum_peft.records import Plan, PlanEntry

    made = tuple(
        PlanEntry(
            f"model.layers.{i}.mlp.down_proj.weight",
            "lora",
            rank=8,
            alpha=16.0,
            kind="mlp.down_proj",
            shape=(64, 128),
            score=i / 7,
        )
        for i in range(count)
    )
    plan = Plan("lora", made)
    common.reset_peak()
    began = time.perf_counter()
    path = plan.save(folder / "plan.json")
    saved = time.perf_counter()
    assert Plan.load(path) == plan
    return {
        "entries": count,
        "bytes": path.stat().st_size,
        "save_seconds": saved - began,
        "load_seconds": time.perf_counter() - saved,
        "peak_bytes": common.peak_resident(),
    }


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "steps": steps,
    "control": partial(steps, ours=False),
    "adapters": adapters,
    "layers": layers,
    "entries": entries,
}


def measured(part: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """One part in a process of its own: `long.py --only PART`."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out.json")
        words = [sys.executable, __file__, "--only", part, "--output", str(out)]
        words += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        cache = {"SPECTRUM_PEFT_CACHE": f"{scratch}/cache", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        cache |= COUNTED if part in ("steps", "control") else {}
        subprocess.run(words, check=True, env={**os.environ, **cache})
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def run(part: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """One part in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        given = ("steps", "every") if part in ("steps", "control") else (part,)
        return PARTS[part](Path(scratch), *(sizes[name] for name in given))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add("--only", choices=list(PARTS), help="one part, in this process; its figures alone are written")
    sizes = {"steps": 2000, "every": 20, "adapters": 1000, "layers": 400, "entries": 100_000}
    for name, size in sizes.items():
        add(f"--{name}", type=int, default=size)
    add("--output", type=Path, default=common.RESULTS / "long.json")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in sizes}
    if options.only:
        options.output.write_text(json.dumps(run(options.only, sizes)))
        return 0
    machine = common.machine()
    common.warn_if_busy()
    before = json.loads(options.output.read_text()) if options.output.is_file() else {}
    found = {name: before[name] for name in PARTS if name in before}
    for part in options.parts:
        found[part] = measured(part, sizes)
        print(part, json.dumps({k: v for k, v in found[part].items() if k not in ("at", "memory")}), flush=True)
        common.save(options.output, "long", {"machine": machine, "commit": common.commit(), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
