"""Training tasks: what a dataset must look like, how it becomes batches, which trainer runs it, how it is judged.

A task is a row of `TASKS`. Everything that differs between language modelling, sequence-to-sequence and classification
stands in its row or in the three small functions that the row names; the command line has no `if task ==` of its own.
torch, transformers, trl and datasets are imported inside functions: `--help` reads the table without them.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError, InstallError, OptionError, near_matches

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

# The standard names of columns; each can be renamed by a flag of the command line (`--text-column body`).
COLUMNS = ("text", "prompt", "completion", "messages", "label")
# TRL hands these to the chat template when they are there.
_CHAT_EXTRAS = ("tools", "chat_template_kwargs")
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_DEFAULT_MAX_LENGTH = 512  # tokens; for the tasks whose training arguments have no field for it
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")
_MODEL_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "labels", "seq_lengths"})
IGNORED = -100  # label of a position that takes no part in the loss, as in torch and transformers


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    Attributes:
        task_type: PEFT's name of the task.
        auto_class: class of transformers that loads a model for it.
        arguments, trainer: (module, name) of the training arguments and of the trainer.
        formats: sets of columns that the task can read, the preferred one first.
        prepare: (trainer keywords so far, model, tokenizer, max_length) -> trainer keywords; tokenizes and collates.
        judge: (model, batches) -> metrics.
        labelled: it predicts one of the labels that the model's head names.
    """

    name: str
    task_type: str
    auto_class: str
    arguments: tuple[str, str]
    trainer: tuple[str, str]
    formats: tuple[tuple[str, ...], ...]
    prepare: Callable[..., dict[str, Any]]
    judge: Callable[[Any, Iterable[Mapping[str, Any]]], dict[str, float]]
    labelled: bool = False

    def arguments_class(self) -> type[TrainingArguments]:
        return getattr(importlib.import_module(self.arguments[0]), self.arguments[1])

    def trainer_class(self) -> type[Trainer]:
        return getattr(importlib.import_module(self.trainer[0]), self.trainer[1])


def task_of(config: PretrainedConfig | Mapping[str, Any], source: str) -> str:
    """The task that a checkpoint's `architectures` says.

    Args:
        config: of the checkpoint, as transformers' object or as plain data.
        source: name of the checkpoint for the error.
    Raises:
        OptionError: the architecture says none (a bare encoder, a vision model): it must be given.
    """
    data = config if isinstance(config, Mapping) else config.to_dict()
    architectures = data.get("architectures") or []
    for name in architectures:
        if name.endswith("ForSequenceClassification"):
            return "classification"
        if data.get("is_encoder_decoder") and name.endswith(("ForConditionalGeneration", "WithLMHeadModel")):
            return "seq2seq"
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal_lm"
    raise OptionError(
        f"{source}: architectures {architectures} in config.json say no task; pass --task, one of {sorted(TASKS)}."
    )


