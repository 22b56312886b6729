"""Training tasks: how rows become batches, which trainer runs them, how the result is judged.

A task is a row of `TASKS`. Everything that differs between language modelling, preferences, sequence-to-sequence and heads
stands in its row or in the small functions that the row names; the command line has no `if task ==` of its own.
torch, transformers and trl are imported inside functions: `--help` reads the table without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..data import Piece
from ..errors import DataError, OptionError, near_matches, one_line
from . import answers
from .encoding import (
    Collate,
    DataChoices,
    Encode,
    both_sides,
    by_trainer,
    collate_seq2seq,
    collator_of_heads,
    encode_causal_lm,
    encode_classes,
    encode_number,
    encode_seq2seq,
    encode_several,
    encode_tags,
    one_piece,
    text_with_target,
)
from .heads import labels_of
from .judge import judge_causal_lm, judge_head, judge_seq2seq

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

_DEFAULT_MAX_LENGTH = 512  # tokens; for the tasks whose training arguments have no field for it
_MODEL_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "labels", "seq_lengths"})


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    Attributes:
        task_type: PEFT's name of the task.
        auto_class: class of transformers that loads a model for it; see `loaded_as`.
        arguments, trainer: (module, name) of the training arguments and of the trainer.
        encode, collate: as `encoding` explains them.
        judge: (model, batches) -> metrics; None: the trainer's own evaluation judges.
        figures: {metric: key under which the trainer's evaluation logs it}, where `judge` is None.
        pieces: (encoded row, tokenizer, names of the labels) -> what a model sees of it, uncut.
        drops: rows that do not fit are dropped, as `data.Cut` names it.
        head: kind of head, key of `heads.PROBLEMS`; None: the model's own.
        together: pieces of a row that the model sees at once.
        relative: it is judged beside the model as it was before, so that a saved result alone cannot be.
        rewarded: it takes reward functions.
    """

    name: str
    task_type: str
    auto_class: str
    arguments: tuple[str, str]
    trainer: tuple[str, str]
    encode: Encode
    collate: Collate = by_trainer
    judge: Callable[[Any, Iterable[Mapping[str, Any]]], dict[str, float]] | None = None
    figures: Mapping[str, str] | None = None
    pieces: Callable[[Mapping[str, Any], Any, Sequence[str]], list[Piece]] = one_piece
    drops: str | None = None
    head: str | None = None
    together: int = 1
    relative: bool = False
    rewarded: bool = False

    def arguments_class(self) -> type[TrainingArguments]:
        return getattr(importlib.import_module(self.arguments[0]), self.arguments[1])

    def trainer_class(self) -> type[Trainer]:
        return getattr(importlib.import_module(self.trainer[0]), self.trainer[1])


# What people call tasks elsewhere, and what TRL 1.16 has only under `trl.experimental`, with the names of its trainers.
_ALIASES = {"sft": "causal_lm", "language_modelling": "causal_lm", "sequence_classification": "classification"}
_EXPERIMENTAL = {"orpo": "ORPO", "cpo": "CPO", "gkd": "GKD", "online_dpo": "OnlineDPO"}


def task_named(name: str) -> Task:
    """
    Raises:
        OptionError: there is no such task, or TRL has it only as an experiment.
    """
    name = _ALIASES.get(name, name)
    if name in _EXPERIMENTAL:
        trainer = f"trl.experimental.{name}.{_EXPERIMENTAL[name]}Trainer"
        raise OptionError(
            f"task is {name!r}: TRL has it only as an experiment, whose names may change, so that no flag stands for it. From "
            f"Python: {trainer} takes a SpectrumConfig as its peft_config and SpectrumCallback() among its callbacks."
        )
    if name not in TASKS:
        raise OptionError(f"task is {name!r}." + near_matches(name, TASKS))
    return TASKS[name]


