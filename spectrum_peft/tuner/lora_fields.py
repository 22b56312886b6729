"""What each field of PEFT's `LoraConfig` does in a `SpectrumConfig`: as in PEFT, something of ours, or refused by name.

A field that PEFT reads in code of its own (another layer, another forward, a base that is rewritten) would be accepted by a
subclass of its config and do something else, or nothing. So every field has a row, and one without a row, of a newer PEFT,
is refused wherever it is set.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from peft import LoraConfig

from ..errors import OptionError, near_matches
from ..plan import MODES
from ..records import ADAPTER_ACTIONS, REAL_WEIGHT_ACTIONS

Does = Literal["as in PEFT", "low rank", "no effect", "narrows", "set here", "refused"]

# What goes with actions other than a product of two free factors: nothing. `shared` factors are `lora` but for what looks at
# both factors of one layer.
_FREE_FACTORS = frozenset({"lora"})
_FACTORS = frozenset({"lora", "shared"})
_LOW_RANK = frozenset(ADAPTER_ACTIONS)


@dataclass(frozen=True)
class Row:
    """What a field does.

    Attributes:
        does: `as in PEFT` in every mode; `low rank`: as in PEFT in modes whose `action` is in `actions`, refused in the
            others; `no effect`: the same, but without an effect in the others, so that one word can switch the mode;
            `narrows` the candidates; `set here`: what is given is replaced by what fits the model; `refused` unless it has
            PEFT's default.
        why: the reason, in the words of an error message and of the page.
        instead: what to use.
    """

    does: Does
    why: str = ""
    instead: str = ""
    actions: frozenset[str] = frozenset(ADAPTER_ACTIONS | REAL_WEIGHT_ACTIONS)


def _refused(why: str, instead: str) -> Row:
    return Row("refused", why, instead)


_PLAIN = "a plain LoraConfig"
_REWRITES = "rewrites the base weights, so that the adapter would belong to no checkpoint that is on disk"
FIELDS: dict[str, Row] = {
    "task_type": Row("as in PEFT"),
    "peft_type": Row("set here", "SPECTRUM in memory; a plain LoRA is saved as LORA"),
    "auto_mapping": Row("as in PEFT"),
    "peft_version": Row("as in PEFT"),
    "base_model_name_or_path": Row("as in PEFT"),
    "revision": Row("as in PEFT"),
    "inference_mode": Row("as in PEFT"),
    "r": Row(
        "no effect",
        "the default is 16; in `columns` the rank whose parameters they have",
        actions=_FACTORS | {"columns"},
    ),
    "lora_alpha": Row("no effect", "the default is 2 r", actions=_FACTORS),
    "lora_dropout": Row("no effect", actions=_LOW_RANK),
    "use_rslora": Row("no effect", actions=_FACTORS),
    "target_modules": Row("narrows", "default: every Linear and Conv1D but the output head"),
    "exclude_modules": Row("narrows"),
    "layers_to_transform": Row("narrows"),
    "layers_pattern": Row("narrows", "with layers_to_transform"),
    "target_parameters": Row("narrows", "names matrices by parameter, fused experts among them"),
    "fan_in_fan_out": Row("set here", "asked of each layer"),
    "bias": Row("as in PEFT", "biases appear in the plan with action `save`"),
    "modules_to_save": Row("as in PEFT", "appear in the plan with action `save`"),
    "trainable_token_indices": Row("as in PEFT", "where the whole embedding trains, its rows do anyway"),
    "ensure_weight_tying": Row("as in PEFT", "and set where embeddings that other modules are tied to train"),
    "init_lora_weights": Row("low rank", "which values: see below", actions=_FACTORS),
    "eva_config": Row("low rank", "with init_lora_weights='eva'", actions=_FREE_FACTORS),
    "rank_pattern": Row("low rank", "not in `alors`, which sets ranks itself", actions=_FREE_FACTORS | {"columns"}),
    "alpha_pattern": Row("low rank", "not in `alors`, which sets scales itself", actions=_FREE_FACTORS),
    "use_dora": Row("low rank", "not with rescore_every", actions=_FREE_FACTORS),
    "lora_bias": Row("low rank", actions=_FREE_FACTORS),
    "runtime_config": Row("as in PEFT", "not saved"),
    "megatron_config": _refused("puts Megatron's parallel layers in, which no plan names", _PLAIN),
    "megatron_core": _refused("goes with megatron_config", _PLAIN),
    "loftq_config": _refused(_REWRITES, "mode='lora' on a 4-bit base"),
    "corda_config": _refused(_REWRITES, "mode='lorsa', which starts from singular components that data choose"),
    "lora_ga_config": _refused(_REWRITES, "mode='lora' with criterion='fisher', which looks at gradients too"),
    "velora_config": _refused("has a backward of its own, which exports and merges do not know", _PLAIN),
    "alora_invocation_tokens": _refused(
        "changes only what comes after a token, so that there is no merged weight to export", _PLAIN
    ),
    "use_qalora": _refused("pools the inputs of GPTQ layers, a kind of base that is not supported", "an nf4 base"),
    "qalora_group_size": _refused("goes with use_qalora", "an nf4 base"),
    "monteclora_config": _refused("samples the weights anew in each step, with parameters that no plan names", _PLAIN),
    "layer_replication": _refused(
        "makes the model deeper than the checkpoint that was scanned", "a checkpoint that was made deeper beforehand"
    ),
    "use_bdlora": _refused("makes factors of blocks, which exports and merges do not know", _PLAIN),
    "arrow_config": _refused("routes between adapters in a forward of its own", _PLAIN),
    "kasa_config": _refused(_REWRITES, "mode='lorsa', which trains singular values of the base as it is"),
}
# Values of `init_lora_weights`, and which actions they go with.
INITS: dict[bool | str, frozenset[str]] = {
    True: frozenset(ADAPTER_ACTIONS | REAL_WEIGHT_ACTIONS),
    False: _FACTORS,
    "gaussian": _FACTORS,
    "orthogonal": _FREE_FACTORS,
    "eva": _FREE_FACTORS,
}
_INITS_THAT_REWRITE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_lora_fields(config: Any) -> None:
    """Refuse what a field of `LoraConfig` asks for and no code here does.

    Args:
        config: a `SpectrumConfig`. Where it has a plan, fields that a plan writes itself are not asked.
    Raises:
        OptionError: a line that names the field and says what to use instead.
    """
    action = MODES[config.mode].action
    for field in dataclasses.fields(LoraConfig):
        value, default = getattr(config, field.name), _default(field)
        if value is None or value == default or (not value and not default):
            continue
        row = FIELDS.get(field.name)
        if row is None:
            raise OptionError(
                f"{field.name}={_short(value)} is a field of this peft's LoraConfig that spectrum_peft does not know; leave it "
                f"out, or use {_PLAIN}."
            )
        if row.does == "refused":
            raise OptionError(f"{field.name}={_short(value)} {row.why}; use {row.instead}.")
        if row.does == "low rank" and action not in row.actions:
            if field.name.endswith("_pattern") and config.plan is not None:
                continue
            raise OptionError(
                f"{field.name}={_short(value)} is for a product of two free factors; mode {config.mode!r} has none. Leave it "
                f"out, or use one of the modes {', '.join(repr(m.name) for m in MODES.values() if m.action in row.actions)}."
            )
        if row.does == "narrows" and config.plan is None and MODES[config.mode].whole_model and value != "all-linear":
            raise OptionError(
                f"{field.name}={_short(value)} narrows nothing: mode {config.mode!r} trains every parameter. Leave it out, or "
                "use mode='spectrum' with spectrum_ratio=1.0, which trains all of the matrices that are named."
            )
    if config.bias not in ("none", "all", "lora_only"):
        raise OptionError(f"bias is {_short(config.bias)}, wanted 'none', 'all' or 'lora_only'.")
    _check_init(config, action)
    if config.eva_config is not None and config.init_lora_weights != "eva":
        raise OptionError("eva_config is given, and init_lora_weights is not 'eva'; set it, or leave eva_config out.")
    if config.rescore_every is not None:
        for name, value in (("use_dora", config.use_dora), ("lora_bias", config.lora_bias)):
            if value:
                raise OptionError(f"{name}=True together with rescore_every: the rank under it cannot change.")


def _check_init(config: Any, action: str) -> None:
    init = config.init_lora_weights
    known = ", ".join(repr(value) for value in INITS)
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_REWRITE_THE_BASE):
        raise OptionError(f"init_lora_weights={init!r} {_REWRITES}; wanted one of {known}.")
    if init == "mica":
        raise OptionError(f"init_lora_weights='mica' trains one factor of the two, which no plan says; use {_PLAIN}.")
    if not isinstance(init, bool | str) or init not in INITS:
        raise OptionError(
            f"init_lora_weights is {init!r}, wanted one of {known}." + near_matches(str(init), map(str, INITS))
        )
    if action not in INITS[init]:
        raise OptionError(
            f"init_lora_weights={init!r} is for a product of two free factors; mode {config.mode!r} has none. Leave it out."
        )
    if init in ("eva", "orthogonal") and config.rescore_every is not None:
        raise OptionError(
            f"init_lora_weights={init!r} together with rescore_every: it sets both factors for a rank that then moves."
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
