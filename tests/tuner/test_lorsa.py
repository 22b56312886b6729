"""Adapters in the singular basis: what is computed, what trains, what is stored, and which components are chosen."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, batch_for
from peft import LoraConfig, PeftModel, get_peft_model
from running import logits, same_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectrum_peft import GradientReport, SpectrumConfig, make_plan, merge_into_base, probe_gradients, scan_weights
from spectrum_peft.errors import MismatchError, OptionError
from spectrum_peft.export import export_lora
from spectrum_peft.scan import CRITERIA, svd
from spectrum_peft.scan.svd import truncated_svd
from spectrum_peft.tuner import lorsa
from spectrum_peft.tuner.factors import factors
from spectrum_peft.weights.adapters import AdapterState
from spectrum_peft.weights.rotations import core_matrix, rotation_bases

NAME = "model.layers.1.mlp.up_proj.weight"
MODULE = "model.layers.1.mlp.up_proj"
OPTIONS: dict[str, Any] = {"n_components": 5, "svd_rank": 16, "rotation_rank": 3, "spectrum_ratio": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    ARCHITECTURES["llama"].build().save_pretrained(path)
    return path


def base_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def gradients(folder: Path) -> GradientReport:
    model = base_of(folder)
    batches = [batch_for(ARCHITECTURES["llama"], model, seed) for seed in range(4)]
    return probe_gradients(model, batches, directions=0, svd_rank=16)


def adapted(folder: Path, gradients: GradientReport, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = SpectrumConfig(mode="lorsa", gradients=gradients, task_type="CAUSAL_LM", **{**OPTIONS, **options})
    return get_peft_model(base_of(folder, dtype), config)


def layers(model: Any, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """(module name in the base, PEFT layer)."""
    for name, _ in lorsa.singular_layers(model, adapter):
        yield name.removeprefix("base_model.model."), model.get_submodule(name)


def disturb(model: Any, scale: float = 0.3, adapter: str = "default") -> Any:
    """Give what trains values that are not zero."""
    generator = torch.Generator().manual_seed(9)
    for _, layer in layers(model, adapter):
        for parameter in layer.lora_B[adapter].parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


# --- the importance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_importance_is_that_of_autograd_one_sample_at_a_time(family: str, size: int) -> None:
    """In float64, at any batch size: s_i^2 times the mean of (u_i^T G v_i)^2, G by autograd of each sample's loss."""
    architecture = ARCHITECTURES[family]
    model = architecture.build().double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (6, 7), generator=generator)
    labels = torch.randint(0, 3, (6,), generator=generator) if family == "bert" else ids.clone()
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batches = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 6, size)]
    report = probe_gradients(model, batches, directions=0, svd_rank=16)
    names = dict(model.named_parameters())
    totals: dict[str, Tensor] = {}
    bases = {}
    for stat in report.stats:
        matrix = names[stat.name].detach()
        turned = family == "gpt2"
        bases[stat.name] = truncated_svd(matrix.T if turned else matrix, 16)
        # An SVD in float32 errs by some units of 6e-8 of the largest value; of noise, the sixteenth is above a third
        # of that.
        assert torch.allclose(torch.tensor(stat.singular_values), bases[stat.name].values, rtol=1e-5)
    for i in range(6):
        model.zero_grad()
        model(**{k: v[i : i + 1] for k, v in whole.items()}).loss.backward()
        for name, basis in bases.items():
            gradient = names[name].grad.T if family == "gpt2" else names[name].grad
            slopes = torch.einsum("io,oj,ij->i", basis.left.double(), gradient, basis.right.double())
            totals[name] = totals.get(name, 0) + slopes.square()
    for stat in report.stats:
        wanted = bases[stat.name].values.double().square() * totals[stat.name] / 6
        found = torch.tensor(stat.importance, dtype=torch.float64)
        # The model is float64, but transformers computes norms and losses in float32: 6e-8 in each.
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-18), stat.name
        assert (found > 0).any()


