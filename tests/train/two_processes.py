"""A script of asserts: modes trained by one process or by two that share each batch.

    torchrun --nproc_per_node 2 two_processes.py OUT CASE...      (or: python two_processes.py OUT CASE...)

CASE is mode, mode:nf4, mode:plain, mode:moving or mode:sft. Writes OUT/CASE-<number of processes>.safetensors, all parameters
at the end, and the plan beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from architectures import ARCHITECTURES
from conftest import byte_tokenizer
from peft import get_peft_model
from running import QUIET, logits, options_of, text_rows, token_rows, trainer, values
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
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


def trained(folder: Path, case: str, out: Path) -> Any:
    mode, _, kind = case.partition(":")
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
        if kind not in {"nf4", "plain"}:
            model = get_peft_model(model, config_of(mode, **options))
        if kind == "moving":
            plant(model)
        run = trainer(model, out, [callback], token_rows(), **HOW)
    assert run.args.world_size == WORLD
    run.train()
    if WORLD > 1:
        assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
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


def one_case(folder: Path, case: str, out: Path) -> None:
    run, callback = trained(folder, case, out / "runs" / case.replace(":", "-"))
    result = values(run.model)
    if WORLD > 1:
        assert_equal_on_all_ranks(result)
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


def different_plans_are_refused(folder: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Of the same shapes on both sides: DDP itself sees no difference.
    config = config_of("spectra_qlora", criterion="first" if dist.get_rank() else "last")
    run = trainer(get_peft_model(model, config), out / "runs" / "refused", [SpectrumCallback()], **HOW)
    try:
        run.train()
    except TrainingSetupError as error:
        assert "the processes have 2 different plans" in str(error)
    else:
        raise AssertionError("two processes trained under two plans")
    print("different plans: refused", flush=True)


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
        different_plans_are_refused(folder, out)
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
