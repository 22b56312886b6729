"""Text classes on checkpoints of models that see: merged back with the towers as they were, or refused before anything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import listing
import peft
import pytest
import safetensors.torch
import torch
import transformers

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, merge_into_base, scan_weights
from spectrum_peft.errors import MismatchError, OptionError

# Sums in another order, in float32, over two blocks: some hundred roundings of 6e-8 beside outputs of about 1.
SAME = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about names and shapes of single families


def saved(model_type: str, folder: Path) -> Path:
    torch.manual_seed(0)
    listing.LISTED[model_type].build().save_pretrained(folder)
    return folder


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    return model.eval()(input_ids=ids)[0]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("qwen3_5_moe", "Qwen3_5MoeForCausalLM"),  # experts that are one tensor each in the file
        ("qwen2_5_vl", "Qwen2_5_VLTextModel"),
        ("mllama", "MllamaForCausalLM"),
        ("llama4", "Llama4ForCausalLM"),
    ],
)
def test_what_a_text_class_trained_lies_in_the_whole_checkpoint(model_type: str, text: str, tmp_path: Path) -> None:
    base, kind = saved(model_type, tmp_path / "base"), getattr(transformers, text)
    config = SpectrumConfig(mode="lora", r=4, report=scan_weights(base))
    model = peft.get_peft_model(kind.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(tmp_path / "adapter")
    merge_into_base(tmp_path / "adapter", base, tmp_path / "out")
    assert apart(outputs(kind.from_pretrained(base)), outputs(model)) > 10 * SAME
    assert apart(outputs(kind.from_pretrained(tmp_path / "out")), outputs(model)) < SAME
    before, after = (safetensors.torch.load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    taken = {name for name in before if not torch.equal(before[name], after[name])}
    assert taken and not [name for name in taken if "vis" in name or "multi_modal" in name]
    whole = listing.LISTED[model_type].kind
    _, keys = whole.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not keys["missing_keys"] and not keys["unexpected_keys"]


@pytest.mark.parametrize(
    ("model_type", "text", "first"),
    [
        ("gemma3", "Gemma3ForCausalLM", "model.layers.0"),
        ("mistral3", "MistralForCausalLM", "model.layers.0"),
        ("llava", "LlamaForCausalLM", "model.layers.0"),
        ("qwen3_vl", "Qwen3VLTextModel", "layers.0"),
        ("idefics3", "LlamaForCausalLM", "model.layers.0"),  # whose head alone has the name of the text class
    ],
)
def test_a_text_class_whose_names_transformers_does_not_know_is_refused(
    model_type: str, text: str, first: str, tmp_path: Path
) -> None:
    """transformers loads it with random weights throughout, and a warning."""
    base, kind = saved(model_type, tmp_path), getattr(transformers, text)
    fitting = listing.LISTED[model_type].class_name
    wanted = rf"every block of {text} \({first}.* is in no file; classes that fit .*{fitting}"
    with pytest.raises(OptionError, match=wanted):
        load_model_with_spectrum(base, SpectrumConfig(mode="spectrum"), dtype="float32", model_class=kind)
    model = kind.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(MismatchError, match=rf"holds no block of a {text}, the first is {first}"):
        peft.get_peft_model(model, SpectrumConfig(mode="lora", r=4))
