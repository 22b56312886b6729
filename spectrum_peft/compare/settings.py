"""What can be asked of a comparison: its keys and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..records.schema import number_within

# What `compare` reads itself; every other key goes to the verb `train` and to the trainer's own arguments.
KEYS: dict[str, str] = {
    "modes": "modes to compare; default: all",
    "ratios": "spectrum ratios, for the modes that choose; default 0.5",
    "criteria": "scores to choose by; default spectrum",
    "seeds": "one run of every contestant for each; default 0",
    "learning_rates": "for all, or {mode or name of a contestant: rates}; auto races for one; default: each mode's own",
    "learning_rate_factors": "multiply the rates by each of these; default 1",
    "controls": "what the claim must beat; default random, last",
    "contestants": "more of them: mappings of name, mode (or peft: a PEFT config) and flags of train",
    "metric": "what the report ranks by; default accuracy for classes, micro_f1 for several labels, macro_f1 for tags, else loss",
    "reference": "name of a contestant: the others are held against it, seed by seed",
    "generate": "metrics of completed prompts: exact_match, rouge_l",
    "generate_rows": "how many prompts of the evaluation set are completed; default 100",
    "max_new_tokens": "of a completion; default 256",
    "general_text": "a dataset with text: what was forgotten is the loss on it, before and after",
    "general_split": "split of a hub dataset of general text",
    "generation_speed": "measure it before and after merging",
    "keep_models": "keep what was trained in the cells' folders",
    "confidence": "of the intervals over seeds; default 0.95",
}
# Keys of `train` that may name a file whose content decides the numbers.
FILE_KEYS = ("plan", "report", "gradients", "deepspeed", "fsdp_config")


def rate_text(rate: float | str | None) -> str:
    """A contestant's learning rate as names and tables say it."""
    return f"{rate:g}" if isinstance(rate, int | float) else rate or ""


@dataclass(frozen=True)
class Metric:
    """One figure of quality.

    Attributes:
        title: for the reader.
        higher: is better.
        tasks: that it belongs to; None: every task whose cells complete prompts.
    """

    title: str
    higher: bool
    tasks: frozenset[str] | None


TEXT = frozenset({"causal_lm", "seq2seq"})
# Tasks with a head -> what their reports rank by unless told otherwise.
HEADED = {
    "classification": "accuracy",
    "multi_label": "micro_f1",
    "regression": "loss",
    "token_classification": "macro_f1",
}
METRICS: dict[str, Metric] = {
    "loss": Metric("held-out loss", False, TEXT | frozenset(HEADED)),
    "perplexity": Metric("perplexity", False, TEXT),
    "token_accuracy": Metric("token accuracy", True, TEXT),
    "accuracy": Metric("accuracy", True, frozenset({"classification", "token_classification"})),
    "macro_f1": Metric("macro-F1", True, frozenset({"classification", "multi_label", "token_classification"})),
    "micro_f1": Metric("micro-F1", True, frozenset({"multi_label"})),
    "exact_sets": Metric("sets of labels met", True, frozenset({"multi_label"})),
    "mean_absolute_error": Metric("mean absolute error", False, frozenset({"regression"})),
    "r2": Metric("R2", True, frozenset({"regression"})),
    "exact_match": Metric("exact match", True, None),
    "rouge_l": Metric("ROUGE-L", True, None),
}


@dataclass(frozen=True)
class Comparison:
    """What is compared, checked.

    Attributes:
        train: keys for `train` that all cells share.
        arguments: trainer flags of the command line that all cells share.
        asked: values of `KEYS`, defaults filled in.
        task: of the checkpoint.
        source: the config file, for messages.
        found_reports: `report: auto`: a report that is there already does instead of a scan (`scan.find_report`).
    """

    train: Mapping[str, Any]
    arguments: tuple[str, ...]
    asked: Mapping[str, Any]
    task: str
    output: Path
    source: str
    notes: tuple[str, ...] = ()
    found_reports: bool = False

    @property
    def metric(self) -> str:
        return str(self.asked["metric"])

    @property
    def steps(self) -> int | None:
        """Steps of every cell, where `max_steps` says them."""
        finder = Parser(add_help=False)
        finder.add_argument("--max-steps", "--max_steps", type=int, default=self.train.get("max_steps"))
        found = finder.parse_known_args(list(self.arguments))[0].max_steps
        return found if isinstance(found, int) and found > 0 else None


def rate_or_auto(name: str, value: Any) -> float | str:
    """A learning rate, or `auto`: the run races for it."""
    return "auto" if value == "auto" else float(number_within(0)(name, value))
