"""A tokenizer that has tokens which the model's embedding has not: one line, from every command that runs the model."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer
from running import LIBRARIES
from transformers import AutoModelForCausalLM, LlamaConfig

from spectrum_peft.cli.main import main
from spectrum_peft.data import tokenizing
from spectrum_peft.errors import CheckpointError, DataError, loading
from spectrum_peft.tuner.classes import class_of
from spectrum_peft.tuner.tokenizer import load_tokenizer

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


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], r"model_input_names \[\], wanted a list of names"),
        ([{}], r"model_input_names \[\{\}\], wanted"),
        ([None], r"model_input_names \[None\], wanted"),
        (["x"], "the tokenizer: cannot be loaded"),  # what transformers and tokenizers say of the others
        ("input_ids", "the tokenizer: cannot be loaded"),
        (1, "the tokenizer: cannot be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_pad_rows_is_refused(names: Any, said: str, tmp_path: Path) -> None:
    """Rows of classifiers are padded by the first of these names, long after the tokenizer was loaded."""
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": names}))
    with pytest.raises(CheckpointError, match=said):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("change", [
    lambda t: t["model"]["vocab"].update({"a": 2**32 - 1}),  # tokenizers would count up to it whenever it writes the table
    lambda t: t.update(post_processor={"type": "BertProcessing", "sep": ["x", 2**24], "cls": ["y", 1]}),
    lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}),
])  # fmt: skip
def test_a_tokenizer_is_tried_when_it_is_loaded(change: Callable[[Any], None], tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError):
        load_tokenizer(str(tmp_path))


def test_panics_of_rust_are_errors_of_the_input() -> None:
    class PanicException(BaseException):  # as pyo3 makes it
        pass

    with pytest.raises(CheckpointError, match="cannot be loaded"), loading("x"):
        raise PanicException("index out of bounds")
    with pytest.raises(DataError, match="index out of bounds"), tokenizing():
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), loading("x"), tokenizing():
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["models", "T5Tokenizer", "pipeline"])
def test_architectures_that_are_no_models_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"architectures names '{name}', which is no class of a model"):
        class_of(LlamaConfig(architectures=[name]))


@pytest.mark.parametrize(
    "put", [lambda p: p.mkdir(), lambda p: p.symlink_to("/dev/zero"), lambda p: os.truncate(p, 1 << 40)]
)
def test_what_is_no_small_file_is_not_read_whole(put: Callable[[Path], None], tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "special_tokens_map.json"
    path.write_text("{}")
    if "truncate" not in put.__code__.co_names:
        path.unlink()
    put(path)
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: is (a folder|a device|larger than 256 MiB)"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("says", "refused"), [(8 << 30, True), (1025, True), (1024, False)])
def test_a_table_of_spellings_that_claims_more_than_it_holds_is_refused(
    says: int, refused: bool, tmp_path: Path
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    table = base64.b64encode(min(says, 2**32 - 1).to_bytes(4, "little") + bytes(1024)).decode()
    whole = {**json.loads(path.read_text()), "normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}
    path.write_text(json.dumps(whole))
    message = "precompiled_charsmap says that it holds .* bytes, and 1,024 are there" if refused else None
    with pytest.raises(CheckpointError, match=message) if refused else nullcontext():
        load_tokenizer(str(tmp_path))
