"""An axolotl config as one for `train`; what has no counterpart is named, and nothing is dropped in silence.

Source of the keys: axolotl-ai-cloud/axolotl@00564c8 src/axolotl/utils/schemas/ (config.py, peft.py, datasets.py, training.py),
and its Spectrum plugin. `export.export_axolotl` is the other direction.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from ..errors import OptionError, quoted
from ..records import read_mapping
from .arguments import keys_refused

# Keys that mean the same under another name, or under the same one.
_SAME = {
    "base_model": "model", "revision_of_model": "revision", "trust_remote_code": "trust_remote_code", "output_dir": "output_dir",
    "sequence_len": "max_length", "sample_packing": "packing", "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_epochs": "num_train_epochs", "max_steps": "max_steps", "learning_rate": "learning_rate",
    "lr_scheduler": "lr_scheduler_type", "optimizer": "optim", "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay", "max_grad_norm": "max_grad_norm", "adam_beta1": "adam_beta1", "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon", "gradient_checkpointing": "gradient_checkpointing", "logging_steps": "logging_steps",
    "eval_steps": "eval_steps", "save_steps": "save_steps", "save_strategy": "save_strategy", "eval_strategy": "eval_strategy",
    "save_total_limit": "save_total_limit", "seed": "seed", "tf32": "tf32", "attn_implementation": "attn_implementation",
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save", "peft_use_rslora": "use_rslora", "peft_use_dora": "use_dora",
    "peft_layers_to_transform": "layers_to_transform", "resume_from_checkpoint": "resume_from_checkpoint",
    "hub_model_id": "hub_model_id", "neftune_noise_alpha": "neftune_noise_alpha",
}  # fmt: skip
# Said by the checkpoint, or what happens here anyway.
_NEEDLESS = frozenset({
    "model_type", "tokenizer_type", "base_model_config", "tokenizer_config", "is_llama_derived_model", "is_mistral_derived_model",
    "is_qwen_derived_model", "lora_target_linear", "pad_to_sequence_len", "dataset_prepared_path", "strict", "plugins",
    "train_on_eos", "eot_tokens", "spectrum_model_name",
})  # fmt: skip
_RL = ("dpo", "kto", "grpo")
# Keys that become others here: what is said of it.
_BECAME = {
    "warmup_ratio": "warmup_steps: {0}, which below 1 is a share of all steps",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "wandb_project": "report_to: wandb; the name goes into the environment, WANDB_PROJECT={0}",
}
# Forms of rows that `data` finds by their columns.
_FORMS = ("chat_template", "alpaca", "sharegpt", "completion", "input_output", "alpaca_chat", "instruct")


def from_axolotl(path: str) -> tuple[dict[str, Any], list[str]]:
    """
    Returns:
        (keys of `train`; for each thing that was not understood a line that names it).
    Raises:
        CheckpointError: no mapping in the file. OptionError: no `base_model`.
    """
    given = {key: value for key, value in read_mapping(path).items() if value is not None}
    if "base_model" not in given:
        raise OptionError(f"{path}: no base_model, so that it is no config of axolotl.")
    found: dict[str, Any] = {}
    unknown: list[str] = []
    if "warmup_steps" in given and "warmup_ratio" in given:
        unknown.append(f"warmup_ratio: {quoted(given.pop('warmup_ratio'))} (warmup_steps is given, too)")
    for key, value in given.items():
        if key in _SAME:
            found[_SAME[key]] = value
        elif key in _READ:
            _READ[key](value, found, unknown)
        elif key not in _NEEDLESS:
            unknown.append(f"{key}: {quoted(value)}")
    _mode(given, found, unknown)
    if found.get("optim") == "adamw_bnb_8bit":
        found["optim"] = "adamw_8bit"
    for name in ("eval_steps", "save_steps"):
        if name in found:
            found.setdefault(name.replace("steps", "strategy"), "steps")
    if found.get("eval_strategy", "no") != "no" and not {"eval_dataset", "eval_split"} & set(found):
        for name in ("eval_strategy", "eval_steps"):
            if name in found:
                unknown.append(f"{name}: {quoted(found.pop(name))} (there are no rows to judge on)")
    return found, unknown


def _mode(given: Mapping[str, Any], found: dict[str, Any], unknown: list[str]) -> None:
    adapter = given.get("adapter")
    if given.get("load_in_4bit") or adapter == "qlora":
        found["quantization"] = (given.get("bnb_config_kwargs") or {}).get("bnb_4bit_quant_type", "nf4")
    elif given.get("load_in_8bit"):
        found["quantization"] = "int8"
    if adapter in ("lora", "qlora"):
        found["mode"] = "lora"
    elif adapter is not None:
        unknown.append(f"adapter: {quoted(adapter)} (a method of PEFT's own goes to --peft-config)")
    elif "spectrum_top_fraction" in given:
        found["mode"], found["spectrum_ratio"] = "spectrum", given["spectrum_top_fraction"]
    else:
        found["mode"] = "full"
        if given.get("unfrozen_parameters"):
            unknown.append(
                "unfrozen_parameters (a plan says what trains: `spectrum-peft plan`; mode full trains everything)"
            )


# Names of who speaks and what that are seen from the rows.
_TURNS = ({"role": "from", "content": "value"}, {"role": "role", "content": "content"})


def _datasets(name: str) -> Callable[[Any, dict[str, Any], list[str]], None]:
    def read(value: Any, found: dict[str, Any], unknown: list[str]) -> None:
        paths = []
        for row in value if isinstance(value, list) else [value]:
            row = row if isinstance(row, Mapping) else {"path": row}
            files = row.get("data_files")
            files = files if isinstance(files, list) else [files] if files else []
            paths += files or [row.get("path")]
            form = row.get("type")
            for key, one in row.items():
                if key == "split":
                    found.setdefault(f"{name}_split" if name == "dataset" else "eval_split", one)
                elif key == "field" and form == "completion":
                    found["text_column"] = one
                elif key == "message_property_mappings" and one in _TURNS:
                    pass
                elif key == "field_messages":
                    found["messages_column"] = one
                elif key == "type" and isinstance(one, str) and one.split(".")[0].split(":")[0] in _FORMS:
                    pass
                elif key not in ("path", "data_files", "ds_type"):
                    unknown.append(f"{name}s: {key}: {quoted(one)}")
        found[name] = ",".join(map(str, paths))

    return read


def _precision(key: str, dtype: str) -> Callable[[Any, dict[str, Any], list[str]], None]:
    def read(value: Any, found: dict[str, Any], unknown: list[str]) -> None:
        if value is True or (value == "auto" and dtype == "bfloat16"):
            found["dtype"] = dtype
        elif value:
            unknown.append(f"{key}: {quoted(value)}")

    return read


def _rl(value: Any, found: dict[str, Any], unknown: list[str]) -> None:
    if value in _RL:
        found["task"] = value
    else:
        unknown.append(f"rl: {quoted(value)}")


def _attention(name: str) -> Callable[[Any, dict[str, Any], list[str]], None]:
    def read(value: Any, found: dict[str, Any], unknown: list[str]) -> None:
        if value:
            found.setdefault("attn_implementation", name)

    return read


def _warmup_ratio(value: Any, found: dict[str, Any], unknown: list[str]) -> None:
    """Since transformers 5 a share of the steps is a `warmup_steps` below 1 (TrainingArguments.get_warmup_steps)."""
    if isinstance(value, float | int) and 0 <= value < 1:
        found["warmup_steps"] = value
    else:
        unknown.append(f"warmup_ratio: {quoted(value)}")


def _val_set(value: Any, found: dict[str, Any], unknown: list[str]) -> None:
    if value:
        unknown.append(f"val_set_size: {value} (no rows are taken off the training set; name others by eval_dataset)")


# Keys that are read by a function of (value, keys found so far, lines on what was not understood).
_READ: dict[str, Callable[[Any, dict[str, Any], list[str]], None]] = {
    "datasets": _datasets("dataset"),
    "test_datasets": _datasets("eval_dataset"),
    "bf16": _precision("bf16", "bfloat16"),
    "fp16": _precision("fp16", "float16"),
    "bfloat16": _precision("bfloat16", "bfloat16"),
    "rl": _rl,
    "rl_beta": lambda v, f, u: f.update(beta=v),
    "dpo_beta": lambda v, f, u: f.update(beta=v),
    "train_on_inputs": lambda v, f, u: f.update({"loss_on": "all"} if v else {}),
    "flash_attention": _attention("flash_attention_2"),
    "sdp_attention": _attention("sdpa"),
    "eager_attention": _attention("eager"),
    "val_set_size": _val_set,
    "warmup_ratio": _warmup_ratio,
    "group_by_length": lambda v, f, u: f.update(train_sampling_strategy="group_by_length") if v else None,
    "wandb_project": lambda v, f, u: f.update(report_to="wandb") if v else None,
    "chat_template": lambda v, f, u: None if v == "tokenizer_default" else u.append(f"chat_template: {quoted(v)}"),
    # read by `_mode`
    **dict.fromkeys(
        (
            "adapter",
            "load_in_4bit",
            "load_in_8bit",
            "spectrum_top_fraction",
            "unfrozen_parameters",
            "bnb_config_kwargs",
        ),
        lambda v, f, u: None,
    ),
}


def imported(path: str, known: argparse.ArgumentParser) -> tuple[str, list[str]]:
    """The YAML for `train`, each key of which `train` takes, and lines on what was not understood or became another key, which
    stand in its comments, too.

    Args:
        known: the parser of `train`.
    """
    found, unknown = from_axolotl(path)
    for key, why in keys_refused(found.get("task", "causal_lm"), found, known, path).items():
        unknown.append(f"{key}: {quoted(found.pop(key))} ({why})")
    given = read_mapping(path)
    lines = [f"not understood: {line}" for line in unknown]
    lines += [
        f"{key} became {said.format(given[key])}"
        for key, said in _BECAME.items()
        if given.get(key) and not any(line.startswith(f"{key}:") for line in unknown)
    ]
    head = [f"# Imported from {path}, a config of axolotl.", *(f"# {line}" for line in lines)]
    return "\n".join(head) + "\n" + yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120), lines
