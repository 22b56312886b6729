"""Safetensors files come out the same whatever the system lets a process do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectrum_peft.errors import CheckpointError
from spectrum_peft.weights.files import read_bytes
from spectrum_peft.weights.writer import SafetensorsWriter, header_bytes, read_raw_header

TENSORS = {f"t{i}": torch.arange(1000 * (i + 1), dtype=torch.float32).reshape(-1, 10) for i in range(4)}
LAYOUT = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
SIZE = sum(t.numel() * 4 for t in TENSORS.values())


def refused(code: int) -> Callable[..., int]:
    def call(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


# What a system does not have (or refuses between two files), and what it calls itself.
WAYS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "all there is": ((), None),
    "no copy_file_range": (("copy_file_range",), None),
    "macOS": (("copy_file_range",), "darwin"),
    "Windows": (("copy_file_range", "sendfile", "pread", "preadv", "pwrite"), "win32"),
}


@pytest.fixture(params=[*WAYS, "two file systems"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two file systems":
        for name in ("copy_file_range", "sendfile"):
            monkeypatch.setattr(os, name, refused(errno.EXDEV), raising=False)
        return
    missing, platform = WAYS[request.param]
    for name in missing:
        monkeypatch.delattr(os, name, raising=False)
    if platform:
        monkeypatch.setattr(sys, "platform", platform)


def offsets() -> dict[str, int]:
    at, found = 0, {}
    for name, tensor in TENSORS.items():
        found[name] = at
        at += tensor.numel() * 4
    return found


def test_tensors_written_from_several_threads_come_out_whole(way: None, tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "w.safetensors", header_bytes(LAYOUT, None, LAYOUT), SIZE) as file:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: file.write(TENSORS[name], offsets()[name]), TENSORS))
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_ranges_copied_from_another_file_come_out_whole(way: None, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "from.safetensors")
    begin = (tmp_path / "from.safetensors").stat().st_size - SIZE
    with SafetensorsWriter(tmp_path / "to.safetensors", header_bytes(LAYOUT, None, LAYOUT), SIZE) as file:
        for name, at in reversed(offsets().items()):
            size = TENSORS[name].numel() * 4
            file.copy(tmp_path / "from.safetensors", begin + at, begin + at + size, at)
    found = load_file(tmp_path / "to.safetensors")
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_bytes_are_read_where_there_is_no_preadv(way: None, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    assert read_bytes(path, 3, 150).tolist() == list(range(3, 150))
    with pytest.raises(CheckpointError, match="ends at byte 200"):
        read_bytes(path, 100, 201)


def test_an_error_that_is_none_of_the_ways_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", refused(errno.ENOSPC), raising=False)
    (tmp_path / "from").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        with SafetensorsWriter(tmp_path / "to", header_bytes({}, None, {}), 100) as file:
            file.copy(tmp_path / "from", 0, 100, 0)


def test_a_header_that_was_changed_since_it_was_checked_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((4).to_bytes(8, "little") + b"{...")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while it was read"):
        read_raw_header(path)
