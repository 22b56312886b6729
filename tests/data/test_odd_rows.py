"""Rows on which pyarrow ends the process, and chats of the wrong shape, are refused before anybody reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectrum_peft.data import read_dataset, select_columns
from spectrum_peft.errors import DataError


@pytest.mark.parametrize(("name", "text", "said"), [
    ("x.json", '[null, {"text": "x"}]', "row 1 is None, wanted a mapping"),
    ("x.json", '[{"text": "x"}, 5]', "row 2 is 5, wanted a mapping"),
    ("x.json", "null", "row 1 is None, wanted a mapping"),
    ("x.jsonl", '{"text": "x"}\nnull\n', "line 2 is 'null', wanted a mapping"),
    ("x.jsonl", '{"text": ' + "[" * 20_000 + "]" * 20_000 + "}\n", "line 1: is nested deeper than 64"),
    ("x.json", '{"text": ' * 20_000 + "1" + "}" * 20_000, "nested deeper than 64"),
])  # fmt: skip
def test_rows_that_end_the_process_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_dataset(str(tmp_path / name))


@pytest.mark.parametrize(("chat", "said"), [
    (["hello"], "row 2: .*'hello'.* has no role|holds"),
    ([{"role": "user"}], "row 2: .* has no content"),
    ([{"content": "x"}], "row 2: .* has no role"),
    ([], "row 2: has no message"),
])  # fmt: skip
def test_a_chat_of_another_shape_is_named_by_its_row(tmp_path: Path, chat: list[object], said: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}, {"messages": chat}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=said):
        select_columns(read_dataset(str(tmp_path / "x.jsonl")), "causal_lm", "x.jsonl")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_byte_order_mark_before_the_rows_is_read_over(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    lines = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (tmp_path / name).write_text(lines, encoding="utf-8-sig")
    assert list(read_dataset(str(tmp_path / name))) == rows
