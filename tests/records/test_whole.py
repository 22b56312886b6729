"""Writing: whole or not at all, through what is no file, and what killed processes leave is cleared away."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from spectrum_peft.errors import CheckpointError
from spectrum_peft.records import whole_folder, write_text
from spectrum_peft.records.whole import _node


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "report.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    write_text(pipe, "through")
    assert reader.communicate(timeout=30)[0] == "through"
    assert pipe.is_fifo()


def test_standard_output_in_a_file_gets_everything_in_order(tmp_path: Path) -> None:
    program = (
        "from spectrum_peft.records import write_text\n"
        "print('before'); write_text('/dev/stdout', 'record\\n'); print('after')"
    )
    with (tmp_path / "out.txt").open("w") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True, timeout=60)
    assert (tmp_path / "out.txt").read_text() == "before\nrecord\nafter\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_device_without_room_is_an_error_and_stays_a_device() -> None:
    with pytest.raises(CheckpointError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write_text("/dev/full", "x" * 100_000)
    assert Path("/dev/full").is_char_device()


def test_a_limit_of_file_size_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"report\.json: cannot be written \(File too large\)"):
            write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("name", ["n" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_text(tmp_path / name, "x")


def _ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_cleared_and_what_others_write_is_not(tmp_path: Path) -> None:
    gone, node = _ended_process(), _node()
    stale = tmp_path / f".out.{gone}-{node}.abc.part"
    stale.mkdir()
    (stale / "half").write_text("x")
    kept = [
        tmp_path / f".out.{os.getpid()}-{node}.abc.part",  # of a process that lives
        tmp_path / f".out.{gone}-{'0' * 8}.abc.part",  # of another machine
        tmp_path / f".other.{gone}-{node}.abc.part",  # of another result
    ]
    for path in kept:
        path.mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert not stale.exists()
    assert all(path.exists() for path in kept)
    assert (tmp_path / "out" / "x").read_text() == "x"
    left = tmp_path / f".r.json.{gone}-{node}.abc.part"
    left.write_text("half")
    write_text(tmp_path / "r.json", "whole")
    assert not left.exists()
