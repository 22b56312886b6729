"""Learning-rate ratios: inside a trainer's step, and as groups for a loop of one's own."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from datasets import Dataset
from peft import get_peft_model
from running import LIBRARIES, assert_same, options_of, same_bytes, token_rows, trainer, values
from torch import nn
from transformers import Adafactor

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum, parameter_groups
from spectrum_peft.errors import MismatchError, TrainingSetupError
from spectrum_peft.plan import MODES
from spectrum_peft.train.optim import StepRatios, has_own_ratios, innermost
from spectrum_peft.tuner import plan_parameters

pytestmark = LIBRARIES
RATIOS = [0.5, 0.7, 1.0, 1.9, 1.0]

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=lr, amsgrad=True),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "adafactor-torch": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
    "adafactor-transformers": lambda p, lr: Adafactor(p, lr=lr, relative_step=False, scale_parameter=False),
}


def parameters(count: int = len(RATIOS)) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4 + i, 3, generator=generator)) for i in range(count)]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


# --- inside step() ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ratios_inside_the_step_equal_real_groups_bit_for_bit(name: str) -> None:
    lr = 0.01

    def warm_then_cool(step: int) -> float:
        return (step + 1) / 3 if step < 3 else 0.5 ** (step - 2)

    ours, theirs = parameters(), parameters()
    outer = OPTIMIZERS[name](ours, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(outer, warm_then_cool)
    StepRatios(outer, {id(p): q for p, q in zip(ours, RATIOS, strict=True)})
    real = OPTIMIZERS[name]([{"params": [p]} for p in theirs], lr)
    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        outer.step()
        for group, q in zip(real.param_groups, RATIOS, strict=True):
            group["lr"] = lr * warm_then_cool(step) * q
        real.step()
        schedule.step()
        assert schedule.get_last_lr() == [lr * warm_then_cool(step + 1)]  # what a trainer logs: the scheduled rate
        for mine, other in zip(ours, theirs, strict=True):
            assert same_bytes(mine, other)
    assert all(not torch.equal(p, start) for p, start in zip(ours, parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outside_the_step_groups_and_state_are_the_trainers_own(name: str) -> None:
    ours, plain = parameters(), parameters()
    optimizer, reference = OPTIMIZERS[name](ours, 0.01), OPTIMIZERS[name](plain, 0.01)
    groups = optimizer.param_groups
    hooked = StepRatios(optimizer, {id(p): q for p, q in zip(ours, RATIOS, strict=True)})
    for step in range(2):
        for params, other in ((ours, optimizer), (plain, reference)):
            set_gradients(params, step)
            other.step()
    assert optimizer.param_groups is groups
    assert len(groups) == 1
    mine, wanted = optimizer.state_dict(), reference.state_dict()
    assert mine["param_groups"] == wanted["param_groups"]
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in wanted["state"].items()}
    # A fresh optimizer without our hooks takes the state, and the other way round.
    OPTIMIZERS[name](parameters(), 0.01).load_state_dict(copy.deepcopy(mine))
    hooked.remove()
    set_gradients(ours, 7)
    before = [p.detach().clone() for p in ours]
    twin = [nn.Parameter(p.detach().clone()) for p in ours]
    set_gradients(twin, 7)
    bare = OPTIMIZERS[name](twin, 0.01)
    bare.load_state_dict(copy.deepcopy(mine))
    optimizer.step()
    bare.step()
    assert all(same_bytes(a, b) for a, b in zip(ours, twin, strict=True))  # removed: one rate for all
    assert any(not torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_the_ratio_is_the_length_of_the_step() -> None:
    params = parameters(3)
    optimizer = torch.optim.SGD(params, lr=1.0)
    StepRatios(optimizer, {id(params[0]): 0.25, id(params[1]): 4.0})  # the third is not named: rate of the group
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    optimizer.step()
    for p, old, q in zip(params, before, (0.25, 4.0, 1.0), strict=True):
        assert torch.allclose(old - p, q * p.grad)


def test_frozen_parameters_are_left_out_with_their_decay_and_state() -> None:
    params = parameters(3)
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
    hooked = StepRatios(optimizer, {}, frozen=[id(params[1])])
    before = params[1].detach().clone()
    set_gradients(params, 0)
    optimizer.step()
    assert same_bytes(params[1], before)
    assert params[1] not in optimizer.state
    hooked.frozen = frozenset()
    optimizer.step()
    assert not torch.equal(params[1], before)


def test_a_step_that_raises_leaves_no_split_groups_behind() -> None:
    params = parameters(2)
    optimizer = torch.optim.SGD(params, lr=1.0)
    groups = optimizer.param_groups
    StepRatios(optimizer, {id(params[0]): 0.5})

    def broken() -> float:
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        optimizer.step(broken)
    before = params[0].detach().clone()
    set_gradients(params, 0)
    optimizer.step()
    assert torch.allclose(before - params[0], 0.5 * params[0].grad)  # once, not twice
    assert optimizer.param_groups is groups


def test_an_optimizer_without_a_rate_is_refused() -> None:
    with pytest.raises(TrainingSetupError, match="Adafactor has no learning rate"):
        StepRatios(Adafactor(parameters(), relative_step=True), {})


def test_wrappers_are_looked_through() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    assert innermost(Wrapper(Wrapper(optimizer))) is optimizer


# --- groups for a loop of one's own ----------------------------------------------------------------------------------


def tiny(seed: int = 0) -> Any:
    return ARCHITECTURES["llama"].build(seed)


def adapted(mode: str = "alors", base: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    config = SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **{**options_of(mode), **options})
    return get_peft_model(tiny() if base is None else base, config)


@pytest.mark.parametrize("mode", MODES)
def test_every_trainable_parameter_is_in_one_group_at_its_ratio(mode: str) -> None:
    # Half of two blocks is one matrix a kind; one alone has ratio 1, so all are ranked together.
    model = adapted(mode, **({"scope": "global"} if MODES[mode].selective else {}))
    plan = model.peft_config["default"].plan
    groups = parameter_groups(model, lr=0.01, weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    entry_of = plan_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        assert group["lr"] == 0.01 * group["lr_ratio"]
        for p in group["params"]:
            assert plan.by_name[entry_of[names[id(p)]]].lr_ratio == group["lr_ratio"]
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
    keys = [(g["lr_ratio"], g["weight_decay"]) for g in groups]
    assert keys == sorted(set(keys))
    ratios = {g["lr_ratio"] for g in groups}
    assert (min(ratios), max(ratios)) == ((0.5, 2.0) if MODES[mode].importance_rates else (1.0, 1.0))
    torch.optim.AdamW(groups)  # any torch optimizer takes them


def test_a_plain_model_carries_its_plan(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = SpectrumConfig(mode="spectrum", spectrum_ratio=0.5, train_norms=True)
    model, _ = load_model_with_spectrum(str(tmp_path), config, dtype="float32")
    groups = parameter_groups(model, lr=0.01, weight_decay=0.1)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1]
    assert parameter_groups(model, model.spectrum_plan)[0]["lr"] == 2e-4


def test_a_tied_tensor_is_in_one_group() -> None:
    model = adapted("full", ARCHITECTURES["llama_tied"].build())
    grouped = [id(p) for group in parameter_groups(model) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len([p for p in model.parameters() if p.requires_grad])


def test_what_trains_besides_the_plan_or_does_not_is_refused_by_name() -> None:
    model = adapted("lora")
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(MismatchError, match=r"parameter_groups: .*lm_head\.weight"):
        parameter_groups(model)
    model = adapted("lora")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    for p in (layer.lora_A.default.weight, layer.lora_B.default.weight):
        p.requires_grad_(False)
    with pytest.raises(MismatchError, match=r"1 planned parameters do not train, first .*layers\.0\.self_attn\.q_proj"):
        parameter_groups(model)


def test_no_plan_nothing_to_train_and_moving_ranks_are_refused() -> None:
    with pytest.raises(TrainingSetupError, match="carries no plan"):
        parameter_groups(tiny())
    model = adapted("lora")
    model.requires_grad_(False)
    with pytest.raises(TrainingSetupError, match="no parameter of the model requires a gradient"):
        parameter_groups(model)
    with pytest.raises(TrainingSetupError, match="rescore_every=5, which changes ranks while the optimizer runs"):
        parameter_groups(adapted("alors", rescore_every=5))


# --- both under a trainer --------------------------------------------------------------------------------------------


def alike(count: int = 8) -> Dataset:
    """The same row again and again: the order of the data is of no consequence."""
    row = token_rows(1)[0]
    return Dataset.from_dict({key: [value] * count for key, value in row.items()})


def test_a_trainer_with_the_callback_equals_a_loop_with_groups(tmp_path: Path) -> None:
    steps, lr, decay = 3, 1e-2, 0.1
    model = adapted(scope="global")
    start = values(model)
    plain = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "per_device_train_batch_size": 1}
    trainer(
        model, tmp_path, [SpectrumCallback()], alike(), max_steps=steps, learning_rate=lr, weight_decay=decay,
        adam_epsilon=1e-8, optim="adamw_torch_fused", **plain,
    ).train()  # fmt: skip
    loop = adapted(scope="global")
    assert_same(values(loop), start)
    # What the Trainer does, so that they agree bit for bit: it asks for the sum of the tokens' losses over their number, and
    # takes the fused AdamW. The mean and the plain one round differently, and Adam's quotient makes much of that where a
    # gradient is near zero.
    optimizer = torch.optim.AdamW(parameter_groups(loop, lr=lr, weight_decay=decay), eps=1e-8, fused=True)
    ids = torch.tensor([alike(1)[0]["input_ids"]])
    loop.train()
    for _ in range(steps):
        loop(input_ids=ids, labels=ids, num_items_in_batch=ids.shape[1] - 1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(values(model), values(loop))
    assert any(not torch.equal(a, start[n]) for n, a in values(loop).items())


def test_an_optimizer_made_from_the_groups_is_not_scaled_a_second_time(tmp_path: Path) -> None:
    """The same implementation of AdamW in both, so that they agree bit for bit: the fused one, which a Trainer takes unless it
    is told otherwise, rounds differently, and Adam's quotient makes much of that where a gradient is near zero."""
    ends = []
    for given in (True, False):
        model = adapted(scope="global")
        own = {}
        if given:
            optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2), fused=True)
            assert has_own_ratios(optimizer)
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
            own = {"optimizers": (optimizer, schedule)}
        plain = {
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "optim": "adamw_torch_fused",
        }
        trainer(model, tmp_path, [SpectrumCallback()], **plain, **own).train()
        ends.append(values(model, trainable=True))
    assert_same(*ends)


