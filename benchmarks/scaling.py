"""What a training step holds on each card when it is spread over several, and how many tokens fit: dry runs, for docs/scaling.md.

    python benchmarks/scaling.py      # what is not there yet; JSON in benchmarks/results/scaling.json, no GPU needed

One dry run for a model and a way to train; the share of each card is arithmetic on it (`memory.shard`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
from memory import CONFIGS

# config.json of Qwen/Qwen3-30B-A3B
_MIXTURE = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "8B": CONFIGS["meta-llama/Llama-3.1-8B"], "70B": CONFIGS["meta-llama/Llama-3.1-70B"],
    "30B-A3B": ("Qwen3MoeConfig", {**_MIXTURE, "architectures": ["Qwen3MoeForCausalLM"]}),
}  # fmt: skip
STEP = {
    "batch_size": 1, "max_length": 2048, "dtype": "bfloat16", "optimizer": "adamw_torch_fused", "trainer": "sft",
    "gradient_checkpointing": True,
}  # fmt: skip
LONG = 32768
GIB, USED = (24, 80), 0.97  # of a card, and the share of it that a step may have
MOST, EACH = 131072, 1024  # tokens that the model takes, and steps between lengths that are tried
# {shown: (mode, options, quantization)}
WAYS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "full": ("full", {}, None), "spectrum 0.25": ("spectrum", {"spectrum_ratio": 0.25}, None), "lora": ("lora", {}, None),
    "spectra_qlora 0.5": ("spectra_qlora", {"spectrum_ratio": 0.5}, None),
    "alors 0.5": ("alors", {"spectrum_ratio": 0.5}, None), "sgm": ("sgm", {"spectrum_ratio": 1.0}, None),
    "lorsa": ("lorsa", {"n_components": 64, "svd_rank": 128}, None), "columns": ("columns", {}, None),
    "lora nf4": ("lora", {}, "nf4"), "spectra_qlora 0.5 nf4": ("spectra_qlora", {"spectrum_ratio": 0.5}, "nf4"),
}  # fmt: skip
CARDS = (1, 2, 8, 64)
SHARDINGS = ("data_parallel", "zero2", "zero3", "fsdp2")


def dry_run(model: str, way: str, **changes: Any) -> dict[str, Any]:
    """{sharding: {cards: bytes of each}} of a step, with the bytes of weights and of what trains."""
    import torch
    import transformers

    from spectrum_peft import estimate_memory, make_plan
    from spectrum_peft.memory import gradients_of_report, report_of_config, shard
    from spectrum_peft.plan import MODES as TABLE

    kind, fields = MODELS[model]
    config = getattr(transformers, kind)(**fields, dtype=torch.bfloat16)
    mode, options, quantization = WAYS[way]
    scores = report_of_config(config, "random")
    gradients = gradients_of_report(scores) if TABLE[mode].needs_data else None  # with which `sgm` shares nothing
    plan = make_plan(scores, gradients=gradients, mode=mode, **options)
    report = estimate_memory(config, plan, quantization=quantization, **{**STEP, **changes})
    spread = {
        sharding: {str(n): shard(report, sharding, n).peak_bytes for n in CARDS if n > 1} for sharding in SHARDINGS
    }
    return {
        "peak_bytes": report.peak_bytes, "by_category": dict(report.by_category), "sharded": spread,
        "trainable_parameters": report.trainable_parameters, "total_parameters": report.total_parameters,
        "trainable_bytes": report.trainable_bytes, "complete": report.complete,
    }  # fmt: skip


def longest(way: str, gib: int, cells: Mapping[str, Any]) -> dict[str, Any]:
    """The most tokens, of multiples of `EACH`, whose step fits a card. Guessed on a line through what is known, then tried."""
    budget = USED * gib * 2**30
    names = {STEP["max_length"]: f"8B {way}", LONG: f"8B {way} {LONG}"}
    peaks = {tokens: cells[name]["peak_bytes"] for tokens, name in names.items()}

    def edge() -> tuple[int, int]:
        return max((n for n in peaks if peaks[n] <= budget), default=0), min(
            (n for n in peaks if peaks[n] > budget), default=MOST + EACH
        )

    while (between := edge())[0] and between[1] - between[0] > EACH:
        fits, fails = between
        one, other = (fits, fails) if fails in peaks else sorted(peaks)[-2:]
        guess = one + (budget - peaks[one]) * (other - one) / (peaks[other] - peaks[one])
        tokens = min(max(round(guess / EACH) * EACH, fits + EACH), fails - EACH)
        peaks[tokens] = dry_run("8B", way, max_length=tokens)["peak_bytes"]
    fits = edge()[0]
    return {"tokens": fits, "peak_bytes": peaks.get(fits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS / "scaling.json")
    options = parser.parse_args()
    kept: Mapping[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    cells: dict[str, Any] = dict(kept.get("cells", {}))
    wanted = {f"8B {way} {LONG}": ("8B", way, {"max_length": LONG}) for way in WAYS}
    wanted = {f"8B {way}": ("8B", way, {}) for way in WAYS} | wanted | {f"70B {way}": ("70B", way, {}) for way in WAYS}
    wanted |= {f"30B-A3B {way}": ("30B-A3B", way, {}) for way in ("full", "spectrum 0.25", "lora", "lora nf4")}
    most: dict[str, dict[str, Any]] = {way: dict(kept.get("most_tokens", {}).get(way, {})) for way in WAYS}

    def save() -> None:
        shown = {known: cells[known] for known in wanted if known in cells}
        settings = {"step": STEP, "long": LONG, "gib": GIB, "used": USED}
        common.save(options.output, "scaling", {**common.commit(), **settings, "cells": shown, "most_tokens": most})

    for name, (model, way, changes) in wanted.items():
        if name not in cells:
            cells[name] = dry_run(model, way, **changes)
            print(f"{name}: {cells[name]['peak_bytes'] / 2**30:.1f} GiB", flush=True)
            save()
    for way, by in most.items():
        for gib in (g for g in GIB if str(g) not in by):
            by[str(gib)] = longest(way, gib, cells)
            print(f"8B {way}: {by[str(gib)]['tokens']:,} tokens in {gib} GiB", flush=True)
            save()


if __name__ == "__main__":
    main()
