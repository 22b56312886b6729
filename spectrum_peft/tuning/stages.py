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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..compare.matrix import Cell, Contestant, file_digest
from ..compare.outcome import Outcome
from ..compare.runs import run_cell, scans_for
from ..compare.settings import Comparison
from ..errors import OptionError, TrainingSetupError
from ..records import read_mapping, write_text
from .contestants import chosen, next_rate, rates_of
from .prices import MARGIN, Price, Pricing, renamed, step_of, those_that_fit
from .queue import Done, Queue, Task
from .race import Entry, Verdict, as_plain, best_rates, judge
from .recipe import write_recipe
from .schedule import MOST_EPOCHS, Clock, Outline, Rest, outline, relative_step, rest, ties_of
from .settings import Asked
from .splits import Sets, carve, longest

POLL_SECONDS = 1.0  # between two looks whether other processes have ended
WIDENINGS = 2  # rates beyond the edge that a contestant may ask for
CLOCK_STEPS = 4  # of the run that is timed before anything is planned


@dataclass(frozen=True)
class Prepared:
    """What is settled before the first run, in `prepared.json`.

    Attributes:
        prices: of the contestants that fit, in the order in which they are left out from the end.
        dropped: lines on those that do not.
        outline: of the race and the finals as planned. clock: what was expected.
        seconds: that preparing took.
    """

    prices: tuple[Price, ...]
    dropped: tuple[str, ...]
    outline: Outline
    clock: Clock
    sets: Sets
    seconds: float


