"""A config that asks for tuples: transformers' causal models cannot run with it, and we read outputs by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from spectrum_peft import SpectrumConfig, load_model_with_spectrum


def test_a_checkpoint_whose_config_asks_for_tuples_computes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "return_dict": False}))
    ids = torch.arange(6)[None]
    found = []
    for folder in (tmp_path / "model", tiny_llama_folder):
        model, _ = load_model_with_spectrum(
            str(folder), SpectrumConfig(mode="lora", task_type="CAUSAL_LM"), dtype=torch.float32
        )
        found.append(model(input_ids=ids).logits)
    assert torch.equal(*found)
