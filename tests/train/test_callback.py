"""SpectrumCallback under Trainer and SFTTrainer: freezing, checks, guards, resume, dtypes, depth."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from running import (
    ADAPTER_MODES,
    LIBRARIES,
    QUANTIZABLE,
    QUIET,
    arguments,
    assert_same,
    logits,
    only_fast,
    options_of,
    same_bytes,
    text_rows,
    token_rows,
    trainer,
    values,
)
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from spectrum_peft import (
    Plan,
    SnrReport,
    SpectrumCallback,
    SpectrumConfig,
    load_model_with_spectrum,
    quantization_config_for,
)
from spectrum_peft.errors import MismatchError, OptionError, TrainingSetupError
from spectrum_peft.plan import MODES
from spectrum_peft.train.optim import innermost
from spectrum_peft.tuner import plan_parameters, settle_plan

pytestmark = LIBRARIES
PLAIN_MODES = [name for name, mode in MODES.items() if mode.plain_model]
CHECKPOINTING = {
    "none": {},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "not-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of two blocks."""
    path = tmp_path_factory.mktemp("llama")
    ARCHITECTURES["llama"].build().save_pretrained(path)
    return path


@pytest.fixture
def base(folder: Path) -> Any:
    return load(folder)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def config_of(mode: str, **options: Any) -> SpectrumConfig:
    return SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **{**options_of(mode), **options})


def adapted(model: Any, mode: str, **options: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, config_of(mode, **options))


def quantized(folder: Path, mode: str, **options: Any) -> Any:
    torch.manual_seed(1)
    config = config_of(mode, **options)
    return load_model_with_spectrum(str(folder), config, quantization="nf4", dtype=torch.float32)[0]


def sft(model: Any, tokenizer: Any, out: Path, callbacks: list[Any], **changes: Any) -> SFTTrainer:
    """SFTTrainer with its own defaults: gradient checkpointing on."""
    extra = {key: changes.pop(key) for key in ("peft_config", "eval_dataset") if key in changes}
    args = SFTConfig(output_dir=str(out), max_length=32, **{**QUIET, **changes})
    return SFTTrainer(
        model=model, args=args, train_dataset=text_rows(), processing_class=tokenizer, callbacks=callbacks, **extra
    )


def held_by(optimizer: Any, model: Any) -> set[str]:
    ids = {id(p) for group in innermost(optimizer).param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


# --- a plain model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    only_fast(
        [(mode, kind) for mode in PLAIN_MODES for kind in CHECKPOINTING],
        fast=[("spectrum", "none"), ("spectrum", "not-reentrant"), ("full", "reentrant")],
    ),
)
def test_exactly_the_plan_trains_on_a_plain_model(base: Any, tmp_path: Path, mode: str, checkpointing: str) -> None:
    before = values(base)
    callback = SpectrumCallback(config_of(mode))
    run = trainer(base, tmp_path, [callback], **CHECKPOINTING[checkpointing])
    run.train()
    planned = set(callback.plan.trainable_names)
    assert type(run.model) is type(base)
    assert held_by(run.optimizer, base) == planned
    after = values(base)
    moved = {name for name in before if not same_bytes(before[name], after[name])}
    assert moved == planned
    assert planned == set(before) or mode != "full"
    run.train()  # a second run goes on
    again = values(base)
    assert {name for name in after if not same_bytes(after[name], again[name])} == planned
    assert {name for name in before if name not in planned and not same_bytes(before[name], again[name])} == set()


@pytest.mark.slow
@pytest.mark.parametrize("mode", PLAIN_MODES)
def test_checkpointing_changes_nothing_in_the_result(folder: Path, tmp_path: Path, mode: str) -> None:
    ends = []
    for kind in CHECKPOINTING.values():
        model = load(folder)
        trainer(model, tmp_path, [SpectrumCallback(config_of(mode))], **kind).train()
        ends.append(values(model))
    for other in ends[1:]:
        assert_same(ends[0], other)


def test_a_model_from_the_short_way_needs_no_config(folder: Path, tmp_path: Path) -> None:
    model, _ = load_model_with_spectrum(str(folder), config_of("spectrum"), dtype="float32")
    callback = SpectrumCallback()
    trainer(model, tmp_path, [callback], save_strategy="steps", save_steps=2).train()
    assert callback.plan is model.spectrum_plan
    # A standard checkpoint: plain transformers reads it.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    assert torch.equal(logits(plain), logits(model))


