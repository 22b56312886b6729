"""What `make gpu` is made of: chunks that go on, tables that say what was not measured, wheels that travel in pieces."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from running import LIBRARIES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import pieces  # noqa: E402
import tables  # noqa: E402

pytestmark = LIBRARIES


def test_wheels_in_pieces_and_back(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "large.whl").write_bytes(content)
    (tmp_path / "small.whl").write_bytes(b"small")
    assert pieces.split(tmp_path, most=1000) == [tmp_path / "large.whl"]
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    assert not (tmp_path / "large.whl").exists()
    damaged = tmp_path / "large.whl.piece-003"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    with pytest.raises(SystemExit, match="one is missing or damaged"):
        pieces.join(tmp_path)
    damaged.write_bytes(whole)
    assert pieces.join(tmp_path) == [tmp_path / "large.whl"]
    assert (tmp_path / "large.whl").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.whl", "small.whl"]


def test_a_chunk_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    asked: list[list[str]] = []

    def served(name: str, cells: list[str], end: float) -> Any:
        asked.append(cells)
        for cell in cells:
            stopped = cell == "b" and len(asked) == 1
            yield cell, {"stopped": "the chunk's time was over"} if stopped else {"figure": cell}
            if stopped:
                time.sleep(max(0.0, end - time.monotonic()))
                return

    monkeypatch.setattr(gpu, "_served", served)
    chunk = gpu.Chunk(lambda: ["a", "b", "c"], lambda cell: {})
    assert not gpu.run_chunk("chunk", chunk, limit=0.2)
    assert set(gpu.kept("chunk")) == {"a"}
    assert gpu.run_chunk("chunk", chunk, limit=60)
    assert asked == [["a", "b", "c"], ["b", "c"]]
    assert json.loads((tmp_path / "chunk.json").read_text())["cells"]["c"] == {"figure": "c"}


def test_what_was_only_rehearsed_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step and a scan here, in a rehearsal; the tables read them when they are said to be of a card."""
    monkeypatch.setattr(gpu, "REHEARSAL", True)
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(tables, "GPU", tmp_path)
    for name, value in (("BATCH", 1), ("LENGTH", 16), ("STEPS", 1)):
        monkeypatch.setattr(gpu, name, value)
    step = gpu.step_cell("1b", "bf16", True, "lora")
    step |= gpu.predicted("1b", "bf16", True, "lora", step, "cpu")
    gpu._write("steps-1b-bf16-checkpointing", {"lora": step, "full": {"failed": "out of memory"}})
    gpu._write("scan-1b", {"64x64": gpu.scan_cell("1b", "64x64")})
    assert "lora" not in tables.gpu_steps("bf16")
    assert tables.gpu_scan().count("not measured") == 4 * 4 + 1
    for path in tmp_path.iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "rehearsal": False}))
    text = tables.gpu_steps("bf16")
    assert "tokens/s" in text
    assert "out of memory" in text
    assert tables.gpu_scan().count("not measured") == 3 * 4 + 1
    assert abs(step["error"]) < 0.05  # the dry run against the tracker on real tensors


def test_every_chunk_has_cells_and_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "REHEARSAL", True)
    chunks = gpu._chunks()
    assert (*chunks,)[:: len(chunks) - 1] == ("tests", "suites")  # what is worth most first
    assert {name.partition("-")[0] for name in list(chunks)[:4]} == {
        "tests",
        "steps",
        "scan",
    }  # every kind is begun early
    assert all(chunk.cells() for chunk in chunks.values())
    assert {f"scan-{model}" for model in tables._GPU_MODELS} < set(chunks)
    assert {f"steps-{m}-{b}-checkpointing" for m in tables._GPU_MODELS for b in ("bf16", "nf4")} < set(chunks)


def _figures(chunk: str, cell: str, number: int) -> dict[str, Any]:
    """A cell's row with a figure that no other has."""
    if chunk == "tests":
        return {"passed": number, "failed": 0, "skipped": 0, "said": []}
    if chunk == "suites":
        return {"stopped": f"{number} of its cells"}
    if chunk.startswith("scan"):
        kinds = ("scan", "svdvals", "eigenvalues_on_the_device", "eigenvalues_on_the_cpu")
        return {"matrices": 1, **{f"{kind}_seconds": float(number) for kind in kinds}}
    return {"seconds_per_step": float(number), "tokens_per_second": 1.0, "peak_bytes": 2**30, "error": 0.01}