class Tune:
    """One tune in one process.

    Args:
        asked: see `settings.Asked`.
        run: of `train.settle`, of any mode: rows, dtype, task.
        identity: digest of the weights.
        compared: contestants as mappings -> a comparison of them, as the report takes it.
        check: raises where `train` would refuse a cell.
    """

    def __init__(
        self, asked: Asked, run: Any, identity: str, *, compared: Callable[..., Comparison],
        made: Callable[[list[Mapping[str, Any]]], list[Contestant]], check: Callable[[Cell], None],
        announce: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.asked, self.run, self.identity, self.check, self.announce = asked, run, identity, check, announce
        self.compared, self.made = compared, made
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
            other = [key for key in sorted({*mine, *there}) if mine.get(key) != there.get(key)]
            with self._alone():
                if other and (self.output / "prepared.json").is_file():
                    raise OptionError(
                        f"{self.output}: holds another tune, whose {other[0]} is {there.get(other[0])!r}, here "
                        f"{mine.get(other[0])!r}; name another --output-dir."
                    )
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
        plain = {**self.asked.train, **values, "weights": self.identity, "files": files, "task": self.asked.task}
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
                write_text(path, json.dumps(self._prepare(), indent=1, default=_plain) + "\n")
        found = read_mapping(path)
        prices = tuple(
            Price(**{**p, "contestant": Contestant(**{**p["contestant"], "also": tuple(p["contestant"]["also"])})})
            for p in found["prices"]
        )
        self.prepared = Prepared(
            prices, tuple(found["dropped"]), Outline(**found["outline"]), Clock(**found["clock"]), Sets(**found["sets"]),
            found["seconds"],
        )  # fmt: skip
        self.sets = self.prepared.sets
        return self.prepared

    def _prepare(self) -> dict[str, Any]:
        began = time.monotonic()
        asked, train = self.asked, self.asked.train
        self.sets = carve(
            self.run.train_rows,
            self.run.eval_rows,
            self.output / "data",
            str(train["dataset"]),
            asked.values["search_rows"],
        )
        self.announce(
            f"{self.sets.train_rows} rows train, {self.sets.search_rows} judge the search, {self.sets.evaluation_rows} are "
            f"looked at once, at the end{' (of the training set)' if self.sets.carved else ''}"
        )
        if self.sets.train_rows < asked.values["batch_size"]:
            raise OptionError(
                f"{asked.source}: batch_size is {asked.values['batch_size']}, and {self.sets.train_rows} rows are left to "
                "train on."
            )
        pricing = self._pricing()
        prices = [renamed(pricing.price(c)) for c in chosen(asked, pricing.report(), self.made)]
        fitting = those_that_fit(prices, asked.values["memory"], self.announce)
        dropped = [p.line() for p in prices if not p.fits]
        for price in fitting:
            self.check(self.cell(price, Task(price.contestant.label, 1e-4, 1, self.race_seed), steps=1))
        steps = self._most_steps()
        clock = self._clock(fitting)
        rates = max(len(rates_of(p.contestant, asked, steps)) for p in fitting)
        plan = outline(
            asked.values["hours"], steps, clock, contestants=len(fitting), rates=rates, finalists=asked.values["finalists"],
            seeds=len(asked.values["seeds"]), spent=time.monotonic() - began,
        )  # fmt: skip
        self._say_plan(plan, clock)
        return {
            "prices": [asdict(p) for p in fitting[: plan.contestants]], "dropped": dropped, "outline": asdict(plan),
            "clock": asdict(clock), "sets": asdict(self.sets), "seconds": time.monotonic() - began,
        }  # fmt: skip

    def _pricing(self) -> Pricing:
        import transformers

        from ..devices import default_device, free_memory
        from ..tuner.loading import load_tokenizer

        asked, run, device = self.asked, self.run, default_device()
        memory = asked.values["memory"]
        if memory is None:
            free = free_memory(device)
            memory = free[0] if free else None
        most = getattr(run.args, "max_length", None) or asked.train.get("max_length") or 512
        where = {k: asked.train[k] for k in ("revision", "trust_remote_code") if asked.train.get(k)}
        tokenizer = load_tokenizer(asked.train["model"], **where)
        length = most if tokenizer is None else longest(run.train_rows, tokenizer, most)
        step = step_of(
            asked.train, device="cuda" if device.type == "cuda" else "cpu", dtype=str(run.dtype),
            trainer="sft" if asked.task == "causal_lm" else "transformers", max_length=length,
        )  # fmt: skip
        limit = None if memory is None else int(memory * (1 - MARGIN))
        return Pricing(
            asked.train, step, limit, asked.values["batch_size"], run.task.task_type,
            getattr(transformers, run.task.auto_class),
        )  # fmt: skip

    def _most_steps(self) -> int:
        """The length of a whole run as it was asked for, or as long as it may become."""
        train = self.asked.train
        if (given := train.get("max_steps")) is not None and int(given) > 0:
            return int(given)
        epoch = max(1, self.sets.train_rows // self.asked.values["batch_size"])
        if (given := train.get("num_train_epochs")) is not None:
            return max(1, round(float(given) * epoch))
        return epoch * (1 if self.asked.values["hours"] is None else MOST_EPOCHS)

    def _clock(self, prices: Sequence[Price]) -> Clock:
        """Time a few steps of the first contestant of each kind; the others by their operations beside it.

        Kinds are real weights and adapters, on the base as it is and quantized: operations alone do not say what the many small
        products of adapters take, nor what a 4-bit weight does.
        """
        kinds: dict[Any, list[Price]] = {}
        for price in prices:
            kinds.setdefault((_real(price), price.settings.get("quantization")), []).append(price)
        step: dict[str, float] = {}
        timed: list[Clock] = []
        failed: list[str] = []
        for alike in kinds.values():
            for first in alike:
                seconds = self._timed(first, failed)
                if seconds is not None:
                    timed.append(seconds)
                    step |= {p.contestant.label: seconds.step[""] * _operations(p) / _operations(first) for p in alike}
                    break
        if not timed:
            raise TrainingSetupError(f"all {len(failed)} runs that were timed failed, the first: {failed[0]}")
        usual = statistics.fmean(step.values())  # of a kind none of which can be timed: its runs will fail
        return Clock(
            {p.contestant.label: step.get(p.contestant.label, usual) for p in prices},
            statistics.fmean(one.overhead for one in timed), statistics.fmean(one.longer for one in timed),
            len(timed) + len(failed),
        )  # fmt: skip

    def _timed(self, first: Price, failed: list[str]) -> Clock | None:
        """One contestant's times; None where it failed, and why is noted."""
        self.announce(f"timing {CLOCK_STEPS} steps of {first.contestant.label}")
        cell = self.cell(first, Task(first.contestant.label, 1e-4, CLOCK_STEPS, self.race_seed), steps=CLOCK_STEPS)
        began = time.monotonic()
        results, error = self._run(cell)
        seconds = time.monotonic() - began
        self._forget(cell)
        if results is None:
            self.announce(f"  failed: {error}")
            failed.append(f"{first.contestant.label}: {error}")
            return None
        steps = results["step_seconds"]
        return Clock({"": statistics.median(steps[1:] or steps)}, seconds - sum(steps), self._longer(results))

    def _longer(self, results: Mapping[str, Any]) -> float:
        """Seconds of judging on the evaluation rows, by those on the search rows: the metric, and all others beside it."""
        return 2 * results["judge_seconds"]["search"] * self.sets.evaluation_rows / self.sets.search_rows

    def _say_plan(self, plan: Outline, clock: Clock) -> None:
        rungs = ", ".join(f"{runs} to step {until}" for until, runs in zip(plan.rungs, plan.runs(), strict=True))
        self.announce(
            f"race: {plan.contestants} contestants at {plan.rates} rates: {rungs}; finals: {plan.finalists} and the controls, "
            f"{plan.seeds} seeds, {plan.steps} steps"
        )
        hours = self.asked.values["hours"]
        self.announce(
            f"about {plan.seconds(clock) / 3600:.2g} h{'' if hours is None else f' of {hours:g} h'}: a step {clock.mean():.3g} "
            f"s, a run's start and end {clock.overhead:.0f} s"
        )

    # --- cells ---

    def rates(self, price: Price) -> tuple[float, ...]:
        """The rates that a contestant begins with, the likeliest first."""
        plan = self.prepared.outline
        return rates_of(price.contestant, self.asked, plan.steps)[: plan.rates]

    def cell(self, price: Price, task: Task, steps: int, *, final: bool = False) -> Cell:
        """A run of the race, judged on the search rows; one of the finals on the evaluation rows, too."""
        asked = self.asked
        left_out = ("eval_dataset", "eval_split", "dataset_split", "num_train_epochs", "max_steps", "report")
        shared = {
            k: v for k, v in asked.train.items() if v is not None and k not in left_out and not k.endswith("_column")
        }
        own = {**price.contestant.settings, **price.settings, "learning_rate": task.rate}
        train = {
            **shared, **own, "task": asked.task, "dataset": self.sets.train, "max_steps": steps, "seed": task.seed,
        }  # fmt: skip
        sets = [("search", self.sets.search, False)] + ([("evaluation", self.sets.evaluation, True)] if final else [])
        measure = {
            "scores": [
                {
                    "name": name, "dataset": file, "metric": asked.metric, "max_new_tokens": asked.values["max_new_tokens"],
                    "shown": shown,
                }
                for name, file, shown in sets
            ]
        }  # fmt: skip
        inputs = {"model": self.identity, "dataset": file_digest(self.sets.train) or ""}
        contestant = replace(price.contestant, settings=own)
        until = None if final else task.until
        return Cell(price.contestant.label, task.seed, train, (), measure, inputs, contestant, until)

    def _run(self, cell: Cell, keep: bool = False) -> tuple[dict[str, Any] | None, str | None]:
        one = self.compared([], keep_models=keep)
        outcome = run_cell(one, cell, self._scans([cell], one))
        return outcome.results, outcome.error

    def _scans(self, cells: Sequence[Cell], one: Comparison) -> dict[str, Path]:
        from filelock import FileLock

        with FileLock(self.output / "scans" / ".lock"):
            return scans_for(one, cells, self.announce)

    # --- the race ---

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
            results, error = self._run(self.cell(prices[task.contestant], task, steps, final=final), keep=final)
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
                longer.append(self._longer(d.results))
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
                self._forget(self.cell(prices[d.task.contestant], d.task, self.prepared.outline.steps))

    def _forget(self, cell: Cell) -> None:
        """Remove a run's checkpoints."""
        shutil.rmtree(self.output / "cells" / cell.folder / "model", ignore_errors=True)

    def _best_so_far(self, verdicts: Sequence[Verdict], rung: int) -> None:
        best = verdicts[0].entry
        price = next(p for p in self.prepared.prices if p.contestant.label == best.contestant)
        steps = self.prepared.outline.steps
        says = f"best after {self.prepared.outline.rungs[rung]} of {steps} steps of the race; the finals are not over"
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
        results, error = self._run(cell, keep=True)
        if results is None:
            raise TrainingSetupError(
                f"{cell.label}: the winner is not on this disk, and training it again failed: {error}"
            )

    def final_outcomes(self) -> list[Outcome]:
        """The runs of the finals as a comparison's."""
        prices = {p.contestant.label: p for p in self.prepared.prices}
        found = []
        for d in self.finals():
            cell = self.cell(prices[d.task.contestant], d.task, d.task.until, final=True)
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


def _real(price: Price) -> bool:
    """Weights of the base train themselves, as a whole."""
    from ..plan import MODES

    return price.contestant.peft is None and MODES[price.contestant.mode].action == "train"


def _operations(price: Price) -> float:
    real = price.trained if _real(price) else 0
    depth = float(price.contestant.settings.get("backward_depth", 1.0))
    return relative_step(real, price.total, checkpointing=bool(price.settings["gradient_checkpointing"]), depth=depth)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
