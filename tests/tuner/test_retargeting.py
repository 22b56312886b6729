"""What plain peft would make of a LoRA's names in a model of transformers: found before a file is written that it misreads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from spectrum_peft import SpectrumConfig, export_lora
from spectrum_peft.errors import OptionError
from spectrum_peft.tuner.retargeting import misread

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "families"))


def linears(model: torch.nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_names_that_peft_reads_right_are_not_called_misread(name: str) -> None:
    model = ARCHITECTURES[name].build()
    assert misread(model, linears(model)) == {}


def test_a_matrix_that_peft_would_lose_is_refused_and_not_saved_as_a_plain_lora(tmp_path: Path) -> None:
    if not hasattr(transformers, "LagunaForCausalLM"):
        pytest.skip("this transformers has no Laguna, whose shared experts peft misreads")
    from listing import LISTED

    torch.manual_seed(0)
    LISTED["laguna"].build().save_pretrained(tmp_path / "base")
    base = transformers.LagunaForCausalLM.from_pretrained(tmp_path / "base")
    lost = misread(base, linears(base))
    assert lost and all("shared_experts" in module for module in lost)
    # Peft itself: of a LoRA on one of these modules, what it saved does not come back.
    module = sorted(lost)[0]
    plain = get_peft_model(base, LoraConfig(target_modules=[module], init_lora_weights=False))
    plain.save_pretrained(tmp_path / "plain")
    fresh = transformers.LagunaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        again = PeftModel.from_pretrained(fresh, tmp_path / "plain")
    assert any(
        not torch.equal(v, dict(again.named_parameters())[n]) for n, v in plain.named_parameters() if ".lora_" in n
    )

    model = get_peft_model(
        transformers.LagunaForCausalLM.from_pretrained(tmp_path / "base"),
        SpectrumConfig(mode="lora", r=2, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "SPECTRUM"
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.randn_like(v) for k, v in load_file(path).items()}, path)
    with pytest.raises(OptionError, match=r"shared_experts\S+: plain peft takes it for .* Merge it instead"):
        export_lora(tmp_path / "adapter", tmp_path / "out")
