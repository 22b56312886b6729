"""What a user asks a comparison for, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError, near_matches, quoted
from ..plan import CRITERIA, DEFAULT_RATIO, MODES, OPTIONS, get_mode
from .matrix import CONTROLS
from .settings import KEYS, METRICS, Comparison, number_within

# Keys of `train` that the matrix sets itself.
_MATRIX = {
    "mode": "modes", "spectrum_ratio": "ratios", "ratio": "ratios", "criterion": "criteria", "seed": "seeds",
    "learning_rate": "learning_rates", "plan": "contestants", "report": None, "peft_config": "contestants",
    "resume_from_checkpoint": None, "force": None,
}  # fmt: skip


_GENERATED = ("exact_match", "answered", "rouge_l")


def _list(name: str, value: Any, check: Callable[[str, Any], Any]) -> list[Any]:
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise OptionError(f"{name} is an empty list, wanted at least one value.")
    checked = [check(name, item) for item in items]
    for i, item in enumerate(checked):
        if item in checked[:i]:
            raise OptionError(f"{name} holds {item!r} twice.")
    return checked


def _one_of(known: Mapping[str, Any] | Sequence[str]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise OptionError(f"{name}: {quoted(value)} is none." + near_matches(str(value), known))
        return str(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}, wanted true or false.")
    return value


def _word(name: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise OptionError(f"{name} is {value!r}, wanted a name.")
    return value


def _rates(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _list(f"{name}: {key}", rates, number_within(0)) for key, rates in value.items()}
    return _list(name, value, number_within(0))


def read_comparison(
    given: Mapping[str, Any],
    *,
    train: Mapping[str, Any],
    arguments: Sequence[str],
    task: str,
    output: Path,
    source: str,
) -> Comparison:
    """Check what was asked for.

    Args:
        given: values of `KEYS` that were given.
        train, arguments, task, output, source: see `Comparison`.
    Raises:
        OptionError: an unknown name, a value outside its range, a key that the matrix sets itself.
    """
    for key in given:
        if key not in KEYS:
            raise OptionError(f"{source}: unknown key {key!r}." + near_matches(key, KEYS))
    for key, instead in _MATRIX.items():
        if train.get(key) is not None or any(a.partition("=")[0] == f"--{key.replace('_', '-')}" for a in arguments):
            hint = f"use {instead}" if instead else "leave it out"
            raise OptionError(f"{source}: {key} is one run's, and compare makes many: {hint}.")
    labelled = task == "classification"
    known = [name for name, m in METRICS.items() if m.tasks is None or task in m.tasks]
    asked: dict[str, Any] = {
        "ratios": [DEFAULT_RATIO], "criteria": [OPTIONS["criterion"]], "seeds": [0], "learning_rates": None,
        "learning_rate_factors": [1.0], "controls": ["random", "last"], "contestants": [],
        "metric": "accuracy" if labelled else "loss", "generate": [], "generate_rows": 100, "max_new_tokens": 256,
        "general_text": None, "general_split": "train", "generation_speed": False, "keep_models": False,
        "confidence": 0.95, "modes": None, "reference": None,
    }  # fmt: skip
    asked |= {key: value for key, value in given.items() if value is not None}
    checks: dict[str, Callable[[str, Any], Any]] = {
        "ratios": lambda n, v: _list(n, v, number_within(0, 1)),
        "criteria": lambda n, v: _list(n, v, _one_of(CRITERIA)),
        "seeds": lambda n, v: _list(
            n, v, number_within(-1, at_most=2**32 - 1, whole=True)
        ),  # NumPy takes no larger one
        "learning_rates": lambda n, v: None if v is None else _rates(n, v),
        "learning_rate_factors": lambda n, v: _list(n, v, number_within(0)),
        "controls": lambda n, v: _list(n, v, _one_of(CONTROLS)) if v else [],
        "metric": _one_of(known),
        "generate": lambda n, v: _list(n, v, _one_of(("exact_match", "rouge_l"))) if v else [],
        "generate_rows": number_within(0, whole=True),
        "max_new_tokens": number_within(0, whole=True),
        "generation_speed": _flag,
        "keep_models": _flag,
        "confidence": number_within(0, 0.9999),
        "reference": _word,
        "general_text": _word,
        "general_split": _word,
    }
    for name, check in checks.items():
        asked[name] = check(f"{source}: {name}", asked[name])
    notes = []
    if asked["modes"] is None:
        quantized = train.get("quantization") not in (None, "none")
        modes = [m.name for m in MODES.values() if not (quantized and m.whole_model)]
        asked["modes"] = modes
        if len(modes) < len(MODES):
            notes.append("modes that train every weight are left out: the base is quantized")
    elif asked["modes"] != []:
        asked["modes"] = _list(f"{source}: modes", asked["modes"], lambda _, v: get_mode(v).name)
    if labelled and (asked["generate"] or asked["general_text"] or asked["generation_speed"]):
        name = next(n for n in ("generate", "general_text", "generation_speed") if asked[n])
        raise OptionError(f"{source}: {name} is for models that write text, and the task is classification.")
    if asked["metric"] in _GENERATED and asked["metric"] not in asked["generate"]:
        raise OptionError(f"{source}: metric is {asked['metric']!r}, which is not in generate: {asked['generate']}.")
    return Comparison(dict(train), tuple(arguments), asked, task, output, source, tuple(notes))
