"""Every mode on a device, in the situations that people train in. The same code runs on the CPU, so that it is known to be
right before a card sees it; what only a card has is marked `gpu`."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from running import (
    IDS,
    QUANTIZABLE,
    assert_same,
    logits,
    only_fast,
    options_of,
    same_bytes,
    token_rows,
    trainer,
    values,
)
from transformers import AutoModelForCausalLM

from spectrum_peft import SpectrumCallback, SpectrumConfig, estimate_memory, load_model_with_spectrum, make_plan
from spectrum_peft.devices import peak_memory, reset_peak_memory
from spectrum_peft.memory import measure_memory, report_of_config
from spectrum_peft.plan import MODES

SAMPLE = ("spectrum", "lorsa")  # of each nature one on the CPU in the default run
EVERY_MODE = only_fast(MODES, SAMPLE)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: Any) -> torch.device:
    """The device that a test runs on: the CPU in the default run, a card where one is and `-m gpu` asks for it."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    ARCHITECTURES["llama"].build().save_pretrained(folder)
    return folder


def config(mode: str, device: torch.device | None = None, **changes: Any) -> SpectrumConfig:
    options = options_of(mode, [{"input_ids": IDS.to(device), "labels": IDS.to(device)}])
    return SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **{**options, **changes})


def made(folder: Path, mode: str, device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **changes.pop("load", {})).to(device)
    model = get_peft_model(base, config(mode, device, **changes))
    model.base_model.attended()
    return model.train()


