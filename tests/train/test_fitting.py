"""A tokenizer that has tokens which the model's embedding has not: one line, from every command that runs the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from running import LIBRARIES
from transformers import AutoModelForCausalLM

from spectrum_peft.cli.main import main
from spectrum_peft.errors import CheckpointError
from spectrum_peft.tuner.loading import load_tokenizer

pytestmark = LIBRARIES
SAID = "a token or a position lies outside of its embedding of 40 rows"


@pytest.mark.parametrize("line", [
    "evaluate base --dataset rows.jsonl --dtype float32",
    "probe base --dataset rows.jsonl --dtype float32 -o gradients.json",
    "generate base --prompt zebra --dtype float32",
    "train --model base --dataset rows.jsonl --mode lora --max-steps 1 --dtype float32 --report-to none --output-dir out",
])  # fmt: skip
def test_a_token_without_a_row_is_one_line(
    line: str,
    tiny_llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_folder, "base")
    model = AutoModelForCausalLM.from_pretrained("base")
    model.resize_token_embeddings(40)
    model.config.pad_token_id = model.generation_config.pad_token_id = (
        None  # 256, which a table of 40 rows refuses when it is made
    )
    model.save_pretrained("base")
    Path("rows.jsonl").write_text(8 * (json.dumps({"text": "zebra zebra"}) + "\n"))
    assert main(line.split()) == 2
    assert SAID in capsys.readouterr().err


def test_a_tokenizer_whose_length_is_no_number_is_refused(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "x"}))
    with pytest.raises(CheckpointError, match=r"model_max_length 'x', wanted a number"):
        load_tokenizer(str(tmp_path))
