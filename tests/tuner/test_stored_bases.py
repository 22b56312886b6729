"""Bases whose files are quantized by others: what trains on them is saved, merged and loaded again; the rest is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantizing
import torch
import transformers
from quantizing import FORMATS, LLAMA, both, saved
from running import LIBRARIES
from torch import Tensor

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, merge_into_base
from spectrum_peft.errors import CheckpointError, OptionError
from spectrum_peft.tuner.loading import load_model_with_peft, load_trained

pytestmark = LIBRARIES
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """{method: (quantized, dense)}"""
    folder = tmp_path_factory.mktemp("bases")
    saved(transformers.LlamaForCausalLM, LLAMA, folder / "llama")
    saved(transformers.GptOssForCausalLM, transformers.GptOssConfig(**quantizing.GPT_OSS), folder / "gpt_oss")
    found = {}
    for method, form in {"fp8": "blocks of float8 e4m3", "gptq": "GPTQ of 4 bits", "awq": "AWQ"}.items():
        settings, quantize, _ = FORMATS[form]
        found[method] = both(folder / "llama", folder / method, quantize, settings, "_proj.weight")
    which = r"experts\.(gate_up|down)_proj$"
    settings = {"quant_method": "mxfp4"}
    found["mxfp4"] = both(folder / "gpt_oss", folder / "mxfp4", quantizing.mxfp4, settings, which)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def trained(model: Any) -> Tensor:
    """Two steps; returns the logits afterwards."""
    before = logits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model)
    assert not torch.equal(before, after)
    return after


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_real_weights_train_and_the_result_is_a_dense_checkpoint(
    method: str, bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, dense = bases[method]
    model, _ = load_model_with_spectrum(str(base), SpectrumConfig(mode="spectrum"), dtype="float32")
    assert torch.equal(logits(model), logits(loaded(dense)))
    wanted = trained(model)
    model.save_pretrained(tmp_path / "tuned")
    assert "quantization_config" not in json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert torch.equal(logits(loaded(tmp_path / "tuned")), wanted)


@pytest.mark.parametrize(("method", "mode"), [("fp8", "lora"), ("mxfp4", "lora"), ("fp8", "columns")])
def test_an_adapter_is_merged_onto_the_dequantized_base(
    method: str, mode: str, bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, _ = bases[method]
    model, _ = load_model_with_spectrum(str(base), SpectrumConfig(mode=mode, r=4), dtype="float32")
    wanted = trained(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load_trained(str(tmp_path / "adapter"), dtype="float32")
    assert torch.equal(logits(again), wanted)
    with pytest.raises(
        CheckpointError, match=r"holds weights in .* only, wanted the float checkpoint .*onto='dequantized'"
    ):
        merge_into_base(tmp_path / "adapter", out=tmp_path / "original")
    for adapter, out in ((tmp_path / "adapter", "folder"), (model, "live")):
        report = merge_into_base(adapter, out=tmp_path / out, onto="dequantized", dtype="float32")
        assert any("matrices are dequantized" in note for note in report.notes)
        merged = loaded(tmp_path / out)
        assert not getattr(merged, "is_quantized", False)
        # float32 products in another order, through one layer
        assert (logits(merged) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_nothing_trains_on_is_refused_before_it_is_loaded(
    method: str, bases: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", never)
    base = str(bases[method][0])
    with pytest.raises(CheckpointError, match=f"weights are quantized by '{method}', on which nothing trains here"):
        load_model_with_spectrum(base, SpectrumConfig(mode="lora"), dtype="float32")
    with pytest.raises(CheckpointError, match=f"weights are quantized by '{method}', on which nothing trains here"):
        load_model_with_peft(base, {"peft_type": "LORA"}, dtype="float32")


def test_what_is_quantized_is_not_quantized_again(bases: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(OptionError, match=r"quantization is 'nf4' .* quantized by 'fp8' already"):
        load_model_with_spectrum(str(bases["fp8"][0]), SpectrumConfig(mode="lora"), quantization="nf4", dtype="float32")


def test_a_model_that_computes_in_float8_is_refused(bases: dict[str, tuple[Path, Path]]) -> None:
    """As a GPU with float8 products leaves it: layers with quantized weights."""
    from peft import get_peft_model
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    settings = transformers.FineGrainedFP8Config(weight_block_size=(16, 16))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(LLAMA)
    model = replace_with_fp8_linear(model, quantization_config=settings, pre_quantized=True)
    model.is_quantized, model.config.quantization_config = True, settings
    with pytest.raises(CheckpointError, match=r"quantized by 'fp8', wanted them dequantized: .*dequantize=True"):
        get_peft_model(model, SpectrumConfig(mode="lora", task_type="CAUSAL_LM"))
    del model.config.quantization_config