# --- set up wrongly --------------------------------------------------------------------------------------------------


def test_a_callback_added_after_the_trainer_was_built_is_refused(base: Any, tmp_path: Path) -> None:
    run = trainer(base, tmp_path, [])
    run.add_callback(SpectrumCallback(config_of("spectrum")))
    before = values(base)
    with pytest.raises(TrainingSetupError, match=r"added after the trainer was built.*callbacks=\[SpectrumCallback"):
        run.train()
    assert_same(before, values(base))


def test_model_init_without_freezing_is_refused_and_with_freezing_works(folder: Path, tmp_path: Path) -> None:
    rows = token_rows()
    run = Trainer(
        model_init=lambda: load(folder), args=arguments(tmp_path), train_dataset=rows,
        callbacks=[SpectrumCallback(config_of("spectrum"))],
    )  # fmt: skip
    with pytest.raises(TrainingSetupError, match=r"model_init=\.\.\.\) builds it anew.*Freeze inside model_init"):
        run.train()

    def frozen() -> Any:
        return load_model_with_spectrum(str(folder), config_of("spectrum"), dtype="float32")[0]

    callback = SpectrumCallback()
    run = Trainer(model_init=frozen, args=arguments(tmp_path), train_dataset=rows, callbacks=[callback])
    run.train()
    start = values(load(folder))
    moved = {n for n, p in values(run.model).items() if not same_bytes(p, start[n])}
    assert moved == set(callback.plan.trainable_names)


@pytest.mark.parametrize("mode", ADAPTER_MODES)
def test_an_adapter_mode_on_a_plain_model_is_refused(base: Any, tmp_path: Path, mode: str) -> None:
    with pytest.raises(OptionError, match=rf"mode '{mode}' puts adapters into the model.*get_peft_model\(model"):
        trainer(base, tmp_path, [SpectrumCallback(config_of(mode))])


def test_a_config_on_a_model_that_carries_a_plan_is_refused(folder: Path, tmp_path: Path) -> None:
    carrying = [
        adapted(load(folder), "lora"),
        load_model_with_spectrum(str(folder), config_of("spectrum"), dtype="float32")[0],
    ]
    for model in carrying:
        with pytest.raises(OptionError, match=r"carries a plan already; use SpectrumCallback\(\)"):
            trainer(model, tmp_path, [SpectrumCallback(config_of("spectrum"))])


def test_no_plan_at_all_is_refused(base: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingSetupError, match="on a model without a plan: give it a config"):
        trainer(base, tmp_path, [SpectrumCallback()])


@pytest.mark.parametrize("kind", ["plain", "adapter"])
def test_a_change_of_requires_grad_in_between_is_refused_by_name(base: Any, tmp_path: Path, kind: str) -> None:
    model = base if kind == "plain" else adapted(base, "lora")
    callback = SpectrumCallback(config_of("spectrum") if kind == "plain" else None)
    run = trainer(model, tmp_path, [callback])
    name = callback.plan.trainable_names[0]
    for parameter, entry in plan_parameters(model).items():
        if entry == name:
            model.get_parameter(parameter).requires_grad_(False)
    with pytest.raises(TrainingSetupError, match=rf"1 planned parameters do not train, first {name}"):
        run.train()
    for parameter, entry in plan_parameters(model).items():
        if entry == name:
            model.get_parameter(parameter).requires_grad_(True)
    base.lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainingSetupError, match=r"first .*lm_head\.weight.*Something changed requires_grad"):
        run.train()


