"""What `doctor` says was tried: it is held to what the machine does, and to the page."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from spectrum_peft import doctor
from spectrum_peft.cli.main import main
from spectrum_peft.weights import quantized_product_works

ROOT = Path(__file__).resolve().parents[1]


def test_the_tested_versions_are_those_of_the_readme_and_of_setup_cfg() -> None:
    for page in ("README.md", "setup.cfg"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for package, tested in doctor.TESTED.items():
            found = re.search(rf"\b{package} (\d[\d.]*\d)", text)
            assert found is not None and tested.startswith(found[1]), f"{page}: {package} {tested}"


def test_every_line_says_what_this_machine_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--offline", "--json"]) == 0
    found = {row["what"].strip(): row for row in json.loads(capsys.readouterr().out)}
    assert found["torch"]["seen"].startswith(version("torch"))
    assert "float32" in found["device cpu"]["seen"] or "bfloat16" in found["device cpu"]["seen"]
    assert found["float64 products"]["seen"] == "works"
    assert found["nf4 products"]["seen"] == "works" and found["int8 products"]["seen"] == "works"
    assert found["hub"]["seen"].endswith("not asked: offline")
    assert not [row for row in found.values() if row["verdict"] == "bad"]


def test_a_version_outside_the_stated_range_and_one_that_is_missing_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: {"peft": "0.1", "trl": None}.get(name, real(name)))
    found = {finding.what: finding for finding in doctor._versions()}
    assert found["peft"].verdict == "bad" and found["peft"].seen.startswith("0.1, wanted ")
    assert found["trl"] == ("trl", "not installed", "bad")
    assert "X peft" in doctor.describe(list(found.values()))


def test_a_hub_that_cannot_be_reached_is_a_note_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    *_, last = doctor._hub(offline=False)
    assert last.what == "hub http://127.0.0.1:9" and last.verdict == "note" and "\n" not in last.seen


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_product_that_is_wrong_is_said_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes as bnb

    cpu = torch.device("cpu")
    assert quantized_product_works(kind, cpu) is None
    layer = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    right = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x: -right(self, x))
    assert (quantized_product_works(kind, cpu) or "").startswith("off by ")


def test_what_is_kept_is_shown_and_cleared_by_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(tmp_path / "cache"))
    assert main(["cache"]) == 0 and "nothing is kept" in capsys.readouterr().out
    for kind in ("reports", "svd"):
        (tmp_path / "cache" / kind).mkdir(parents=True)
        (tmp_path / "cache" / kind / "file").write_bytes(b"x" * 2**20)
    assert main(["cache", "--clear", "report"]) == 2
    assert "Did you mean 'reports'?" in capsys.readouterr().err
    assert main(["cache", "--clear", "svd"]) == 0
    assert re.search(r"svd +1\.0 MiB +removed", capsys.readouterr().out)
    assert (tmp_path / "cache" / "reports" / "file").exists() and not (tmp_path / "cache" / "svd").exists()
    assert main(["cache", "--clear"]) == 0 and list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_every_verb_and_its_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("scan", "train", "doctor", "backward-depth", "criterion"):
        assert word in script, word
    assert main(["completion", "dash"]) == 2
