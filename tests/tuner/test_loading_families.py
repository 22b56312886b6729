"""What a class takes decides its task type, what a checkpoint names its class; heads of any name stay unquantized."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from odd_architectures import ODD_ARCHITECTURES
from odd_architectures import saved as saved_odd

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, make_plan, quantization_config_for, scan_weights
from spectrum_peft.errors import OptionError
from spectrum_peft.tuner.loading import task_type_of

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    config = transformers.WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=24, max_target_positions=32,
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_model_that_hears_is_called_with_sounds(whisper: Path, quantization: str | None) -> None:
    """PEFT's wrapper for sequence-to-sequence tasks would pass `input_ids`, which Whisper does not take."""
    model, _ = load_model_with_spectrum(
        str(whisper), SpectrumConfig(mode="lora", r=4), dtype="float32", quantization=quantization
    )
    assert model.peft_config["default"].task_type is None
    assert type(model.get_base_model().proj_out) is torch.nn.Linear
    out = model(input_features=torch.randn(2, 16, 48), labels=torch.randint(3, 90, (2, 8)))
    assert torch.isfinite(out.loss)


def test_heads_are_found_for_a_path_a_config_and_a_model(whisper: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(whisper)
    model = transformers.WhisperForConditionalGeneration(config)
    lists = [quantization_config_for(None, given).llm_int8_skip_modules for given in (str(whisper), config, model)]
    assert lists[0] == lists[1] == lists[2]
    assert {"proj_out", "lm_head"} <= set(lists[0])
    assert "proj_out" not in quantization_config_for(None).llm_int8_skip_modules


def test_a_body_is_loaded_as_the_body_that_it_is(tmp_path: Path) -> None:
    """A language head on it would be random, and no file would ever hold it."""
    clip = transformers.CLIPConfig(
        text_config={**SIZES, "num_hidden_layers": 1}, vision_config={**SIZES, "num_hidden_layers": 1}
    )
    for model in (
        transformers.BertModel(transformers.BertConfig(vocab_size=96, **SIZES)),
        transformers.CLIPModel(clip),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4)),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        loaded, _ = load_model_with_spectrum(str(folder), SpectrumConfig(mode="spectrum"), dtype="float32")
        assert type(loaded) is type(model)


LLAMA = {"vocab_size": 96, **SIZES, "num_key_value_heads": 2}


def saved(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_a_body_is_not_trained_under_a_random_language_head(tmp_path: Path) -> None:
    body = saved(transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)), tmp_path / "body")
    wanted = (
        r"config.json names LlamaModel, .*LlamaForCausalLM \(lm_head.weight\) is in no file; classes that fit.*: (.*)\."
    )
    with pytest.raises(OptionError, match=wanted) as caught:
        load_model_with_spectrum(
            body, SpectrumConfig(mode="lora"), dtype="float32", model_class=transformers.AutoModelForCausalLM
        )
    fitting = str(caught.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert {"LlamaModel", "LlamaForSequenceClassification"} <= set(fitting)
    assert "LlamaForCausalLM" not in fitting


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoModelForSequenceClassification"])
def test_a_body_with_a_tied_head_or_under_a_classifier_is_trained(kind: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings="Causal" in kind)
    body = saved(transformers.LlamaModel(config), tmp_path / "body")
    model, _ = load_model_with_spectrum(
        body, SpectrumConfig(mode="lora"), dtype="float32", model_class=getattr(transformers, kind)
    )
    assert model.get_base_model().config.model_type == "llama"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GPT2LMHeadModel", "GPT2LMHeadModel is a class of 'gpt2', the checkpoint is of 'bert'"),
        ("AutoModelForImageTextToText", "AutoModelForImageTextToText knows no class of 'bert'"),
    ],
)
def test_a_class_of_another_family_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    body = saved(transformers.BertModel(transformers.BertConfig(vocab_size=96, **SIZES)), tmp_path / "body")
    with pytest.raises(OptionError, match=rf"{said}; classes that fit .*BertForSequenceClassification"):
        load_model_with_spectrum(body, SpectrumConfig(mode="lora"), model_class=getattr(transformers, kind))


