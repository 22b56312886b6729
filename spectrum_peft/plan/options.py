"""What can be asked of a plan, in one place: names, defaults, ranges and which options exclude each other.

`SpectrumConfig` and the command line call `check_options` too.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, OptionError, near_matches, quoted
from ..records import Plan
from ..records.schema import MOST_RANK
from .candidates import TOWERS
from .choose import tier_ranks
from .modes import MODES, USUAL_RANK, get_mode

# Name -> default. None: derived, as the comment says.
OPTIONS: dict[str, Any] = {
    "mode": "spectrum",
    "criterion": "spectrum",
    "spectrum_ratio": None,  # 0.5, unless a threshold, cuts or a budget choose instead
    "snr_threshold": None,
    "scope": "per_kind",
    "measure": "count",
    "coverage": None,
    "backward_depth": 1.0,
    "train_embeddings": False,
    "train_head": False,
    "train_norms": False,
    "towers": None,  # the language model's, where there is one
    "train_projectors": False,
    "keep_base": "auto",
    "trainable_dtype": "float32",
    "r": USUAL_RANK,
    "lora_alpha": None,  # 2 * r
    "use_rslora": False,
    "r_high": None,  # r
    "r_medium": None,  # max(1, r // 4)
    "trainable_parameters": None,
    "score_cuts": None,
    "lr_ratio": (0.5, 2.0),
    "rescore_every": None,
    "similarity": "subspace",
    "similarity_threshold": None,  # `policies.LIKENESS`, unless n_groups says how many
    "n_groups": None,
    "share": "residual_side",
    "group_gain": False,
    "n_components": 64,
    "component_scope": "layer",
    "svd_rank": 256,
    "rotation_rank": 4,
    "n_columns": None,  # as many as have the parameters of a LoRA of rank r
    "columns_by": "random",
    "column_block": 1,
    "rows_of": None,  # none; with `coupled` those that put out what another matrix of the block takes in
    "coupled": False,
    "head_width": None,  # heads are not known; `SpectrumConfig` asks the model, where `coupled`
    "seed": 0,
    "preset": None,
}


DEFAULT_RATIO = 0.5
CRITERIA = ("spectrum", "mp", "mean_std", "row_norm", "kappa", "fisher", "random", "last", "first", "spaced")
# By what a matrix' columns are chosen, and which of these need data.
COLUMNS_BY = ("random", "spectrum", "activation", "fisher")
COLUMNS_BY_DATA = ("activation", "fisher")
# What decides how much is chosen; one of them only.
_AMOUNTS = ("spectrum_ratio", "snr_threshold", "score_cuts", "trainable_parameters", "n_columns")
# What decides which matrices are chosen by score.
CHOOSING_OPTIONS = ("criterion", "spectrum_ratio", "snr_threshold", "scope", "measure", "coverage", "backward_depth")


# --- options ---------------------------------------------------------------------------------------------------------


def _a_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(f"{name} is {quoted(value)}, wanted a number.")
    if math.isnan(value):
        raise OptionError(f"{name} is nan, wanted a number.")
    try:
        return float(value)
    except OverflowError as error:
        raise OptionError(f"{name} is an integer that no float can hold, wanted a smaller one.") from error


def _share(name: str, value: Any) -> float:
    share = _a_number(name, value)
    if not 0 < share <= 1:
        raise OptionError(f"{name} is {value!r}, wanted a share in (0, 1]" + (" (25 % is 0.25)." if share > 1 else "."))
    return share


def _likeness(name: str, value: Any) -> float:
    number = _a_number(name, value)
    if not -1 <= number <= 1:
        raise OptionError(f"{name} is {value!r}, wanted a likeness in [-1, 1]; 1 is the same direction.")
    return number


def _positive(name: str, value: Any) -> float:
    number = _a_number(name, value)
    if not 0 < number < math.inf:
        raise OptionError(f"{name} is {value!r}, wanted a number above 0.")
    return int(number) if number.is_integer() else number


def _integer(least: int, most: int | None = None) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        number = _a_number(name, value)
        if not number.is_integer() or number < least:
            raise OptionError(f"{name} is {value!r}, wanted a whole number of at least {least}.")
        if most is not None and number > most:
            raise OptionError(f"{name} is {value!r}, wanted a whole number of at most {most}.")
        return int(number)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}, wanted true or false.")
    return value


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise OptionError(f"{name} is {value!r}." + near_matches(str(value), choices))
        return value

    return check


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _pair(check: Callable[[str, Any], float], what: str) -> Callable[[str, Any], tuple[float, float]]:
    def checked(name: str, value: Any) -> tuple[float, float]:
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
            raise OptionError(f"{name} is {value!r}, wanted two numbers, {what}.")
        return check(name, value[0]), check(name, value[1])

    return checked


def _names(name: str, value: Any) -> list[str]:
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not value
        or not all(isinstance(v, str) for v in value)
    ):
        raise OptionError(f"{name} is {quoted(value)}, wanted a list of names of modules, or of endings of names.")
    return list(value)


def _interval(name: str, value: Any) -> int | str:
    return "epoch" if value == "epoch" else _integer(1)(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "mode": lambda name, value: get_mode(value).name,
    "criterion": _one_of(*CRITERIA),
    "spectrum_ratio": _optional(_share),
    "snr_threshold": _optional(_a_number),
    "scope": _one_of("per_kind", "global"),
    "measure": _one_of("count", "parameters"),
    "coverage": _optional(_integer(1)),
    "backward_depth": _share,
    "train_embeddings": _flag,
    "train_head": _flag,
    "train_norms": _flag,
    "towers": _optional(_one_of(*TOWERS)),
    "train_projectors": _flag,
    "keep_base": _one_of("auto", "host", "file", "none"),
    "trainable_dtype": _one_of("float32", "base"),
    "r": _integer(1, MOST_RANK),
    "lora_alpha": _optional(_positive),
    "use_rslora": _flag,
    "r_high": _optional(_integer(1, MOST_RANK)),
    "r_medium": _optional(_integer(1, MOST_RANK)),
    "trainable_parameters": _optional(_integer(1)),
    "score_cuts": _optional(_pair(_a_number, "(high, medium)")),
    "lr_ratio": _pair(_positive, "(lowest, highest)"),
    "rescore_every": _optional(_interval),
    "similarity": _one_of("subspace", "cosine"),
    "similarity_threshold": _optional(_likeness),
    "n_groups": _optional(_integer(1)),
    "share": _one_of("residual_side", "both"),
    "group_gain": _flag,
    "n_components": _integer(1, MOST_RANK),
    "component_scope": _one_of("layer", "global"),
    "svd_rank": _integer(1, MOST_RANK),
    "rotation_rank": _integer(1, MOST_RANK),
    "n_columns": _optional(_integer(1, MOST_RANK)),
    "columns_by": _one_of(*COLUMNS_BY),
    "column_block": _integer(1, MOST_RANK),
    "rows_of": _optional(_names),
    "coupled": _flag,
    "head_width": _optional(_integer(1, MOST_RANK)),
    "seed": _integer(0),
    "preset": _optional(_one_of("published")),
}


def ratio_of(given: Mapping[str, Any], default: float = DEFAULT_RATIO) -> float:
    """The share of the matrices that options choose, for a default rate; the default where they do not say how much is chosen,
    and 1 where what they say is no share of the matrices."""
    if all(given.get(name) is None for name in _AMOUNTS):
        return default
    ratio = given.get("spectrum_ratio")
    return float(ratio) if isinstance(ratio, int | float) and 0 < ratio <= 1 else 1.0


def check_options(**options: Any) -> dict[str, Any]:
    """Validate the options of a plan and fill in the defaults.

    Checking what this returns again changes nothing.

    Returns:
        {name: value} for every name in `OPTIONS`, in that order.
    Raises:
        OptionError: an unknown name, a value outside its range, two options that exclude each other, or an option that
            the mode does not have.
    """
    for name in options:
        if name not in OPTIONS:
            raise OptionError(f"unknown option {name!r}." + near_matches(name, OPTIONS))
    checked = {name: _CHECKS[name](name, options.get(name, default)) for name, default in OPTIONS.items()}
    mode = MODES[checked["mode"]]

    amounts = [name for name in _AMOUNTS if checked[name] is not None]
    if len(amounts) > 1:
        raise OptionError(
            f"{amounts[0]}={checked[amounts[0]]} and {amounts[1]}={checked[amounts[1]]} are both given; each says how "
            "much is chosen, give one."
        )
    if checked["coverage"] is not None and amounts and amounts[0] != "spectrum_ratio":
        raise OptionError(
            f"coverage={checked['coverage']} spreads a ratio over the depth, and {amounts[0]}={checked[amounts[0]]} chooses "
            "without one; give one of the two."
        )
    for name, value in checked.items():
        owners = owners_of(name)
        if mode.name not in owners and value != OPTIONS[name]:
            raise OptionError(f"{name}={value} means nothing in mode {mode.name!r}; it belongs to {', '.join(owners)}.")
    if checked["rescore_every"] is not None and not mode.rescorable:
        able = ", ".join(row.name for row in MODES.values() if row.rescorable)
        raise OptionError(
            f"rescore_every={checked['rescore_every']!r}: mode {mode.name!r} cannot be re-evaluated during training; "
            f"these can: {able}."
        )
    if checked["rescore_every"] is not None and checked["criterion"] == "fisher":
        raise OptionError(
            f"rescore_every={checked['rescore_every']!r} scores the weights anew during training; criterion 'fisher' is of "
            "gradients on calibration data, which are not kept. Use another criterion, or leave rescore_every out."
        )
    high, medium = tier_ranks(checked)
    if high < medium:
        raise OptionError(f"r_high is {high} and r_medium is {medium}, wanted r_high at least as large.")
    cuts = checked["score_cuts"]
    if cuts is not None and cuts[0] <= cuts[1]:
        raise OptionError(f"score_cuts is {cuts}: the tiers overlap; wanted (high, medium), high above medium.")
    if checked["lr_ratio"][0] > checked["lr_ratio"][1]:
        raise OptionError(f"lr_ratio is {checked['lr_ratio']}, wanted (lowest, highest).")
    if checked["similarity_threshold"] is not None and checked["n_groups"] is not None:
        raise OptionError(
            f"similarity_threshold={checked['similarity_threshold']} and n_groups={checked['n_groups']} are both given; each "
            "says where groups end, give one."
        )
    if checked["backward_depth"] < 1 and (checked["train_embeddings"] or mode.whole_model):
        reason = "train_embeddings=True" if checked["train_embeddings"] else f"mode {mode.name!r} trains the embeddings"
        raise OptionError(
            f"backward_depth={checked['backward_depth']}, but {reason}: backward then runs through every block down to "
            "the embeddings, and nothing is saved."
        )
    if checked["preset"] is not None:
        _check_preset(checked)

    if checked["lora_alpha"] is None:
        checked["lora_alpha"] = 2 * checked["r"]
    if mode.selective and not amounts:
        checked["spectrum_ratio"] = DEFAULT_RATIO
    return checked


def checked_plan(plan: Plan, source: str) -> Plan:
    """A plan that came from a file, its mode known and its options valid, defaults filled in.

    Raises:
        CheckpointError: they are not; the record itself knows neither.
    """
    try:
        mode = get_mode(plan.mode).name
        # Plans of versions that noted an option without an effect hold it still.
        known = {k: v for k, v in plan.options.items() if mode in owners_of(k)}
        options = check_options(**{"mode": mode, **known})
    except (OptionError, TypeError) as error:  # TypeError: what no check expects, such as a list for a name
        raise CheckpointError(f"{source}: {error}") from error
    if options["mode"] != mode:
        raise CheckpointError(f"{source}: mode is {mode!r}, and {options['mode']!r} in its options; wanted one.")
    return plan.replace(options=options)


def owners_of(option: str) -> list[str]:
    """The modes in which an option means something."""
    by_field = {
        "spectrum_ratio": "has_ratio", "snr_threshold": "selective", "coverage": "selective", "lr_ratio": "importance_rates",
    }  # fmt: skip
    if option in by_field:
        return [row.name for row in MODES.values() if getattr(row, by_field[option])]
    owners = [row.name for row in MODES.values() if option in row.own_options]
    return owners or list(MODES)


def _check_preset(checked: Mapping[str, Any]) -> None:
    """The published selection is what it is: only the mode `spectrum` and a ratio go with it."""
    if checked["mode"] != OPTIONS["mode"]:
        raise OptionError(f"preset={checked['preset']!r} goes with mode 'spectrum', not {checked['mode']!r}.")
    fixed = (
        "snr_threshold", "scope", "measure", "coverage", "backward_depth", "train_embeddings", "train_head", "train_norms",
        "towers", "train_projectors",
    )  # fmt: skip
    for name in fixed:
        if checked[name] != OPTIONS[name]:
            raise OptionError(
                f"{name}={checked[name]!r} does not go with preset={checked['preset']!r}, which fixes the selection "
                "(embeddings and head always train, each kind on its own, by count)."
            )


def needs_gradients(options: Mapping[str, Any]) -> bool:
    """Whether a plan with these checked options can only be made with a `GradientReport`."""
    return (
        MODES[options["mode"]].needs_data
        or options["criterion"] == "fisher"
        or options["columns_by"] in COLUMNS_BY_DATA
    )
