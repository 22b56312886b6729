"""The dry run against TRL's own trainers of preferences, on real tensors under the same tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

from spectrum_peft import SpectrumConfig
from spectrum_peft.memory import estimate_memory, report_of_config
from spectrum_peft.memory.step import Step, _adopt_model, _adopt_states, _vocabulary, _watched
from spectrum_peft.memory.tracker import StorageTracker
from spectrum_peft.plan import make_plan
from spectrum_peft.train.encoding import DataChoices
from spectrum_peft.train.tasks import TASKS, build_trainer
from spectrum_peft.tuner.loading import made_trainable

LENGTH, ROWS = 48, 2


class _Phases(TrainerCallback):
    """Tells the tracker what the trainer does; the first step, which makes the optimizer's states, is not looked at."""

    def __init__(self, tracker: StorageTracker) -> None:
        self.tracker, self.trainer = tracker, None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.tracker.enter("forward")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.tracker.enter("optimizer")

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        _adopt_states(self.tracker, self.trainer.optimizer.optimizer)
        if state.global_step == 1:
            self.tracker.peaks.clear()


def _model(task: str) -> Any:
    # The vocabulary outweighs the rest, as in real models: what is wrong with the loss shows.
    config = LlamaConfig(
        vocab_size=4000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=256, bos_token_id=257, eos_token_id=258, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config) if task == "reward" else LlamaForCausalLM(config)


def _rows(task: str) -> Dataset:
    """Answers of which one is shorter, so that batches hold padding, and the longest has just `LENGTH` tokens."""
    prompt, long, short = "p" * 20, "c" * (LENGTH - 21), "d" * 9
    if task == "kto":
        rows = [{"prompt": prompt, "completion": (long, short)[i % 2], "label": i % 2 == 0} for i in range(4 * ROWS)]
    else:
        rows = [{"prompt": prompt, "chosen": long, "rejected": short} for _ in range(4 * ROWS)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("task", "mode"),
    [("dpo", "lora"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("dpo", "full"), ("dpo", "spectrum"), ("kto", "lora"), ("kto", "full"), ("reward", "lora"),
    ))],
)  # fmt: skip
def test_the_dry_run_is_what_the_trainer_holds(task: str, mode: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    _model(task).save_pretrained(tmp_path / "base")
    plain = type(_model(task)).from_pretrained(tmp_path / "base", dtype=torch.float32)
    config, row = plain.config, TASKS[task]
    plan = make_plan(report_of_config(plain, "last"), mode=mode, **({"r": 4} if mode == "lora" else {}))
    spectrum = SpectrumConfig(plan=plan.replace(fingerprint=None), task_type=row.task_type)
    args = row.arguments_class()(
        str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=ROWS, max_steps=2,
        disable_tqdm=True, max_length=LENGTH, save_strategy="no", gradient_checkpointing=False, logging_strategy="no",
    )  # fmt: skip
    model = made_trainable(plain, spectrum)
    trainer = build_trainer(
        task,
        model=model,
        tokenizer=tiny_tokenizer,
        args=args,
        train_dataset=_rows(task),
        data=DataChoices(template=False),
    )
    tracker = StorageTracker("cpu", 1, _vocabulary(trainer.model))
    phases = _Phases(tracker)
    phases.trainer = trainer
    trainer.add_callback(phases)
    with tracker, _watched(trainer.model, tracker):
        _adopt_model(tracker, trainer.model, Step(device="cpu"))
        if getattr(trainer, "ref_model", None) is not None:
            tracker.adopt([*trainer.ref_model.parameters(), *trainer.ref_model.buffers()], "weights")
        trainer.train()
    held = max(peak for peak, _, _ in tracker.peaks.values())
    found = estimate_memory(
        config, SpectrumConfig(plan=plan, keep_base="none", task_type=row.task_type), batch_size=ROWS * row.together,
        max_length=LENGTH, dtype="float32", optimizer="adamw_torch_fused", device="cpu", model_class=type(plain),
        trainer="transformers" if task == "reward" else "sft", reference=row.relative,
    )  # fmt: skip
    # What the trainer holds besides, its figures and the batch's own columns, is a few kilobytes of some 20 MB.
    assert held == pytest.approx(found.peak_bytes, rel=0.005)
