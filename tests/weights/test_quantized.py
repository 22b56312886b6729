"""4-bit weights come back exactly from the layout that bitsandbytes packs them into for CPUs with AVX512-BF16.

bitsandbytes' packing runs on any processor, so these tests do, too; only its product needs such a CPU.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import pytest
import torch
from peft import get_peft_model
from running import LIBRARIES, logits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spectrum_peft import SpectrumConfig
from spectrum_peft.errors import CheckpointError, InstallError
from spectrum_peft.weights import open_weights, quantized, settle_quantized
from spectrum_peft.weights.quantized import unpacked_4bit, values_of_4bit

pytestmark = LIBRARIES

# Rows are packed in 32s; a row holds one block, several, or (the last) many.
SHAPES = [(32, 64), (64, 64), (64, 128), (128, 64), (96, 320), (256, 1024)]
needs_the_product = pytest.mark.skipif(not functional.has_avx512bf16(), reason="bitsandbytes packs on AVX512-BF16 only")


def linear(shape: tuple[int, int], kind: str = "nf4", double: bool = False, blocksize: int = 64, **options: Any) -> Any:
    """A 4-bit layer of noise, (out, in)."""
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compress_statistics=double, **options)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer.weight = bnb.nn.Params4bit(
        values, False, quant_type=kind, compress_statistics=double, blocksize=blocksize, module=layer, **options
    )
    return layer.to("cpu")


def pack(layer: Any) -> None:
    """What bitsandbytes' forward does in eval mode on a CPU that it has the product for."""
    weight = layer.weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)


def values(layer: Any) -> Tensor:
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def rounded_maxima(layer: Any) -> Tensor:
    """The layer's values with the largest of each block rounded to bfloat16, from the layout before packing."""
    state = copy.copy(layer.weight.quant_state)
    if state.nested:
        state.absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested = False
    state.absmax = state.absmax.bfloat16().float()
    return functional.dequantize_4bit(layer.weight.data, state)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_packed_values_come_back_but_for_the_rounding_of_their_maxima(
    kind: str, double: bool, shape: tuple[int, int]
) -> None:
    layer = linear(shape, kind, double)
    before, wanted, codes = values(layer), rounded_maxima(layer), layer.weight.data.clone()
    pack(layer)
    settle_quantized(layer)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(values(layer), wanted)
    # bfloat16 keeps 8 bits: half a unit in the last place of each block's factor.
    assert bool(((values(layer) - before).abs() <= 2.0**-8 * before.abs()).all())
    assert layer.quant_state is layer.weight.quant_state
    assert layer.weight.quant_state.dtype == torch.float32


# The 16 values of a code: QLoRA (arXiv:2305.14314), appendix E, for nf4; 1 sign bit, 2 of exponent, 1 of mantissa for fp4.
_NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302, 0.2461123,
    0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
CODES = {"nf4": torch.tensor(_NF4), "fp4": torch.tensor([*_FP4, *(-v for v in _FP4)])}


@pytest.mark.parametrize("shape", [(64, 96), (5, 80), (33, 128), (7, 3), (32, 64)])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_of_any_shape_and_block_size(kind: str, blocksize: int, shape: tuple[int, int]) -> None:
    """A value is its code times the largest value of its block, blocks being of the matrix as one long row: rows need not be of
    whole blocks, which bitsandbytes' own kernel for CPUs takes them to be."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for double in (False, True):
        packed, state = functional.quantize_4bit(
            matrix, blocksize=blocksize, compress_statistics=double, quant_type=kind
        )
        maxima = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
        codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[: matrix.numel()].long()
        wanted = CODES[kind][codes] * maxima.float().repeat_interleave(blocksize)[: matrix.numel()]
        # The published codes have seven digits.
        assert (values_of_4bit(packed, state) - wanted.reshape(shape)).abs().max() < 1e-6 * maxima.max()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 96), (48, 160), (64, 32), (5, 67), (64, 128)])
def test_layers_compute_with_what_was_stored_whatever_their_blocks_divide(
    shape: tuple[int, int], kind: str, double: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel for CPUs of bitsandbytes 0.50.2 begins a block with each row, so that of rows of 96 it multiplies others."""
    layer = linear(shape, kind, double)
    stored = values_of_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.eye(shape[1])
    wrong = not torch.equal(layer(x), stored.T)
    # A row of an odd number of values takes another way.
    assert wrong == (shape[1] in (32, 96, 160) and not quantized.rows_of_4bit_are_exact())
    settle_quantized(nn.Sequential(layer))
    assert torch.equal(layer(x), stored.T)
    assert torch.equal(values_of_4bit(layer.weight.data, layer.weight.quant_state), stored)
    assert bool(caplog.records) == wrong
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, stored.sum(0).expand_as(x), atol=1e-5)  # sums of at most 64 numbers of order 1


def test_rows_that_the_smallest_blocks_do_not_divide_are_refused_where_they_are_read_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized, "rows_of_4bit_are_exact", lambda: False)
    with pytest.raises(
        InstallError, match=r"^0\.weight: is in 4 bit in blocks of 64, which do not divide its rows of 80 values"
    ):
        settle_quantized(nn.Sequential(linear((64, 80))))


