"""Ranks that move during training: laws of one layer, then a model under the callback."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from running import LIBRARIES, arguments, assert_same, logits, only_fast, token_rows, trainer, values
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from spectrum_peft import Plan, SpectrumCallback, SpectrumConfig, load_model_with_spectrum, names
from spectrum_peft.errors import OptionError
from spectrum_peft.plan import MODES
from spectrum_peft.tuner.adapter_files import sliced_layers
from spectrum_peft.tuner.places import allocated_rank
from spectrum_peft.tuner.ranks import allocate, live_factors, live_rank, moments, set_rank

pytestmark = LIBRARIES
RESCORABLE = [name for name, mode in MODES.items() if mode.rescorable]
ALLOCATED = 6
SHAPES = [(24, 9), (9, 24), (7, 7)]  # (out, in): tall, wide, square and odd
# Errors of a few hundred operations on numbers of order 1.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def layer_of(shape: tuple[int, int], live: int, dtype: torch.dtype = torch.float64, *, zero: bool = False) -> Any:
    """A LoRA layer allocated at `ALLOCATED` with `live` slots, both factors random."""
    generator = torch.Generator().manual_seed(0)
    holder = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=dtype))
    config = LoraConfig(r=ALLOCATED, lora_alpha=2 * ALLOCATED, target_modules=["0"])
    layer: Any = inject_adapter_in_model(config, holder)[0]
    layer.to(dtype)
    for factor in (layer.lora_A.default.weight, layer.lora_B.default.weight):
        factor.data = torch.randn(factor.shape, generator=generator, dtype=dtype)
    if zero:
        layer.lora_B.default.weight.data.zero_()
    allocate(layer, "default", live)
    return layer


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    B, A, _ = live_factors(layer, "default")
    return B.detach().clone(), A.detach().clone()


def product(layer: Any) -> torch.Tensor:
    B, A = factors(layer)
    return B.double() @ A.double()


def move(layer: Any, rank: int, optimizer: Any = None, *, step: int = 3, seed: int = 0, name: str = "m.weight") -> Any:
    return set_rank(layer, "default", rank, name=name, step=step, seed=seed, optimizer=optimizer)


def dead_slots(layer: Any) -> list[torch.Tensor]:
    rank = live_rank(layer, "default")
    return [layer.lora_A.default.weight[rank:], layer.lora_B.default.weight[:, rank:]]


def trained(layer: Any, optimizer_class: Any = torch.optim.AdamW, steps: int = 4, **kwargs: Any) -> Any:
    """An optimizer after some steps on the layer, on a loss with no symmetry between slots."""
    optimizer = optimizer_class([layer.lora_A.default.weight, layer.lora_B.default.weight], lr=0.01, **kwargs)
    generator = torch.Generator().manual_seed(9)
    dtype = layer.lora_A.default.weight.dtype
    for _ in range(steps):
        x = torch.randn(5, layer.in_features, generator=generator, dtype=dtype)
        target = torch.randn(5, layer.out_features, generator=generator, dtype=dtype)
        (layer(x) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# --- growing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_growth_leaves_the_product_as_it_was(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = layer_of(shape, live=2, dtype=dtype)
    (B, A), before = factors(layer), product(layer)
    change = move(layer, 5)
    B_new, A_new = factors(layer)
    assert (change.before, change.after, change.dropped) == (2, 5, 0.0)
    assert torch.equal(B_new[:, :2], B)
    assert torch.equal(A_new[:2], A)
    assert torch.equal(B_new[:, 2:], torch.zeros(shape[0], 3, dtype=dtype))
    assert torch.equal(product(layer), before)


def test_new_rows_are_as_peft_draws_them_and_belong_to_seed_step_and_name() -> None:
    def rows(**how: Any) -> torch.Tensor:
        layer = layer_of((9, 400), live=1)
        move(layer, 6, **how)
        return factors(layer)[1][1:]

    first = rows()
    bound = 1 / math.sqrt(400)
    assert first.abs().max() <= bound
    assert first.abs().max() > 0.98 * bound
    assert abs(first.std() - bound / math.sqrt(3)) < 0.02 * bound  # of U(-b, b)
    assert torch.equal(first, rows())
    for other in (rows(seed=1), rows(step=4), rows(name="n.weight")):
        assert not torch.equal(first, other)
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.1


def test_moving_ranks_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    layer = layer_of((9, 8), live=2)
    torch.manual_seed(5)
    move(layer, 5)
    move(layer, 1)
    assert torch.equal(torch.rand(3), wanted)


def test_a_rank_beyond_the_allocation_is_refused_by_name() -> None:
    layer = layer_of((9, 8), live=2)
    with pytest.raises(ValueError, match=r"m\.weight: rank is 7, wanted 0 to the allocated 6"):
        move(layer, 7)


# --- shrinking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_shrinking_keeps_the_best_approximation(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    layer = layer_of(shape, live=5, dtype=dtype)
    before = product(layer)
    u, s, vh = torch.linalg.svd(before)  # independent of the code: the whole product, formed
    change = move(layer, rank)
    error = torch.linalg.matrix_norm(product(layer) - before, ord=2)
    scale = TOLERANCE[dtype] * s[0]
    assert abs(error - s[rank]) < scale
    assert abs(change.dropped - float(s[rank]) * layer.scaling["default"]) < 4 * scale
    # As the error above: a sum of roundings of the largest singular value's size.
    assert torch.allclose(product(layer), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=float(scale), rtol=0)
    assert all(not slot.any() for slot in dead_slots(layer))


def test_shrinking_splits_the_singular_values_evenly_over_both_factors() -> None:
    layer = layer_of((24, 9), live=5)
    move(layer, 3)
    B, A = factors(layer)
    # Float64 QR and SVD of matrices of order 10: 24 * 2.2e-16 * 10^2 is 5e-13.
    assert torch.allclose(B.T @ B, A @ A.T, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_moment_rotates_exactly_and_the_second_by_squared_entries(shape: tuple[int, int]) -> None:
    # With G = dL/dW: dL/dA = s B^T G and dL/dB = s G A^T. A first moment that is such a gradient must be the gradient
    # for the new factors afterwards.
    layer = layer_of(shape, live=5)
    optimizer = trained(layer)
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = layer.scaling["default"]
    old_B, old_A = factors(layer)
    for parameter, gradient in ((A, scale * B.T @ G), (B, scale * G @ A.T)):
        optimizer.state[parameter]["exp_avg"] = gradient.detach().clone()
    second = {p: optimizer.state[p]["exp_avg_sq"].clone() for p in (A, B)}
    move(layer, 3, optimizer)
    new_B, new_A = factors(layer)
    got_A, got_B = optimizer.state[A]["exp_avg"], optimizer.state[B]["exp_avg"]
    # Float64: a QR and an SVD of factors with norms up to 12 and conditions up to 25, measured: 24 * 2.2e-16 * 12 * 25 is 2e-12;
    # what is held against second moments is squared and goes through lstsq, which has the square of the condition.
    assert torch.allclose(got_A[:3], scale * new_B.T @ G, atol=1e-10, rtol=1e-9)
    assert torch.allclose(got_B[:, :3], scale * G @ new_A.T, atol=1e-10, rtol=1e-9)
    M, N = torch.linalg.lstsq(old_B, new_B).solution, torch.linalg.lstsq(old_A.T, new_A.T).solution.T
    assert torch.allclose(optimizer.state[A]["exp_avg_sq"][:3], (M.T**2) @ second[A][:5], rtol=1e-8)
    assert torch.allclose(optimizer.state[B]["exp_avg_sq"][:, :3], second[B][:, :5] @ (N.T**2), rtol=1e-8)
    for parameter in (A, B):
        for moment in moments(optimizer, parameter, "m").values():
            assert not (moment[3:] if parameter is A else moment[:, 3:]).any()
            assert (moment >= 0).all() or moment is optimizer.state[parameter]["exp_avg"]


def test_new_slots_start_from_the_mean_second_moment_and_no_first_moment() -> None:
    layer = layer_of((24, 9), live=3)
    optimizer = trained(layer, amsgrad=True)
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    means = {
        (p, key): optimizer.state[p][key][:3].mean() if p is A else optimizer.state[p][key][:, :3].mean()
        for p in (A, B)
        for key in ("exp_avg_sq", "max_exp_avg_sq")
    }
    move(layer, 5, optimizer)
    for parameter in (A, B):
        new = {k: m[3:5] if parameter is A else m[:, 3:5] for k, m in moments(optimizer, parameter, "m").items()}
        assert set(new) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert not new["exp_avg"].any()
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            assert torch.allclose(new[key], means[parameter, key].expand_as(new[key]))
            assert means[parameter, key] > 0


def test_new_columns_do_not_outrun_the_old_ones() -> None:
    # What the mean is for: where moments are zero at a late step, Adam's bias correction is gone and a new column moves by
    # (1 - 0.9) / sqrt(1 - 0.999) of the usual stride at once, however small its gradient is.
    def strides(fill: bool) -> tuple[float, float]:
        layer = layer_of((24, 9), live=3)
        optimizer = trained(layer, steps=30)
        move(layer, 5, optimizer)
        B = layer.lora_B.default.weight
        if not fill:
            optimizer.state[B]["exp_avg_sq"][:, 3:5] = 0
        before = B.detach().clone()
        (layer(torch.ones(5, 9, dtype=torch.float64)) - 1).square().sum().backward()
        optimizer.step()
        moved = (B.detach() - before).abs()
        return float(moved[:, 3:5].mean()), float(moved[:, :3].mean())

    new, old = strides(fill=True)
    leap, _ = strides(fill=False)
    assert 0 < new < old
    assert leap > 10 * new


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop])
def test_optimizers_without_adams_moments_follow_or_start_anew(
    optimizer_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layer_of((24, 9), live=5)
    kwargs = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = trained(layer, optimizer_class, **kwargs)
    A = layer.lora_A.default.weight
    with caplog.at_level("INFO", logger="spectrum_peft"):
        move(layer, 2, optimizer)
    if optimizer_class is torch.optim.SGD:  # its momentum is an average of gradients, which rotates
        assert optimizer.state[A]["momentum_buffer"][:2].any()
        assert not optimizer.state[A]["momentum_buffer"][2:].any()
    else:
        assert A not in optimizer.state
        assert f"m.weight: its rank moves, {optimizer_class.__name__} starts its state of a factor anew" in caplog.text
    trained_on = factors(layer)[0]
    (layer(torch.ones(5, 9, dtype=torch.float64)) - 1).square().sum().backward()
    optimizer.step()
    assert not torch.equal(factors(layer)[0], trained_on)
    assert all(not slot.any() for slot in dead_slots(layer))


# --- products of low rank --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_product_of_rank_one_survives_shrinking_to_three_and_leaves_two_slots_free(dtype: torch.dtype) -> None:
    layer = layer_of((24, 9), live=5, dtype=dtype)
    A, B = layer.lora_A.default.weight.data, layer.lora_B.default.weight.data
    A[1:5], B[:, 1:5] = A[0] * 2, B[:, :1] * 3  # every slot says the same direction
    optimizer = trained(layer, steps=0)
    before = product(layer)
    change = move(layer, 3, optimizer)
    assert torch.allclose(product(layer), before, atol=TOLERANCE[dtype] * float(before.abs().max()), rtol=0)
    assert change.dropped == 0.0
    B_new, A_new = factors(layer)
    assert not B_new[:, 1:].any()
    assert A_new[1:].abs().min() > 0  # fresh rows: the free slots can train
    assert torch.isfinite(A_new).all()


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_an_untrained_product_stays_zero_at_every_rank(rank: int) -> None:
    layer = layer_of((24, 9), live=3, zero=True)
    change = move(layer, rank)
    assert not product(layer).any()
    assert change.dropped == 0.0
    assert factors(layer)[1].shape == (rank, 9)
    assert rank == 0 or factors(layer)[1].abs().min() > 0


# --- dead slots and rank 0 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [0, 2])
def test_dead_slots_stay_zero_through_training_with_weight_decay(live: int) -> None:
    layer = layer_of((24, 9), live=live)
    trained(layer, steps=5, weight_decay=0.1)
    assert all(not slot.any() for slot in dead_slots(layer))
    assert live == 0 or factors(layer)[0].any()


def test_at_rank_0_the_layer_is_the_base_and_its_factors_are_in_the_graph() -> None:
    layer = layer_of((24, 9), live=0)
    x = torch.randn(3, 9, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).sum().backward()
    for factor in (layer.lora_A.default.weight, layer.lora_B.default.weight):
        assert factor.grad is not None  # DDP waits for every parameter
        assert not factor.grad.any()


def test_merge_and_unmerge_use_the_live_slots() -> None:
    layer = layer_of((24, 9), live=3)
    x = torch.randn(3, 9, dtype=torch.float64)
    weight, wanted = layer.base_layer.weight.detach().clone(), layer(x)
    for safe in (False, True):
        layer.merge(safe_merge=safe)
        # Float64: sums of nine products of order 1, 1.1e-16 each, and four digits of room.
        assert torch.allclose(layer(x), wanted, atol=1e-12)
        assert torch.allclose(layer.base_layer.weight - weight, 2 * product(layer), atol=1e-12)
        layer.unmerge()
        assert torch.allclose(layer.base_layer.weight, weight, atol=1e-12)


# --- a model under the callback --------------------------------------------------------------------------------------


def movable(base: Any, mode: str = "alors", **options: Any) -> Any:
    options = {"spectrum_ratio": 0.5, "rescore_every": 2, "r": 8, "criterion": "mp", **options}
    torch.manual_seed(1)
    return get_peft_model(base, SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **options))


def fresh(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def plan_of(model: Any, adapter: str = "default") -> Plan:
    return model.peft_config[adapter].plan


def layer_at(model: Any, name: str) -> Any:
    return model.get_base_model().get_submodule(name.removesuffix(".weight"))


def live_ranks(model: Any) -> dict[str, int]:
    layers = sliced_layers(model.get_base_model(), "default")
    return {f"{name}.weight": live_rank(layer, "default") for name, layer in layers.items()}


def plant(model: Any, name: str, size: float) -> None:
    """Put a direction of spectral norm `size` into the first slot of an adapter."""
    layer = layer_at(model, name)
    A, B = layer.lora_A.default.weight.data, layer.lora_B.default.weight.data
    A[0] = 1 / math.sqrt(A.shape[1])
    B[:, 0] = size / layer.scaling["default"] / math.sqrt(B.shape[0])


def worst_of(plan: Plan, kind: str, *, active: bool) -> str:
    """The one that stands last in the order of choice: by score, then by block."""
    entries = [e for e in plan.entries if e.kind == kind and e.active == active]
    return max(entries, key=lambda e: (-e.score, names.block_index(e.name))).name


def best_of(plan: Plan, kind: str) -> str:
    return min((e for e in plan.entries if e.kind == kind), key=lambda e: (-e.score, names.block_index(e.name))).name


@pytest.mark.parametrize("mode", RESCORABLE)
def test_a_movable_model_starts_as_the_base_with_the_planned_ranks(tiny_llama: Any, mode: str) -> None:
    start = logits(tiny_llama)
    model = movable(tiny_llama, mode)
    plan = plan_of(model)
    assert torch.equal(logits(model), start)
    assert live_ranks(model) == {e.name: e.rank for e in plan.entries}
    assert {rank for rank in live_ranks(model).values() if rank == 0} == {0}
    for layer in sliced_layers(model, "default").values():
        assert layer.lora_A.default.weight.shape[0] == allocated_rank(plan) == 8
        assert layer.scaling["default"] == 2.0


def test_a_planted_direction_takes_a_layer_to_the_high_tier(tiny_llama: Any, tmp_path: Path) -> None:
    model = movable(tiny_llama)
    before = plan_of(model)
    medium = worst_of(before, "mlp.up_proj", active=True)
    top = best_of(before, "mlp.up_proj")
    assert (before.by_name[medium].rank, before.by_name[top].rank) == (2, 8)
    plant(model, medium, size=20.0)
    callback = SpectrumCallback()
    trainer(model, tmp_path, [callback], max_steps=3, learning_rate=1e-9).train()
    after = plan_of(model)
    assert (after.by_name[medium].rank, after.by_name[top].rank) == (8, 2)
    assert after.by_name[medium].lr_ratio > after.by_name[top].lr_ratio
    assert live_ranks(model) == {e.name: e.rank for e in after.entries}
    assert callback.plan == after
    others = {e.name for e in before.entries if e.kind != "mlp.up_proj"}
    assert {n: before.by_name[n].rank for n in others} == {n: after.by_name[n].rank for n in others}
    history = json.loads((tmp_path / "plan_history.json").read_text())
    assert [step["step"] for step in history] == [2]
    assert {row["name"]: (row["before"], row["after"]) for row in history[0]["ranks"]} == {medium: (2, 8), top: (8, 2)}
    assert history[0]["trainable_parameters"] == before.trainable_parameters == after.trainable_parameters
    assert history[0]["digest"] == after.digest != before.digest


def test_without_a_change_of_scores_nothing_moves(tiny_llama: Any, tmp_path: Path) -> None:
    model = movable(tiny_llama)
    before = plan_of(model)
    trainer(model, tmp_path, [SpectrumCallback()], max_steps=3, learning_rate=1e-9).train()
    assert plan_of(model).digest == before.digest
    assert json.loads((tmp_path / "plan_history.json").read_text())[0]["ranks"] == []


@pytest.mark.parametrize("mode", only_fast(RESCORABLE, fast=["alors"]))
def test_a_frozen_layer_can_be_activated_and_the_one_that_falls_out_rests(
    tiny_llama: Any, tmp_path: Path, mode: str
) -> None:
    model = movable(tiny_llama, mode, rescore_every=2)
    before = plan_of(model)
    kind = "mlp.down_proj"
    empty = worst_of(before, kind, active=False)
    falls = worst_of(before, kind, active=True)
    for entry in before.entries:  # a little in every adapter that trains, so that resting ones have something to keep
        if entry.trains:
            plant(model, entry.name, size=1e-3)
    # An empty slot has no factors to plant in: its base weight gets the direction.
    layer_at(model, empty).base_layer.weight.data += 1.0
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (2, 6):
                kept[state.global_step] = factors(layer_at(model, falls))

    start = logits(model)
    callbacks = [SpectrumCallback(), Watch()]
    trainer(model, tmp_path, callbacks, max_steps=6, learning_rate=1e-3, weight_decay=0.1).train()
    after = plan_of(model)
    assert not before.by_name[empty].trains
    assert after.by_name[empty].trains
    assert live_rank(layer_at(model, empty), "default") == after.by_name[empty].rank > 0
    assert factors(layer_at(model, empty))[0].any()
    assert not after.by_name[falls].trains
    for early, late in zip(kept[2], kept[6], strict=True):  # four more steps with weight decay: not a bit moved
        assert early.any()
        assert torch.equal(early, late)
    assert not torch.equal(logits(model), start)
    history = json.loads((tmp_path / "plan_history.json").read_text())
    assert empty in history[0]["activated"]
    assert falls in history[0]["deactivated"]


def test_a_resting_adapter_has_no_part_in_gradient_clipping_and_trains_again_when_activated(
    tiny_llama: Any, tmp_path: Path
) -> None:
    model = movable(tiny_llama, "spectra_qlora", rescore_every=1)
    before = plan_of(model)
    kind = "mlp.down_proj"
    empty, falls = worst_of(before, kind, active=False), worst_of(before, kind, active=True)
    plant(model, falls, size=1e-2)
    raised = layer_at(model, empty).base_layer.weight
    grads: dict[int, float] = {}
    norms: dict[int, float] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            grads[step] = float(layer_at(model, falls).lora_B.default.weight.grad.abs().max())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raised.data -= 5.0
            norms[state.global_step] = float(layer_at(model, falls).lora_B.default.weight.detach().norm())

    raised.data += 5.0
    # Watch comes first, so that what it does at step 2 is seen by the re-evaluation of step 2.
    trainer(model, tmp_path, [Watch(), SpectrumCallback()], max_steps=4).train()
    assert grads[0] > 0
    assert grads[1] == 0.0  # it rested after step 1
    assert norms[2] == norms[1]
    assert grads[2] > 0  # and was called back after step 2
    assert norms[3] != norms[2]


BUDGETS = [
    {"mode": "alors", "scope": "global"},
    {"mode": "alors", "backward_depth": 0.5},
    {"mode": "alors"},
    {"mode": "alors", "spectrum_ratio": None, "trainable_parameters": 30_000},
    {"mode": "spectra_qlora", "scope": "global", "measure": "parameters"},
]


@pytest.mark.parametrize(
    "options",
    only_fast(BUDGETS, fast=BUDGETS[:2]),
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_the_budget_is_kept_over_many_re_evaluations(tiny_llama: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    model = movable(tiny_llama, **{"rescore_every": 1, **options})
    budget = plan_of(model).trainable_parameters
    generator = torch.Generator().manual_seed(0)

    class Shake(TrainerCallback):  # other scores at every step
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for entry in plan_of(model).entries:
                if entry.action != "freeze":
                    weight = layer_at(model, entry.name).base_layer.weight.data
                    weight += torch.rand((), generator=generator) * state.global_step

    trainer(model, tmp_path, [Shake(), SpectrumCallback()], max_steps=6, learning_rate=1e-4).train()
    history = json.loads((tmp_path / "plan_history.json").read_text())
    assert any(step["ranks"] or step["activated"] for step in history)
    spent = [step["trainable_parameters"] for step in history]
    equal_shapes = options.get("scope") != "global"
    if equal_shapes and "trainable_parameters" not in options:
        assert set(spent) == {budget}
    else:
        assert max(spent) <= budget
        assert spent[-1] > 0.8 * budget  # remainders of one step are not lost to the next
    counted = sum(
        live_rank(layer, "default") * (layer.in_features + layer.out_features)
        for name, layer in sliced_layers(model.get_base_model(), "default").items()
        if plan_of(model).by_name[f"{name}.weight"].trains
    )
    assert counted == spent[-1]


def test_at_the_end_of_every_epoch(tiny_llama: Any, tmp_path: Path) -> None:
    model = movable(tiny_llama, rescore_every="epoch")
    callback = SpectrumCallback()
    rows = token_rows(20)
    epochs = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    trainer(model, tmp_path, [callback], rows, **epochs).train()
    # Five batches make three steps an epoch; the last epoch ends with training, where nothing would use the new ranks.
    assert [step["step"] for step in callback.history] == [3, 6]


@pytest.mark.parametrize("mode", RESCORABLE)
def test_what_one_re_evaluation_leaves_over_the_next_may_spend(tiny_llama: Any, tmp_path: Path, mode: str) -> None:
    model = movable(tiny_llama, mode, rescore_every=1, scope="global")
    first = plan_of(model)
    small = [e.name for e in first.entries if not e.trains and e.kind in ("self_attn.k_proj", "self_attn.v_proj")]
    assert small

    class Shake(TrainerCallback):  # the small matrices rise to the top, and fall again
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name in small:
                layer_at(model, name).base_layer.weight.data += {1: 1.0, 2: -1.0}.get(state.global_step, 0.0)

    trainer(model, tmp_path, [Shake(), SpectrumCallback()], max_steps=3, learning_rate=1e-9).train()
    spent = [step["trainable_parameters"] for step in json.loads((tmp_path / "plan_history.json").read_text())]
    assert spent[0] < first.trainable_parameters == spent[1]


# --- files -----------------------------------------------------------------------------------------------------------


def moved_model(base: Any, folder: Path) -> Any:
    """A model with ranks that moved: a planted layer in the high tier, another in the medium one."""
    model = movable(base)
    plant(model, worst_of(plan_of(model), "mlp.up_proj", active=True), size=20.0)
    trainer(model, folder, [SpectrumCallback()], max_steps=4, learning_rate=1e-3).train()
    return model


def test_the_file_holds_live_slots_only_and_opens_as_a_plain_lora(
    tiny_llama: Any, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = moved_model(tiny_llama, tmp_path / "run")
    ranks = live_ranks(model)
    assert {0, 2, 8} == set(ranks.values())
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = {n.replace(".lora_A", ""): t.shape[0] for n, t in stored.items() if "lora_A" in n}
    assert rows == {f"base_model.model.{name}": rank for name, rank in ranks.items() if rank}
    again = PeftModel.from_pretrained(fresh(tiny_llama_folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert not sliced_layers(again, "default")  # an adapter that does not train needs no room to grow
    (tmp_path / "adapter" / "spectrum_adapter.json").unlink()
    plain = PeftModel.from_pretrained(fresh(tiny_llama_folder), tmp_path / "adapter")
    assert type(plain.base_model).__name__ == "LoraModel"
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.slow
def test_a_moved_adapter_loaded_to_train_on_has_room_and_the_same_function(
    tiny_llama: Any, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = moved_model(tiny_llama, tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    base = fresh(tiny_llama_folder)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert live_ranks(again) == live_ranks(model)
    assert plan_of(again) == plan_of(model)
    trainer(again, tmp_path / "more", [SpectrumCallback()], max_steps=3).train()


def test_an_earlier_file_loaded_onto_a_moved_adapter_takes_it_back(
    tiny_llama: Any, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = movable(tiny_llama, "spectra_qlora")
    before = plan_of(model)
    empty = worst_of(before, "mlp.down_proj", active=False)
    model.save_pretrained(tmp_path / "early")
    layer_at(model, empty).base_layer.weight.data += 1.0
    trainer(model, tmp_path / "run", [SpectrumCallback()], max_steps=4).train()
    assert plan_of(model).by_name[empty].trains
    model.load_adapter(str(tmp_path / "early"), "default")
    # Its slot is empty again, so it does not train, and a file says nothing of it.
    assert live_ranks(model)[empty] == plan_of(model).by_name[empty].rank == 0
    assert not plan_of(model).by_name[empty].trains
    model.save_pretrained(tmp_path / "late")
    again = PeftModel.from_pretrained(fresh(tiny_llama_folder), tmp_path / "late")
    assert torch.equal(logits(again), logits(fresh(tiny_llama_folder)))


class BestAt(TrainerCallback):
    """Declares one step the best, and keeps what the model was then."""

    def __init__(self, step: int, model: Any) -> None:
        self.step, self.model, self.kept = step, model, {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_rank"] = -abs(state.global_step - self.step)
        if state.global_step == self.step:
            self.kept = {"logits": logits(self.model), "ranks": live_ranks(self.model), "plan": plan_of(self.model)}


@pytest.mark.parametrize("best", only_fast([1, 3], fast=[1]))
def test_the_best_model_is_loaded_back_at_its_own_ranks(
    tiny_llama: Any, tiny_llama_folder: Path, tmp_path: Path, best: int
) -> None:
    model = movable(tiny_llama, rescore_every=2)
    plan = plan_of(model)
    plant(model, worst_of(plan, "mlp.up_proj", active=True), size=20.0)
    # A layer that is empty at step 1 and active at the end.
    layer_at(model, worst_of(plan, "mlp.down_proj", active=False)).base_layer.weight.data += 1.0
    watch, callback = BestAt(best, model), SpectrumCallback()
    args = arguments(
        tmp_path / "run", max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_rank", greater_is_better=True,
    )  # fmt: skip
    rows = token_rows(16)
    Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=[callback, watch]).train()
    assert torch.equal(logits(model), watch.kept["logits"])
    assert live_ranks(model) == watch.kept["ranks"]
    assert plan_of(model).digest == watch.kept["plan"].digest
    assert callback.plan == plan_of(model) == Plan.load(tmp_path / "run" / f"checkpoint-{best}" / "spectrum_plan.yaml")
    if best == 1:
        assert plan_of(model).digest == plan.digest != callback.history[0]["digest"]
    model.save_pretrained(tmp_path / "adapter")
    weights = {k: v for k, v in model.get_base_model().state_dict().items() if "lora" not in k}
    base = fresh(tiny_llama_folder)
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in weights.items()})
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), watch.kept["logits"])


@pytest.mark.parametrize("mode", only_fast(RESCORABLE, fast=["alors"]))
def test_resume_goes_on_with_the_ranks_the_run_had_come_to(tiny_llama_folder: Path, tmp_path: Path, mode: str) -> None:
    def run(folder: Path, resume: Path | None) -> tuple[Any, SpectrumCallback]:
        base = fresh(tiny_llama_folder)
        model = movable(base, mode, rescore_every=2, criterion="spectrum")
        callback = SpectrumCallback()
        # So large a rate that scores, and with them ranks, move at every evaluation.
        steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05}
        trainer(model, folder, [callback], **steps).train(resume_from_checkpoint=resume and str(resume))
        return model, callback

    whole, callback = run(tmp_path / "a", None)
    assert sum(bool(step["ranks"] or step["activated"]) for step in callback.history) >= 2
    kept = Plan.load(tmp_path / "a" / "checkpoint-3" / "spectrum_plan.yaml")
    assert kept.digest == callback.history[0]["digest"] != plan_of(whole).digest
    resumed, again = run(tmp_path / "b", tmp_path / "a" / "checkpoint-3")
    assert_same(values(whole), values(resumed))
    assert plan_of(whole) == plan_of(resumed)
    assert callback.history == again.history


# --- other bases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", only_fast(RESCORABLE, fast=["alors"]))
def test_on_a_4_bit_base(tiny_llama_folder: Path, tmp_path: Path, mode: str) -> None:
    config = SpectrumConfig(mode=mode, spectrum_ratio=0.5, r=8, rescore_every=2, criterion="mp")
    model, _ = load_model_with_spectrum(str(tiny_llama_folder), config, quantization="nf4", dtype=torch.float32)
    before = plan_of(model)
    empty = worst_of(before, "mlp.down_proj", active=False)
    assert hasattr(layer_at(model, empty).base_layer.weight, "quant_state")
    start = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), start)
    for entry in before.entries:
        if entry.trains:
            plant(model, entry.name, size=0.1)
    layer = layer_at(model, empty)
    A, B = layer.lora_A.default.weight.data, layer.lora_B.default.weight.data
    layer.lora_variant["default"].live = 1  # an adapter that was trained and rests
    A[0], B[:, 0] = 1 / math.sqrt(A.shape[1]), 10 / math.sqrt(B.shape[0])
    trainer(model, tmp_path, [SpectrumCallback()], max_steps=3, learning_rate=1e-4).train()
    after = plan_of(model)
    assert after.by_name[empty].trains
    assert live_rank(layer_at(model, empty), "default") == after.by_name[empty].rank == 8
    assert after.trainable_parameters == before.trainable_parameters
    model.save_pretrained(tmp_path / "adapter")
    config = copy.deepcopy(config)
    again, _ = load_model_with_spectrum(str(tiny_llama_folder), config, quantization="nf4", dtype=torch.float32)
    again.load_adapter(str(tmp_path / "adapter"), "default")
    assert torch.equal(logits(again), logits(model))


def test_fused_experts_cannot_move_and_say_so() -> None:
    from architectures import ARCHITECTURES

    with pytest.raises(OptionError, match=r"rank of fused experts cannot change during training, and model\.layers\.0"):
        movable(ARCHITECTURES["mixtral"].build())
