"""What training a plan needs: the dry run, the same step for real, and the share of one device among several."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import names
from ..errors import MismatchError, OptionError, near_matches
from ..plan import MODES, OPTIONS, make_plan
from ..records import Fingerprint, GradientReport, GradientStat, MemoryReport, Plan, SnrReport
from ..tuner import settle_plan
from ..tuner.config import SpectrumConfig, candidates_of
from ..tuner.loading import made_trainable
from ..weights import base_module
from .fakes import (
    config_of,
    fake_model,
    fused_head_of,
    kernels_of,
    model_class_of,
    on_fake_tensors,
    quantized_skeleton,
    skeleton_of,
)
from .step import DTYPES, EIGHT_BIT_ADAM, OptimizerFactory, Step, by_category, step_report, steps_in_float32

SHARDINGS = ("none", "data_parallel", "zero1", "zero2", "zero3", "fsdp2")


def report_of_config(
    model: Any,
    criterion: str = "first",
    *,
    seed: int = 0,
    model_class: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> SnrReport:
    """A report from the config alone, scored by a criterion that needs no weights: for plans whose size is of interest.

    How much trains at a ratio hardly depends on the scores, since the matrices of one kind are alike in size; which
    blocks train does, and with it how far backward goes. `last` is therefore a lower bound of the memory, `first` an
    upper one.

    Args:
        model: path, hub id, config or model.
        criterion: `first`, `last` or `random`.
    Raises:
        OptionError: a criterion that needs weights.
    """
    if criterion not in ("first", "last", "random", "spaced"):
        raise OptionError(
            f"criterion is {criterion!r}; without weights only 'first', 'last', 'random' and 'spaced' can be scored. Scan the "
            "checkpoint for a report of another one."
        )
    config = config_of(model, revision, trust_remote_code)
    skeleton = skeleton_of(
        model_class_of(model, config, model_class, trust_remote_code), config, torch.float32, "eager", trust_remote_code
    )
    settings = SpectrumConfig(mode="spectrum", criterion=criterion, seed=seed)
    settle_plan(skeleton, settings)
    return dataclasses.replace(settings.report, model_id=_name_of(model))


def gradients_of_report(report: SnrReport, *, svd_rank: int = OPTIONS["svd_rank"]) -> GradientReport:
    """Gradients as if no matrix were like another and all components weighed alike: for plans whose size is of interest.

    With them `sgm` shares nothing, so that its memory is an upper bound; `lorsa` takes as many components of each matrix
    whatever their importance, but for `component_scope="global"`.
    """
    stats = []
    for s in report.stats:
        if s.shape is not None and len(s.shape) == 2:
            alike = (1.0,) * min(svd_rank, *s.shape)
            columns = (1.0,) * s.shape[0 if s.transposed else 1]
            stats.append(
                GradientStat(
                    s.name, s.kind, s.shape, fisher=1.0, singular_values=alike, importance=alike, columns=columns
                )
            )
    return GradientReport(stats=tuple(stats), similarities=(), samples=0, loss=math.nan, model_id=report.model_id)


def _name_of(model: Any) -> str | None:
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    return getattr(getattr(model, "config", model), "_name_or_path", None) or None


def estimate_memory(
    model: Any,
    plan: Plan | str | os.PathLike[str] | SpectrumConfig,
    *,
    batch_size: int = Step.batch_size,
    max_length: int = Step.max_length,
    dtype: Any = Step.dtype,
    optimizer: str = Step.optimizer,
    gradient_checkpointing: bool = Step.gradient_checkpointing,
    gradient_accumulation_steps: int = Step.gradient_accumulation_steps,
    quantization: str | None = Step.quantization,
    attn_implementation: str | None = Step.attn_implementation,
    sharding: str = "none",
    devices: int = 1,
    model_class: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **more: Any,
) -> MemoryReport:
    """What training a plan needs at its peak, by a dry run: no weights are read, no GPU is used.

    Args:
        model: path, hub id, `.gguf` file, config or model; only its config is looked at.
        plan: what trains; or a `SpectrumConfig` with a plan or report, where dropout, DoRA or `modules_to_save` matter.
        sharding: one of `SHARDINGS`, see `shard`.
        devices: that the training is spread over; `batch_size` is each one's.
        model_class: class to train; None for the one that the config names, as `load_model_with_spectrum` takes it.
        batch_size, ..., attn_implementation, more: fields of `Step`, which explains them; among the rest
            `device="cuda"`, `trainer="transformers"`, `mixed_precision="auto"`, `padding=True`.
    Returns:
        a report; `complete` is False, and a note says why, where the model's code cannot run on fake tensors.
    Raises:
        OptionError: a setting outside its range; a config that needs remote code; more positions than the model has.
        MismatchError: the plan does not fit the model.
    """
    run = _step(
        more, batch_size=batch_size, max_length=max_length, dtype=dtype, optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing, gradient_accumulation_steps=gradient_accumulation_steps,
        quantization=quantization, attn_implementation=attn_implementation,
    )  # fmt: skip
    config = config_of(model, revision, trust_remote_code)
    run = _resolved(run, model, config)
    asked, first = _asked(plan, model, revision)
    if asked.keep_base in ("auto", "file") and isinstance(model, str | os.PathLike) and Path(model).is_dir():
        asked.keep_base = "none"  # a local checkpoint is read back when needed, nothing is kept
    if asked.keep_base == "file":
        asked.keep_base = "host"
    found = model_class_of(model, config, model_class, trust_remote_code)
    skeleton = skeleton_of(found, config, DTYPES[run.dtype], run.attn_implementation, trust_remote_code)
    _check_positions(skeleton, run.max_length)
    total = first.total_parameters or sum(p.numel() for p in skeleton.parameters())
    if run.quantization is not None:
        skeleton = quantized_skeleton(skeleton, first, run.quantization, DTYPES[run.dtype])
    head = fused_head_of(run.device) if run.trainer == "sft" else contextlib.nullcontext()
    with on_fake_tensors(), kernels_of(run.device), head:
        prepared = made_trainable(fake_model(skeleton, DTYPES[run.dtype]), asked, peft=run.peft)
        settled = carried_plan(prepared) or first
        report = step_report(prepared, settled, run, fake=True)
    notes = (*report.notes, *_remarks(settled, run))
    return shard(dataclasses.replace(report, total_parameters=total, notes=notes), sharding, devices)


def least_weights(
    model: Any,
    *,
    dtype: Any = Step.dtype,
    quantization: str | None = Step.quantization,
    sharding: str = "none",
    devices: int = 1,
    model_class: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Bytes on one device that the weights take at least, whatever trains: a lower bound of every dry run, from shapes alone.

    Of a quantized base every Linear is counted as quantized. The arguments are those of `estimate_memory`.
    """
    config = config_of(model, revision, trust_remote_code)
    run = _resolved(_step({}, dtype=dtype, quantization=quantization), model, config)
    found = model_class_of(model, config, model_class, trust_remote_code)
    held = DTYPES[run.dtype]
    skeleton = skeleton_of(found, config, held, "eager", trust_remote_code)
    of_linears = {None: held.itemsize, "int8": 1.0}.get(run.quantization, 0.5)
    linears = {id(m.weight) for m in skeleton.modules() if isinstance(m, nn.Linear)}
    size = sum(p.numel() * (of_linears if id(p) in linears else held.itemsize) for p in skeleton.parameters())
    return int(size) // (devices if sharding in ("zero3", "fsdp2") else 1)


