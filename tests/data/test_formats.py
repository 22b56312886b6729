"""Files of other projects become standard rows; several datasets become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectrum_peft.data import Cut, Piece, count_rows, pieces_of, read_rows, sources_of
from spectrum_peft.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "id": "7"},
            {"messages": [USER, ASSISTANT]},
        ),
        (
            {
                "system": "be kind",
                "conversations": [{"role": "user", "content": "hi"}, {"from": "model", "value": "ho"}],
            },
            {"messages": [{"role": "system", "content": "be kind"}, USER, ASSISTANT]},
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "observation", "value": "4"}]},
            {"messages": [USER, {"role": "tool", "content": "4"}]},
        ),
        ({"instruction": "add", "input": "1 and 2", "output": "3"}, {"prompt": "add\n\n1 and 2", "completion": "3"}),
        ({"instruction": "add", "input": "", "output": "3"}, {"prompt": "add", "completion": "3"}),
        ({"instruction": "hi", "output": "ho"}, {"prompt": "hi", "completion": "ho"}),
        (
            {"instruction": "hi", "output": "ho", "system": "be kind"},
            {"messages": [{"role": "system", "content": "be kind"}, USER, ASSISTANT]},
        ),
    ],
)
def test_layouts_of_other_projects_become_standard_rows(tmp_path: Path, row: dict[str, Any], wanted: Any) -> None:
    for rows in (read_rows(write(tmp_path / "d.jsonl", [row]), "train", "causal_lm"),):
        assert rows.to_list() == [wanted]


def test_a_turn_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = {"conversations": [{"from": "human", "value": "hi"}]}
    path = write(tmp_path / "d.jsonl", [good, {"conversations": [{"from": "humann", "value": "hi"}]}])
    with pytest.raises(DataError, match=r"d.jsonl: row 2: a turn is from 'humann'\. Did you mean 'human'"):
        read_rows(path, "train", "causal_lm")


def test_a_text_file_has_a_row_for_each_paragraph(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("one\nand more\n\ntwo\n")
    assert [t.strip() for t in read_rows(str(tmp_path / "d.txt"), "train", "causal_lm")["text"]] == [
        "one\nand more",
        "two",
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.jsonl", [("a.jsonl", 1.0)]),
        ("org/name", [("org/name", 1.0)]),
        ("a.jsonl, b.csv=2,org/name=0.25", [("a.jsonl", 1.0), ("b.csv", 2.0), ("org/name", 0.25)]),
    ],
)
def test_a_mixture_is_names_with_weights(text: str, wanted: Any) -> None:
    assert sources_of(text) == wanted


@pytest.mark.parametrize("text", ["a.jsonl=0", "a.jsonl=-1", "a.jsonl=many", "a.jsonl,", "=2"])
def test_a_weight_that_is_none_is_named(text: str) -> None:
    with pytest.raises(DataError, match=r"wanted NAME or NAME=2\.5"):
        sources_of(text)


def test_a_name_with_a_comma_is_a_file_where_there_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a,b=2.jsonl", [{"text": "t"}])
    assert sources_of(path) == [(path, 1.0)]


def test_weights_say_how_often_each_row_is_taken(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "x"} for i in range(8)])
    b = write(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": f"b{i}"}, ASSISTANT]} for i in range(8)])
    rows = read_rows(f"{a}=2.5,{b}=0.5", "train", "causal_lm", seed=3)
    assert rows.column_names == ["messages"]
    said = [row[0]["content"] for row in rows["messages"]]
    from_a = [s for s in said if s.startswith("a")]
    assert {from_a.count(f"a{i}") for i in range(8)} == {2, 3}
    assert (len(from_a), len(said)) == (20, 24)
    assert len(set(said) - set(from_a)) == 4
    assert read_rows(f"{a}=2.5,{b}=0.5", "train", "causal_lm", seed=3).to_list() == rows.to_list()
    assert read_rows(f"{a}=2.5,{b}=0.5", "train", "causal_lm", seed=4).to_list() != rows.to_list()


def test_texts_and_conversations_are_not_mixed(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", [{"text": "t"}]), write(tmp_path / "b.jsonl", [{"messages": [USER, ASSISTANT]}])
    with pytest.raises(DataError, match=r"b.jsonl: has \['messages'\] and .*a.jsonl has \['text'\]"):
        read_rows(f"{a},{b}", "train", "causal_lm")


def test_rows_are_counted_within_the_limit() -> None:
    from datasets import Dataset

    labels = [[-100, -100, 5], [-100, 5], [-100, -100, -100], [5, 5, 5, 5]]
    rows = Dataset.from_dict({"input_ids": [[5] * len(row) for row in labels], "labels": labels})
    counts = count_rows(pieces_of(rows), Cut(2))
    assert (counts.read, counts.silent, counts.filled, counts.cut, counts.tokens, counts.learned) == (4, 1, 1, 1, 4, 3)
    assert counts.left == 2
    assert str(counts) == (
        "4 rows read, 1 dropped, in which no token carries loss, 1 dropped, whose prompt alone fills the 2 tokens of "
        "max_length, 1 cut at 2 tokens; 4 tokens, of which 3 carry loss"
    )
    ends = count_rows(pieces_of(rows), Cut(2, from_end=True))
    assert (ends.filled, ends.cut, ends.learned) == (0, 2, 4)
    assert count_rows(pieces_of(rows), Cut(None)).tokens == 9


def test_pairs_are_dropped_whole_and_texts_never() -> None:
    """As TRL's trainers and our encoders have it: a prompt that fills the limit, a piece above it, and neither."""
    pairs = [[Piece("a", [1] * n, [-100] * 2 + [1] * (n - 2)), Piece("b", [1] * 3, [-100] * 2 + [1])] for n in (3, 5)]
    assert count_rows(pairs, Cut(2)).filled == 2
    assert (count_rows(pairs, Cut(4)).cut, count_rows(pairs, Cut(4)).tokens) == (1, 3 + 3 + 4 + 3)
    long = count_rows(pairs, Cut(4, drops="long"))
    assert (long.long, long.left, long.tokens) == (1, 1, 6)
    assert "1 dropped, which are longer than the 4 tokens of max_length" in str(long)
    texts = count_rows([[Piece("", [1] * 5, None, "a")]], Cut(2, drops=None))
    assert (texts.left, texts.cut, texts.tokens, texts.learned) == (1, 1, 2, None)
    assert str(texts).endswith("; 2 tokens")