def loaded_as(task: Task, config: PretrainedConfig) -> Task:
    """The task with the class that loads a checkpoint for it: its auto class; for a decoder that sees or hears, and of which
    that auto class has nothing for text alone, the checkpoint's own class, which takes text without pictures, too."""
    import transformers

    if task.auto_class != "AutoModelForCausalLM" or type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return task
    named = str((config.architectures or [""])[0])
    return replace(task, auto_class=named) if _writes_after_seeing(config.to_dict(), named) else task


def _writes_after_seeing(config: Mapping[str, Any], named: str) -> bool:
    """Whether a class, by its name and its config, is a language model with eyes or ears: no encoder, and a text part."""
    parts = isinstance(config.get("text_config"), Mapping) and not config.get("is_encoder_decoder")
    return bool(parts and named.endswith("ForConditionalGeneration"))


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
            return task_of_head(data)
        if name.endswith("ForTokenClassification"):
            return "token_classification"
        if data.get("is_encoder_decoder") and name.endswith(("ForConditionalGeneration", "WithLMHeadModel")):
            return "seq2seq"
        if name.endswith(("ForCausalLM", "LMHeadModel")) or _writes_after_seeing(data, name):
            return "causal_lm"
    raise OptionError(
        f"{source}: architectures {architectures} in config.json say no task; pass --task, one of {sorted(TASKS)}."
    )


def task_of_head(config: Mapping[str, Any]) -> str:
    """Which of the tasks with a head for whole texts a config is of: by its problem_type, else by the number of outputs."""
    problem, outputs = config.get("problem_type"), len(config.get("id2label") or ())
    if problem == "multi_label_classification":
        return "multi_label"
    return "regression" if problem == "regression" or outputs == 1 else "classification"


# --- trainers and figures --------------------------------------------------------------------------------------------


