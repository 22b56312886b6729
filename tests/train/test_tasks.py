"""Tasks: which columns they read, how labels become ids, and metrics that are what their definition says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectrum_peft.data import IGNORED, label_names, read_dataset, select_columns
from spectrum_peft.errors import DataError, InstallError, OptionError
from spectrum_peft.train.encoding import DataChoices
from spectrum_peft.train.heads import labels_of
from spectrum_peft.train.judge import classification_scores, require_scikit_learn
from spectrum_peft.train.tasks import TASKS, loaded_as, task_of


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dataset(rows: dict[str, list[Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(rows)


# --- which task ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "is_encoder_decoder", "task"),
    [
        ("LlamaForCausalLM", False, "causal_lm"),
        ("GPT2LMHeadModel", False, "causal_lm"),
        ("T5ForConditionalGeneration", True, "seq2seq"),
        ("T5WithLMHeadModel", True, "seq2seq"),
        ("BertForSequenceClassification", False, "classification"),
        ("BartForSequenceClassification", True, "classification"),
    ],
)
def test_the_architecture_says_the_task(architecture: str, is_encoder_decoder: bool, task: str) -> None:
    assert task_of({"architectures": [architecture], "is_encoder_decoder": is_encoder_decoder}, "folder") == task


@pytest.mark.parametrize("architecture", ["BertModel", "LlavaForConditionalGeneration"])
def test_an_architecture_without_a_task_asks_for_one(architecture: str) -> None:
    with pytest.raises(OptionError, match=rf"folder: architectures \['{architecture}'\] .* pass --task"):
        task_of({"architectures": [architecture]}, "folder")


# --- reading ---------------------------------------------------------------------------------------------------------


# datasets before 5.2 leaves a CSV file open where reading it fails
LEFT_OPEN = pytest.mark.filterwarnings(
    "ignore:Exception ignored in[\\s\\S]*csv:pytest.PytestUnraisableExceptionWarning"
)


@LEFT_OPEN
def test_jsonl_csv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": "a"}, {"text": "two, with a comma", "label": "b"}]
    jsonl = read_dataset(write_rows(tmp_path / "d.jsonl", rows))
    (tmp_path / "d.csv").write_text('text,label\none,a\n"two, with a comma",b\n')
    jsonl.to_parquet(tmp_path / "d.parquet")
    assert jsonl.to_list() == rows
    assert read_dataset(str(tmp_path / "d.csv")).to_list() == rows
    assert read_dataset(str(tmp_path / "d.parquet")).to_list() == rows


@LEFT_OPEN
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "gone.jsonl: no such file"),
        ("empty.jsonl", "", "empty.jsonl: the file is empty"),
        ("blank.jsonl", " \n\n", "blank.jsonl: the file holds nothing but blank lines"),
        ("blank.csv", "\n", "blank.csv: the file holds nothing but blank lines"),
        (
            "broken.jsonl",
            '{"text": "a"}\n{"text": ',
            "broken.jsonl: line 2 is not JSON: Expecting value at character 9",
        ),
        ("first.jsonl", '{"text": "a"\n{"text": "b"}\n', "first.jsonl: line 1 is not JSON: Expecting ',' delimiter"),
        (
            "kinds.jsonl",
            '{"a": 1, "text": "a"}\n\n{"text": 5}\n',
            "kinds.jsonl: line 3: text is 5, wanted text as in line 1",
        ),
        ("notes.md", "hello", r"notes.md: a dataset file ends in one of .*'\.jsonl'"),
        ("rows.csv", "text\n", "rows.csv: not readable as a dataset .*no data"),
    ],
)
def test_a_file_that_is_no_dataset_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_dataset(str(tmp_path / name))


def test_a_folder_is_read_by_split_and_one_without_rows_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_rows(tmp_path / "validation.jsonl", [{"text": "c"}])
    assert read_dataset(str(tmp_path), "validation")["text"][:] == ["c"]
    with pytest.raises(DataError, match="corresponds to no data"):
        read_dataset(str(tmp_path), "train[:0]")


# --- columns ---------------------------------------------------------------------------------------------------------

_CHAT = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]


def test_language_modelling_prefers_messages_then_prompts_then_text() -> None:
    everything = {"text": ["t"], "completion": ["c"], "messages": _CHAT, "prompt": ["p"], "id": [1]}
    assert select_columns(dataset(everything), "causal_lm", "d").column_names == ["messages"]
    del everything["messages"]
    assert select_columns(dataset(everything), "causal_lm", "d").column_names == ["prompt", "completion"]
    del everything["prompt"]
    assert select_columns(dataset(everything), "causal_lm", "d").column_names == ["text"]


def test_a_renamed_column_decides_the_format() -> None:
    rows = dataset({"body": ["t"], "messages": _CHAT})
    chosen = select_columns(rows, "causal_lm", "d", {"text": "body"})
    assert chosen.to_list() == [{"text": "t"}]


def test_a_renamed_column_may_swap_names_with_another() -> None:
    rows = dataset({"completion": ["question"], "prompt": ["answer"]})
    chosen = select_columns(rows, "seq2seq", "d", {"prompt": "completion", "completion": "prompt"})
    assert chosen.to_list() == [{"prompt": "question", "completion": "answer"}]


@pytest.mark.parametrize(
    ("columns", "task", "renamed", "message"),
    [
        ({"body": ["t"]}, "causal_lm", {}, r"d: no usable column for task 'causal_lm': it has \['body'\]"),
        ({"text": ["t"]}, "classification", {}, r"no usable column .* wanted text/label"),
        ({"text": ["t"]}, "causal_lm", {"text": "texts"}, r"no column 'texts' \(--text-column\). Did you mean 'text'"),
        ({"text": ["t", None]}, "causal_lm", {}, "column 'text' is empty in 1 of 2 rows, first in 2"),
        ({"text": ["", " \n"]}, "causal_lm", {}, "column 'text' holds no text in any of 2 rows"),
        ({"text": [""], "label": [1]}, "classification", {}, "column 'text' holds no text in any of 1 rows"),
        ({"prompt": ["p"], "completion": [" "]}, "seq2seq", {}, "column 'completion' holds no text in any of 1 rows"),
        ({"messages": [[{"role": "user", "content": ""}]]}, "causal_lm", {}, "column 'messages' holds no text"),
        ({"text": [3]}, "causal_lm", {}, r"column 'text' holds .*int64.*, wanted strings"),
        (
            {"text": ["t"], "label": [0.5]},
            "classification",
            {},
            r"column 'label' holds .*float64.* \(--task regression",
        ),
    ],
)
def test_a_column_that_cannot_be_used_is_named(
    columns: dict[str, Any], task: str, renamed: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        select_columns(dataset(columns), task, "d", renamed)


def test_some_texts_may_be_empty_and_prompts_all_of_them() -> None:
    assert len(select_columns(dataset({"text": ["", "t"]}), "causal_lm", "d")) == 2
    assert len(select_columns(dataset({"prompt": [""], "completion": ["c"]}), "causal_lm", "d")) == 1


# --- labels ----------------------------------------------------------------------------------------------------------


def _encoder_config(names: list[str]) -> Any:
    from transformers import BertConfig

    return BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def test_string_labels_are_sorted_and_integers_go_by_value() -> None:
    assert label_names(dataset({"label": ["b", "a", "b"]}), None, "d") == ["a", "b"]
    assert label_names(dataset({"label": [10, 9, 2]}), None, "d") == ["2", "9", "10"]


def test_a_class_label_column_keeps_its_order() -> None:
    from datasets import ClassLabel

    rows = dataset({"label": [1, 0]}).cast_column("label", ClassLabel(names=["z", "a"]))
    assert label_names(rows, None, "d") == ["z", "a"]


def test_a_trained_head_keeps_its_labels_in_their_order() -> None:
    head = _encoder_config(["z", "b", "a"])
    assert label_names(dataset({"label": ["a", "b"]}), head, "d") == ["z", "b", "a"]
    assert label_names(dataset({"label": [0, 2]}), head, "d") == ["z", "b", "a"]  # ids


@pytest.mark.parametrize(
    ("labels", "known", "message"),
    [
        (["a", "c"], ["a", "b"], "d: label 'c' is not one of the 2"),
        ([0, 2], ["a", "b"], "label '0' is not one of the 2"),
        (["a", "b", "c"], ["LABEL_0", "LABEL_1"], "3 labels, but the checkpoint's head has 2 outputs"),
        (["a", "a"], None, r"holds only \['a'\]"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels: list[Any], known: list[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_names(dataset({"label": labels}), None if known is None else _encoder_config(known), "d")


def test_labels_become_the_ids_of_the_models_names(tiny_tokenizer: Any) -> None:
    from transformers import BertConfig

    rows = dataset({"text": ["x", "y", "z"], "label": ["a", "z", "a"]})
    names = labels_of(BertConfig(id2label={0: "z", 1: "a"}))
    encoded = TASKS["classification"].encode(rows, tiny_tokenizer, 8, names, DataChoices())
    assert encoded["labels"][:] == [1, 0, 1]
    unknown = dataset({"text": ["x"], "label": ["q"]})
    with pytest.raises(DataError, match="label 'q' is none of the 2"):
        TASKS["classification"].encode(unknown, tiny_tokenizer, 8, names, DataChoices())


# --- metrics ---------------------------------------------------------------------------------------------------------


class _FixedLogits(nn.Module):
    """Says the logits that it was given, batch after batch."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        super().__init__()
        self.batches = iter(batches)
        self.device = torch.device("cpu")

    def forward(self, **_: Any) -> Any:
        return type("Output", (), {"logits": next(self.batches)})