def test_turns_of_sharegpt_may_stand_in_any_column_of_messages(tmp_path: Path) -> None:
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    wanted = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    for column, renamed in (
        ("messages", {}),
        ("turns", {"messages": "turns"}),
        ("conversations", {"messages": "conversations"}),
    ):
        path = write(tmp_path / f"{column}.jsonl", [{column: chat, "system": "s"}])
        assert read_rows(path, "train", "causal_lm", renamed)["messages"][0] == wanted


@pytest.mark.parametrize(
    ("rows", "task", "said"),
    [
        ([{"text": "t", "labels": ["x"]}], "multi_label", r"Did you mean --label-column labels\?"),
        ([{"tokens": ["t"], "ner_tags": ["x"]}], "token_classification", r"Did you mean --tags-column ner_tags\?"),
        ([{"question": "q", "answer": "a"}], "causal_lm", "Did you mean --prompt-column question --completion-column answer"),
        ([{"prompt": "p", "completion": "c"}, {"text": "t"}], "causal_lm",
         r"column 'prompt' is empty in 1 of 2 rows: rows of two layouts are mixed, row 1 has \['completion', 'prompt'\] and "
         r"row 2 has \['text'\]"),
        ([{"prompt": "p", "completion": "c", "n": 1}, {"completion": "c", "n": 2}], "causal_lm", "in 1 of 2 rows, first in 2"),
        ([{"conversations": [{"from": "gpt", "value": ""}]}], "causal_lm", "column 'conversations' holds no text"),
        ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}], "causal_lm",
         "no answer in column 'messages' holds text"),
        ([{"instruction": "i", "output": " "}], "causal_lm", "column 'output' holds no text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_names_of_the_file(
    rows: list[dict[str, object]], task: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        read_rows(write(tmp_path / "a.jsonl", rows), "train", task)
