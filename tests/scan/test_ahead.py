"""Tensors that are fetched while others are scored: in order, within a budget, and no later than they are wanted."""

from __future__ import annotations

import io
import sys
import threading
from itertools import pairwise

import pytest
import torch

from spectrum_peft.scan.ahead import Ahead
from spectrum_peft.scan.scan import _progress
from spectrum_peft.weights import TensorInfo
from spectrum_peft.weights.neighbours import Group

NAMES = [str(i) for i in range(12)]


def alone(names: list[str]) -> list[Group]:
    return [Group((name,), lambda arrived, name=name: arrived(name)) for name in names]  # type: ignore[misc]


GROUPS = alone(NAMES)


def test_each_comes_once_in_the_order_that_it_is_taken() -> None:
    arrived: list[int] = []
    with Ahead(lambda name: torch.tensor(int(name)), GROUPS, dict.fromkeys(NAMES, 1), 3, arrived.append) as ahead:
        assert [int(ahead.take(name)) for name in NAMES] == list(range(12))
    assert arrived == [1] * 12


@pytest.mark.parametrize(("budget", "most"), [(10, 10), (25, 25), (1, 10)])
def test_no_more_is_held_than_the_budget_or_one_tensor(budget: int, most: int) -> None:
    held, peak, lock = 0, 0, threading.Lock()

    def read(name: str) -> torch.Tensor:
        nonlocal held, peak
        with lock:
            held += 10
            peak = max(peak, held)
        return torch.zeros(1)

    with Ahead(read, GROUPS, dict.fromkeys(NAMES, 10), budget, lambda _: None) as ahead:
        for name in NAMES:
            ahead.take(name)
            with lock:
                held -= 10
    # What is taken is no longer held, and the next may be asked for before this loop has counted that.
    assert peak <= most + 10


def test_an_error_is_raised_where_its_tensor_is_taken_and_the_others_come() -> None:
    def read(name: str) -> torch.Tensor:
        if name == "3":
            raise ValueError("no third")
        return torch.tensor(int(name))

    with Ahead(read, GROUPS, dict.fromkeys(NAMES, 1), 100, lambda _: None) as ahead:
        assert int(ahead.take("0")) == 0
        with pytest.raises(ValueError, match="no third"):
            ahead.take("3")
        assert int(ahead.take("4")) == 4


def test_who_waits_is_woken_when_it_ends() -> None:
    never = threading.Event()
    ahead = Ahead(lambda _: never.wait(30) and torch.zeros(1), alone(["a"]), {"a": 1}, 1, lambda _: None)  # type: ignore[arg-type,return-value]
    seen: list[str] = []

    def wait() -> None:
        try:
            ahead.take("a")
        except RuntimeError as error:
            seen.append(str(error))

    with ahead:
        thread = threading.Thread(target=wait)
        thread.start()
    thread.join(10)
    never.set()
    assert seen == ["the scan was stopped"]


def test_the_next_one_comes_while_one_is_scored() -> None:
    came = {name: threading.Event() for name in NAMES}

    def read(name: str) -> torch.Tensor:
        came[name].set()
        return torch.zeros(1)

    with Ahead(read, GROUPS, dict.fromkeys(NAMES, 1), 100, lambda _: None) as ahead:
        for name, following in pairwise(NAMES):
            ahead.take(name)
            assert came[following].wait(30)  # what is "scored" here lasts until the next has come


def test_the_bar_counts_bytes_and_says_how_many_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    infos = [(n, TensorInfo(n, (512, 1024), "float32", "linear")) for n in NAMES]
    with _progress(infos, infos[2:], far=True) as (fetched, scored):
        for _ in infos[2:]:
            fetched(512 * 1024 * 4)
            scored()
    last = screen.getvalue().split("\r")[-1]
    assert "24.0M/24.0M" in last and "B/s" in last and "12/12 matrices scored" in last
