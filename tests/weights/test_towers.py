"""Which modules see, hear, write or lead from one to another, for models that are put together of parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from odd_architectures import ODD_ARCHITECTURES, saved

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, make_plan, scan_weights
from spectrum_peft.errors import OptionError
from spectrum_peft.weights import tower_in, towers_of

_PART = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {**_PART, "image_size": 32, "patch_size": 8}
_SOUND = {
    "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32,
    "max_source_positions": 24,
}  # fmt: skip
_READER = {**_PART, "vocab_size": 96, "max_position_embeddings": 16}


def _speech() -> Any:
    text = {"model_type": "qwen2", **_PART, "vocab_size": 96, "num_key_value_heads": 2}
    return transformers.Qwen2AudioForConditionalGeneration, transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **_SOUND}, text_config=text
    )


def _clip() -> Any:
    return transformers.CLIPModel, transformers.CLIPConfig(text_config=_READER, vision_config=_VISION)


def _built(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (
            ODD_ARCHITECTURES["llava"],
            {
                "model.language_model.layers.0.mlp.up_proj.weight": "language",
                "model.vision_tower.encoder.layers.0.mlp.fc1.weight": "vision",
                "model.multi_modal_projector.linear_1.weight": "projector",
                "lm_head.weight": "language",
            },
        ),
        (
            ODD_ARCHITECTURES["qwen3_5"],
            {
                "model.language_model.layers.1.self_attn.q_proj.weight": "language",
                "model.visual.blocks.0.attn.qkv.weight": "vision",
                "model.visual.merger.linear_fc1.weight": "projector",  # inside the tower
            },
        ),
        (
            _speech,
            {
                "model.audio_tower.layers.0.fc1.weight": "audio",
                "model.language_model.layers.0.self_attn.q_proj.weight": "language",
                "model.multi_modal_projector.linear.weight": "projector",
            },
        ),
        (
            _clip,
            {
                "text_model.encoder.layers.0.mlp.fc1.weight": "text",  # it reads, and nothing is written
                "vision_model.encoder.layers.0.mlp.fc1.weight": "vision",
                "visual_projection.weight": "projector",
            },
        ),
        (ODD_ARCHITECTURES["bart"], {"model.encoder.layers.0.fc1.weight": None}),
        (ODD_ARCHITECTURES["vit_classifier"], {"vit.layers.0.mlp.fc1.weight": None}),
    ],
)  # fmt: skip
def test_a_parameter_is_of_the_tower_it_lies_in(build: Any, wanted: dict[str, str | None]) -> None:
    model = _built(*build()[:2])
    towers, present = towers_of(model), dict(model.named_parameters())
    for name, tower in wanted.items():
        assert name in present and tower_in(towers, name) == tower, name


def test_folder_and_model_agree_on_towers(tmp_path: Path) -> None:
    kind = saved("llava", tmp_path)
    report, live = scan_weights(tmp_path), scan_weights(kind.from_pretrained(tmp_path, dtype=torch.float32))
    assert {s.name: s.tower for s in report.stats} == {s.name: s.tower for s in live.stats}
    assert {s.tower for s in report.stats} == {"language", "vision", "projector"}


def _chosen(plan: Any) -> set[str]:
    return {".".join(e.name.split(".")[:2]) for e in plan.entries if e.trains}


def test_a_plan_stays_in_the_towers_that_are_asked_for(tmp_path: Path) -> None:
    saved("llava", tmp_path)
    report = scan_weights(tmp_path)
    words, eyes, between = "model.language_model", "model.vision_tower", "model.multi_modal_projector"
    plan = make_plan(report, spectrum_ratio=1.0)
    assert _chosen(plan) == {words}
    assert any("tower 'vision'" in note for note in plan.notes)
    assert _chosen(make_plan(report, spectrum_ratio=1.0, towers="vision")) == {eyes}
    assert _chosen(make_plan(report, spectrum_ratio=1.0, towers="all")) == {words, eyes, between}
    led = make_plan(report, spectrum_ratio=1.0, train_projectors=True)
    assert _chosen(led) == {words, between}
    whole = {e.name for e in led.entries if e.action == "save"}
    assert whole == {s.name for s in report.stats if s.name.startswith(between)}  # biases as well
    norms = make_plan(report, spectrum_ratio=1.0, train_norms=True, towers="vision")
    assert _chosen(norms) == {eyes}
    with pytest.raises(OptionError, match=r"^towers is 'audio', and the model has language, vision\.$"):
        make_plan(report, towers="audio")


def test_targets_that_are_named_are_taken_in_every_tower(tmp_path: Path) -> None:
    kind = saved("llava", tmp_path)
    base = kind.from_pretrained(tmp_path, dtype=torch.float32)
    named = peft.get_peft_model(base, SpectrumConfig(mode="lora", target_modules=["fc1", "up_proj"]))
    assert _chosen(named.peft_config["default"].plan) == {"model.language_model", "model.vision_tower"}
    base = kind.from_pretrained(tmp_path, dtype=torch.float32)
    less = peft.get_peft_model(base, SpectrumConfig(mode="lora", exclude_modules=["up_proj"]))
    assert _chosen(less.peft_config["default"].plan) == {"model.language_model"}


def test_projectors_train_whole_beside_adapters_and_are_saved(tmp_path: Path) -> None:
    kind, inputs = saved("llava", tmp_path / "base"), ODD_ARCHITECTURES["llava"]()[2]
    ids = torch.cat([torch.full((2, 16), 90), inputs["input_ids"]], 1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "pixel_values": pixels, "labels": ids}
    model, _ = load_model_with_spectrum(
        tmp_path / "base", SpectrumConfig(mode="lora", r=4, train_projectors=True), dtype="float32", model_class=kind
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**given).loss.backward()
    optimizer.step()
    with torch.no_grad():
        wanted = model.eval()(**given).logits
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**given).logits, wanted)
    trained = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    leads = {name: value for name, value in trained.items() if "projector.linear_1" in name}
    assert {name.rpartition(".")[2] for name in leads} == {"weight", "bias"}
    base = next(value for name, value in stored.items() if name.endswith("projector.linear_1.weight"))
    assert all(not torch.equal(value, base) for name, value in leads.items() if name.endswith("weight"))
