"""Several processes: which ways of sharing a model carry a plan out, and whether all processes mean the same run.

What would not be carried out is refused by name before the first step, on every process alike.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from ..errors import OptionError, TrainingSetupError
from ..plan import MODES
from ..records import Plan

_ROWS_COMPARED = 64


@dataclass(frozen=True)
class Sharing:
    """How the processes of a run share a model.

    Attributes:
        kind: `copies` (one process, or DDP), `fsdp1`, `fsdp2`, `zero1`, `zero2` or `zero3`.
        asked: `FSDP` or `DeepSpeed` where that was asked for and does not run; `runs` is what does.
        loads_once: FSDP's `cpu_ram_efficient_loading`: only the first process holds the weights before they are shared out.
        saves_shards: what is saved at the end has no whole weights in it.
        computes_in: dtype that FSDP2 gathers weights in; None for their own.
    """

    kind: str = "copies"
    asked: str | None = None
    runs: str = "NO"
    loads_once: bool = False
    saves_shards: bool = False
    computes_in: torch.dtype | None = None


def sharing_of(args: Any) -> Sharing:
    """Read from accelerate's state, which the trainer's constructor has made.

    Args:
        args: `TrainingArguments`.
    """
    try:
        state: Any = AcceleratorState()
    except ValueError:  # nobody made one
        return Sharing()
    runs = str(getattr(state.distributed_type, "value", state.distributed_type))
    if runs == "FSDP":
        plugin = state.fsdp_plugin
        return Sharing(
            f"fsdp{plugin.fsdp_version}", runs=runs, loads_once=bool(plugin.cpu_ram_efficient_loading),
            computes_in=getattr(plugin.mixed_precision_policy, "param_dtype", None),
        )  # fmt: skip
    if runs == "DEEPSPEED":
        plugin = state.deepspeed_plugin
        stage = int(plugin.zero_stage or 0)
        gathers = plugin.deepspeed_config.get("zero_optimization", {}).get("stage3_gather_16bit_weights_on_model_save")
        kind = f"zero{stage}" if stage else "copies"
        return Sharing(kind, runs=runs, saves_shards=stage == 3 and gathers is not True)
    return Sharing(asked=asked_for(args), runs=runs)


def asked_for(args: Any, environment: Mapping[str, str] = os.environ) -> str | None:
    """`FSDP` or `DeepSpeed` where the arguments or the launcher ask for that; it may be something else that runs."""
    asked = None
    for name, given, variable in (
        ("FSDP", args.fsdp, "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", args.deepspeed, "ACCELERATE_USE_DEEPSPEED"),
    ):
        if given or environment.get(variable, "").lower() in ("1", "true"):
            asked = name
    return asked


def problem_of(sharing: Sharing, plan: Plan, model: nn.Module) -> str | None:
    """Why a plan would not be carried out under a sharing; None where it is.

    Args:
        model: with the plan's layers in it, not yet shared out.
    """
    kind, mode = sharing.kind, f"mode {plan.mode!r}"
    if sharing.asked is not None:
        return (
            f"{sharing.asked} was asked for, and accelerate runs {sharing.runs} instead: it shards on accelerators only. "
            "Leave it out; where there is an accelerator, leave --use-cpu out"
        )
    if kind == "fsdp1":
        return (
            "FSDP is of version 1, which joins the weights of a block into one tensor that trains whole or not at all. "
            "Wanted fsdp_version: 2"
        )
    if kind == "copies":
        return None
    shown = "FSDP2" if kind == "fsdp2" else f"ZeRO-{kind[-1]}"
    if plan.options.get("rescore_every") is not None:
        return (
            f"rescore_every={plan.options['rescore_every']!r} under {shown}: ranks cannot be moved in weights and moments that "
            "are shared out. Use DDP, or plan without rescore_every"
        )
    if kind == "fsdp2" and sharing.loads_once:
        if (name := _first_buffer(model)) is not None:
            return (
                f"{mode} under FSDP2 with cpu_ram_efficient_loading: accelerate cannot share out the buffer {name}. "
                "Wanted fsdp_cpu_ram_efficient_loading: false"
            )
    if kind == "zero3":
        return _problem_under_zero3(sharing, plan, model)
    return None


def _problem_under_zero3(sharing: Sharing, plan: Plan, model: nn.Module) -> str | None:
    mode = f"mode {plan.mode!r}"
    if sharing.saves_shards:
        return "under ZeRO-3 nothing whole would be saved. Wanted stage3_gather_16bit_weights_on_model_save: true"
    if hasattr(model, "peft_config") and MODES[plan.mode].real_weights:
        return (
            f"{mode} as a PEFT adapter under ZeRO-3: a weight that is partitioned cannot be held beside its base. Use "
            "FSDP2 or ZeRO-2; or the plain model, SpectrumCallback(SpectrumConfig(...))"
        )
    if plan.mode in _NOT_UNDER_ZERO3:
        return f"{mode} under ZeRO-3: {_NOT_UNDER_ZERO3[plan.mode]}. Use FSDP2 or ZeRO-2"
    return None


# What DeepSpeed 0.19 saves of these modes is not what was trained.
_NOT_UNDER_ZERO3 = {"lorsa": "its saved adapter would lack the singular vectors that are partitioned"}


def _first_buffer(model: nn.Module) -> str | None:
    """The first buffer that is saved with the weights; models with 4-bit weights are not loaded by that way."""
    if any(type(p).__name__ == "Params4bit" for p in model.parameters()):
        return None
    saved = model.state_dict()
    return next((name for name, _ in model.named_buffers() if name in saved), None)


def refuse_unfit_sharing(args: Any, plan: Plan, model: nn.Module) -> Sharing:
    """
    Raises:
        TrainingSetupError: the plan would not be carried out, see `problem_of`.
    """
    sharing = sharing_of(args)
    if (problem := problem_of(sharing, plan, model)) is not None:
        raise TrainingSetupError(f"{problem}.")
    return sharing


def refuse_lost_ratios(sharing: Sharing, ratios: Iterable[float]) -> None:
    """
    Raises:
        TrainingSetupError: DeepSpeed steps by partitions of its own, and the plan has learning rates of its own.
    """
    other = sorted({q for q in ratios if q != 1.0})
    if other and sharing.runs == "DEEPSPEED":
        raise TrainingSetupError(
            f"learning rates by importance ({other[0]:.3g} to {other[-1]:.3g} times the rate) do not reach DeepSpeed's "
            "partitions of the weights. Use FSDP2 or DDP; or plan with lr_ratio=(1, 1)."
        )


# --- do all processes mean the same run ------------------------------------------------------------------------------


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        OptionError: the environment names a process of several and not where they meet, or it is no number.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name in environment and not environment[name].isdecimal():
            raise OptionError(
                f"{name} is {environment[name]!r} in the environment, wanted a number; a launcher sets it."
            )
    if int(environment.get("WORLD_SIZE", "1")) <= int(environment.get("RANK", "0")):
        raise OptionError(
            f"RANK is {environment.get('RANK', '0')} and WORLD_SIZE is {environment.get('WORLD_SIZE', 'not set')} in the "
            "environment, wanted RANK below WORLD_SIZE; start with torchrun or accelerate launch, or unset RANK."
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise OptionError(
                f"RANK is {environment.get('RANK', '0')} in the environment and {name} is not set, so the processes cannot "
                "find each other; start with torchrun or accelerate launch, or unset RANK."
            )


def check_fsdp_version(args: Any, environment: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        OptionError: FSDP of version 1, which is accelerate's default, was asked for.
    """
    asked = getattr(args, "fsdp_plugin_args", None)
    version = None if asked is None else int(asked["fsdp_version"])
    if version is None and environment.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        version = int(environment.get("FSDP_VERSION") or 1)
    if version == 1:
        raise OptionError(
            "FSDP is of version 1, which joins the weights of a block into one tensor that trains whole or not at all; wanted "
            "fsdp_version: 2."
        )


