"""Loading a model so that a plan can be carried out on it: the short way, and the quantization config that a plan needs."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import deepspeed as ds

from .. import names
from ..devices import default_device, fast_dtype, refuse_quantization
from ..errors import CheckpointError, OptionError, loading, near_matches, one_line
from ..plan import MODES, OPTIONS, Mode, make_plan, needs_gradients
from ..records import Plan
from ..scan import scan_weights
from ..weights import loaded_together, misread_in_4bit, read_header, settle_quantized, unquantized_modules
from ..weights.adapter_config import read_adapter_config
from ..weights.adapters import AdapterState
from . import freeze_to_plan, settle_plan
from .checkpoint_keys import say_keys, with_keys
from .classes import check_config, class_for, class_of, config_for, refuse_class, weightless
from .config import PEFT_TYPE, SpectrumConfig, candidates_of
from .model_names import plan_for, report_for
from .pushing import give_push
from .stored_bases import loading_of
from .tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("nf4", "fp4", "int8")
_OWN_KEYWORDS = ("spectrum_config", "dtype", "torch_dtype", "device_map", "quantization", "model_class")


def quantization_config_for(
    plan: Plan | None, model: Any = None, quant_type: str = "nf4", compute_dtype: torch.dtype | None = None
) -> BitsAndBytesConfig:
    """The `BitsAndBytesConfig` that leaves exactly the plan's real weights, and the output head, unquantized.

    Args:
        plan: its entries with action `train` or `save` stay in 16 or 32 bit; None or an adapter plan: only the head does.
        model: path, id, config or model that will be quantized; names the heads of a family that are not the usual ones.
        quant_type: `nf4`, `fp4` (4 bit, double quantization) or `int8`.
        compute_dtype: of products with dequantized weights; None for `fast_dtype()`.
    Raises:
        OptionError: an unknown `quant_type`; a plan of mode `full`, which leaves nothing to quantize.
    """
    if quant_type not in QUANTIZATIONS:
        raise OptionError(f"quant_type is {quant_type!r}." + near_matches(str(quant_type), QUANTIZATIONS))
    skipped = []
    if plan is not None:
        check_quantizable(MODES[plan.mode])
        skipped = [names.module_name(e.name) for e in plan.entries if e.trains and e.action in ("train", "save")]
    skipped += sorted(names.HEADS)
    skeleton = model if isinstance(model, nn.Module) else weightless(model)
    if skeleton is not None:
        if quant_type != "int8" and default_device().type == "cpu":
            skipped += misread_in_4bit(skeleton)
        skipped = loaded_together(skeleton, [*skipped, *unquantized_modules(skeleton)])
    skipped = list(dict.fromkeys(skipped))
    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype or fast_dtype(),
        llm_int8_skip_modules=skipped,
    )


def load_model_with_spectrum(
    model_name: str,
    spectrum_config: str | os.PathLike[str] | Plan | SpectrumConfig | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    quantization: str | None = None,
    model_class: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a checkpoint and its tokenizer, ready to train what the plan says.

    `full` and `spectrum` on a float base give the plain model with `requires_grad` set, so that `save_pretrained` writes
    a standard checkpoint. Every other mode, and `spectrum` on a quantized base, gives a `PeftModel`. `model.push_to_hub` is
    `push_model` with the tokenizer, and with the report that the config was given.

    Args:
        model_name: hub id or local folder.
        spectrum_config: plan file as `SpectrumScanner.scan_and_save` writes it, a Plan, or a `SpectrumConfig`; None scans
            and takes the defaults.
        dtype, torch_dtype: of the weights, as a torch dtype or its name; `auto` for the checkpoint's. None for `fast_dtype()`.
        device_map: as in transformers.
        quantization: `nf4`, `fp4`, `int8` or None.
        model_class: class with `from_pretrained`; None for the class that the checkpoint's config names.
        kwargs: passed to `from_pretrained` (`revision`, `attn_implementation`, `num_labels`, ...).
    Returns:
        (model, tokenizer); the tokenizer is None, with a logged line, where the checkpoint has none.
    Raises:
        MismatchError: the plan is of another checkpoint, or trains something that the model lacks.
        OptionError: dtype and torch_dtype differ; an unknown quantization; a class that the checkpoint does not fit.
    """
    for name in kwargs:  # the others are fields of transformers' loaders and configs, which differ from model to model
        near = difflib.get_close_matches(name, _OWN_KEYWORDS, n=1, cutoff=0.85)
        if near:
            raise OptionError(f"load_model_with_spectrum: {name!r} is not known. Did you mean {near[0]!r}?")
    wanted = _one_dtype(dtype, torch_dtype)
    quantization = _checked_quantization(quantization)
    config = _as_config(spectrum_config, model_name)
    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    remote = _remote(kwargs)
    described = config_for(model_name, **revision, **remote)
    loader = model_class or class_of(described)
    refuse_class(model_name, described, loader, **revision)
    if "quantization_config" not in kwargs:
        kwargs |= loading_of(described, model_name, quantization)
    if quantization is not None and "quantization_config" not in kwargs:
        skeleton = weightless(model_name, loader, **revision, **remote)
        if MODES[config.mode].real_weights:
            config.plan = _plan_before_loading(model_name, skeleton, config, **revision)
        kwargs["quantization_config"] = quantization_config_for(
            config.plan, skeleton or model_name, quantization, wanted if isinstance(wanted, torch.dtype) else None
        )
    with loading(model_name), whole_weights():
        model, keys = with_keys(loader, model_name, dtype=wanted, device_map=device_map, **{**kwargs, **remote})
    say_keys(keys, model, model_name)
    model, tokenizer = made_trainable(model, config), load_tokenizer(model_name, **revision, **remote)
    give_push(model, tokenizer, config.resolved_report())
    return model, tokenizer


