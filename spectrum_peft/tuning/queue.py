"""The runs of a tune as trials of Optuna, in a database that any number of processes may share.

A stage is a study; a run that is to be done is a trial that waits. Optuna's storage gives each waiting trial to one process,
watches over the heartbeats of those at work, and calls a trial failed whose process is gone: such a run waits again.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InstallError, one_line
from ..records import finite_only

# Of the sign of life of a run, and without one for how long it is taken to be alive.
HEARTBEAT_SECONDS, GRACE_SECONDS = 5, 30


def require_optuna() -> Any:
    """
    Raises:
        InstallError: with the install line.
    """
    try:
        import optuna
    except ImportError as error:
        raise InstallError("tune needs Optuna: pip install 'spectrum-peft[tune]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Task:
    """One run: a contestant at a rate, up to a step, with a seed."""

    contestant: str
    rate: float
    until: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.contestant} at {self.rate:g}, seed {self.seed}, {self.until} steps"


@dataclass(frozen=True)
class Done:
    """How a run ended.

    Attributes:
        results: of the cell; None where it failed, and `error` says why.
        seconds: that the worker spent on it.
    """

    task: Task
    results: Mapping[str, Any] | None
    error: str | None
    seconds: float


class _CellFailed(Exception):
    """Optuna is to call the trial failed."""


class Queue:
    """The stages of one tune in a database.

    Args:
        url: of the database; None: a file in the folder.
        name: of the tune, in front of the names of its studies: a database may hold several.
    Raises:
        InstallError: Optuna is missing. CheckpointError: the database cannot be opened.
    """

    def __init__(self, url: str | None, folder: Path, name: str) -> None:
        self.optuna = require_optuna()
        self.name = name
        self.url = url or f"sqlite:///{(folder / 'race.db').resolve()}"
        timeout = {"connect_args": {"timeout": 60}} if self.url.startswith("sqlite") else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
                self.storage = self.optuna.storages.RDBStorage(
                    self.url, engine_kwargs=timeout, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS
                )
        except Exception as error:  # SQLAlchemy's, Alembic's, and those of the database's driver
            raise CheckpointError(f"storage {self.url!r}: cannot be opened ({one_line(error)}).") from error

    def stage(self, name: str, higher: bool) -> Any:
        """The study of a stage, made where it is not there."""
        return self.optuna.create_study(
            storage=self.storage, study_name=f"{self.name}/{name}", load_if_exists=True,
            direction="maximize" if higher else "minimize", sampler=self.optuna.samplers.RandomSampler(seed=0),
        )  # fmt: skip

    def wanted(self, stage: Any) -> list[Task] | None:
        """What a stage was to run; None where nobody has decided that yet."""
        found = stage.user_attrs.get("tasks")
        return None if found is None else [Task(**task) for task in found]

    def want(self, stage: Any, tasks: Sequence[Task]) -> None:
        """Decide what a stage runs, and let it wait. One process at a time."""
        stage.set_user_attr("tasks", [vars(task) for task in tasks])
        self.refill(stage)

    def refill(self, stage: Any) -> None:
        """Let those runs wait that nobody does, has done, or has failed at: their process was ended. One process at a time."""
        states = self.optuna.trial.TrialState
        settled = {
            t.user_attrs["task"]
            for t in stage.get_trials(deepcopy=False)
            if "task" in t.user_attrs and (t.state != states.FAIL or "error" in t.user_attrs)
        }
        for task in self.wanted(stage) or ():
            if task.key not in settled:
                params = {"contestant": task.contestant, "learning_rate": task.rate}
                stage.enqueue_trial(params, user_attrs={"task": task.key})

    def run_one(self, stage: Any, do: Callable[[Task], tuple[Mapping[str, Any] | None, str | None]]) -> bool:
        """Take a run that waits, do it, write down how it ended; False where none waits.

        Args:
            do: task -> (results of its cell, why there are none).
        """
        states = self.optuna.trial.TrialState
        if not stage.get_trials(deepcopy=False, states=(states.WAITING,)):
            return False
        tasks = {task.key: task for task in self.wanted(stage) or ()}
        labels = sorted({task.contestant for task in tasks.values()})

        def objective(trial: Any) -> float:
            task = tasks.get(trial.user_attrs.get("task"))
            if task is None:  # another process was faster, and Optuna has drawn one of its own
                raise self.optuna.TrialPruned
            trial.suggest_categorical("contestant", labels)
            trial.suggest_float("learning_rate", 1e-12, 1e3, log=True)
            trial.set_user_attr("worker", f"{platform.node()}:{os.getpid()}")
            began = time.monotonic()
            results, error = do(task)
            trial.set_user_attr("seconds", time.monotonic() - began)
            if results is None:
                trial.set_user_attr("error", error)
                raise _CellFailed
            trial.set_user_attr("results", json.dumps(finite_only(results)))
            return float(results["scores"]["search"]["value"])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Optuna warns of a failure with its traceback, and our log has the line that says why.
            logging.getLogger("optuna").setLevel(logging.ERROR)
            stage.optimize(objective, n_trials=1, catch=(_CellFailed,))
        return True

    def forget_the_dead(self, stage: Any) -> None:
        """Call failed what has shown no sign of life for too long."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optuna.storages.fail_stale_trials(stage)

    def done(self, stage: Any) -> list[Done]:
        """The runs that have ended, in the order in which they were wanted."""
        states = self.optuna.trial.TrialState
        found: dict[str, Done] = {}
        tasks = {task.key: task for task in self.wanted(stage) or ()}
        for t in stage.get_trials(deepcopy=False):
            task = tasks.get(t.user_attrs.get("task"))
            if task is None or task.key in found:
                continue
            if t.state == states.COMPLETE:
                found[task.key] = Done(task, json.loads(t.user_attrs["results"]), None, t.user_attrs["seconds"])
            elif t.state == states.FAIL and "error" in t.user_attrs:
                found[task.key] = Done(task, None, t.user_attrs["error"], t.user_attrs["seconds"])
        return [found[key] for key in tasks if key in found]
