"""A script of asserts: modes trained by one process or by two that share each batch.

    torchrun --nproc_per_node 2 two_processes.py OUT CASE...      (or: python two_processes.py OUT CASE...)

CASE is mode, mode:nf4, mode:plain, mode:moving, mode:coupled, mode:sft, or fsdp2:mode, fsdp2:mode:plain and so on, under which
two processes share out the model's weights. Writes OUT/CASE-<number of processes>.safetensors, all parameters at the end, and
the plan beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from architectures import ARCHITECTURES
from conftest import byte_tokenizer
from peft import PeftModel, get_peft_model
from running import QUIET, arguments, assert_same, logits, options_of, text_rows, token_rows, values
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum
from spectrum_peft.errors import TrainingSetupError

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
GLOBAL_BATCH, STEPS, RATE = 4, 4, 1e-4
HOW: dict[str, Any] = {
    "per_device_train_batch_size": GLOBAL_BATCH // WORLD, "max_steps": STEPS, "learning_rate": RATE,
    # Nothing may be left without a gradient: with True, DDP would hide it.
    "ddp_find_unused_parameters": False, "ddp_backend": "gloo" if WORLD > 1 else None,
}  # fmt: skip


def config_of(mode: str, **options: Any) -> SpectrumConfig:
    return SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **{**options_of(mode), **options})


# accelerate shards on accelerators only and, asked for FSDP on a CPU, runs DDP without a word.
FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"},
}


def as_on_cards() -> None:
    """Let accelerate take the CPUs for cards, after the arguments are made and before the trainer is."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def trainer(
    model: Any, out: Path, callbacks: list[Any], rows: Any = None, *, sharded: bool = False, **how: Any
) -> Trainer:
    """transformers' Trainer; `sharded`: with FSDP2, that the CPUs are taken for cards."""
    args = arguments(out, logging_strategy="steps", logging_steps=1, **{**(FSDP2 if sharded else {}), **how})
    if sharded:
        as_on_cards()
    rows = token_rows() if rows is None else rows
    made = Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
    made.remove_callback(PrinterCallback)
    return made


def begin() -> None:
    """Forget which way the last trainer of this process shared its model."""
    AcceleratorState._reset_state(True)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)


def trained(folder: Path, case: str, out: Path, resume: Path | None = None, saves: bool = False) -> Any:
    """Trainer and callback of a case that has run; `saves`: with a checkpoint at step 2 without FSDP2, too."""
    sharded = case.startswith("fsdp2:") and dist.is_initialized()
    mode, _, kind = case.removeprefix("fsdp2:").partition(":")
    begin()
    callback = SpectrumCallback(config_of(mode)) if kind == "plain" else SpectrumCallback()
    torch.manual_seed(1)
    if kind == "nf4":
        model, _ = load_model_with_spectrum(str(folder), config_of(mode), quantization="nf4", dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "sft":  # with its own defaults, gradient checkpointing among them
        # Sentences so much alike leave entries whose gradient is rounding noise, and Adam moves such an entry by the whole
        # rate, whichever way a sum was rounded. An epsilon above the noise leaves them where they are.
        args = SFTConfig(output_dir=str(out), max_length=32, **{**QUIET, **HOW, "adam_epsilon": 1e-5})
        run: Any = SFTTrainer(
            model=model, args=args, train_dataset=text_rows(), processing_class=byte_tokenizer(), callbacks=[callback],
            peft_config=config_of(mode),
        )  # fmt: skip
    else:
        options = {"rescore_every": 1, "scope": "global", "criterion": "mp"} if kind == "moving" else {}
        if kind == "coupled":
            options = {"coupled": True}
        if mode == "alors" and not kind:  # of several rates
            options = {"scope": "global"}
        if kind not in {"nf4", "plain"}:
            model = get_peft_model(model, config_of(mode, **options))
        if kind == "moving":
            plant(model)
        saved = (
            {"save_strategy": "steps", "save_steps": 2}
            if (saves or case.startswith("fsdp2:")) and resume is None
            else {}
        )
        run = trainer(model, out, [callback], token_rows(), **HOW, **saved, sharded=sharded)
    assert run.args.world_size == WORLD
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    if sharded:
        held = [p for p in run.model.parameters() if type(p).__name__ != "Params4bit"]
        assert run.accelerator.distributed_type == DistributedType.FSDP
        assert all(isinstance(p, DTensor) and p.device_mesh.size() == WORLD for p in held)
        assert WORLD == 1 or sum(p.to_local().numel() for p in held) < 0.6 * sum(p.numel() for p in held)
    elif WORLD > 1:
        assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    if mode == "alors" and not kind:
        assert len({e.lr_ratio for e in callback.plan.entries if e.trains}) > 2
    if kind == "moving":
        assert sum(bool(step["ranks"] or step["activated"]) for step in callback.history) > 0
    return run, callback


def plant(model: Any) -> None:
    """Make the last matrix that was not chosen so strong that re-evaluation puts it first."""
    name = [e.name for e in model.peft_config["default"].plan.entries if not e.trains][-1]
    model.get_base_model().get_submodule(name.removesuffix(".weight")).base_layer.weight.data += 0.2


def products(model: Any) -> dict[str, torch.Tensor]:
    """What adapters add to the weights. Shrunk factors of a product that is nearly nothing may turn in any direction."""
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_equal_on_all_ranks(tensors: dict[str, torch.Tensor]) -> None:
    for name in sorted(tensors):
        mine = tensors[name].contiguous()
        other = mine.clone()
        dist.broadcast(other, src=0)
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), f"{name} differs on rank {dist.get_rank()}"


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in tensors.items()}


