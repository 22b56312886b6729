"""Weights that are stored as numbers of few bits, as floats: the formulas of the formats, tensors in and tensors out.

All of them are written from the formats' own descriptions, because the packages that own them are not needed otherwise, and
because transformers' `Fp8Dequantize` takes the size of a block from the number of scales, which is wrong where the last block
of a matrix is not full. Tests hold them to the functions of transformers and to loops over single numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The sixteen numbers of four bits: a sign, two bits of exponent, one of mantissa.
# Source: OCP Microscaling Formats (MX) Specification 1.0, 5.3.3, FP4 (E2M1).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Where in a word AWQ has put each of eight neighbouring columns: it holds them in the order 0, 2, 4, 6, 1, 3, 5, 7.
# Source: AutoAWQ 0.2, awq/modules/linear/gemm.py, `WQLinear_GEMM.from_linear`, `order_map`.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def block_of(
    shape: Sequence[int], scale: Sequence[int], given: Sequence[tuple[int, int]] = ()
) -> tuple[int, int] | None:
    """(rows, columns) of the block that one scale is for; None where the numbers of scales fit no block.

    Args:
        shape: of the values, (..., rows, columns). scale: of the scales, (..., rows, columns) of blocks, or one number.
        given: sizes that the checkpoint says, which alone tell a block that is not full from a smaller one.
    """
    if len(shape) < 2 or not _leads(shape, scale):
        return None
    sides, counts = tuple(shape[-2:]), _sides_of(shape, scale)
    for block in given:
        if all(math.ceil(side / size) == count for side, size, count in zip(sides, block, counts, strict=True)):
            return block
    if any(count == 0 or side % count for side, count in zip(sides, counts, strict=True)):
        return None
    return sides[0] // counts[0], sides[1] // counts[1]


def _leads(shape: Sequence[int], scale: Sequence[int]) -> bool:
    """Whether scales have the leading dimensions of the values, which are experts."""
    if len(scale) == 1 and len(shape) > 2:
        return math.prod(scale) == 1 or (len(shape) == 3 and scale[0] == shape[0])
    return len(scale) < 2 or math.prod(scale) == 1 or tuple(scale[:-2]) == tuple(shape[:-2])


def _sides_of(shape: Sequence[int], scale: Sequence[int]) -> tuple[int, int]:
    """Numbers of blocks along rows and columns; a vector has one scale for each row, or for each expert."""
    if math.prod(scale) == 1 or (len(scale) == 1 and len(shape) > 2):
        return 1, 1
    return (scale[0], 1) if len(scale) == 1 else (scale[-2], scale[-1])


def scaled(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Values times the scale of their block, float32; values that are float32 are changed in place.

    Args:
        values: (..., rows, columns) of any dtype.
        scale: (..., ceil(rows / block[0]), ceil(columns / block[1])), one number, (rows,) of a matrix, or (experts,); floats, or
            exponents of two.
    Source: DeepSeek-V3, inference/kernel.py `weight_dequant` (where `weight_scale_inv` is the factor, whatever its name says);
        compressed-tensors 0.20, quantization/lifecycle/forward.py `_dequantize`.
    """
    result = values.float()
    leading = result.shape[:-2] if scale.numel() > 1 else ()
    factors = exponents(scale).reshape(*leading, *_sides_of(result.shape, scale.shape))
    width = result.shape[-1]
    if factors.shape[-1] > 1:
        factors = factors.repeat_interleave(block[1], dim=-1)[..., :width]
    if factors.shape[-2] == 1 or block[0] == 1:
        return result.mul_(factors)
    for i in range(factors.shape[-2]):  # so that the scales of a whole matrix are never spread out at once
        result[..., i * block[0] : (i + 1) * block[0], :].mul_(factors[..., i : i + 1, :])
    return result


def exponents(scale: Tensor) -> Tensor:
    """Scales as float32; those of eight bits are powers of two, 2^(byte - 127).

    Source: OCP Microscaling Formats (MX) Specification 1.0, 5.4.1, E8M0.
    """
    return (scale.float() - 127.0).exp2() if scale.dtype == torch.uint8 else scale.float()