def has_classifier(config: PretrainedConfig) -> bool:
    """Whether the checkpoint comes with a head for classes; without one a new one is drawn at random."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


# --- datasets --------------------------------------------------------------------------------------------------------


def read_dataset(source: str, split: str = "train") -> Dataset:
    """Read a dataset from the hub, from a local folder, or from one local `.jsonl`, `.json`, `.csv` or `.parquet` file.

    Args:
        source: a path or a hub id.
        split: as `datasets` reads it, `validation` or `train[:100]`; a single file is the split `train`.
    Raises:
        DataError: not there, of another kind, not readable, or without rows.
    """
    import datasets

    path = Path(source)
    try:
        if path.is_file() or path.suffix in _READERS:
            if path.suffix not in _READERS:
                raise DataError(f"{source}: a dataset file ends in one of {sorted(_READERS)}, not in {path.suffix!r}.")
            if not path.is_file():
                raise DataError(f"{source}: no such file.")
            if path.stat().st_size == 0:
                raise DataError(f"{source}: the file is empty.")
            dataset = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split=split)
        else:
            dataset = datasets.load_dataset(source, split=split)
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow and huggingface_hub each have their own tree of errors
        cause = error.__cause__ or error
        raise DataError(f"{source}: not readable as a dataset ({type(cause).__name__}: {_one_line(cause)}).") from error
    return dataset


def select_columns(dataset: Dataset, task: str, source: str, renamed: Mapping[str, str] | None = None) -> Dataset:
    """Bring a dataset into the standard columns of a task.

    Of several formats that a dataset offers, the one with the most renamed columns is taken, then the preferred one.

    Args:
        renamed: standard name -> name in this dataset, for those that the user gave.
    Returns:
        The dataset with the columns of one format (for `messages`, also those that chat templates read).
    Raises:
        DataError: a named column is not there, no format fits, or a column holds nulls or another type.
    """
    renamed = dict(renamed or {})
    present = list(dataset.column_names)
    for standard, name in renamed.items():
        if name not in present:
            raise DataError(f"{source}: no column {name!r} (--{standard}-column)." + near_matches(name, present))
    found = {name: renamed.get(name, name) for name in COLUMNS if renamed.get(name, name) in present}
    usable = [f for f in TASKS[task].formats if all(name in found for name in f)]
    if not usable:
        wanted = " or ".join("/".join(f) for f in TASKS[task].formats)
        raise DataError(
            f"{source}: no usable column for task {task!r}: it has {present}, wanted {wanted}; "
            "name yours with --text-column, --prompt-column, --completion-column, --messages-column, --label-column."
        )
    chosen = max(usable, key=lambda f: sum(name in renamed for name in f))  # the first of the best
    kept = [found[name] for name in chosen]
    if "messages" in chosen:
        kept += [name for name in _CHAT_EXTRAS if name in present]
    dataset = dataset.select_columns(kept)
    dataset = dataset.rename_columns({found[standard]: standard for standard in chosen})
    for standard in chosen:
        _check_column(dataset, standard, source)
    return dataset


def _check_column(dataset: Dataset, name: str, source: str) -> None:
    import datasets

    column = dataset.with_format("arrow")[name]
    nulls = sum(chunk.null_count for chunk in column.chunks) if hasattr(column, "chunks") else column.null_count
    if nulls:
        row = next(i for i, value in enumerate(dataset[name]) if value is None)
        raise DataError(f"{source}: column {name!r} is empty in {nulls} of {len(dataset)} rows, first in {row + 1}.")
    feature = dataset.features[name]
    dtype = getattr(feature, "dtype", None)
    is_chat = isinstance(feature, datasets.List | list)
    fits = {
        "text": dtype in {"string", "large_string"},
        "prompt": dtype in {"string", "large_string"} or is_chat,
        "completion": dtype in {"string", "large_string"} or is_chat,
        "messages": is_chat,
        "label": isinstance(feature, datasets.ClassLabel) or str(dtype).removeprefix("large_") in _LABEL_DTYPES,
    }
    if not fits[name]:
        raise DataError(f"{source}: column {name!r} holds {feature}, wanted {_WANTED[name]}.")


_LABEL_DTYPES = {"string", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
_WANTED = {
    "text": "strings",
    "prompt": "strings or lists of messages",
    "completion": "strings or lists of messages",
    "messages": "lists of messages with role and content",
    "label": "strings or integers (regression is not among the tasks)",
}


def label_names(dataset: Dataset, config: PretrainedConfig | None, source: str) -> list[str]:
    """Names of the classes, in the order of their ids.

    A checkpoint that was trained as a classifier brings its own names and they win; else a `ClassLabel` column brings
    them; else they are the sorted values of the column, integers by value.

    Args:
        dataset: with the column `label`.
        config: of the checkpoint if it already has a classification head, else None.
    Raises:
        DataError: a label is not among the checkpoint's, or there is only one.
    """
    import datasets

    feature = dataset.features["label"]
    values = sorted(dataset.unique("label"))
    found = list(feature.names) if isinstance(feature, datasets.ClassLabel) else [str(v) for v in values]
    if config is not None:
        known = [config.id2label[i] for i in sorted(config.id2label)]
        if not all(_DEFAULT_LABEL.fullmatch(name) for name in known):
            unknown = [name for name in found if name not in known]
            if unknown and not _are_ids(values, len(known)):
                raise DataError(
                    f"{source}: label {unknown[0]!r} is not one of the {len(known)} that the checkpoint's head knows."
                    + near_matches(unknown[0], known)
                )
            return known
        if len(found) != len(known):
            raise DataError(f"{source}: {len(found)} labels, but the checkpoint's head has {len(known)} outputs.")
    if len(found) < 2:
        raise DataError(f"{source}: column 'label' holds only {found}, wanted at least two classes.")
    return found


def label_ids(dataset: Dataset, names: Sequence[str]) -> Callable[[Any], int]:
    """How a value of the column `label` becomes the id of a class: by name, or as it is where the column holds ids.

    Raises:
        DataError: a value is none of `names`.
    """
    import datasets

    feature = dataset.features["label"]
    position = {name: i for i, name in enumerate(names)}
    if isinstance(feature, datasets.ClassLabel) and set(feature.names) <= set(names):
        return lambda value: position[feature.int2str(value)]
    values = dataset.unique("label")
    if all(str(value) in position for value in values):
        return lambda value: position[str(value)]
    if _are_ids(values, len(names)):
        return int
    unknown = next(str(value) for value in values if str(value) not in position)
    near = near_matches(unknown, names)
    raise DataError(f"label {unknown!r} is none of the {len(names)} that the model knows." + near)


def _are_ids(values: Sequence[Any], n: int) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < n for v in values)


# --- from rows to batches --------------------------------------------------------------------------------------------
# Each takes the trainer's keywords with `train_dataset` and `eval_dataset` as rows and gives them back as the trainer
# wants them. `max_length` is in tokens; None: the task's default, within what the model can take.


def _limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    return min(max_length or _DEFAULT_MAX_LENGTH, tokenizer.model_max_length)


def _tokenized(keywords: dict[str, Any], function: Callable[[Any, Any], Any]) -> dict[str, Any]:
    for name in ("train_dataset", "eval_dataset"):
        rows = keywords.get(name)
        if rows is not None:
            keywords[name] = rows.map(
                lambda batch, rows=rows: function(batch, rows), batched=True, remove_columns=rows.column_names
            )
    return keywords


def _prepare_causal_lm(keywords: dict[str, Any], model: Any, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """SFTTrainer tokenizes, masks prompts and packs by itself; `max_length` is a field of its arguments."""
    return keywords


def _prepare_seq2seq(keywords: dict[str, Any], model: Any, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    from transformers import DataCollatorForSeq2Seq

    limit = _limit(tokenizer, max_length)

    def encode(batch: Any, rows: Any) -> Any:
        return tokenizer(batch["prompt"], text_target=batch["completion"], truncation=True, max_length=limit)

    return _tokenized(keywords, encode) | {"data_collator": DataCollatorForSeq2Seq(tokenizer, model=model)}


def _prepare_classification(
    keywords: dict[str, Any], model: Any, tokenizer: Any, max_length: int | None
) -> dict[str, Any]:
    from transformers import DataCollatorWithPadding

    require_scikit_learn()
    if tokenizer.pad_token is None:  # decoders: the model looks for the last token that is not padding
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    limit = _limit(tokenizer, max_length)

    def encode(batch: Any, rows: Any) -> Any:
        ids = label_ids(rows, names)
        labels = [ids(value) for value in batch["label"]]
        return {**tokenizer(batch["text"], truncation=True, max_length=limit), "labels": labels}

    return _tokenized(keywords, encode) | {
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": lambda p: classification_scores(p.predictions.argmax(-1), p.label_ids),
    }


def build_trainer(
    task: str,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    max_length: int | None = None,
    callbacks: Sequence[Any] = (),
) -> Trainer:
    """The trainer of a task on rows with the task's standard columns (`select_columns`).

    Args:
        model: plain or a PeftModel; for classification its config has the label map.
        args: an instance of the task's `arguments_class()`.
        max_length: in tokens, for the tasks whose arguments have no such field.
    """
    keywords: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    keywords = TASKS[task].prepare(keywords, model, tokenizer, max_length)
    return TASKS[task].trainer_class()(
        model=model, args=args, processing_class=tokenizer, callbacks=list(callbacks), **keywords
    )


# --- how good it is --------------------------------------------------------------------------------------------------


def require_scikit_learn() -> None:
    """Raise an InstallError with the install line unless scikit-learn can be imported."""
    if importlib.util.find_spec("sklearn") is None:
        raise InstallError("macro-F1 needs scikit-learn: pip install 'spectrum-peft[eval]'.")


def classification_scores(predictions: Any, labels: Any) -> dict[str, float]:
    """Accuracy and macro-F1 (the mean of the F1 of the classes that occur) of class ids.

    Args:
        predictions, labels: (examples,) integers.
    """
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
    }


def _judge_tokens(model: Any, batches: Iterable[Mapping[str, Any]], shift: int) -> dict[str, float]:
    """Loss, perplexity and accuracy over all target tokens, each token with the same weight.

    A mean of batch means would weigh the tokens of short texts more; the sums here do not depend on the batch size.

    Args:
        batches: with `labels` (batch, length), `IGNORED` where nothing is to be predicted.
        shift: 1 for models whose logits at a position speak of the next token, 0 for decoders with shifted inputs.
    Raises:
        DataError: no batch has a token to predict.
    """
    import torch

    loss = correct = tokens = 0.0
    for batch in batches:
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        labels = batch["labels"][:, shift:]
        inputs = {k: v for k, v in batch.items() if k != "labels" or not shift}  # decoders make their inputs from them
        with torch.no_grad():
            logits = model(**inputs).logits
        logits = logits[:, : logits.shape[1] - shift][labels != IGNORED].float()
        targets = labels[labels != IGNORED]
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double().item()
        correct += (logits.argmax(-1) == targets).sum().item()
        tokens += targets.numel()
    if not tokens:
        raise DataError("the dataset has no token to predict: every label is masked.")
    mean = loss / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,  # float64 ends at exp(709)
        "token_accuracy": correct / tokens,
        "tokens": int(tokens),
    }


def _judge_causal_lm(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    return _judge_tokens(model, batches, shift=1)


def _judge_seq2seq(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    return _judge_tokens(model, batches, shift=0)


def _judge_classification(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    import torch

    loss = 0.0
    predictions: list[int] = []
    labels: list[int] = []
    for batch in batches:
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        targets = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits.float()
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double().item()
        predictions += logits.argmax(-1).tolist()
        labels += targets.tolist()
    return {"loss": loss / len(labels), **classification_scores(predictions, labels), "examples": len(labels)}


def evaluate(task: str, trainer: Trainer, dataset: Dataset) -> dict[str, float]:
    """Judge the trainer's model on rows that the trainer has prepared, collated as for training.

    Before or after training, not in between: the trainer's mixed precision is taken off the model. Every process of a
    distributed run judges all rows, so that the sums need no gathering.

    Args:
        dataset: `trainer.train_dataset` or `trainer.eval_dataset`.
    Returns:
        causal_lm, seq2seq: loss (nats a token), perplexity, token_accuracy, tokens; classification: loss (nats an
        example), accuracy, macro_f1, examples.
    """
    from torch.utils.data import DataLoader

    rows = dataset.select_columns([name for name in dataset.column_names if name in _MODEL_INPUTS])
    batches = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    # Without the trainer's autocast around it: what is judged is the model as it will be loaded again.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    training = model.training
    model.eval()
    try:
        return TASKS[task].judge(model, batches)
    finally:
        model.train(training)


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task(
            name="causal_lm",
            task_type="CAUSAL_LM",
            auto_class="AutoModelForCausalLM",
            arguments=("trl", "SFTConfig"),
            trainer=("trl", "SFTTrainer"),
            formats=(("messages",), ("prompt", "completion"), ("text",)),
            prepare=_prepare_causal_lm,
            judge=_judge_causal_lm,
        ),
        Task(
            name="seq2seq",
            task_type="SEQ_2_SEQ_LM",
            auto_class="AutoModelForSeq2SeqLM",
            arguments=("transformers", "Seq2SeqTrainingArguments"),
            trainer=("transformers", "Seq2SeqTrainer"),
            formats=(("prompt", "completion"),),
            prepare=_prepare_seq2seq,
            judge=_judge_seq2seq,
        ),
        Task(
            name="classification",
            task_type="SEQ_CLS",
            auto_class="AutoModelForSequenceClassification",
            arguments=("transformers", "TrainingArguments"),
            trainer=("transformers", "Trainer"),
            formats=(("text", "label"),),
            prepare=_prepare_classification,
            judge=_judge_classification,
            labelled=True,
        ),
    )
}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
