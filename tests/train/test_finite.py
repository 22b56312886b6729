"""A checkpoint that holds NaN or Inf, or lacks a tensor: every command that runs it names the tensor, and prints no result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import LIBRARIES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

from spectrum_peft.cli.main import main
from spectrum_peft.errors import CheckpointError
from spectrum_peft.train.finite import first_not_finite, refuse_not_finite
from spectrum_peft.tuner.loading import load_trained

pytestmark = LIBRARIES
SPOILED = "model.layers.1.mlp.up_proj.weight"
TRAIN = "train --model base --dataset rows.jsonl --max-steps 1 --dtype float32 --report-to none --output-dir out"
COMMANDS = [
    "evaluate base --dataset rows.jsonl --dtype float32",
    "evaluate base --dataset rows.jsonl --dtype float32 --generate exact_match",
    "generate base --prompt ab --dtype float32",
    "generate base --prompt ab --dtype float32 --temperature 1",
    *(TRAIN + f" --mode {mode}" for mode in ("lora", "spectrum", "full")),
]


@pytest.fixture
def base(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_folder, "base")
    Path("rows.jsonl").write_text(8 * (json.dumps({"prompt": "ab", "completion": "cd"}) + "\n"))
    return Path("base/model.safetensors")


@pytest.mark.parametrize("line", COMMANDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_tensor_that_is_no_number_is_named(
    line: str, value: float, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(base)
    tensors[SPOILED][3, 4] = value
    save_file(tensors, base, metadata={"format": "pt"})
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert SPOILED in said.err.splitlines()[-1] and "Traceback" not in said.err
    assert '"loss"' not in said.out


@pytest.mark.parametrize("line", COMMANDS)
def test_a_block_that_lacks_what_the_others_have_is_refused(
    line: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(base)
    del tensors[SPOILED]
    save_file(tensors, base, metadata={"format": "pt"})
    assert main(line.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"base: lacks {SPOILED}, and has model.layers." in last and "The checkpoint is not whole" in last


def test_a_body_without_a_head_is_no_exception(tmp_path: Path) -> None:
    """Its keys have no prefix: `encoder.layer.0`, where the class with a head has `bert.encoder.layer.0`."""
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    body = BertModel(config)
    body.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks encoder\.layer\.1\.output\.dense\.weight, and has encoder\.layer\.0"
    ):
        load_trained(str(tmp_path), model_class=AutoModel)
    del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]
    tensors["encoder.layer.1.output.dense.weight"] = body.state_dict()["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_trained(str(tmp_path), model_class=AutoModel)  # a part that no block has may be new


def test_a_finite_model_whose_outputs_overflow_is_said_to_leave_its_range() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert first_not_finite(model) is None
    refuse_not_finite(3.0, model)
    with pytest.raises(
        CheckpointError, match=r"the loss is inf; its weights are finite, so what it computes leaves the range"
    ):
        refuse_not_finite(float("inf"), model)
    model[1].running_mean[1] = torch.nan
    assert first_not_finite(model) == "1.running_mean"


def test_a_number_to_learn_must_be_finite(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("numbers.jsonl").write_text('{"text": "a", "label": 0.5}\n{"text": "b", "label": Infinity}\n' * 4)
    line = TRAIN.replace("rows", "numbers") + " --mode lora --task regression"
    assert main(line.split()) == 2
    assert "numbers.jsonl: row 2: label is inf, wanted a finite number." in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_one_line(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "base", "--prompt", "a\udcff", "--dtype", "float32"]) == 2
    assert "the prompt holds bytes that are no UTF-8." in capsys.readouterr().err
