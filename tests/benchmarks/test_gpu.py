"""What `make gpu` is made of: chunks that go on, tables that say what was not measured, wheels that travel in pieces."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
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
    gpu._write("steps-1b-bf16-checkpointing", {"lora": step, "full": {"failed": "out of memory"}})
    gpu._write("scan-1b", {"64x64": gpu.scan_cell("1b", "64x64")})
    assert "lora" not in tables.gpu_steps("bf16")
    assert tables.gpu_scan().count("not measured") == 4 * 4
    for path in tmp_path.iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "rehearsal": False}))
    text = tables.gpu_steps("bf16")
    assert "tokens/s" in text
    assert "out of memory" in text
    assert tables.gpu_scan().count("not measured") == 3 * 4
    assert abs(step["error"]) < 0.05  # the dry run against the tracker on real tensors


def test_every_chunk_has_cells_and_a_file_of_its_own() -> None:
    chunks = gpu._chunks()
    assert all(chunk.cells() for chunk in chunks.values())
    assert {f"scan-{model}" for model in tables._GPU_MODELS} < set(chunks)
    assert {f"steps-{m}-{b}-checkpointing" for m in tables._GPU_MODELS for b in ("bf16", "nf4")} < set(chunks)