def load_model_with_peft(
    model_name: str,
    peft_config: Mapping[str, Any],
    *,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    model_class: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a checkpoint with one of PEFT's own methods on it: a contestant for a comparison with ours.

    Args:
        peft_config: `peft_type` (ADALORA, LOHA, ...) and fields of its config.
        others: as in `load_model_with_spectrum`.
    Returns:
        (a `PeftModel`, tokenizer or None).
    Raises:
        OptionError: PEFT has no such method, the method no such field, or it refuses a value.
    """
    wanted = _one_dtype(dtype, None)
    quantization = _checked_quantization(quantization)
    config = checked_peft_config(peft_config)
    given = {name: kwargs[name] for name in ("revision",) if name in kwargs}
    remote = _remote(kwargs)
    described = config_for(model_name, **given, **remote)
    loader = model_class or class_of(described)
    refuse_class(model_name, described, loader, **given)
    kwargs |= loading_of(described, model_name, quantization)
    if quantization is not None:
        skeleton = weightless(model_name, loader, **given, **remote)
        kwargs["quantization_config"] = quantization_config_for(
            None, skeleton or model_name, quantization, wanted if isinstance(wanted, torch.dtype) else None
        )
    with loading(model_name), whole_weights():
        model, keys = with_keys(loader, model_name, dtype=wanted, **{**kwargs, **remote})
    say_keys(keys, model, model_name)
    if quantization is not None:
        settle_quantized(model)
        model = _prepared(model)
    try:
        model = get_peft_model(model, config)
    # Of a value that the method's own class does not check.
    except (AttributeError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise OptionError(
            f"PEFT refuses the {config.peft_type.value} config: {type(error).__name__}: {one_line(error)}"
        ) from error
    return model, load_tokenizer(model_name, **given, **remote)


@contextmanager
def whole_weights() -> Iterator[None]:
    """Load whole weights on every process, also where arguments with ZeRO-3 exist by now, under which transformers would
    partition them before a plan can be made or layers put around them. DeepSpeed partitions them when training begins."""
    held = ds._hf_deepspeed_config_weak_ref
    ds.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        ds._hf_deepspeed_config_weak_ref = held


def check_quantizable(mode: Mode) -> None:
    """
    Raises:
        OptionError: the mode trains every weight, and a quantized one does not train.
    """
    if mode.whole_model:
        raise OptionError(f"mode {mode.name!r} trains every weight, so none can be quantized; use mode='spectrum'.")


def checked_peft_config(fields: Mapping[str, Any]) -> Any:
    """The `PeftConfig` of `peft_type` and its fields.

    Raises:
        OptionError: PEFT has no such method, the method no such field, or it refuses a value.
    """
    kind = str(fields.get("peft_type"))
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise OptionError(f"peft_type is {kind!r}." + near_matches(kind, PEFT_TYPE_TO_CONFIG_MAPPING))
    known = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    for name in fields:
        if name not in known:
            raise OptionError(f"{kind} has no field {name!r}." + near_matches(name, known))
    try:
        return get_peft_config(dict(fields))
    except (TypeError, ValueError) as error:
        raise OptionError(f"PEFT refuses the {kind} config: {error}") from error


def _checked_quantization(value: str | None) -> str | None:
    if value in (None, "none", "None"):
        return None
    if value not in QUANTIZATIONS:
        raise OptionError(f"quantization is {value!r}." + near_matches(str(value), QUANTIZATIONS))
    refuse_quantization(default_device(), value)
    return value


def _prepared(model: Any) -> Any:
    """A quantized base as PEFT prepares it, with a line about the experts that this makes larger."""
    fused = [p for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n and p.element_size() == 2]
    if fused:
        logger.warning(
            "%d tensors of fused experts are no 4-bit or 8-bit layers, and PEFT's preparation of quantized bases makes them "
            "float32: %.1f GiB instead of %.1f. Without quantization they stay as they are.",
            len(fused), sum(4 * p.numel() for p in fused) / 2**30, sum(2 * p.numel() for p in fused) / 2**30,
        )  # fmt: skip
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def made_trainable(model: Any, config: SpectrumConfig, *, peft: bool | None = None) -> Any:
    """Freeze or wrap a loaded model so that it trains what the config says; the second half of `load_model_with_spectrum`.

    Args:
        peft: True for a `PeftModel` in every mode, as the trainers' `peft_config` makes; None for one where it is needed.
    """
    quantized = bool(getattr(model, "is_quantized", False))
    if MODES[config.mode].plain_model and not quantized and not peft:
        model.spectrum_plan = settle_plan(model, config)
        freeze_to_plan(model, model.spectrum_plan)
        return model
    if quantized:
        model = _prepared(model)
    config.task_type = config.task_type or task_type_of(model)
    return get_peft_model(model, config)


def load_trained(
    model_name: str,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    quantization: str | None = None,
    model_class: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load what training has saved, to be used: an adapter on its base, or a plain checkpoint.

    Args:
        model_name: folder of an adapter or of a model, or a hub id of a model.
        quantization: of the base. Weights that an adapter trained whole stay unquantized.
        others: as in `load_model_with_spectrum`.
    Returns:
        (model in eval mode, tokenizer or None). An adapter's folder brings its own tokenizer where it has one.
    """
    wanted = _one_dtype(dtype, None)
    folder = Path(model_name)
    is_adapter = (folder / "adapter_config.json").is_file()
    adapter = _adapter_config(folder) if is_adapter else None
    base = model_name if adapter is None else adapter.base_model_name_or_path
    if quantization not in (None, "none"):
        plan = getattr(adapter, "plan", None)
        kwargs["quantization_config"] = quantization_config_for(
            plan, base, quantization, wanted if isinstance(wanted, torch.dtype) else None
        )
    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    remote = _remote(kwargs)
    if adapter is not None and "quantization_config" not in kwargs:  # as it was loaded for training
        kwargs |= loading_of(config_for(base, **revision, **remote), base, quantization)
    check_config(base)
    loader = model_class or class_for(base, **revision, **remote)
    with loading(base):
        model, keys = with_keys(loader, base, dtype=wanted, device_map=device_map, **{**kwargs, **remote})
    say_keys(keys, model, base, folder if is_adapter else None)
    settle_quantized(model)  # the products of training, not the faster ones for inference that round otherwise
    if adapter is not None:
        with loading(model_name):
            model = PeftModel.from_pretrained(model, model_name)
    tokenizer = load_tokenizer(model_name) if adapter is not None else None
    if tokenizer is None:
        tokenizer = load_tokenizer(base, **revision, **remote)
    return model.eval(), tokenizer


def _adapter_config(folder: Path) -> Any:
    """PEFT's config of an adapter's folder, which is checked before PEFT believes it.

    Raises:
        CheckpointError, MismatchError: a field, or the file of the tensors, is damaged; it names no base.
    """
    fields = read_adapter_config(folder / "adapter_config.json")
    if not fields.get("base_model_name_or_path"):
        raise CheckpointError(f"{folder / 'adapter_config.json'}: base_model_name_or_path is empty, wanted the base.")
    if fields["peft_type"] == PEFT_TYPE:
        AdapterState.from_folder(folder)
    elif (folder / "adapter_model.safetensors").is_file():
        read_header(folder / "adapter_model.safetensors")
    with loading(folder):
        return PeftConfig.from_pretrained(str(folder))


def _one_dtype(dtype: Any, torch_dtype: Any) -> Any:
    given = [d for d in (dtype, torch_dtype) if d is not None]
    values = []
    for value in given:
        if isinstance(value, str) and value != "auto":
            resolved = getattr(torch, value.removeprefix("torch."), None)
            if not isinstance(resolved, torch.dtype):
                raise OptionError(
                    f"dtype is {value!r}." + near_matches(value, ("float32", "bfloat16", "float16", "auto"))
                )
            value = resolved
        values.append(value)
    if len(values) == 2 and values[0] != values[1]:
        raise OptionError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} differ; give one.")
    return values[0] if values else fast_dtype()