def test_an_optimizer_that_holds_other_tensors_is_refused(base: Any, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    callback = SpectrumCallback(config_of("spectrum"))
    run = trainer(base, tmp_path, [callback], optimizers=(optimizer, schedule))
    with pytest.raises(TrainingSetupError, match=r"optimizer holds \d+ tensors and the plan trains 7.*build the train"):
        run.train()


def test_a_rate_far_from_the_modes_own_is_said_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate, said in ((2e-3, 1), (1e-3, 0), (2e-5, 0), (5e-6, 0), (1e-6, 1)):
        caplog.clear()
        trainer(load(folder), tmp_path, [SpectrumCallback(config_of("spectrum"))], learning_rate=rate)
        lines = [r for r in caplog.records if "usual rate" in r.message]
        assert len(lines) == said, rate
        if said:
            assert lines[0].levelname == "WARNING"
            assert (
                lines[0].message
                == f"learning_rate={rate:g}; the usual rate of mode 'spectrum' with TrainingArguments is about 2e-05 "
                "(long runs) to 0.00036"
            )


# --- plans that need the callback ------------------------------------------------------------------------------------


def needy(folder: Path, which: str) -> Any:
    if which == "lr_ratio":
        return adapted(load(folder), "alors", scope="global")
    if which == "rescore_every":
        return adapted(load(folder), "spectra_qlora", rescore_every=2)
    return quantized(folder, "spectrum")


@pytest.mark.parametrize("which", only_fast(["lr_ratio", "rescore_every", "real weights"], fast=["real weights"]))
def test_a_plan_that_needs_the_callback_refuses_to_train_without(folder: Path, tmp_path: Path, which: str) -> None:
    model = needy(folder, which)
    reason = rf"needs SpectrumCallback: .*{which}.*callbacks=\[SpectrumCallback\(\)\]"
    assert torch.isfinite(logits(model)).all()  # evaluation is nobody's business
    with torch.no_grad():
        model.train()(input_ids=torch.zeros(1, 4, dtype=torch.long))
    bare = trainer(model, tmp_path, [])
    with pytest.raises(TrainingSetupError, match=reason):
        bare.train()
    trainer(model, tmp_path, [SpectrumCallback()]).train()
    with pytest.raises(TrainingSetupError, match=reason):  # the callback is gone with its trainer
        bare.train()


@pytest.mark.slow
def test_a_plan_that_needs_nothing_trains_without_the_callback(folder: Path, tmp_path: Path) -> None:
    for mode in ("lora", "spectra_qlora", "spectrum"):
        model = adapted(load(folder), mode)
        before = values(model, trainable=True)
        trainer(model, tmp_path, []).train()
        assert any(not torch.equal(before[n], p) for n, p in values(model, trainable=True).items())


# --- what lies beside a checkpoint, and resume -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["spectrum", "alors"])
def test_plan_and_report_lie_beside_every_checkpoint(base: Any, tmp_path: Path, mode: str) -> None:
    plain = MODES[mode].plain_model
    model = base if plain else adapted(base, mode)
    callback = SpectrumCallback(config_of(mode) if plain else None)
    trainer(model, tmp_path, [callback], max_steps=3, save_strategy="steps", save_steps=1).train()
    for step in (1, 2, 3):
        assert Plan.load(tmp_path / f"checkpoint-{step}" / "spectrum_plan.yaml") == callback.plan
        report = SnrReport.load(tmp_path / f"checkpoint-{step}" / "spectrum_report.json")
        assert {n for n, score in report.scores.items() if score is not None} == {
            e.name for e in callback.plan.entries if e.score is not None
        }
    stored = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored["SpectrumCallback"]["attributes"]["initial_digest"] == callback.plan.digest


@pytest.mark.parametrize(
    ("mode", "restore"),
    only_fast(
        [(mode, restore) for mode in ("spectrum", "alors") for restore in (False, True)],
        fast=[("spectrum", True), ("alors", False)],
    ),
)
def test_resume_is_exact_and_refuses_another_plan(folder: Path, tmp_path: Path, mode: str, restore: bool) -> None:
    def run(out: str, resume: str | None = None, **options: Any) -> tuple[Trainer, SpectrumCallback]:
        plain = MODES[mode].plain_model
        model = load(folder) if plain else adapted(load(folder), mode, **{"scope": "global", **options})
        callback = SpectrumCallback(config_of(mode, **options) if plain else None)
        run = trainer(
            model, tmp_path / out, [callback], max_steps=4, save_strategy="steps", save_steps=2,
            restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        run.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return run, callback

    whole, first = run("a")
    resumed, _ = run("b", "a/checkpoint-2")
    assert_same(values(whole.model), values(resumed.model))
    # The plan that the resumed run writes is the first one's, report included.
    for name in ("spectrum_plan.yaml", "spectrum_report.json"):
        ours, other = ((tmp_path / out / "checkpoint-4" / name).read_bytes() for out in "ab")
        assert ours == other
    # Other matrices of the same shapes, and other bounds of the rates: no tensor's shape would betray them.
    other = {"criterion": "last"} if mode == "spectrum" else {"lr_ratio": (0.25, 4.0)}
    with pytest.raises(MismatchError, match=f"trained under plan {first.plan.digest[:12]}.*spectrum_plan.yaml in the"):
        run("c", "a/checkpoint-2", **other)


def test_steps_of_other_rows_are_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    """With another number of rows a step, the trainer skips as many steps of its own: other rows than were seen."""

    def run(out: str, **how: Any) -> Any:
        steps = {
            "max_steps": 3,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_strategy": "steps",
            "logging_steps": 1,
        }
        return trainer(load(folder), tmp_path / out, [SpectrumCallback(config_of("spectrum"))], **{**steps, **how})

    run("a").train()
    before = str(tmp_path / "a" / "checkpoint-2")
    with pytest.raises(
        MismatchError, match=r"took 4 rows and one of this run takes 2 \(2 on each of 1 processes, 1 times\)"
    ):
        run("b", per_device_train_batch_size=2).train(resume_from_checkpoint=before)
    half = run("c", per_device_train_batch_size=2, gradient_accumulation_steps=2)  # as many, in two parts
    half.train(resume_from_checkpoint=before)
    assert half.state.global_step == 3


def test_a_plan_of_other_size_is_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    # An adapter's file is compared with the plan by us. A plain model's checkpoint holds every weight, and Trainer
    # loads the optimizer's state before any callback is asked: there the message is torch's.
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(load(folder), tmp_path / "plain", [SpectrumCallback(config_of("spectrum"))], **steps).train()
    run = trainer(load(folder), tmp_path / "b", [SpectrumCallback(config_of("spectrum", spectrum_ratio=1.0))], **steps)
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        run.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))
    trainer(adapted(load(folder), "lora"), tmp_path / "lora", [SpectrumCallback()], **steps).train()
    for other in (adapted(load(folder), "spectra_qlora"), adapted(load(folder), "lora", r=4)):
        run = trainer(other, tmp_path / "b", [SpectrumCallback()], **steps)
        with pytest.raises(MismatchError, match=r"adapter 'default': the file holds .*lora_A"):
            run.train(resume_from_checkpoint=str(tmp_path / "lora" / "checkpoint-1"))