def test_a_report_with_importance_survives_its_file(gradients: GradientReport, tmp_path: Path) -> None:
    assert GradientReport.load(gradients.save(tmp_path / "gradients.json")) == gradients
    stat = gradients.by_name[NAME]
    assert len(stat.singular_values) == len(stat.importance) == 16
    assert list(stat.singular_values) == sorted(stat.singular_values, reverse=True)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_takes_the_most_important_components(folder: Path, gradients: GradientReport) -> None:
    plan = make_plan(scan_weights(folder), mode="lorsa", gradients=gradients, **OPTIONS)
    trained = [e for e in plan.entries if e.trains]
    assert len(trained) == 7
    for entry in trained:
        importance = gradients.by_name[entry.name].importance
        best = sorted(range(16), key=lambda i: -importance[i])[:5]
        assert entry.components == tuple(sorted(best))
        assert (entry.rank, entry.alpha, entry.action) == (3, 3.0, "lorsa")
        assert entry.trainable_numel == 5 * (1 + 2 * 3)
    assert plan.trainable_parameters == 7 * 35


def test_a_global_budget_is_spent_where_the_importance_is(folder: Path, gradients: GradientReport) -> None:
    report = scan_weights(folder)
    plan = make_plan(
        report, mode="lorsa", gradients=gradients, **{**OPTIONS, "component_scope": "global", "n_components": 2}
    )
    layer = make_plan(report, mode="lorsa", gradients=gradients, **{**OPTIONS, "n_components": 2})
    picked = {(e.name, i) for e in plan.entries for i in e.components or ()}
    assert len(picked) == sum(len(e.components or ()) for e in layer.entries) == 14
    chosen = [e.name for e in layer.entries if e.trains]
    every = {(name, i): gradients.by_name[name].importance[i] for name in chosen for i in range(16)}
    assert picked == set(sorted(every, key=lambda key: -every[key])[:14])
    for name in set(chosen) - {name for name, _ in picked}:
        assert not plan.by_name[name].trains
    if {name for name, _ in picked} != set(chosen):
        assert any("component_scope='global'" in note for note in plan.notes)


def test_what_a_matrix_is_too_small_for_is_clamped_with_a_notice(folder: Path) -> None:
    model = base_of(folder)
    gradients = probe_gradients(model, [batch_for(ARCHITECTURES["llama"], model)], directions=0, svd_rank=500)
    wide = {"n_components": 40, "svd_rank": 500, "rotation_rank": 50}
    plan = make_plan(scan_weights(folder), mode="lorsa", gradients=gradients, spectrum_ratio=1.0, **wide)
    small = next(e for e in plan.entries if e.kind == "self_attn.k_proj")
    assert small.shape == (32, 64) and len(small.components or ()) == 32 and small.rank == 32
    large = plan.by_name[NAME]
    assert len(large.components or ()) == 40 and large.rank == 50
    notes = " ".join(plan.notes)
    for name in wide:
        assert f"{name}={wide[name]}" in notes
    model = get_peft_model(model, SpectrumConfig(plan=plan))
    assert len(list(layers(model))) == 14


def test_a_plan_without_what_it_needs_is_refused(folder: Path, gradients: GradientReport) -> None:
    report = scan_weights(folder)
    with pytest.raises(OptionError, match="calibration_data=calibration_batches"):
        make_plan(report, mode="lorsa", **OPTIONS)
    with pytest.raises(OptionError, match=r"looks at 17 components of .*, the gradients know 16 of them"):
        make_plan(report, mode="lorsa", gradients=gradients, **{**OPTIONS, "svd_rank": 17})
    model = base_of(folder)
    bare = probe_gradients(model, [batch_for(ARCHITECTURES["llama"], model)], directions=0)
    with pytest.raises(
        OptionError, match=r"the gradients know none: wanted those of probe_gradients\(model, batches, svd_rank=16\)"
    ):
        make_plan(report, mode="lorsa", gradients=bare, **OPTIONS)
    for name in ("n_components", "svd_rank", "rotation_rank"):
        with pytest.raises(OptionError, match=f"{name} is 0, wanted a whole number of at least 1"):
            make_plan(report, mode="lorsa", gradients=gradients, **{**OPTIONS, name: 0})
    with pytest.raises(OptionError, match="n_components=7 means nothing in mode 'lora'; it belongs to lorsa"):
        make_plan(report, mode="lora", n_components=7)


def test_fused_experts_are_refused_with_what_to_exclude() -> None:
    architecture = ARCHITECTURES["mixtral"]
    model = architecture.build()
    batches = [batch_for(architecture, model)]
    config = SpectrumConfig(mode="lorsa", calibration_data=batches, **OPTIONS)
    with pytest.raises(OptionError, match=r"exclude_modules=\['mlp.experts.down_proj', 'mlp.experts.gate_up_proj'\]"):
        get_peft_model(model, config)
    experts = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    config = SpectrumConfig(mode="lorsa", calibration_data=batches, exclude_modules=experts, **OPTIONS)
    assert not any(
        "experts" in name for name in get_peft_model(model, config).peft_config["default"].plan.trainable_names
    )


