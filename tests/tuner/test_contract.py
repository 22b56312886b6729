"""What every mode promises (the contract), on every family, on float and 4-bit bases.

A new mode joins by its row in `plan.MODES`; nothing here names a mode but where a promise differs by what it trains.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, batch_for
from peft import PeftModel, get_peft_model
from running import options_of

from spectrum_peft import SpectrumConfig, load_model_with_spectrum, parameter_groups
from spectrum_peft.plan import MODES
from spectrum_peft.tuner import base_parameters, plan_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
# float32, two to six blocks: a merged weight is one rounding (6e-8 of its size) off, and logits here are of order 1.
ONE_ROUNDING = 2e-6
# In the default run: plain and tied heads, Conv1D, a new head, fused experts, 4-bit; every mode on Llama, one of each nature
# on the others. The rest runs as `slow`.
QUICK = [("llama", None), ("llama_tied", None), ("gpt2", None), ("bert", None), ("mixtral", None)]
QUICK += [("llama", "nf4"), ("bert", "nf4")]
SAMPLE = ("spectrum", "alors", "lorsa", "columns")
BASES = [*QUICK, *((family, None) for family in sorted(ARCHITECTURES) if (family, None) not in QUICK)]
BASES += [("llama", "fp4"), ("llama", "int8")]


def is_quick(family: str, mode: str, quantization: str | None) -> bool:
    return (family, quantization) in QUICK and (family == "llama" or mode in SAMPLE)


class Run:
    """A base on disk, an adapter trained three steps on it, and what was there before."""

    def __init__(self, architecture: Architecture, mode: str, quantization: str | None, folder: Path) -> None:
        self.architecture, self.mode, self.quantization, self.folder = architecture, mode, quantization, folder
        if not (folder / "config.json").exists():
            architecture.build().save_pretrained(folder)
        self.batch = batch_for(architecture, architecture.build())
        base = self.fresh_base()
        self.start = self.logits(base)
        stored = {n: owner._parameters[leaf] for n, (owner, leaf) in base_parameters(base).items()}
        self.before = {n: p.detach().clone() for n, p in stored.items() if p is not None}
        torch.manual_seed(1)
        if quantization is None:
            options = options_of(mode, [self.batch])
            config = SpectrumConfig(mode=mode, task_type=architecture.task_type, **options)
            self.model = get_peft_model(base, config)
        else:
            self.model = base
        self.plan = self.model.peft_config["default"].plan
        self.untrained = self.logits(self.model)
        self.train(self.model)
        self.trained = self.logits(self.model)

    def fresh_base(self) -> Any:
        auto = getattr(transformers, self.architecture.auto_class)
        if self.quantization is None:
            return auto.from_pretrained(self.folder, dtype=torch.float32).eval()
        # What stays unquantized follows from the plan, so the 4-bit base comes with the adapter on it.
        options = options_of(self.mode, [self.batch])
        config = SpectrumConfig(mode=self.mode, task_type=self.architecture.task_type, **options)
        return load_model_with_spectrum(
            str(self.folder), config, quantization=self.quantization, dtype=torch.float32, model_class=auto
        )[0]

    def bare_base(self) -> Any:
        """A base for `PeftModel.from_pretrained`, quantized as the trained one was."""
        base = self.fresh_base()
        return base if self.quantization is None else base.unload()

    def logits(self, model: Any) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(
                **{k: v for k, v in self.batch.items() if k != "labels" or self.architecture.task_type != "SEQ_CLS"}
            ).logits

    def train(self, model: Any, steps: int = 3) -> None:
        # Each tensor moves by about lr a step under Adam, whatever the size of the gradient.
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=5e-3))
        model.train()
        for _ in range(steps):
            model(**self.batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a run once for each (family, mode, quantization); tests that change the model take a copy."""
    made: dict[Any, Run] = {}
    folders: dict[str, Path] = {}

    def get(family: str, mode: str, quantization: str | None) -> Run:
        key = (family, mode, quantization)
        if key not in made:
            folder = folders.setdefault(family, tmp_path_factory.mktemp(family))
            made[key] = Run(ARCHITECTURES[family], mode, quantization, folder)
        return made[key]

    return get


@pytest.fixture(
    params=[
        pytest.param(
            (family, mode, quantization),
            id=f"{family}-{mode}" + (f"-{quantization}" if quantization else ""),
            marks=[] if is_quick(family, mode, quantization) else [pytest.mark.slow],
        )
        for family, quantization in BASES
        for mode in MODES
        if not (quantization and MODES[mode].whole_model)
    ]
)
def run(request: pytest.FixtureRequest, runs: Any) -> Run:
    return runs(*request.param)


def test_at_the_start_the_model_computes_what_the_base_computes(run: Run) -> None:
    # Exactly: LoRA's B is zero, real weights are the base's own values. The 4-bit base is compared with its adapters off.
    if run.quantization is None:
        assert torch.equal(run.untrained, run.start)
    else:
        with run.model.disable_adapter():
            assert torch.equal(run.untrained, run.logits(run.model))


def test_training_changed_the_function(run: Run) -> None:
    assert (run.trained - run.untrained).abs().max() > 1e-3


