"""bitsandbytes' 4-bit and 8-bit weights: their values, their storage, and the products that keep a gradient."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..errors import CheckpointError, InstallError

logger = logging.getLogger(__name__)


def dequantize_4bit(packed: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """bitsandbytes' packed 4-bit values and the statistics beside them, as one (out, in) matrix."""
    import bitsandbytes.functional as bnb

    return values_of_4bit(packed, bnb.QuantState.from_dict(dict(parts), device=packed.device))


def values_of_4bit(packed: Tensor, state: Any) -> Tensor:
    """The (out, in) matrix of packed 4-bit values in bitsandbytes' usual layout.

    Blocks are of the matrix as one long row. bitsandbytes' kernel for CPUs (0.50.2) begins one with each row instead, so that
    where the blocks do not divide the rows it takes the maxima of others; it is given the matrix as that long row.
    """
    import bitsandbytes.functional as bnb

    flat = copy.copy(state)
    flat.shape = torch.Size([math.prod(state.shape)])
    values: Tensor = bnb.dequantize_4bit(packed, flat)
    return values.reshape(state.shape)


def quantization_of(parameter: Tensor) -> str | None:
    """`nf4`, `fp4` or `int8` for a bitsandbytes parameter that is quantized, else None."""
    kind = type(parameter).__name__
    if kind == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
        return str(parameter.quant_state.quant_type)  # type: ignore[attr-defined]
    if kind == "Int8Params" and parameter.dtype == torch.int8:
        return "int8"
    return None