@pytest.mark.parametrize("field", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "gaussian"}])
def test_what_belongs_to_other_adapters_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(field))):
        SpectrumConfig(mode="lorsa", **field)


# --- what is computed ------------------------------------------------------------------------------------------------


def test_at_the_start_the_function_is_the_bases_bit_for_bit(folder: Path, gradients: GradientReport) -> None:
    model = adapted(folder, gradients)
    start = logits(base_of(folder))
    assert same_bytes(logits(model), start)
    assert not same_bytes(logits(disturb(model)), start)


def test_a_layer_computes_the_definition(folder: Path, gradients: GradientReport) -> None:
    """W' = W + U' diag(s + ds) V'^T - U diag(s) V^T, from an SVD of numpy's kind in float64 and P, Q as drawn."""
    model = disturb(adapted(folder, gradients))
    for name, layer in layers(model):
        weight = layer.get_base_layer().weight.detach().double()
        entry = model.peft_config["default"].plan.by_name[f"{name}.weight"]
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        chosen = list(entry.components)
        basis, core = layer.lora_A["default"], layer.lora_B["default"]
        # The signs of vectors are free; ours make the largest entry of u positive.
        u, s, v = u[:, chosen], s[chosen], vh[chosen].T
        peaks = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        u, v = u * peaks, v * peaks
        # An SVD in float32 errs by some units of 6e-8 of the largest value; what was chosen is above a third of that.
        assert torch.allclose(basis.values.double(), s, rtol=1e-5)
        P, Q = (m.double().T for m in rotation_bases(0, entry.name, *weight.shape, 3))
        ds, p, q = (t.detach().double() for t in (core.shift, core.p, core.q))
        wanted = weight + (u + P @ p.T) @ torch.diag(s + ds) @ (v + Q @ q.T).T - u @ torch.diag(s) @ v.T
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found = layer(x).double()
        # Outputs of about 1 in float32: some ten roundings of 1.2e-7.
        assert torch.allclose(found, x.double() @ wanted.T, atol=2e-6)


def test_gradients_are_those_of_finite_differences_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(9, 7, bias=False).double()
    count, rank = 4, 2
    found = truncated_svd(layer.weight, count)
    p_rows, q_rows = rotation_bases(0, "w", 7, 9, rank)
    left, right = torch.cat((found.left, p_rows)).double(), torch.cat((found.right, q_rows)).double()
    values, x = found.values.double(), torch.randn(3, 9, generator=generator, dtype=torch.float64)
    trained = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.3).requires_grad_()
        for shape in ((count,), (count, rank), (count, rank))
    ]

    def loss(shift: Tensor, p: Tensor, q: Tensor) -> Tensor:
        out = layer(x) + ((x @ right.T) @ core_matrix(values, shift, p, q).T) @ left
        return out.tanh().square().sum()

    # Float64: rounding of a loss of order 10 over the step of 1e-6 is 1e-9, and the rule's own error the step squared.
    assert torch.autograd.gradcheck(loss, trained, eps=1e-6, atol=1e-7)


def test_gradients_of_a_layer_are_those_of_a_central_difference(folder: Path, gradients: GradientReport) -> None:
    """Of the layer itself, in the float32 that it computes in, against the function's change along each direction."""
    model = disturb(adapted(folder, gradients))
    _, layer = next(iter(layers(model)))
    core = layer.lora_B["default"]
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    generator = torch.Generator().manual_seed(3)
    for parameter in core.parameters():
        direction = torch.randn(parameter.shape, generator=generator)
        step, ends = 1e-2, []
        start = parameter.detach().clone()
        for sign in (1, -1):
            parameter.data = start + sign * step * direction
            with torch.no_grad():
                ends.append(layer(x).double().square().sum())
        parameter.data = start
        # A sum of squares of about 24, of outputs in float32: 24 * 1.2e-7 over 2e-2 is 1.5e-4 of slopes of 3 to 9. The function
        # is nearly quadratic, so that a central difference has little error of its own.
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-3)


