"""Timing in turn: contestants alive at once, each in a process of its own, take one step after the other as a pipe says.

A machine that slows down then slows all of them, and a ratio of two steps of one round says which is faster.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import common

# --- in the process of a contestant ----------------------------------------------------------------------------------


class Turn:
    """A contestant's end of the pipe: it waits for its turn, takes a step, says how long it took."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._began = (0.0, 0.0)

    def wait(self) -> None:
        self.pipe.recv()
        self._began = (time.perf_counter(), time.process_time())

    def done(self, hooks: float = 0.0) -> None:
        """Args:
        hooks: seconds of the turn that were no part of the step (a re-evaluation of ranks).
        """
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self.pipe.send({"seconds": wall - hooks, "hooks": hooks, "cpu": cpu})


# --- in the process that is run --------------------------------------------------------------------------------------


class ContestantFailed(RuntimeError):
    """A contestant's process ended early; the message holds its traceback."""


@dataclass
class Runner:
    """The other end of a contestant's pipe."""

    name: str
    process: Any
    pipe: Any
    turns: list[dict[str, float]] = field(default_factory=list)

    def receive(self) -> Any:
        try:
            got = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise ContestantFailed(f"{self.name}: its process ended with exit code {self.process.exitcode}") from None
        if isinstance(got, dict) and "error" in got:
            raise ContestantFailed(f"{self.name}:\n{got['error']}")
        return got

    def turn(self) -> Any:
        self.pipe.send("go")
        return self.receive()

    def last_turn(self) -> dict[str, Any]:
        """The turn that is not timed: what the contestant counted, and the most private memory that was seen meanwhile."""
        self.pipe.send("go")
        seen = [common.private(self.process.pid)]
        while not self.pipe.poll(0.01):
            seen.append(common.private(self.process.pid))
        known = [value for value in seen if value is not None]
        return {**self.receive()["facts"], "peak_private_bytes": max(known, default=None)}


def context(preload: Sequence[str]) -> Any:
    """Where contestants are forked from: a server that has imported some modules, which takes longer than most steps."""
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(list(preload))
    return ctx


def start(ctx: Any, target: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    here, there = ctx.Pipe()
    process = ctx.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    return process, here


def alone(ctx: Any, target: Callable[..., None], *arguments: Any) -> Any:
    """What a function sends, run in a process of its own."""
    process, pipe = start(ctx, target, *arguments)
    try:
        return pipe.recv()
    except EOFError:
        raise ContestantFailed(f"{target.__name__}: its error is above") from None
    finally:
        process.join()