@pytest.mark.parametrize("blocksize", [64, 128, 256])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_any_block_size_and_storage(blocksize: int, storage: torch.dtype) -> None:
    layer = linear((64, 512), blocksize=blocksize, quant_storage=storage)
    wanted, codes = rounded_maxima(layer), layer.weight.data.clone()
    pack(layer)
    settle_quantized(layer)
    assert layer.weight.dtype == storage
    assert torch.equal(layer.weight.data.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(values(layer), wanted)


def test_reading_leaves_a_packed_parameter_as_it_is() -> None:
    layer = linear((64, 128))
    wanted = rounded_maxima(layer)
    pack(layer)
    data, state = layer.weight.data.clone(), dict(vars(layer.weight.quant_state))
    for _ in range(2):
        assert torch.equal(functional.dequantize_4bit(*unpacked_4bit(layer.weight)), wanted)
        assert torch.equal(layer.weight.data, data)
        assert vars(layer.weight.quant_state).keys() == state.keys()
        assert layer.weight.quant_state.packing_format_for_cpu
        assert all(vars(layer.weight.quant_state)[key] is value for key, value in state.items())


def test_a_form_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bitsandbytes packs into: the result is packed again and must be the same."""
    real = functional._convert_weight_packed_for_cpu

    def otherwise(weight: Tensor, state: Any) -> tuple[Tensor, Any]:
        packed, state = real(weight, state)
        return packed.flip(0), state

    monkeypatch.setattr(functional, "_convert_weight_packed_for_cpu", otherwise)
    layer = linear((64, 128))
    pack(layer)
    with pytest.raises(CheckpointError, match=r"^mlp\.down_proj\.weight: bitsandbytes .* load the base again"):
        settle_quantized(nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": layer})}))


def test_what_was_undone_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(linear((64, 64)), linear((64, 128)))
    settle_quantized(model)
    assert not caplog.records
    pack(model[1])
    settle_quantized(model)
    assert "repack 1 4-bit weights (1 ...)" in caplog.text


# --- models ----------------------------------------------------------------------------------------------------------


def base(folder: Path, *, packed: bool) -> Any:
    """The tiny Llama, whose down_proj is 64 x 128, in nf4; as an evaluation leaves it where `packed`."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    for module in model.modules() if packed else ():
        if isinstance(module, bnb.nn.Linear4bit):
            pack(module)
    return model


@pytest.mark.parametrize("inference", [False, True])
def test_a_base_that_was_evaluated_before_it_is_wrapped_computes_as_one_that_was_not(
    tiny_llama_folder: Path, inference: bool
) -> None:
    """LoRA's products begin at zero, so the logits are the base's: off by the rounding of the maxima, and no more.

    Four layers of relative error 2^-9 at most, of random sign, move logits of about 1 by some 1e-3; block maxima in the wrong
    order moved them by 0.02 and more.
    """
    options = {"mode": "lora", "r": 4, "inference_mode": inference}
    wanted = logits(get_peft_model(base(tiny_llama_folder, packed=False), SpectrumConfig(**options)))
    model = get_peft_model(base(tiny_llama_folder, packed=True), SpectrumConfig(**options))
    difference = (logits(model) - wanted).abs().max()
    assert 0 < float(difference) < 4 * 2.0**-9 * float(wanted.abs().max())


def test_a_packed_model_is_read_as_it_computes(tiny_llama_folder: Path) -> None:
    plain, packed = (base(tiny_llama_folder, packed=way) for way in (False, True))
    for model in (plain, packed):
        model.config._name_or_path = ""  # else the float checkpoint is read
    name = "model.layers.0.mlp.down_proj.weight"
    before = open_weights(plain).read(name)
    for _ in range(2):
        torch.testing.assert_close(open_weights(packed).read(name), before, rtol=2.0**-8, atol=0.0)


@needs_the_product
def test_an_evaluation_in_earnest_is_undone(tiny_llama_folder: Path) -> None:
    model = base(tiny_llama_folder, packed=False)
    layer = model.model.layers[1].mlp.down_proj
    wanted = rounded_maxima(layer)
    logits(model)
    assert layer.weight.quant_state.packing_format_for_cpu
    model = get_peft_model(model, SpectrumConfig(mode="lora", r=4))
    assert torch.equal(values(layer), wanted)
    logits(model)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    model.train()
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- 8 bit -----------------------------------------------------------------------------------------------------------

WRAP_AN_8_BIT_MODEL = """
import sys
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from spectrum_peft import SpectrumConfig, SpectrumError
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=BitsAndBytesConfig(load_in_8bit=True))
try:
    get_peft_model(model, SpectrumConfig(mode="lora", r=4))
    print("WRAPPED")
except SpectrumError as error:
    print("REFUSED", error)
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="imitates a processor with AVX512")
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        # As on a Skylake server: products of 8-bit numbers saturate.
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "REFUSED model.layers.0.self_attn.q_proj.weight: is in 8 bit"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx2"}, "WRAPPED"),  # what the message says
    ],
)
def test_8_bit_products_that_saturate_are_refused(
    environment: dict[str, str], said: str, tiny_llama_folder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRAP_AN_8_BIT_MODEL, str(tiny_llama_folder)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_kernels_are_asked_with_real_values_within_a_dry_run() -> None:
    found = quantized.rows_of_4bit_are_exact()
    quantized.rows_of_4bit_are_exact.cache_clear()
    with FakeTensorMode():
        assert quantized.rows_of_4bit_are_exact() == found
