"""What a class takes decides its task type, what a checkpoint names its class; heads of any name stay unquantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, quantization_config_for

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
