"""What a user asks a comparison for, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError, near_matches, quoted
from ..plan import CRITERIA, DEFAULT_RATIO, MODES, OPTIONS, get_mode
from ..records.schema import TRUTH, WORD, listed, number_within
from .matrix import CONTESTANTS, CONTROLS
from .settings import HEADED, KEYS, METRICS, TEXT, Comparison, rate_or_auto

# Keys of `train` that the matrix sets itself.
_MATRIX = {
    "mode": "modes", "spectrum_ratio": "ratios", "ratio": "ratios", "criterion": "criteria", "seed": "seeds",
    "learning_rate": "learning_rates", "plan": "contestants", "report": None, "peft_config": "contestants",
    "resume_from_checkpoint": None, "force": None,
}  # fmt: skip


# Each is a folder and a process.
_MOST_RUNS = 100_000
_GENERATED = ("exact_match", "answered", "rouge_l")


Check = Callable[[str, Any], Any]
_SHARE, _POSITIVE = number_within(0, 1), number_within(0)
_COUNT = number_within(0, whole=True)
_SEED = number_within(-1, at_most=2**32 - 1, whole=True)  # NumPy takes no larger one


def _many(check: Check) -> Check:
    """A list, or one value; none of them twice."""

    def checked(name: str, value: Any) -> list[Any]:
        found = [check(name, item) for item in listed(value, name)]
        seen: set[Any] = set()
        for item in found:
            if item in seen:
                raise OptionError(f"{name} holds {item!r} twice.")
            seen.add(item)
        return found

    return checked


def _if_any(check: Check) -> Check:
    return lambda name, value: check(name, value) if value not in (None, []) else value


def _one_of(known: Mapping[str, Any] | Sequence[str]) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise OptionError(f"{name}: {quoted(value)} is none." + near_matches(str(value)[:100], known))
        return str(value)

    return check


def _rates(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _many(rate_or_auto)(f"{name}: {key}", rates) for key, rates in value.items()}
    return _many(rate_or_auto)(name, value)


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
    train = dict(train)
    found = (
        train.get("report") == "auto" and train.pop("report") is not None
    )  # of each criterion, where others are made
    for key, instead in _MATRIX.items():
        if train.get(key) is not None or any(a.partition("=")[0] == f"--{key.replace('_', '-')}" for a in arguments):
            hint = f"use {instead}" if instead else "leave it out" + (", or say auto" if key == "report" else "")
            raise OptionError(f"{source}: {key} is one run's, and compare makes many: {hint}.")
    labelled = task in HEADED
    if not labelled and task not in TEXT:
        raise OptionError(
            f"{source}: task is {task!r}, and compare judges " + ", ".join(sorted({*TEXT, *HEADED})) + " only."
        )
    known = [name for name, m in METRICS.items() if m.tasks is None or task in m.tasks]
    asked: dict[str, Any] = {
        "ratios": [DEFAULT_RATIO], "criteria": [OPTIONS["criterion"]], "seeds": [0], "learning_rates": None,
        "learning_rate_factors": [1.0], "controls": ["random", "last"], "contestants": [],
        "metric": HEADED.get(task, "loss"), "generate": [], "generate_rows": 100, "max_new_tokens": 256,
        "general_text": None, "general_split": "train", "generation_speed": False, "keep_models": False,
        "confidence": 0.95, "modes": None, "reference": None,
    }  # fmt: skip
    asked |= {key: value for key, value in given.items() if value is not None}
    checks: dict[str, Check] = {
        "modes": _if_any(_many(lambda _, v: get_mode(v).name)),
        "ratios": _many(_SHARE),
        "criteria": _many(_one_of(CRITERIA)),
        "seeds": _many(_SEED),
        "learning_rates": _if_any(_rates),
        "learning_rate_factors": _many(_POSITIVE),
        "controls": _if_any(_many(_one_of(CONTROLS))),
        "contestants": CONTESTANTS,
        "metric": _one_of(known),
        "generate": _if_any(_many(_one_of(("exact_match", "rouge_l")))),
        "generate_rows": _COUNT,
        "max_new_tokens": _COUNT,
        "generation_speed": TRUTH,
        "keep_models": TRUTH,
        "confidence": number_within(0, 0.9999),
        "reference": _if_any(WORD),
        "general_text": _if_any(WORD),
        "general_split": WORD,
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
    if labelled and (asked["generate"] or asked["general_text"] or asked["generation_speed"]):
        name = next(n for n in ("generate", "general_text", "generation_speed") if asked[n])
        raise OptionError(f"{source}: {name} is for models that write text, and the task is {task}.")
    if asked["metric"] in _GENERATED and asked["metric"] not in asked["generate"]:
        raise OptionError(f"{source}: metric is {asked['metric']!r}, which is not in generate: {asked['generate']}.")
    rates = asked["learning_rates"]
    most = max(map(len, rates.values()), default=1) if isinstance(rates, Mapping) else len(rates or [0])
    by_mode = len(asked["modes"]) * len(asked["ratios"]) * len(asked["criteria"])
    runs = (by_mode + len(asked["contestants"])) * most * len(asked["learning_rate_factors"]) * len(asked["seeds"])
    if runs > _MOST_RUNS:
        raise OptionError(
            f"{source}: modes, ratios, criteria, rates and seeds ask for {runs:,} runs, wanted at most {_MOST_RUNS:,}."
        )
    return Comparison(train, tuple(arguments), asked, task, output, source, tuple(notes), found)