def test_dropout_and_scale_act_on_the_correction_only(folder: Path, gradients: GradientReport) -> None:
    model = disturb(adapted(folder, gradients, lora_dropout=0.5))
    _, layer = next(iter(layers(model)))
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        layer.eval()
        base, full = layer.get_base_layer()(x), layer(x)
        layer.set_scale("default", 0.5)
        # Float32 sums of 64 or 128 products, outputs of order 1: 128 * 6e-8 is 8e-6 at worst; nothing is added at scale 0.
        assert torch.allclose(layer(x) - base, 0.5 * (full - base), atol=1e-5)
        layer.set_scale("default", 0.0)
        assert torch.allclose(layer(x), base, atol=1e-6)
        layer.set_scale("default", 1.0)
        layer.train()
        # Half of the inputs of the correction dropped: far above any rounding.
        assert not torch.allclose(layer(x), full, atol=1e-3)


# --- what trains, and in which dtype ---------------------------------------------------------------------------------


def trained_names(model: Any) -> set[str]:
    return {name.rpartition("lora_")[2] for name, p in model.named_parameters() if p.requires_grad}


WHAT_TRAINS = {"B.default.shift", "B.default.p", "B.default.q"}


def test_only_shifts_and_turns_train_whatever_is_switched(folder: Path, gradients: GradientReport) -> None:
    model = adapted(folder, gradients)
    assert trained_names(model) == WHAT_TRAINS
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7 * 35
    with model.disable_adapter():
        pass
    assert trained_names(model) == WHAT_TRAINS
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert trained_names(model) == WHAT_TRAINS
    model.set_adapter("other")
    assert trained_names(model) == {name.replace("default", "other") for name in WHAT_TRAINS}
    model.set_adapter("default")
    model.delete_adapter("other")
    assert trained_names(model) == WHAT_TRAINS
    model.base_model.disable_adapter_layers()
    assert trained_names(model) == set()
    model.base_model.enable_adapter_layers()
    assert trained_names(model) == WHAT_TRAINS
    model.base_model.set_requires_grad("default", requires_grad=False)
    model.base_model.set_requires_grad("default", requires_grad=True)
    assert trained_names(model) == WHAT_TRAINS
    twin = copy.deepcopy(model)
    assert trained_names(twin) == WHAT_TRAINS
    for (_, mine), (_, its) in zip(layers(model), layers(twin), strict=True):
        assert its.lora_B["default"]._basis[0] is its.lora_A["default"] is not mine.lora_A["default"]
        assert its.lora_A["default"]._layer[0] is its


def test_everything_stays_float32_when_the_base_is_cast(folder: Path, gradients: GradientReport) -> None:
    model = disturb(adapted(folder, gradients))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    model.to(torch.float16)
    for name, value in before.items():
        assert same_bytes(model.get_parameter(name), value), name
    model.float()
    twin = adapted(folder, gradients, dtype=torch.bfloat16)
    assert {p.dtype for n, p in twin.named_parameters() if "lora_" in n} == {torch.float32}
    assert twin.get_parameter(f"base_model.model.{MODULE}.base_layer.weight").dtype == torch.bfloat16
    _, layer = next(iter(layers(disturb(twin))))
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    own = adapted(folder, gradients, dtype=torch.bfloat16, trainable_dtype="base")
    found = {n.rpartition(".")[2]: p.dtype for n, p in own.named_parameters() if "lora_" in n}
    assert found["shift"] == found["p"] == found["q"] == torch.bfloat16
    assert found["left"] == found["right"] == found["values"] == torch.float32
    assert layer(x).dtype == torch.bfloat16


