"""Much of something: memory, time and open files stay bounded. The figures of docs/reliability.md come from longer runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import long  # noqa: E402

SIZES = {"steps": 20, "every": 5, "adapters": 8, "layers": 20, "entries": 2000}
LIBRARIES = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_a_slope_is_of_the_second_half() -> None:
    at = list(range(10))
    assert long.slope(at, [100 * max(0, 5 - x) + 3 * x for x in at]) == pytest.approx(3)


@LIBRARIES
def test_many_adapters_in_a_folder_leave_nothing_open() -> None:
    found = long.run("adapters", SIZES)
    assert found["adapters"] == 8
    assert found["files_left_open"] == 0


@LIBRARIES
def test_a_run_is_saved_evaluated_and_re_evaluated_again_and_again() -> None:
    found = long.run("steps", SIZES)
    assert (found["re_evaluations"], found["saved"]) == (
        3,
        4,
    )  # after the last step there is nothing to re-evaluate for
    assert found["at"] == [2, 7, 12, 17]
    assert found["open_files"][0] == found["open_files"][1]


def test_a_plan_of_many_entries_is_saved_and_read_in_time_that_grows_with_it() -> None:
    few, many = (long.run("entries", {"entries": count}) for count in (1000, 8000))
    # Eight times as many: a loop over all pairs would take 64 times as long; 24 leaves room for a busy machine.
    assert many["load_seconds"] < 24 * max(few["load_seconds"], 0.01)


@pytest.mark.slow
@LIBRARIES
def test_the_memory_of_a_long_run_does_not_grow_with_copies_of_the_model() -> None:
    if common.private() is None:
        pytest.skip("no /proc on this system")
    found = long.measured("steps", {**SIZES, "steps": 400, "every": 10})
    # One copy of the tiny model for each re-evaluation would be 4 bytes x 132,000 parameters / 10 steps; the libraries keep a
    # loader and a row of the log for each evaluation, some 10 KiB, and the allocator some more.
    assert found["slope_bytes_per_step"] < 4 * 132_000 / 10


@pytest.mark.slow
def test_a_model_of_many_blocks_takes_as_much_more_as_it_has() -> None:
    found: dict[str, Any] = long.measured("layers", {**SIZES, "layers": 100})
    for name, row in found["commands"].items():
        # Ten times as many blocks; what starts python and its libraries is in both.
        assert row["cpu_seconds"][1] < 10 * row["cpu_seconds"][0], name
        # A block has 26 matrices and vectors of 32 x 64 at most: 100 of them are some 10 MB with everything that is said of them.
        assert row["peak_bytes"] is None or row["peak_bytes"][1] - row["peak_bytes"][0] < 200 << 20, name
