"""Nothing that a terminal obeys reaches it, whichever verb prints it and by whichever way."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrum_peft.cli import main as command
from spectrum_peft.cli.terminal import Escaping, escaped
from spectrum_peft.errors import OptionError

HOSTILE = "n\x1b[2J\x07\r\x9b0m\u202e\x00\ud800 name"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
SEEN = r"n\x1b[2J\x07"


@pytest.mark.parametrize("way", ["out", "pieces", "err", "log", "error", "library"])
@pytest.mark.parametrize("verb", list(command.VERBS))
def test_whatever_a_verb_prints_is_shown_and_not_obeyed(
    verb: str, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*_: Any) -> None:
        if way == "out":
            print(HOSTILE)
        elif way == "pieces":  # as text is written by a model
            for character in HOSTILE:
                print(character, end="", flush=True)
        elif way == "err":
            sys.stderr.writelines([HOSTILE, "\n"])
        elif way == "log":
            logger = logging.getLogger("hostile")
            logger.handlers, logger.propagate = [logging.StreamHandler(sys.stderr)], False
            logger.warning(HOSTILE)
        else:
            raise OptionError(HOSTILE)

    if way == "library":
        monkeypatch.setattr(command, "_what_a_library_said", lambda error: HOSTILE)
        monkeypatch.setattr(command, "SpectrumError", KeyError)
    monkeypatch.setitem(command.VERBS, verb, dataclasses.replace(command.VERBS[verb], action=says))
    command.main([verb])
    said = capsys.readouterr()
    # Progress bars go back in their line, on standard error only.
    assert OBEYED.findall(said.out) == OBEYED.findall(said.err.replace("\r", "")) == []
    assert SEEN in said.out + said.err


def test_text_that_is_only_hard_to_see_stays() -> None:
    text = "می\u200cخواهم 👩\u200d👩\u200d👧 a\u00a0b\u00adc\tد\n"
    assert escaped(text) == text
    assert escaped("a\r\nb\n") == "a\nb\n"
    assert escaped("a\rb\u2028\u200e") == r"a\rb\u2028\u200e"


def test_progress_bars_pass_on_standard_error_only_and_colours_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = "\r 50%\x1b[A\x1b[1;31mred\x1b[0m"

    def says(*_: Any) -> None:
        print(bar, end="")
        print(bar + "\x1b[999A\x1b]0;title\x07", end="", file=sys.stderr)

    monkeypatch.setitem(command.VERBS, "scan", dataclasses.replace(command.VERBS["scan"], action=says))
    assert command.main(["scan"]) == 0
    said = capsys.readouterr()
    assert said.out == bar.replace("\r", r"\r").replace("\x1b", r"\x1b")
    assert said.err == "\r 50%\x1b[Ared" + r"\x1b[999A\x1b]0;title\x07"


def test_the_lines_about_a_foreign_config_hold_nothing_that_a_terminal_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text('base_model: x\nadapter: lora\n"\\e[1mq\\e[A": 2\nmicro_batch_size: 1\n')
    assert command.main(["train", "--from-axolotl", str(tmp_path / "a.yaml")]) == 0
    said = capsys.readouterr()
    assert r"not understood: \x1b[1mq\x1b[A: 2" in said.err and "\x1b" not in said.out + said.err


def test_log_lines_hold_nothing_that_a_terminal_obeys() -> None:
    record = logging.LogRecord("spectrum_peft", logging.INFO, "", 0, "%s\nb", ("a\r\x1b[A",), None)
    assert Escaping().format(record) == "a\\r\\x1b[A\nb"