@pytest.mark.parametrize(
    ("planned", "kind"),
    [(True, "AutoModelForCausalLM"), (False, "AutoModelForCausalLM"), (False, "Qwen3_5ForCausalLM")],
)
def test_real_weights_on_a_4bit_base_of_another_class(planned: bool, kind: str, tmp_path: Path) -> None:
    """The modules that stay unquantized are named as in the class that is loaded, not as in the one of config.json."""
    torch.manual_seed(0)
    _, config, inputs = ODD_ARCHITECTURES["qwen3_5"]()
    config.text_config.intermediate_size = 64  # rows of 4 bit are of whole blocks of 32
    whole = transformers.Qwen3_5ForConditionalGeneration(config)
    folder = saved(whole, tmp_path / "whole")
    spectrum = SpectrumConfig(mode="spectrum", spectrum_ratio=0.5)
    if planned:
        plan = make_plan(scan_weights(folder), mode="spectrum", spectrum_ratio=0.5)
        spectrum.plan = plan.replace(entries=tuple(e for e in plan.entries if ".visual." not in e.name))
    model, _ = load_model_with_spectrum(
        folder, spectrum, dtype="float32", quantization="nf4", model_class=getattr(transformers, kind)
    )
    inner = model.get_base_model()
    assert type(inner) is transformers.Qwen3_5ForCausalLM
    linears = {n: type(m).__name__ for n, m in inner.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {e.name.removesuffix(".weight") for e in model.peft_config["default"].plan.entries if e.action == "train"}
    floats = {n.removesuffix(".base_layer") for n, kind in linears.items() if kind == "Linear"}
    assert chosen and floats == chosen | {"lm_head"}
    assert "Linear4bit" in linears.values()
    out = model(**inputs)
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_parts_of_one_stored_tensor_are_quantized_together_or_not_at_all(tmp_path: Path) -> None:
    """Query, key and value lie in the file as one; a plan that trains one of them leaves all three unquantized."""
    kind = saved_odd("nomic_bert", tmp_path, intermediate_size=64)  # rows of 4 bit are of whole blocks of 32
    report = scan_weights(tmp_path)
    plan = make_plan(report, mode="spectrum", spectrum_ratio=0.5)
    entries = [
        e
        if not e.trains or e.name.endswith("layers.0.self_attn.q_proj.weight")
        else dataclasses.replace(e, action="freeze")
        for e in plan.entries
    ]
    config = SpectrumConfig(mode="spectrum", plan=plan.replace(entries=tuple(entries)))
    model, _ = load_model_with_spectrum(str(tmp_path), config, dtype="float32", quantization="nf4", model_class=kind)
    block = model.get_base_model().nomic_bert.layers
    kinds = [
        type(getattr(part, "base_layer", part)).__name__
        for layer in block
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    assert kinds == ["Linear"] * 3 + ["Linear4bit"] * 3
    assert torch.isfinite(model(**ODD_ARCHITECTURES["nomic_bert"]()[2]).loss)


def test_what_4_bit_would_break_stays_unquantized() -> None:
    """Mamba reads the weight of a projection without calling it; ModernBERT's head has a part before its classifier."""
    mamba = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=8, time_step_rank=4)
    skipped = quantization_config_for(None, transformers.MambaForCausalLM(mamba)).llm_int8_skip_modules
    assert "backbone.layers.0.mixer.dt_proj" in skipped and "backbone.layers.0.mixer.in_proj" not in skipped
    bert = transformers.ModernBertConfig(vocab_size=96, **SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2)
    classifier = transformers.ModernBertForSequenceClassification(bert)
    skipped = quantization_config_for(None, classifier).llm_int8_skip_modules
    assert {"head.dense", "classifier"} <= set(skipped) and "model.layers.0.mlp.Wi" not in skipped


@pytest.mark.parametrize(
    ("kind", "task"), [("BertForQuestionAnswering", "QUESTION_ANS"), ("ViltForQuestionAnswering", None)]
)
def test_question_answering_is_of_spans(kind: str, task: str | None) -> None:
    found = getattr(transformers, kind)
    with torch.device("meta"):
        assert task_type_of(found(found.config_class(vocab_size=96, **SIZES))) == task