def test_every_file_of_a_run_is_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(tables, "GPU", tmp_path)
    monkeypatch.setattr(gpu, "REHEARSAL", True)  # whose models are small
    made = [name for name in tables.TABLES if name.startswith("gpu_")]
    empty = "".join(tables.TABLES[name]() for name in made)
    assert empty.count("no card was at hand yet") == len(made)
    numbers, shown = itertools.count(100), {}
    for chunk, parts in gpu._chunks().items():
        cells = parts.cells()
        rows = {cell: _figures(chunk, cell, next(numbers)) for cell in cells}
        gpu._write(chunk, rows)
        if chunk.startswith("scan"):  # the sum over its shapes, and the whole
            shown[chunk] = [f"{sum(r['scan_seconds'] for c, r in rows.items() if c != 'whole'):.3g} s"]
            shown[chunk] += [f"{rows['whole']['scan_seconds']:.3g} s"] if "whole" in rows else []
        elif chunk == "tests":
            of_gpu = [row["passed"] for cell, row in rows.items() if cell.startswith("tests/gpu/")]
            shown[chunk] = [f"| {sum(of_gpu)} |"]
        else:
            shown[chunk] = [str(row.get("stopped", f"{row.get('seconds_per_step', 0):.3g} s")) for row in rows.values()]
    for path in tmp_path.glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "rehearsal": False}))
    text = "".join(tables.TABLES[name]() for name in made)
    missing = {chunk: number for chunk, all_ in shown.items() for number in all_ if number not in text}
    assert not missing
    (tmp_path / "scan-3b.json").unlink()
    assert tables.gpu_scan().count("not measured") == 4


def test_what_a_chunk_started_ends_with_it() -> None:
    """A training run that a stopped suite left behind would hold the card, and the lock of its folder."""
    with gpu._group(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        started = int(child.stdout.readline())
        os.kill(started, 0)
    for _ in range(50):  # init takes it over before it is gone
        state = Path(f"/proc/{started}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {started} is still there")


def test_a_chunk_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "slow"))
    (tmp_path / "slow").write_text("#!/bin/sh\necho 'cell: {\"figure\": 1}'\nsleep 60\n")
    (tmp_path / "slow").chmod(0o755)
    began = time.monotonic()
    assert not gpu.run_chunk("chunk", gpu.Chunk(lambda: ["a", "b", "c"]), limit=1.0)
    assert time.monotonic() - began < 10
    assert gpu.kept("chunk") == {"a": {"figure": 1}}
    assert json.loads((tmp_path / "chunk.json").read_text())["cells"]["b"] == {"stopped": "the chunk's time was over"}


def test_no_chunk_begins_that_cannot_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu, "REHEARSAL", True)
    assert gpu.main(["--minutes", "0.5", "scan-1b", "scan-3b"]) == 0
    assert "0 of 2 chunks are done; to go on with: scan-1b, scan-3b" in capsys.readouterr().out


def test_a_process_that_lost_its_card_ends_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an illegal access every call on the card fails: what that process would say of the cells to come is no figure."""

    def run(cell: str) -> dict[str, Any]:
        if cell == "b":
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return {"figure": 1}

    gpu._serve(gpu.Chunk(lambda: ["a", "b", "c"], run), ["a", "b", "c"])
    rows = [json.loads(line.removeprefix("cell: ")) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"figure": 1}, {"failed": "AcceleratorError: an illegal memory access was encountered"}]
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "once"))
    (tmp_path / "once").write_text("#!/bin/sh\necho x >> $0.starts\necho 'cell: {\"figure\": 1}'\n")
    (tmp_path / "once").chmod(0o755)
    assert gpu.run_chunk("chunk", gpu.Chunk(lambda: ["a", "b", "c"]), limit=60)
    assert gpu.kept("chunk") == {cell: {"figure": 1} for cell in "abc"}
    assert (tmp_path / "once.starts").read_text().count("x") == 3


def test_what_takes_long_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[float] = []
    clock = iter([0.0, 9.0] + [100.0 + i for i in range(20)])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    assert gpu.timed(lambda: runs.append(0.0)) == 9.0
    assert len(runs) == 1
    assert gpu.timed(lambda: runs.append(0.0), repeats=3) == 1.0
    assert len(runs) == 1 + 4


@pytest.mark.slow
def test_a_suite_without_its_data_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quality import SUITES, TOPICS

    monkeypatch.setattr(gpu, "REHEARSAL", True)
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    here = next(name for name, suite in SUITES.items() if suite.data == TOPICS)
    gone = next(name for name, suite in SUITES.items() if suite.data != TOPICS)
    rows = dict(gpu.run_suites(1, tmp_path, [gone, here], time.monotonic() + 200))
    assert rows[gone] == {"stopped": f"no dataset {SUITES[gone].data} in {tmp_path}; --data names the folder"}
    assert here in rows[here].get("listed", ""), rows[here]


@pytest.mark.slow
def test_how_marked_tests_ended_is_read_from_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_card.py").write_text(
        "import pytest\nimport time\n"
        "@pytest.mark.parametrize('x', [1, 'two words', 3])\ndef test_first(x):\n    assert x != 3, 'three is refused'\n"
        "def test_second():\n    pytest.skip('no card')\n"
        "def test_third():\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu.common, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "REHEARSAL", True)
    first, second, third = gpu.test_cells()
    rows = dict(gpu.run_tests([first, second], time.monotonic() + 60))
    counts = {cell.partition("::")[2]: (row["passed"], row["failed"], row["skipped"]) for cell, row in rows.items()}
    assert counts == {"test_first": (2, 1, 0), "test_second": (0, 0, 1)}
    assert "three is refused" in rows[first]["said"][0]
    rows = dict(gpu.run_tests([second, third], time.monotonic() + 5))
    assert rows[third] == {"stopped": "the chunk's time was over"}
