"""Facts of the machine: from /proc where there is one, from elsewhere where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from spectrum_peft import machine

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with /proc")


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows."""
    exists: Callable[[Path], bool] = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: not self.as_posix().startswith("/proc") and exists(self))


def test_the_facts_are_there_on_any_system(without_proc: None) -> None:
    facts = machine.machine()
    assert facts["memory_bytes"] == psutil.virtual_memory().total > 0
    assert len(facts["load_average"]) == 3
    assert facts["cores"] >= 1
    assert facts["cpu_flags"] == []
    assert facts["cpu"]


def test_cores_are_counted_where_a_process_is_not_bound_to_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert machine.cores() == os.cpu_count()


@linux
def test_the_peak_without_proc_is_about_that_of_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ru_maxrss` begins with the peak of the process that started this one: it is no less, but for the page it counts in."""
    known = machine.peak_resident()
    assert known is not None
    monkeypatch.setattr(Path, "exists", lambda self: False)
    found = machine.peak_resident()
    assert found is not None
    assert found >= 0.9 * known


def test_the_peak_is_the_systems_own_where_it_counts_one(without_proc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As psutil says it on Windows."""
    memory = SimpleNamespace(rss=1, peak_wset=7_000_000)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: memory)
    assert machine.peak_resident() == machine.peak_resident(os.getpid()) == 7_000_000


def test_another_process_is_asked_for_what_it_holds_until_it_ends(without_proc: None) -> None:
    with subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 2**20 < (machine.peak_resident(child.pid) or 0) < 2**30
        child.communicate(b"\n")
    assert machine.peak_resident(child.pid) is None


def test_resetting_the_peak_is_no_error_anywhere(without_proc: None) -> None:
    machine.reset_peak()


def test_the_work_of_others_is_what_is_busy_besides_ours() -> None:
    """Half a second of work in this process: without it in `own`, it counts as others'."""
    load, began = machine.OtherLoad(), time.process_time()
    while time.process_time() - began < 0.5:
        pass
    own = time.process_time() - began
    assert load.cores(0.0) - load.cores(own) > 0.1
    assert load.cores(1e9) == 0.0
