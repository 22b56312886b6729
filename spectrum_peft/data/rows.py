"""Datasets are read and brought into the standard columns of a task."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, near_here, near_matches, no_such, one_line, quoted
from ..hub import may_be_id
from ..records import is_file, mode_of
from .formats import EXTRAS, converted, is_sharegpt
from .json_files import check_json, refuse_fault

if TYPE_CHECKING:
    from datasets import Dataset

# The standard names of columns; each can be renamed by a flag of the command line (`--text-column body`).
COLUMNS = ("text", "prompt", "completion", "messages", "label", "chosen", "rejected", "tokens", "tags")
# Columns of other projects' layouts, which `formats.converted` brings into standard ones.
_FOREIGN = ("conversations", "instruction", "output")
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# Task -> sets of columns that it can read, the preferred one first.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "causal_lm": (
        ("messages",),
        ("prompt", "completion"),
        ("conversations",),
        ("instruction", "output"),
        ("text",),
    ),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "kto": (("prompt", "completion", "label"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "reward": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "grpo": (("prompt",),),
    "seq2seq": (("prompt", "completion"),),
    "classification": (("text", "label"),),
    "multi_label": (("text", "label"),),
    "regression": (("text", "label"),),
    "token_classification": (("tokens", "tags"),),
}
# What standard columns are often called, the likelier first.
_LIKELY = {
    "text": ("sentence", "content", "review", "body", "document"),
    "prompt": ("question", "query", "instruction", "input"),
    "completion": ("answer", "response", "output", "target", "summary"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "label": ("labels", "class", "category", "target", "score"),
    "chosen": ("preferred", "accepted", "chosen_response"),
    "rejected": ("dispreferred", "rejected_response"),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "chunk_tags", "labels"),
}
# Tasks whose other columns go along: reward functions read them.
_KEEPS_ALL = frozenset({"grpo"})
# Columns without which there is nothing to learn from or to judge; prompts may be empty.
_LEARNED = ("text", "completion", "messages", "chosen", "tokens")


def read_dataset(source: str, split: str = "train") -> Dataset:
    """Read a dataset from the hub, from a local folder, or from one local file: `.jsonl`, `.json`, `.csv`, `.parquet`, or
    `.txt`, a row for each paragraph.

    Args:
        source: a path or a hub id.
        split: as `datasets` reads it, `validation` or `train[:100]`; a single file is the split `train`.
    Raises:
        DataError: not there, of another kind, not readable, or without rows.
    """
    import datasets

    path = Path(source)
    try:
        if is_file(path) or path.suffix in _READERS:
            if path.suffix not in _READERS:
                raise DataError(f"{source}: a dataset file ends in one of {sorted(_READERS)}, not in {path.suffix!r}.")
            if not is_file(path):
                raise DataError(no_such("file", path))
            _check_split(source, split)
            if path.stat().st_size == 0:
                raise DataError(f"{source}: the file is empty.")
            if _READERS[path.suffix] != "parquet":
                _check_text(path)
            if _READERS[path.suffix] == "json":
                check_json(path)
            how = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
            dataset = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split=split, **how)
            if _READERS[path.suffix] == "parquet":
                dataset.data.validate(full=True)  # text that is no UTF-8, too
        elif is_file(path / "config.json") and any(path.glob("*.safetensors")):
            raise DataError(f"{source}: is the folder of a model, wanted rows.")
        elif not mode_of(path) and not may_be_id(source):
            raise DataError(no_such("file or folder", source))
        else:
            dataset = datasets.load_dataset(source, split=split)
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow and huggingface_hub each have their own tree of errors
        if _READERS.get(path.suffix) == "json" and is_file(path):
            refuse_fault(path)
        cause = error.__cause__ or error
        what = "" if mode_of(path) else "no such file or folder here, and "
        near = near_here(path) if what else ""
        raise DataError(
            f"{source}: {what}not readable as a dataset ({type(cause).__name__}: {one_line(cause)}).{near}"
        ) from error
    return dataset


def _check_split(source: str, split: str) -> None:
    """
    Raises:
        DataError: a split that one file does not have.
    """
    names = re.findall(r"(?:^|\+)\s*([^\[+]*)", split)
    other = next((name.strip() for name in names if name.strip() != "train"), None)
    if other is not None:
        raise DataError(
            f"{source}: is one file and has no split {other!r}: all its rows are 'train', and a part of them 'train[:90%]' or "
            "'train[90%:]'. Rows for judging may be in a file of their own (--eval-dataset)."
        )


def _check_text(path: Path) -> None:
    """Raise a DataError where a text file is blank, or not UTF-8: pyarrow takes such bytes, and who reads the row fails."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at, blank = 0, True
    with path.open("rb") as file:
        while True:
            piece = file.read(1 << 20)
            try:
                blank &= not decoder.decode(piece, final=not piece).strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: byte {max(at + error.start, 0):,} is not UTF-8 ({error.reason}).") from error
            if not piece:
                break
            at += len(piece)
    if blank:
        raise DataError(f"{path}: the file holds nothing but blank lines.")


