"""From a file of conversations to a trained model, as a user starts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spectrum_peft.cli.main import main
from spectrum_peft.train import run as training

FLAGS = "--max-steps 2 --per-device-train-batch-size 2 --save-strategy no --dtype float32 --report-to none --mode lora"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chats = [
        [{"from": "human", "value": f"what is after {i}?"}, {"from": "gpt", "value": f"{i + 1}"}] for i in range(6)
    ]
    Path("chat.jsonl").write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    pairs = [{"instruction": "Say it.", "input": str(i), "output": f"it is {i}"} for i in range(4)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture
def train(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    def command(flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(f"train --model {tiny_llama_folder} {FLAGS} {flags}".split())
        return (code, *capsys.readouterr())

    return command


def test_sharegpt_and_alpaca_train_together_and_the_rows_are_counted(
    train: Callable[[str], tuple[int, str, str]],
) -> None:
    code, out, err = train("--dataset chat.jsonl,pairs.jsonl=0.5 --eval-dataset chat.jsonl --output-dir out")
    assert code == 0, err
    assert "training: 8 rows read; " in out
    assert "evaluation: 6 rows read; " in out
    results = json.loads(Path("out/train_results.json").read_text())
    # the answer, one digit, and </s>, of each of six rows; the loss is of the token after, so each has its prediction
    assert results["after"]["tokens"] == 6 * 2


def test_what_carries_loss_is_the_users_choice(train: Callable[[str], tuple[int, str, str]]) -> None:
    tokens = {}
    for loss_on in ("all", "assistant", "completion"):
        code, out, err = train(f"--dataset chat.jsonl --show-rows 1 --loss-on {loss_on} --output-dir out")
        assert code == 0, err
        tokens[loss_on] = [line for line in out.splitlines() if line.startswith("  *")]
    assert [line.split()[-1] for line in tokens["assistant"]] == ["'1'", "'</s>'"]
    assert tokens["completion"] == tokens["assistant"]
    assert len(tokens["all"]) > 20
    assert not Path("out").exists()
    assert (
        train("--dataset chat.jsonl --loss-on answers --output-dir out")[2]
        .splitlines()[-1]
        .endswith("--loss-on is 'answers'. Known: 'all', 'assistant', 'completion'.")
    )


def test_trls_flag_works_without_marks_in_the_template(train: Callable[[str], tuple[int, str, str]]) -> None:
    code, out, err = train("--dataset chat.jsonl --assistant-only-loss --output-dir out")
    assert code == 0, err
    assert "of which 12 carry loss" in out


def test_rows_that_do_not_fit_are_told(train: Callable[[str], tuple[int, str, str]]) -> None:
    Path("mixed.jsonl").write_text(
        "".join(json.dumps({"prompt": "p" * n, "completion": "c"}) + "\n" for n in (1, 2, 90, 90, 90))
    )
    code, out, err = train("--dataset mixed.jsonl --max-length 32 --output-dir out")
    assert code == 0, err
    assert "training: 5 rows read, 3 dropped, whose prompt alone fills the 32 tokens of max_length; " in out


def test_a_conversation_that_cannot_be_shown_is_said_before_the_model_is_loaded(
    train: Callable[[str], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(training, "load_run", loaded)
    Path("refusing.jinja").write_text("{{ raise_exception('no turns today') }}")
    code, _, err = train("--dataset chat.jsonl --chat-template-path refusing.jinja --output-dir out")
    assert code == 2
    assert "chat.jsonl: row 1: the chat template refuses a conversation (no turns today)" in err.splitlines()[-1]
    Path("texts.jsonl").write_text('{"text": "t"}\n')
    code, _, err = train("--dataset texts.jsonl --loss-on assistant --output-dir out")
    assert code == 2
    assert "texts.jsonl holds text, which has no turns" in err


def test_an_answer_that_says_nothing_is_told(train: Callable[[str], tuple[int, str, str]]) -> None:
    answers = ["a", " ", "b", ""]
    chats = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}] for answer in answers]
    Path("empty.jsonl").write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    code, out, err = train("--dataset empty.jsonl --show-rows 1 --output-dir out")
    assert code == 0, err
    assert "training: 2 rows have an empty answer, the first is row 2\n" in out
    assert "empty answer" not in train("--dataset chat.jsonl --show-rows 1 --output-dir out")[1]
    out = train("--dataset empty.jsonl,chat.jsonl --show-rows 1 --output-dir out")[1]
    assert "2 rows have an empty answer" in out and " of the mixed rows\n" in out
