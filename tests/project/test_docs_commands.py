"""Every command and every flag that a page names is one that the real command takes."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from spectrum_peft.arguments import Rest, flags_of
from spectrum_peft.cli.main import VERBS
from spectrum_peft.cli.options import given_plan_options
from spectrum_peft.cli.train import _plan_options
from spectrum_peft.errors import OptionError
from spectrum_peft.plan import check_options

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = [page.relative_to(ROOT).as_posix() for page in PAGES]
BASH = re.compile(r"^ *```bash\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(spectrum-peft [a-z]+ [^`]*)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Flags of other programs, and the program.
OTHERS = {
    "--quality": "benchmarks/columns.py",
    "--quick": "benchmarks/quality.py",
    "--pages": "benchmarks/quality.py",
    "--predict": "benchmarks/gpu.py",
    "--enable-lora": "vLLM",
    "--max-lora-rank": "vLLM",
    "--lora-modules": "vLLM",
    "--lora": "llama.cpp",
    "--nproc_per_node": "torchrun",
}


def commands(text: str) -> Iterator[str]:
    """The command lines of the page's blocks for a shell, and those in its sentences that have a flag with a value."""
    for block in BASH.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            start = line.find("spectrum-peft ")
            if start >= 0 and "pip install" not in line:
                yield line[start:]
    for span in SPAN.findall(text):
        words = span.split()
        if " -" in span and "..." not in span and "|" not in span and not words[-1].startswith("-"):
            yield " ".join(words)


@cache
def trainer_flags() -> frozenset[str]:
    from spectrum_peft.train.arguments import _trainer_parser
    from spectrum_peft.train.tasks import TASKS

    return frozenset(flag for task in TASKS for flag in flags_of(_trainer_parser(task)))


def unknown(line: str) -> list[str]:
    """Words of a line that the real command would refuse, as far as its parsers go; a config file that is here is read.

    Raises:
        OptionError: the line asks for options of a plan that do not go together, or for some of another mode than its own.
    """
    verb, *words = shlex.split(line, comments=True)[1:]
    assert verb in VERBS, f"{verb} is no command"
    whole = True
    for i, word in enumerate(words):
        if word == "--config" and not (ROOT / words[i + 1]).exists():  # of the reader's own
            del words[i : i + 2]
            whole = False
            break
    got: list[tuple[argparse.Namespace, Rest]] = []
    dataclasses.replace(VERBS[verb], action=lambda *given: got.append(given)).run(words)
    options, rest = got[0][0], list(got[0][1].argv)
    if verb == "train" and whole:
        check_options(**_plan_options(options))
    elif verb == "plan":
        check_options(**given_plan_options(options))
    if verb in ("compare", "tune"):  # what it does not know itself is for `train`
        rest = VERBS["train"].parser().parse_known_args(rest)[1]
    if rest and not rest[0].startswith("--"):
        return rest
    return [word for word in rest if word.startswith("--") and word.partition("=")[0] not in trainer_flags()]


@pytest.mark.parametrize("page", NAMED)
def test_the_command_takes_every_line_of_a_page(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands((ROOT / page).read_text(encoding="utf-8")):
        assert not unknown(line), line


@pytest.mark.parametrize("page", NAMED)
def test_every_flag_that_a_page_names_exists(page: str) -> None:
    ours = {flag for verb in VERBS.values() for flag in flags_of(verb.parser())} | {"--help", "--debug", *OTHERS}
    named = set(FLAG.findall((ROOT / page).read_text(encoding="utf-8")))
    assert not {flag for flag in named - ours if flag not in trainer_flags()}


@pytest.mark.parametrize(
    "line",
    [
        "spectrum-peft scan MODEL --ouput report.json",
        "spectrum-peft train --model M --dataset D --output-dir O --epochs 3",
        "spectrum-peft compare --model M -o comparison --max-stepps 2",
        "spectrum-peft train MODEL --dataset D",
        "spectrum-peft train --model M --dataset D --output-dir O --criterion random",
        "spectrum-peft plan report.json --mode lora --n-groups 3",
    ],
)
def test_a_line_with_a_mistake_is_found(line: str) -> None:
    try:
        assert unknown(line)
    except OptionError:
        pass
