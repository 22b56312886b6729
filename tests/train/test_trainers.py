"""Every mode through the trainers people use; killed runs; several adapters on one base."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import byte_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from running import (
    IDS,
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
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from spectrum_peft import (
    SpectrumCallback,
    SpectrumConfig,
    load_model_with_spectrum,
    make_plan,
    probe_gradients,
    quantization_config_for,
    scan_weights,
)
from spectrum_peft.errors import MismatchError, SpectrumError
from spectrum_peft.plan import MODES
from spectrum_peft.tuner import base_parameters, plan_parameters
from spectrum_peft.tuner.ranks import live_rank

pytestmark = LIBRARIES
TESTS = Path(__file__).parent
DOCS = TESTS.parents[1] / "docs"
PLAIN_MODES = [name for name, mode in MODES.items() if mode.plain_model]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models of two blocks, each with the byte tokenizer."""
    made = {}
    for family in ("llama", "llama_tied", "t5", "bert"):
        made[family] = tmp_path_factory.mktemp(family)
        ARCHITECTURES[family].build().save_pretrained(made[family])
        byte_tokenizer().save_pretrained(made[family])
    return made


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def config_of(mode: str, task_type: str = "CAUSAL_LM", **options: Any) -> SpectrumConfig:
    # Two blocks: ranked kind by kind there would be one tier. Across the kinds there are two.
    scope = {"scope": "global"} if MODES[mode].selective else {}
    return SpectrumConfig(mode=mode, task_type=task_type, **{**options_of(mode), **scope, **options})


def quantized(folder: Path, mode: str) -> Any:
    torch.manual_seed(1)
    return load_model_with_spectrum(str(folder), config_of(mode), quantization="nf4", dtype=torch.float32)[0]


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


LOGGED = {**QUIET, "logging_strategy": "steps", "logging_steps": 1, "learning_rate": 1e-2}


def sft(model: Any, out: Path, *callbacks: Any, tokenizer: Any = None, rows: Any = None, **changes: Any) -> SFTTrainer:
    """SFTTrainer as its users call it: gradient checkpointing on by default."""
    extra = {key: changes.pop(key) for key in ("peft_config",) if key in changes}
    return SFTTrainer(
        model=model, args=SFTConfig(output_dir=str(out), max_length=32, **{**LOGGED, **changes}),
        train_dataset=text_rows() if rows is None else rows, processing_class=tokenizer or byte_tokenizer(),
        callbacks=[SpectrumCallback(), *callbacks], **extra,
    )  # fmt: skip


def base_values(model: Any) -> dict[str, torch.Tensor]:
    """{base name: copy} of what lies in the base layers, real weights that train left out."""
    found = base_parameters(model)
    return {
        name: owner._parameters[leaf].detach().clone()
        for name, (owner, leaf) in found.items()
        if owner._parameters[leaf] is not None
    }


