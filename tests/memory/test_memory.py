"""The dry run says what the real step needs; budgets, sharding and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from spectrum_peft import SpectrumConfig, estimate_memory, fit_to_memory, load_model_with_spectrum, make_plan
from spectrum_peft.errors import CheckpointError, MismatchError, OptionError, SpectrumError
from spectrum_peft.memory import (
    RATIOS,
    Step,
    StorageTracker,
    describe_memory,
    describe_table,
    find_fit,
    gradients_of_report,
    least_weights,
    measure_memory,
    memory_table,
    parse_bytes,
    report_of_config,
    shard,
)
from spectrum_peft.memory.fakes import kernels_of, on_fake_tensors
from spectrum_peft.memory.step import _EightBitAdamSizes
from spectrum_peft.plan import MODES
from spectrum_peft.records import GradientReport, MemoryReport, Plan, SnrReport
from spectrum_peft.tuner.loading import made_trainable
from spectrum_peft.weights import give_storage_without_values

ON_CPU: dict[str, Any] = {"batch_size": 2, "max_length": 32, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="session")
def report(tiny_llama_folder: Path) -> SnrReport:
    return report_of_config(tiny_llama_folder, "last")


def measured(folder: Path, plan: Plan, *, peft: bool = False, **step: Any) -> MemoryReport:
    """The same step on the real model, loaded as for training."""
    step = {**ON_CPU, **step}
    quantization, dtype = step.pop("quantization", None), step["dtype"]
    attention = {"attn_implementation": step["attn_implementation"]} if "attn_implementation" in step else {}
    del step["device"]
    if peft:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **attention)
        model = made_trainable(plain, SpectrumConfig(plan=plan), peft=True)
    else:
        model, _ = load_model_with_spectrum(str(folder), plan, dtype=dtype, quantization=quantization, **attention)
    return measure_memory(model, **step)


def predicted(folder: Path, plan: Plan | SpectrumConfig, **step: Any) -> MemoryReport:
    return estimate_memory(folder, plan, **{**ON_CPU, **step})


def agree(one: MemoryReport, other: MemoryReport, tolerance: float = 0.001) -> None:
    # Both count what torch allocates; a thousandth is room for scalars and indices that only one of them makes.
    assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=tolerance)
    for name in {*one.by_category, *other.by_category}:
        near = pytest.approx(other.by_category.get(name, 0), rel=tolerance, abs=tolerance * other.peak_bytes)
        assert one.by_category.get(name, 0) == near, name


# --- the tracker -----------------------------------------------------------------------------------------------------


def test_a_config_that_the_models_code_cannot_take_is_one_line() -> None:
    """Of a type that the config's class lets through, and the forward, or the constructor, does not."""
    for field, value in (("attention_dropout", None), ("rope_parameters", {"rope_type": "no", "rope_theta": 1.0})):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=32, **sizes)
        plan = make_plan(report_of_config(config, "first"), mode="lora", r=2)
        setattr(config, field, value)
        with pytest.raises(SpectrumError, match=r"cannot be (run|built)"):
            estimate_memory(config, plan, batch_size=1, max_length=8, dtype="float32")


def test_a_storage_counts_once_from_its_making_to_its_end() -> None:
    tracker = StorageTracker()
    with tracker:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        a.add_(1)
        assert tracker.total == 4000
        c = a * 2
        assert tracker.total == 8000
        del a, c
        assert tracker.total == 4000
        del b
        assert tracker.total == 0
    assert tracker.peaks["forward"][0] == 8000


def test_the_worst_moment_of_each_phase_is_kept_with_its_parts() -> None:
    tracker = StorageTracker(vocabulary=50)
    with tracker:
        weight = torch.zeros(10)
        tracker.adopt([weight], "weights")
        logits = torch.zeros(4, 50)
        hidden = torch.zeros(100)
        del logits
        tracker.enter("backward")
        other = torch.zeros(30)
        tracker.enter("clip")
    assert tracker.peaks["forward"][:2] == (1240, {"weights": 40, "logits": 800, "activations": 400})
    parts = {"weights": 40, "activations": 400, "temporaries": 120}
    assert tracker.peaks["backward"][:2] == tracker.peaks["clip"][:2] == (560, parts)
    assert hidden.numel() + other.numel() == 130


def test_sizes_are_rounded_up_to_the_blocks_of_the_allocator() -> None:
    tracker = StorageTracker(block=512)
    with tracker:
        kept = [torch.zeros(1), torch.zeros(129)]
    assert tracker.total == 512 + 1024
    assert len(kept) == 2