SCHEDULED = {
    "adamw_torch": {},
    "adafactor": {"lr_scheduler_type": "cosine"},
    "adamw_torch_fused": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "sgd": {"lr_scheduler_type": "polynomial"},
    "rmsprop": {},
    "adamw_8bit": {},
}
MARKS = {"adamw_8bit": [pytest.mark.gpu], "adamw_torch": [], "adafactor": []}
RESUMED = [pytest.param(name, marks=MARKS.get(name, [pytest.mark.slow])) for name in SCHEDULED]


@pytest.mark.parametrize("name", RESUMED)
def test_resume_with_each_named_optimizer_is_exact(name: str, tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> Any:
        model = adapted(scope="global")
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        how = {"optim": name, "use_cpu": name != "adamw_8bit", **SCHEDULED[name]}
        run = trainer(model, folder, [SpectrumCallback()], **steps, **how)
        run.train(resume_from_checkpoint=resume and str(resume))
        return run

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", tmp_path / "a" / "checkpoint-2")
    assert_same(values(whole.model), values(resumed.model))
    assert type(innermost(whole.optimizer)) is type(innermost(resumed.optimizer))
    assert math.isclose(whole.lr_scheduler.get_last_lr()[0], resumed.lr_scheduler.get_last_lr()[0])


def test_different_rates_make_different_weights(tmp_path: Path) -> None:
    # The control of the two tests above: without the ratios the run ends elsewhere.
    ends = [
        values(run.model, trainable=True)
        for ratio in ((0.5, 2.0), (1.0, 1.0))
        if (run := trainer(adapted(scope="global", lr_ratio=ratio), tmp_path, [SpectrumCallback()])).train()
    ]
    apart = [n for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])]
    assert len(apart) > len(ends[0]) // 2