def select_columns(dataset: Dataset, task: str, source: str, renamed: Mapping[str, str] | None = None) -> Dataset:
    """Bring a dataset into the standard columns of a task.

    Of several formats that a dataset offers, the one with the most renamed columns is taken, then the preferred one.

    Args:
        renamed: standard name -> name in this dataset, for those that the user gave.
    Returns:
        The dataset with the columns of one format (for `messages`, also those that chat templates read).
    Raises:
        DataError: a named column is not there, no format fits, or a column holds nulls, another type, or blanks only.
    """
    renamed = dict(renamed or {})
    present = list(dataset.column_names)
    for standard, name in renamed.items():
        if name not in present:
            raise DataError(f"{source}: no column {name!r} (--{standard}-column)." + near_matches(name, present))
    found = {name: renamed.get(name, name) for name in (*COLUMNS, *_FOREIGN) if renamed.get(name, name) in present}
    usable = [f for f in FORMATS[task] if all(name in found for name in f)]
    if not usable:
        wanted = " or ".join("/".join(f) for f in FORMATS[task])
        raise DataError(
            f"{source}: no usable column for task {task!r}: it has {present}, wanted {wanted}; name yours with "
            + ", ".join(f"--{name}-column" for name in COLUMNS if any(name in f for f in FORMATS[task]))
            + "."
            + _likely(FORMATS[task], found, present)
        )
    chosen = max(usable, key=lambda f: sum(name in renamed for name in f))  # the first of the best
    if chosen == ("messages",) and is_sharegpt(dataset.features[found["messages"]]):
        chosen, found["conversations"] = ("conversations",), found["messages"]
    kept = [found[name] for name in chosen]
    _refuse_mixed(dataset, kept, source)
    extras = present if task in _KEEPS_ALL else EXTRAS.get(chosen, ())
    kept += [name for name in extras if name in present and name not in kept]
    dataset = dataset.select_columns(kept)
    dataset = dataset.rename_columns({found[standard]: standard for standard in chosen})
    for name in set(chosen) & set(_FOREIGN):
        _check_column(dataset, name, source, task, found[name])
    called = {**found, **{ours: found[theirs] for theirs, ours in _BECOMES.items() if theirs in chosen}}
    dataset, chosen = converted(dataset, chosen, source)
    for standard in chosen:
        name = called.get(standard, standard)
        _check_column(dataset, standard, source, task, name)
        if standard in _LEARNED and len(dataset) and not any(map(_says_something, dataset[standard])):
            raise DataError(f"{source}: column {name!r} holds no text in any of {len(dataset)} rows.")
        if standard == "messages" and len(dataset) and not any(map(_answers_something, dataset[standard])):
            raise DataError(f"{source}: no answer in column {name!r} holds text, in any of {len(dataset)} rows.")
    return dataset


# Columns of other layouts -> what `formats.converted` makes of them; an error names the file's own.
_BECOMES = {"conversations": "messages", "instruction": "prompt", "output": "completion"}


def _likely(formats: Sequence[tuple[str, ...]], found: Mapping[str, str], present: Sequence[str]) -> str:
    """Flags that make the columns that are there a format, by what such columns are often called; `""` where none do."""
    for wanted in formats:
        flags, taken = [], {found[name] for name in wanted if name in found}
        for name in wanted:
            if name not in found:
                likely = next((c for c in _LIKELY.get(name, ()) if c in present and c not in taken), None)
                if likely is None:
                    break
                taken.add(likely)
                flags.append(f"--{name}-column {likely}")
        else:
            return f" Did you mean {' '.join(flags)}?"
    return ""


def _refuse_mixed(dataset: Dataset, chosen: Sequence[str], source: str) -> None:
    """
    Raises:
        DataError: a row lacks one of the chosen columns and has others, which a row with that column lacks.
    """
    for name in chosen:
        nulls = _nulls(dataset, name)
        if not 0 < nulls < len(dataset):
            continue
        is_null = [value is None for value in dataset[name]]
        without, having = is_null.index(True), is_null.index(False)
        rows = [{key for key, value in dataset[i].items() if value is not None} for i in (without, having)]
        if rows[0] - rows[1]:
            raise DataError(
                f"{source}: column {name!r} is empty in {nulls} of {len(dataset)} rows: rows of two layouts are "
                f"mixed, row {having + 1} has {sorted(rows[1])} and row {without + 1} has {sorted(rows[0])}; wanted one "
                "layout in a file."
            )