def test_the_decomposed_matrix_is_the_one_the_layer_computes_with(folder: Path) -> None:
    from spectrum_peft import load_model_with_spectrum
    from spectrum_peft.weights import dequantized_weights

    model = base_of(folder)
    batches = [batch_for(ARCHITECTURES["llama"], model)]
    config = SpectrumConfig(mode="lorsa", calibration_data=batches, task_type="CAUSAL_LM", **OPTIONS)
    model, _ = load_model_with_spectrum(str(folder), config, quantization="nf4", dtype=torch.float32)
    seen = dequantized_weights(model)
    for name, layer in layers(model):
        entry = model.peft_config["default"].plan.by_name[f"{name}.weight"]
        values = torch.linalg.svdvals(seen[f"{name}.weight"]().double())
        # An SVD in float32 errs by some units of 6e-8 of the largest value; what was chosen is above a third of that.
        assert torch.allclose(layer.lora_A["default"].values.double(), values[list(entry.components)], rtol=1e-5)
        stored = torch.linalg.svdvals(base_of(folder).get_parameter(f"{name}.weight").double())
        # 4-bit rounding moves weights by several hundredths of their size.
        assert not torch.allclose(stored, values, rtol=1e-3)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(folder: Path, gradients: GradientReport, tmp_path: Path) -> tuple[Any, Path]:
    model = disturb(adapted(folder, gradients))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_the_file_holds_the_chosen_triplets_and_no_random_directions(saved: tuple[Any, Path]) -> None:
    _, path = saved
    tensors = load_file(path / "adapter_model.safetensors")
    mine = {k.rpartition(f"{MODULE}.")[2]: tuple(v.shape) for k, v in tensors.items() if f".{MODULE}." in k}
    assert mine == {
        "lora_A.left": (5, 96), "lora_A.right": (5, 64), "lora_A.values": (5,), "lora_A.digest": (32,),
        "lora_B.shift": (5,), "lora_B.p": (5, 3), "lora_B.q": (5, 3),
    }  # fmt: skip


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_runs_no_svd_and_is_bit_identical(
    folder: Path,
    saved: tuple[Any, Path],
    monkeypatch: pytest.MonkeyPatch,
    low_cpu_mem_usage: bool,
    is_trainable: bool,
) -> None:
    model, path = saved

    def refuse(*args: Any) -> None:
        raise AssertionError("an SVD was computed")

    monkeypatch.setattr(lorsa, "cached_svd", refuse)
    loaded = PeftModel.from_pretrained(
        base_of(folder), path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable
    )
    assert same_bytes(logits(loaded), logits(model))
    assert trained_names(loaded) == (WHAT_TRAINS if is_trainable else set())
    for (_, mine), (_, its) in zip(layers(model), layers(loaded), strict=True):
        for part in ("left", "values", "right", "digest"):
            assert same_bytes(getattr(its.lora_A["default"], part), getattr(mine.lora_A["default"], part))
        assert same_bytes(its.get_delta_weight("default"), mine.get_delta_weight("default"))
    loaded.save_pretrained(path.parent / "again")
    one, two = (load_file(p / "adapter_model.safetensors") for p in (path, path.parent / "again"))
    assert one.keys() == two.keys() and all(same_bytes(one[k], two[k]) for k in one)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_loading_onto_a_bfloat16_base_keeps_every_bit(folder: Path, saved: tuple[Any, Path]) -> None:
    model, path = saved
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base_of(folder, torch.bfloat16), path, low_cpu_mem_usage=low)
        for (_, mine), (_, its) in zip(layers(model), layers(loaded), strict=True):
            assert same_bytes(its.get_delta_weight("default"), mine.get_delta_weight("default"))


def test_transformers_own_loader_gives_the_same(folder: Path, saved: tuple[Any, Path]) -> None:
    model, path = saved
    loaded = base_of(folder)
    loaded.load_adapter(str(path))
    assert same_bytes(logits(loaded), logits(model))


def test_a_saved_plan_on_a_fresh_model_starts_from_the_base(folder: Path, saved: tuple[Any, Path]) -> None:
    """No file is loaded after it, so the first forward decomposes the matrices."""
    from peft import PeftConfig

    _, path = saved
    config = PeftConfig.from_pretrained(path)
    config.inference_mode = False
    fresh = get_peft_model(base_of(folder), config)
    assert same_bytes(logits(fresh), logits(base_of(folder)))
    for _, layer in layers(fresh):
        assert torch.isfinite(layer.lora_A["default"].values).all()
    assert trained_names(fresh) == WHAT_TRAINS


def broken(path: Path, change: Any) -> Path:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return path


def test_another_digest_is_refused_on_load_and_on_merge(folder: Path, saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = saved
    key = f"base_model.model.{MODULE}.lora_A.digest"
    broken(path, lambda tensors: tensors[key].add_(1))
    with pytest.raises(MismatchError, match=r"directions P and Q of model.layers.1.mlp.up_proj.weight .* digest"):
        PeftModel.from_pretrained(base_of(folder), path)
    with pytest.raises(MismatchError, match="is not the digest of the directions that seed 0 gives"):
        merge_into_base(path, folder, tmp_path / "merged")
    loaded = base_of(folder)
    loaded.load_adapter(str(path))  # transformers' loader asks nobody; the first forward does
    with pytest.raises(MismatchError, match="digest"):
        logits(loaded)


def test_another_seed_in_the_plan_is_refused(folder: Path, saved: tuple[Any, Path]) -> None:
    _, path = saved
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["plan"]["options"]["seed"] = config["seed"] = 5
    file.write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="drawn from seed 5"):
        PeftModel.from_pretrained(base_of(folder), path)