def limit_of(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """Longest row in tokens: what was asked for or the default, within what the model can take."""
    return min(max_length or _DEFAULT_MAX_LENGTH, tokenizer.model_max_length)


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
    rewards: Sequence[Any] = (),
) -> Trainer:
    """The trainer of a task on rows with the task's standard columns (`select_columns`).

    Args:
        model: plain or a PeftModel; with a head its config has the label map.
        args: an instance of the task's `arguments_class()`.
        max_length: in tokens, for the tasks whose arguments have no such field.
        rewards: functions, for tasks that take them.
    """
    from jinja2 import TemplateError

    row, given = TASKS[task], {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    labels = labels_of(model.config) if row.head is not None else []
    keywords: dict[str, Any] = {"reward_funcs": list(rewards)} if row.rewarded else {}
    for name, rows in given.items():
        if rows is not None and "input_ids" not in rows.column_names:
            rows = row.encode(rows, tokenizer, limit_of(tokenizer, max_length), labels, data or DataChoices())
        keywords[name] = rows
    keywords |= row.collate(model, tokenizer)
    try:
        return row.trainer_class()(
            model=model, args=args, processing_class=tokenizer, callbacks=list(callbacks), **keywords
        )
    except TemplateError as error:  # roles in an order that it does not take, for one
        raise DataError(f"the chat template of the tokenizer refuses the rows: {one_line(error)}.") from error


def evaluate(task: str, trainer: Trainer, dataset: Dataset) -> dict[str, float]:
    """Judge the trainer's model on rows that the trainer has prepared, collated as for training.

    Before or after training, not in between: the trainer's mixed precision is taken off the model. Every process of a
    distributed run judges all rows, so that the sums need no gathering.

    Args:
        dataset: `trainer.train_dataset` or `trainer.eval_dataset`.
    Returns:
        causal_lm, seq2seq: loss (nats a token), perplexity, token_accuracy, tokens; tasks with a head: what `judge.judge_head`
        says; preferences and rewards: the figures that the row of `TASKS` names, as the trainer has them.
    """
    from transformers import PrinterCallback

    row = TASKS[task]
    if row.judge is None:
        printer = trainer.pop_callback(PrinterCallback)  # the caller says the figures
        found = trainer.evaluate(dataset)
        if printer is not None:
            trainer.add_callback(printer)
        return {name: float(found[key]) for name, key in (row.figures or {}).items() if key in found}
    from torch.utils.data import DataLoader

    rows = dataset.select_columns([name for name in dataset.column_names if name in _MODEL_INPUTS])
    batches = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    # Without the trainer's autocast around it: what is judged is the model as it will be loaded again.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    training = model.training
    model.eval()
    try:
        return row.judge(model, batches)
    finally:
        model.train(training)


def examples_of(task: Task, rows: Dataset) -> int:
    """Examples that the trainer makes of a row: KTO takes the answers of a pair apart."""
    return 2 if task.name == "kto" and "completion" not in rows.column_names else 1


_PAIR_FIGURES = {
    "loss": "eval_loss", "reward_accuracy": "eval_rewards/accuracies", "reward_margin": "eval_rewards/margins",
}  # fmt: skip
_DECODER = {"task_type": "CAUSAL_LM", "auto_class": "AutoModelForCausalLM"}
_HEAD = {"task_type": "SEQ_CLS", "auto_class": "AutoModelForSequenceClassification"}
_PLAIN = {"arguments": ("transformers", "TrainingArguments"), "trainer": ("transformers", "Trainer")}


def _trl(name: str) -> dict[str, tuple[str, str]]:
    return {"arguments": ("trl", f"{name}Config"), "trainer": ("trl", f"{name}Trainer")}


def _judged(head: str) -> dict[str, Any]:
    shown = one_piece if head == "tokens" else text_with_target
    return {"head": head, "collate": collator_of_heads(head), "judge": partial(judge_head, head), "pieces": shown}


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("causal_lm", **_DECODER, **_trl("SFT"), encode=encode_causal_lm, judge=judge_causal_lm, drops="filled"),
        Task(
            "dpo",
            **_DECODER,
            **_trl("DPO"),
            encode=answers.as_turns,
            figures=_PAIR_FIGURES,
            pieces=answers.pairs,
            together=2,
            drops="filled",
            relative=True,
        ),
        Task(
            "kto",
            **_DECODER,
            **_trl("KTO"),
            encode=answers.as_turns,
            figures={
                "loss": "eval_loss",
                "reward_wanted": "eval_rewards/chosen",
                "reward_unwanted": "eval_rewards/rejected",
                "reward_margin": "eval_rewards/margins",
            },
            pieces=answers.wanted_or_not,
            drops="filled",
            relative=True,
        ),
        Task(
            "reward",
            **_HEAD,
            **_trl("Reward"),
            encode=answers.as_turns,
            figures={"loss": "eval_loss", "reward_accuracy": "eval_accuracy", "reward_margin": "eval_margin"},
            pieces=answers.whole_answers,
            together=2,
            drops="long",
            head="reward",
        ),
        Task(
            "grpo",
            **_DECODER,
            **_trl("GRPO"),
            encode=answers.as_turns,
            figures={"reward": "eval_reward", "completion_tokens": "eval_completions/mean_length"},
            pieces=answers.prompts,
            rewarded=True,
        ),
        Task(
            "seq2seq",
            task_type="SEQ_2_SEQ_LM",
            auto_class="AutoModelForSeq2SeqLM",
            arguments=("transformers", "Seq2SeqTrainingArguments"),
            trainer=("transformers", "Seq2SeqTrainer"),
            encode=encode_seq2seq,
            collate=collate_seq2seq,
            judge=judge_seq2seq,
            pieces=both_sides,
        ),
        Task("classification", **_HEAD, **_PLAIN, encode=encode_classes, **_judged("classes")),
        Task("multi_label", **_HEAD, **_PLAIN, encode=encode_several, **_judged("several")),
        Task("regression", **_HEAD, **_PLAIN, encode=encode_number, **_judged("number")),
        Task(
            "token_classification",
            task_type="TOKEN_CLS",
            auto_class="AutoModelForTokenClassification",
            **_PLAIN,
            encode=encode_tags,
            **_judged("tokens"),
        ),
    )
}
