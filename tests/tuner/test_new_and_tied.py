"""Parameters that no checkpoint holds, and tensors that lie at several places of a model."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from odd_architectures import ODD_ARCHITECTURES, saved
from safetensors.torch import load_file, save_file

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, scan_weights
from spectrum_peft.errors import CheckpointError, MismatchError, OptionError
from spectrum_peft.tuner.loading import load_trained

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
SOUNDS = {
    **SIZES, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "mask_time_prob": 0.0,
}  # fmt: skip
TEXT = {**SIZES, "vocab_size": 96}
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
# {what is new: (class that the checkpoint was saved from, class that is trained, config, inputs)}
NEW = {
    "vision head": ("ViTModel", "ViTForImageClassification", "ViTConfig", IMAGES, {"pixel_values": PIXELS}),
    "ctc head": ("Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2Config", SOUNDS, {"input_values": SOUND}),
    "projector and head": (
        "HubertModel", "HubertForSequenceClassification", "HubertConfig", SOUNDS, {"input_values": SOUND},
    ),
    "head with parts": ("RobertaModel", "RobertaForSequenceClassification", "RobertaConfig", TEXT, {"input_ids": IDS}),
    "pooler and head": (
        "DebertaV2ForMaskedLM", "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**TEXT, "pooler_hidden_size": 32}, {"input_ids": IDS},
    ),
}  # fmt: skip


def made(what: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    before, after, config, sizes, inputs = NEW[what]
    settings = getattr(transformers, config)(**sizes)
    getattr(transformers, before)(settings).save_pretrained(folder)
    return getattr(transformers, after), inputs


def changed(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize("what", NEW)
def test_what_the_checkpoint_lacks_trains_in_a_plain_model(what: str, tmp_path: Path) -> None:
    kind, _ = made(what, tmp_path)
    _, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    model, _ = load_model_with_spectrum(
        str(tmp_path), SpectrumConfig(mode="spectrum", spectrum_ratio=0.1), dtype="float32", model_class=kind
    )
    assert info["missing_keys"]
    assert {n for n in info["missing_keys"] if model.get_parameter(n).requires_grad} == set(info["missing_keys"])


@pytest.mark.parametrize("mode", ["lora", "spectrum"])
@pytest.mark.parametrize("what", NEW)
def test_what_the_checkpoint_lacks_is_saved_with_the_adapter(what: str, mode: str, tmp_path: Path) -> None:
    """The second model has other random values; the adapter brings the first one's."""
    kind, inputs = made(what, tmp_path / "base")
    torch.manual_seed(1)
    fresh, info = kind.from_pretrained(tmp_path / "base", output_loading_info=True)
    model = changed(peft.get_peft_model(fresh, SpectrumConfig(mode=mode, r=4)))
    plan = model.peft_config["default"].plan
    assert {plan.by_name[n].action for n in info["missing_keys"]} == {"save"}
    wanted = model(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.allclose(wanted, again(**inputs).logits, atol=1e-6)


def test_a_new_head_stays_frozen_for_who_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, _ = made("vision head", tmp_path)
    config = SpectrumConfig(mode="spectrum", exclude_modules=["classifier"])
    with caplog.at_level(logging.WARNING, logger="spectrum_peft"):
        model, _ = load_model_with_spectrum(str(tmp_path), config, dtype="float32", model_class=kind)
    assert not model.classifier.weight.requires_grad
    assert any("stay random: classifier.weight, classifier.bias" in r.getMessage() for r in caplog.records)


def test_a_head_that_the_checkpoint_holds_is_not_new(tmp_path: Path) -> None:
    kind = saved("vit_classifier", tmp_path)
    model, _ = load_model_with_spectrum(
        str(tmp_path), SpectrumConfig(mode="spectrum"), dtype="float32", model_class=kind
    )
    assert not model.classifier.weight.requires_grad


def test_a_head_for_other_labels_is_new(tmp_path: Path) -> None:
    kind = saved("vit_classifier", tmp_path)
    model, _ = load_model_with_spectrum(
        str(tmp_path), SpectrumConfig(mode="spectrum"), dtype="float32", model_class=kind, num_labels=7,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    assert model.classifier.weight.requires_grad and model.classifier.weight.shape == (7, 32)


@pytest.mark.parametrize("name", ["bart", "roberta_mlm", "t5gemma"])
def test_tensors_that_are_one_in_the_base_are_one_in_the_copies_that_train(name: str, tmp_path: Path) -> None:
    if name == "t5gemma":  # encoder and decoder have tables of their own; the decoder's is the head
        side = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
        kind = transformers.T5GemmaForConditionalGeneration
        kind(transformers.T5GemmaConfig(encoder=dict(side), decoder=dict(side), vocab_size=96)).save_pretrained(
            tmp_path
        )
    else:
        kind = saved(name, tmp_path)
    plain = kind.from_pretrained(tmp_path)
    groups: dict[int, list[str]] = {}
    for n, p in plain.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(n)
    model = peft.get_peft_model(kind.from_pretrained(tmp_path), SpectrumConfig(mode="lora", r=4, train_embeddings=True))
    tied = [g for g in groups.values() if len(g) > 1 and all(n.endswith("weight") for n in g)]
    assert tied
    for group in tied:
        modules = [model.get_base_model().get_submodule(n.removesuffix(".weight")) for n in group]
        assert len({id(m.modules_to_save["default"].weight) for m in modules}) == 1


def test_a_matrix_at_two_places_of_the_model_is_left_out_by_name(tmp_path: Path) -> None:
    """A layer around one of them would leave the other as it was; the plain model trains both, as the one that they are."""
    kind, inputs = saved("zamba2", tmp_path), ODD_ARCHITECTURES["zamba2"]()[2]
    plain = kind.from_pretrained(tmp_path).eval()
    shared = [n for n, _ in plain.named_parameters() if ".shared_transformer." in n and n.endswith("proj.weight")]
    before = plain(**inputs).logits
    for mode in ("lora", "spectrum"):
        model = changed(peft.get_peft_model(kind.from_pretrained(tmp_path), SpectrumConfig(mode=mode, r=4)))
        plan = model.peft_config["default"].plan
        assert shared and not set(plan.by_name) & set(shared)
        assert any("the same tensor is" in note for note in plan.notes)
        with model.disable_adapter():
            assert torch.equal(before, model(**inputs).logits)
    with pytest.raises(OptionError, match="trains every parameter"):
        peft.get_peft_model(kind.from_pretrained(tmp_path), SpectrumConfig(mode="full"))
    whole, _ = load_model_with_spectrum(str(tmp_path), SpectrumConfig(mode="full"), dtype="float32", model_class=kind)
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_a_report_with_other_sides_than_the_models_is_refused(tiny_llama_folder: Path) -> None:
    report = scan_weights(tiny_llama_folder)
    name = "model.layers.1.mlp.up_proj.weight"
    stats = tuple(replace(s, shape=(10**9, 10**9), numel=10**18) if s.name == name else s for s in report.stats)
    config = SpectrumConfig(mode="lora", r=2, report=replace(report, stats=stats))
    with pytest.raises(
        MismatchError, match=rf"says that {re.escape(name)} is 1000000000 x 1000000000, the model's is \("
    ):
        load_model_with_spectrum(str(tiny_llama_folder), config, dtype="float32")


def test_adapters_are_planned_only_where_they_are_asked(tmp_path: Path) -> None:
    kind, inputs = saved("mamba", tmp_path), ODD_ARCHITECTURES["mamba"]()[2]
    model = peft.get_peft_model(kind.from_pretrained(tmp_path), SpectrumConfig(mode="lora", r=4))
    model(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if ".lora_B." in n)
    plan = model.peft_config["default"].plan
    assert any("MambaMixer reads the weight" in note for note in plan.notes)
    real = peft.get_peft_model(kind.from_pretrained(tmp_path), SpectrumConfig(mode="spectrum", spectrum_ratio=1.0))
    real(**inputs).loss.backward()  # real weights may still train there
    assert any("dt_proj" in n and p.grad is not None for n, p in real.named_parameters() if p.requires_grad)


def test_what_a_checkpoint_lacks_is_said_in_a_line_and_a_wrong_shape_is_shown(
    tmp_path: Path, tiny_llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_llama_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"cut: lacks {re.escape(name)}, and has model\.layers\.\d\.mlp\.up_proj\.weight"
    ):
        load_trained(str(folder), dtype="float32")
    everywhere = {n: t for n, t in tensors.items() if ".up_proj." not in n}  # as a class with more in each block has it
    save_file(everywhere, folder / "model.safetensors", {"format": "pt"})
    load_trained(str(folder), dtype="float32")
    said = [r for r in caplog.records if name in r.getMessage()]
    assert len(said) == 1 and said[0].levelname == "WARNING" and "begins at random" in said[0].getMessage()
    save_file({**tensors, name: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_trained(str(folder), dtype="float32")
    logger = logging.getLogger("transformers.modeling_utils")
    assert not [f for f in logger.filters if type(f).__name__ == "_Held"]
