"""The race of learning rates: it finds what it is there to find, and leaves nothing behind but the rate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from running import LIBRARIES, arguments, assert_same, only_fast, options_of, text_rows, token_rows, trainer, values
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from spectrum_peft import LearningRateRace, SpectrumCallback, SpectrumConfig
from spectrum_peft.cli.main import main
from spectrum_peft.errors import OptionError, TrainingSetupError
from spectrum_peft.plan import MODES
from spectrum_peft.train.rate_race import FINE, Heat, check_can_race, heat_steps, search

pytestmark = LIBRARIES
STEPS = 160  # the shortest run that can be raced for


# --- the search ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.floats(-3, 3), st.floats(0.2, 5), st.integers(8, 12), st.floats(1e-6, 1e-2))
def test_the_best_rate_of_a_valley_is_met_to_a_fine_step(place: float, steep: float, most: int, start: float) -> None:
    """A loss with one valley, up to 27 times off the start: found to one fine step, and seen nowhere better."""
    valley = start * 3.0**place
    tried = []

    def run(rate: float) -> Heat:
        tried.append(rate)
        return Heat(rate, steep * math.log(rate / valley) ** 2, 4)

    found = search(run, start, most)
    assert found.loss == min(run(rate).loss for rate in tried[:])
    assert max(found.rate / valley, valley / found.rate) <= FINE * (1 + 1e-9)


@given(st.dictionaries(st.integers(-20, 20), st.sampled_from([0.5, 1.0, 2.0, math.inf])), st.integers(2, 9))
def test_no_rate_is_tried_twice_and_none_too_many(losses: dict[int, float], most: int) -> None:
    tried: list[float] = []

    def run(rate: float) -> Heat:
        tried.append(rate)
        return Heat(rate, losses.get(round(2 * math.log(rate, 3.0)), 1.0), 4)

    search(run, 1.0, most)
    assert len(tried) == len({round(2 * math.log(rate, 3.0)) for rate in tried}) <= most


def test_where_the_rate_makes_no_difference_it_stays() -> None:
    assert search(lambda rate: Heat(rate, 1.0, 4), 1e-3, 8).rate == 1e-3


def test_the_race_takes_no_more_than_its_share() -> None:
    for steps in range(STEPS, 3000, 7):
        each = heat_steps(steps)
        cost = each * 4 / 3  # a forward pass beside each step
        assert 3 <= int(0.1 * steps) / cost
        assert cost * min(8, int(int(0.1 * steps) / cost)) <= 0.1 * steps


# --- in a trainer ----------------------------------------------------------------------------------------------------


class StopsAt(TrainerCallback):
    """Ends a run before its last step: what a race leaves behind shows in the first ones."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def wrapped(mode: str, architecture: str = "llama") -> Any:
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture].build()
    return get_peft_model(model, SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **options_of(mode)))