def train_and_check(run: Trainer) -> None:
    """Train; everything that is to train has moved, nothing else has, not by a bit."""
    model = run.model
    before, base = values(model), base_values(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains
    run.train()
    after = values(model)
    moved = {name for name in before if not same_bytes(before[name], after[name])}
    assert moved == trains
    held = {entry for name, entry in plan_parameters(model).items() if name in trains}
    assert [n for n, v in base_values(model).items() if n not in held and not same_bytes(v, base[n])] == []


# --- SFTTrainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", only_fast(["llama", "llama_tied"], fast=["llama_tied"]))
@pytest.mark.parametrize("mode", only_fast(MODES, fast=["full", "spectrum", "alors"]))
def test_sft_on_a_float_base(folders: dict[str, Path], tmp_path: Path, mode: str, family: str) -> None:
    losses = Losses()
    saved = {"save_strategy": "steps", "save_steps": 2}
    run = sft(load(folders[family]), tmp_path / "run", losses, peft_config=config_of(mode), **saved)
    train_and_check(run)
    assert losses.losses[1] < losses.losses[0]
    trained = logits(run.model)
    again = PeftModel.from_pretrained(load(folders[family]), tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(again), trained)
    merged = run.model.merge_and_unload()
    # Merging rounds W + dW once to float32: some ten roundings of 1.2e-7 of logits of order one.
    assert (logits(merged) - trained).abs().max() < 2e-6
    if family == "llama_tied":
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("family", only_fast(["llama", "llama_tied"], fast=["llama"]))
@pytest.mark.parametrize("mode", only_fast(QUANTIZABLE, fast=["spectrum", "alors"]))
def test_sft_on_a_4_bit_base(folders: dict[str, Path], tmp_path: Path, mode: str, family: str) -> None:
    losses = Losses()
    run = sft(quantized(folders[family], mode), tmp_path / "run", losses, save_strategy="steps", save_steps=2)
    train_and_check(run)
    assert losses.losses[1] < losses.losses[0]
    # The same base, its quantized weights from the same float ones, with the checkpoint's adapter on it.
    bare = quantized(folders[family], mode).unload()
    again = PeftModel.from_pretrained(bare, tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(again), logits(run.model))


@pytest.mark.parametrize("mode", only_fast(MODES, fast=["spectrum"]))
def test_sft_on_a_bfloat16_base_trains_in_float32(folders: dict[str, Path], tmp_path: Path, mode: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    losses = Losses()
    saved = {"save_strategy": "steps", "save_steps": 2}
    run = sft(model, tmp_path / "run", losses, peft_config=config_of(mode), bf16=True, **saved)
    # Modules that train whole (embeddings and head of `full`) are PEFT's copies, in the base's dtype.
    layers = {n: p for n, p in run.model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    assert {p.dtype for p in layers.values()} == {torch.float32}
    train_and_check(run)
    assert losses.losses[1] < losses.losses[0]
    base = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-2")
    # Tensors, not logits: the trainer's model computes under autocast for good.
    for name, value in dict(again.named_parameters()).items():
        assert torch.equal(value, run.model.get_parameter(name)), name


@pytest.mark.parametrize("mode", only_fast(QUANTIZABLE, fast=["spectrum"]))
def test_sft_with_peft_config_on_a_base_quantized_by_hand(folders: dict[str, Path], tmp_path: Path, mode: str) -> None:
    options = options_of(mode)
    data, _ = options.pop("calibration_data", None), options.pop("exclude_modules", None)
    gradients = None if data is None else probe_gradients(load(folders["llama"]), data, svd_rank=64)
    plan = make_plan(scan_weights(str(folders["llama"])), gradients=gradients, mode=mode, **options)
    base = AutoModelForCausalLM.from_pretrained(
        folders["llama"], dtype=torch.float32,
        quantization_config=quantization_config_for(plan, str(folders["llama"]), compute_dtype=torch.float32),
    )  # fmt: skip
    config = SpectrumConfig(plan=plan, task_type="CAUSAL_LM")
    run = sft(base, tmp_path, peft_config=config)
    assert run.model.peft_config["default"].plan.trainable_names == plan.trainable_names
    train_and_check(run)
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}


def test_real_weights_asked_of_a_fully_quantized_base_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        folders["llama"], dtype=torch.float32,
        quantization_config=quantization_config_for(None, compute_dtype=torch.float32),
    )  # fmt: skip
    with pytest.raises(MismatchError, match=r"is quantized .* quantization_config_for\(plan, model\)"):
        sft(base, tmp_path, peft_config=config_of("spectrum"))


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("mode", only_fast(MODES, fast=["full", "alors"]))
def test_sft_with_new_chat_tokens(folders: dict[str, Path], tmp_path: Path, mode: str, family: str) -> None:
    # TRL adds tokens, asks PEFT to train their rows of the embedding, and the whole head: on a tied model one tensor.
    source = byte_tokenizer()
    source.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    source.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    source.save_pretrained(tmp_path / "source")
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(16)]
    run = sft(
        load(folders[family]), tmp_path / "run", rows=Dataset.from_dict({"messages": chats}),
        peft_config=config_of(mode), chat_template_path=str(tmp_path / "source"),
    )  # fmt: skip
    embedding = run.model.get_base_model().get_input_embeddings()
    size = embedding.weight.shape[0]
    assert size > ARCHITECTURES[family].config().vocab_size
    train_and_check(run)
    plan = run.model.peft_config["default"].plan
    saved = {e.name for e in plan.entries if e.trains and e.action == "save"}
    assert {"model.embed_tokens.weight"} <= saved
    assert ("lm_head.weight" in saved) == (family == "llama")
    rows = (embedding.weight.detach() - embedding.original_module.weight.detach()).abs().sum(1)
    ids = set(rows.nonzero().flatten().tolist())
    tokens = run.model.peft_config["default"].trainable_token_indices
    new = {259, 260}  # and rows that TRL adds to round the size up
    if MODES[mode].whole_model:
        assert new < ids
        assert tokens is None
    else:
        assert new <= ids <= set(tokens["embed_tokens"])
    trained = logits(run.model)
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):  # so PEFT saves all of it
        run.save_model(str(tmp_path / "adapter"))
    base = load(folders[family])
    torch.manual_seed(0)
    base.resize_token_embeddings(size)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    merged = run.model.merge_and_unload()
    # Merging rounds W + dW once to float32: some ten roundings of 1.2e-7 of logits of order one.
    assert (logits(merged) - trained).abs().max() < 2e-6
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (family == "llama_tied")


