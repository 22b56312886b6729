"""adapter_config.json of a folder: the fields that are read here, with their types and limits; and what lies beside it.

An adapter that is a plain LoRA says so to everybody in `adapter_config.json`. What only this package reads of it, the plan first
of all, is in `spectrum_adapter.json`; the two together are the config that was trained.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ..errors import CheckpointError, MismatchError, quoted
from ..records import BESIDE_FILE, checked, is_file, read_mapping
from ..records.schema import Count, Name, Place, Rank, Scale

MOST_REPEATS = 3
_DIGEST = "belongs_to"
_FUNCTION = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "use_rslora",
    "use_dora", "lora_bias",
)  # fmt: skip
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


class ByPattern:
    """Values by PEFT's patterns, asked for with the name of a module: that of the first pattern which matches it.

    Patterns that are one whole name, as this package writes them, are looked up, so that many names cost what few do for each.
    Source: peft 0.21 utils/other.py, `get_pattern_key`.

    Args:
        patterns: regex to value, in the order of a `rank_pattern` or an `alpha_pattern`.
    """

    def __init__(self, patterns: Mapping[str, Any] | None) -> None:
        self._whole: dict[str, tuple[int, Any]] = {}
        self._regexes: list[tuple[int, re.Pattern[str], Any]] = []
        for place, (pattern, value) in enumerate((patterns or {}).items()):
            name = re.sub(r"\\(.)", r"\1", pattern[1:])
            if pattern == "^" + re.escape(name):
                self._whole.setdefault(name, (place, value))
            else:
                self._regexes.append((place, re.compile(rf"(.*\.)?({pattern})$"), value))

    def get(self, name: str, default: Any = None) -> Any:
        """The value for a module's full name, or the default where no pattern matches it."""
        first, found = self._whole.get(name, (math.inf, default))
        for place, regex, value in self._regexes:
            if place > first:
                break
            if regex.match(name):
                return value
        return found


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json; where `spectrum_adapter.json` lies beside that of a plain LoRA, the fields of both.

    Raises:
        CheckpointError: not there, a field of a wrong type or beyond its limits, a regex that cannot be matched.
        MismatchError: what lies beside it belongs to another adapter.
    """
    config = read_mapping(path)
    checked(config, _AdapterConfig, path)
    beside = path.parent / BESIDE_FILE
    if config["peft_type"] != "LORA" or not is_file(beside):
        return config
    ours = read_mapping(beside)
    if ours.pop(_DIGEST, None) != function_digest(config):
        raise MismatchError(
            f"{beside}: belongs to another adapter than {path.name} beside it, which differs from it in rank, scale or targets. "
            f"Remove {beside.name} to open the folder as a plain LoRA, without a plan."
        )
    config |= ours
    checked(config, _AdapterConfig, beside)
    if config["peft_type"] != "SPECTRUM" or config.get("plan") is None:
        raise CheckpointError(f"{beside}: holds no plan, wanted the config of an adapter of peft_type SPECTRUM.")
    return config


def fields_beside(trained: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """What `spectrum_adapter.json` holds: every field of the config that was trained that its plain form lacks or has another
    value of, and which plain form it goes with."""
    ours = {key: value for key, value in trained.items() if key not in plain or plain[key] != value}
    return {**ours, _DIGEST: function_digest(plain)}


def function_digest(config: Mapping[str, Any]) -> str:
    """sha256 of the fields of a plain LoRA that say what it computes; in lists the order does not matter."""
    fields = {name: config.get(name) or None for name in _FUNCTION}
    fields |= {name: sorted(value) for name, value in fields.items() if isinstance(value, list)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
