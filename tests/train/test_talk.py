"""Text that a trained model writes: piece by piece what it would write at once, and the base beside it is the base."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_peft.cli.main import main
from spectrum_peft.cli.terminal import escaped

FLAGS = "--max-steps 3 --per-device-train-batch-size 2 --learning-rate 0.1 --dtype float32"
WRITING = ["--dtype", "float32", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def trained(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter and a plain checkpoint, trained far enough to write something else than their base."""
    root = tmp_path_factory.mktemp("trained")
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "abc" * 8}]}
        for i in range(8)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for mode in ("lora", "spectrum"):
        words = f"train --model {tiny_llama_folder} --dataset {root}/rows.jsonl --mode {mode} --output-dir {root}/{mode} {FLAGS}"
        assert main(words.split()) == 0
    return {mode: root / mode for mode in ("lora", "spectrum")}


def expected(folder: Path, adapter: Path | None, prompt: str) -> str:
    """What plain transformers and peft write, all at once."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer([text], return_tensors="pt", add_special_tokens=False)
    output = model.generate(
        **{k: inputs[k] for k in ("input_ids", "attention_mask")}, do_sample=False, max_new_tokens=12
    )
    return escaped(str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))


@pytest.mark.parametrize("mode", ["lora", "spectrum"])
def test_the_tuned_model_and_its_base_write_what_transformers_writes(
    trained: dict[str, Path], tiny_llama_folder: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(trained[mode]), "--prompt", "3?", "--beside", *WRITING]) == 0
    _, _, both = capsys.readouterr().out.partition("[tuned]\n")
    tuned, _, base = both.partition("\n[base]\n")
    adapter = trained[mode] if mode == "lora" else None
    assert tuned == expected(tiny_llama_folder if adapter else trained[mode], adapter, "3?")
    assert base.removesuffix("\n") == expected(tiny_llama_folder, None, "3?")
    assert tuned != base


def test_prompts_come_from_standard_input_and_drawing_is_repeatable(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
        assert main(["generate", str(trained["lora"]), "--temperature", "9", "--seed", seed, *WRITING]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(escaped(text) == text for text in drawn)  # tokens are bytes, and many of them would be obeyed


def test_a_conversation_remembers_what_was_said_until_it_is_reset(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spectrum_peft.train import talk

    prompts = []
    real = talk.prompt_for
    monkeypatch.setattr(
        talk, "prompt_for", lambda t, messages, s: prompts.append(len(messages)) or real(t, messages, s)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n/reset\nc\n/quit\nd\n"))
    assert main(["chat", str(trained["lora"]), "--system", "s", *WRITING]) == 0
    assert prompts == [2, 2, 4, 2]  # the check before the first line, a, b after a and its answer, c alone
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize(
    "asked",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_beams_and_outputs_of_a_generation_config_change_nothing(
    asked: dict[str, Any], tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are of the checkpoint's makers, and what is shown is one text, as it is written."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "ab", "completion": "cd"}) + "\n")
    said = []
    for folder in (tiny_llama_folder, Path(shutil.copytree(tiny_llama_folder, tmp_path / "base"))):
        if folder != tiny_llama_folder:
            path = folder / "generation_config.json"
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **asked}))
        assert main(["generate", str(folder), "--prompt", "Hello", *WRITING]) == 0
        said.append(capsys.readouterr().out)
        judged = ["--generate", "rouge_l", "--dtype", "float32", "--max-new-tokens", "4"]
        assert main(["evaluate", str(folder), "--dataset", str(rows), *judged]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[2]


def test_what_cannot_be_written_is_one_line(
    trained: dict[str, Path], tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from transformers import AutoTokenizer

    def fails(*words: str) -> str:
        capsys.readouterr()
        assert main([*words, "--dtype", "float32"]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    folder = str(trained["lora"])
    assert "temperature is -1" in fails("generate", folder, "--prompt", "x", "--temperature", "-1")
    assert "has room for 256" in fails("generate", folder, "--prompt", "x" * 300)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "--prompt is missing, and standard input is empty" in fails("generate", folder)
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in tiny_llama_folder.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    assert "has no chat template" in fails("chat", str(plain))
    assert "does not say which model it was trained from" in fails("generate", str(plain), "--prompt", "x", "--beside")