def _as_config(value: Any, model_name: str) -> SpectrumConfig:
    if value is None:
        return SpectrumConfig()
    if isinstance(value, SpectrumConfig):
        return value
    return SpectrumConfig(
        plan=Plan.named(value, model_id=model_name) if isinstance(value, str | os.PathLike) else value
    )


def _plan_before_loading(model_name: str, skeleton: nn.Module | None, config: SpectrumConfig, **revision: Any) -> Plan:
    """Which modules stay unquantized must be known before the weights are read, under the names of the class that reads them.

    Args:
        skeleton: of that class, without values; None where it could not be built: the names are then the files'.
    """
    if config.plan is not None:
        return config.plan if skeleton is None else plan_for(skeleton, config.plan)
    report, gradients = config.resolved_report(model_name, download=True, **revision), config.resolved_gradients()
    config.report, options = report, config.options()
    by_data = needs_gradients(options)
    if by_data and gradients is None:
        raise OptionError(
            f"criterion {options['criterion']!r} chooses by gradients, and which modules stay unquantized must be known before "
            "the model is loaded. Probe the float model first (probe_gradients) and give gradients=.",
            shell=f"criterion {options['criterion']!r} chooses by gradients, and which modules stay unquantized must be known "
            "before the model is loaded. Probe the float model first (`spectrum-peft probe`) and give gradients=FILE.",
        )
    if report is None:
        criterion = OPTIONS["criterion"] if by_data else options["criterion"]
        report = scan_weights(
            model_name,
            criterion,
            score=() if by_data else ("linear",),
            cache=not by_data,
            seed=config.seed,
            download=True,
            **revision,
        )
    if skeleton is not None:
        report = report_for(skeleton, report)
    return make_plan(report, gradients=gradients, candidates=candidates_of(config, report), **options)


def _remote(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Whether to run code that comes with a model; not to say so makes transformers ask on the terminal."""
    return {"trust_remote_code": bool(kwargs.get("trust_remote_code"))}


def task_type_of(model: Any) -> str | None:
    """PEFT's task type of a model's class; None where PEFT's wrapper for the task would call it with what it does not take.

    The wrappers of all tasks pass `input_ids` and `inputs_embeds`, which pictures and sounds have not (Whisper, ViT, Wav2Vec2);
    BLIP hands what it does not know to its other tower. A class for conditional generation has an encoder (T5), or is a decoder
    that sees or hears (LLaVA).
    """
    name = type(model).__name__
    taken = inspect.signature(model.forward).parameters
    if "input_ids" not in taken or "inputs_embeds" not in taken:
        return None
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if "decoder_input_ids" in taken else "CAUSAL_LM"
    known = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    found = next((task for ending, task in known.items() if name.endswith(ending)), None)
    # PEFT's question answering is of spans; ViLT chooses from answers, with a head of another name.
    return None if found == "QUESTION_ANS" and "start_positions" not in taken else found
