"""Step time, bytes and memory of the modes, side by side: what choosing by spectrum saves, beside full tuning and LoRA.

    python benchmarks/modes.py                # SmolLM2-135M and a Llama of 350M random weights
    python benchmarks/modes.py --quick        # one repeat of few steps, SmolLM2-135M only

Contestants that are compared are alive at once, each in a process of its own, and take their steps in turn, in a new
random order each round: a machine that slows down slows all of them. A ratio of times is the median over the rounds of
a repeat, each round's two steps divided, then the median over the repeats; its spread is the least and the greatest
repeat. Bytes are counted from the tensors, and memory is what the kernel counts for the process. All products are in
float32.

A finished comparison is kept in the cache folder and not run again until code, settings, versions or machine change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
from models import folder_of
from tensors import SavedForBackward, storages, weight_tensors
from turns import ContestantFailed, Runner, Turn, context, start

BATCH, LENGTH, WARMUP = 2, 128, 1


RANK = 16


MODELS = ("smollm2-135m", "llama-350m")
TITLES = {"smollm2-135m": "SmolLM2-135M", "llama-350m": "Llama-350M (random weights)"}


# Loaded once by the process that the contestants are forked from; importing them takes longer than most steps.
_PRELOADED = [
    "torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "spectrum_peft.tuner.loading"
]  # fmt: skip


_PRELOADED_SFT = ["datasets", "trl", "spectrum_peft.train.callback"]


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        options: of `SpectrumConfig`; None trains PEFT's own `LoraConfig` on every linear layer, without the callback.
        nf4: the base is in 4 bit.
        sft: by `SFTTrainer` with its defaults (gradient checkpointing on), else by a plain loop without checkpointing.
        old_cpu: oneDNN, which computes the products, may not use the CPU's instructions for bfloat16.
    """

    options: Mapping[str, Any] | None
    nf4: bool = False
    sft: bool = False
    old_cpu: bool = False


_HALF = {"mode": "spectra_qlora", "spectrum_ratio": 0.5}


_QUARTER = {"mode": "spectrum", "spectrum_ratio": 0.25}


_ALORS = {"mode": "alors", "spectrum_ratio": 0.5}


# What is in one group is timed side by side.
GROUPS: dict[str, dict[str, Contestant]] = {
    "real weights": {
        "full": Contestant({"mode": "full"}),
        "spectrum 0.25": Contestant(_QUARTER),
        "spectrum 0.25, upper half": Contestant({**_QUARTER, "backward_depth": 0.5}),
        "spectrum 0.25, nf4": Contestant(_QUARTER, nf4=True),
    },
    "adapters": {
        "LoRA of peft": Contestant(None),
        "lora": Contestant({"mode": "lora"}),
    },
    "4-bit base": {
        "lora, nf4": Contestant({"mode": "lora"}, nf4=True),
        "spectra_qlora 0.5": Contestant(_HALF, nf4=True),
        "spectra_qlora 0.5, upper half": Contestant({**_HALF, "backward_depth": 0.5}, nf4=True),
        "alors 0.5": Contestant(_ALORS, nf4=True),
    },
    "SFTTrainer": {
        "LoRA of peft, SFT": Contestant(None, nf4=True, sft=True),
        "lora, SFT": Contestant({"mode": "lora"}, nf4=True, sft=True),
        "spectra_qlora 0.5, SFT": Contestant(_HALF, nf4=True, sft=True),
        "spectra_qlora 0.5, upper half, SFT": Contestant({**_HALF, "backward_depth": 0.5}, nf4=True, sft=True),
        "alors 0.5, SFT": Contestant(_ALORS, nf4=True, sft=True),
        "alors 0.5 re-evaluated, SFT": Contestant({**_ALORS, "rescore_every": "once"}, nf4=True, sft=True),
    },
    "SFTTrainer without bfloat16 instructions": {
        "LoRA of peft, SFT, no bf16 CPU": Contestant(None, nf4=True, sft=True, old_cpu=True),
        "lora, SFT, no bf16 CPU": Contestant({"mode": "lora"}, nf4=True, sft=True, old_cpu=True),
    },
}


@dataclass(frozen=True)
class Settings:
    """What decides the figures, besides code, versions and machine."""

    steps: int
    warmup: int = WARMUP
    batch: int = BATCH
    length: int = LENGTH
    rank: int = RANK
    dtype: str = "float32"
    optimizer: str = "adamw_torch_fused"
    quantization: str = "nf4, double quantization, products in float32"
    seed: int = 0

    @property
    def rounds(self) -> int:
        """Steps of a contestant: warm-up, timed ones, and one whose tensors are counted."""
        return self.warmup + self.steps + 1


