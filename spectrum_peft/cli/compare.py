"""The verb `compare`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..arguments import Rest, flags_of, rate, set_defaults_from, switch
from ..errors import OptionError
from ..records import write_text
from .options import check_writable, given_plan_options
from .train import VERB as TRAIN
from .train import refuse_missing
from .verb import Verb

_COMPARE_LISTS = {
    "modes": str,
    "ratios": float,
    "criteria": str,
    "seeds": int,
    "learning-rates": rate,
    "controls": str,
}


# Those of `compare.settings.KEYS` that are no flags.
_MORE_KEYS = """in the file that --config names, also:
  learning_rate_factors  multiply the rates by each of these; default 1
  contestants            more of them: mappings of name, mode (or peft: a PEFT config) and flags of train
  reference              name of a contestant: the others are held against it, seed by seed
  generate               metrics of completed prompts: exact_match, rouge_l
  generate_rows          how many prompts of the evaluation set are completed; default 100
  max_new_tokens         of a completion; default 256
  general_text           a dataset with text: what was forgotten is the loss on it, before and after
  general_split          split of a hub dataset of general text
  generation_speed       measure it before and after merging
  keep_models            keep what was trained in the cells' folders
  confidence             of the intervals over seeds; default 0.95"""


# Of a training run, and of no use where its result is only judged.
_EVAL_KEYS = ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end", "metric_for_best_model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-o",
        "--output-dir",
        metavar="FOLDER",
        help="gets the cells, results.json, results.csv, results.md, report.html",
    )
    for name, kind in _COMPARE_LISTS.items():
        add(f"--{name}", nargs="*" if name == "controls" else "+", type=kind, metavar=name.upper().replace("-", "_"))
    parser.epilog = f"{parser.epilog}\n\n{_MORE_KEYS}"
    add(
        "--metric",
        help="what the report ranks by; default accuracy for classification, micro_f1 for multi_label, macro_f1 for "
        "token_classification, else loss",
    )
    switch(parser, "--list", default=False, help="say which cells there are and which are finished; run nothing")
    add("--cell", metavar="FOLDER", help="run one cell that a comparison has prepared, in this process")


def run(options: argparse.Namespace, rest: Rest) -> None:
    if options.cell:
        _run_cell(Path(options.cell))
        return
    config = dict(rest.config or {})
    output = options.output_dir or config.pop("output_dir", None)
    config.pop("output_dir", None)
    if not isinstance(output, str) or not output:
        raise OptionError(
            "--output-dir is missing." if output is None else f"output_dir is {output!r}, wanted a folder."
        )
    from .. import compare
    from ..train.arguments import task_for

    given = {key: config.pop(key) for key in list(config) if key in compare.KEYS}
    for key in compare.KEYS:
        if getattr(options, key, None) is not None:
            given[key] = getattr(options, key)
    for word in rest.argv:
        key = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and key in compare.KEYS:
            raise OptionError(f"{word}: {key} has no flag; it stands in the file that --config names.")
    shared, trainer = _train_options(config, rest.argv, rest.source)
    refuse_missing(shared, trainer, ("model", "dataset"))
    check_writable(Path(output) / "report.html")
    train = {name: value for name, value in vars(shared).items() if not (value is None or value is False)}
    comparison = compare.read_comparison(
        given, train={**train, **(trainer.config or {})}, arguments=trainer.argv, task=task_for(shared),
        output=Path(output), source=rest.source,
    )  # fmt: skip
    if options.list:
        print(compare.list_cells(comparison, check=_checker(comparison)))
        return
    results = compare.run_comparison(comparison, check=_checker(comparison))
    print()
    print(compare.as_markdown(results))
    print(f"wrote {output}/report.html, results.json, results.csv, results.md")


def _train_options(config: dict[str, Any], argv: Sequence[str], source: str) -> tuple[argparse.Namespace, Rest]:
    """Flags of `train` from a mapping and a command line, and what goes to the trainer's own arguments."""
    parser = TRAIN.parser()
    unknown = set_defaults_from(parser, source, config)
    options, rest = parser.parse_known_args(list(argv))
    return options, Rest(tuple(rest), unknown, source)


def _checker(comparison: Any) -> Callable[[Any], None]:
    """What refuses a cell's settings before any cell is run; datasets are read once."""
    from .. import compare
    from ..train.arguments import quiet_progress
    from ..train.settle import settle

    quiet_progress()
    flags = [*flags_of(TRAIN.parser()), *(f"--{key.replace('_', '-')}" for key in compare.KEYS)]
    read: dict[Any, Any] = {}

    def check(cell: Any) -> None:
        options, rest = _train_options(dict(cell.train), cell.arguments, comparison.source)
        options.output_dir = str(comparison.output)
        data = tuple(v for k, v in vars(options).items() if k.endswith(("dataset", "split", "column", "task")))
        with tempfile.TemporaryDirectory() as scratch:
            if cell.peft is not None:
                options.peft_config = str(Path(scratch) / "peft.json")
                write_text(options.peft_config, json.dumps(dict(cell.peft)))
            run = settle(options, rest, given_plan_options(options), flags, read.get(data))
        if data not in read:
            compare.check_measures(comparison, run)
        read[data] = run.train_rows, run.eval_rows

    return check


def _run_cell(folder: Path) -> None:
    from .. import compare

    cell, settings = compare.read_cell(folder)

    def train() -> None:
        TRAIN.run(["--config", str(folder / "train.yaml"), *cell["arguments"]])

    def options_for(model: str) -> tuple[argparse.Namespace, Rest, list[str]]:
        config = {key: value for key, value in settings.items() if key not in _EVAL_KEYS}
        options, rest = _train_options(config, cell["arguments"], str(folder / "train.yaml"))
        options.model = model
        return options, rest, flags_of(TRAIN.parser())

    compare.measure(folder, train=train, options_for=options_for)


VERB = Verb(
    "compare",
    "compare --config FILE [flags]   |   compare --model MODEL --dataset D -o FOLDER [flags]",
    "train in every mode, and in ways that a claim must beat, on your own task; tables, pictures and a report",
    "compare --config compare.yaml",
    add_arguments,
    run,
    passes_on=True,
    reads_config=True,
)