# --- DPO and reward models -------------------------------------------------------------------------------------------


def preferences() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{i} squared is", "chosen": f" {i * i}", "rejected": f" {i + i}!"} for i in range(16)]
    )


def dpo(model: Any, out: Path, *callbacks: Any, **changes: Any) -> DPOTrainer:
    extra = {key: changes.pop(key) for key in ("peft_config",) if key in changes}
    return DPOTrainer(
        model=model, args=DPOConfig(output_dir=str(out), max_length=32, **{**LOGGED, **changes}),
        train_dataset=preferences(), processing_class=byte_tokenizer(), callbacks=[SpectrumCallback(), *callbacks],
        **extra,
    )  # fmt: skip


@pytest.mark.parametrize("mode", only_fast(MODES, fast=["spectrum"]))
def test_dpo_with_peft_config_starts_from_the_base(folders: dict[str, Path], tmp_path: Path, mode: str) -> None:
    losses = Losses()
    run = dpo(load(folders["llama"]), tmp_path, losses, peft_config=config_of(mode))
    train_and_check(run)
    assert math.isclose(losses.losses[0], math.log(2), abs_tol=1e-6)
    assert losses.losses[1] < losses.losses[0]


@pytest.mark.parametrize(
    ("mode", "base"),
    only_fast(
        [(mode, base) for mode in MODES for base in ("float", "nf4")], fast=[("spectrum", "nf4"), ("alors", "float")]
    ),
)
def test_the_reference_of_a_ready_adapter_is_its_start_and_does_not_follow(
    folders: dict[str, Path], tmp_path: Path, mode: str, base: str
) -> None:
    if base == "nf4" and mode not in QUANTIZABLE:
        pytest.skip("trains every weight: none can be quantized")
    if base == "nf4":
        model = quantized(folders["llama"], mode)
    else:
        torch.manual_seed(1)
        model = get_peft_model(load(folders["llama"]), config_of(mode))
    trainer(model, tmp_path / "first", [SpectrumCallback()], learning_rate=1e-2).train()
    start, trained = values(model, trainable=True), logits(model)
    losses = Losses()
    run = dpo(model, tmp_path / "dpo", losses, save_strategy="steps", save_steps=2)
    run.train()
    assert math.isclose(losses.losses[0], math.log(2), abs_tol=1e-6)
    assert losses.losses[1] < losses.losses[0]
    after = values(model)
    for name, value in start.items():
        assert same_bytes(after[name.replace(".default", ".ref")], value), name
        assert not same_bytes(after[name], value), name
    model.set_adapter("ref")
    assert torch.equal(logits(model), trained)
    model.set_adapter("default")
    assert not torch.equal(logits(model), trained)


