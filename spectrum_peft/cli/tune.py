"""The verb `tune`, and the same as a function."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..arguments import Rest, flags_of
from ..errors import OptionError
from .compare import _train_options
from .options import check_writable, given_plan_options
from .train import VERB as TRAIN
from .train import refuse_missing
from .verb import Verb

if TYPE_CHECKING:
    from ..tuning import Tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-o",
        "--output-dir",
        metavar="FOLDER",
        help="gets recipe.yaml, model/, report.html, and all that the tune keeps",
    )
    add("--memory", metavar="SIZE", help="of the device, say 24GiB; default: what is free of it now")
    add("--hours", type=float, metavar="H", help="of work, over all processes; default: no limit")
    add(
        "--metric",
        help="loss, accuracy, macro_f1, exact_match, rouge_l, or your own module:function; default as in compare",
    )
    add("--better", help="of your own function: higher or lower; default higher")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="rows of an optimizer step; default 8; micro-batches are found by the memory",
    )
    add(
        "--contestants",
        nargs="+",
        metavar="NAME",
        help="some of those that are there by default; a file may spell out others",
    )
    add(
        "--learning-rates",
        nargs="+",
        type=float,
        metavar="X",
        help="the grid for all; default: four for each, about the default of its mode",
    )
    add("--finalists", type=int, metavar="N", help="beside plain LoRA and a random choice; default 3")
    add("--seeds", nargs="+", type=int, metavar="N", help="of the finals, at least three; default 0 1 2")
    add("--race-seed", type=int, metavar="N", help="of every run of the race; default 1000")
    add(
        "--search-rows",
        type=int,
        metavar="N",
        help="training rows that the search judges by; default a tenth, at most 200",
    )
    add("--error", type=float, metavar="P", help="chance that a test stops the best one; default 0.05")
    add(
        "--storage",
        metavar="URL",
        help="of a database that several processes share; default: a file in the output folder",
    )
    add("--max-new-tokens", type=int, metavar="N", help="of a completion, for exact_match and rouge_l; default 256")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from .. import tuning

    config = dict(rest.config or {})
    output = options.output_dir or config.pop("output_dir", None)
    config.pop("output_dir", None)
    given = {key: config.pop(key) for key in list(config) if key in tuning.KEYS}
    for key in tuning.KEYS:
        if getattr(options, key, None) is not None:
            given[key] = getattr(options, key)
    print(tuning.summary(_tune(given, {**config, **as_mapping(rest.argv)}, output, rest.source), Path(output)))


def tune(
    model: str,
    dataset: str,
    *,
    output_dir: str | os.PathLike[str] = "tuned",
    **settings: Any,
) -> dict[str, Any]:
    """Find the best way to train a model on a dataset: which method, which matrices, which rate.

    What fits into the memory is priced by a dry run; contestants at several learning rates race on training rows that are set
    aside, by successive halving with a test; the finalists run at full length with several seeds, beside plain LoRA and a random
    choice. Called again with the same arguments it goes on where it was ended.

    Args:
        model: hub id or folder. dataset: hub id or file.
        output_dir: gets `recipe.yaml`, the trained winner in `model/`, `report.html`, `results.json`.
        settings: `memory` ("24GiB"), `hours`, `metric`, `batch_size`, `contestants`, `learning_rates`, `finalists`, `seeds`,
            `race_seed`, `search_rows`, `error`, `storage`, `better`, `max_new_tokens`; every other one is a flag of `train` or
            of the trainer's own arguments.
    Returns:
        What `results.json` holds: the comparison of the finalists, and in `tune` the `winner`, its `rate` and the `sentence`.
    Raises:
        OptionError, DataError, CheckpointError, InstallError: before anything is trained.
        TrainingSetupError, ComparisonError: all runs of a stage failed.
    """
    from .. import tuning

    given = {key: settings.pop(key) for key in list(settings) if key in tuning.KEYS}
    return _tune(given, {"model": model, "dataset": dataset, **settings}, os.fspath(output_dir), "tune()")


def as_mapping(argv: Sequence[str]) -> dict[str, Any]:
    """Flags of the trainer's own arguments as keys of a config file: `--max-steps 3` is max_steps: 3, a flag alone is true.

    Raises:
        OptionError: a word that belongs to no flag.
    """
    found: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.removeprefix("--").partition("=")
            name = flag.replace("-", "_")
            found[name] = [value] if equals else []
        elif name:
            found[name].append(word)
        else:
            raise OptionError(f"unknown argument {word!r}.")
    read = {key: [_value_of(v) for v in values] for key, values in found.items()}
    return {key: True if not values else values[0] if len(values) == 1 else values for key, values in read.items()}


def _value_of(text: str) -> Any:
    """A word of the command line as a YAML file would have it; what is no number, list or the like there is text."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float | str | list | dict) else text