@pytest.mark.slow
def test_an_adapter_loaded_from_a_checkpoint_resumes_from_it(folder: Path, tmp_path: Path) -> None:
    # Its plan is the one that the run had come to, not the one it began with.
    def run(model: Any, out: str, resume: str | None = None) -> Any:
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
        run = trainer(model, tmp_path / out, [SpectrumCallback()], **steps)
        run.train(resume_from_checkpoint=resume)
        return run

    whole = run(adapted(load(folder), "spectra_qlora", scope="global", rescore_every=1), "a")
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    model = PeftModel.from_pretrained(load(folder), checkpoint, is_trainable=True)
    assert_same(values(whole.model), values(run(model, "b", checkpoint).model))


# --- SFTTrainer's cast of what trains on a quantized base ------------------------------------------------------------


class Dtypes(TrainerCallback):
    """What the trainer's own casts left when the callbacks before this one had spoken."""

    def __init__(self) -> None:
        self.at_start: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.at_start = values(model, trainable=True)


@pytest.mark.parametrize("mode", only_fast(QUANTIZABLE, fast=["spectrum", "alors"]))
def test_rounding_by_the_trainer_is_undone_exactly(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path, mode: str
) -> None:
    model = quantized(folder, mode)
    before, start = values(model, trainable=True), logits(model)
    assert {p.dtype for p in before.values()} == {torch.float32}
    watch = Dtypes()
    run = sft(model, tiny_tokenizer, tmp_path, [SpectrumCallback(), watch])
    assert_same(before, values(model, trainable=True))
    assert torch.equal(logits(model), start)
    run.train()
    assert_same(before, watch.at_start)
    after = values(model, trainable=True)
    assert {p.dtype for p in after.values()} == {torch.float32}
    moments = [m for s in innermost(run.optimizer).state.values() for m in s.values() if m.ndim]
    assert {m.dtype for m in moments} == {torch.float32}
    # A trained adapter goes into another trainer: it goes on from what it is.
    trained = logits(model)
    assert not torch.equal(trained, start)
    sft(model, tiny_tokenizer, tmp_path, [SpectrumCallback()])
    assert_same(after, values(model, trainable=True))
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("mode", only_fast(["spectrum", "lora"], fast=["spectrum"]))
def test_an_adapter_from_a_file_is_not_rounded_either(
    folder: Path, tiny_tokenizer: Any, tmp_path: Path, mode: str
) -> None:
    model = quantized(folder, mode)
    sft(model, tiny_tokenizer, tmp_path, [SpectrumCallback()], learning_rate=0.01).train()
    model.save_pretrained(tmp_path / "adapter")
    trained = logits(model)
    again = PeftModel.from_pretrained(quantized(folder, mode).unload(), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(again), trained)
    sft(again, tiny_tokenizer, tmp_path, [SpectrumCallback()])
    assert torch.equal(logits(again), trained)


