"""Real weights of some columns: what is computed, what autograd keeps, what trains, merges, is stored and chosen."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, batch_for
from peft import LoraConfig, PeftModel, get_peft_model
from running import LIBRARIES, logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from spectrum_peft import (
    SpectrumConfig,
    estimate_memory,
    fit_to_memory,
    load_model_with_spectrum,
    make_plan,
    merge_into_base,
    probe_gradients,
    scan_weights,
)
from spectrum_peft.errors import CheckpointError, MismatchError, OptionError
from spectrum_peft.export import export_lora
from spectrum_peft.probe import column_energies
from spectrum_peft.tuner.columns import Rows, column_layers, install_columns
from spectrum_peft.tuner.factors import factors

pytestmark = LIBRARIES
NAME = "model.layers.1.mlp.up_proj.weight"
MODULE = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    ARCHITECTURES["llama"].build().save_pretrained(path)
    return path


def base_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapted(base: Any, **options: Any) -> Any:
    return get_peft_model(base, SpectrumConfig(mode="columns", task_type="CAUSAL_LM", **{"r": 4, **options}))


def change_of(layer: Any) -> Any:
    """D: of columns (out, k), of rows (k, in)."""
    return (
        layer.lora_A["default"].weight if isinstance(layer.lora_B["default"], Rows) else layer.lora_B["default"].weight
    )


def delta_of(layer: Any) -> Tensor:
    """The dense W' - W, (out, in), from D and the numbers, line by line; in float64."""
    change = change_of(layer).detach().double()
    delta = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    if isinstance(layer.lora_B["default"], Rows):
        for i, row in enumerate(layer.lora_B["default"].rows.tolist()):
            delta[row] = change[i]
    else:
        for i, column in enumerate(layer.lora_A["default"].columns.tolist()):
            delta[:, column] = change[:, i]
    return delta


