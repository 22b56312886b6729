"""Recipes: a commented YAML for `train`, with the memory that its step is predicted to need.

One writer for `train --init`, which looks for what fits a card, and for the files of examples/recipes, whose choices stand in
benchmarks/recipes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
import yaml

from ..devices import default_device, free_memory
from ..errors import OptionError
from ..memory import (
    describe_step,
    estimate_memory,
    format_bytes,
    parse_bytes,
    report_of_config,
)
from ..plan import MODES, make_plan
from ..records import MemoryReport
from ..tuner.config import SpectrumConfig
from .callback import slower_by
from .heads import ONE_OUTPUT, with_head
from .tasks import TASKS, loaded_as

# Share of a card that a recipe leaves free: CUDA's context, what the allocator holds unused, and a margin.
FREE = 0.07
# What `--init` tries, best first: the first that fits. Batches of 4, then of 1.
_TRIED: tuple[tuple[str, Mapping[str, Any], str | None], ...] = (
    ("lora", {"r": 16}, None),
    ("lora", {"r": 16}, "nf4"),
    ("spectra_qlora", {"spectrum_ratio": 0.5, "r": 16}, "nf4"),
)
_TOGETHER = 16  # sequences of a step, in batches of what fits
_ROWS = {
    "causal_lm": "messages, conversations, prompt and completion, instruction and output, or text",
    "dpo": "prompt, chosen, rejected", "kto": "prompt, completion, label", "reward": "prompt, chosen, rejected",
    "grpo": "prompt", "seq2seq": "prompt and completion", "classification": "text and label",
    "multi_label": "text and label, a list", "regression": "text and label, a number", "token_classification": "tokens and tags",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a YAML of `train` says.

    Attributes:
        model: hub id or folder. task: key of `TASKS`. mode: key of `MODES`.
        options: of the plan, and fields of `LoraConfig`.
        quantization: of the base.
        batch_size: rows on the device at once. accumulation: such batches in a step.
        max_length: in tokens.
        more: other keys of `train` and of the trainer.
    """

    model: str
    task: str
    mode: str
    options: Mapping[str, Any] = field(default_factory=dict)
    quantization: str | None = None
    batch_size: int = 4
    accumulation: int = 4
    max_length: int = 1024
    more: Mapping[str, Any] = field(default_factory=dict)


def predicted(recipe: Recipe, config: Any) -> MemoryReport:
    """The dry run of a recipe's step on a GPU, every row as long as it may be.

    Args:
        config: of the model, or whatever else `estimate_memory` takes.
    """
    task = loaded_as(TASKS[recipe.task], config) if hasattr(config, "to_dict") else TASKS[recipe.task]
    model_class = getattr(transformers, task.auto_class)
    report = report_of_config(config, "first", model_class=model_class)
    plan = make_plan(report, mode=recipe.mode, **recipe.options)
    trl = task.arguments[0] == "trl"
    return estimate_memory(
        config,
        SpectrumConfig(plan=plan, keep_base="none", task_type=task.task_type),
        model_class=model_class,
        batch_size=recipe.batch_size * task.together,
        max_length=recipe.max_length,
        dtype="bfloat16",
        optimizer=str(recipe.more.get("optim", "adamw_torch_fused")),
        gradient_checkpointing=True,
        gradient_accumulation_steps=recipe.accumulation,
        quantization=recipe.quantization,
        device="cuda",
        trainer="sft" if trl and task.head is None else "transformers",
        reference=task.relative,
    )


def fits(found: MemoryReport, card: str) -> bool:
    return found.peak_bytes <= parse_bytes(card, "--memory") * (1 - FREE)


def written(recipe: Recipe, found: MemoryReport, title: str) -> str:
    """The YAML, with comments; every key is one of `train`."""
    head = [
        f"# {title}",
        "# Start: spectrum-peft train --config THIS_FILE; with --dry-run to see rows, steps, plan and memory first.",
        f"# Predicted peak: {format_bytes(found.peak_bytes)} on a GPU ({describe_step(found)};",
        "#   `spectrum-peft memory`, every row as long as it may be; CUDA's context of some 0.5 GiB comes on top).",
    ]
    if TASKS[recipe.task].relative:
        head.append("#   The model as it was before, which the loss holds it beside, is counted.")
    return "\n".join([*head, *_body(recipe)]) + "\n"