def contest(pipe: Any, folder: str, report: str, contestant: Contestant, settings: Settings) -> None:
    """Train one contestant, step by step as the pipe says; then send what was counted. Runs in a process of its own."""
    if contestant.old_cpu:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # read at the first product of the process
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    try:
        before = common.resident()
        torch.manual_seed(settings.seed)
        train = by_sft_trainer if contestant.sft else by_plain_loop
        facts = train(Turn(pipe), folder, report, contestant, settings)
        pipe.send({"facts": {"interpreter_bytes": before, "threads": torch.get_num_threads(), **facts}})
    except BaseException:
        pipe.send({"error": traceback.format_exc()})
        raise


def spectrum_config(contestant: Contestant, report: str, settings: Settings) -> Any:
    from spectrum_peft.tuner.config import SpectrumConfig

    options = dict(contestant.options or {})
    if options.get("rescore_every") == "once":
        options["rescore_every"] = settings.rounds // 2 + 1
    # keep_base: no second copy in memory, and an error if the checkpoint could not give the originals back.
    return SpectrumConfig(
        **options, report=report, r=settings.rank, lora_alpha=2 * settings.rank, keep_base="file", task_type="CAUSAL_LM"
    )


def lora_config(settings: Settings) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def learning_rate(contestant: Contestant) -> float:
    """The mode's own default."""
    from spectrum_peft.plan import LONG_RUN, MODES

    return MODES["lora" if contestant.options is None else contestant.options["mode"]].rate_for(LONG_RUN)