def saved_and_resumed(folder: Path, case: str, out: Path, run: Any, result: dict[str, torch.Tensor]) -> None:
    """The saved folder loads and holds what was trained; a run that goes on from step 2 ends as the one that did not stop."""
    run.save_model(str(out / "saved"))
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(
        folder if (adapter := hasattr(run.model, "peft_config")) else out / "saved"
    )
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, out / "saved")
    trained_names = [n for n, p in run.model.named_parameters() if p.requires_grad]
    assert_same({n: v for n, v in values(loaded).items() if n in trained_names}, {n: result[n] for n in trained_names})
    again, _ = trained(folder, case, out, resume=out / "checkpoint-2")
    assert_same(whole(values(again.model)), result)


def one_case(folder: Path, case: str, out: Path) -> None:
    run, callback = trained(folder, case, out / "runs" / case.replace(":", "-"))
    result = whole(values(run.model))
    losses(run, out / f"{case.replace(':', '-')}-{WORLD}.json")
    if WORLD > 1 and case.startswith("fsdp2:") and not case.endswith(":nf4"):
        saved_and_resumed(folder, case, out / "runs" / case.replace(":", "-"), run, result)
    if WORLD > 1:
        assert_equal_on_all_ranks(result)
        if not case.startswith("fsdp2:"):
            assert_equal_on_all_ranks(moments_of(run))
        plans: list[Any] = [None, None]
        dist.all_gather_object(plans, callback.plan.to_dict())
        assert plans[0] == plans[1]
    if case.endswith(":moving"):
        result = products(run.model)
    merged_once(run, out / f"{case.replace(':', '-')}-merged", case)
    if run.is_world_process_zero():
        name = f"{case.replace(':', '-')}-{WORLD}"
        save_file({n: v.contiguous() for n, v in result.items()}, out / f"{name}.safetensors")
        callback.plan.save(out / f"{name}.yaml")
    print(f"{case}: done", flush=True)


def losses(run: Any, file: Path) -> None:
    if run.is_world_process_zero():
        file.write_text(json.dumps([row["loss"] for row in run.state.log_history if "loss" in row]))


def moments_of(run: Any) -> dict[str, torch.Tensor]:
    state = run.optimizer.optimizer.state
    return {f"{i}.{k}": v for i, s in enumerate(state.values()) for k, v in s.items() if torch.is_tensor(v) and v.ndim}


def merged_once(run: Any, folder: Path, case: str) -> None:
    """Every process merges its own copy, to the same bytes; one writes; a second merge changes nothing."""
    if ":" in case or WORLD == 1:
        return
    wanted = logits(run.model)
    merged = run.model.merge_and_unload()
    assert (logits(merged) - wanted).abs().max() < 2e-6
    assert_equal_on_all_ranks(values(merged))
    if run.is_world_process_zero():
        merged.save_pretrained(folder)
    dist.barrier()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(plain), logits(merged))


def refused(what: str, run: Any, words: str) -> None:
    try:
        run()
    except TrainingSetupError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"{what}: not refused")
    print(f"{what}: refused", flush=True)


def refusals(folder: Path, out: Path) -> None:
    """Every process ends, each with the same words, before a step."""

    def attempt(
        mode: str, rows: Any = None, *, sharded: bool = False, fsdp: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        begin()
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config_of(mode, **options))
        extra = {} if fsdp is None else {"fsdp": True, "fsdp_config": fsdp}
        return lambda: trainer(
            model, out / "runs" / "refused", [SpectrumCallback()], rows, **HOW, **extra, sharded=sharded
        ).train()

    # Of the same shapes on both sides: DDP itself sees no difference.
    other = "first" if dist.get_rank() else "last"
    refused("different plans", attempt("spectra_qlora", criterion=other), "the processes have 2 different plans")
    other = {"spectrum_ratio": 0.5 + 0.5 * dist.get_rank()}
    refused("different sizes", attempt("spectra_qlora", sharded=True, **other), "the processes have 2 different plans")
    refused(
        "different rows", attempt("lora", token_rows(seed=dist.get_rank())), "different training data: as many rows"
    )
    refused("fewer rows", attempt("lora", token_rows(32 - dist.get_rank())), "different training data: [32, 31] rows")
    moving = {"rescore_every": 1, "scope": "global", "criterion": "mp"}
    refused("moving ranks", attempt("alors", sharded=True, **moving), "rescore_every=1 under FSDP2")
    first = {**FSDP2["fsdp_config"], "version": 1, "sync_module_states": False}  # which a CPU refuses
    refused("FSDP of version 1", attempt("lora", sharded=True, fsdp=first), "trains whole or not at all")
    once = {**FSDP2["fsdp_config"], "cpu_ram_efficient_loading": True}
    for mode in ("lorsa", "columns"):
        refused(f"buffers of {mode}", attempt(mode, sharded=True, fsdp=once), "cannot share out the buffer")
    refused(
        "no FSDP", attempt("lora", fsdp=dict(FSDP2["fsdp_config"])), "FSDP was asked for, and accelerate runs MULTI_CPU"
    )


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    folder = out / "base"
    if int(os.environ.get("RANK", "0")) == 0 and not folder.exists():
        ARCHITECTURES["llama"].build().save_pretrained(out / "base.part")
        (out / "base.part").replace(folder)
    if WORLD > 1:
        dist.init_process_group("gloo")
        dist.barrier()
        assert dist.get_world_size() == WORLD == 2
    for case in cases:
        one_case(folder, case, out)
    if WORLD > 1:
        refusals(folder, out)
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
