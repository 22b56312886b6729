"""A script of asserts: modes trained by one process, or by two under DeepSpeed's ZeRO that share each batch.

    torchrun --nproc_per_node 2 deepspeed_runs.py OUT CASE...      (or: python deepspeed_runs.py OUT CASE...)

CASE is zero2:mode or zero3:mode, with `:plain` for a model without PEFT, `:first` for one that load_model_with_spectrum loads
after ZeRO-3's arguments were made, `:even` for learning rates that are all alike. In float32, on CPUs, over gloo: DeepSpeed's
copies of the weights are float32 then, too. Writes OUT/CASE-<number of processes>.json, the losses, and saves to a folder of that
name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from running import arguments, token_rows
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer
from two_processes import GLOBAL_BATCH, RATE, STEPS, config_of, losses, refused

from spectrum_peft import SpectrumCallback, load_model_with_spectrum

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
MOVING = {"rescore_every": 1, "scope": "global", "criterion": "mp"}
SEVERAL_RATES = {"scope": "global"}


def settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; the optimizer is the trainer's own."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def made(folder: Path, case: str, out: Path, **options: Any) -> Trainer:
    """A trainer that is ready."""
    AcceleratorState._reset_state(True)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS_FIELDS"):
        os.environ.pop(name, None)
    stage, mode, kind = (*case.split(":"), "")[:3]
    shared = {"ddp_backend": "gloo", "deepspeed": settings(int(stage[-1]))} if WORLD > 1 else {}
    config = config_of(mode, **({"lr_ratio": (1.0, 1.0)} if kind == "even" else {}), **options)

    def loaded() -> Any:
        torch.manual_seed(1)
        if kind == "first":
            return load_model_with_spectrum(str(folder), config, dtype=torch.float32)[0]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model if kind == "plain" else get_peft_model(model, config)

    model = None if kind in ("first", "late") else loaded()
    how = {"max_steps": STEPS, "learning_rate": RATE, "per_device_train_batch_size": GLOBAL_BATCH // WORLD}
    args = arguments(out, logging_strategy="steps", logging_steps=1, **how, **shared)
    callback = SpectrumCallback(config if kind == "plain" else None)
    trainer = Trainer(
        model=loaded() if model is None else model, args=args, train_dataset=token_rows(), callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(folder: Path, case: str, out: Path) -> None:
    name = f"{case.replace(':', '-')}-{WORLD}"
    run = made(folder, case, out / "runs" / name)
    run.train()
    assert run.args.world_size == WORLD
    assert (type(run.model_wrapped).__name__ == "DeepSpeedEngine") == (WORLD > 1)
    if WORLD > 1:
        stage = run.model_wrapped.zero_optimization_stage()
        assert stage == int(case[4]), stage
        assert stage != 3 or all(hasattr(p, "ds_id") for p in run.model.parameters())
    losses(run, out / f"{name}.json")
    run.save_model(str(out / name))


# {what: (case, options of the plan, words)}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rates": ("zero2:alors", SEVERAL_RATES, "do not reach DeepSpeed's partitions"),
    "moving ranks, ZeRO-2": ("zero2:alors", MOVING, "rescore_every=1 under ZeRO-2"),
    "moving ranks, ZeRO-3": ("zero3:alors", MOVING, "rescore_every=1 under ZeRO-3"),
    "real weights in an adapter": ("zero3:spectrum", {}, "as a PEFT adapter under ZeRO-3"),
    "lorsa's vectors": ("zero3:lorsa", {}, "would lack the singular vectors"),
    "zero.Init": ("zero3:lora:late", {}, "loaded under ZeRO-3"),
}


def refusals(folder: Path, out: Path) -> None:
    """Every process ends, each with the same words, before a step."""
    for what, (case, options, words) in REFUSED.items():
        found: list[Trainer] = []

        def attempt(case: str = case, options: dict[str, Any] = options, found: list[Trainer] = found) -> None:
            found.append(made(folder, case, out / "runs" / "refused", **options))
            found[0].train()

        refused(what, attempt, words)
        assert all(run.state.global_step == 0 for run in found)


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    for case in cases:
        trained(out / "base", case, out)
        print(f"{case}: done", flush=True)
    if WORLD > 1:
        refusals(out / "base", out)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
