"""Damaged files: a reader returns or raises a `SpectrumError`, whatever it is fed. `make fuzz` goes on for longer."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))

from campaign import campaign, fault_of, one
from conftest import byte_tokenizer
from readers import READERS

from spectrum_peft.arguments import keys_of, set_defaults_from
from spectrum_peft.cli.train import VERB as TRAIN
from spectrum_peft.compare.matrix import contestants_of
from spectrum_peft.compare.reading import read_comparison
from spectrum_peft.compare.settings import KEYS
from spectrum_peft.data import render
from spectrum_peft.errors import CheckpointError, DataError, SpectrumError
from spectrum_peft.records import GradientReport, MemoryReport, Plan, SnrReport, read_mapping
from spectrum_peft.train.answers import pairs

# Seeds of inputs that were once a traceback, or ended the process.
KEPT: dict[str, tuple[int, ...]] = json.loads((Path(__file__).parent / "kept.json").read_text())
QUICK = [name for name, reader in READERS.items() if reader.cost < 0.05]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in {*QUICK, *KEPT}:
        folders[name] = tmp_path_factory.mktemp("sound")
        READERS[name].make(folders[name])
    return folders


@pytest.mark.parametrize("name", QUICK)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, sound: dict[str, Path]) -> None:
    faults = {seed: fault for seed in (*range(5), *KEPT.get(name, ())) if (fault := one(name, seed, sound[name])[1])}
    assert faults == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 9))
def test_many_damaged_files_are_read_or_refused(seed: int) -> None:
    """Ten minutes in all. Every reader, in processes of their own; the figures go to docs/reliability.md by `make fuzz`."""
    found = campaign(minutes=2.5, seed=seed)
    assert {name: row["faults"] for name, row in found["readers"].items() if row["faults"]} == {}
    assert sum(row["taken"] + row["refused"] for row in found["readers"].values()) > 1000


def test_the_campaign_sees_a_reader_that_fails(monkeypatch: pytest.MonkeyPatch, sound: dict[str, Path]) -> None:
    def careless(folder: Path) -> Any:
        return json.loads((folder / "report.json").read_text())["stats"][0]["name"].upper()

    monkeypatch.setitem(
        READERS, "report", READERS["report"].__class__("report", "report.json", READERS["report"].make, careless)
    )
    assert any(one("report", seed, sound["report"])[1] for seed in range(30))
    assert fault_of(SpectrumError("fine")) is None
    assert fault_of(KeyError("x")) is not None


# --- structures ------------------------------------------------------------------------------------------------------

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["inf", "-inf", "lora"])
)
_PARSER = TRAIN.parser()
_DATA = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_record_with_any_value_in_any_field_is_read_or_refused(data: st.DataObject, sound: dict[str, Path]) -> None:
    kind, name, file = data.draw(st.sampled_from([
        (SnrReport, "report", "report.json"), (GradientReport, "gradients", "gradients.json"), (Plan, "plan, JSON", "plan.json"),
        (MemoryReport, "memory report", "memory.json"),
    ]))  # fmt: skip
    fields = read_mapping(sound[name] / file)
    rows = [
        fields,
        *(row for value in fields.values() if isinstance(value, list) for row in value[:1] if isinstance(row, dict)),
    ]
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from(sorted(row)) | st.text(max_size=5))] = data.draw(_DATA)
    try:
        record = kind.from_dict(fields, "x")
    except SpectrumError as error:
        fault = fault_of(error)
    else:
        fault = _not_the_same(record)
    assert fault is None


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_config_with_any_value_at_any_key_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    kind = data.draw(st.sampled_from(["train", "compare"]))
    keys = sorted({*keys_of(_PARSER), *(KEYS if kind == "compare" else ())})
    config = {data.draw(st.sampled_from(keys) | st.text(max_size=5)): data.draw(_DATA) for _ in range(2)}
    try:
        if kind == "train":
            set_defaults_from(_PARSER, "x", config)
        else:
            asked, train = ({k: v for k, v in config.items() if (k in KEYS) == mine} for mine in (True, False))
            contestants_of(
                read_comparison(asked, train=train, arguments=(), task="causal_lm", output=tmp_path, source="x")
            )
    except SpectrumError as error:
        fault = fault_of(error)
    else:
        fault = None
    assert fault is None


def _not_the_same(record: Any) -> str | None:
    """What is wrong with a record that is saved and read again."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            again = type(record).load(record.save(Path(folder) / "again.json"))
        except CheckpointError as error:  # NaN in what is free, such as settings
            return None if "nan" in str(error) else str(error)
    return None if again == record else "another record came back"


