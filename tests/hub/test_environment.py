"""The command as a user runs it: a process that is told of the hub by HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_hub import StandIn

from spectrum_peft import SnrReport, scan_weights

MODEL = "org/model"


def command(*words: str, hub: StandIn, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "SPECTRUM_PEFT_CACHE": str(home / "own")}
    return subprocess.run(
        [sys.executable, "-m", "spectrum_peft", *words],
        env={**os.environ, "HF_HUB_OFFLINE": "0", **where, **env},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_scan_by_the_environment_and_one_offline(hub: StandIn, tiny_llama_folder: Path, tmp_path: Path) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    scan = ("scan", MODEL, "-o", str(tmp_path / "report.json"))
    offline = command(*scan, hub=hub, home=tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE forbids to ask the hub" in offline.stderr
    assert len(hub.requests) == 0
    online = command(*scan, "--kinds", "q_proj", "--layers", "0-1", hub=hub, home=tmp_path)
    assert online.returncode == 0, online.stderr
    assert "none of it was stored" in online.stderr
    report = SnrReport.load(tmp_path / "report.json")
    assert report.revision == repo.branches["main"]
    assert report.scores == scan_weights(tiny_llama_folder, kinds="q_proj", layers="0-1").scores
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    asked = len(hub.requests)
    again = command(*scan, hub=hub, home=tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 2 and len(hub.requests) == asked