def _is_one_of_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def from_first_process(value: Any) -> Any:
    """The value that rank 0 has, on every process; scores on other hardware might differ in a last bit."""
    if not _is_one_of_several():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _on_all(value: Any) -> list[Any]:
    """
    Raises:
        TrainingSetupError: another process has ended and cannot say its own.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(found, value)
    except RuntimeError as error:
        raise TrainingSetupError("another of the processes has ended; its own last line says why.") from error
    return found


def check_plans_agree(plan: Plan) -> None:
    """Every process makes its plan by itself; a tie that is broken otherwise would let their weights drift apart.

    Raises:
        TrainingSetupError: on every process, where the plans differ.
    """
    if not _is_one_of_several():
        return
    digests = _on_all(plan.digest)
    if len(set(digests)) > 1:
        raise TrainingSetupError(
            f"the processes have {len(set(digests))} different plans: {[d[:12] for d in digests]}. Make the plan once "
            "(spectrum-peft plan) and give its file to every process, plan='plan.yaml'."
        )


def check_rows_agree(rows: Any) -> None:
    """The processes share out one set of rows among them, so each must have the same: their number, and some of them.

    Args:
        rows: a dataset; one without a length (a stream) is not compared.
    Raises:
        TrainingSetupError: on every process, where they differ.
    """
    if not _is_one_of_several():
        return
    found = _on_all(_rows_digest(rows))
    if len(set(found)) > 1:
        counts = [count for count, _ in found]
        what = f"{counts} rows" if len(set(counts)) > 1 else "as many rows, but not the same"
        raise TrainingSetupError(
            f"the processes have different training data: {what}. Give every process the same files in the same order."
        )


def _rows_digest(rows: Any) -> tuple[int, str]:
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return -1, ""
    count = len(rows)
    digest = hashlib.sha256()
    for i in range(0, count, max(1, count // _ROWS_COMPARED)):
        row = rows[i]
        shown = {key: value.tolist() if torch.is_tensor(value) else value for key, value in dict(row).items()}
        digest.update(repr(sorted(shown.items())).encode())
    return count, digest.hexdigest()


def gather_when_saving(trainer: Any) -> None:
    """Let FSDP2 save whole weights at the end of a run, whatever its checkpoints are: shards are no model."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