def test_exactly_the_planned_tensors_train(run: Run) -> None:
    belongs = plan_parameters(run.model)
    trains = {n for n, p in run.model.named_parameters() if p.requires_grad}
    tied = _aliases(run.model)
    entries = {belongs[n] for n in trains}
    assert {tied.get(n, n) for n in entries} == {tied.get(n, n) for n in run.plan.trainable_names}
    assert len(run.plan.trainable_names) >= len(entries) > 0
    # Every parameter that trains moved: nothing was in the optimizer in vain.
    if run.quantization is None:
        fresh = get_peft_model(run.fresh_base(), SpectrumConfig(plan=run.plan, task_type=run.architecture.task_type))
        torch.manual_seed(1)
        start = {n: p for n, p in fresh.named_parameters() if "lora_A" not in n}
        still = [n for n in trains if n in start and torch.equal(start[n], run.model.get_parameter(n))]
        assert [n for n in still if not _may_rest(run, n)] == []


def _may_rest(run: Run, name: str) -> bool:
    """Tensors that have no gradient in this batch: experts that no token was routed to, keys' biases, unused tables."""
    return any(part in name for part in ("key.", "k_proj.bias", "experts", "token_type", "relative_attention_bias"))


def _aliases(model: Any) -> dict[str, str]:
    groups: dict[int, list[str]] = {}
    for name, (owner, leaf) in base_parameters(model).items():
        parameter = owner._parameters.get(leaf)
        if parameter is not None:
            groups.setdefault(id(parameter), []).append(name)
    return {n: group[0] for group in groups.values() for n in group}


def test_frozen_tensors_are_byte_identical_after_training(run: Run) -> None:
    checked = 0
    trains = set(run.plan.trainable_names) if MODES[run.mode].real_weights else set()
    for name, (owner, leaf) in base_parameters(run.model).items():
        parameter = owner._parameters.get(leaf)
        if name in trains or parameter is None:
            continue
        assert torch.equal(parameter.detach().view(torch.uint8), run.before[name].view(torch.uint8)), name
        checked += 1
    assert checked or MODES[run.mode].whole_model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_is_bit_identical(run: Run, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    run.model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=RuntimeWarning)
        loaded = PeftModel.from_pretrained(run.bare_base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run.logits(loaded), run.trained)
    assert loaded.peft_config["default"].plan == run.plan
    assert not any(p.requires_grad for p in loaded.parameters())


def test_disabled_adapters_give_the_base(run: Run) -> None:
    with run.model.disable_adapter():
        assert torch.equal(run.logits(run.model), run.untrained)
    assert torch.equal(run.logits(run.model), run.trained)


def test_a_deep_copy_computes_the_same_and_is_independent(run: Run) -> None:
    twin = copy.deepcopy(run.model)
    assert torch.equal(run.logits(twin), run.trained)
    run.train(twin, steps=1)
    assert not torch.equal(run.logits(twin), run.trained)
    assert torch.equal(run.logits(run.model), run.trained)


def test_merge_and_unmerge(run: Run) -> None:
    # On a 4-bit base PEFT merges by quantizing the sum, which is no small change; merging onto the original checkpoint is
    # what `merge_into_base` is for. Real weights are exact on any base.
    real = MODES[run.mode].real_weights
    if run.quantization is not None and not real:
        pytest.skip("PEFT's merge into a 4-bit weight quantizes the sum; see test_export.py for the lossless way")
    model = copy.deepcopy(run.model)
    model.merge_adapter()
    merged = run.logits(model)
    assert torch.equal(merged, run.trained) if real else (merged - run.trained).abs().max() < ONE_ROUNDING
    model.unmerge_adapter()
    again = run.logits(model)
    assert torch.equal(again, run.trained) if real else (again - run.trained).abs().max() < ONE_ROUNDING
    model = model.merge_and_unload()
    assert (run.logits(model) - run.trained).abs().max() < (1e-12 if real else ONE_ROUNDING)


def test_unload_gives_the_base_back(run: Run) -> None:
    if run.quantization is not None:
        pytest.skip("the 4-bit base is made with the adapter on it")
    model = copy.deepcopy(run.model).unload()
    assert torch.equal(run.logits(model), run.start)
    assert set(model.state_dict()) == set(run.fresh_base().state_dict())


def test_the_merged_folder_loads_with_plain_transformers(run: Run, tmp_path: Path) -> None:
    if run.quantization is not None:
        pytest.skip("a merged 4-bit base is no plain checkpoint; see test_export.py")
    model = copy.deepcopy(run.model).merge_and_unload()
    model.save_pretrained(tmp_path)
    plain = getattr(transformers, run.architecture.auto_class).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (run.logits(plain) - run.trained).abs().max() < ONE_ROUNDING
    if run.architecture.task_type != "SEQ_CLS":
        assert plain.generate(run.batch["input_ids"], max_new_tokens=3, do_sample=False).shape[0] == 2


def test_the_adapter_generates_or_classifies(run: Run) -> None:
    run.model.eval()
    if run.architecture.task_type == "SEQ_CLS":
        assert run.trained.shape == (2, 3)
    else:
        tokens = run.model.generate(input_ids=run.batch["input_ids"], max_new_tokens=3, do_sample=False)
        assert tokens.shape[0] == 2
