"""SIGKILL at random moments: nothing half looks whole, and the next run goes on from there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parent / "kills.py"


@pytest.mark.multiprocess
def test_what_a_killed_command_leaves_is_whole_or_gone(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    done = subprocess.run(
        [sys.executable, str(KILLS), "--kills", "48", "--seed", "3", "--out", str(out)],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert out.is_file(), done.stderr
    verbs = json.loads(out.read_text())["verbs"]
    assert {name: row["said"] for name, row in verbs.items() if row["faults"]} == {}
    assert sum(row["kills"] for row in verbs.values()) >= 45