def disturb(model: Any, scale: float = 0.1) -> Any:
    """Give D values that are not zero."""
    generator = torch.Generator().manual_seed(9)
    for name, _ in column_layers(model, "default"):
        weight = change_of(model.get_submodule(name))
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def layer_of(
    out: int, inside: int, lines: tuple[int, ...], dtype: torch.dtype, dropout: float = 0.0, side: str = "columns"
) -> Any:
    """PEFT's layer over one Linear, with the columns or rows in it and a D that is not zero."""
    from peft.tuners.lora.layer import Linear

    from spectrum_peft.records import PlanEntry

    torch.manual_seed(0)
    base = nn.Linear(inside, out, dtype=dtype).requires_grad_(False)
    layer = Linear(base, "default", LoraConfig(lora_dropout=dropout), r=len(lines), lora_alpha=len(lines))
    install_columns(layer, "default", PlanEntry("w.weight", "columns", shape=(out, inside), **{side: lines}))
    change_of(layer).data = torch.empty_like(change_of(layer), dtype=dtype).normal_(std=0.3)
    return layer


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_the_derivatives_are_those_of_finite_differences_and_of_the_summed_weight(side: str) -> None:
    """In float64: gradcheck by x and D, and autograd of W + D P, or W + P^T D, written as one dense matrix."""
    lines = [0, 3, 4]
    layer = layer_of(5, 7, tuple(lines), torch.float64, side=side)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    change = change_of(layer)
    key = {"columns": "lora_B.default.weight", "rows": "lora_A.default.weight"}[side]

    def run(x: Tensor, d: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {key: d}, (x,))

    assert torch.autograd.gradcheck(run, (x, change))
    whole = (layer.base_layer.weight + delta_of(layer)).requires_grad_(True)
    wanted = functional.linear(x, whole, layer.base_layer.bias)
    found = layer(x)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-14)  # sums of 7 products of order 1
    g = torch.randn_like(found)
    dx, dw = torch.autograd.grad(wanted, (x, whole), g)
    found_dx, found_d = torch.autograd.grad(found, (x, change), g)
    assert torch.allclose(found_dx, dx, rtol=0, atol=1e-14)
    # Sums of at most a dozen products of order 1 in float64, 1.1e-16 each.
    assert torch.allclose(found_d, dw[:, lines] if side == "columns" else dw[lines], rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_the_factors_as_peft_reads_them_are_the_change(side: str) -> None:
    layer = layer_of(5, 7, (0, 3, 4), torch.float32, side=side)
    assert torch.equal(layer.get_delta_weight("default"), delta_of(layer).float())  # each one product and zeros


def kept_bytes(layer: Any, x: Tensor) -> int:
    """Of storages that autograd holds for a layer's backward, its own parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x).sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_selected_features_and_nothing_else(dtype: torch.dtype) -> None:
    from peft.tuners.lora.layer import Linear

    x = torch.randn(16, 64).to(dtype).requires_grad_(True)
    layer = layer_of(48, 64, (1, 2, 5, 60), torch.float32)
    layer.base_layer.to(dtype)
    assert kept_bytes(layer, x) == 16 * 4 * 4 + 4 * 8  # tokens x columns in float32, and the columns' numbers
    lora = Linear(nn.Linear(64, 48, dtype=dtype).requires_grad_(False), "default", LoraConfig(), r=4, lora_alpha=4)
    lora.lora_A.float(), lora.lora_B.float()
    assert kept_bytes(lora, x) >= 16 * 64 * 4  # what is compared with: the whole input


def test_a_backward_after_two_forwards_with_buffers_written_between() -> None:
    """As DDP does before every forward; the gradient is the sum of both."""
    layer = layer_of(5, 8, (1, 6), torch.float32)
    one, two = torch.randn(3, 8), torch.randn(3, 8)
    first = layer(one).sum()
    layer.lora_A["default"].columns.copy_(layer.lora_A["default"].columns.clone())
    (first + layer(two).sum()).backward()
    wanted = torch.cat((one, two))[:, [1, 6]].sum(0).expand(5, 2)
    # Sums of six numbers below 4 in float32: 6 * 6e-8 * 6 is 2e-6.
    assert torch.allclose(layer.lora_B["default"].weight.grad, wanted, atol=1e-5)


def test_a_frozen_input_and_dropout() -> None:
    layer = layer_of(5, 8, (1, 6), torch.float32, dropout=0.5)
    x = torch.ones(4000, 8)
    layer.train()
    torch.manual_seed(1)
    extra = layer(x) - layer.base_layer(x)
    change = layer.lora_B["default"].weight
    # Each token drops either feature by itself and doubles what is left: the mean of 4000 is within 5 sigma of the sum.
    assert (extra.mean(0) - change.sum(1)).abs().max() < 5 * change.norm(dim=1).max() / 4000**0.5
    assert len({tuple(row) for row in extra.detach().round(decimals=5).tolist()}) == 4
    layer.eval()
    # Sums of ten numbers of order one in float32, less eight of them.
    assert torch.allclose(layer(x) - layer.base_layer(x), change.sum(1).expand(4000, 5), atol=1e-6)


def test_the_function_is_the_bases_to_the_bit_at_the_start_in_every_dtype(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = base_of(folder, dtype)
        before = logits(base)
        assert torch.equal(logits(adapted(base)), before)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("how", ["checkpointing", "autocast"])
def test_gradients_under_checkpointing_and_autocast(folder: Path, how: str, coupled: bool) -> None:
    model = disturb(adapted(base_of(folder), coupled=coupled))
    batch = batch_for(ARCHITECTURES["llama"], model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients() -> dict[str, Tensor]:
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in trained.items()}

    plain = gradients()
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients()
        assert all(torch.equal(again[n], plain[n]) for n in plain)  # the same operations on the same values
    else:
        with torch.autocast("cpu", torch.bfloat16):
            again = gradients()
        for n, wanted in plain.items():
            # Directions agree: bfloat16 rounds each of some hundred products by 2^-9, and errors of both signs add up.
            assert functional.cosine_similarity(again[n].flatten(), wanted.flatten(), dim=0) > 0.99, n
            assert again[n].dtype == torch.float32


@pytest.mark.parametrize(("quantization", "rows"), [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)])
def test_on_a_quantized_base_the_gradient_is_that_of_the_dequantized_weight(
    folder: Path, quantization: str, rows: bool
) -> None:
    options: dict[str, Any] = {"rows_of": ["up_proj"]} if rows else {}
    config = SpectrumConfig(mode="columns", r=4, task_type="CAUSAL_LM", **options)
    try:
        model, _ = load_model_with_spectrum(str(folder), config, quantization=quantization, dtype=torch.float32)
    except OptionError as error:
        pytest.skip(str(error))
    disturb(model)
    layer: Any = model.base_model.model.get_submodule(MODULE)
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    g = torch.randn(2, 5, layer.out_features)
    found = layer(x)
    dx, dd = torch.autograd.grad(found, (x, change_of(layer)), g)
    base_x = x.detach().clone().requires_grad_(True)
    plain = layer.base_layer(base_x)
    (base_dx,) = torch.autograd.grad(plain, base_x, g)
    delta = delta_of(layer).float()
    # Sums of at most 128 products of order 0.3 in float32, in another order: 128 * 6e-8 * 0.3 is 2.3e-6, and so below.
    assert torch.allclose(found, plain + x.detach() @ delta.T, atol=1e-5)
    assert torch.allclose(dx, base_dx + g @ delta, atol=1e-5)
    whole = torch.einsum("bto,bti->oi", g, x.detach())
    entry = model.peft_config["default"].plan.by_name[NAME]
    lines = list(entry.rows or entry.columns)
    assert torch.allclose(dd, whole[lines] if rows else whole[:, lines], atol=1e-5)


# --- merge, files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merge_is_w_plus_d_rounded_once(family: str, dtype: torch.dtype, coupled: bool, tmp_path: Path) -> None:
    """By PEFT's merge and by the merge of files, bit for bit, against a loop over lines in float64; the rest untouched."""
    architecture = ARCHITECTURES[family]
    architecture.build().to(dtype).save_pretrained(tmp_path / "base")
    base = base_of(tmp_path / "base", dtype)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = disturb(adapted(base, coupled=coupled))
    model.save_pretrained(tmp_path / "adapter")
    wanted = dict(before)
    assert coupled == any(e.rows for e in model.peft_config["default"].plan.entries)
    for entry in model.peft_config["default"].plan.entries:
        whole = before[entry.name].double()
        delta = delta_of(model.base_model.model.get_submodule(entry.name.removesuffix(".weight")))
        whole += delta.T if entry.transposed else delta
        # float64 sums of two float32 numbers are exact to 2^-53: rounded to float32, and then to the weight's dtype, once.
        wanted[entry.name] = whole.float().to(dtype)
    assert any(e.transposed for e in model.peft_config["default"].plan.entries) == (family == "gpt2")
    merge_into_base(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    by_files = dict(base_of(tmp_path / "merged", dtype).named_parameters())
    by_peft = dict(model.merge_and_unload().named_parameters())
    for name, value in wanted.items():
        assert torch.equal(by_files[name], value), name
        assert torch.equal(by_peft[name], value), name


def test_what_is_stored_is_d_and_the_numbers_of_the_columns(folder: Path, tmp_path: Path) -> None:
    model = disturb(adapted(base_of(folder)))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    entry = model.peft_config["default"].plan.by_name[NAME]
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.columns", "B.weight"}
    key = f"base_model.model.{MODULE}.lora_A.columns"
    assert tensors[key].tolist() == list(entry.columns)
    b, a, scale = next((b, a, s) for name, b, a, s in factors(model) if name == NAME)
    assert scale == 1.0 and torch.equal(a, functional.one_hot(tensors[key], 64).float())
    assert torch.equal(b, tensors[key.replace("A.columns", "B.weight")])
    for broken in (tensors[key].flip(0), tensors[key] + 1000, tensors[key].float()):
        save_file({**tensors, key: broken}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(MismatchError, match="up_proj"):
            PeftModel.from_pretrained(base_of(folder), tmp_path)
        with pytest.raises(MismatchError, match="columns"):
            merge_into_base(tmp_path, folder, tmp_path / "merged")


def test_rows_are_stored_with_their_numbers_too(folder: Path, tmp_path: Path) -> None:
    model = disturb(adapted(base_of(folder), coupled=True))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = f"base_model.model.{MODULE}.lora_B.rows"
    assert tensors[key].tolist() == list(model.peft_config["default"].plan.by_name[NAME].rows)
    assert tensors[key.replace("B.rows", "A.weight")].shape == (len(tensors[key]), 64)
    again = PeftModel.from_pretrained(base_of(folder), tmp_path)
    assert torch.equal(logits(again), logits(model))
    for broken in (tensors[key].flip(0), tensors[key] + 1000):
        save_file({**tensors, key: broken}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(MismatchError, match="up_proj: the file holds rows"):
            PeftModel.from_pretrained(base_of(folder), tmp_path)
        with pytest.raises(MismatchError, match=r"wanted the numbers of rows of .*up_proj.weight, below"):
            merge_into_base(tmp_path, folder, tmp_path / "merged")


@pytest.mark.parametrize("coupled", [False, True])
def test_it_exports_as_a_plain_lora_that_computes_the_same(folder: Path, coupled: bool, tmp_path: Path) -> None:
    model = disturb(adapted(base_of(folder), coupled=coupled))
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(base_of(folder), tmp_path / "lora")
    # The same sums in another order: logits of order 1 in float32.
    assert (logits(plain) - logits(model)).abs().max() < 2e-6


def test_columns_that_cannot_be_are_refused(folder: Path) -> None:
    plan = adapted(base_of(folder)).peft_config["default"].plan
    for wrong in ((3, 2), (2, 2), (0, 64), (-1, 3), (1, 2, 3)):
        with pytest.raises(CheckpointError, match=r"up_proj.weight: columns is .* wanted 2 numbers of its columns"):
            plan.replace(
                entries=tuple(
                    dataclasses.replace(e, columns=wrong, rank=2, alpha=2.0) if e.name == NAME else e
                    for e in plan.entries
                )
            )
    with pytest.raises(CheckpointError, match="wanted them for 'columns' and only there"):
        plan.replace(entries=tuple(dataclasses.replace(e, action="lora") for e in plan.entries))
    with pytest.raises(CheckpointError, match=r"columns is .* and rows .*wanted them for 'columns' and only there"):
        plan.replace(entries=tuple(dataclasses.replace(e, rows=e.columns) for e in plan.entries))
    with pytest.raises(CheckpointError, match=r"rows is .*wanted 1 numbers of its rows"):
        plan.replace(entries=tuple(dataclasses.replace(e, columns=None, rows=(128,), rank=1) for e in plan.entries))
    with pytest.raises(MismatchError, match="the plan has column 7, the matrix has 7 input features"):
        layer_of(5, 7, (0, 7), torch.float32)
    with pytest.raises(MismatchError, match="the plan has row 5, the matrix has 5 output features"):
        layer_of(5, 7, (0, 5), torch.float32, side="rows")


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_r_means_the_parameters_of_a_lora_of_that_rank(family: str) -> None:
    architecture = ARCHITECTURES[family]
    report = scan_weights(architecture.build(), "last")
    plan = make_plan(report, mode="columns", r=8)
    lora = make_plan(report, mode="lora", r=8)
    outs = sum(e.numel // e.inside for e in plan.entries)  # a column is the unit: less than one is rounded away in each
    assert 0 <= lora.trainable_parameters - plan.trainable_parameters < outs
    model = get_peft_model(architecture.build(), SpectrumConfig(plan=plan, task_type=architecture.task_type))
    trains = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    assert trains == plan.trainable_parameters


def test_how_many_columns(folder: Path) -> None:
    report = scan_weights(folder)

    def counts(**options: Any) -> set[int]:
        return {len(e.columns or ()) for e in make_plan(report, mode="columns", **options).entries}

    assert counts(n_columns=5) == {5}
    for entry in make_plan(report, mode="columns", spectrum_ratio=0.25).entries:
        assert len(entry.columns or ()) == entry.shape[1] // 4
    assert all(len(e.columns) == e.shape[1] for e in make_plan(report, mode="columns", n_columns=60_000).entries)
    assert counts(n_columns=6, column_block=4) == {8}  # to the nearest whole run
    with pytest.raises(OptionError, match=r"spectrum_ratio=0.5 and n_columns=3 are both given"):
        make_plan(report, mode="columns", n_columns=3, spectrum_ratio=0.5)
    with pytest.raises(OptionError, match="n_columns=3 means nothing in mode 'lora'; it belongs to columns"):
        make_plan(report, mode="lora", n_columns=3)


def test_runs_begin_at_multiples_of_their_length(folder: Path) -> None:
    plan = make_plan(scan_weights(folder), mode="columns", n_columns=16, column_block=8)
    for entry in plan.entries:
        columns = entry.columns or ()
        starts = columns[::8]
        assert all(start % 8 == 0 for start in starts)
        assert columns == tuple(start + j for start in starts for j in range(8))


def test_the_random_choice_follows_from_seed_and_name(folder: Path) -> None:
    report = scan_weights(folder)
    one, same, other = (make_plan(report, mode="columns", r=4, seed=seed) for seed in (1, 1, 2))
    assert one == same and one.digest != other.digest
    alike = [e.columns for e in one.entries if e.kind == "mlp.up_proj"]
    assert len(set(alike)) == len(alike)  # each matrix has its own


def test_rank_pattern_counts_columns_by_module(folder: Path) -> None:
    plan = adapted(base_of(folder), rank_pattern={"mlp.up_proj": 12}).peft_config["default"].plan
    plain = adapted(base_of(folder)).peft_config["default"].plan
    for entry, before in zip(plan.entries, plain.entries, strict=True):
        if entry.kind == "mlp.up_proj":
            out, inside = entry.shape
            assert len(entry.columns) == 12 * (out + inside) // out != len(before.columns)
        else:
            assert entry == before
    with pytest.raises(OptionError, match="n_columns=3: in mode 'columns' rank_pattern says"):
        SpectrumConfig(mode="columns", n_columns=3, rank_pattern={"up_proj": 2})


# --- rows, coupled to columns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_what_coupled_rows_change_reaches_the_next_matrix_in_the_columns_that_train(family: str) -> None:
    """By hooks: with the rows of the first block disturbed, what its last matrices take in differs at their columns alone."""
    architecture = ARCHITECTURES[family]
    model = get_peft_model(
        architecture.build().eval(),
        SpectrumConfig(mode="columns", r=4, coupled=True, task_type=architecture.task_type),
    )
    entries = [e for e in model.peft_config["default"].plan.entries if ".0." in e.name and ".1." not in e.name]
    if family == "t5":  # the decoder's attention to an encoder that changes would see all of it
        entries = [e for e in entries if e.name.startswith("encoder")]
    batch, takers = batch_for(architecture, model), {}
    rows = {e.name: e.rows for e in entries if e.rows}
    assert rows

    def inputs() -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(f"base_model.model.{e.name.removesuffix('.weight')}").register_forward_pre_hook(
                lambda m, args, name=e.name: seen.__setitem__(name, args[0].detach().clone())
            )
            for e in entries
            if e.columns in rows.values()
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        return seen

    for name in rows:
        before = inputs()
        taker = next(e for e in entries if e.columns == rows[name])
        layer: Any = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        change_of(layer).data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        moved = (inputs()[taker.name] - before[taker.name]).abs().amax(dim=tuple(range(before[taker.name].dim() - 1)))
        change_of(layer).data.zero_()
        # Equal to the bit elsewhere: the other features come of the same products.
        assert set(moved.nonzero().flatten().tolist()) <= set(taker.columns)
        assert moved[list(taker.columns)].max() > 0
        takers[name] = taker.name
    ends = ("down_proj", "o_proj", "c_proj", "dense", ".o", ".wo")
    assert all(name.removesuffix(".weight").endswith(ends) for name in takers.values())


def test_heads_are_the_units_of_an_attention(folder: Path) -> None:
    report = scan_weights(folder)
    config = base_of(folder).config
    width = config.hidden_size // config.num_attention_heads
    plan = make_plan(report, mode="columns", r=4, coupled=True, head_width=width)
    assert adapted(base_of(folder), coupled=True).peft_config["default"].plan.digest == plan.digest  # the model's own
    for entry in plan.entries:
        if entry.kind in ("self_attn.o_proj", "self_attn.q_proj"):
            numbers = entry.columns or entry.rows or ()
            assert [n // width for n in numbers[::width]] == sorted({n // width for n in numbers})
            assert len(numbers) % width == 0
    with pytest.raises(OptionError, match=r"head_width is 48, wanted a divisor of the 64 hidden features of .*o_proj"):
        make_plan(report, mode="columns", head_width=48)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_of_named_modules_have_the_parameters_of_a_lora(family: str) -> None:
    report = scan_weights(ARCHITECTURES[family].build(), "last")
    kinds = ["up_proj", "v_proj"] if family == "llama" else ["intermediate.dense"]
    plan = make_plan(report, mode="columns", r=8, rows_of=kinds)
    lora = make_plan(report, mode="lora", r=8)
    assert {e.kind for e in plan.entries if e.rows} == {e.kind for e in plan.entries if e.kind.endswith(tuple(kinds))}
    lines = sum(e.inside if e.rows else e.outside for e in plan.entries)  # less than one is rounded away in each
    assert 0 <= lora.trainable_parameters - plan.trainable_parameters < lines


def test_rows_that_cannot_be_chosen_are_refused(folder: Path) -> None:
    report, batches = scan_weights(folder), [batch_for(ARCHITECTURES["llama"], base_of(folder))]
    with pytest.raises(OptionError, match=r"rows_of: 'up_prj' is no matrix that trains.*up_proj"):
        make_plan(report, mode="columns", rows_of=["up_prj"])
    with pytest.raises(OptionError, match="rows_of is 'up_proj', wanted a list of names"):
        make_plan(report, mode="columns", rows_of="up_proj")
    scores = probe_gradients(base_of(folder), batches, directions=0, columns="fisher")
    with pytest.raises(
        OptionError, match=r"columns_by='fisher' scores input features, and of .*up_proj.weight rows train"
    ):
        make_plan(report, mode="columns", columns_by="fisher", gradients=scores, rows_of=["up_proj"])
    plan = make_plan(report, mode="columns", columns_by="fisher", gradients=scores, rows_of=["up_proj"], coupled=True)
    down = plan.by_name[NAME.replace("up_proj", "down_proj")]
    assert plan.by_name[NAME].rows == down.columns and plan.by_name[NAME.replace("up_", "gate_")].columns
    with pytest.raises(OptionError, match=r"rows_of names .*down_proj.*, and coupled has rows follow its columns"):
        make_plan(report, mode="columns", rows_of=["down_proj"], coupled=True)
    with pytest.raises(OptionError, match="column_block is 4096, wanted at most the "):
        make_plan(report, mode="columns", column_block=4096)
    rounded = make_plan(report, mode="columns", n_columns=2, column_block=8)
    assert any("whole runs, or heads, are more columns than asked for" in note for note in rounded.notes)
    assert not any(
        "whole runs" in note for note in make_plan(report, mode="columns", n_columns=8, column_block=8).notes
    )
    with pytest.raises(OptionError, match="coupled=True: in mode 'columns' rank_pattern says"):
        SpectrumConfig(mode="columns", coupled=True, rank_pattern={"up_proj": 2})


@pytest.mark.parametrize("field", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": False}])
def test_what_belongs_to_two_free_factors_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="product of two free factors"):
        SpectrumConfig(mode="columns", **field)


def test_fused_experts_are_refused_with_what_to_exclude() -> None:
    with pytest.raises(OptionError, match=r"exclude_modules=\['mlp.experts.down_proj', 'mlp.experts.gate_up_proj'\]"):
        adapted(ARCHITECTURES["mixtral"].build())


# --- scores of columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_those_of_autograd_and_of_the_inputs_one_sample_at_a_time(family: str) -> None:
    """In float64. Activation: inputs seen by a hook, at tokens that the loss depends on, which the last one is not."""
    architecture = ARCHITECTURES[family]
    model = architecture.build().double().eval()
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": (ids := torch.randint(0, 256, (2, 7), generator=generator)), "labels": ids} for _ in range(2)
    ]
    by_activation = probe_gradients(model, batches, directions=0, fisher=False, columns="activation").by_name
    by_fisher = probe_gradients(model, batches, directions=0, fisher=False, columns="fisher").by_name
    # The last block but one: its every token is looked at by tokens that count.
    name = "transformer.h.0.mlp.c_fc.weight" if family == "gpt2" else "model.layers.0.mlp.up_proj.weight"
    parameter, module = model.get_parameter(name), model.get_submodule(name.removesuffix(".weight"))
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    squares = torch.zeros(parameter.shape, dtype=torch.float64)
    for batch in batches:
        for i in range(2):
            model.zero_grad()
            model(**{k: v[i : i + 1] for k, v in batch.items()}).loss.backward()
            squares += parameter.grad.square() / 4
    handle.remove()
    inputs = torch.cat([x[0, :-1] for x in seen])
    # The model is float64, but transformers computes norms and losses in float32: 6e-8 in each, and so below.
    assert torch.allclose(torch.tensor(by_activation[name].columns).double(), inputs.square().mean(0), rtol=1e-6)
    wanted = squares.sum(1 if family == "gpt2" else 0)
    assert torch.allclose(torch.tensor(by_fisher[name].columns).double(), wanted, rtol=1e-6)


def test_energies_are_those_of_the_signal_part(folder: Path) -> None:
    model = base_of(folder)
    found = column_energies(model, criterion="spectrum")
    signals = {s.name: s.n_signal for s in scan_weights(model, "spectrum").stats}
    for stat in found.stats:
        u, s, vh = torch.linalg.svd(model.get_parameter(stat.name).detach().double(), full_matrices=False)
        n = signals[stat.name] or 0
        wanted = ((u[:, :n] * s[:n]) @ vh[:n]).square().sum(0)
        # Two decompositions in float64: vectors on either side of the edge turn by 1e-16 over the gap between their
        # values.
        assert torch.allclose(torch.tensor(stat.columns, dtype=torch.float64), wanted, rtol=1e-6, atol=1e-9), stat.name
    with pytest.raises(OptionError, match="draws no edge"):
        column_energies(model, criterion="mean_std")


@pytest.mark.parametrize("by", ["spectrum", "activation", "fisher"])
def test_the_best_scored_columns_are_taken(folder: Path, by: str) -> None:
    base = base_of(folder)
    batches = [batch_for(ARCHITECTURES["llama"], base)]
    data = {} if by == "spectrum" else {"calibration_data": batches}
    plan = adapted(base_of(folder), columns_by=by, **data).peft_config["default"].plan
    scores = column_energies(base) if by == "spectrum" else probe_gradients(base, batches, directions=0, columns=by)
    for entry in plan.entries:
        values = scores.by_name[entry.name].columns
        best = sorted(range(len(values)), key=lambda i: -values[i])[: len(entry.columns or ())]
        assert sorted(best) == list(entry.columns or ())
    if by != "spectrum":
        with pytest.raises(OptionError, match=f"columns_by='{by}' needs gradients on data"):
            make_plan(scan_weights(folder), mode="columns", columns_by=by)
        bare = probe_gradients(base, batches, directions=0)
        with pytest.raises(
            OptionError, match=f"the gradients hold none: wanted those of probe_gradients.*columns='{by}'"
        ):
            make_plan(scan_weights(folder), mode="columns", columns_by=by, gradients=bare)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_dry_run_knows_what_is_kept_and_the_fit_searches_the_share(folder: Path) -> None:
    report = scan_weights(folder)
    step = {"batch_size": 2, "max_length": 64, "dtype": "float32"}
    columns, lora = (estimate_memory(folder, make_plan(report, mode=mode), **step) for mode in ("columns", "lora"))
    rows = estimate_memory(folder, make_plan(report, mode="columns", coupled=True), **step)
    assert columns.by_category["activations"] < lora.by_category["activations"]
    assert columns.by_category["activations"] < rows.by_category["activations"]  # rows need their matrix' input whole
    whole = estimate_memory(folder, make_plan(report, mode="columns", spectrum_ratio=1.0), **step)
    least = estimate_memory(folder, make_plan(report, mode="columns", n_columns=1), **step)
    budget = (whole.peak_bytes + least.peak_bytes) // 2
    plan = fit_to_memory(folder, report, mode="columns", budget=f"{budget}B", margin=0.0, **step)
    assert 0 < plan.options["spectrum_ratio"] < 1
    assert estimate_memory(folder, plan, **step).peak_bytes <= budget


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_torch_compile_traces_it_whole(side: str) -> None:
    layer = layer_of(6, 8, (1, 5), torch.float32, side=side)
    x = torch.randn(3, 8, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
        # The same eight products in float32; a compiler may fuse the sum: 8 * 6e-8, and 1e-5 of the value.
        found, wanted = compiled(x), layer(x)
        assert torch.allclose(found, wanted, atol=1e-6)
        gradients = [
            torch.autograd.grad(y.square().sum(), (x, change_of(m))) for y, m in ((found, compiled), (wanted, layer))
        ]
    # Sums of six to eight products below 10 in float32: 8 * 6e-8 * 10.
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
