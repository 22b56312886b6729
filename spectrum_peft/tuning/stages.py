"""The stages of a tune, one after the other: what fits, the race, the finals, the report.

Everything that is decided stands in the output folder and in the database, so that the same command goes on after whatever
ended it, and several processes, each with that command, work on one race.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..compare.matrix import Cell, Contestant, file_digest
from ..compare.outcome import Outcome
from ..compare.settings import Comparison
from ..errors import OptionError, TrainingSetupError, quoted
from ..records import mode_of, read_mapping, write_text
from .cells import Cells
from .contestants import next_rate, rates_of
from .preparing import CLOCK_STEPS, Prepared, judging_seconds, prepare
from .prices import Price
from .queue import Done, Queue, Task
from .race import Entry, Verdict, as_plain, best_rates, judge
from .recipe import write_recipe
from .schedule import Clock, Rest, rest, ties_of
from .settings import Asked
from .splits import Sets

POLL_SECONDS = 1.0  # between two looks whether other processes have ended
WIDENINGS = 2  # rates beyond the edge that a contestant may ask for


class Tune:
    """One tune in one process.

    Args:
        asked: see `settings.Asked`.
        run: of `train.settle`, of any mode: rows, dtype, task.
        identity: digest of the weights.
        compared: contestants as mappings -> a comparison of them, as the report takes it.
        check: raises where `train` would refuse a cell.
        counted: lines on what becomes of the rows, and the tokens of the longest.
    """

    def __init__(
        self, asked: Asked, run: Any, identity: str, *, compared: Callable[..., Comparison],
        made: Callable[[list[Mapping[str, Any]]], list[Contestant]], check: Callable[[Cell], None],
        counted: Callable[[], tuple[list[str], int]], announce: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.asked, self.run, self.identity, self.check, self.announce = asked, run, identity, check, announce
        self.compared, self.made, self.counted = compared, made, counted
        self.output, self.race_seed = asked.output, int(asked.values["race_seed"])
        self._past: set[int] = set()  # rungs that are over

    # --- the folder ---

    def open(self) -> None:
        """Take the folder, or find this tune in it; one that came to nothing before anything was settled is forgotten.

        Raises:
            OptionError: it holds something else.
        """
        index = self.output / "tune.json"
        mine = self._what_was_asked()
        if index.is_file():
            there = read_mapping(index)
            other = [key for key in sorted({*mine, *there}, key=_digests_last) if mine.get(key) != there.get(key)]
            with self._alone():
                if other and (self.output / "prepared.json").is_file():
                    what = _difference(other[0], there, mine, self.asked.train)
                    raise OptionError(f"{self.output}: holds another tune, {what}; name another --output-dir.")
                if other:
                    shutil.rmtree(self.output / "data", ignore_errors=True)
        elif self.output.is_dir() and any(p.name not in (".lock", "race.db") for p in self.output.iterdir()):
            raise OptionError(f"{self.output}: holds something else than a tune; name another --output-dir.")
        for name in ("cells", "scans"):
            (self.output / name).mkdir(parents=True, exist_ok=True)
        write_text(index, json.dumps(mine, indent=1) + "\n")
        digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
        with self._alone():  # of two that begin together one makes the tables
            self.queue = Queue(self.asked.values["storage"], self.output, f"tune {digest[:12]}")
        self.higher = self.asked.higher

    def _what_was_asked(self) -> dict[str, Any]:
        """What decides the numbers of a tune; hours and the storage may be others when it goes on."""
        values = {k: v for k, v in self.asked.values.items() if k not in ("hours", "storage")}
        files = {k: file_digest(v) for k in ("dataset", "eval_dataset") if (v := self.asked.train.get(k))}
        named = {k: str(Path(v).resolve()) for k in ("model", *files) if mode_of(v := str(self.asked.train[k]))}
        plain = {
            **self.asked.train,
            **named,
            **values,
            "weights": self.identity,
            "files": files,
            "task": self.asked.task,
        }
        return dict(json.loads(json.dumps(plain, default=str)))

    @contextmanager
    def _alone(self) -> Any:
        from filelock import FileLock

        with FileLock(self.output / ".lock"):
            yield

    # --- what fits ---

    def prepare(self) -> Prepared:
        """Split, price, time, plan; once for a folder."""
        path = self.output / "prepared.json"
        with self._alone():
            if not path.is_file():
                found = prepare(
                    self.asked, self.run, cells_of=self._cells, made=self.made, check=self.check, counted=self.counted,
                    announce=self.announce,
                )  # fmt: skip
                write_text(path, json.dumps(found.as_plain(), indent=1, default=_plain) + "\n")
        self.prepared = Prepared.from_plain(read_mapping(path))
        self.sets = self.prepared.sets
        self.cells = self._cells(self.sets)
        return self.prepared

    def _cells(self, sets: Sets) -> Cells:
        return Cells(self.asked, self.identity, sets, self.compared, self.announce)

    # --- the race ---

    def rates(self, price: Price) -> tuple[float, ...]:
        """The rates that a contestant begins with, the likeliest first."""
        plan = self.prepared.outline
        return rates_of(price.contestant, self.asked, plan.steps)[: plan.rates]

    def work(self) -> None:
        """Run what there is to run until nothing is left, beside whatever other processes do."""
        while True:
            with self._alone():
                stage = self._current()
            if stage is None:
                return
            name, study = stage
            if not self.queue.run_one(study, self._do(name)):
                time.sleep(POLL_SECONDS)  # others are at work on the last of a stage
                self.queue.forget_the_dead(study)

    def _do(self, name: str) -> Callable[[Task], tuple[Mapping[str, Any] | None, str | None]]:
        prices = {p.contestant.label: p for p in self.prepared.prices}
        final = name == "finals"

        def do(task: Task) -> tuple[Mapping[str, Any] | None, str | None]:
            steps = task.until if final else self.prepared.outline.steps
            began = time.monotonic()
            results, error = self.cells.run(
                self.cells.make(prices[task.contestant], task, steps, final=final), keep=final
            )
            took = time.monotonic() - began
            if results is None:
                self.announce(f"  {task.key}: failed: {error}")
            else:
                self.announce(
                    f"  {task.key}: {self.asked.metric} {results['scores']['search']['value']:.4f}, {took:.0f} s"
                )
            return results, error

        return do

    def _current(self) -> tuple[str, Any] | None:
        """The stage that has something to do, its runs decided; None when all is done."""
        plan = self.prepared.outline
        for rung, until in enumerate(plan.rungs):
            if rung in self._past:
                continue
            name = f"rung {rung}"
            study = self.queue.stage(name, self.higher)
            if self.queue.wanted(study) is None:
                self._begin_rung(study, rung, until)
            if not self._over(study) or (rung == 0 and self._widen(study, until)):
                return name, study
            self._past.add(rung)
        study = self.queue.stage("finals", self.higher)
        if self.queue.wanted(study) is None:
            self._begin_finals(study)
        return None if self._over(study) else ("finals", study)

    def _over(self, study: Any) -> bool:
        """Whether all that a stage wanted has ended; what nobody does waits again."""
        if len(self.queue.done(study)) == len(self.queue.wanted(study) or ()):
            return True
        self.queue.refill(study)
        return False

    def _begin_rung(self, study: Any, rung: int, until: int) -> None:
        plan = self.prepared.outline
        if rung == 0:
            tasks = [
                Task(p.contestant.label, rate, until, self.race_seed)
                for p in self.prepared.prices
                for rate in self.rates(p)
            ]
        else:
            before = self._judged(rung - 1)
            tasks = [Task(v.entry.contestant, v.entry.rate, until, self.race_seed) for v in before if v.stays]
        self.announce(f"race, to step {until} of {plan.steps}: {len(tasks)} runs")
        self.queue.want(study, tasks)

    def _widen(self, study: Any, until: int) -> bool:
        """Let a contestant whose best rate lies at the edge of its grid try the next one; whether anything was added."""
        wanted = self.queue.wanted(study) or []
        entries = [_entry(d) for d in self.queue.done(study)]
        best = best_rates(entries, self.higher)
        # Where the whole field is far ahead, an edge does not matter: the better half of the contestants may go on.
        added = []
        for label in list(best)[: max(2, (len(best) + 1) // 2)]:
            price = next(p for p in self.prepared.prices if p.contestant.label == label)
            mine = [t.rate for t in wanted if t.contestant == label]
            if len(mine) >= len(self.rates(price)) + WIDENINGS:
                continue
            beyond = next_rate(mine, best[label].rate)
            if beyond is not None and beyond not in mine:
                added.append(Task(label, beyond, until, self.race_seed))
        if added:
            self.announce(f"the best rate is at the edge for {len(added)} contestants: the next beyond is tried")
            self.queue.want(study, [*wanted, *added])
        return bool(added)

    def _judged(self, rung: int) -> list[Verdict]:
        """The verdicts at the end of a rung: decided once, then read."""
        study = self.queue.stage(f"rung {rung}", self.higher)
        done = self.queue.done(study)
        entries = [_entry(d) for d in done]
        if not any(e.value is not None for e in entries):
            raise TrainingSetupError(f"all {len(done)} runs of the race failed, the first: {done[0].error}")
        decided = study.user_attrs.get("rest")
        if decided is None:
            decided = asdict(self._rest(rung, done))
            study.set_user_attr("rest", decided)
        rungs = self.prepared.outline.rungs
        kept = {p.contestant.label for p in self.prepared.prices if p.contestant.control}
        verdicts = judge(
            entries, higher=self.higher, room=decided["room"], error=self.asked.values["error"] / len(rungs), kept=kept,
            ties=ties_of(decided["room"]), one_each=rung == len(rungs) - 1,
        )  # fmt: skip
        if "verdicts" not in study.user_attrs:
            study.set_user_attr("verdicts", as_plain(verdicts))
            self._say_verdicts(verdicts)
            self._forget_checkpoints(done, verdicts)
            self._best_so_far(verdicts, rung)
        return verdicts

    def _rest(self, rung: int, done: Sequence[Done]) -> Rest:
        plan, asked = self.prepared.outline, self.asked
        clock = self._measured(done)
        found = rest(asked.values["hours"], self._spent(), clock, plan, rung=rung, runs=len(done))
        if asked.values["hours"] is not None:
            self.announce(f"{self._spent() / 3600:.2g} h are spent of {asked.values['hours']:g} h")
        return found

    def _measured(self, done: Sequence[Done]) -> Clock:
        """Times of the runs of a rung."""
        step: dict[str, list[float]] = {}
        beside, longer = [], []
        for d in done:
            if d.results is not None and d.results["step_seconds"]:
                seconds = d.results["step_seconds"]
                step.setdefault(d.task.contestant, []).append(statistics.median(seconds[1:] or seconds))
                beside.append(d.seconds - sum(seconds))
                longer.append(judging_seconds(d.results, self.sets))
        return Clock(
            {k: statistics.fmean(v) for k, v in step.items()}, statistics.fmean(beside), statistics.fmean(longer)
        )

    def step_seconds(self, rung: int) -> Mapping[str, float]:
        """{contestant: seconds of a step in that rung}."""
        return self._measured(self.queue.done(self.queue.stage(f"rung {rung}", self.higher))).step

    def _spent(self) -> float:
        """Seconds of all runs so far, of all processes, and of preparing."""
        return self.prepared.seconds + sum(d.seconds for d in (*self.raced(), *self.finals()))

    def _say_verdicts(self, verdicts: Sequence[Verdict]) -> None:
        for v in verdicts:
            value = "failed" if v.entry.value is None else f"{v.entry.value:.4f}"
            p = "" if v.p is None else f" (p {v.p:.2g})"
            self.announce(f"    {v.entry.contestant:<26} at {v.entry.rate:<8g} {value:<10} {v.fate}{p}")

    def _forget_checkpoints(self, done: Sequence[Done], verdicts: Sequence[Verdict]) -> None:
        """Those of runs that were stopped are of no more use."""
        prices = {p.contestant.label: p for p in self.prepared.prices}
        last = done[0].task.until == self.prepared.outline.steps
        stopped = {(v.entry.contestant, v.entry.rate) for v in verdicts if last or not v.stays}
        for d in done:
            if (d.task.contestant, d.task.rate) in stopped:
                self.cells.forget(self.cells.make(prices[d.task.contestant], d.task, self.prepared.outline.steps))

    def _best_so_far(self, verdicts: Sequence[Verdict], rung: int) -> None:
        best = verdicts[0].entry
        price = next(p for p in self.prepared.prices if p.contestant.label == best.contestant)
        steps = self.prepared.outline.steps
        after = f"the best after {self.prepared.outline.rungs[rung]} of {steps} steps of the race"
        says = f"{best.contestant} at {best.rate:g}: {after}; the finals are not over"
        write_recipe(self.output, self.asked, price, best.rate, steps, self.race_seed, says)

    # --- the finals ---

    def _begin_finals(self, study: Any) -> None:
        rungs = self.prepared.outline.rungs
        last = len(rungs) - 1
        verdicts = self._judged(last)
        decided = Rest(**self.queue.stage(f"rung {last}", self.higher).user_attrs["rest"])
        rates = {v.entry.contestant: v.entry.rate for v in verdicts if v.stays}
        # A control whose run failed on the way is at the rate that was best before.
        for rung in range(last - 1, -1, -1):
            entries = [_entry(d) for d in self.queue.done(self.queue.stage(f"rung {rung}", self.higher))]
            for label, entry in best_rates(entries, self.higher).items():
                if self._is_control(label):
                    rates.setdefault(label, entry.rate)
        won = [label for label in rates if not self._is_control(label)]
        controls = [label for label in rates if self._is_control(label)]
        seeds = list(self.asked.values["seeds"])
        while len(seeds) < decided.seeds:
            seeds.append(next(n for n in itertools.count() if n not in (*seeds, self.race_seed)))
        tasks = [Task(label, rates[label], decided.steps, seed) for seed in seeds for label in (*won, *controls)]
        if decided.steps < self.prepared.outline.steps:
            self.announce(
                f"the hours are short: the finals are {decided.steps} steps instead of {self.prepared.outline.steps}"
            )
        self.announce(
            f"finals: {', '.join(won + controls)}; {len(seeds)} seeds, {decided.steps} steps: {len(tasks)} runs"
        )
        self.queue.want(study, tasks)

    def _is_control(self, label: str) -> bool:
        return any(p.contestant.label == label and p.contestant.control for p in self.prepared.prices)

    def raced(self) -> list[Done]:
        """Runs of the race that have ended, one for each rung that it was in."""
        rungs = range(len(self.prepared.outline.rungs))
        return [d for i in rungs for d in self.queue.done(self.queue.stage(f"rung {i}", self.higher))]

    def finals(self) -> list[Done]:
        return self.queue.done(self.queue.stage("finals", self.higher))

    def final_steps(self) -> int:
        return max((d.task.until for d in self.finals()), default=self.prepared.outline.steps)

    def train_again(self, cell: Cell) -> None:
        """Train a run of the finals whose model is not here, but on another machine's disk.

        Raises:
            TrainingSetupError: it fails this time.
        """
        results, error = self.cells.run(cell, keep=True)
        if results is None:
            raise TrainingSetupError(
                f"{cell.label}: the winner is not on this disk, and training it again failed: {error}"
            )

    def final_outcomes(self) -> list[Outcome]:
        """The runs of the finals as a comparison's."""
        prices = {p.contestant.label: p for p in self.prepared.prices}
        found = []
        for d in self.finals():
            cell = self.cells.make(prices[d.task.contestant], d.task, d.task.until, final=True)
            results = None if d.results is None else dict(d.results)
            found.append(Outcome(cell, results, d.error, self.output / "cells" / cell.folder / "log.txt"))
        return found

    def stage_spending(self) -> list[dict[str, Any]]:
        """What each stage spent: runs, optimizer steps, seconds."""
        rows = [
            {
                "stage": "what fits", "runs": (n := self.prepared.clock.timed), "steps": n * CLOCK_STEPS,
                "seconds": self.prepared.seconds,
            }
        ]  # fmt: skip
        for name in (*(f"rung {i}" for i in range(len(self.prepared.outline.rungs))), "finals"):
            done = self.queue.done(self.queue.stage(name, self.higher))
            steps = sum(len(d.results["step_seconds"]) for d in done if d.results is not None)
            rows.append({"stage": name, "runs": len(done), "steps": steps, "seconds": sum(d.seconds for d in done)})
        return rows

    def verdicts(self) -> list[dict[str, Any]]:
        """Of all rungs, as they were written down."""
        found = []
        for rung, until in enumerate(self.prepared.outline.rungs):
            rows = self.queue.stage(f"rung {rung}", self.higher).user_attrs.get("verdicts", [])
            found.append({"until": until, "runs": rows})
        return found


def _entry(done: Done) -> Entry:
    if done.results is None:
        return Entry(done.task.contestant, done.task.rate, None)
    scores = done.results["scores"]["search"]
    rows = None if scores["rows"] is None else tuple(map(float, scores["rows"]))
    return Entry(done.task.contestant, done.task.rate, float(scores["value"]), rows)


def _digests_last(key: str) -> tuple[bool, str]:
    return key in ("weights", "files"), key


def _difference(key: str, there: Mapping[str, Any], mine: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """What makes two tunes of one folder two, for a reader."""
    if key == "weights":
        return f"of a model with other weights than {train['model']} has now"
    if key == "files":
        before, now = (found.get(key) or {} for found in (there, mine))
        changed = [train.get(name) or name for name in {**before, **now} if before.get(name) != now.get(name)]
        return f"of other rows than {changed[0]} has now"
    return f"whose {key} is {quoted(there.get(key))}, here {quoted(mine.get(key))}"


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