def test_a_deep_copy_keeps_exact_values_of_its_own(folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(folder, "lora")
    twin = copy.deepcopy(model)
    sft(twin, tiny_tokenizer, tmp_path, [SpectrumCallback()], learning_rate=0.01).train()
    trained = values(twin, trainable=True)
    sft(twin, tiny_tokenizer, tmp_path, [SpectrumCallback()])
    assert_same(values(twin, trainable=True), trained)
    assert any(not torch.equal(p, trained[n]) for n, p in values(model, trainable=True).items())


def test_without_the_callback_the_trainer_does_round(folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    # The control: if TRL stops casting, the two tests above prove nothing any more.
    model = quantized(folder, "lora")
    sft(model, tiny_tokenizer, tmp_path, [])
    assert {p.dtype for p in values(model, trainable=True).values()} == {torch.bfloat16}


def test_values_that_moved_on_are_kept_where_they_are(folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    # Trained in bfloat16 by a trainer without the callback, then given to one with it: not set back, only widened.
    model = quantized(folder, "lora")
    sft(model, tiny_tokenizer, tmp_path, [], learning_rate=0.05).train()
    moved = values(model, trainable=True)
    sft(model, tiny_tokenizer, tmp_path, [SpectrumCallback()])
    assert_same(values(model, trainable=True), {name: value.float() for name, value in moved.items()})


def test_trainable_dtype_base_trains_in_the_dtype_of_the_model(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = adapted(model, "spectrum", trainable_dtype="base")
    trainer(model, tmp_path, [SpectrumCallback()], learning_rate=1e-2).train()
    assert {p.dtype for p in values(model, trainable=True).values()} == {torch.bfloat16}


# --- backward ends where nothing below trains ------------------------------------------------------------------------


@contextmanager
def visits(model: Any) -> Iterator[set[int]]:
    """Numbers of the blocks that a backward pass enters."""
    seen: set[int] = set()
    handles = []
    for number, block in enumerate(blocks_of(model)):

        def hook(module: Any, grad_input: Any, grad_output: Any, number: int = number) -> None:
            seen.add(number)

        handles.append(block.mlp.down_proj.register_full_backward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: Any) -> Any:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model.layers


class Gradients(TrainerCallback):
    """Which parameters have a gradient when the optimizer is about to step."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.names |= {name for name, p in model.named_parameters() if p.grad is not None}


def depth_case(kind: str, tiny_llama_folder: Path, depth: float) -> tuple[Any, dict[str, Any], SpectrumCallback]:
    """(model, peft_config, callback): a plain model, an adapter that the trainer makes, one on a 4-bit base."""
    options = {"spectrum_ratio": 0.5, "backward_depth": depth}
    if kind == "plain":
        return load(tiny_llama_folder), {}, SpectrumCallback(config_of("spectrum", **options))
    if kind == "nf4":
        return quantized(tiny_llama_folder, "spectra_qlora", **options), {}, SpectrumCallback()
    if kind == "prepared twice":  # with checkpointing on before PEFT sees it: three hooks, of which one handle is kept
        how = quantization_config_for(None, str(tiny_llama_folder), compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32, quantization_config=how)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        return adapted(model, "spectra_qlora", **options), {}, SpectrumCallback()
    return load(tiny_llama_folder), {"peft_config": config_of(kind, **options)}, SpectrumCallback()


@pytest.mark.parametrize("kind", ["plain", "spectrum", "spectra_qlora", "nf4", "prepared twice"])
def test_no_block_below_the_cut_sees_backward_under_sfttrainers_defaults(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    model, extra, callback = depth_case(kind, tiny_llama_folder, 0.5)
    gradients = Gradients()
    run = sft(model, tiny_tokenizer, tmp_path, [callback, gradients], **extra)
    assert run.args.activation_checkpointing
    with visits(run.model) as seen:
        run.train()
    assert seen == {2, 3}
    assert gradients.names
    assert {int(name.split("layers.")[1].split(".")[0]) for name in gradients.names} == {2, 3}


def test_without_a_cut_backward_runs_through_every_block(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, extra, callback = depth_case("spectra_qlora", tiny_llama_folder, 1.0)
    run = sft(model, tiny_tokenizer, tmp_path, [callback], **extra)
    with visits(run.model) as seen:
        run.train()
    assert seen == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "spectra_qlora"])
def test_the_cut_changes_the_cost_and_not_the_result(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    ends = []
    for checkpointing in (True, False):
        torch.manual_seed(0)
        model, extra, callback = depth_case(kind, tiny_llama_folder, 0.5)
        run = sft(model, tiny_tokenizer, tmp_path, [callback], activation_checkpointing=checkpointing, **extra)
        run.train()
        ends.append(values(run.model, trainable=True))
    assert_same(*ends)


def test_reentrant_checkpointing_keeps_its_input_gradient_and_says_what_it_costs(
    tiny_llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _, callback = depth_case("plain", tiny_llama_folder, 0.5)
    trainer(model, tmp_path, [callback], **CHECKPOINTING["reentrant"]).train()
    assert "set use_reentrant=False" in caplog.text


# --- evaluation in between on a 4-bit base ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", only_fast(QUANTIZABLE, fast=["lora"]))
def test_evaluation_between_steps_does_not_stop_gradients_on_a_4_bit_base(
    folder: Path, tmp_path: Path, mode: str
) -> None:
    # bitsandbytes repacks 4-bit weights in the first forward in eval mode on some CPUs; they have no backward then.
    ends = []
    for evaluate in (False, True):
        model = quantized(folder, mode)
        gradients = Gradients()
        changes = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": token_rows(8)} if evaluate else {}
        trainer(model, tmp_path, [SpectrumCallback(), gradients], max_steps=3, **changes).train()
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert gradients.names == trains
        ends.append(values(model, trainable=True))
    assert_same(*ends)


# --- what got no gradient --------------------------------------------------------------------------------------------


def with_unused(base: Any) -> Any:
    """A model with a matrix in its second block that the forward never uses."""
    mlp = base.model.layers[1].mlp
    mlp.spare_proj = torch.nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    base.config._name_or_path = ""
    return base


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", ["spectrum", "lora", "columns"])
def test_a_line_names_what_got_no_gradient(
    mode: str, accumulation: int, base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_unused(base)
    options = {"spectrum_ratio": 1.0} if mode == "spectrum" else {}
    if mode == "spectrum":
        callback = SpectrumCallback(config_of(mode, **options))
    else:
        model, callback = adapted(model, mode), SpectrumCallback()
    run = trainer(model, tmp_path, [callback], max_steps=3, gradient_accumulation_steps=accumulation)
    with caplog.at_level("WARNING", logger="spectrum_peft"):
        run.train()
    lines = [r.message for r in caplog.records if "got no gradient" in r.message]
    assert len(lines) == 1
    assert (
        "1 of 15 planned tensors got no gradient in the first step: model.layers.1.mlp.spare_proj.weight;" in lines[0]
    )


def test_no_line_where_all_that_is_planned_trains(base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(adapted(base, "alors"), tmp_path, [SpectrumCallback()], max_steps=1)
    with caplog.at_level("WARNING", logger="spectrum_peft"):
        run.train()
    assert not any("got no gradient" in r.message for r in caplog.records)


@pytest.mark.parametrize("mode", ["spectrum", "lora"])
def test_a_plan_of_which_nothing_is_used_is_refused_by_name(mode: str, base: Any, tmp_path: Path) -> None:
    """torch would say that element 0 of tensors does not require grad."""
    model = with_unused(base)
    plan = settle_plan(model, config_of(mode, **({"spectrum_ratio": 1.0} if mode == "spectrum" else {})))
    only = tuple(e for e in plan.entries if "spare_proj" in e.name and e.trains)
    assert len(only) == 1
    config = SpectrumConfig(mode=mode, plan=plan.replace(entries=only))
    model = get_peft_model(model, config) if mode == "lora" else model
    callback = SpectrumCallback() if mode == "lora" else SpectrumCallback(config)
    with pytest.raises(TrainingSetupError, match=r"LlamaForCausalLM computes .* 1 tensors, first .*spare_proj"):
        trainer(model, tmp_path, [callback], max_steps=1).train()
