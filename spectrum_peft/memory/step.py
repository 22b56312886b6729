"""One training step, as a trainer takes it, under the tracker: on fake tensors or on real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from .. import names
from ..errors import CheckpointError, OptionError, near_matches
from ..plan import MODES
from ..records import MemoryReport, Plan
from ..tuner import SpectrumLayer, SpectrumModel
from ..tuner.loading import QUANTIZATIONS, task_type_of
from ..weights import base_module
from .tracker import CATEGORIES, PHASES, StorageTracker

DEVICES = ("cuda", "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINERS = ("transformers", "sft")
EIGHT_BIT_ADAM = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", *EIGHT_BIT_ADAM)
# CUDA's caching allocator hands out multiples of this many bytes (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize).
_CUDA_BLOCK = 512


MOST_TOKENS = 10**8  # of a step on one device: beyond it sizes in bytes leave 64 bits


@dataclass(frozen=True)
class Step:
    """How the step is run: what the trainer, the loader and the device would be told.

    Attributes:
        batch_size: sequences in a micro-batch, on one device. max_length: tokens in each.
        dtype: of the weights as loaded: `float32`, `bfloat16`, `float16`; `auto` for the config's, else bfloat16.
        optimizer: one of `OPTIMIZERS`.
        gradient_checkpointing: as transformers enables it, with `use_reentrant=False`.
        gradient_accumulation_steps: micro-batches before the optimizer's step.
        quantization: of the base: `nf4`, `fp4`, `int8` or None.
        attn_implementation: `sdpa` or `eager`; None for what transformers takes for the model: `sdpa` where it has that.
        device: whose kernels and allocator to model, `cuda` or `cpu`.
        trainer: `transformers` (the model computes logits and loss) or `sft` (TRL's head computes the loss in chunks).
        mixed_precision: the trainer's autocast, `bf16`, `fp16` or `no`; `auto` for that of a 16-bit dtype, as
            `spectrum-peft train` and TRL have it.
        padding: batches hold padding, so that attention gets a mask; False: it gets none.
        max_grad_norm: gradients are clipped to it; 0 for no clipping.
        peft: True: wrapped by PEFT in every mode, as the trainers' `peft_config` does; None: only where it is needed.
        reference: the loss holds the model beside itself as it was before (DPO, KTO; `trainer="sft"` says what a pass costs): a
            second pass without gradients while the first one's activations lie there, and a copy of what it needs, of all
            weights of a plain model and of the adapter of a wrapped one. False where the log-probabilities of the reference
            are precomputed.
    """

    batch_size: int = 1
    max_length: int = 1024
    dtype: str = "auto"
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    quantization: str | None = None
    attn_implementation: str | None = None
    device: str = "cuda"
    trainer: str = "transformers"
    mixed_precision: str = "auto"
    padding: bool = True
    max_grad_norm: float = 1.0
    peft: bool | None = None
    reference: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}, wanted a whole number of at least 1.")
        if self.batch_size * self.max_length > MOST_TOKENS:
            raise OptionError(
                f"batch_size * max_length is {self.batch_size * self.max_length:,}, wanted at most {MOST_TOKENS:,} tokens on "
                "one device."
            )
        if self.quantization in ("none", "None"):
            object.__setattr__(self, "quantization", None)
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        for name, choices in (
            ("dtype", ("auto", *DTYPES)), ("optimizer", OPTIMIZERS), ("device", DEVICES), ("trainer", TRAINERS),
            ("quantization", (None, *QUANTIZATIONS)), ("mixed_precision", ("auto", "no", "bf16", "fp16")),
            ("attn_implementation", (None, "sdpa", "eager")),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(f"{name} is {value!r}." + near_matches(str(value), [c for c in choices if c]))
        if self.reference and self.trainer != "sft":
            raise OptionError(f"reference=True is for trainer='sft', and trainer is {self.trainer!r}.")


class _EightBitAdamSizes(torch.optim.Optimizer):
    """Allocates what bitsandbytes' 8-bit AdamW keeps, and does nothing: its kernels take addresses, not fake tensors.

    Two states of one byte an element with a float32 maximum for each 256, two code books of 256 float32 for all;
    float32 states for tensors under 4096 elements, and for embeddings, which the Trainer excepts.
    Source: bitsandbytes 0.50.2 optim/optimizer.py, `Optimizer2State.init_state`; transformers 5.23 trainer.py,
    `create_optimizer`.

    Args:
        in_float32: ids of the parameters that are excepted.
    """

    def __init__(self, groups: Any, in_float32: set[int]) -> None:
        super().__init__(groups, {})
        self.in_float32 = in_float32
        self.code_books = [torch.empty(256) for _ in range(2)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or self.state[p]:
                    continue
                small = p.numel() < 4096 or id(p) in self.in_float32
                for name in ("state1", "state2"):
                    self.state[p][name] = torch.empty_like(p, dtype=torch.float32 if small else torch.uint8)
                    if not small:
                        self.state[p][f"{name}_absmax"] = torch.empty(-(-p.numel() // 256))


OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def _optimizer(name: str | OptimizerFactory, model: nn.Module, device: str) -> torch.optim.Optimizer:
    """The optimizer as the Trainer makes it, on the parameters that train."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": ps} for ps in ([p for p in trained if p.dim() > 1], [p for p in trained if p.dim() < 2]) if ps
    ]
    if callable(name):
        return name(groups)
    # torch's default is foreach on a GPU, which makes lists of intermediates as large as all that trains, and one
    # tensor at a time on a CPU. It asks the tensors' types, and fake ones are of neither.
    foreach = device == "cuda"
    if name == "adamw_torch":
        return torch.optim.AdamW(groups, lr=1e-4, foreach=foreach)
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(groups, lr=1e-4, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=1e-4, foreach=foreach)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=1e-4, scale_parameter=False, relative_step=False)
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return _EightBitAdamSizes(groups, embeddings)