@pytest.mark.slow
def test_dpo_resumes_with_its_reference(folders: dict[str, Path], tmp_path: Path) -> None:
    def run(out: str, resume: str | None = None) -> Any:
        torch.manual_seed(1)
        model = get_peft_model(load(folders["llama"]), config_of("alors", rescore_every=1))
        trainer(model, tmp_path / "first", [SpectrumCallback()], learning_rate=2e-2, max_steps=3).train()
        run = dpo(model, tmp_path / out, save_strategy="steps", save_steps=2, max_steps=4)
        run.train(resume_from_checkpoint=resume)
        return run.model

    whole = run("a")
    resumed = run("b", str(tmp_path / "a" / "checkpoint-2"))
    assert_same(values(whole), values(resumed))
    layers = {n: m for n, m in whole.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    ranks = {}
    for name in ("default", "ref"):
        assert whole.peft_config[name].plan == resumed.peft_config[name].plan
        # Each says its own ranks: the policy's have moved since the reference was made.
        ranks[name] = {f"{n}.weight": live_rank(layer, name) for n, layer in layers.items()}
        assert ranks[name] == {e.name: e.rank for e in whole.peft_config[name].plan.entries if e.name in ranks[name]}
    assert ranks["default"] != ranks["ref"]


@pytest.mark.parametrize("mode", only_fast(MODES, fast=["spectrum"]))
def test_reward_training_moves_the_new_head(folders: dict[str, Path], tmp_path: Path, mode: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folders["llama"], num_labels=1, dtype=torch.float32)
    losses = Losses()
    config = config_of(mode, "SEQ_CLS")
    if config.calibration_data is not None:  # pairs of answers have no labels: the language model's gradients stand in
        data, config.calibration_data = config.calibration_data, None
        config.gradients = probe_gradients(load(folders["llama"]), data, svd_rank=64)
    run = RewardTrainer(
        model=model, args=RewardConfig(output_dir=str(tmp_path), max_length=32, **LOGGED),
        train_dataset=preferences(), processing_class=byte_tokenizer(), peft_config=config,
        callbacks=[SpectrumCallback(), losses],
    )  # fmt: skip
    train_and_check(run)
    assert "score.weight" in run.model.peft_config["default"].plan.trainable_names
    assert losses.losses[1] < losses.losses[0]


# --- other tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", only_fast(MODES, fast=["spectrum"]))
def test_seq2seq(folders: dict[str, Path], tmp_path: Path, mode: str) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folders["t5"], dtype=torch.float32)
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_max_length=4, **LOGGED
    )
    run = Seq2SeqTrainer(
        model=get_peft_model(model, config_of(mode, "SEQ_2_SEQ_LM")), args=args, train_dataset=token_rows(),
        eval_dataset=token_rows(4), callbacks=[SpectrumCallback()],
    )  # fmt: skip
    before = run.evaluate()["eval_loss"]
    train_and_check(run)
    assert run.evaluate()["eval_loss"] < before
    assert run.predict(token_rows(4)).predictions.shape[0] == 4