def _tune(given: Mapping[str, Any], train: Mapping[str, Any], output: Any, source: str) -> dict[str, Any]:
    from .. import tuning

    one = opened(given, train, output, source)
    one.prepare()
    one.work()
    return tuning.finish(one)


def opened(given: Mapping[str, Any], train: Mapping[str, Any], output: Any, source: str) -> Tune:
    """A tune, checked as far as can be before anything is run, its folder taken.

    Args:
        given: values of `tuning.KEYS`. train: keys of `train`. output: folder. source: where they stand, for messages.
    Raises:
        OptionError, DataError, CheckpointError, InstallError.
    """
    from .. import compare, plots, tuning
    from ..compare.matrix import Cell, Contestant, contestants_of
    from ..compare.runs import inputs_of
    from ..train.arguments import quiet_progress, task_for
    from ..train.judge import require_scikit_learn
    from ..train.preview import counted, lines_of, step_length
    from ..train.settle import settle
    from ..tuning.queue import require_optuna

    if not isinstance(output, str) or not output:
        raise OptionError(
            "--output-dir is missing." if output is None else f"output_dir is {output!r}, wanted a folder."
        )
    require_optuna()
    plots.require_matplotlib()
    shared, trainer = _train_options(dict(train), (), source)
    refuse_missing(shared, trainer, ("model", "dataset"))
    check_writable(Path(output) / "report.html")
    known = {name: value for name, value in vars(shared).items() if not (value is None or value is False)}
    asked = tuning.read_tune(
        given, train={**known, **(trainer.config or {})}, task=task_for(shared), output=Path(output), source=source
    )
    quiet_progress()
    flags = [*flags_of(TRAIN.parser()), *(f"--{key.replace('_', '-')}" for key in tuning.KEYS)]
    with tempfile.TemporaryDirectory() as scratch:
        shared.output_dir, shared.mode = scratch, "lora"
        settled = settle(shared, trainer, given_plan_options(shared), flags)
    if settled.task.head is not None:
        require_scikit_learn()

    def compared(rows: Sequence[Mapping[str, Any]], **changes: Any) -> Any:
        generated = [asked.metric] if asked.metric in ("exact_match", "rouge_l") else []
        own = changes.pop("train", asked.train)
        wanted = {
            "modes": [], "controls": [], "contestants": list(rows), "metric": asked.metric, "generate": generated, **changes,
        }  # fmt: skip
        return compare.read_comparison(
            wanted, train=own, arguments=(), task=asked.task, output=asked.output, source=source
        )

    def made(rows: Sequence[Mapping[str, Any]]) -> list[Contestant]:
        rated = {row.get("name") for row in rows if "learning_rate" in row or "learning-rate" in row}
        found = contestants_of(compared(rows))
        bare = [{k: v for k, v in c.settings.items() if k != "learning_rate" or c.label in rated} for c in found]
        return [Contestant(c.label, settings, c.control, c.peft) for c, settings in zip(found, bare, strict=True)]

    def check(cell: Cell) -> None:
        options, rest = _train_options(dict(cell.train), (), source)
        with tempfile.TemporaryDirectory() as folder:
            options.output_dir = folder
            if cell.peft is not None:
                options.peft_config = str(Path(folder) / "peft.yaml")
                Path(options.peft_config).write_text(yaml.safe_dump(dict(cell.peft)))
            settle(options, rest, given_plan_options(options), flags, (settled.train_rows, None))

    def rows() -> tuple[list[str], int]:
        found = counted(settled, shared)
        return list(lines_of(found)), step_length(settled, found["training"])

    one = tuning.Tune(
        asked, settled, inputs_of(compared([]))["model"], compared=compared, made=made, check=check, counted=rows,
        announce=_say,
    )  # fmt: skip
    one.open()
    return one


def _say(line: str) -> None:
    print(line, flush=True)


VERB = Verb(
    "tune",
    "tune --model MODEL --dataset D -o FOLDER [flags]",
    "find the best way to train on your data within your memory and hours, by racing; a recipe, the model, a report",
    "tune --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset train.jsonl --memory 24GiB --hours 2 -o tuned",
    add_arguments,
    run,
    passes_on=True,
    reads_config=True,
)