def unpacked_4bit(parameter: Any, name: str = "weight") -> tuple[Tensor, Any]:
    """Data and quantization state of a 4-bit parameter in bitsandbytes' usual layout; the parameter stays as it is.

    The layout that bitsandbytes (0.50.2) packs into for CPUs with AVX512-BF16 is undone here: its own inverse leaves the block
    maxima of a weight without double quantization transposed, and quantizes those of the others a second time. The 4-bit codes
    come back exactly. The maxima do not: packing rounds them to bfloat16 and drops the originals, so that each block is
    off by 2^-9 of its values at most; they come back as the float32 numbers that the packed product has used.

    Raises:
        CheckpointError: packing the result again does not give what the parameter holds.
    Source: bitsandbytes 0.50.2, functional.py `_convert_weight_packed_for_cpu`.
    """
    state = parameter.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return parameter.data, state
    import bitsandbytes
    import bitsandbytes.functional as bnb

    rows, columns = state.shape
    packed = parameter.data.view(torch.uint8).reshape(rows // 32, columns // 2, 32)
    # A byte has a code of row i in its low half and one of row i + 16 in its high half, of 32 rows that were packed together;
    # two bytes, one for each of two neighbouring columns, lie side by side.
    codes = torch.stack([packed & 0xF, packed >> 4], dim=2).reshape(rows // 32, columns // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(-1, 2)
    data = ((codes[:, 0] << 4) | codes[:, 1]).reshape(state.original_qshape)
    storage = getattr(state, "original_storage_type", None)
    data = data if storage is None else data.view(storage)
    plain = bnb.QuantState(
        absmax=state.absmax.T.float().flatten(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.original_dtype,
    )
    again, as_packed = bnb._convert_weight_packed_for_cpu(data, copy.copy(plain))
    if not (torch.equal(again, parameter.data) and torch.equal(as_packed.absmax, state.absmax)):
        raise CheckpointError(
            f"{name}: bitsandbytes {bitsandbytes.__version__} has repacked this 4-bit weight for inference in a form that is not "
            "known here, wanted that of 0.50.2; load the base again, and wrap it before it is evaluated."
        )
    return data, plain


def settle_quantized(model: nn.Module) -> None:
    """Let quantized layers compute as they should; call it before anything reads, trains or evaluates them.

    4-bit weights lose bitsandbytes' layout for inference, and get blocks that CPUs read right (`_within_rows`); 8-bit ones are
    refused where their products are wrong.

    Raises:
        CheckpointError: a weight is packed in a form that cannot be undone.
        InstallError: 8-bit weights on a CPU whose products of whole numbers saturate; 4-bit weights on a CPU whose rows are no
            multiple of 32 values.
    """
    _keep_4bit_differentiable(model)
    divided: list[str] = []
    for name, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is not None and weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            # Rows of an odd number of values take another way there, which is right.
            if state.shape[-1] % 2 == 0 and not rows_of_4bit_are_exact():
                if state.shape[-1] % 32:  # the smallest blocks that bitsandbytes has
                    raise InstallError(
                        f"{name}.weight: is in 4 bit in blocks of {state.blocksize}, which do not divide its rows of "
                        f"{state.shape[-1]} values, wanted a multiple of 32: bitsandbytes computes with other values on a CPU. "
                        "Use a GPU, leave the module unquantized (llm_int8_skip_modules), or take the float base."
                    )
                weight.quant_state = module.quant_state = _within_rows(state)  # type: ignore[assignment]
                divided.append(name)
        if type(weight).__name__ == "Int8Params" and weight.device.type == "cpu" and not int8_products_are_exact():
            raise InstallError(
                f"{name}.weight: is in 8 bit, and products of 8-bit numbers are wrong on this processor (AVX512 without VNNI; "
                "oneDNN saturates); set ATEN_CPU_CAPABILITY=avx2, with which they are taken in float32, or use nf4."
            )
    if divided:
        logger.warning(
            "blocks do not divide the rows of %d 4-bit weights (%s ...), and bitsandbytes would compute with other values "
            "than were stored; they have smaller blocks of the same values now",
            len(divided),
            divided[0],
        )


@cache
def rows_of_4bit_are_exact() -> bool:
    """Whether bitsandbytes' kernel for CPUs reads rows that its blocks of 64 do not divide."""
    import bitsandbytes.functional as bnb

    with unset_fake_temporarily():  # a dry run asks, too
        values = torch.arange(1.0, 5 * 96 + 1).reshape(5, 96)
        packed, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4")
        return torch.equal(bnb.dequantize_4bit(packed, state), values_of_4bit(packed, state))


def undivided_rows(model: nn.Module) -> list[str]:
    """Linears whose rows no block of bitsandbytes divides.

    Args:
        model: unquantized; its weights may lie on the meta device.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % 32 and module.in_features % 2 == 0
    ]


def misread_in_4bit(model: nn.Module) -> list[str]:
    """Those of `undivided_rows`, which a CPU would compute with other values in 4 bit; none where its kernel reads them right."""
    found = undivided_rows(model)
    return [] if not found or rows_of_4bit_are_exact() else found


def _within_rows(state: Any) -> Any:
    """The state of the same values in blocks that divide the rows, each with the maximum of the block that it was part of."""
    import bitsandbytes.functional as bnb

    maxima = state.absmax
    if state.nested:
        maxima = bnb.dequantize_blockwise(maxima, state.state2) + state.offset
    size = math.gcd(state.blocksize, state.shape[-1])
    count = math.prod(state.shape) // size
    return bnb.QuantState(
        absmax=maxima.float().repeat_interleave(state.blocksize // size)[:count].contiguous(),
        shape=state.shape,
        code=state.code,
        blocksize=size,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )


@cache
def int8_products_are_exact() -> bool:
    """Whether bitsandbytes' product of 8-bit matrices on the CPU is that of the whole numbers.

    It is torch's `_int_mm` where there is AVX512. oneDNN adds two products in 16 bit there unless the processor has VNNI
    instructions, and 127 * 127 twice is no 16-bit number: a quarter of a large sum was seen to be missing.
    """
    import bitsandbytes  # noqa: F401 - registers the operator

    whole = torch.full((16, 64), 127, dtype=torch.int8)
    product = torch.ops.bitsandbytes.int8_linear_matmul(whole, whole)
    return torch.equal(product.int(), torch.full((16, 16), 64 * 127**2, dtype=torch.int32))


def _keep_4bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, and undo it where it did.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2, `Linear4bit.forward`) repacks a weight in the first forward in eval
    mode, for a faster product that has no backward: after one evaluation, a training step ends at that layer and says
    so only in a warning. Without a repacked weight, or without such a CPU, nothing happens. What is undone is logged, since
    packing has rounded the block maxima (`unpacked_4bit`).
    """
    undone = []
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = module.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            weight.data, weight.quant_state = unpacked_4bit(weight, f"{name}.weight")
            module.quant_state = weight.quant_state
            undone.append(name)
    if undone:
        logger.warning(
            "an evaluation before has let bitsandbytes repack %d 4-bit weights (%s ...), which rounds the largest value of each "
            "block to bfloat16; the weights differ from those of a base that was wrapped before it was evaluated by up to "
            "0.2 %% each",
            len(undone),
            undone[0],
        )


def quantized_product_works(kind: str, device: torch.device) -> str | None:
    """None if a product with quantized weights runs on the device and is right, else what is wrong.

    Compared with the product of the dequantized weights; int8 quantizes the input, too, by its largest value in a row: 1/127 of
    it, summed over the 64 of a row.

    Args:
        kind: `nf4`, `fp4` or `int8`.
    """
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(64, 64, generator=generator) for _ in range(2))
    if kind == "int8":
        layer: nn.Module = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        dtype, bound = torch.float16, 64 * 2 / 127
    else:
        dtype, bound = torch.float32, 1e-3
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type=kind, compute_dtype=dtype)
    layer.load_state_dict({"weight": weight.to(dtype)})
    layer = layer.to(device)
    y = layer(x.to(device, dtype))
    exact = weight if kind == "int8" else bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    error = float((y.float().cpu() - x @ exact.float().cpu().T).abs().max())
    return None if error <= bound else f"off by {error:.3g} where {bound:.3g} is the most"


def give_storage_without_values(layer: nn.Module, dtype: torch.dtype) -> None:
    """Fill a bitsandbytes layer made on the meta device with weights that have bitsandbytes' storage and no values.

    For a dry run: call it under `FakeTensorMode`, where bitsandbytes' own parameter types cannot be made. The layer's
    own forward then runs on a plain parameter that carries what it looks for: packed 4-bit values with block maxima of 64
    values, these in 8 bit in blocks of 256 with their offset and two code books; or int8 rows with one scale each.

    Args:
        layer: `Linear4bit` or `Linear8bitLt` whose weight (out, in) lies on the meta device.
        dtype: that the layer dequantizes to, the dtype of the weight before it was quantized.
    Source: bitsandbytes 0.50.2, functional.py `quantize_4bit` and `quantize_blockwise`, nn/modules.py `Int8Params`.
    """
    weight: Any = layer.weight
    shape = weight.shape
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import QuantState

        blocks = -(-shape.numel() // weight.blocksize)
        state = QuantState(
            absmax=torch.empty(blocks),
            shape=shape,
            code=torch.empty(16),
            blocksize=weight.blocksize,
            quant_type=weight.quant_type,
            dtype=dtype,
        )
        if weight.compress_statistics:
            state.absmax = torch.empty(blocks, dtype=torch.uint8)
            state.offset = torch.empty(())
            state.state2 = QuantState(
                absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
            )
            state.nested = True
        stored = nn.Parameter(torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        carried = {k: v for k, v in weight.__dict__.items() if k != "quant_state"} | {
            "quant_state": state,
            "bnb_quantized": True,
        }
        layer.quant_state = state  # type: ignore[assignment]
    else:
        stored = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        carried = {"CB": stored.data, "SCB": torch.empty(shape[0]), "has_fp16_weights": False}
        # How many columns hold outliers depends on the activations; none are assumed.
        layer.state.threshold = 0.0  # type: ignore[union-attr]
    for name, value in carried.items():
        setattr(stored, name, value)
    layer._parameters["weight"] = stored


@contextmanager
def int8_products_as_on(device: str) -> Iterator[None]:
    """Let bitsandbytes' int8 layers take, on CPU tensors, the product that they take on `device`.

    On a CPU bitsandbytes dequantizes and multiplies in float; on a GPU it multiplies in int8, with other intermediates.
    """
    import bitsandbytes.autograd._functions as functions

    before, silent = functions.MatMul8bitFp, functions.logger.disabled
    if device != "cpu":
        functions.MatMul8bitFp = functions.MatMul8bitLt  # type: ignore[misc, assignment]
        functions.logger.disabled = True  # it warns of every cast to float16
    try:
        yield
    finally:
        functions.MatMul8bitFp = before  # type: ignore[misc]
        functions.logger.disabled = silent


def int8_values(values: Tensor, scale: Tensor) -> Tensor:
    """LLM.int8: whole numbers times the largest absolute value of each row over 127."""
    return values.float() * (scale.float() / 127.0).unsqueeze(1)


def through_quantization(weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """dequantize(quantize(weight)): the float weight that a bitsandbytes layer of this matrix computes with.

    Args:
        weight: (out, in), in the dtype that the base was loaded in.
        settings: fields of `transformers.BitsAndBytesConfig`.
    Returns:
        (out, in); of 4 bit in the dtype of `weight`, of 8 bit in float32.
    Source: bitsandbytes 0.50.2, nn/modules.py `Params4bit._quantize`, `Int8Params._quantize`.
    """
    import bitsandbytes.functional as bnb

    if settings.get("load_in_8bit"):
        values, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return int8_values(values, scale)
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=64,
        compress_statistics=bool(settings.get("bnb_4bit_use_double_quant", False)),
        quant_type=str(settings.get("bnb_4bit_quant_type", "fp4")),
    )
    return values_of_4bit(packed, state)
