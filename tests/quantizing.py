"""Quantizers of other people's formats, and what their numbers mean, one number at a time: references for the reader.

Each takes the name of a module and a matrix (out, in), and gives the tensors as the format stores them and the matrix that
they stand for, in float32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

Quantized = tuple[dict[str, Tensor], Tensor]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def float8_blocks(module: str, matrix: Tensor, block: int = 16, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantized:
    """DeepSeek's: a scale for each square; the last ones need not be full."""
    rows, columns = matrix.shape
    values = torch.empty(rows, columns, dtype=dtype)
    scales = torch.empty(math.ceil(rows / block), math.ceil(columns / block))
    dense = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            square = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = matrix[square].abs().max() / torch.finfo(dtype).max
            values[square] = (matrix[square] / scales[i, j]).to(dtype)
            dense[square] = values[square].float() * scales[i, j]
    return {f"{module}.weight": values, f"{module}.weight_scale_inv": scales}, dense


def float8_rows(module: str, matrix: Tensor) -> Quantized:
    """compressed-tensors' and fbgemm's: a scale for each row, bfloat16."""
    scale = (matrix.abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (matrix / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{module}.weight": values, f"{module}.weight_scale": scale}, values.float() * scale.float()


def float8_whole(module: str, matrix: Tensor) -> Quantized:
    """One scale for the matrix, and one of its inputs, which is no weight."""
    scale = matrix.abs().max() / 57344
    values = (matrix / scale).to(torch.float8_e5m2)
    tensors = {f"{module}.weight": values, f"{module}.weight_scale": scale, f"{module}.input_scale": torch.tensor(2.0)}
    return tensors, values.float() * scale


def float8_exponents(module: str, matrix: Tensor) -> Quantized:
    """MXFP8: 32 numbers of a row share a power of two."""
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, columns // 32, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 8
    values = (groups / 2 ** exponent.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    dense = values.float() * 2 ** exponent.unsqueeze(-1)
    stored = {f"{module}.weight": values.reshape(rows, columns), f"{module}.weight_scale_inv": (exponent + 127).byte()}
    return stored, dense.reshape(rows, columns)


def words(numbers: list[int], bits: int) -> list[int]:
    """Numbers one after the other in words of 32 bits, as signed integers."""
    stream = sum(number << (i * bits) for i, number in enumerate(numbers))
    found = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(math.ceil(len(numbers) * bits / 32))]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def gptq(
    module: str, matrix: Tensor, bits: int = 4, group: int = 16, shuffled: bool = False, first: int = 1
) -> Quantized:
    """GPTQ's, with random zero points; `shuffled` inputs, as act-order leaves them."""
    outputs, inputs = matrix.shape
    generator = torch.Generator().manual_seed(bits)
    groups = torch.arange(inputs) // group
    if shuffled:
        groups = groups[torch.randperm(inputs, generator=generator)]
    count, most = inputs // group, 2**bits - 1
    zeros = torch.randint(0, most + 1, (count, outputs), generator=generator)
    scales = (torch.rand(count, outputs, generator=generator) / 8 + 0.01).half()
    numbers, dense = torch.empty(inputs, outputs, dtype=torch.long), torch.empty(outputs, inputs)
    for i in range(inputs):
        g = groups[i]
        numbers[i] = (matrix[:, i] / scales[g].float() + zeros[g]).round().clamp(0, most)
        dense[:, i] = (numbers[i] - zeros[g]).float() * scales[g].float()
    stored_zeros = (zeros - first) % (most + 1)
    stored = {
        f"{module}.qweight": torch.tensor(
            [words(c.tolist(), bits) for c in numbers.T], dtype=torch.int32
        ).T.contiguous(),
        f"{module}.qzeros": torch.tensor([words(row.tolist(), bits) for row in stored_zeros], dtype=torch.int32),
        f"{module}.scales": scales,
        f"{module}.g_idx": groups.int(),
    }
    return stored, dense


def awq(module: str, matrix: Tensor, group: int = 16) -> Quantized:
    """AWQ's gemm layout: eight neighbouring outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    outputs, inputs = matrix.shape
    generator = torch.Generator().manual_seed(7)
    zeros = torch.randint(0, 16, (inputs // group, outputs), generator=generator)
    scales = (torch.rand(inputs // group, outputs, generator=generator) / 8 + 0.01).half()
    numbers, dense = torch.empty(inputs, outputs, dtype=torch.long), torch.empty(outputs, inputs)
    for i in range(inputs):
        numbers[i] = (matrix[:, i] / scales[i // group].float() + zeros[i // group]).round().clamp(0, 15)
        dense[:, i] = (numbers[i] - zeros[i // group]).float() * scales[i // group].float()

    def packed(table: Tensor) -> Tensor:
        rows = []
        for row in table.tolist():
            rows.append([words([row[8 * c + k] for k in (0, 2, 4, 6, 1, 3, 5, 7)], 4)[0] for c in range(len(row) // 8)])
        return torch.tensor(rows, dtype=torch.int32)

    return {f"{module}.qweight": packed(numbers), f"{module}.qzeros": packed(zeros), f"{module}.scales": scales}, dense


def packed_rows(module: str, matrix: Tensor, bits: int = 4, group: int = 16, zeros: bool = False) -> Quantized:
    """compressed-tensors' pack-quantized: half of the range is added to every number, zero points are packed along the rows."""
    outputs, inputs = matrix.shape
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    scales = (torch.rand(outputs, inputs // group, generator=generator) / 8 + 0.01).bfloat16()
    points = torch.randint(-half, half, scales.shape, generator=generator) * int(zeros)
    numbers, dense = torch.empty(outputs, inputs, dtype=torch.long), torch.empty(outputs, inputs)
    for i in range(inputs):
        scale, point = scales[:, i // group].float(), points[:, i // group]
        numbers[:, i] = (matrix[:, i] / scale + point).round().clamp(-half, half - 1)
        dense[:, i] = (numbers[:, i] - point).float() * scale
    stored = {
        f"{module}.weight_packed": torch.tensor([words([n + half for n in r], bits) for r in numbers.tolist()]).int(),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": torch.tensor([outputs, inputs]),
    }
    if zeros:
        columns = [words([n + half for n in column], bits) for column in points.T.tolist()]
        stored[f"{module}.weight_zero_point"] = torch.tensor(columns).int().T.contiguous()
    return stored, dense


def int8_rows(module: str, matrix: Tensor) -> Quantized:
    """compressed-tensors' int-quantized with zero points, a row each."""
    low, high = matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    values = (matrix / scale + zero).round().clamp(-128, 127)
    stored = {
        f"{module}.weight": values.to(torch.int8),
        f"{module}.weight_scale": scale,
        f"{module}.weight_zero_point": zero.to(torch.int8),
    }
    return stored, (values - zero) * scale


def mxfp4(parameter: str, experts: Tensor) -> Quantized:
    """gpt-oss's experts: (E, in, out) of the model, in blocks of 32 along the inputs."""
    count, inputs, outputs = experts.shape
    blocks = torch.empty(count, outputs, inputs // 32, 16, dtype=torch.uint8)
    scales = torch.empty(count, outputs, inputs // 32, dtype=torch.uint8)
    dense = torch.empty(count, inputs, outputs)
    for e in range(count):
        for o in range(outputs):
            for b in range(inputs // 32):
                numbers = experts[e, 32 * b : 32 * b + 32, o]
                exponent = math.floor(math.log2(float(numbers.abs().max()))) - 2
                scales[e, o, b] = exponent + 127
                codes = []
                for k, number in enumerate(numbers.tolist()):
                    size = min(range(8), key=lambda code: abs(abs(number) / 2.0**exponent - E2M1[code]))
                    codes.append(size + 8 * (number < 0))
                    dense[e, 32 * b + k, o] = math.copysign(E2M1[size] * 2.0**exponent, number)
                blocks[e, o, b] = torch.tensor([codes[2 * k] | codes[2 * k + 1] << 4 for k in range(16)])
    return {f"{parameter}_blocks": blocks, f"{parameter}_scales": scales}, dense


def float4(module: str, matrix: Tensor, packed: bool = True, of: int = 16) -> Quantized:
    """NVFP4 (`of` 16), as compressed-tensors (`packed`) and modelopt store it: float8 scales and a factor; MXFP4 (32)."""
    rows, columns = matrix.shape
    factor = 448 * 6 / matrix.abs().max() if packed else matrix.abs().max() / (448 * 6)
    pairs = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scales = torch.empty(rows, columns // of, dtype=torch.float8_e4m3fn if of == 16 else torch.uint8)
    dense = torch.empty(rows, columns)
    for i in range(rows):
        for g in range(columns // of):
            numbers = matrix[i, of * g : of * (g + 1)]
            if of == 16:
                whole = numbers.abs().max() / 6
                scales[i, g] = (whole * factor if packed else whole / factor).to(torch.float8_e4m3fn)
                scale = scales[i, g].float() / factor if packed else scales[i, g].float() * factor
            else:
                exponent = math.floor(math.log2(float(numbers.abs().max()))) - 2
                scales[i, g], scale = exponent + 127, torch.tensor(2.0**exponent)
            codes = []
            for k, number in enumerate(numbers.tolist()):
                size = min(range(8), key=lambda code: abs(abs(number) / float(scale) - E2M1[code]))
                codes.append(size + 8 * (number < 0))
                dense[i, of * g + k] = math.copysign(E2M1[size], number) * scale
            for k in range(of // 2):
                pairs[i, of // 2 * g + k] = codes[2 * k] | codes[2 * k + 1] << 4
    stored = {f"{module}.weight_packed" if packed else f"{module}.weight": pairs, f"{module}.weight_scale": scales}
    if of == 16:
        stored[f"{module}.weight_global_scale" if packed else f"{module}.weight_scale_2"] = factor.reshape(1)
        stored[f"{module}.input_global_scale" if packed else f"{module}.input_scale"] = torch.tensor([3.0])
    return stored, dense


FORMATS: dict[str, tuple[dict[str, object], Callable[[str, Tensor], Quantized], str]] = {
    "blocks of float8 e4m3": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        float8_blocks,
        "in float8 e4m3fn with scales for blocks of 16 x 16",
    ),
    "blocks of float8 e5m2": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        lambda module, matrix: float8_blocks(module, matrix, dtype=torch.float8_e5m2),
        "in float8 e5m2 with scales for blocks of 16 x 16",
    ),
    "rows of float8": (
        {"quant_method": "compressed-tensors"},
        float8_rows,
        "in float8 e4m3fn with a scale for each row",
    ),
    "whole float8": ({"quant_method": "modelopt"}, float8_whole, "in float8 e5m2 with one scale for each tensor"),
    "MXFP8": ({"quant_method": "mxfp8"}, float8_exponents, "in float8 e4m3fn with scales for blocks of 1 x 32"),
    "int8": ({"quant_method": "compressed-tensors"}, int8_rows, "in int8 with a scale for each row"),
    "int4": ({"quant_method": "compressed-tensors"}, packed_rows, "in whole numbers of 4 bits"),
    "int8 packed": (
        {"quant_method": "compressed-tensors"},
        lambda module, matrix: packed_rows(module, matrix, 8, 32, zeros=True),
        "in whole numbers of 8 bits",
    ),
    "int3": (
        {"quant_method": "compressed-tensors"},
        lambda module, matrix: packed_rows(module, matrix, 3, zeros=True),
        "in whole numbers of 3 bits",
    ),
    "NVFP4": ({"quant_method": "compressed-tensors"}, float4, "in NVFP4, blocks of 16"),
    "NVFP4 of modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda module, matrix: float4(module, matrix, packed=False),
        "in NVFP4, blocks of 16",
    ),
    "MXFP4 of single matrices": (
        {"quant_method": "compressed-tensors"},
        lambda module, matrix: float4(module, matrix, of=32),
        "in MXFP4, blocks of 32",
    ),
    "int4 with zero points": (
        {"quant_method": "compressed-tensors"},
        lambda module, matrix: packed_rows(module, matrix, zeros=True),
        "in whole numbers of 4 bits",
    ),
    **{
        f"GPTQ of {bits} bits": (
            {"quant_method": "gptq", "bits": bits},
            lambda module, matrix, bits=bits: gptq(module, matrix, bits),  # type: ignore[misc]
            f"in GPTQ {bits}-bit",
        )
        for bits in (2, 3, 4, 8)
    },
    "GPTQ with act-order": (
        {"quant_method": "gptq", "bits": 4},
        lambda module, matrix: gptq(module, matrix, shuffled=True),
        "in GPTQ 4-bit",
    ),
    "GPTQ of the second format": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda module, matrix: gptq(module, matrix, first=0),
        "in GPTQ 4-bit",
    ),
    "AWQ": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq, "in AWQ 4-bit, groups of 16"),
}


# --- checkpoints ---

# Its sides are multiples of every block and group.
GPT_OSS = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip
LLAMA = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def saved(kind: Any, config: Any, folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewritten(source: Path, folder: Path, tensors: dict[str, Tensor], settings: Any = None) -> Path:
    """A checkpoint with the config of another, and what it says on its quantization."""
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def both(
    source: Path, folder: Path, quantize: Callable[[str, Tensor], Any], settings: Any, which: str
) -> tuple[Path, Path]:
    """(quantized, dense): the matrices whose names match, replaced by the quantizer's tensors, or by what these stand for."""
    stored, dense = {}, {}
    for name, values in load_file(source / "model.safetensors").items():
        if re.search(which, name):
            module = name.removesuffix(".weight")
            tensors, meant = quantize(module, values)
            stored |= tensors
            dense[name] = meant
        else:
            stored[name] = dense[name] = values
    return rewritten(source, folder / "quantized", stored, settings), rewritten(source, folder / "dense", dense)
