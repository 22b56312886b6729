"""What the model will see of the rows, and what becomes of them: before it is loaded."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from ..arguments import Rest
from ..data import Cut, Piece, RowCounts, count_rows, doubts_of, pieces_of, show_rows, sources_of, without_silent
from ..errors import CheckpointError, DataError
from ..records import read_text
from ..tuner.tokenizer import load_tokenizer
from .arguments import quiet_progress, remote_options
from .encoding import UNCUT, encoded_rows
from .settle import Run, settle
from .tasks import limit_of

_SILENT = "no token carries loss (--loss-on says which do)"


def tokenizer_of(run: Run, options: argparse.Namespace) -> Any:
    """The tokenizer, with the chat template of `--chat-template-path` where that is a file.

    Raises:
        CheckpointError: the model has none.
    """
    tokenizer = load_tokenizer(options.model, **remote_options(options))
    if tokenizer is None:
        raise CheckpointError(f"{options.model}: has no tokenizer, which training on text needs.")
    template = getattr(run.args, "chat_template_path", None)
    if template is not None and Path(template).is_file():
        tokenizer.chat_template = read_text(template)
    return tokenizer


def cut_of(run: Run, options: argparse.Namespace, tokenizer: Any) -> Cut:
    """How long rows are treated: by the trainer where its arguments say so, else by the encoder."""
    args: Any = run.args
    if hasattr(args, "max_length"):
        limit = None if getattr(args, "packing", False) else args.max_length
    else:
        limit = None if run.task.rewarded else limit_of(tokenizer, options.max_length)
    return Cut(limit, getattr(args, "truncation_mode", "keep_start") == "keep_end", run.task.drops)


def encoded_run(run: Run, options: argparse.Namespace) -> Run:
    """The run with rows of language modelling as tokens, so that what is wrong with them shows before the model is loaded.
    Where the chat template comes from another model, TRL does this, after it has loaded that."""
    return _encoded(run, options)[0]


def told_run(run: Run, options: argparse.Namespace) -> tuple[Run, dict[str, RowCounts]]:
    """(`encoded_run`, {training, evaluation: what became of the rows}), which is said, too; nothing is counted where the chat
    template comes from another model."""
    run, counts = _encoded(run, options)
    if not counts and not _template_is_elsewhere(run):
        counts = counted(run, options)
    for line in lines_of(counts):
        print(line)
    return run, counts


def lines_of(counts: Mapping[str, RowCounts]) -> Iterator[str]:
    for name, found in counts.items():
        yield f"{name}: {found}"
        yield from (f"{name}: {doubt}" for doubt in found.doubts)


def _template_is_elsewhere(run: Run) -> bool:
    template = getattr(run.args, "chat_template_path", None)
    return template is not None and not Path(template).is_file()


def _encoded(run: Run, options: argparse.Namespace) -> tuple[Run, dict[str, RowCounts]]:
    if run.task.name != "causal_lm" or _template_is_elsewhere(run):
        return run, {}
    tokenizer = tokenizer_of(run, options)
    both: list[Any] = []
    counts: dict[str, RowCounts] = {}
    for name, source, rows in _sets(run, options):
        if rows is None:
            both.append(None)
            continue
        try:
            encoded = encoded_rows(rows, tokenizer, run.data)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        found = count_rows(pieces_of(encoded), cut_of(run, options, tokenizer))
        _refuse_nothing(found, source)
        counts[name] = _with_doubts(found, rows, source)
        both.append(without_silent(encoded) if found.silent else encoded)
    return dataclasses.replace(run, train_rows=both[0], eval_rows=both[1]), counts


def _with_doubts(counts: RowCounts, rows: datasets.Dataset, source: str) -> RowCounts:
    mixed = [weight for _, weight in sources_of(source)] != [1]
    return dataclasses.replace(counts, doubts=doubts_of(rows, mixed))


def _sets(run: Run, options: argparse.Namespace) -> Iterator[tuple[str, str, datasets.Dataset | None]]:
    yield "training", options.dataset, run.train_rows
    yield "evaluation", options.eval_dataset or options.dataset, run.eval_rows


def _refuse_nothing(counts: RowCounts, source: str) -> None:
    """
    Raises:
        DataError: there were rows, and none is left.
    """
    if counts.read and not counts.left:
        what = _SILENT
        if counts.filled:
            what = f"in each the prompt alone fills the {counts.limit} tokens of max_length"
        elif counts.long:
            what = f"each is longer than the {counts.limit} tokens of max_length"
        raise DataError(f"{source}: none of its {counts.read} rows is left to train on: {what}.")


def pieces_seen(run: Run, rows: datasets.Dataset, tokenizer: Any) -> Iterator[list[Piece]]:
    """What the model will see of rows in the task's standard columns, uncut."""
    labels = list(run.head.get("label2id", ()))
    if "input_ids" not in rows.column_names:
        rows = run.task.encode(rows, tokenizer, UNCUT, labels, run.data)
    for row in rows:
        yield run.task.pieces(row, tokenizer, labels)


def step_length(run: Run, counts: RowCounts) -> int:
    """Tokens of the longest row that a step may see; of what is written to be judged, those of the completion come on top."""
    return run.args.max_length if getattr(run.args, "packing", False) else counts.longest


def counted(run: Run, options: argparse.Namespace) -> dict[str, RowCounts]:
    """{training, evaluation where there are such rows: what becomes of them}.

    Raises:
        DataError: a row that the tokenizer or its template refuses; nothing is left to train on.
    """
    tokenizer = tokenizer_of(run, options)
    cut, found = cut_of(run, options, tokenizer), {}
    for name, source, rows in _sets(run, options):
        if rows is not None:
            try:
                counts = count_rows(pieces_seen(run, rows, tokenizer), cut)
            except DataError as error:
                raise DataError(f"{source}: {error}") from error
            _refuse_nothing(counts, source)
            found[name] = _with_doubts(counts, rows, source)
    return found


def shown_rows(options: argparse.Namespace, rest: Rest, plan_options: dict[str, Any], flags: Any = ()) -> str:
    """The first training rows token by token, as `--show-rows` prints them; loads no model."""
    quiet_progress()
    return first_rows(told_run(settle(options, rest, plan_options, flags), options)[0], options)


def first_rows(run: Run, options: argparse.Namespace) -> str:
    tokenizer = tokenizer_of(run, options)
    rows = run.train_rows.select(range(min(options.show_rows, len(run.train_rows))))
    return show_rows(pieces_seen(run, rows, tokenizer), tokenizer, cut_of(run, options, tokenizer))