def _says_something(value: str | list[Any]) -> bool:
    """Whether a text, one of the messages of a chat, or one of several words has more than white space."""
    parts = [value] if isinstance(value, str) else [m.get("content") if isinstance(m, Mapping) else m for m in value]
    return any(part.strip() if isinstance(part, str) else part for part in parts)


def _answers_something(chat: list[Any]) -> bool:
    """Whether there is something to learn in a chat: an answer with text, or with what is no text; or no turns of roles."""
    answers = [m for m in chat if not isinstance(m, Mapping) or m.get("role") in (None, "assistant")]
    return not answers or any(
        not isinstance(m, Mapping) or m.get("tool_calls") or _says_something([m]) for m in answers
    )


def _nulls(dataset: Dataset, name: str) -> int:
    column = dataset.with_format("arrow")[name]
    return int(sum(chunk.null_count for chunk in column.chunks) if hasattr(column, "chunks") else column.null_count)


def _check_column(dataset: Dataset, name: str, source: str, task: str, called: str) -> None:
    """
    Args:
        name: standard, or of another layout. called: what the file calls it.
    """
    import datasets

    if nulls := _nulls(dataset, name):
        row = next(i for i, value in enumerate(dataset[name]) if value is None)
        raise DataError(f"{source}: column {called!r} is empty in {nulls} of {len(dataset)} rows, first in {row + 1}.")
    feature = dataset.features[name]
    dtype = getattr(feature, "dtype", None)
    is_chat = isinstance(feature, datasets.List | list)
    fits = {
        "text": dtype in {"string", "large_string"},
        "prompt": dtype in {"string", "large_string"} or is_chat,
        "completion": dtype in {"string", "large_string"} or is_chat,
        "messages": is_chat,
        "chosen": dtype in {"string", "large_string"} or is_chat,
        "rejected": dtype in {"string", "large_string"} or is_chat,
        "conversations": is_chat,
        "instruction": dtype in {"string", "large_string"},
        "output": dtype in {"string", "large_string"},
        "label": _fits_label(feature, task),
        "tokens": is_chat and getattr(_inner(feature), "dtype", None) in {"string", "large_string"},
        "tags": is_chat and _is_label(_inner(feature)),
    }
    if not fits[name]:
        wanted = _WANTED_LABELS.get(task, _WANTED[name]) if name == "label" else _WANTED[name]
        raise DataError(f"{source}: column {called!r} holds {quoted(feature)}, wanted {wanted}.")
    if is_chat and name not in (*_CHATS, "conversations"):
        for i, values in enumerate(dataset[name], 1):
            if None in values:
                raise DataError(f"{source}: column {called!r}, row {i}: holds a null, wanted {_inner(feature).dtype}.")
    if is_chat and name in _CHATS:
        for i, chat in enumerate(dataset[name], 1):
            problem = _problem_of_chat(chat)
            if problem:
                raise DataError(f"{source}: column {called!r}, row {i}: {problem}, wanted {_WANTED['messages']}.")


def _fits_label(feature: Any, task: str) -> bool:
    if task == "multi_label":
        return hasattr(feature, "feature") and _is_label(_inner(feature))
    dtype = str(getattr(feature, "dtype", None))
    if task == "regression":
        return dtype.startswith(("int", "uint", "float"))
    return dtype == "bool" if task == "kto" else _is_label(feature)


def _inner(feature: Any) -> Any:
    """What a list holds."""
    return feature.feature if hasattr(feature, "feature") else feature[0]


def _is_label(feature: Any) -> bool:
    return hasattr(feature, "int2str") or str(getattr(feature, "dtype", None)).removeprefix("large_") in _LABEL_DTYPES


def _problem_of_chat(chat: Sequence[Any]) -> str | None:
    if not chat:
        return "has no message"
    for message in chat:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"{quoted(message)} has no role"
        # Without content: a call of a tool. In parts: text and images.
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            return f"{quoted(message)} has no content"
    return None


_CHATS = ("prompt", "completion", "messages", "chosen", "rejected")
_LABEL_DTYPES = {"string", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
_WANTED = {
    "text": "strings",
    "prompt": "strings or lists of messages",
    "completion": "strings or lists of messages",
    "messages": "lists of messages with role and content",
    "chosen": "strings or lists of messages",
    "rejected": "strings or lists of messages",
    "conversations": "lists of turns with from and value",
    "instruction": "strings",
    "output": "strings",
    "label": "strings or integers (--task regression learns numbers, --task multi_label lists of labels)",
    "tokens": "lists of strings, a word each",
    "tags": "lists of strings or integers, one for each word",
}
_WANTED_LABELS = {
    "multi_label": "lists of strings or integers",
    "regression": "numbers",
    "kto": "true or false: whether the completion is wanted",
}
