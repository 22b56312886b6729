"""`benchmarks/tune.py`: what it makes of cells, and a whole run on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402
import tune  # noqa: E402

from spectrum_peft.tuning.queue import Task  # noqa: E402

PART = tune.Part("smollm2", {}, ("a", "b"), 6, 2, 100, 4, (1.0, 1.0), (1e-3, 1e-2))


def cell(contestant: str, rate: float, seed: int, rows: list[float] | None) -> dict[str, Any]:
    scored = {"value": sum(rows) / len(rows), "rows": rows} if rows else None
    results = rows and {"scores": {"search": scored, "evaluation": scored}, "step_seconds": [1.0, 3.0]}
    return {
        "contestant": contestant, "rate": rate, "seed": seed, "steps": 6, "seconds": 9.0, "rise_bytes": 7, "results": results,
    }  # fmt: skip


def test_a_cell_of_the_grid_is_there_when_all_of_its_seeds_are_and_has_no_figure_when_one_failed() -> None:
    cells = [cell("a", 1e-3, seed, [1.0, 2.0, 3.0 + seed]) for seed in (0, 1, 2)]
    cells += [cell("b", 1e-2, 0, [1.0, 1.0, 1.0]), cell("b", 1e-2, 1, None), cell("b", 1e-2, 2, [1.0, 1.0, 1.0])]
    cells += [cell("b", 1e-3, 0, [1.0, 1.0, 1.0])]
    grid = [Task(c, r, 6, seed) for c in "ab" for r in (1e-3, 1e-2) for seed in (0, 1, 2)]
    found = tune.report(PART, grid, cells, {})
    assert found["cells"] == 7 and found["of"] == 12 and found["grid_steps"] == 72 and found["tunes"] == []
    assert [(r["contestant"], r["rate"], r["failed"]) for r in found["grid"]] == [("a", 1e-3, 0), ("b", 1e-2, 1)]
    assert found["grid"][0]["evaluation"] == pytest.approx((6 + 7 + 8) / 9) and found["grid"][1]["evaluation"] is None


def test_the_difference_is_paired_by_row_over_the_means_of_the_seeds() -> None:
    rows = [[0.1, 0.9, 0.2, 0.4], [0.3, 0.5, 0.2, 0.8], [0.2, 0.7, 0.2, 0.6]]
    runs = {("a", 1e-3, s): cell("a", 1e-3, s, rows[s]) for s in (0, 1, 2)}
    # The other is better by the same in each row of each seed: the interval has no width, however far rows lie apart.
    runs |= {("b", 1e-3, s): cell("b", 1e-3, s, [v - 0.25 for v in rows[s]]) for s in (0, 1, 2)}
    one, other = ({"contestant": name, "rate": 1e-3} for name in "ab")
    found = tune.difference(one, other, runs)
    assert found["mean"] == pytest.approx(0.25) and found["high"] - found["low"] < 1e-12 and found["n"] == 4
    assert tune.difference(one, one, runs)["mean"] == 0


@pytest.mark.slow
def test_a_whole_run_on_a_tiny_model_counts_its_steps_and_goes_on(tiny_llama_folder: Path, tmp_path: Path) -> None:
    for name, count in (("train", 64), ("validation", 20)):
        lines = [json.dumps({"prompt": f"{i} squared", "completion": f" is {i * i}"}) for i in range(count)]
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    command = [
        sys.executable, ROOT / "benchmarks" / "tune.py", "--parts", "gsm8k", "--steps", "6", "--judged", "16", "--races", "1",
        "--learning-rates", "1e-3", "1e-2", "--contestants", "real 0.25 random", "--model", tiny_llama_folder, "--data", tmp_path,
        "--work", tmp_path / "work", "-o", tmp_path / "tune.json",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=tmp_path)
    part = json.loads((tmp_path / "tune.json").read_text())["parts"]["gsm8k"]
    [one] = part["tunes"]
    assert len(part["grid"]) == 4 and part["grid_steps"] == 4 * 3 * 6
    # 4 timed; 4 runs to step 2 and those beyond the edge; at most all of them on to 6; the finals of two with three seeds.
    assert 4 + 4 * 2 + 2 * 4 + 36 <= one["steps"] <= 4 + 8 * 6 + 36
    best = min(row["search"] for row in part["grid"])
    assert part["best"]["search"] == best and one["search"] <= part["best_default"]["search"] + 1
    assert {m["contestant"] for m in part["memory"]} == {"lora r16", "real 0.25 random"}
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("whole/*.json")}
    subprocess.run(command, check=True, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("whole/*.json")} == cells
    again = json.loads((tmp_path / "tune.json").read_text())["parts"]["gsm8k"]
    assert again["tunes"] == part["tunes"]
    kept, tables.RESULTS = tables.RESULTS, tmp_path
    try:
        assert "| gsm8k | 1000 |" in tables.tuned() and "the whole tune, seed 1000" in tables.tune_estimates()
    finally:
        tables.RESULTS = kept
