"""`benchmarks/race.py`: the grid around a raced rate ends inside, and what is finished is not run again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import race  # noqa: E402
import tables  # noqa: E402

import spectrum_peft.cli.main  # noqa: E402


@pytest.mark.parametrize("planted", [1e-3, 1e-1, 1e-6])
def test_the_grid_goes_on_until_the_best_lies_inside(
    planted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def run(suite: str, flags: Sequence[str], rate: str, seed: int, work: Path) -> dict[str, Any]:
        tried.append(rate)
        found = 1e-3 if rate == "auto" else float(rate)
        return {
            "learning_rate": found, "after": {"loss": math.log(found / planted) ** 2}, "before": {"loss": 9.0}, "steps": 200,
            "learning_rate_race": [{"rate": 2e-4, "steps": 8}, {"rate": 1e-3, "steps": 8}],
        }  # fmt: skip

    monkeypatch.setattr(race, "run", run)
    found = race.contest("banking77", "lora", 0, tmp_path)
    rates = [rate for rate, _ in found["grid"]]
    assert min(rates) < found["best_rate"] < max(rates)
    assert abs(math.log(found["best_rate"] / planted)) <= math.log(race.FACTOR) / 2 + 0.02  # the rates are rounded
    assert len(tried) == len(set(tried)) and found["default_rate"] == 2e-4 and found["race_steps"] == 16
    (tmp_path / "race.json").write_text(
        json.dumps({"runs": [found], "written": "2026-01-01", "machine": {"cpu": "x", "cores": 1}})
    )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert f"{found['raced_loss'] - found['best_loss']:+.4f}" in tables.raced()


def test_a_finished_run_is_read_and_one_that_was_ended_is_run_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def main(argv: list[str]) -> int:
        asked.append(argv)
        output = Path(argv[argv.index("--output-dir") + 1])
        output.mkdir(exist_ok=True)
        (output / "train_results.json").write_text('{"steps": 400}')
        return 0

    for name in ("DATA", "ground"):
        (tmp_path / name / "banking77").mkdir(parents=True)
    (tmp_path / "DATA" / "banking77" / "validation.jsonl").write_text('{"text": "a", "label": "b"}\n')
    monkeypatch.setattr(race, "DATA", tmp_path / "DATA")
    monkeypatch.setattr(race, "folder_of", lambda model: tmp_path / model)
    monkeypatch.setattr(spectrum_peft.cli.main, "main", main)
    for _ in range(2):
        assert race.run("banking77", ["--mode", "lora"], "0.001", 0, tmp_path) == {"steps": 400}
    assert len(asked) == 1 and "--overwrite-output-dir" in asked[0]