def run(mode: str, folder: Path, rate: float, *, race: bool, **changes: Any) -> tuple[Any, Any]:
    """A run of a few steps; its trainer, and the race that was held."""
    logs = {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": rate}
    one = trainer(wrapped(mode), folder, [SpectrumCallback(), StopsAt(6)], **logs, **changes)
    held = None
    if race:
        held = LearningRateRace(one)
        one.add_callback(held)
    one.train()
    return one, held


@pytest.mark.parametrize("mode", only_fast(list(MODES), ["spectrum", "alors"]))
def test_a_raced_run_is_the_run_at_the_rate_that_it_found(mode: str, tmp_path: Path) -> None:
    """To the bit: weights, buffers, moments, random state and the log are as if nothing had been tried."""
    short = {"max_steps": STEPS, "per_device_train_batch_size": 1, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    raced, race = run(mode, tmp_path / "a", 1e-3, race=True, **short)
    given, _ = run(mode, tmp_path / "b", race.rate, race=False, **short)
    assert len(race.heats) >= 3
    assert all(heat.steps == 4 for heat in race.heats)
    assert raced.args.learning_rate == race.rate
    assert_same(values(raced.model), values(given.model))
    for key in ("loss", "learning_rate", "grad_norm"):
        logs = [[entry[key] for entry in one.state.log_history if key in entry] for one in (raced, given)]
        # The found rate is a product of two numbers: the scheduler multiplies them in another order.
        assert logs[0] == pytest.approx(logs[1], rel=1e-12), key


def test_dropout_accumulation_and_trls_figures_are_undisturbed(tmp_path: Path, tiny_llama_folder: Path) -> None:
    def one(rate: float, race: bool) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = ARCHITECTURES["llama"].build()
        model.config.attention_dropout = 0.2
        config = SpectrumConfig(mode="lora", lora_dropout=0.3, task_type="CAUSAL_LM")
        args = SFTConfig(
            str(tmp_path / "out"), max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            learning_rate=rate, report_to=[], save_strategy="no", logging_steps=2, use_cpu=True, bf16=False,
            disable_tqdm=True, max_length=24,
        )  # fmt: skip
        sft = SFTTrainer(
            model, args=args, train_dataset=text_rows(), processing_class=byte_tokenizer(), peft_config=config,
            callbacks=[SpectrumCallback(), StopsAt(4)],
        )  # fmt: skip
        held = LearningRateRace(sft)
        if race:
            sft.add_callback(held)
        sft.train()
        return sft, held

    raced, race = one(1e-3, True)
    given, _ = one(race.rate, False)
    assert_same(values(raced.model), values(given.model))
    timed = ("runtime", "second", "flos")
    logs = [
        [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in t.state.log_history]
        for t in (raced, given)
    ]
    for a, b in zip(*logs, strict=True):
        # The same steps, to the bit; logged means are divided once more, in float64.
        assert a == pytest.approx(b, rel=1e-12)


def test_a_rate_that_diverges_ends_early_and_does_not_win(tmp_path: Path) -> None:
    """At 1e30 the weights overflow; the walk goes down from there."""
    one = trainer(wrapped("full"), tmp_path, [SpectrumCallback()], learning_rate=1e30, max_steps=STEPS)
    race = LearningRateRace(one)
    one.add_callback(race)
    with pytest.raises(TrainingSetupError, match="loss is no finite number at any of"):
        one.train()
    assert all(heat.loss == math.inf for heat in race.heats)
    assert all(bool(torch.isfinite(p).all()) for p in one.model.parameters())  # put back, also then


def test_a_resumed_run_keeps_the_rate_of_its_checkpoint(tmp_path: Path) -> None:
    short = {"max_steps": STEPS, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 3}
    whole, race = run("spectrum", tmp_path, 1e-3, race=True, **short)
    again = trainer(wrapped("spectrum"), tmp_path, [SpectrumCallback(), StopsAt(6)], learning_rate=1e-3, **short)
    held = LearningRateRace(again)
    again.add_callback(held)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (held.heats, held.rate) == (race.heats, race.rate)  # what is told of the run is what it was trained at
    assert again.args.learning_rate == race.rate != 1e-3
    assert_same(values(again.model), values(whole.model))


# --- what cannot be raced --------------------------------------------------------------------------------------------


def test_what_cannot_be_raced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"needs a run of 160 steps; this one has 159"):
        heat_steps(STEPS - 1)
    with pytest.raises(OptionError, match="share is 0"):
        LearningRateRace(None, share=0)
    with pytest.raises(OptionError, match="learning_rate is 0"):
        check_can_race(Trainer, arguments(tmp_path, learning_rate=0.0))

    class GRPOTrainer(Trainer):
        pass

    with pytest.raises(TrainingSetupError, match="loss of GRPOTrainer is no measure"):
        check_can_race(GRPOTrainer, arguments(tmp_path))
    one = trainer(wrapped("full"), tmp_path, [SpectrumCallback()], rows=token_rows(4))
    one.add_callback(LearningRateRace(one))
    with pytest.raises(OptionError, match="this one has 2"):
        one.train()


# --- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} squared is {i * i}"}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def flags(tiny_llama_folder: Path, texts: Path) -> list[str]:
    flags = [
        "train",
        "--model",
        str(tiny_llama_folder),
        "--dataset",
        str(texts),
        "--mode",
        "lora",
        "--dtype",
        "float32",
    ]
    return [*flags, "--per-device-train-batch-size", "1", "--report-to", "none", "--save-strategy", "no"]


@pytest.mark.slow
def test_train_finds_the_rate_and_says_so(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, config = tmp_path / "out", tmp_path / "train.yaml"
    config.write_text("learning_rate: auto\n")
    assert main([*flags, "--max-steps", "160", "--output-dir", str(out), "--config", str(config)]) == 0
    results = json.loads((out / "train_results.json").read_text())
    race = results["learning_rate_race"]
    assert results["learning_rate"] == min(race, key=lambda heat: heat["loss"])["rate"]
    assert race[0]["rate"] == MODES["lora"].rate_for(160)
    assert "learning rate auto" in capsys.readouterr().out


def test_a_run_too_short_for_a_race_is_refused_before_the_model_is_loaded(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*flags, "--learning-rate", "auto", "--max-steps", "2", "--output-dir", str(tmp_path / "short")]
    assert main(short) == 2
    captured = capsys.readouterr()
    assert "needs a run of 160 steps; this one has 2." in captured.err
    assert "trains" not in captured.out
    assert main([*short, "--learning-rate", "1e-4"]) == 0  # the last one counts
    results = json.loads((tmp_path / "short" / "train_results.json").read_text())
    assert (results["learning_rate"], results["learning_rate_race"]) == (1e-4, None)