def _batch(model: Any, task: str | None, step: Step, device: Any) -> dict[str, Tensor]:
    """One micro-batch as a collator makes it: token ids, a mask, labels. Of the values, only the range matters."""
    config = model.config
    size = (step.batch_size, step.max_length)

    def tokens(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.int64, device=device)

    batch = {"input_ids": tokens(*size)}
    if step.padding:
        mask = tokens(*size)
        mask[0, 0] = 0  # one padded place is enough for attention to need the mask
        batch["attention_mask"] = mask
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS"):
        batch["labels"] = tokens(*size)
    elif task == "SEQ_CLS":
        outputs, problem = getattr(config, "num_labels", 2), getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            batch["labels"] = tokens(step.batch_size, outputs).float()
        else:
            number = outputs == 1 or problem == "regression"
            batch["labels"] = tokens(step.batch_size).float() if number else tokens(step.batch_size)
    elif task == "QUESTION_ANS":
        batch |= {"start_positions": tokens(step.batch_size), "end_positions": tokens(step.batch_size)}
    return batch


def _loss(model: Any, batch: dict[str, Tensor], step: Step, autocast: Any) -> Tensor:
    """The loss as the trainer computes it; nothing but its graph is left when this returns."""
    if step.trainer == "sft":
        with autocast:
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
            if step.reference:
                # trl 1.16 dpo_trainer.py, `_compute_loss`; kto_trainer.py has another such pass before the first
                with torch.no_grad():
                    model(**batch, use_cache=False, fused_lm_head=True)
        # trl 1.16 sft_trainer.py, `compute_loss`: per-token log-probabilities, summed
        return -outputs.log_probs.sum() / batch["labels"].numel()
    with autocast:
        outputs = model(**batch)
    if step.mixed_precision != "no":  # accelerate gives the caller float32 copies of all outputs
        outputs = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in outputs.items()}
    loss = outputs["loss"] if isinstance(outputs, dict) and "loss" in outputs else None
    if loss is None:  # a model without a head: any scalar of its output has the same graph below
        loss = outputs[0].float().mean()
    return loss


