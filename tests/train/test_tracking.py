"""A tracker sees the plan and what became of it; read back from tensorboard's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from spectrum_peft import Plan, SpectrumCallback, SpectrumConfig
from spectrum_peft.cli.main import main
from spectrum_peft.errors import TrainingSetupError
from spectrum_peft.train.tracking import FIELD, described, report_plan


def test_tensorboard_has_the_plan_and_every_re_evaluation(tiny_llama_folder: Path, tmp_path: Path) -> None:
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} and {i * i}"}) + "\n" for i in range(12)))
    out = tmp_path / "out"
    line = (
        f"train --model {tiny_llama_folder} --dataset {rows} --mode alors --ratio 0.5 --rescore-every 2 --max-steps 5 "
        f"--dtype float32 --logging-steps 100 --per-device-train-batch-size 2 --report-to tensorboard --learning-rate 0.05 "
        f"--output-dir {out}"
    )
    assert main(line.split()) == 0
    [folder] = {path.parent for path in out.rglob("events.out.tfevents.*")}
    events = loader.EventAccumulator(str(folder))
    events.Reload()
    [text] = [t.text_summary.tensor_proto.string_val[0] if hasattr(t, "text_summary") else t.tensor_proto.string_val[0]
              for t in events.Tensors("model_config/text_summary")]  # fmt: skip
    seen = json.loads(text)[FIELD]
    assert (seen["mode"], seen["options"]["rescore_every"], seen["options"]["spectrum_ratio"]) == ("alors", 2, 0.5)
    history = json.loads((out / "plan_history.json").read_text())
    figures = {e.step: e.value for e in events.Scalars(f"train/{FIELD}/trainable_parameters")}
    assert figures == {h["step"]: h["trainable_parameters"] for h in history} and set(figures) == {2, 4}
    moved = {e.step: e.value for e in events.Scalars(f"train/{FIELD}/layers_moved")}
    assert moved == {h["step"]: len(h["ranks"]) for h in history}
    assert not any(FIELD in path.read_text() for path in out.rglob("config.json"))


class _Looks(TrainerCallback):
    """A reporter: keeps what it is shown."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.config = json.loads(model.config.to_json_string())


def test_in_python_one_line_puts_the_plan_before_any_reporter(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, SpectrumConfig(mode="lora", r=2, task_type="CAUSAL_LM"))
    plan: Plan = model.peft_config["default"].plan
    looks = _Looks()
    args = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=2e-4
    )
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[looks, SpectrumCallback()])  # type: ignore[arg-type]
    report_plan(trainer)
    trainer.train()
    assert looks.config[FIELD] == json.loads(json.dumps(described(plan)))
    assert looks.config[FIELD]["trains"] == dict.fromkeys(plan.trainable_names, 2)
    assert not hasattr(model.config, FIELD)
    bare = Trainer(model, args, train_dataset=rows)  # type: ignore[arg-type]
    with pytest.raises(TrainingSetupError, match="has no SpectrumCallback"):
        report_plan(bare)