def labelled_rows(count: int = 16) -> Dataset:
    """Rows whose label is told by the first token."""
    rows = token_rows(count).remove_columns("labels")
    labels = [i % 3 for i in range(count)]
    ids = [[label, *row[1:]] for label, row in zip(labels, rows["input_ids"], strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.mark.parametrize("mode", only_fast(MODES, fast=["alors"]))
def test_classification_with_an_adapter(folders: dict[str, Path], tmp_path: Path, mode: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3, dtype=torch.float32)
    config = config_of(mode, "SEQ_CLS")
    if config.calibration_data is not None:
        config.calibration_data = [{"input_ids": IDS, "labels": torch.tensor([0, 2])}]
    model = get_peft_model(model, config)
    run = trainer(model, tmp_path, [SpectrumCallback()], labelled_rows(), learning_rate=1e-2)
    train_and_check(run)
    names = run.model.peft_config["default"].plan.trainable_names
    assert {"classifier.weight", "classifier.bias"} <= set(names)
    run.save_model(str(tmp_path / "adapter"))
    base = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(run.model))


@pytest.mark.parametrize("mode", PLAIN_MODES)
def test_classification_on_a_plain_model_trains_the_new_head(
    folders: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3, dtype=torch.float32)
    callback = SpectrumCallback(SpectrumConfig(mode=mode, **options_of(mode)))
    run = Trainer(
        model=model, args=arguments(tmp_path, learning_rate=1e-2), train_dataset=labelled_rows(), callbacks=[callback]
    )
    train_and_check(run)
    head = {"classifier.weight", "classifier.bias"}
    assert head <= set(callback.plan.trainable_names)
    assert head <= {n for n, p in model.named_parameters() if p.requires_grad}


# --- killed and resumed ----------------------------------------------------------------------------------------------

CASES = [*MODES, *(f"{mode}:nf4" for mode in QUANTIZABLE), *(f"{mode}:plain" for mode in PLAIN_MODES)]


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    script = [sys.executable, "-W", "ignore", str(TESTS / "killed_runs.py"), str(out), *CASES]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumed_ends_as_one_that_was_not_killed(killed: Path, case: str) -> None:
    whole, resumed = (load_file(killed / case.replace(":", "-") / f"{end}.safetensors") for end in ("whole", "resumed"))
    assert_same(whole, resumed)


# --- several adapters on one base ------------------------------------------------------------------------------------


def tuned(folder: Path, out: Path, mode: str, name: str = "default", **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter trained alone on a fresh base: its folder and its logits."""
    torch.manual_seed(len(name))
    model = get_peft_model(load(folder), config_of(mode, **options))
    trainer(model, out / "run", [SpectrumCallback()], learning_rate=1e-2).train()
    model.save_pretrained(out / f"{mode}-{name}")
    return out / f"{mode}-{name}", logits(model)


def together(base: Any, first: tuple[Path, torch.Tensor], second: tuple[Path, torch.Tensor], out: Path) -> str:
    """Load two adapters on one base and try everything; `work`, or how the second is refused."""
    plain = logits(base)
    model = PeftModel.from_pretrained(base, first[0], adapter_name="one", is_trainable=True)
    before = values(model)
    try:
        model.load_adapter(str(second[0]), "two", is_trainable=True)
    except MismatchError as error:
        assert "of adapter 'one', and adapter 'two' wants" in str(error)
        # Nothing of the second was left behind, and the first goes on.
        assert_same(before, values(model))
        assert set(model.peft_config) == {"one"}
        assert torch.equal(logits(model), first[1])
        trainer(model, out / "more", [SpectrumCallback()]).train()
        return "refused"
    for name, wanted in (("two", second[1]), ("one", first[1]), ("two", second[1])):
        model.set_adapter(name)
        assert torch.equal(logits(model), wanted)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all(".two" in n for n in trains)
    kept = {n: v for n, v in values(model).items() if ".one" in n}
    trainer(model, out / "more", [SpectrumCallback()], learning_rate=1e-2).train()  # training one leaves the other
    assert_same(kept, {n: v for n, v in values(model).items() if ".one" in n})
    trained = logits(model)
    assert not torch.equal(trained, second[1])
    model.save_pretrained(out / "both")
    fresh = load(Path(base.config._name_or_path))
    again = PeftModel.from_pretrained(fresh, out / "both" / "one", adapter_name="one")
    again.load_adapter(str(out / "both" / "two"), "two")
    for name, wanted in (("one", first[1]), ("two", trained)):
        again.set_adapter(name)
        assert torch.equal(logits(again), wanted)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model), trained)
    return "work"


def both_at_once(base: Any, first: Path, second: Path) -> str:
    """What happens when both are made active: `add up`, or `refused`."""
    model = PeftModel.from_pretrained(base, first, adapter_name="one")
    model.load_adapter(str(second), "two")
    try:
        model.base_model.set_adapter(["one", "two"])
        result = logits(model)
    except SpectrumError as error:
        assert "adapters ['one', 'two'] each hold a value of it, and a weight has one; activate one" in str(error)
        return "refused"
    for layer in model.modules():  # the change of every weight is the sum of both changes
        if hasattr(layer, "get_delta_weight") and {"one", "two"} <= set(layer.lora_A):
            x = torch.randn(3, layer.in_features)
            change = layer.get_delta_weight("one") + layer.get_delta_weight("two")
            assert torch.allclose(layer(x) - layer.base_layer(x), x @ change.T, atol=1e-5)
    assert torch.isfinite(result).all()
    return "add up"


PAIRS = [(a, b) for a in MODES for b in MODES]
FAST_PAIRS = [("spectrum", "spectrum"), ("alors", "spectrum")]


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes `tuned` adapters once for each (mode, name)."""
    made: dict[tuple[str, str], Any] = {}

    def get(mode: str, name: str) -> tuple[Path, torch.Tensor]:
        if (mode, name) not in made:
            made[mode, name] = tuned(folders["llama"], tmp_path_factory.mktemp("tuned"), mode, name)
        return made[mode, name]

    return get


def table_of_the_docs() -> dict[tuple[str, str], list[str]]:
    """{(first mode, second mode): [what they do, what they do when active at once]} in docs/adapters_together.md."""
    rows = {}
    for line in (DOCS / "adapters_together.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0] in MODES:
            rows[cells[0], cells[1]] = cells[2:]
    return rows


@pytest.mark.parametrize(("first", "second"), only_fast(PAIRS, fast=FAST_PAIRS))
def test_two_adapters_on_one_base_do_what_the_table_says(
    folders: dict[str, Path], adapters: Any, tmp_path: Path, first: str, second: str
) -> None:
    one, two = adapters(first, "a"), adapters(second, "bb")
    measured = [together(load(folders["llama"]), one, two, tmp_path), "-"]
    if measured[0] == "work":
        measured[1] = both_at_once(load(folders["llama"]), one[0], two[0])
    row = f"| `{first}` | `{second}` | {measured[0]} | {measured[1]} |"
    assert table_of_the_docs()[first, second] == measured, f"docs/adapters_together.md should say: {row}"


def test_the_table_has_every_pair_of_modes() -> None:
    assert list(table_of_the_docs()) == PAIRS


@pytest.mark.slow
def test_kinds_that_share_no_module_work_together(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["llama"]
    real = tuned(folder, tmp_path, "spectrum", target_modules=["gate_proj", "up_proj", "down_proj"])
    lora = tuned(folder, tmp_path, "lora", target_modules=["q_proj", "v_proj"])
    assert together(load(folder), real, lora, tmp_path) == "work"
    assert together(load(folder), lora, real, tmp_path) == "work"


def test_after_deleting_one_kind_the_other_can_take_its_place(folders: dict[str, Path], adapters: Any) -> None:
    for first, second in (("lora", "spectrum"), ("spectrum", "lora")):
        model = PeftModel.from_pretrained(load(folders["llama"]), adapters(first, "a")[0], adapter_name="one")
        model.delete_adapter("one")
        model.load_adapter(str(adapters(second, "bb")[0]), "two")
        model.set_adapter("two")
        assert torch.equal(logits(model), adapters(second, "bb")[1])


def test_the_second_adapter_is_planned_on_the_base_whatever_the_first_has_trained(folders: dict[str, Path]) -> None:
    model = get_peft_model(load(folders["llama"]), config_of("spectrum"))
    wanted = model.peft_config["default"].plan
    for p in model.parameters():
        if p.requires_grad:
            p.data *= torch.linspace(0.1, 5, p.numel()).view_as(p)
    model.add_adapter("two", config_of("spectrum"))
    assert model.peft_config["two"].plan == wanted
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(load(folders["llama"])))


def test_another_peft_method_on_the_same_base_is_refused_by_peft(folders: dict[str, Path]) -> None:
    model = get_peft_model(load(folders["llama"]), config_of("lora"))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