def stepped(model: Any, device: torch.device, dtype: torch.dtype | None, steps: int = 2) -> list[float]:
    """Losses of a few steps, under autocast and with a scaler where the dtype wants them."""
    batch = {"input_ids": IDS.to(device), "labels": IDS.to(device)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def planned(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return values(model, trainable=True), values(model, trainable=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_mixed_precision_moves_what_is_planned(
    folder: Path, mode: str, dtype: torch.dtype, device: torch.device
) -> None:
    model = made(folder, mode, device)
    (before, frozen), losses = planned(model), stepped(model, device, dtype)
    after, still = planned(model)
    assert losses[1] < losses[0]
    assert all(value.dtype == torch.float32 for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert_same(frozen, still)


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_checkpointing_changes_no_gradient(folder: Path, mode: str, device: torch.device) -> None:
    found = []
    for checkpointing in (False, True):
        model = made(folder, mode, device)
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS.to(device), labels=IDS.to(device)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():  # recomputed by the same kernels; on a GPU sums may be in another order
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_saved_here_and_loaded_elsewhere(folder: Path, mode: str, device: torch.device, tmp_path: Path) -> None:
    """From the device to the CPU and back, bit for bit."""
    model = made(folder, mode, device)
    stepped(model, device, None)
    model.save_pretrained(tmp_path / "there")

    def loaded(where: Path, to: torch.device) -> Any:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(to)
        return PeftModel.from_pretrained(base, where, is_trainable=True)

    on_cpu = loaded(tmp_path / "there", torch.device("cpu"))
    trained = {name: value.cpu() for name, value in values(model, trainable=True).items()}
    assert_same({n: v for n, v in values(on_cpu).items() if n in trained}, trained)
    on_cpu.save_pretrained(tmp_path / "here")
    back = loaded(tmp_path / "here", device)
    ids = IDS.to(device)
    assert next(back.parameters()).device.type == device.type
    assert torch.equal(logits(back, ids), logits(loaded(tmp_path / "there", device), ids))


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_merged_on_the_device(folder: Path, mode: str, device: torch.device) -> None:
    model, ids = made(folder, mode, device), IDS.to(device)
    stepped(model, device, None)
    wanted = logits(model, ids)
    merged = model.merge_and_unload()
    assert all(p.device.type == device.type for p in merged.parameters())
    # A merged weight is one rounding off; on a GPU its products are of another order, too.
    assert (logits(merged, ids) - wanted).abs().max() < 2e-6 * (1 if device.type == "cpu" else 10)


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_generation(folder: Path, mode: str, device: torch.device) -> None:
    model = made(folder, mode, device).eval()
    found = [model.generate(input_ids=IDS.to(device)[:, :4], max_new_tokens=4, do_sample=False) for _ in range(2)]
    assert torch.equal(*found)
    assert found[0].shape == (2, 8)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("mode", only_fast(QUANTIZABLE, SAMPLE))
def test_quantized_bases(folder: Path, mode: str, quantization: str, device: torch.device) -> None:
    model, _ = load_model_with_spectrum(
        str(folder), config(mode, device), quantization=quantization, dtype=torch.float32, device_map={"": device}
    )
    model.base_model.attended()
    before = values(model, trainable=False)
    losses = stepped(model.train(), device, torch.bfloat16)
    assert losses[1] < losses[0]
    assert_same(before, values(model, trainable=False))


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.real_weights])
def test_originals_wait_in_main_memory(folder: Path, mode: str, device: torch.device) -> None:
    model, ids = made(folder, mode, device, keep_base="host"), IDS.to(device)
    with model.disable_adapter():
        wanted = logits(model, ids)
    stepped(model, device, None)
    kept = [o.kept for m in model.modules() for o in getattr(m, "originals", {}).values() if o.kept is not None]
    assert kept
    assert {tensor.device.type for tensor in kept} == {"cpu"}
    with model.disable_adapter():
        assert same_bytes(logits(model, ids), wanted)


@pytest.mark.parametrize("length", [64, 128])
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_the_peak_is_the_predicted_one(folder: Path, mode: str, length: int, device: torch.device) -> None:
    """Within 5 %; a GPU counts by itself, on the CPU the tracker does on real tensors."""
    plan = None if MODES[mode].needs_data else make_plan(report_of_config(folder, "random"), mode=mode)
    model = made(folder, mode, device, **({} if plan is None else {"plan": plan}))
    plan = model.peft_config["default"].plan
    how = {"batch_size": 2, "max_length": length, "optimizer": "adamw_torch", "peft": True, "mixed_precision": "no"}
    reset_peak_memory()
    measured = measure_memory(copy.deepcopy(model) if device.type == "cpu" else model, plan, **how).peak_bytes
    if device.type != "cpu":
        # Of a model this small workspaces (cuBLAS) are most; what the tracker counts are the tensors.
        assert peak_memory(device) >= measured
    predicted = estimate_memory(folder, plan, dtype="float32", device=device.type, **how)
    assert predicted.peak_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused"])
@pytest.mark.parametrize("mode", MODES)
def test_optimizers_that_only_a_card_has(folder: Path, mode: str, optimizer: str, tmp_path: Path) -> None:
    model = made(folder, mode, torch.device("cuda"))
    before = values(model, trainable=True)
    how = {"use_cpu": False, "optim": optimizer, "bf16": True, "learning_rate": 1e-2}
    run = trainer(model, tmp_path, [SpectrumCallback()], token_rows(), **how)
    run.train()
    after = values(run.model, trainable=True)
    assert any(not torch.equal(before[name].to(after[name].device), after[name]) for name in after)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_flash_attention(folder: Path, mode: str) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    device = torch.device("cuda")
    model = made(folder, mode, device, torch.bfloat16, load={"attn_implementation": "flash_attention_2"})
    losses = stepped(model, device, torch.bfloat16)
    assert losses[1] < losses[0]


@pytest.mark.slow
# torch's compiler does itself what torch warns of.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch._prims_common:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_compiled(folder: Path, mode: str, device: torch.device) -> None:
    model, ids = made(folder, mode, device).eval(), IDS.to(device)
    wanted = logits(model, ids)
    # Fused sums are of another order; logits here are of order 1.
    assert (logits(torch.compile(model), ids) - wanted).abs().max() < 1e-4