# --- predicted against measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "options", "step"),
    [
        ("full", {}, {}),
        ("full", {}, {"padding": False}),
        ("full", {}, {"gradient_accumulation_steps": 3, "gradient_checkpointing": True}),
        ("full", {}, {"optimizer": "adafactor", "attn_implementation": "eager"}),
        ("spectrum", {"spectrum_ratio": 0.5}, {"optimizer": "adamw_torch_fused", "trainer": "sft"}),
        ("spectrum", {"backward_depth": 0.5}, {"gradient_checkpointing": True}),
        ("spectrum", {"train_embeddings": True, "train_head": True, "train_norms": True}, {"peft": True}),
        ("spectrum", {"keep_base": "host"}, {"peft": True, "dtype": "bfloat16", "mixed_precision": "no"}),
        ("spectrum", {}, {"dtype": "bfloat16"}),
        ("lora", {"r": 8}, {"optimizer": "sgd"}),
        ("alors", {"rescore_every": 5}, {}),
        ("alors", {}, {"gradient_checkpointing": True, "trainer": "sft"}),
        ("sgm", {"group_gain": True}, {}),
        ("sgm", {"share": "both", "spectrum_ratio": 0.75}, {"gradient_checkpointing": True}),
        ("lorsa", {"n_components": 8, "rotation_rank": 2}, {}),
        ("lorsa", {"n_components": 8, "rotation_rank": 2}, {"gradient_checkpointing": True}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_the_dry_run_is_the_real_step(
    tiny_llama_folder: Path, report: SnrReport, gradients_of: Callable[..., GradientReport], mode: str,
    options: dict[str, Any], step: dict[str, Any],
) -> None:  # fmt: skip
    gradients = gradients_of(report) if MODES[mode].needs_data else None
    plan = make_plan(report, gradients=gradients, mode=mode, **options)
    found = predicted(tiny_llama_folder, plan, **step)
    assert found.complete, found.notes
    agree(found, measured(tiny_llama_folder, plan, **step))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("mode", ["spectrum", "spectra_qlora"])
def test_the_dry_run_on_a_quantized_base_is_the_real_step(
    tiny_llama_folder: Path, report: SnrReport, mode: str, quantization: str
) -> None:
    plan = make_plan(report, mode=mode, spectrum_ratio=0.5)
    found = predicted(tiny_llama_folder, plan, quantization=quantization)
    agree(found, measured(tiny_llama_folder, plan, quantization=quantization))


def _families() -> dict[str, tuple[Any, Any]]:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    small: dict[str, Any] = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    return {
        "mixtral": (
            MixtralForCausalLM,
            MixtralConfig(
                **small, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
                pad_token_id=256, bos_token_id=257, eos_token_id=258,
            ),
        ),
        "qwen3_moe": (  # more experts than a token takes, of another width, and a head's width that is no quotient
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig(
                **small, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4,
                moe_intermediate_size=48, pad_token_id=256, bos_token_id=257, eos_token_id=258,
            ),
        ),
        "bert": (BertForSequenceClassification, BertConfig(**small, num_attention_heads=4)),
        "t5": (
            T5ForConditionalGeneration,
            T5Config(
                vocab_size=264, d_model=64, d_kv=16, d_ff=112, num_layers=2, num_heads=4, decoder_start_token_id=256,
                pad_token_id=256, eos_token_id=258,
            ),
        ),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "bert", "t5"])
def test_the_dry_run_is_the_real_step_in_other_families(tmp_path: Path, family: str, mode: str) -> None:
    model_class, config = _families()[family]
    model_class(config).save_pretrained(tmp_path)
    plan = make_plan(report_of_config(tmp_path), mode=mode)
    for step in ({}, {"gradient_checkpointing": True}):
        agree(predicted(tmp_path, plan, **step), measured(tmp_path, plan, **step))


def test_fused_experts_are_no_smaller_on_a_quantized_base(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes has no layer for them, and PEFT's preparation casts them; the dry run says so, and why."""
    _, config = _families()["qwen3_moe"]
    plan = make_plan(report_of_config(config), mode="lora", r=4)
    how = {**ON_CPU, "dtype": "bfloat16", "mixed_precision": "bf16"}
    experts = 2 * 16 * 3 * 64 * 48  # of two layers: gate, up and down
    plain = predicted(config, plan, **how)
    assert not caplog.text
    quantized = predicted(config, plan, **how, quantization="nf4")
    assert "fused experts" in caplog.text
    assert plain.by_category["weights"] < 4 * experts < quantized.by_category["weights"]


def test_the_parts_are_what_arithmetic_says(tiny_llama_folder: Path, report: SnrReport) -> None:
    numel = report.total_parameters
    found = predicted(tiny_llama_folder, make_plan(report, mode="full"))
    assert found.trainable_parameters == numel
    assert sum(found.by_category.values()) == found.peak_bytes == max(sum(p.values()) for p in found.phases.values())
    # Adam counts its steps in one float32 a tensor; the model has buffers of rotary frequencies.
    step = found.phases["optimizer"]
    assert step["optimizer"] == pytest.approx(8 * numel, abs=4 * len(report.stats))
    assert step["gradients"] == 4 * numel
    assert step["weights"] == pytest.approx(4 * numel, abs=1024)
    assert found.phases["forward"]["logits"] == 2 * (2 * 32 * 264 * 4)  # they and their log-softmax
    adapters = predicted(tiny_llama_folder, plan := make_plan(report, mode="lora", r=4))
    assert adapters.phases["optimizer"]["adapters"] == 4 * plan.trainable_parameters
    assert adapters.trainable_bytes == 4 * plan.trainable_parameters


def test_originals_in_main_memory_are_counted_apart(tiny_llama: Any, report: SnrReport) -> None:
    plan = make_plan(report, mode="spectrum", spectrum_ratio=0.5, keep_base="host")
    host = 4 * plan.trainable_parameters
    on_cpu = estimate_memory(tiny_llama.config, plan, peft=True, **ON_CPU)
    assert (on_cpu.host_bytes, on_cpu.by_category["host_copies"]) == (host, host)
    on_cuda = estimate_memory(tiny_llama.config, plan, peft=True, **{**ON_CPU, "device": "cuda"})
    assert on_cuda.host_bytes == host
    assert "host_copies" not in on_cuda.by_category
    assert "originals" in describe_memory(on_cuda)


def test_less_backward_keeps_fewer_activations(tiny_llama_folder: Path, report: SnrReport) -> None:
    whole, half = (
        predicted(tiny_llama_folder, make_plan(report, mode="lora", r=2, backward_depth=d)).by_category["activations"]
        for d in (1.0, 0.5)
    )
    assert half < 0.65 * whole


def test_path_config_and_model_say_the_same(tiny_llama_folder: Path, tiny_llama: Any, report: SnrReport) -> None:
    plan = make_plan(report, mode="spectra_qlora")
    found = {predicted(source, plan).peak_bytes for source in (tiny_llama_folder, tiny_llama.config, tiny_llama)}
    assert len(found) == 1


@pytest.mark.slow
def test_a_config_with_fields_of_lora_is_followed(tiny_llama_folder: Path, report: SnrReport) -> None:
    base = {"mode": "lora", "r": 4, "report": report, "task_type": "CAUSAL_LM"}
    plain = predicted(tiny_llama_folder, SpectrumConfig(**base))
    assert predicted(tiny_llama_folder, SpectrumConfig(**base, lora_dropout=0.1)).peak_bytes > plain.peak_bytes
    saved = predicted(tiny_llama_folder, SpectrumConfig(**base, modules_to_save=["lm_head"]))
    assert saved.trainable_parameters == plain.trainable_parameters + 264 * 64


def test_a_mode_that_needs_data_is_counted_with_and_without_gradients(
    tiny_llama_folder: Path, report: SnrReport, gradients_of: Callable[..., GradientReport]
) -> None:
    gradients, options = gradients_of(report), {"mode": "sgm", "spectrum_ratio": 0.5, "r": 4}
    plan = make_plan(report, gradients=gradients, **options)
    assert any(e.group for e in plan.entries)
    config = SpectrumConfig(**options, report=report, gradients=gradients, task_type="CAUSAL_LM")
    found = predicted(tiny_llama_folder, config)
    assert found.peak_bytes == predicted(tiny_llama_folder, plan).peak_bytes
    alone = make_plan(report, gradients=gradients_of_report(report), **options)
    bound = predicted(tiny_llama_folder, alone)
    assert bound.trainable_parameters == make_plan(report, **{**options, "mode": "spectra_qlora"}).trainable_parameters
    assert bound.trainable_parameters > found.trainable_parameters
    fit = find_fit(
        tiny_llama_folder, report, mode="sgm", budget=f"{found.peak_bytes}B", margin=0.0, gradients=gradients, r=4,
        spectrum_ratio=0.5, **ON_CPU,
    )  # fmt: skip
    assert fit.plan.digest == plan.digest
    with pytest.raises(OptionError, match="mode 'sgm' needs gradients on data"):
        find_fit(tiny_llama_folder, report, mode="sgm", **ON_CPU)


def test_nothing_is_left_behind(tiny_llama_folder: Path, report: SnrReport) -> None:
    functional = {name: getattr(nn.functional, name) for name in ("scaled_dot_product_attention", "grouped_mm")}
    apply, state = nn.Module._apply, torch.random.get_rng_state()
    plan = make_plan(report, mode="lora")
    digest = plan.digest
    estimate_memory(tiny_llama_folder, plan, **{**ON_CPU, "device": "cuda", "dtype": "bfloat16"})
    assert all(getattr(nn.functional, name) is function for name, function in functional.items())
    assert nn.Module._apply is apply
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.is_autocast_enabled("cuda")
    assert plan.digest == digest
    assert plan.fingerprint is not None


# --- what a GPU does otherwise ---------------------------------------------------------------------------------------


def test_foreach_on_a_gpu_makes_a_copy_of_all_that_trains(tiny_llama_folder: Path, report: SnrReport) -> None:
    plan = make_plan(report, mode="full")
    on_cuda = {**ON_CPU, "device": "cuda"}
    lists = predicted(tiny_llama_folder, plan, **on_cuda).phases["optimizer"].get("temporaries", 0)
    fused = predicted(tiny_llama_folder, plan, **on_cuda, optimizer="adamw_torch_fused").phases["optimizer"]
    matrices = sum(4 * s.numel for s in report.stats if len(s.shape or ()) > 1)
    # Vectors are copied, too: under a hundredth of all that trains here.
    assert lists == pytest.approx(matrices, rel=0.02)
    assert fused.get("temporaries", 0) < 0.02 * matrices


@pytest.mark.parametrize(("padding", "kernel"), [(False, "flash_attention"), (True, "efficient_attention")])
def test_attention_takes_the_kernel_of_the_gpu(padding: bool, kernel: str) -> None:
    seen = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with on_fake_tensors(), kernels_of("cuda"), Names():
        query = torch.empty(2, 8, 30, 16, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(2, 8 if padding else 4, 30, 16, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.empty(2, 1, 30, 30, dtype=torch.bool) if padding else None
        attend = nn.functional.scaled_dot_product_attention
        result = attend(query, key, key, mask, is_causal=not padding, enable_gqa=not padding)
        result.sum().backward()
        assert result.shape == query.shape
        assert key.grad is not None
        assert key.grad.shape == key.shape
    assert f"aten::_scaled_dot_product_{kernel}" in seen
    assert f"aten::_scaled_dot_product_{kernel}_backward" in seen


def test_the_loss_in_tiles_holds_one_tile_of_the_logits_on_a_gpu(tiny_llama_folder: Path, report: SnrReport) -> None:
    plan, step = make_plan(report, mode="lora", r=2), {"dtype": "bfloat16", "trainer": "sft"}
    tile = 2 * (2 * 31) * 32768  # bfloat16, of 62 tokens over a chunk of the vocabulary
    on_cpu, on_cuda = (predicted(tiny_llama_folder, plan, **step, device=d) for d in ("cpu", "cuda"))
    parts = on_cuda.phases["backward"]
    assert tile <= parts.get("temporaries", 0) + parts.get("logits", 0) < 1.1 * tile
    assert on_cpu.peak_bytes > on_cuda.peak_bytes


# --- stand-ins for bitsandbytes --------------------------------------------------------------------------------------


def _quantized(kind: str, out: int, columns: int, device: str) -> Any:
    import bitsandbytes as bnb

    if kind == "int8":
        return bnb.nn.Linear8bitLt(columns, out, bias=False, has_fp16_weights=False, threshold=6.0, device=device)
    return bnb.nn.Linear4bit(
        columns, out, bias=False, compute_dtype=torch.float32, quant_type=kind.removesuffix(" plain"),
        compress_statistics="plain" not in kind, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["nf4", "nf4 plain", "fp4", "int8"])
@pytest.mark.parametrize(("out", "columns"), [(96, 64), (48, 320)])
def test_a_stand_in_has_the_storages_of_the_real_layer(kind: str, out: int, columns: int) -> None:
    def step(layer: Any) -> tuple[int, int, int]:
        """(bytes at rest, peak of a forward and backward, bytes alive between the two)"""
        from spectrum_peft.memory.step import _statistics

        tracker = StorageTracker()
        with tracker:
            layer.train()
            weights = [layer.weight, *_statistics(layer.weight, layer)]
            tracker.adopt(weights, "quantized_weights")
            rest = tracker.total
            x = torch.zeros(5, 7, columns, requires_grad=True)
            y = layer(x)
            between = tracker.total
            y.sum().backward()
        return rest, max(peak[0] for peak in tracker.peaks.values()), between

    real, stand_in = _quantized(kind, out, columns, "cpu").to("cpu"), _quantized(kind, out, columns, "meta")
    with on_fake_tensors():
        give_storage_without_values(stand_in, torch.float32)
        stood = step(stand_in)
    assert step(real) == stood


def test_the_sizes_of_8_bit_adam_are_those_of_bitsandbytes() -> None:
    import bitsandbytes as bnb

    embedding = nn.Parameter(torch.randn(80, 64))
    parameters = [nn.Parameter(torch.randn(n)) for n in (4095, 4096, 70_001)] + [embedding]
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.register_parameters(parameters)
    manager.override_config(embedding, "optim_bits", 32)
    real = bnb.optim.AdamW8bit([{"params": parameters}], lr=1e-3)
    sizes = _EightBitAdamSizes([{"params": parameters}], {id(embedding)})
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    real.step()
    sizes.step()

    def held(optimizer: Any) -> int:
        tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        tensors += getattr(optimizer, "code_books", [])
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    assert held(sizes) == held(real)


# --- several devices -------------------------------------------------------------------------------------------------


def _only_states(psi: int) -> MemoryReport:
    """Mixed-precision Adam without activations: 2 psi weights, 2 psi gradients, 8 psi states, no float32 weights."""
    parts = {"weights": 2 * psi, "gradients": 2 * psi, "optimizer": 8 * psi}
    return MemoryReport(
        mode="full", peak_bytes=12 * psi, by_category=parts, phase="optimizer", where="", phases={"optimizer": parts},
        host_bytes=0, trainable_parameters=psi, trainable_bytes=2 * psi, total_parameters=psi, largest_block_bytes=0,
        largest_block_gradients=0, settings={},
    )  # fmt: skip


@pytest.mark.parametrize(("stage", "gigabytes"), [("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_sharding_gives_the_figures_of_the_zero_paper(stage: str, gigabytes: float) -> None:
    # arXiv:1910.02054, figure 1: 7.5 billion parameters on 64 devices, K = 12
    found = shard(_only_states(7_500_000_000), stage, 64).peak_bytes / 1e9
    assert round(found, 1) == gigabytes


def test_sharding_moves_what_it_says_and_nothing_else(tiny_llama_folder: Path, report: SnrReport) -> None:
    one = predicted(tiny_llama_folder, make_plan(report, mode="full"))
    four = {name: shard(one, name, 4) for name in ("data_parallel", "zero1", "zero2", "zero3", "fsdp2")}
    step = {name: found.phases["optimizer"] for name, found in four.items()}
    before = one.phases["optimizer"]
    assert step["data_parallel"]["gradients"] == 2 * before["gradients"]
    assert step["zero1"]["optimizer"] == -(-before["optimizer"] // 4)
    assert step["zero1"]["gradients"] == before["gradients"]
    assert step["zero2"]["gradients"] == -(-before["gradients"] // 4)
    assert step["zero2"]["weights"] == before["weights"]
    assert step["zero3"] == step["fsdp2"] == {name: -(-size // 4) for name, size in before.items()}
    gathered = four["fsdp2"].phases["backward"]
    assert gathered["weights"] == -(-one.phases["backward"]["weights"] // 4) + 2 * one.largest_block_bytes
    activations = {found.phases["forward"]["activations"] for found in (one, *four.values())}
    assert len(activations) == 1  # no autocast in float32
    block = sum(4 * s.numel for s in report.stats if ".layers.1." in s.name)
    assert (one.largest_block_bytes, one.largest_block_gradients) == (block, block)
    again = predicted(tiny_llama_folder, make_plan(report, mode="full"), sharding="fsdp2", devices=4)
    assert again == four["fsdp2"]
    assert "on each of 4 devices" in describe_memory(again)


def test_what_is_gathered_in_16_bits_is_not_cast(tiny_llama_folder: Path, report: SnrReport) -> None:
    how = {**ON_CPU, "dtype": "float32", "mixed_precision": "bf16", "gradient_checkpointing": True}
    plan = make_plan(report, mode="full")
    one = estimate_memory(tiny_llama_folder, plan, **how)
    shared = shard(one, "fsdp2", 4).phases["forward"]["activations"]
    with pytest.MonkeyPatch.context() as patch:  # autocast that keeps no copies: each lives while it is multiplied with
        patch.setattr(torch, "autocast", partial(torch.autocast, cache_enabled=False))
        without = estimate_memory(tiny_llama_folder, plan, **how).phases["forward"]["activations"]
    largest = max(2 * s.numel for s in report.stats)
    assert one.cast_bytes > 2 * largest
    assert abs(shared - without) <= largest


@pytest.mark.parametrize(("sharding", "devices", "text"), [
    ("zero4", 2, "sharding is 'zero4'.*zero1"),
    ("zero1", 0, "devices is 0"),
    ("none", 2, "devices is 2, but sharding is 'none'"),
])  # fmt: skip
def test_a_sharding_that_means_nothing_is_refused(sharding: str, devices: int, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        shard(_only_states(10), sharding, devices)


# --- reports without weights, tables ---------------------------------------------------------------------------------


def test_a_report_of_a_config_lists_what_a_scan_lists(tiny_llama_folder: Path) -> None:
    from spectrum_peft import scan_weights

    scanned, listed = scan_weights(tiny_llama_folder, "last"), report_of_config(tiny_llama_folder, "last")
    rows = {s.name: (s.shape, s.kind, s.role) for s in scanned.stats}
    assert {s.name: (s.shape, s.kind, s.role) for s in listed.stats} == rows
    assert listed.scores == scanned.scores
    assert listed.fingerprint.structure == scanned.fingerprint.structure
    with pytest.raises(OptionError, match="criterion is 'spectrum'; without weights only"):
        report_of_config(tiny_llama_folder, "spectrum")


@pytest.mark.slow
def test_a_table_has_every_ratio_and_the_adapter_modes(tiny_llama_folder: Path, report: SnrReport) -> None:
    rows = memory_table(tiny_llama_folder, report, quantization="nf4", plan_options={"r": 4, "r_high": 4}, **ON_CPU)
    spectrum = [row for row in rows if row.plan.mode == "spectrum"]
    assert [row.plan.options["spectrum_ratio"] for row in spectrum] == list(RATIOS)
    peaks = [row.memory.peak_bytes for row in spectrum]
    assert peaks == sorted(peaks, reverse=True)
    assert {(row.plan.mode, row.memory.settings["quantization"]) for row in rows} == {
        (name, base) for name, mode in MODES.items() for base in ((None,) if mode.real_weights else (None, "nf4"))
    }
    assumed = {row.plan.mode for row in rows if any("without gradients on data" in note for note in row.memory.notes)}
    assert assumed == {name for name, mode in MODES.items() if mode.needs_data}
    lines = describe_table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert f"{rows[0].memory.trainable_parameters:,}" in lines[2]


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_a_memory_report_is_saved_and_loaded(
    tmp_path: Path, tiny_llama_folder: Path, report: SnrReport, ending: str
) -> None:
    found = predicted(tiny_llama_folder, make_plan(report))
    again = MemoryReport.load(found.save(tmp_path / f"memory.{ending}"))
    assert again == found
    text = describe_memory(again)
    assert text.startswith(f"peak {found.peak_bytes / 2**20:.1f} MiB, in {found.phase}")
    assert "weights" in text


# --- fitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "measure"), [("per_kind", "count"), ("global", "parameters")])
def test_the_fitted_ratio_fits_and_the_next_does_not(
    tiny_llama_folder: Path, report: SnrReport, scope: str, measure: str
) -> None:
    options = {"scope": scope, "measure": measure}
    low, high = (
        predicted(tiny_llama_folder, make_plan(report, spectrum_ratio=ratio, **options)).peak_bytes
        for ratio in (0.25, 1.0)
    )
    budget = (low + high) // 2
    fit = find_fit(tiny_llama_folder, report, budget=f"{budget}B", margin=0.0, **options, **ON_CPU)
    assert fit.next_plan is not None
    real = measured(tiny_llama_folder, fit.plan).peak_bytes
    above = measured(tiny_llama_folder, fit.next_plan).peak_bytes
    assert real <= budget < above
    assert len(fit.tried) <= 8
    assert "fitted to" in fit.plan.notes[-1]


def test_the_margin_stays_free_and_a_large_budget_takes_everything(tiny_llama_folder: Path, report: SnrReport) -> None:
    whole = fit_to_memory(tiny_llama_folder, report, mode="spectrum", budget="1GiB", **ON_CPU)
    assert whole.options["spectrum_ratio"] == 1.0
    need = predicted(tiny_llama_folder, whole).peak_bytes
    less = fit_to_memory(tiny_llama_folder, report, budget=f"{need}B", margin=0.05, **ON_CPU)
    assert predicted(tiny_llama_folder, less).peak_bytes <= 0.95 * need
    assert less.options["spectrum_ratio"] < 1.0
    assert fit_to_memory(tiny_llama_folder, report, mode="lora", budget="1GiB", **ON_CPU).mode == "lora"


@pytest.mark.slow
def test_mode_checkpointing_and_batch_are_chosen_where_asked(tiny_llama_folder: Path, report: SnrReport) -> None:
    smallest = make_plan(report, mode="spectrum", spectrum_ratio=0.25)
    plain = predicted(tiny_llama_folder, smallest, max_length=128).peak_bytes
    saved = predicted(tiny_llama_folder, smallest, max_length=128, gradient_checkpointing=True).peak_bytes
    settings = {**ON_CPU, "max_length": 128, "gradient_checkpointing": "auto"}
    between = f"{(plain + saved) // 2}B"
    fit = find_fit(tiny_llama_folder, report, mode=("full", "spectrum"), budget=between, margin=0.0, **settings)
    assert fit.plan.mode == "spectrum"
    assert fit.step["gradient_checkpointing"] is True
    fit = find_fit(tiny_llama_folder, report, budget=f"{plain * 2}B", margin=0.0, **{**settings, "batch_size": "auto"})
    assert (fit.step["batch_size"], fit.step["gradient_checkpointing"]) == (4, False)


@pytest.mark.slow
def test_where_nothing_fits_the_need_and_the_remedies_are_told(tiny_llama_folder: Path, report: SnrReport) -> None:
    smallest = predicted(tiny_llama_folder, make_plan(report, spectrum_ratio=0.25), max_length=256, batch_size=8)
    budget = int(0.8 * smallest.peak_bytes)
    large = {**ON_CPU, "max_length": 256, "batch_size": 8}
    with pytest.raises(OptionError, match=r"nothing fits .* the smallest plan of mode 'spectrum' needs") as told:
        find_fit(tiny_llama_folder, report, budget=f"{budget}B", margin=0.0, **large)
    text = str(told.value)
    assert f"{smallest.peak_bytes / 2**20:.1f} MiB" in text
    assert "gradient_checkpointing=True needs" in text
    assert "batch_size=1 needs" in text
    assert "(fits)" in text


def test_a_budget_below_the_weights_is_refused_before_any_dry_run(
    tiny_llama_folder: Path, report: SnrReport, monkeypatch: pytest.MonkeyPatch, command: Callable[..., str]
) -> None:
    floor = predicted(tiny_llama_folder, make_plan(report, mode="lora", r=1)).by_category["weights"]
    assert floor * 0.99 < least_weights(tiny_llama_folder, dtype="float32") <= floor
    nf4 = predicted(tiny_llama_folder, make_plan(report, mode="lora", r=1), quantization="nf4").by_category
    quantized = least_weights(tiny_llama_folder, dtype="float32", quantization="nf4")
    assert quantized <= nf4["weights"] + nf4["quantized_weights"]
    monkeypatch.setattr("spectrum_peft.memory.fit.estimate_memory", None)  # not callable: nothing is run
    with pytest.raises(
        OptionError, match=r"nothing fits 600KiB: the weights alone, .* 0\.7 MiB; with quantization='nf4'"
    ):
        fit_to_memory(tiny_llama_folder, report, budget="600KiB", margin=0.0, **ON_CPU)
    monkeypatch.setattr("spectrum_peft.cli.memory.report_of", None)
    assert "nothing fits 0.1MiB less 5% margin" in command(tiny_llama_folder, "--fit", "0.1MiB", "-o", "plan.yaml")


def test_the_first_line_says_for_which_device_memory_is_counted(
    tiny_llama_folder: Path, command: Callable[..., str], report: SnrReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan(report, mode="lora", r=1).save("plan.yaml")
    small = ("--plan", "plan.yaml", "--batch-size", 1, "--max-length", 8)
    assert command(tiny_llama_folder, *small, "--device", "cpu").startswith("counted for the CPU\n")
    monkeypatch.setattr("spectrum_peft.cli.memory._has_cuda", lambda: False)
    assert command(tiny_llama_folder, *small).startswith("counted for a CUDA GPU, of which this machine has none")


# A training run of 20 million parameters, limited to its interpreter's memory and the budget.
_LIMITED = """
    import json, re, resource, sys
    from pathlib import Path
    import torch
    from spectrum_peft import load_model_with_spectrum
    from spectrum_peft.records import Plan
    torch.set_num_threads(1)
    folder, plan, budget = sys.argv[1], Plan.load(sys.argv[2]), int(sys.argv[3])

    def steps(model, count):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        model.train()
        for _ in range(count):
            ids = torch.randint(0, 256, (8, 128))
            mask = torch.ones_like(ids)
            mask[0, 0] = 0
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    from transformers import LlamaConfig, LlamaForCausalLM
    small = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    small.num_attention_heads = small.num_key_value_heads = 4
    steps(LlamaForCausalLM(small), 1)  # what the libraries load at their first use belongs to the interpreter
    baseline = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (baseline + budget, baseline + budget))
    model, _ = load_model_with_spectrum(folder, plan, dtype="float32")
    steps(model, 3)
    print("trained")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RLIMIT_DATA as Linux counts it")
def test_what_was_fitted_trains_within_a_limit_of_the_kernel(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=264, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=256, bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    report = report_of_config(folder, "last")
    step = {"batch_size": 8, "max_length": 128, "dtype": "float32", "device": "cpu"}
    budget = estimate_memory(folder, make_plan(report, spectrum_ratio=0.5), **step).peak_bytes
    fit = find_fit(folder, report, budget=f"{budget}B", **step)
    assert fit.next_plan is not None

    def runs(limit: int) -> subprocess.CompletedProcess[str]:
        path = fit.plan.save(tmp_path / "plan.json")
        command = [sys.executable, "-c", textwrap.dedent(_LIMITED), str(folder), str(path), str(limit)]
        # Large blocks go back to the kernel when they are freed, and one arena serves all threads.
        environment = {
            **os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    done = runs(budget)
    assert "trained" in done.stdout, done.stderr[-2000:]
    assert "trained" not in runs(int(0.6 * fit.memory.peak_bytes)).stdout  # the limit is one


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "text"), [
    ("24", "the unit is missing, wanted '24GiB'"),
    ("24 furlongs", "unit 'furlongs' is not known"),
    ("-3GiB", "wanted more than 0"),
    ("0GB", "wanted more than 0"),
    ("lots", "budget is 'lots', wanted a size such as '24GiB'"),
    (24, "the unit is missing"),
])  # fmt: skip
def test_a_budget_needs_a_number_and_a_unit(tiny_llama_folder: Path, report: SnrReport, budget: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        fit_to_memory(tiny_llama_folder, report, budget=budget)


def test_sizes_are_read_with_their_units() -> None:
    sizes = {"24GiB": 24 * 2**30, "24 GB": 24 * 10**9, "1.5mib": 3 * 2**19, "7B": 7, "1e3 KB": 10**6}
    assert {text: parse_bytes(text) for text in sizes} == sizes


@pytest.mark.parametrize(("settings", "text"), [
    ({"batch_size": 0}, "batch_size is 0, wanted a whole number"),
    ({"max_length": 2.5}, r"max_length is 2\.5"),
    ({"optimizer": "adamw"}, "optimizer is 'adamw'.*adamw_torch"),
    ({"dtype": "float8"}, "dtype is 'float8'.*float16"),
    ({"quantization": "nf3"}, "quantization is 'nf3'.*nf4"),
    ({"device": "tpu"}, "device is 'tpu'"),
    ({"checkpointing": True}, "unknown setting 'checkpointing'.*gradient_checkpointing"),
    ({"margin": 1.0}, "margin is 1.0, wanted a share"),
    ({"mode": []}, "mode is empty, wanted one or several of full, spectrum"),
    ({"mode": ("spectrum", "sparse")}, "mode is 'sparse'"),
])  # fmt: skip
def test_a_setting_outside_its_range_is_refused(
    tiny_llama_folder: Path, report: SnrReport, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(OptionError, match=text):
        fit_to_memory(tiny_llama_folder, report, **settings)


def test_a_dtype_may_be_torch_s_own(tiny_llama_folder: Path, report: SnrReport) -> None:
    assert Step(dtype=torch.bfloat16).dtype == "bfloat16"  # type: ignore[arg-type]
    found = predicted(tiny_llama_folder, make_plan(report, mode="lora", r=2), dtype=torch.bfloat16)
    assert found.settings["dtype"] == "bfloat16"
    assert found.settings["mixed_precision"] == "bf16"


def test_code_that_asks_for_values_is_named_and_the_rest_is_counted(tmp_path: Path) -> None:
    _, config = _families()["mixtral"]
    config._experts_implementation = "eager"  # loops over the experts that got tokens
    plan = make_plan(report_of_config(config), mode="full")
    found = estimate_memory(config, plan, **ON_CPU)
    assert not found.complete
    assert "activations are missing: aten.nonzero" in found.notes[0]
    assert "mlp.experts" in found.notes[0]
    numel = plan.total_parameters
    assert found.by_category["gradients"] == 4 * numel
    # Adam counts steps in 4 bytes a tensor, and the model has small buffers: under a hundredth.
    assert found.by_category["optimizer"] == pytest.approx(8 * numel, rel=0.01)
    assert found.peak_bytes == pytest.approx(16 * numel, rel=0.01)
    assert "activations are missing" in describe_memory(found)


def test_a_fit_without_activations_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _, config = _families()["mixtral"]
    config._experts_implementation = "eager"
    fit = find_fit(config, report_of_config(config), mode="lora", budget="1GiB", r=2, **ON_CPU)
    assert not fit.memory.complete
    assert "WITHOUT ACTIVATIONS, so that it may not fit" in fit.plan.notes[-1]
    assert "activations are missing: aten.nonzero" in caplog.text


def test_a_family_without_fused_attention_is_run_with_what_transformers_takes_for_it() -> None:
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"],
    )  # fmt: skip
    plan = make_plan(report_of_config(config, "last", model_class=GptOssForCausalLM), mode="lora", r=2)
    asked = [
        estimate_memory(config, plan, model_class=kind, attn_implementation=attention, **ON_CPU).peak_bytes
        for kind in (AutoModelForCausalLM, GptOssForCausalLM)
        for attention in (None, "eager")
    ]
    assert len(set(asked)) == 1


def test_a_model_that_hears_is_no_fault_of_its_config() -> None:
    config = WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=64, max_target_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    kind = WhisperForConditionalGeneration
    plan = make_plan(report_of_config(config, "last", model_class=kind), mode="lora", r=2)
    with pytest.raises(
        OptionError, match="WhisperForConditionalGeneration reads input_features, and a dry run makes rows of"
    ):
        estimate_memory(config, plan, model_class=kind, **ON_CPU)


@pytest.mark.parametrize("key_heads", [3, 8])
def test_heads_that_only_backward_finds_wrong_are_of_the_config(key_heads: int, tmp_path: Path) -> None:
    """CUDA's attention, on fake tensors, takes any number of key heads; their gradients then have another shape."""
    fields = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size": 32,
        "num_hidden_layers": 1,
    }
    config = LlamaConfig(vocab_size=64, intermediate_size=48, architectures=["LlamaForCausalLM"], **fields)
    config.num_key_value_heads = key_heads
    plan = make_plan(report_of_config(config), mode="full")
    with pytest.raises(CheckpointError, match=r"cannot be run: .*shape.*config\.json"):
        estimate_memory(config, plan, **{**ON_CPU, "device": "cuda"})


def test_errors_of_a_model_are_not_taken_for_missing_values(tiny_llama: Any, report: SnrReport) -> None:
    broken = tiny_llama.config
    broken.num_key_value_heads = 3  # 4 heads cannot be shared out over 3
    with pytest.raises(CheckpointError, match=r"cannot be run: .*(expanded|shape|size).*config\.json"):
        estimate_memory(broken, make_plan(report_of_config(broken), mode="full"), **ON_CPU)


def test_remote_code_is_not_run_unasked(tmp_path: Path, tiny_llama: Any, report: SnrReport) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "never_heard_of", "auto_map": {"AutoConfig": "its_code.Config", '
        '"AutoModelForCausalLM": "its_code.Model"}}'
    )
    (tmp_path / "its_code.py").write_text("raise SystemExit('code of the repository ran')")
    with pytest.raises(OptionError, match="only with trust_remote_code=True"):
        estimate_memory(tmp_path, make_plan(report))
    config = tiny_llama.config
    config.architectures, config.auto_map = ["OwnModel"], {"AutoModelForCausalLM": "its_code.OwnModel"}
    with pytest.raises(OptionError, match=r"its_code\.OwnModel.*only with trust_remote_code=True"):
        estimate_memory(config, make_plan(report))


def test_what_is_no_model_or_plan_is_named(
    tmp_path: Path, tiny_llama_folder: Path, tiny_gpt2_folder: Path, report: SnrReport
) -> None:
    plan = make_plan(report)
    with pytest.raises(CheckpointError, match="no config of a model"):
        estimate_memory(tmp_path, plan)
    with pytest.raises(OptionError, match="model is a int"):
        estimate_memory(3, plan)
    with pytest.raises(OptionError, match="Linear carries no transformers config"):
        estimate_memory(nn.Linear(2, 2), plan)
    with pytest.raises(OptionError, match="plan is a dict"):
        estimate_memory(tiny_llama_folder, {})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="neither plan nor report"):
        estimate_memory(tiny_llama_folder, SpectrumConfig(mode="lora"))
    with pytest.raises(MismatchError, match=r"the plan trains model\.layers\.\S+, which the model lacks"):
        estimate_memory(tiny_gpt2_folder, plan, max_length=32)
    with pytest.raises(OptionError, match=r"max_length is 1024, but transformer\.wpe holds 256 positions"):
        estimate_memory(tiny_gpt2_folder, make_plan(report_of_config(tiny_gpt2_folder)))
    with pytest.raises(OptionError, match="mode 'full' trains every weight, so none can be quantized"):
        estimate_memory(tiny_llama_folder, make_plan(report, mode="full"), quantization="nf4")
    with pytest.raises(MismatchError, match="carries no plan"):
        measure_memory(nn.Linear(2, 2))


def test_a_real_8_bit_optimizer_is_given_as_a_function(tiny_llama_folder: Path, report: SnrReport) -> None:
    model, _ = load_model_with_spectrum(str(tiny_llama_folder), make_plan(report), dtype="float32")
    with pytest.raises(OptionError, match="give a function that makes it"):
        measure_memory(model, optimizer="adamw_8bit", batch_size=1, max_length=8)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `spectrum-peft memory`; returns what it printed, or the line of the error with exit code 2."""
    from spectrum_peft.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        capsys.readouterr()
        code = main(["memory", *map(str, words)])
        out, err = capsys.readouterr()
        assert code in (0, 2), err
        return err if code else out

    return run


@pytest.mark.slow
def test_the_command_prints_a_plan_s_memory_a_fit_and_a_table(
    tiny_llama_folder: Path, report: SnrReport, command: Callable[..., str]
) -> None:
    plan = make_plan(report, spectrum_ratio=0.5)
    plan.save("plan.yaml")
    report.save("report.json")
    small = ("--batch-size", 2, "--max-length", 32)
    out = command(tiny_llama_folder, "--plan", "plan.yaml", *small, "-o", "memory.json")
    found = MemoryReport.load("memory.json")
    usual = {"dtype": "bfloat16", "optimizer": "adamw_torch_fused", "trainer": "sft", "gradient_checkpointing": True}
    assert found == estimate_memory(tiny_llama_folder, plan, batch_size=2, max_length=32, **usual)
    assert "trainer=sft" in out
    assert describe_memory(found) in out
    fit = ("--fit", f"{found.peak_bytes}B", "--margin", 0, "--report", "report.json", *small)
    assert "fitted to" in command(tiny_llama_folder, *fit, "-o", "fitted.yaml")
    fitted = Plan.load("fitted.yaml")
    assert fitted.digest == plan.digest
    out = command(tiny_llama_folder, "--mode", "spectrum", "--trainer", "transformers", *small, "-o", "table.json")
    assert out.count("\nspectrum ") == len(RATIOS)
    assert len(json.loads(Path("table.json").read_text())) == len(RATIOS)


@pytest.mark.parametrize(("words", "text"), [
    (("--fit", "24"), "--fit is '24': the unit is missing"),
    (("--fit", "24GiB", "--plan", "plan.yaml"), "--plan and --fit are both given"),
    (("--batch-size", "auto"), "--batch-size auto is for --fit"),
    (("--batch-size", "many"), "--batch-size is 'many', wanted a whole number, or 'auto'."),
    (("--device", "tpu"), "device is 'tpu'"),
    (("--criterion", "spectrum"), "without weights only"),
])  # fmt: skip
def test_a_wrong_command_ends_in_one_line(
    tiny_llama_folder: Path, command: Callable[..., str], words: tuple[str, ...], text: str
) -> None:
    line = command(tiny_llama_folder, *words)
    assert text in line
    assert line.count("\n") == 1


@pytest.fixture
def smollm2() -> Path:
    from spectrum_peft.demo import smollm2_folder

    return smollm2_folder()


@pytest.mark.slow
def test_the_dry_run_is_the_real_step_on_a_real_model(smollm2: Path) -> None:
    report = report_of_config(smollm2, "random")
    plan = make_plan(report, mode="spectrum", spectrum_ratio=0.25)
    agree(predicted(smollm2, plan, max_length=64), measured(smollm2, plan, max_length=64))
