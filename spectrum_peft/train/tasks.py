"""Training tasks: how rows become batches, which trainer runs them, how the result is judged.

A task is a row of `TASKS`. Everything that differs between language modelling, sequence-to-sequence and classification
stands in its row or in the three small functions that the row names; the command line has no `if task ==` of its own.
torch, transformers and trl are imported inside functions: `--help` reads the table without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import encode_row, label_ids
from ..errors import DataError, OptionError, one_line
from .judge import classification_scores, judge_causal_lm, judge_classification, judge_seq2seq, require_scikit_learn

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

_DEFAULT_MAX_LENGTH = 512  # tokens; for the tasks whose training arguments have no field for it
_MODEL_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "labels", "seq_lengths"})


@dataclass(frozen=True)
class DataChoices:
    """What of a row is shown and learnt, as `data.encode_row` takes it; language modelling only.

    Attributes:
        loss_on: `all`, `assistant`, `completion`, or None for what the row's format means.
        template: prompts and completions go through the tokenizer's chat template where it has one.
    """

    loss_on: str | None = None
    template: bool = True


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    Attributes:
        task_type: PEFT's name of the task.
        auto_class: class of transformers that loads a model for it.
        arguments, trainer: (module, name) of the training arguments and of the trainer.
        prepare: (trainer keywords so far, model, tokenizer, max_length, choices) -> trainer keywords; tokenizes and collates.
        judge: (model, batches) -> metrics; None: the trainer's own evaluation judges.
        labelled: it predicts one of the labels that the model's head names.
    """

    name: str
    task_type: str
    auto_class: str
    arguments: tuple[str, str]
    trainer: tuple[str, str]
    prepare: Callable[..., dict[str, Any]]
    judge: Callable[[Any, Iterable[Mapping[str, Any]]], dict[str, float]] | None
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


def _prepare_causal_lm(
    keywords: dict[str, Any], model: Any, tokenizer: Any, max_length: int | None, data: DataChoices
) -> dict[str, Any]:
    """SFTTrainer cuts, drops what is left without loss, and packs; `max_length` is a field of its arguments."""
    for name in ("train_dataset", "eval_dataset"):
        rows = keywords.get(name)
        if rows is not None and "input_ids" not in rows.column_names:
            keywords[name] = encoded_rows(rows, tokenizer, data)
    return keywords


def encoded_rows(rows: Dataset, tokenizer: Any, data: DataChoices) -> Dataset:
    """Rows of language modelling as `input_ids` and `labels`.

    Raises:
        DataError: names the row.
    """

    def encode(row: Any, i: int) -> Any:
        try:
            return encode_row(row, tokenizer, data.loss_on, template=data.template)
        except DataError as error:
            raise DataError(f"row {i + 1}: {error}") from error

    return rows.map(encode, with_indices=True, remove_columns=rows.column_names)


def _prepare_by_trainer(
    keywords: dict[str, Any], model: Any, tokenizer: Any, max_length: int | None, data: DataChoices
) -> dict[str, Any]:
    """The trainer applies the chat template, tokenizes and collates."""
    return keywords


def _prepare_seq2seq(
    keywords: dict[str, Any], model: Any, tokenizer: Any, max_length: int | None, data: DataChoices
) -> dict[str, Any]:
    from transformers import DataCollatorForSeq2Seq

    limit = _limit(tokenizer, max_length)

    def encode(batch: Any, rows: Any) -> Any:
        return tokenizer(batch["prompt"], text_target=batch["completion"], truncation=True, max_length=limit)

    return _tokenized(keywords, encode) | {"data_collator": DataCollatorForSeq2Seq(tokenizer, model=model)}


def _prepare_classification(
    keywords: dict[str, Any], model: Any, tokenizer: Any, max_length: int | None, data: DataChoices
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
    data: DataChoices | None = None,
) -> Trainer:
    """The trainer of a task on rows with the task's standard columns (`select_columns`).

    Args:
        model: plain or a PeftModel; for classification its config has the label map.
        args: an instance of the task's `arguments_class()`.
        max_length: in tokens, for the tasks whose arguments have no such field.
    """
    keywords: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    from jinja2 import TemplateError

    keywords = TASKS[task].prepare(keywords, model, tokenizer, max_length, data or DataChoices())
    try:
        return TASKS[task].trainer_class()(
            model=model, args=args, processing_class=tokenizer, callbacks=list(callbacks), **keywords
        )
    except TemplateError as error:  # roles in an order that it does not take, for one
        raise DataError(f"the chat template of the tokenizer refuses the rows: {one_line(error)}.") from error


# Names of a trainer's own figures, and the keys under which TRL 1.16 logs them.
_OWN_FIGURES = {
    "loss": "eval_loss", "reward_accuracy": "eval_rewards/accuracies", "reward_margin": "eval_rewards/margins",
}  # fmt: skip


def evaluate(task: str, trainer: Trainer, dataset: Dataset) -> dict[str, float]:
    """Judge the trainer's model on rows that the trainer has prepared, collated as for training.

    Before or after training, not in between: the trainer's mixed precision is taken off the model. Every process of a
    distributed run judges all rows, so that the sums need no gathering.

    Args:
        dataset: `trainer.train_dataset` or `trainer.eval_dataset`.
    Returns:
        causal_lm, seq2seq: loss (nats a token), perplexity, token_accuracy, tokens; classification: loss (nats an
        example), accuracy, macro_f1, examples; dpo: loss, reward_accuracy (share of pairs whose chosen answer has the higher
        reward), reward_margin.
    """
    judge = TASKS[task].judge
    if judge is None:
        found = trainer.evaluate(dataset)
        return {name: float(found[key]) for name, key in _OWN_FIGURES.items() if key in found}
    from torch.utils.data import DataLoader

    rows = dataset.select_columns([name for name in dataset.column_names if name in _MODEL_INPUTS])
    batches = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    # Without the trainer's autocast around it: what is judged is the model as it will be loaded again.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    training = model.training
    model.eval()
    try:
        return judge(model, batches)
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
            prepare=_prepare_causal_lm,
            judge=judge_causal_lm,
        ),
        Task(
            name="dpo",
            task_type="CAUSAL_LM",
            auto_class="AutoModelForCausalLM",
            arguments=("trl", "DPOConfig"),
            trainer=("trl", "DPOTrainer"),
            prepare=_prepare_by_trainer,
            judge=None,
        ),
        Task(
            name="seq2seq",
            task_type="SEQ_2_SEQ_LM",
            auto_class="AutoModelForSeq2SeqLM",
            arguments=("transformers", "Seq2SeqTrainingArguments"),
            trainer=("transformers", "Seq2SeqTrainer"),
            prepare=_prepare_seq2seq,
            judge=judge_seq2seq,
        ),
        Task(
            name="classification",
            task_type="SEQ_CLS",
            auto_class="AutoModelForSequenceClassification",
            arguments=("transformers", "TrainingArguments"),
            trainer=("transformers", "Trainer"),
            prepare=_prepare_classification,
            judge=judge_classification,
            labelled=True,
        ),
    )
}