def e2m1(pairs: Tensor) -> Tensor:
    """Numbers of four bits, two in a byte, the first in its low half: (..., n) uint8 or int8 -> (..., 2n) bfloat16, exactly."""
    table, pairs = torch.tensor(_E2M1, dtype=torch.bfloat16), pairs.view(torch.uint8)
    return torch.stack([table[(pairs & 0xF).int()], table[(pairs >> 4).int()]], dim=-1).flatten(-2)


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Numbers of four bits in blocks of 32 with a power of two each, bfloat16, which holds them exactly.

    Args:
        blocks: (..., blocks, 16) uint8. scales: (..., blocks) uint8.
    Returns:
        (..., 32 * blocks).
    Source: openai/gpt-oss, gpt_oss/torch/weights.py `_get_mxfp4_tensor`.
    """
    return e2m1(blocks).mul_(exponents(scales).to(torch.bfloat16).unsqueeze(-1)).flatten(-2)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The numbers without sign that lie one after the other in words of 32 bits, the first in the lowest bits.

    Args:
        words: (..., words) int32. bits: 1 to 8; a number of 3, 5, 6 or 7 bits may lie across two words.
    Returns:
        (..., 32 * words // bits) uint8.
    Source: AutoGPTQ 0.7, nn_modules/qlinear/qlinear_cuda.py `pack`; compressed-tensors 0.20, `pack_to_int32`.
    """
    stream = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        parts = [(stream >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)
    at = torch.arange(8 * stream.shape[-1] // bits) * bits
    following = torch.nn.functional.pad(stream, (0, 1))
    two = following[..., at // 8].short() | (following[..., at // 8 + 1].short() << 8)
    return ((two >> (at % 8).short()) & (2**bits - 1)).to(torch.uint8)


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, bits: int, first: int) -> Tensor:
    """A matrix of GPTQ, (out, in) float32: scale * (number - zero point), both of the group of the input.

    Args:
        qweight: (in * bits / 32, out) int32. qzeros: (groups, out * bits / 32) int32. scales: (groups, out).
        groups: (in,) group of each input.
        first: what was taken off the zero points before they were stored: 1, or 0 in the format `gptq_v2`.
    Source: AutoGPTQ 0.7, nn_modules/qlinear/qlinear_cuda.py `forward`; GPTQModel 5, utils/model.py
        `convert_gptq_v1_to_v2_format_module`.
    """
    zeros = (unpacked(qzeros, bits)[:, : scales.shape[1]] + first) & (2**bits - 1)
    return _by_group(unpacked(qweight.T, bits)[:, : len(groups)], zeros.T, scales.T, groups)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """A matrix of AWQ's gemm layout, (out, in) float32.

    Args:
        qweight: (in, out / 8) int32. qzeros: (groups, out / 8) int32. scales: (groups, out); inputs in groups of one size.
    Source: AutoAWQ 0.2, awq/utils/packing_utils.py `dequantize_gemm`.
    """
    values, zeros = (unpacked(q, 4).unflatten(-1, (-1, 8))[..., _AWQ_PLACES].flatten(-2) for q in (qweight, qzeros))
    groups = torch.arange(len(values)) // (len(values) // len(scales))
    return _by_group(values.T, zeros.T, scales.T, groups)


def packed_rows(words: Tensor, zeros: Tensor | None, scale: Tensor, groups: Tensor, bits: int) -> Tensor:
    """A matrix of compressed-tensors' format pack-quantized, (out, in) float32.

    Args:
        words: (out, in * bits / 32) int32, numbers with half of their range added. scale: (out, groups).
        zeros: (out * bits / 32, groups) int32, packed along the rows; None for zero points of zero. groups: (in,).
    Source: compressed-tensors 0.20, compressors/pack_quantized.
    """
    values = unpacked(words, bits)[:, : len(groups)]
    if zeros is None:
        points = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        points = unpacked(zeros.T, bits).T[: len(values)]
    return _by_group(values, points, scale, groups)


def _by_group(values: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """scale * (value - zero), with (out, in) values and (out, groups) of the others."""
    result = values.float()
    result -= zeros.float()[:, groups]
    result *= scales.float()[:, groups]
    return result.contiguous()