# --- bombs, by hand --------------------------------------------------------------------------------------------------

_LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(("name", "text", "said"), [
    ("x.yaml", _LAUGHS, "more than 2,097,152 values"),
    ("x.yaml", "a: &a [*a]\n", "stands inside of what it names"),
    ("x.yaml", "a: " + "[" * 100_000, "nest(ed deeper|ing depth)"),
    ("x.yaml", "? " * 1000 + "a", "nested deeper than 64"),
    ("x.yaml", "a: !!int x\n", "not plain YAML"),
    ("x.yaml", "a: 0x_\n", "not plain YAML"),
    ("x.yaml", "[1, 2]: 3\n", "not plain YAML"),
    ("x.yaml", "1: 2\n", "the key 1, a int, wanted text"),
    ("x.yaml", "a: !!binary aGk=\n", "not plain YAML"),
    ("x.yaml", "a: " + "9" * 5000 + "\n", "not plain YAML"),
    ("x.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 64"),
    ("x.json", '{"a": ' + "9" * 5000 + "}", "more than 64 bits"),
    ("x.json", '{"a": 99999999999999999999999}', "more than 64 bits"),
    ("x.json", '{"a": "\\ud800"}', "half of a surrogate pair"),
    ("x.json", '{"a": [' + "0," * 9_000_000 + "0]}", "more than 8,388,608 values"),
])  # fmt: skip
def test_what_a_small_file_makes_large_is_refused_before_it_is_made(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_mapping(tmp_path / name)
    assert fault_of(caught.value) is None


@pytest.mark.parametrize("asked", ["{% for m in messages %}", "{% if add_generation_prompt %}"])
@pytest.mark.parametrize("task", ["causal_lm", "dpo"])
def test_a_template_that_writes_without_end_is_refused_before_anything_is_tokenized(asked: str, task: str) -> None:
    """tokenizers ends the process where its memory ends. `causal_lm` renders whole conversations, `dpo` prompts, too."""
    tokenizer = byte_tokenizer()
    end = "{% endif %}" if "if" in asked else "{% endfor %}"
    tokenizer.chat_template = f"{asked}{{{{ 'a' * 9000000 }}}}{end}"
    asking, saying = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    tokenized = {
        "causal_lm": lambda: render([asking], {}, tokenizer, tokenize=True, add_generation_prompt=True),
        "dpo": lambda: pairs({side: [asking, saying] for side in ("chosen", "rejected")}, tokenizer),
    }[task]
    with pytest.raises(DataError, match=r"the chat template makes \d+,000,000 characters of (one word|two words)"):
        tokenized()


def test_a_date_in_yaml_is_the_text_that_stands_there(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 2020-99-99\nb: 2020-01-01\n")
    assert read_mapping(tmp_path / "x.yaml") == {"a": "2020-99-99", "b": "2020-01-01"}


def test_an_error_quotes_little_and_shows_no_control_character() -> None:
    error = CheckpointError(f"{'x' * 10_000_000}\n\x1b[2J\u202e '{'y' * 5000}'")
    assert fault_of(error) is None
    assert len(str(error)) <= 1000
    assert os.linesep not in str(error)