@pytest.mark.parametrize(("task", "shift"), [("causal_lm", 1), ("seq2seq", 0)])
def test_every_token_weighs_the_same_whatever_batch_it_is_in(task: str, shift: int, seeded: torch.Generator) -> None:
    """Against the definition, token by token in a loop: a mean of batch means would differ here."""
    batches, logits = [], []
    for rows, length in ((1, 9), (3, 4)):
        labels = torch.randint(0, 7, (rows, length), generator=seeded)
        labels[0, :2] = IGNORED
        batches.append({"input_ids": labels.clamp(min=0), "labels": labels})
        logits.append(torch.randn(rows, length, 7, generator=seeded))
    total, correct, tokens = 0.0, 0, 0
    for batch, said in zip(batches, logits, strict=True):
        for row in range(batch["labels"].shape[0]):
            for position in range(batch["labels"].shape[1] - shift):
                target = int(batch["labels"][row, position + shift])
                if target == IGNORED:
                    continue
                values = said[row, position].double()
                total += math.log(values.exp().sum()) - values[target].item()
                correct += int(values.argmax()) == target
                tokens += 1
    found = TASKS[task].judge(_FixedLogits(logits), batches)
    assert found["tokens"] == tokens
    # Losses of tokens in float32: 6e-8 each, and some more for their logarithms; the perplexity has its absolute error.
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-6)
    assert found["token_accuracy"] == correct / tokens