def usual_step(
    model: Any, *, model_class: Any = None, revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Fields of `Step` as `spectrum-peft train` has them on a GPU without flags: TRL's trainer for causal models."""
    config = config_of(model, revision, trust_remote_code)
    found = model_class_of(model, config, model_class, trust_remote_code).__name__
    causal = found.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "batch_size": 8,
        "max_length": min(Step.max_length, getattr(config, "max_position_embeddings", None) or Step.max_length),
        "dtype": "bfloat16",
        "optimizer": "adamw_torch_fused",
        "trainer": "sft" if causal else "transformers",
        "gradient_checkpointing": causal,
    }


def measure_memory(
    model: Any, plan: Plan | None = None, *, optimizer: str | OptimizerFactory | None = None, **step: Any
) -> MemoryReport:
    """The same step on the real tensors of a model that is ready to train: the reference of `estimate_memory`.

    Two optimizer steps are run, with every micro-batch, so the model's weights change. On the CPU, or on a CUDA device,
    where `torch.cuda.max_memory_allocated` says the same and more.

    Args:
        model: as `load_model_with_spectrum` or `get_peft_model` returned it.
        plan: None for the one that the model carries.
        optimizer: name as in `Step`, or a function of parameter groups that makes the optimizer; for 8-bit ones, such
            as `bitsandbytes.optim.AdamW8bit`, the latter.
        step: other fields of `Step`.
    """
    run = _step({**step, "device": next(model.parameters()).device.type})
    found = plan or carried_plan(model)
    if found is None:
        raise MismatchError(f"{type(model).__name__} carries no plan, and none was given.")
    run = _resolved(run, model, getattr(base_module(model), "config", None))
    name = optimizer if isinstance(optimizer, str) else run.optimizer
    if not callable(optimizer) and name in EIGHT_BIT_ADAM:
        raise OptionError(f"optimizer={name!r}: give a function that makes it, such as bitsandbytes.optim.AdamW8bit.")
    return step_report(model, found, dataclasses.replace(run, optimizer=name), fake=False, optimizer=optimizer)


