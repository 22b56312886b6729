"""SpectrumConfig: what it refuses, what it narrows, what it writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES
from peft import LoraConfig, PeftConfig, get_peft_model

from spectrum_peft import SpectrumConfig, make_plan
from spectrum_peft.errors import MismatchError, OptionError
from spectrum_peft.tuner.config import candidates_of

PATTERNS = {
    "rank_pattern": {"q_proj": 4, r"^model\.layers\.1\.mlp\..*": 2, "model.layers.0.mlp.down_proj": 3},
    "alpha_pattern": {"k_proj": 5, "layers.1.mlp.up_proj": 7},
}


def test_ranks_and_scales_by_hand_are_those_of_plain_peft(tiny_llama: Any) -> None:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **PATTERNS}
    plain = get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(target_modules="all-linear", **fields))
    ours = get_peft_model(copy.deepcopy(tiny_llama), SpectrumConfig(mode="lora", **fields))

    def found(model: Any) -> dict[str, tuple[int, float]]:
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        return {n: (m.lora_A["default"].weight.shape[0], m.scaling["default"]) for n, m in layers.items()}

    assert found(ours) == found(plain) and len({rank for rank, _ in found(plain).values()}) == 4
    with pytest.raises(OptionError, match="rank_pattern: 'q_porj' matches no module"):
        get_peft_model(tiny_llama, SpectrumConfig(mode="lora", rank_pattern={"q_porj": 4}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "spectral"}, "mode is 'spectral'.*Did you mean .*'spectrum'"),
        ({"mode": 3}, "mode is 3"),
        ({"criterion": "fishr"}, "criterion is 'fishr'.*'fisher'"),
        ({"spectrum_ratio": 0.0}, "spectrum_ratio is 0.0, wanted a share in"),
        ({"spectrum_ratio": -0.5}, "spectrum_ratio is -0.5"),
        ({"spectrum_ratio": 25}, "spectrum_ratio is 25.*25 % is 0.25"),
        ({"spectrum_ratio": float("nan")}, "spectrum_ratio is nan"),
        ({"spectrum_ratio": "half"}, "spectrum_ratio is 'half', wanted a number"),
        ({"spectrum_ratio": 0.5, "snr_threshold": 1.0}, "spectrum_ratio.*snr_threshold"),
        ({"mode": "alors", "trainable_parameters": 1000, "spectrum_ratio": 0.5}, "trainable_parameters"),
        ({"mode": "alors", "score_cuts": (1.0, 2.0)}, "score_cuts"),
        ({"mode": "alors", "rank_pattern": {"q_proj": 4}}, "rank_pattern.*alors.*modes 'lora', 'spectra_qlora'"),
        ({"mode": "sgm", "rank_pattern": {"q_proj": 4}}, "rank_pattern.*sgm"),
        ({"mode": "lorsa", "alpha_pattern": {"q_proj": 4}}, "alpha_pattern.*lorsa"),
        ({"mode": "lora", "rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj' has rank 0, wanted"),
        ({"mode": "spectra_qlora", "rank_pattern": {"q_proj": 4}, "rescore_every": 5}, "rank_pattern.*rescore_every=5"),
        ({"mode": "lora", "init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the base"),
        ({"mode": "alors", "use_dora": True, "rescore_every": 5}, "use_dora=True together with rescore_every"),
        ({"backward_depth": 0.5, "train_embeddings": True}, "backward_depth.*train_embeddings"),
        ({"keep_base": "disk"}, "keep_base is 'disk'"),
        ({"rescore_every": 0}, "rescore_every is 0"),
    ],
)
def test_an_option_outside_its_range_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SpectrumConfig(**options)


def test_the_scale_does_not_depend_on_the_rank_unless_alpha_is_given() -> None:
    assert SpectrumConfig().lora_alpha == 32
    assert SpectrumConfig(r=4).lora_alpha == 8
    assert SpectrumConfig(r=4, lora_alpha=4).lora_alpha == 4


def test_targets_narrow_the_candidates_before_the_ratio(llama_report: Any) -> None:
    report = llama_report(layers=4)
    config = SpectrumConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 2])
    wanted = {f"model.layers.{i}.{m}.weight" for i in (1, 2) for m in ("self_attn.q_proj", "mlp.down_proj")}
    assert set(candidates_of(config, report) or ()) == wanted
    chosen = make_plan(report, candidates=candidates_of(config, report), spectrum_ratio=0.5).trainable_names
    assert len(chosen) == 2 and set(chosen) <= wanted


def test_layers_alone_narrow_too(llama_report: Any) -> None:
    config = SpectrumConfig(layers_to_transform=[3])
    kept = candidates_of(config, llama_report(layers=4)) or []
    assert len(kept) == 7 and all(".layers.3." in name for name in kept)


def test_excluded_modules_are_no_candidates(llama_report: Any) -> None:
    kept = candidates_of(SpectrumConfig(exclude_modules=["mlp.down_proj"]), llama_report(layers=2)) or []
    assert len(kept) == 12 and not any("down_proj" in name for name in kept)


def test_no_narrowing_leaves_the_choice_to_the_report(llama_report: Any) -> None:
    assert candidates_of(SpectrumConfig(target_modules="all-linear"), llama_report()) is None


def test_fused_experts_are_narrowed_by_parameter_name(llama_report: Any) -> None:
    kept = candidates_of(SpectrumConfig(target_modules=["down_proj"]), llama_report(layers=2, experts=3))
    assert kept == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]


def test_a_target_that_matches_nothing_is_an_error_with_near_matches(llama_report: Any) -> None:
    with pytest.raises(OptionError, match=r"'q_prj' matches no Linear.*'q_proj'"):
        candidates_of(SpectrumConfig(target_modules=["q_prj"]), llama_report())


def test_fields_that_leave_nothing_are_an_error(llama_report: Any) -> None:
    with pytest.raises(OptionError, match="leave none of 28 candidate modules"):
        candidates_of(SpectrumConfig(layers_to_transform=[17]), llama_report(layers=4))


def test_the_plan_travels_in_the_adapter_config_and_the_report_does_not(tmp_path: Path) -> None:
    model = get_peft_model(ARCHITECTURES["llama"].build(), SpectrumConfig(mode="spectrum", spectrum_ratio=0.5))
    config = model.peft_config["default"]
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "SPECTRUM" and stored["report"] is None and stored["plan"]["mode"] == "spectrum"
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, SpectrumConfig)
    assert again.plan == config.plan and again.mode == "spectrum" and again.spectrum_ratio == 0.5


def test_the_plan_wins_over_options_and_a_contradicting_mode_is_refused(llama_report: Any) -> None:
    plan = make_plan(llama_report(), mode="alors", spectrum_ratio=0.25, r=8)
    config = SpectrumConfig(plan=plan)
    assert (config.mode, config.spectrum_ratio, config.r) == ("alors", 0.25, 8)
    with pytest.raises(OptionError, match="mode is 'lora', but the plan that was given is of mode 'alors'"):
        SpectrumConfig(mode="lora", plan=plan)


def test_a_plan_of_another_checkpoint_is_refused_unless_forced(llama_report: Any) -> None:
    plan = make_plan(llama_report(layers=2), spectrum_ratio=0.5)
    with pytest.raises(MismatchError, match="the plan does not belong to this model: fingerprint"):
        get_peft_model(ARCHITECTURES["llama"].build(), SpectrumConfig(plan=plan))
    model = get_peft_model(ARCHITECTURES["llama"].build(), SpectrumConfig(plan=plan, force=True))
    assert model.peft_config["default"].plan.trainable_names == plan.trainable_names


def test_a_plan_with_a_module_that_the_model_lacks_names_it(llama_report: Any) -> None:
    plan = make_plan(llama_report(layers=4), spectrum_ratio=1.0)
    with pytest.raises(MismatchError, match=r"trains model\.layers\.2\.\S+, which the model lacks"):
        get_peft_model(ARCHITECTURES["llama"].build(), SpectrumConfig(plan=plan, force=True))
