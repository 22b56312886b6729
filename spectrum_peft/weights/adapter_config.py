"""adapter_config.json of a folder: the fields that are read here, with their types and limits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ..errors import CheckpointError, quoted
from ..records import checked, read_mapping
from ..records.schema import Count, Name, Place, Rank, Scale

MOST_REPEATS = 3
# Without a `pattern`: msgspec 0.22 frees the regex of a text once too often where a list or a mapping is allowed beside it.
Pattern = Annotated[str, Meta(max_length=20_000)]


@dataclass(frozen=True)
class _AutoMapping:
    """The class that was trained, where PEFT was told of no task."""

    base_model_class: Name | None = None
    parent_library: Name | None = None


@dataclass(frozen=True)
class _AdapterConfig:
    """The fields of adapter_config.json that are read without PEFT, or that PEFT believes; the rest is PEFT's to check."""

    peft_type: Name
    base_model_name_or_path: Place | None = None
    revision: Place | None = None
    task_type: Name | None = None
    r: Rank | None = None
    lora_alpha: Scale | None = None
    rank_pattern: dict[Name, Rank] | None = None
    alpha_pattern: dict[Name, Scale] | None = None
    target_modules: Pattern | list[Name] | None = None
    exclude_modules: Pattern | list[Name] | None = None
    target_parameters: list[Name] | None = None
    modules_to_save: list[Name] | None = None
    trainable_token_indices: list[Count] | dict[Name, list[Count]] | None = None
    layers_to_transform: Count | list[Count] | None = None
    layers_pattern: Pattern | list[Name] | None = None
    init_lora_weights: bool | Name | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None
    lora_dropout: float | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    auto_mapping: _AutoMapping | None = None
    plan: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for patterns in (self.rank_pattern, self.alpha_pattern, self.target_modules, self.exclude_modules):
            for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
                _check_pattern(pattern)


def _check_pattern(pattern: str) -> None:
    """Refuse a regex that does not compile, and one whose matching may take longer than anybody waits.

    Python's engine tries every way to share a text out over repetitions: exponentially many where a group that repeats is
    repeated, n^k for k repetitions on a name of n characters. PEFT matches these patterns with every name of a module.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{quoted(pattern)} is no regex ({error}).") from error
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"(?<!\\)[*+{]", pattern)) > MOST_REPEATS:
        raise CheckpointError(
            f"{quoted(pattern)} is a regex that repeats a group or repeats more than {MOST_REPEATS} times, which may take for "
            "ever to match; wanted names, with at most so many of * and +."
        )


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json.

    Raises:
        CheckpointError: not there, a field of a wrong type or beyond its limits, a regex that cannot be matched.
    """
    config = read_mapping(path)
    checked(config, _AdapterConfig, path)
    return config