def carried_plan(model: Any) -> Plan | None:
    """The plan that a model carries: a plain one frozen to it, or the active adapter's."""
    own = getattr(model, "spectrum_plan", None)
    return own or getattr(getattr(model, "active_peft_config", None), "plan", None)


def _step(more: Mapping[str, Any], **settings: Any) -> Step:
    fields = {f.name for f in dataclasses.fields(Step)}
    for name in more:
        if name not in fields:
            raise OptionError(f"unknown setting {name!r}." + near_matches(name, fields))
    return Step(**settings, **more)


def _resolved(step: Step, model: Any, config: Any) -> Step:
    """The same step with what is `auto` in it decided."""
    dtype = step.dtype
    if dtype == "auto":
        own = getattr(model, "dtype", None) if isinstance(model, PreTrainedModel) else getattr(config, "dtype", None)
        dtype = str(own).removeprefix("torch.")
        dtype = dtype if dtype in DTYPES else "bfloat16"
    mixed = step.mixed_precision
    if mixed == "auto":
        mixed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no")
    return dataclasses.replace(step, dtype=dtype, mixed_precision=mixed)


def _asked(plan: Any, model: Any, revision: str | None) -> tuple[SpectrumConfig, Plan]:
    """A config to apply to a model without values, so without a fingerprint, and the plan as known so far."""
    if isinstance(plan, SpectrumConfig):
        config = copy.deepcopy(plan)
        if config.plan is None:
            report = config.resolved_report(model, revision=revision)
            if report is None:
                raise OptionError("the SpectrumConfig has neither plan nor report, and there are no weights to scan.")
            gradients = config.resolved_gradients()
            first = make_plan(report, gradients=gradients, candidates=candidates_of(config, report), **config.options())
            config.report = dataclasses.replace(report, fingerprint=Fingerprint(None, None, "live"))
            config.gradients = None if gradients is None else dataclasses.replace(gradients, fingerprint=None)
            return config, first
    elif isinstance(plan, Plan | str | os.PathLike):
        named = plan if isinstance(plan, Plan) else Plan.named(plan, model_id=model if isinstance(model, str) else None)
        config = SpectrumConfig(plan=named)
    else:
        raise OptionError(f"plan is a {type(plan).__name__}, wanted a Plan, the path of one, or a SpectrumConfig.")
    first = config.plan
    config.plan = first.replace(fingerprint=None)
    return config, first