@contextlib.contextmanager
def _autocast(step: Step, device: str) -> Iterator[None]:
    if step.mixed_precision == "no":
        yield
        return
    dtype = torch.bfloat16 if step.mixed_precision == "bf16" else torch.float16
    # PEFT asks whether autocast is on for CUDA; on fake tensors for a GPU it would be.
    before = torch.is_autocast_enabled("cuda")
    if step.device == "cuda" and device == "cpu":
        torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast(device, dtype=dtype):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def _ready_for_the_trainer(model: Any, plan: Plan, step: Step) -> None:
    """What trainer and callback do to a model before the first step."""
    model.train()
    base: Any = base_module(model)
    base.config.use_cache = False
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, SpectrumModel):
        tuner.attended()
    if steps_in_float32(plan, step):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    if step.gradient_checkpointing:
        try:
            base.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise OptionError(f"gradient_checkpointing: {error}") from error
        if step.trainer == "sft" and isinstance(model, PeftModel):
            model.enable_input_require_grads()
        # SpectrumCallback lets backward end where nothing below trains; each enable_input_require_grads leaves a hook.
        embeddings = any(
            e.trains and names.block_index(e.name) is None and names.role(e.name, e.shape) == "embedding"
            for e in plan.entries
        )
        if plan.options.get("backward_depth", 1.0) < 1 and not embeddings:
            base.disable_input_require_grads()
            base.disable_input_require_grads()
    if step.trainer == "sft":
        if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
            raise OptionError("trainer='sft' needs a model with an output head; use trainer='transformers'.")
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))


def steps_in_float32(plan: Plan, step: Step) -> bool:
    """Whether `spectrum-peft train` holds what trains of a plain 16-bit model in float32: under autocast it does.

    A tuner layer does so by itself, autocast or not.
    """
    plain = MODES[plan.mode].plain_model and step.quantization is None and not step.peft
    return plain and step.mixed_precision != "no" and plan.options.get("trainable_dtype", "float32") == "float32"


def _statistics(parameter: Any, module: nn.Module) -> Iterator[Tensor]:
    """What lies beside a bitsandbytes weight."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if t is not None)
        state = state.state2
    for holder in (parameter, getattr(module, "state", None)):
        yield from (t for name in ("CB", "SCB") if (t := getattr(holder, name, None)) is not None)


def _adopt_model(tracker: StorageTracker, model: nn.Module, step: Step) -> int:
    """Put the model's storages into categories; the bytes of originals kept in main memory are returned."""
    host = []
    for name, module in model.named_modules():
        parts = name.split(".")
        adapter = "lora_spectrum" not in parts and any(part.startswith("lora_") for part in parts)
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            quantized = not parameter.is_floating_point()
            category = "quantized_weights" if quantized else "adapters" if adapter else "weights"
            tracker.adopt([parameter], category)
            if quantized:
                tracker.adopt(_statistics(parameter, module), category)
        tracker.adopt((b for b in module._buffers.values() if b is not None), "weights")
        if isinstance(module, SpectrumLayer):
            host += [o.kept for o in module.originals.values() if o.kept is not None]
    if step.device == "cpu":
        tracker.adopt(host, "host_copies")
    return sum(t.untyped_storage().nbytes() for t in host)


def _reference(model: nn.Module) -> tuple[list[Tensor], str]:
    """What lies beside a model so that it can be run as it was before, and the category of that.

    Source: trl 1.16, dpo_trainer.py, `DPOTrainer.__init__`: a second model, or the adapter again under the name `ref`.
    """
    if not isinstance(model, PeftModel):
        return [torch.empty_like(t) for t in (*model.parameters(), *model.buffers())], "weights"
    return [torch.empty_like(p) for name, p in model.named_parameters() if ".default." in name], "adapters"