def _body(recipe: Recipe) -> Iterator[str]:
    task, row = TASKS[recipe.task], MODES[recipe.mode]
    if (slower := slower_by(task.arguments_class())) != 1:
        rate = f"# learning_rate: {row.default_lr / slower:.1e} # the default of this mode and task"
    else:
        rate = "# learning_rate: auto # a race on your own rows; the default goes with the length of the run"
    yield _line("model", recipe.model)
    yield _line("task", recipe.task)
    yield _line("dataset", "train.jsonl", f"rows with {_ROWS[recipe.task]}; a hub id, or a file")
    yield "# eval_dataset: validation.jsonl # judged before and after"
    yield _line("output_dir", "out")
    yield ""
    yield _line("mode", recipe.mode, row.summary)
    for name, value in recipe.options.items():
        yield _line(name, value, _SAID.get(name))
    yield _line("dtype", "bfloat16", "what trains is held in float32")
    if recipe.quantization:
        yield _line("quantization", recipe.quantization, "the base, which is frozen")
    yield rate
    yield ""
    yield _line(
        "per_device_train_batch_size", recipe.batch_size, "less of it, and more of the next, where memory is short"
    )
    yield _line("gradient_accumulation_steps", recipe.accumulation)
    yield _line("max_length", recipe.max_length, "tokens; longer rows are cut")
    yield _line("gradient_checkpointing", True, "less memory for a quarter more time")
    for name, value in recipe.more.items():
        yield _line(name, value, _SAID.get(name))
    if "num_train_epochs" not in recipe.more:
        yield _line("num_train_epochs", 1)
    yield _line("logging_steps", 10)
    yield _line("save_strategy", "epoch")
    yield _line("report_to", "none", "wandb, tensorboard, trackio")


_SAID = {
    "spectrum_ratio": "share of the matrices of each kind", "r": "rank", "optim": "eight bits a state instead of 32",
    "packing": "rows are put together to full length", "beta": "how far the policy may go from where it began",
    "reward_function": "your own code, which runs as it is",
}  # fmt: skip


def _line(name: str, value: Any, said: str | None = None) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip().removesuffix("\n...")
    return f"{name}: {text}" + (f" # {said}" if said else "")


def init(model: str, config: Any, task: str, memory: str, tell: Callable[[str], None] = lambda _: None) -> str:
    """A recipe for a model on a card: the first way of training that fits.

    Args:
        config: of the model. memory: of the card, `24GiB`.
        tell: gets a line for each dry run.
    Raises:
        OptionError: nothing fits; memory without a unit.
    """
    parse_bytes(memory, "--memory")
    length = min(1024, getattr(config, "max_position_embeddings", None) or 1024)
    more = {"reward_function": ["rewards.py:score"], "num_generations": 4} if TASKS[task].rewarded else {}
    least: MemoryReport | None = None
    for mode, options, quantization in _TRIED:
        for batch in (4, 1):
            if TASKS[task].rewarded and batch == 1:
                continue
            accumulation = _TOGETHER // batch
            recipe = Recipe(model, task, mode, options, quantization, batch, accumulation, length, more)
            found = predicted(recipe, config)
            tell(
                f"{mode}{f' on {quantization}' if quantization else ''}, batch {batch}: {format_bytes(found.peak_bytes)}"
            )
            if fits(found, memory):
                return written(recipe, found, f"{model}, task {task}, on a card of {memory}.")
            least = found if least is None or found.peak_bytes < least.peak_bytes else least
    assert least is not None
    raise OptionError(
        f"--memory is {memory}, and the least that was tried needs {format_bytes(least.peak_bytes)} and {FREE:.0%} to spare: "
        "`spectrum-peft memory --fit` looks at shorter rows and other optimizers."
    )


def card_here() -> str:
    """Memory of the card of this machine, with its unit.

    Raises:
        OptionError: there is none.
    """
    device = default_device()
    found = free_memory(device) if device.type != "cpu" else None
    if found is None:
        raise OptionError("--memory is missing, and there is no GPU here to ask: give that of the card, 24GiB.")
    return f"{found[1] // 2**20}MiB"


def with_some_head(config: Any, task: str, outputs: int = 2) -> Any:
    """The config with a head of the task's kind, for a dry run without rows; how many outputs it has hardly matters."""
    head = TASKS[task].head
    if head is None:
        return config
    problem = "multi_label_classification" if head == "several" else None
    return with_head(config, {"num_labels": 1 if head in ONE_OUTPUT else outputs, "problem_type": problem})