def _check_positions(model: nn.Module, length: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and names.module_name(f"{name}.weight").rpartition(".")[2] in _POSITIONS:
            if module.num_embeddings < length:
                raise OptionError(f"max_length is {length}, but {name} holds {module.num_embeddings} positions.")


_POSITIONS = frozenset({"position_embeddings", "wpe", "embed_positions"})


def _remarks(plan: Plan, step: Step) -> Iterator[str]:
    sixteen = step.dtype in ("bfloat16", "float16")
    if sixteen and steps_in_float32(plan, step):
        yield f"what trains is held in float32 (trainable_dtype); the rest stays in {step.dtype}"
    elif sixteen and MODES[plan.mode].plain_model and step.quantization is None and not step.peft:
        yield f"without autocast a plain model trains in {step.dtype}, where most steps round to nothing"
    if step.quantization is not None and sixteen:
        yield "PEFT's preparation of quantized bases keeps norms, embeddings, fused experts and the output head in float32"
    if step.device == "cuda" and step.optimizer in ("adamw_torch", "sgd"):
        yield f"{step.optimizer} works on lists of all tensors at once (foreach); adamw_torch_fused needs no such lists"
    if step.optimizer == "paged_adamw_8bit":
        yield "paged states are counted as if none were paged out"
    if step.device == "cuda":
        yield "not counted: CUDA's context (some 0.3 to 0.6 GiB), cuBLAS workspaces, memory the allocator holds unused"


def shard(report: MemoryReport, sharding: str, devices: int) -> MemoryReport:
    """One device's share where training is spread over several, by arithmetic on a report of one.

    With N devices, each with a batch of its own, so that activations, logits and inputs stay as they are:

    - `data_parallel`: all of it on each device, and DDP's buckets, as large as the gradients (PyTorch's documentation
      of `gradient_as_bucket_view`).
    - `zero1`: optimizer / N, and what its step makes on the way. `zero2`: gradients too. `zero3`: weights and adapters
      too. Source: Rajbhandari et al. (2020), ZeRO, arXiv:1910.02054, section 5 and figure 1: (2 + 2 + K) psi becomes
      2 psi + 2 psi + K psi / N for P_os, 2 psi + (2 + K) psi / N for P_os+g, (4 + K) psi / N for P_os+g+p; our
      categories stand for the terms, with what really trains for psi in gradients and optimizer. DeepSpeed keeps
      float32 copies of 16-bit weights that train (the 4 of K = 12 there); they are added, divided by N.
    - `fsdp2`: as `zero3` without those copies (`fully_shard` trains the sharded parameters themselves).

    `zero3` and `fsdp2` gather one block while the next is fetched, and hold one block's whole gradient before it is
    scattered: twice `largest_block_bytes` and once `largest_block_gradients` are added. They gather in the dtype that they
    compute in, so that autocast has nothing to cast: `cast_bytes` are taken off where its copies live.

    Raises:
        OptionError: an unknown sharding, or fewer than one device.
    """
    if sharding not in SHARDINGS:
        raise OptionError(f"sharding is {sharding!r}." + near_matches(str(sharding), SHARDINGS))
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise OptionError(f"devices is {devices!r}, wanted a whole number of at least 1.")
    if sharding == "none" or devices == 1:
        if devices > 1:
            raise OptionError(f"devices is {devices}, but sharding is 'none'." + near_matches("", SHARDINGS[1:]))
        return report
    split = {
        "data_parallel": (),
        "zero1": ("optimizer",),
        "zero2": ("optimizer", "gradients"),
    }.get(sharding, ("optimizer", "gradients", "weights", "quantized_weights", "adapters"))
    master = 0
    if sharding.startswith("zero") and 0 < report.trainable_bytes < 4 * report.trainable_parameters:
        master = 4 * report.trainable_parameters
    phases = {}
    for phase, composition in report.phases.items():
        local = {*split, "temporaries"} if split and phase == "optimizer" else set(split)
        share = {name: -(-size // devices) if name in local else size for name, size in composition.items()}
        if sharding == "data_parallel":
            share["gradients"] = share.get("gradients", 0) + report.trainable_bytes
        if master:
            share["optimizer"] = share.get("optimizer", 0) + -(-master // devices)
        if "weights" in split and phase in ("forward", "backward"):
            share["weights"] = share.get("weights", 0) + 2 * report.largest_block_bytes
            if phase == "forward" or not report.settings.get("gradient_checkpointing"):
                share["activations"] = max(0, share.get("activations", 0) - report.cast_bytes)
            if phase == "backward":
                share["gradients"] = share.get("gradients", 0) + report.largest_block_gradients
        phases[phase] = by_category(share)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return dataclasses.replace(
        report,
        peak_bytes=sum(phases[phase].values()),
        by_category=phases[phase],
        phase=phase,
        where=report.where if phase == report.phase else "",
        phases=phases,
        devices=devices,
        settings={**report.settings, "sharding": sharding, "devices": devices},
        notes=(*report.notes, f"{sharding} over {devices} devices is arithmetic on the dry run of one device"),
    )