@pytest.mark.parametrize("part", ["lora_A.left", "lora_A.values", "lora_A.digest", "lora_B.p"])
def test_a_file_that_lacks_a_part_is_refused(folder: Path, saved: tuple[Any, Path], tmp_path: Path, part: str) -> None:
    _, path = saved
    broken(path, lambda tensors: tensors.pop(f"base_model.model.{MODULE}.{part}"))
    with pytest.raises(MismatchError, match=rf"lacks 1 tensors of the plan.*{MODULE}"):
        PeftModel.from_pretrained(base_of(folder), path)
    with pytest.raises(MismatchError, match=rf"lacks '{part.partition('.')[2]}' of '{NAME}'"):
        merge_into_base(path, folder, tmp_path / "merged")


def test_factors_merge_export_and_scan_agree_with_the_layers(
    folder: Path, saved: tuple[Any, Path], tmp_path: Path
) -> None:
    model, path = saved
    in_memory = {name: (b @ a) * scale for name, b, a, scale in factors(model)}
    in_file = {name: (b, a, scale) for name, b, a, scale in AdapterState.from_folder(path).factors()}
    assert in_memory.keys() == in_file.keys() and len(in_file) == 7
    for name, (b, a, scale) in in_file.items():
        assert a.shape[0] == 5 + 3 and scale == 1.0
        layer = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        # Products of rank 8 in float32, of order 1: 8 * 6e-8.
        assert torch.allclose(b @ a, layer.get_delta_weight("default"), atol=1e-6)
        assert torch.allclose(in_memory[name], b @ a, atol=1e-6)
    merged = tmp_path / "merged"
    report = merge_into_base(path, folder, merged)
    assert sorted(report.changed) == sorted(in_file)
    # Merging rounds W + dW once to float32: some ten roundings of 1.2e-7 of logits of order one; so does any other
    # order of sums.
    assert torch.allclose(logits(base_of(merged)), logits(model), atol=2e-6)
    lora = export_lora(path, tmp_path / "lora")
    config = LoraConfig.from_pretrained(lora)
    assert type(config) is LoraConfig and config.r == 8 and config.lora_alpha == 8 and not config.rank_pattern
    assert torch.allclose(logits(PeftModel.from_pretrained(base_of(folder), lora)), logits(model), atol=2e-6)
    mine, its = scan_weights(path, "mean_std").scores, scan_weights(merged, "mean_std").scores
    # Each score is within its criterion's tolerance of the exact one.
    assert mine == pytest.approx(its, rel=2 * CRITERIA["mean_std"].tolerance)
    live = scan_weights(model, "mean_std").scores
    assert live == pytest.approx(its, rel=2 * CRITERIA["mean_std"].tolerance)


def test_two_adapters_of_other_seeds_switch(folder: Path, gradients: GradientReport, tmp_path: Path) -> None:
    one = disturb(adapted(folder, gradients, seed=1))
    two = disturb(adapted(folder, gradients, seed=2, n_components=3), 0.2)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    both = PeftModel.from_pretrained(base_of(folder), tmp_path / "one", adapter_name="one")
    both.load_adapter(tmp_path / "two", "two")
    assert same_bytes(logits(both), logits(one))
    both.set_adapter("two")
    assert same_bytes(logits(both), logits(two))
    both.set_adapter("one")
    both.delete_adapter("two")
    assert same_bytes(logits(both), logits(one))


# --- set-up ----------------------------------------------------------------------------------------------------------


def test_the_probe_and_the_injection_decompose_each_matrix_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(tmp_path))
    calls = []
    real = truncated_svd
    monkeypatch.setattr(svd, "truncated_svd", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = base_of(folder)
    batches = [batch_for(ARCHITECTURES["llama"], model)]
    with caplog.at_level(logging.INFO):
        config = SpectrumConfig(mode="lorsa", calibration_data=batches, **OPTIONS)
        taken = get_peft_model(model, config).peft_config["default"]
    # Half of the matrices are chosen, and only those are looked at.
    assert len(calls) == 7
    assert len(list((tmp_path / "svd").iterdir())) == 7
    assert taken.calibration_data is None