@contextlib.contextmanager
def _watched(model: nn.Module, tracker: StorageTracker) -> Iterator[None]:
    """Tell the tracker where the step is, and which storages are gradients."""
    handles = []

    def enter(name: str, *_: Any) -> None:
        tracker.where = f"in {name}" if tracker.phase == "forward" else f"in {name}, recomputed"

    def gradient(name: str, parameter: Tensor) -> None:
        tracker.where = f"after the gradient of {name}"
        if parameter.grad is not None:
            tracker.adopt([parameter.grad], "gradients")

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name or type(model).__name__)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(partial(gradient, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_step(
    model: Any, task: str | None, optimizer: Any, tracker: StorageTracker, step: Step, device: Any, micro: int
) -> None:
    """`micro` micro-batches, then clipping and the optimizer's step, as transformers' Trainer does them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(micro):
        tracker.enter("forward")
        batch = _batch(model, task, step, device)
        tracker.adopt(batch.values(), "inputs")
        loss = _loss(model, batch, step, _autocast(step, torch.device(device).type))
        del batch
        loss = loss / step.gradient_accumulation_steps
        tracker.enter("backward")
        loss.backward()
        del loss
    tracker.where = ""
    tracker.enter("clip")
    if step.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(trained, step.max_grad_norm, foreach=step.device == "cuda" or None)
    tracker.enter("optimizer")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _vocabulary(model: Any) -> int | None:
    base: Any = base_module(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return None if head is None else int(getattr(head, "out_features", 0)) or None


def _largest_block(model: nn.Module, tracker: StorageTracker) -> tuple[int, int]:
    """(bytes of the weights, bytes of what trains) of the repeated block that is largest."""
    blocks: dict[str, list[tuple[nn.Module, Tensor]]] = {}
    for name, module in base_module(model).named_modules():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if names.is_number(part)), None)
        if at is not None:
            rows = blocks.setdefault(".".join(parts[: at + 1]), [])
            rows += [(module, p) for p in module._parameters.values() if p is not None]
    sizes = [
        (tracker.bytes_of(p for _, p in rows), tracker.bytes_of(p for _, p in rows if p.requires_grad))
        for rows in blocks.values()
    ]
    return max(sizes, default=(0, 0))


def _cast_bytes(model: nn.Module) -> int:
    """Bytes of the 16-bit copies that autocast makes of matrices: of float32 leaves that want a gradient it keeps them.

    Source: pytorch 2.13, aten/src/ATen/autocast_mode.cpp, `cached_cast`.
    """
    cast = {
        id(p): 2 * p.numel()
        for module in model.modules() if not isinstance(module, nn.Embedding)
        for p in module._parameters.values()
        if p is not None and p.requires_grad and p.dtype == torch.float32 and p.dim() > 1
    }  # fmt: skip
    return sum(cast.values())


def step_report(
    model: Any, plan: Plan, step: Step, *, fake: bool, optimizer: str | OptimizerFactory | None = None
) -> MemoryReport:
    """Run the step on a model that is ready to train, fake or real, and report."""
    task = task_type_of(base_module(model))
    device = next(p.device for p in model.parameters())
    _ready_for_the_trainer(model, plan, step)
    tracker = StorageTracker(device.type, _CUDA_BLOCK if step.device == "cuda" else 1, _vocabulary(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    notes: list[str] = []
    complete = True
    with tracker, _watched(model, tracker):
        host = _adopt_model(tracker, model, step)
        beside, category = _reference(model) if step.reference else ([], "weights")
        tracker.adopt(beside, category)
        maker = _optimizer(optimizer or step.optimizer, model, step.device)
        if fake:
            # The steady state at the price of one step: states are made from empty gradients; with accumulation, the
            # gradients of the earlier micro-batches are there when the last one comes.
            tracker.enter("optimizer")
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                tracker.adopt([parameter.grad], "gradients")
            maker.step()
            _adopt_states(tracker, maker)
            tracker.peaks.clear()  # states were being made, which is no part of a step
            if step.gradient_accumulation_steps == 1:
                maker.zero_grad(set_to_none=True)
            try:
                _run_step(model, task, maker, tracker, step, device, micro=1)
            except _NOT_ON_FAKE_TENSORS as error:
                reads = getattr(base_module(model), "main_input_name", "input_ids")
                if reads != "input_ids":
                    kind = type(base_module(model)).__name__
                    raise OptionError(f"{kind} reads {reads}, and a dry run makes rows of text only.") from error
                complete = False
                notes.append(_what_failed(error, tracker))
        else:
            _run_step(model, task, maker, tracker, step, device, micro=step.gradient_accumulation_steps)
            _adopt_states(tracker, maker)
            first, tracker.peaks = tracker.peaks, {}
            _run_step(model, task, maker, tracker, step, device, micro=step.gradient_accumulation_steps)
            tracker.peaks |= {name: peak for name, peak in first.items() if peak[0] > tracker.peaks[name][0]}
    peaks = tracker.peaks if complete else {"optimizer": _counted(tracker, trained)}
    phase = max(peaks, key=lambda name: peaks[name][0])
    peak, composition, where = peaks[phase]
    block, block_gradients = _largest_block(model, tracker)
    return MemoryReport(
        mode=plan.mode,
        peak_bytes=peak,
        by_category=by_category(composition),
        phase=phase,
        where=where,
        phases={name: by_category(peaks[name][1]) for name in PHASES if name in peaks},
        host_bytes=host,
        trainable_parameters=sum(p.numel() for p in trained),
        trainable_bytes=sum(p.numel() * p.element_size() for p in trained),
        total_parameters=plan.total_parameters,
        largest_block_bytes=block,
        largest_block_gradients=block_gradients,
        cast_bytes=_cast_bytes(model) if step.mixed_precision != "no" else 0,
        settings=dataclasses.asdict(step),
        complete=complete,
        notes=tuple(notes),
    )


def by_category(composition: Mapping[str, int]) -> dict[str, int]:
    return {name: composition[name] for name in CATEGORIES if composition.get(name)}


def _adopt_states(tracker: StorageTracker, optimizer: Any) -> None:
    inner = getattr(optimizer, "code_books", [])
    tracker.adopt((t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)), "optimizer")
    tracker.adopt(inner, "optimizer")


_NOT_ON_FAKE_TENSORS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
    RuntimeError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
)


def _what_failed(error: Exception, tracker: StorageTracker) -> str:
    """One line that names the operation; errors that have nothing to do with fake tensors are raised again."""
    operation = getattr(error, "func", None)
    text = " ".join(str(error).split())
    expected = isinstance(
        error,
        DataDependentOutputException
        | DynamicOutputShapeException
        | UnsupportedFakeTensorException
        | UnsupportedOperatorException
        | NotImplementedError,
    )
    if not expected and not re.search(r"fake|meta tensor|data pointer|data.dependent", text, re.IGNORECASE):
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        # A config's value that the model's code cannot take, or whose shapes only backward holds against each other.
        if any(name.startswith(("transformers.models.", "torch.autograd")) for name in modules):
            raise CheckpointError(
                f"{tracker.where or 'the model'}: cannot be run: {text[:200]}. Do the fields of its config.json fit each other?"
            ) from error
        raise error
    named = str(operation) if operation is not None else text[:200]
    return (
        f"activations are missing: {named} ({tracker.where or 'outside of any module'}) needs values, which fake "
        "tensors do not have. Counted are weights, gradients and optimizer; the real peak is higher."
    )


def _counted(tracker: StorageTracker, trained: Sequence[Tensor]) -> tuple[int, dict[str, int], str]:
    """Weights, gradients and optimizer, without a step."""
    lasting = ("weights", "quantized_weights", "adapters", "optimizer", "host_copies")
    composition = {name: tracker.bytes[name] for name in lasting if tracker.bytes[name]}
    composition["gradients"] = sum(-(-p.numel() * p.element_size() // tracker.block) * tracker.block for p in trained)
    return sum(composition.values()), composition, "counted, not run"
