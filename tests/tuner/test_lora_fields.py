"""Every field of the installed peft's `LoraConfig` has a verdict here, and the verdict is what happens."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)

from spectrum_peft import SpectrumConfig
from spectrum_peft.errors import OptionError
from spectrum_peft.plan import MODES
from spectrum_peft.tuner import lora_fields
from spectrum_peft.tuner.lora_fields import FIELDS, INITS

DOCS = Path(__file__).resolve().parents[2] / "docs"
# A value that asks for something, for every field that is not there to say where an adapter belongs.
ASKED: dict[str, Any] = {
    "loftq_config": {"loftq_bits": 4},
    "corda_config": CordaConfig(),
    "lora_ga_config": LoraGAConfig(),
    "velora_config": VeloraConfig(),
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": MontecloraConfig(),
    "layer_replication": [(0, 2), (1, 2)],
    "use_bdlora": BdLoraConfig(),
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "megatron_config": {"hidden_size": 8},
    "megatron_core": "my.megatron",
    "use_dora": True,
    "lora_bias": True,
    "init_lora_weights": "gaussian",
    "eva_config": EvaConfig(),
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"q_proj": 3},
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.down_proj"],
    "exclude_modules": ["q_proj"],
    "layers_to_transform": [0],
    "lora_dropout": 0.1,
    "use_rslora": True,
    "r": 5,
    "lora_alpha": 7,
}  # fmt: skip
REFUSED = [name for name, row in FIELDS.items() if row.does == "refused"]
LOW_RANK = [name for name, row in FIELDS.items() if row.does == "low rank"]


def with_field(mode: str, name: str) -> SpectrumConfig:
    extra = {"init_lora_weights": "eva"} if name == "eva_config" else {}
    return SpectrumConfig(mode=mode, **{name: ASKED[name]}, **extra)


def test_every_field_of_the_installed_peft_has_a_row_and_no_row_is_without_a_field() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(FIELDS) == fields, f"peft {peft.__version__}"
    # What PEFT itself marks as needing code of its own is refused, or goes with products of two free factors only.
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants <= {*REFUSED, *LOW_RANK}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_field_is_refused_by_name_with_what_to_use(name: str, mode: str) -> None:
    with pytest.raises(OptionError, match=rf"^{name}=.*; use .+\.$"):
        SpectrumConfig(mode=mode, **{name: ASKED[name]})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOW_RANK)
def test_a_field_of_low_rank_adapters_is_taken_where_the_table_says_and_refused_elsewhere(name: str, mode: str) -> None:
    sets_ranks = name.endswith("_pattern") and "r_high" in MODES[mode].own_options
    if MODES[mode].action in FIELDS[name].actions and not sets_ranks:
        assert getattr(with_field(mode, name), name) == ASKED[name]
    else:
        with pytest.raises(OptionError, match=name.removesuffix("_config")):
            with_field(mode, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", [n for n, row in FIELDS.items() if row.does in ("no effect", "narrows") and n in ASKED]
)
def test_one_word_switches_the_mode_and_what_would_narrow_nothing_is_refused(name: str, mode: str) -> None:
    if FIELDS[name].does == "narrows" and MODES[mode].whole_model:
        with pytest.raises(OptionError, match=rf"^{name}=.* narrows nothing"):
            with_field(mode, name)
    else:
        with_field(mode, name)


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_inits_that_rewrite_the_base_are_refused(value: str) -> None:
    with pytest.raises(OptionError, match="rewrites the base"):
        SpectrumConfig(mode="lora", init_lora_weights=value)


@pytest.mark.parametrize(("value", "message"), [
    ("mica", "trains one factor"), ("gausian", "Did you mean 'gaussian'"), (3, "init_lora_weights is 3"), ([1], "wanted one of"),
])  # fmt: skip
def test_inits_that_are_none_are_refused(value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SpectrumConfig(mode="lora", init_lora_weights=value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", INITS, ids=str)
def test_an_init_goes_with_the_modes_that_the_table_says(value: Any, mode: str) -> None:
    if MODES[mode].action in INITS[value]:
        eva = {"eva_config": EvaConfig()} if value == "eva" else {}
        assert SpectrumConfig(mode=mode, init_lora_weights=value, **eva).init_lora_weights == value
    else:
        with pytest.raises(OptionError, match="init_lora_weights"):
            SpectrumConfig(mode=mode, init_lora_weights=value)


@pytest.mark.parametrize("options", [
    {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "eva"},
])  # fmt: skip
def test_what_fixes_a_rank_does_not_go_with_ranks_that_move(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="together with rescore_every"):
        SpectrumConfig(mode="alors", rescore_every=5, **options)


def test_bias_is_one_of_pefts_words() -> None:
    with pytest.raises(OptionError, match="bias is 'mps', wanted 'none', 'all' or 'lora_only'"):
        SpectrumConfig(mode="lora", bias="mps")


def test_a_field_of_a_newer_peft_is_refused_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_fields, "FIELDS", {n: row for n, row in FIELDS.items() if n != "use_dora"})
    SpectrumConfig(mode="lora")
    with pytest.raises(
        OptionError, match="use_dora=True is a field of this peft's LoraConfig that spectrum_peft does not know"
    ):
        SpectrumConfig(mode="lora", use_dora=True)


def test_the_page_says_what_the_table_says() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "peft_methods.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
