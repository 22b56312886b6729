"""What lies beside the weights in an exported folder: config, tokenizer; written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import names
from ..errors import OptionError
from ..records import TOKENIZER_FILES, check_files_beside, own_file, write_text
from ..weights import FileWeights
from ..weights.updates import Update, Value
from .adapters import TrainedAdapter
from .rewrite import main_dtype
from .tables import is_language_head, new_shape, table_rows

_BESIDE = re.compile(
    r"generation_config\.json|(.*_)?processor_config\.json|preprocessor_config\.json|LICENSE.*|NOTICE.*|USE_POLICY.*",
    re.IGNORECASE,
)
# What a model class with a new head adds to the config of its body.
_HEAD_FIELDS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")
_CLASS_OF_TASK = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


# --- configs and other files -----------------------------------------------------------------------------------------


def merged_config(
    files: FileWeights,
    source: TrainedAdapter,
    changes: Mapping[str, Sequence[Update]],
    untied: Mapping[str, str],
    cast: torch.dtype | None,
) -> dict[str, Any]:
    """The base's config with what the merge makes different."""
    config: dict[str, Any] = json.loads(json.dumps(files.config))
    scopes = [config, *(part for part in config.values() if isinstance(part, dict) and "vocab_size" in part)]
    rows = table_rows(files, changes)
    for old, new in rows.items():
        for scope in scopes:
            if scope.get("vocab_size") == old:
                scope["vocab_size"] = new
    if untied:
        config["tie_word_embeddings"] = False
        for scope in scopes[1:]:
            if "tie_word_embeddings" in scope:
                scope["tie_word_embeddings"] = False
    quantized = bool(config.pop("quantization_config", None))
    if cast is not None or quantized:
        said = str(cast or main_dtype(files)).removeprefix("torch.")
        for scope in scopes:
            for key in ("dtype", "torch_dtype"):
                if key in scope:
                    scope[key] = said
        if not {"dtype", "torch_dtype"} & set(config):
            config["dtype"] = said
    heads = {n: mine for n, mine in changes.items() if names.in_head(n) and mine and isinstance(mine[0], Value)}
    present = {t.name: t for t in files.tensors()}
    replaced = {n for n in heads if (new_shape(heads[n]) != present[n].shape if n in present else n not in untied)}
    if {n for n in replaced if n not in present or not is_language_head(n)}:
        _describe_head(config, files, source, {n: heads[n] for n in replaced})
    return config


def _describe_head(
    config: dict[str, Any], files: FileWeights, source: TrainedAdapter, heads: Mapping[str, Sequence[Update]]
) -> None:
    """Name the class and the labels of a head that the base lacks or has in another size."""
    described = source.described
    adapter = source.state.config
    for key in _HEAD_FIELDS:
        if described.get(key) is not None:
            config[key] = described[key]
    named = described.get("architectures")
    if named in (None, files.config.get("architectures")):  # a config saved without its model keeps the body's class
        mapping = adapter.get("auto_mapping") or {}
        found = mapping.get("base_model_class") or _class_of_task(config.get("model_type"), adapter.get("task_type"))
        if found:
            config["architectures"] = [found]
    labels = [new_shape(mine)[0] for name, mine in heads.items() if len(new_shape(mine)) == 2]
    if labels and "id2label" not in described and adapter.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        last = labels[-1]
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(last)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(last)}


def _class_of_task(model_type: str | None, task: str | None) -> str | None:
    if task not in _CLASS_OF_TASK or model_type is None:
        return None
    from transformers.models.auto import modeling_auto

    named: str | None = getattr(modeling_auto, _CLASS_OF_TASK[task]).get(model_type)
    return named


def write_config(files: FileWeights, config: Mapping[str, Any], folder: Path) -> None:
    assert files.folder is not None
    if config == files.config:
        copy_entry(files.folder / "config.json", folder)
    else:
        write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def copy_beside(files: FileWeights, source: TrainedAdapter, folder: Path) -> None:
    """The base's configs for generation and processing, its licence and custom code; the adapter's or its tokenizer."""
    assert files.folder is not None
    base = _with_tokenizer(files)
    own = source.state.folder
    for read in (base, own):
        if read is not None:
            check_files_beside(read)
    tokenized = own is not None and any(
        (own / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    )
    for entry in sorted(base.iterdir()):
        code = entry.suffix == ".py" and "auto_map" in files.config
        if _BESIDE.fullmatch(entry.name) or code or (TOKENIZER_FILES.fullmatch(entry.name) and not tokenized):
            copy_entry(entry, folder)
    if own is not None:
        for entry in sorted(own.iterdir()):
            if TOKENIZER_FILES.fullmatch(entry.name) and (tokenized or entry.name.startswith("chat_template.")):
                copy_entry(entry, folder)


def _with_tokenizer(files: FileWeights) -> Path:
    """The base's folder; of a hub id, the small files that reading the weights did not fetch are fetched."""
    assert files.folder is not None
    if files.folder.parent.name != "snapshots":
        return files.folder
    from ..weights import fetch

    assert files.model_id is not None
    return fetch(
        files.model_id,
        files.revision,
        ("*.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.jinja", "*.py", "LICENSE*"),
    )


def copy_entry(entry: Path, folder: Path) -> None:
    """Copy a file, or a folder with all that is in it, into another folder.

    Raises:
        CheckpointError: it is, or holds, a link to somewhere else, or a pipe or device; see `records.own_file`.
    """
    if entry.is_dir() and not entry.is_symlink():
        (folder / entry.name).mkdir(exist_ok=True)
        for inner in sorted(entry.iterdir()):
            copy_entry(inner, folder / entry.name)
        return
    shutil.copyfile(own_file(entry), folder / entry.name)


def checked_out(out: str | os.PathLike[str] | None) -> Path:
    if out is None:
        raise OptionError("out is missing: the folder to write.")
    path = Path(os.path.realpath(out))
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise OptionError(f"{path}: exists and is not empty; choose another folder, or remove it.")
    return path