def test_nothing_to_predict_is_an_error() -> None:
    labels = torch.full((1, 3), IGNORED)
    with pytest.raises(DataError, match="no token to predict"):
        TASKS["causal_lm"].judge(_FixedLogits([torch.zeros(1, 3, 5)]), [{"input_ids": labels, "labels": labels}])


def test_macro_f1_is_the_mean_over_classes() -> None:
    """Counted by hand: class 0 has F1 2/3, class 1 has 1/2, class 2 has 0; accuracy 3 of 6."""
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]
    scores = classification_scores(predictions, labels)
    assert scores["accuracy"] == pytest.approx(3 / 6)
    f1 = [2 * 2 / (3 + 3), 2 * 1 / (2 + 3), 0.0]
    assert scores["macro_f1"] == pytest.approx(sum(f1) / 3)


def test_a_missing_scikit_learn_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InstallError, match=r"pip install 'spectrum-peft\[eval\]'"):
        require_scikit_learn()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_bytes_that_are_no_text_are_refused_by_their_place(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b'{"text": "' + b"a" * 2**20 + b'\x98"}\n')
    with pytest.raises(DataError, match=r"byte 1,048,586 is not UTF-8 \(invalid start byte\)"):
        read_dataset(str(path))


@pytest.mark.parametrize(
    ("kind", "loads"), [("Qwen3VLConfig", "own"), ("Gemma3Config", "auto"), ("LlavaConfig", "own")]
)
def test_a_decoder_that_sees_is_trained_on_text_as_its_own_class_or_its_auto_class(kind: str, loads: str) -> None:
    import transformers

    config = getattr(transformers, kind)()
    config.architectures = [kind.replace("Config", "ForConditionalGeneration")]
    assert task_of(config, "folder") == "causal_lm"
    wanted = {"own": config.architectures[0], "auto": "AutoModelForCausalLM"}[loads]
    assert loaded_as(TASKS["causal_lm"], config).auto_class == wanted
    assert loaded_as(TASKS["seq2seq"], config) is TASKS["seq2seq"]