def load_base(folder: str, nf4: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from spectrum_peft.tuner.loading import quantization_config_for

    kwargs = {}
    if nf4:
        kwargs["quantization_config"] = quantization_config_for(None, folder, "nf4", torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def by_plain_loop(turn: Turn, folder: str, report: str, contestant: Contestant, settings: Settings) -> dict[str, Any]:
    """Forward, backward, AdamW, zero_grad; no gradient checkpointing."""
    import torch
    from peft import get_peft_model

    from spectrum_peft.train.optim import parameter_groups
    from spectrum_peft.tuner.loading import load_model_with_spectrum

    rate = learning_rate(contestant)
    if contestant.options is None:
        model = get_peft_model(load_base(folder, contestant.nf4), lora_config(settings))
        groups: Any = [p for p in model.parameters() if p.requires_grad]
    else:
        model, _ = load_model_with_spectrum(
            folder,
            spectrum_config(contestant, report, settings),
            dtype=torch.float32,
            quantization="nf4" if contestant.nf4 else None,
        )
        groups = parameter_groups(model, lr=rate)
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, fused=True)
    model.train()
    batches = token_batches(folder, settings)
    facts = memory_when_loaded()
    turn.pipe.send("ready")

    for batch in batches[:-1]:
        turn.wait()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turn.done()

    facts["peak_bytes"] = common.peak_resident()
    turn.wait()
    saved = SavedForBackward(model)
    with saved:
        loss = model(input_ids=batches[-1], labels=batches[-1], use_cache=False).loss
    facts["activation_bytes"] = saved.bytes
    loss.backward()
    return facts | counted(model, optimizer)


def by_sft_trainer(turn: Turn, folder: str, report: str, contestant: Contestant, settings: Settings) -> dict[str, Any]:
    """`SFTTrainer` as a user calls it: `peft_config`, its own gradient checkpointing, our callback for our config."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from spectrum_peft.train.callback import SpectrumCallback

    disable_progress_bars()
    facts: dict[str, Any] = {}
    counting = settings.warmup + settings.steps  # index of the step whose tensors are counted

    class Before(TrainerCallback):
        """Notes when a step is over, before the callbacks that follow it."""

        at = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.at = time.perf_counter()

    class Gate(TrainerCallback):
        """Holds the trainer between two steps until it is this contestant's turn."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            facts.update(memory_when_loaded())
            turn.pipe.send("ready")
            turn.wait()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == counting:  # the gradients are still there
                facts.update(counted(kwargs["model"], kwargs["optimizer"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > counting:
                return
            turn.done(hooks=time.perf_counter() - before.at)
            if state.global_step == counting:
                facts["peak_bytes"] = common.peak_resident()
            turn.wait()

    class Trainer(SFTTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step < counting:
                return super().compute_loss(model, *args, **kwargs)
            saved = SavedForBackward(model)
            with saved:
                result = super().compute_loss(model, *args, **kwargs)
            facts["activation_bytes"] = saved.bytes
            return result

    ours = contestant.options is not None
    before = Before()
    model = load_base(folder, contestant.nf4)
    tokens = torch.cat(token_batches(folder, settings))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=settings.rounds,
                per_device_train_batch_size=settings.batch,
                max_length=settings.length,
                learning_rate=learning_rate(contestant),
                seed=settings.seed,
                bf16=False,
                use_cpu=True,
                optim=settings.optimizer,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=spectrum_config(contestant, report, settings) if ours else lora_config(settings),
            callbacks=[before, *([SpectrumCallback()] if ours else []), Gate()],
        )
        assert trainer.args.gradient_checkpointing
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return facts


def memory_when_loaded() -> dict[str, Any]:
    """Resident memory before the first step, and its peak so far; the peak then begins again, to be that of training.

    Pages of the checkpoint's file count while they are mapped, also those of weights that were quantized since.
    """
    facts = {"loading_peak_bytes": common.peak_resident(), "loaded_bytes": common.resident()}
    common.reset_peak()
    return facts


def token_batches(folder: str, settings: Settings) -> list[Any]:
    """The same batches for every contestant: text about Python in the checkpoint's own tokens, no padding.

    Returns:
        `settings.rounds` tensors (batch, length), int64.
    """
    import torch
    from transformers import AutoTokenizer

    from spectrum_peft.demo import topics

    wanted = settings.rounds * settings.batch * settings.length
    ids = AutoTokenizer.from_pretrained(folder)("\n".join(topics()[0]), verbose=False)["input_ids"]
    ids *= -(-wanted // len(ids))
    return list(torch.tensor(ids[:wanted]).reshape(settings.rounds, settings.batch, settings.length))


def counted(model: Any, optimizer: Any) -> dict[str, Any]:
    """Bytes of weights, trainable weights, gradients and optimizer state, while gradients are there."""
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    state = (v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor))
    return {
        "trainable_parameters": sum(p.numel() for p in trainable),
        "trainable_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trainable}),
        "weight_bytes": sum(storages(weight_tensors(model)).values()),
        "trainable_bytes": sum(storages(iter(trainable)).values()),
        "gradient_bytes": sum(storages(p.grad for p in trainable if p.grad is not None).values()),
        "optimizer_bytes": sum(storages(state).values()),
    }


# --- models ----------------------------------------------------------------------------------------------------------


def prepare(pipe: Any, name: str) -> None:
    """Find or make a checkpoint and its scan; sends (folder, report file). Runs in a process of its own."""
    from spectrum_peft.scan import cache_folder, scan_weights

    folder = folder_of("smollm2" if name == "smollm2-135m" else name)
    report = cache_folder() / "benchmarks" / f"report-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}.json"
    scan_weights(str(folder), cache=True).save(report)
    pipe.send((str(folder), str(report)))


def preload(groups: Sequence[str] = ()) -> list[str]:
    """What the contestants of some groups import."""
    sft = any(contestant.sft for group in groups for contestant in GROUPS[group].values())
    return _PRELOADED + (_PRELOADED_SFT if sft else [])


def compare(
    ctx: Any, folder: str, report: str, contestants: Mapping[str, Contestant], settings: Settings, order_seed: str
) -> dict[str, Any]:
    """Let some contestants take their steps in turn.

    Returns:
        {"other_load_cores", "contestants": {name: facts with the seconds of each timed step}}.
    """
    runners = []
    try:
        for name, contestant in contestants.items():
            runner = Runner(name, *start(ctx, contest, folder, report, contestant, settings))
            runners.append(runner)
            runner.receive()  # ready
        order = random.Random(order_seed)
        load = common.OtherLoad()
        for _ in range(settings.rounds - 1):
            for runner in order.sample(runners, len(runners)):
                runner.turns.append(runner.turn())
        busy = load.cores(sum(turn["cpu"] for runner in runners for turn in runner.turns))
        results = {}
        for runner in runners:
            timed = runner.turns[settings.warmup :]
            facts = runner.last_turn()
            runner.process.join()
            hooks = [turn["hooks"] for turn in runner.turns] if "re-evaluated" in runner.name else []
            results[runner.name] = {
                **facts,
                "step_seconds": [turn["seconds"] for turn in timed],
                "step_cpu_seconds": [turn["cpu"] for turn in timed],
                **({"rescore_seconds": max(hooks)} if hooks else {}),
            }
        return {"other_load_cores": busy, "contestants": results}
    finally:
        for runner in runners:
            if runner.process.is_alive():
                runner.process.terminate()
            runner.process.join()


def disturbed(comparison: Mapping[str, Any]) -> bool:
    """Whether other processes kept so much of the machine busy that the times are doubtful."""
    load = comparison["other_load_cores"]
    return load is not None and load > common.BUSY


def identity(settings: Settings) -> str:
    """Short digest of all that makes a kept comparison still valid: code, settings, versions, machine."""
    code = hashlib.sha256()
    for path in sorted([*(common.ROOT / "spectrum_peft").rglob("*.py"), *Path(__file__).parent.glob("*.py")]):
        code.update(path.name.encode() + b"\0" + path.read_bytes())
    facts = common.machine()
    known = {name: facts[name] for name in ("cpu", "cpu_flags", "cores", "python", "packages")}
    text = json.dumps([code.hexdigest(), asdict(settings), known], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(
    models: Sequence[str], groups: Sequence[str], repeats: int, settings: Settings, again: str | None = None
) -> dict[str, Any]:
    """All comparisons that are not kept already; then the result as it is written."""
    from spectrum_peft.scan import cache_folder

    facts = common.machine()
    common.warn_if_busy()
    kept = cache_folder() / "benchmarks" / f"modes-{identity(settings)}"
    ctx = context(preload(groups))
    runs: dict[str, list[Any]] = {}
    for model in models:
        process, pipe = start(ctx, prepare, model)
        try:
            folder, report = pipe.recv()
        except EOFError:
            raise ContestantFailed(f"{model}: could not be made ready; its error is above") from None
        process.join()
        label = Path(folder).name if model not in MODELS else model
        for repeat in range(repeats):
            for group in groups:
                name = f"{hashlib.sha256(folder.encode()).hexdigest()[:8]}-{group.replace(' ', '_')}-{repeat}.json"
                path = kept / name
                result = json.loads(path.read_text()) if path.is_file() and again != "all" else None
                if result is None or (again == "busy" and disturbed(result)):
                    began = time.perf_counter()
                    result = compare(ctx, folder, report, GROUPS[group], settings, f"{model}/{group}/{repeat}")
                    result["seconds"] = time.perf_counter() - began
                    common.write_text(path, json.dumps(result) + "\n")
                note = f", OTHERS KEPT {result['other_load_cores']:.2f} CORES BUSY" if disturbed(result) else ""
                line = f"{label}, repeat {repeat + 1}, {group}: {result['seconds']:.0f} s{note}"
                print(line, file=sys.stderr, flush=True)
                runs.setdefault(label, []).append({"group": group, "repeat": repeat, **result})
    return {
        "machine": facts,
        "settings": {**asdict(settings), "repeats": repeats},
        "models": {label: summary(rows) for label, rows in runs.items()},
        "claims": [claim for label, rows in runs.items() for claim in claims(label, rows)],
    }


# --- from runs to figures --------------------------------------------------------------------------------------------

_BYTES = (
    "trainable_parameters", "weight_bytes", "trainable_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes",
    "peak_bytes", "peak_private_bytes", "loading_peak_bytes", "loaded_bytes", "interpreter_bytes",
)  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per contestant: spread of the repeats' medians, all step times, and the bytes (largest of the repeats)."""
    found: dict[str, Any] = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        for name in GROUPS[group]:
            facts = [row["contestants"][name] for row in mine]
            found[name] = {
                "group": group,
                "step": common.spread([statistics.median(f["step_seconds"]) for f in facts]),
                "step_seconds": [[round(s, 4) for s in f["step_seconds"]] for f in facts],
                "step_cpu_seconds": [[round(s, 4) for s in f["step_cpu_seconds"]] for f in facts],
                **{key: None if facts[0][key] is None else max(f[key] for f in facts) for key in _BYTES},
                **{key: facts[0][key] for key in ("trainable_dtypes", "threads")},
            }
            if "rescore_seconds" in facts[0]:
                found[name]["rescore"] = common.spread([f["rescore_seconds"] for f in facts])
    return {
        "contestants": found,
        "other_load_cores": {f"{row['group']}, repeat {row['repeat'] + 1}": row["other_load_cores"] for row in rows},
        "seconds": sum(row["seconds"] for row in rows),
    }


def time_ratio(
    rows: Sequence[Mapping[str, Any]], one: str, other: str, seconds: str = "step_seconds"
) -> dict[str, Any] | None:
    """Spread over the repeats of the median over the rounds of one contestant's step time over another's.

    Args:
        seconds: `step_seconds`, or `step_cpu_seconds` for the time that its threads were running.
    """
    ratios = []
    for row in rows:
        pair = [row["contestants"].get(name, {}).get(seconds) for name in (one, other)]
        if all(pair):
            ratios.append(statistics.median(a / b for a, b in zip(*pair, strict=True)))
    return common.spread(ratios) if ratios else None


def claims(model: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the modes are said to save, what was seen, whether it holds; no claim whose contestants did not run."""
    facts = {name: f for row in rows for name, f in row["contestants"].items()}
    found: list[dict[str, Any]] = []

    def add(claim: str, wanted: str, seen: float, holds: bool, extent: Mapping[str, float] | None = None) -> None:
        row = {"model": model, "claim": claim, "wanted": wanted, "seen": seen, **(extent or {}), "pass": holds}
        found.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})

    def timed(one: str, other: str, wanted: str, holds: Callable[[float], bool], claim: str | None = None) -> None:
        wall, cpu = (time_ratio(rows, one, other, key) for key in ("step_seconds", "step_cpu_seconds"))
        if wall is not None and cpu is not None:
            seen, extent = wall["median"], {"min": wall["min"], "max": wall["max"], "cpu_seconds": cpu["median"]}
            add(claim or f"step time of {one} over {other}", wanted, seen, holds(seen), extent)

    def step(one: str, other: str, most: float) -> None:
        timed(one, other, f"<= {most:.2f}", lambda seen: seen <= most)

    def size(one: str, other: str, most: float, *keys: str) -> None:
        if one in facts and other in facts:
            seen = sum(facts[one][key] for key in keys) / sum(facts[other][key] for key in keys)
            what = ", ".join(key.removesuffix("_bytes") for key in keys)
            holds = seen <= most if most != 1 else seen < most
            add(f"bytes ({what}) of {one} over {other}", f"{'<' if most == 1 else '<='} {most:.2f}", seen, holds)

    trained = ("trainable_bytes", "optimizer_bytes")
    state = ("weight_bytes", "gradient_bytes", "optimizer_bytes")
    upper = "spectra_qlora 0.5, upper half"
    size("spectra_qlora 0.5", "lora, nf4", 0.55, *trained)
    step("spectra_qlora 0.5", "lora, nf4", 1.0)
    step(upper, "lora, nf4", 0.8)
    size(upper, "lora, nf4", 1.0, "activation_bytes")
    step("spectra_qlora 0.5, SFT", "lora, SFT", 1.0)
    step(f"{upper}, SFT", "lora, SFT", 0.8)
    size(f"{upper}, SFT", "lora, SFT", 1.0, "activation_bytes")
    step("spectrum 0.25", "full", 0.8)
    size("spectrum 0.25", "full", 0.5, *state)
    size("spectrum 0.25, nf4", "full", 0.35, *state)
    timed("lora", "LoRA of peft", "0.98 to 1.02", lambda seen: abs(seen - 1) <= 0.02)
    for suffix, where in ((", SFT", ""), (", SFT, no bf16 CPU", ", without bfloat16 instructions")):
        ours, theirs = f"lora{suffix}", f"LoRA of peft{suffix}"
        if ours in facts and theirs in facts:
            mine, its = (", ".join(facts[name]["trainable_dtypes"]) for name in (ours, theirs))
            claim = f"SFTTrainer{where}: adapters {mine} with the callback, {its} without; step time with over without"
            timed(ours, theirs, "float32 with the callback", lambda _, mine=mine: mine == "float32", claim)
    return found


def table(result: Mapping[str, Any]) -> str:
    """The result as text: one line a contestant, then one a claim."""
    lines = []
    for model, data in result["models"].items():
        lines += ["", f"{model}, batch {result['settings']['batch']} x {result['settings']['length']} tokens"]
        heads = ("s/step", "min", "max", "trained", "trained", "all weights,", "saved for", "peak of", "of it")
        below = ("", "", "", "parameters", "+ opt. MiB", "grads, opt.", "backward", "process", "private")
        lines += [f"{'':36}" + "".join(f"{head:>13}" for head in row) for row in (heads, below)]
        for name, c in data["contestants"].items():
            mib = [
                c["trainable_bytes"] + c["optimizer_bytes"],
                c["weight_bytes"] + c["gradient_bytes"] + c["optimizer_bytes"],
                c["activation_bytes"],
                c["peak_bytes"],
                c["peak_private_bytes"],
            ]
            cells = [f"{c['step'][key]:.3f}" for key in ("median", "min", "max")] + [f"{c['trainable_parameters']:,}"]
            cells += ["" if value is None else f"{value / 2**20:,.0f}" for value in mib]
            rescore = f"   one re-evaluation {c['rescore']['median']:.1f} s" if "rescore" in c else ""
            lines.append(f"{name:36}" + "".join(f"{cell:>13}" for cell in cells) + rescore)
    lines.append("")
    for c in result["claims"]:
        extent = f" ({c['min']:.3f} to {c['max']:.3f}, CPU seconds {c['cpu_seconds']:.3f})" if "min" in c else ""
        verdict = "pass" if c["pass"] else "FAIL"
        lines.append(f"{verdict}  {c['model']}: {c['claim']}: {c['seen']:.3f}{extent}, wanted {c['wanted']}")
    return "\n".join(lines)


# What the picture shows, in its order, in the words of a reader who has not seen the table.
DRAWN = {
    "full": "full fine-tuning",
    "spectrum 0.25": "spectrum: best quarter",
    "spectrum 0.25, nf4": "spectrum: best quarter, the rest 4-bit",
    "lora": "lora: every matrix",
    "lora, nf4": "lora on a 4-bit base (QLoRA)",
    "spectra_qlora 0.5": "spectra_qlora: best half, 4-bit base",
    "spectra_qlora 0.5, upper half": "the same, in the upper half of the blocks",
    "alors 0.5": "alors: best half, two ranks, 4-bit base",
}


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Bytes of weights, gradients and optimizer, and step time, as shares of full fine-tuning's: one bar for each model."""
    from spectrum_peft import plots

    plots.require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.4), dpi=160, layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    kinds = {
        "Memory: weights, gradients, AdamW": lambda c: sum(
            c[k] for k in ("weight_bytes", "gradient_bytes", "optimizer_bytes")
        ),
        "Time of a step": lambda c: c["step"]["median"],
    }
    inks = dict(zip(result["models"], plots.colours(5)[::4], strict=True))
    for axes, (title, size) in zip(sides, kinds.items(), strict=True):
        for number, (model, data) in enumerate(result["models"].items()):
            shares = [100 * size(data["contestants"][name]) / size(data["contestants"]["full"]) for name in DRAWN]
            places = [i + 0.38 * (number - 0.5) for i in range(len(DRAWN))]
            axes.barh(places, shares, height=0.34, color=inks[model], label=TITLES.get(model, model))
            for place, share in zip(places, shares, strict=True):
                axes.text(share + 1, place, f"{share:.0f} %", va="center", fontsize=8)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlim(0, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("% of full fine-tuning", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(DRAWN)), list(DRAWN.values()), fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
    sides[0].invert_yaxis()
    handles, labels = sides[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return plots.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(MODELS)
    parser.add_argument("--models", nargs="+", help=f"of {known}, or checkpoint folders with a tokenizer; default all")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="comparisons to run")
    parser.add_argument("--repeats", type=int, default=None, help="fresh processes for each comparison; default 3")
    parser.add_argument("--steps", type=int, default=None, help="timed steps of a repeat; default 6")
    parser.add_argument("--quick", action="store_true", help="SmolLM2-135M, 1 repeat, 3 steps, where not given")
    parser.add_argument(
        "--again",
        choices=("busy", "all"),
        help="run kept comparisons again: those that other processes disturbed, or all",
    )
    parser.add_argument("--output", type=Path, default=common.RESULTS / "modes.json")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the kept results instead")
    options = parser.parse_args(arguments)
    if options.draw is not None:
        print(draw(json.loads(options.output.read_text()), options.draw))
        return 0
    models = options.models or (MODELS[:1] if options.quick else MODELS)
    for model in models:
        if model not in MODELS and not (Path(model) / "config.json").is_file():
            parser.error(f"--models: {model!r} is none of {known}, and no folder with a config.json")
    repeats = options.repeats or (1 if options.quick else 3)
    settings = Settings(steps=options.steps or (3 if options.quick else 6))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = run(models, options.groups, repeats, settings, options.again)
    except ContestantFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path = common.save(options.output, "modes", result)
    print(table(result))
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
