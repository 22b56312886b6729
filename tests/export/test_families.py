"""Trained adapters of families with names, layouts and ties of their own: what is merged computes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from odd_architectures import ODD_ARCHITECTURES, saved

from spectrum_peft import SpectrumConfig, export_lora, merge_into_base, scan_weights

# Sums in another order, in float32, over two or four blocks: some hundred roundings of 6e-8 beside outputs of about 1.
SAME = 1e-4


def trained(base: Path, kind: Any, **options: Any) -> Any:
    """An adapter with factors that are not zero, on the checkpoint."""
    model = peft.get_peft_model(kind.from_pretrained(base, dtype=torch.float32), SpectrumConfig(r=4, **options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model.eval()(**inputs).logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("mode", ["lora", "spectrum"])
@pytest.mark.parametrize("name", ODD_ARCHITECTURES)
def test_a_merged_checkpoint_computes_what_was_trained(name: str, mode: str, tmp_path: Path) -> None:
    kind, inputs = saved(name, tmp_path / "base"), ODD_ARCHITECTURES[name]()[2]
    model = trained(tmp_path / "base", kind, mode=mode)
    wanted = outputs(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    base = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    assert apart(wanted, outputs(kind.from_pretrained(tmp_path / "base"), inputs)) > 10 * SAME
    for source, out in ((tmp_path / "adapter", "folder"), (model, "memory")):
        report = merge_into_base(source, tmp_path / "base", tmp_path / out)
        merged, info = kind.from_pretrained(tmp_path / out, output_loading_info=True)
        assert apart(wanted, outputs(merged, inputs)) < SAME
        assert not info["missing_keys"] and not info["unexpected_keys"]
        stored = safetensors.torch.load_file(tmp_path / out / "model.safetensors")
        assert stored.keys() == base.keys() and not report.added  # the stored names, no tied twin


@pytest.mark.parametrize("name", ["bart", "roberta_mlm"])
def test_tables_that_are_one_tensor_stay_one_in_the_merged_file(name: str, tmp_path: Path) -> None:
    kind, inputs = saved(name, tmp_path / "base"), ODD_ARCHITECTURES[name]()[2]
    model = trained(tmp_path / "base", kind, mode="lora", train_embeddings=True)
    model.save_pretrained(tmp_path / "adapter")
    base = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    for source, out in ((tmp_path / "adapter", "folder"), (model, "memory")):
        assert not merge_into_base(source, tmp_path / "base", tmp_path / out).added
        assert safetensors.torch.load_file(tmp_path / out / "model.safetensors").keys() == base.keys()
        assert apart(outputs(model, inputs), outputs(kind.from_pretrained(tmp_path / out), inputs)) < SAME


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "granite_moe", "mamba", "llava"])
def test_plain_peft_computes_what_was_trained(name: str, dropout: float, tmp_path: Path) -> None:
    kind, inputs = saved(name, tmp_path / "base"), ODD_ARCHITECTURES[name]()[2]
    options = {"lora_dropout": dropout, "exclude_modules": r".*\.experts\..*"} if dropout else {}
    model = trained(tmp_path / "base", kind, mode="lora", task_type="CAUSAL_LM", **options)
    model.save_pretrained(tmp_path / "adapter")
    wanted = outputs(model, inputs)
    for source, out in ((tmp_path / "adapter", "folder"), (model, "memory")):
        export_lora(source, tmp_path / out)
        again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / out)
        assert apart(wanted, outputs(again, inputs)) < SAME


def test_a_report_of_the_folder_fits_the_model(tmp_path: Path) -> None:
    kind = saved("llava", tmp_path)
    report = scan_weights(tmp_path)
    live = scan_weights(kind.from_pretrained(tmp_path, dtype=torch.float32))
    assert {s.name: (s.role, s.shape) for s in report.stats} == {s.name: (s.role, s.shape) for s in live.stats}
    assert report.fingerprint.structure == live.fingerprint.structure
    assert report.fingerprint.content == live.fingerprint.content


def test_tensors_that_the_class_ignores_are_copied(tmp_path: Path) -> None:
    """Blocks for the prediction of several tokens lie in the file and in no class."""
    kind, inputs = saved("qwen3_next", tmp_path / "base"), ODD_ARCHITECTURES["qwen3_next"]()[2]
    file = tmp_path / "base" / "model.safetensors"
    stored = safetensors.torch.load_file(file)
    extra = {n.replace("model.layers.1.", "mtp.layers.0."): t.clone() for n, t in stored.items() if ".layers.1." in n}
    safetensors.torch.save_file(stored | extra, file, {"format": "pt"})
    report = scan_weights(tmp_path / "base")
    assert not [s.name for s in report.stats if s.name.startswith("mtp")]
    assert any("mtp" in note for note in report.notes)
    model = trained(tmp_path / "base", kind, mode="lora", report=report)
    model.save_pretrained(tmp_path / "adapter")
    merge_into_base(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[n], t) for n, t in extra.items())
    assert apart(outputs(model, inputs), outputs(kind.from_pretrained(tmp_path / "out"), inputs)) < SAME


def test_the_text_class_of_a_vision_language_checkpoint(tmp_path: Path) -> None:
    """Planned from the folder, trained as text alone, merged back with the towers as they were."""
    whole, inputs = saved("qwen3_5", tmp_path / "base"), ODD_ARCHITECTURES["qwen3_5"]()[2]
    text = transformers.Qwen3_5ForCausalLM
    report = scan_weights(tmp_path / "base")
    model = trained(tmp_path / "base", text, mode="lora", report=report, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    merge_into_base(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    before, after = (safetensors.torch.load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if ".visual." in n)
    for kind in (whole, text):
        assert apart(outputs(model, inputs), outputs(kind.from_pretrained(tmp_path / "out"), inputs)) < SAME


def test_originals_are_read_back_under_the_stored_names(tmp_path: Path) -> None:
    kind, inputs = saved("nomic_bert", tmp_path), ODD_ARCHITECTURES["nomic_bert"]()[2]
    plain = outputs(kind.from_pretrained(tmp_path), inputs)
    model = trained(tmp_path, kind, mode="spectrum", keep_base="file")
    assert apart(plain, outputs(model, inputs)) > 10 * SAME
    with model.disable_adapter():
        assert torch.equal(plain, outputs(model, inputs))
