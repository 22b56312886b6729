"""What a reader can copy is run: the README's blocks, in order, on a tiny model in the hub id's place."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrum_peft.plan import MODES
from spectrum_peft.plan.options import CRITERIA

ROOT = Path(__file__).resolve().parents[2]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_DATASET = 'load_dataset("trl-lib/Capybara", split="train")'
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Shown for the reader's shell; they install or build, which the packaging tests and CI do.
NOT_OURS = ("pip ", "uv ", "make ", "git ")


def blocks(path: Path) -> list[tuple[str, str]]:
    return [(language, code) for language, code in BLOCK.findall(path.read_text(encoding="utf-8"))]


@pytest.fixture
def workplace(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with the datasets that the blocks name."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"{i} squared?"}, {"role": "assistant", "content": str(i * i)}]}
        for i in range(16)
    ]
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def at_home(code: str, model: Path) -> str:
    """The block with the hub's model and data replaced by local ones, and the device by what every machine has."""
    code = code.replace(HUB_DATASET, 'load_dataset("json", data_files="train.jsonl", split="train")')
    return code.replace(HUB_ID, str(model)).replace("report_to=[]", "report_to=[], use_cpu=True, bf16=False")


def test_there_are_blocks_to_run() -> None:
    languages = [language for language, _ in blocks(ROOT / "README.md")]
    assert languages.count("python") >= 1 and languages.count("bash") >= 6
    assert [language for language, _ in blocks(ROOT / "docs" / "python.md")].count("python") >= 5


# Pages whose Python needs nothing but the hub's model; the others go on from data or files of the reader's own.
WHOLE_PAGES = [
    "README.md",
    *(f"docs/{page}.md" for page in ("python", "full", "spectrum", "lora", "spectra_qlora", "alors")),
]


@pytest.mark.slow
@pytest.mark.parametrize("page", WHOLE_PAGES)
def test_the_python_blocks_of_a_page_run_in_order(workplace: Path, tiny_llama_folder: Path, page: str) -> None:
    namespace: dict[str, Any] = {}
    ran = 0
    for language, code in blocks(ROOT / page):
        if language == "python":
            exec(compile(at_home(code, tiny_llama_folder), f"{page} block {ran}", "exec"), namespace)
            ran += 1
    assert ran
    if page == "docs/python.md":
        assert (workplace / "spectrum_config.yaml").exists() and (workplace / "plan.yaml").exists()


def test_results_say_nothing_of_this_machines_folders() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        found = re.findall(r'"/[^"]+/[^"]+"', path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found[0]}"


def test_every_mode_has_a_page() -> None:
    for mode in MODES:
        assert (ROOT / "docs" / f"{mode}.md").read_text(encoding="utf-8").startswith(f"# {mode}"), mode
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in listed]
    assert not missing, f"{missing} stand in docs/ and not in the navigation of mkdocs.yml"


def test_the_files_that_the_site_names_are_in_the_repository() -> None:
    named = {
        name
        for place in ("mkdocs.yml", "docs/hooks.py")
        for name in re.findall(r"\bsite/[\w.]+\w", (ROOT / place).read_text(encoding="utf-8"))
    }
    # In a fresh clone what git ignores is missing.
    assert len(named) >= 2 and not [name for name in named if not (ROOT / "docs" / name).is_file()]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_begins_with_sentences(page: Path) -> None:
    """What it is for, before a table, a picture or a command."""
    title, first, *_ = page.read_text(encoding="utf-8").split("\n\n")
    assert title.startswith("# ") and re.match(r"[A-Z`*\"]\S* ", first) and not first.startswith("```"), first
    assert first.rstrip().endswith((".", ":", ")")) and len(first) > 60, first


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    import spectrum_peft

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    assert set(spectrum_peft.__all__) - {"SpectrumError", "__version__"} <= listed  # errors are listed by their module


def test_every_criterion_has_its_row() -> None:
    rows = (ROOT / "docs" / "criteria.md").read_text(encoding="utf-8").splitlines()
    named = {name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(CRITERIA)


@pytest.mark.slow
def test_the_command_lines_of_the_readme_run_in_order(
    workplace: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spectrum_peft.cli.main import main

    ran = []
    for language, code in blocks(ROOT / "README.md"):
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            line = line.split("#")[0].strip()
            if not line or line.startswith(NOT_OURS):
                continue
            words = shlex.split(at_home(line, tiny_llama_folder))
            assert words[0] == "spectrum-peft", f"a block runs {words[0]}, which this test does not know"
            assert main(words[1:]) == 0, line
            ran.append(words[1])
    assert {"scan", "plan", "memory", "train", "evaluate", "generate", "merge", "compare"} <= set(ran)


def test_the_readme_is_read_in_one_go() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    first = text[: text.index("## ")]
    assert "```bash" in first and "](docs/images/" in first  # one command, one picture, before the first heading
    linked = set(re.findall(r"\]\(docs/([\w]+\.md)", text))
    missing = {page.name for page in (ROOT / "docs").glob("*.md")} - linked - {"api.md"}
    assert not missing, f"no way leads from README.md to {missing}"


def test_every_measured_table_is_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
