"""In which form the floating-point tensors of a checkpoint are stored: as they are, or as numbers of few bits with scales.

Who reads weights knows one kind of thing, a float tensor of a name and a shape; here is what it is made of. Forms are told
by the tensors themselves, since one checkpoint may hold several; config.json says what tensors cannot: the size of blocks
that are not full, and which of two numberings GPTQ's zero points have.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import CheckpointError, quoted
from ..records import checked, parse_json
from ..records.schema import Count
from .headers import Span
from .quantized import dequantize_4bit, int8_values
from .source import DTYPES, dtype_name
from .unpacking import awq, block_of, e2m1, exponents, gptq, mxfp4, packed_rows, scaled

Read = Callable[[str], Tensor]

# Methods, as config.json calls them, whose tensors are known here.
METHODS = ("bitsandbytes", "fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "gptq", "awq")
# Beside quantized matrices: scales of activations and of caches, and what only says a shape.
_BESIDE = re.compile(
    r"(^|[._])((input|output|activation|[qkv])_(scale(_inv)?|zero_point|global_scale)|weight_shape|weight_format)$"
)
_BLOCK_SIZES = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


@dataclass(frozen=True)
class Form:
    """How a float tensor is stored.

    Attributes:
        word: for the dtype of a report: `bfloat16`, `float8_e4m3fn`, `mxfp4`, `gptq4`, `nf4`.
        shape: of the values.
        parts: the stored tensors that it is made of.
        values: reads them, and gives the values; one expert's, where what it is given reads one expert's.
        what: the form in words; None for a tensor that is stored as it is.
        turned: whether it is (out, in) although the class holds a matrix as (in, out), as a Conv1D's.
    """

    word: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    values: Callable[[Read], Tensor]
    what: str | None = None
    turned: bool = False


@dataclass(frozen=True)
class _File:
    """What the finders look at: headers, the config's part on quantization, and a reader for the small tensors that
    describe others."""

    spans: Mapping[str, Span]
    settings: Mapping[str, Any]
    read: Read

    def shape(self, name: str) -> tuple[int, ...]:
        return self.spans[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.spans[name].dtype]


Found = Iterator[tuple[str, Form]]


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """How config.json says that a checkpoint is quantized; None where it says nothing."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    return str(settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "unknown"))


def forms_of(spans: Mapping[str, Span], config: Mapping[str, Any], read: Read, where: object) -> dict[str, Form]:
    """{tensor: its form} of all floating-point tensors of a checkpoint, in the order of the file.

    Args:
        spans: {stored tensor: where it lies}. read: reads a stored tensor. where: named in errors.
    Raises:
        CheckpointError: quantized by a method, or stored in a form, that is not known here; parts that do not fit each other.
    """
    method = quantization_method(config)
    if method is not None and method not in METHODS:
        raise CheckpointError(
            f"{where}: weights are quantized by {quoted(method)}, wanted float weights or one of {', '.join(METHODS)}; use "
            "the checkpoint they were quantized from."
        )
    file = _File(spans, config.get("quantization_config") or {}, read)
    packed: dict[str, tuple[str, Form]] = {}
    used: set[str] = set()
    for find in _FINDERS:
        for name, form in find(file):
            packed[form.parts[0]] = (name, form)
            used.update(form.parts)
    found: dict[str, Form] = {}
    for stored, span in spans.items():
        dtype = DTYPES[span.dtype]
        if stored in packed:
            name, form = packed[stored]
        elif stored in used or ((packed or method) and describes(stored)):
            continue
        elif dtype.is_floating_point:
            name, form = stored, Form(dtype_name(dtype), span.shape, (stored,), partial(_as_it_is, name=stored))
        elif method is not None and len(span.shape) > 1:
            raise CheckpointError(
                f"{where}: tensor {stored!r} is {span.dtype} {span.shape} in a checkpoint quantized by {quoted(method)}, wanted "
                "a form that is known here: float8 with scales, MXFP4, NVFP4, GPTQ, AWQ (gemm), compressed-tensors, bitsandbytes."
            )
        else:
            continue
        if name in found:
            raise CheckpointError(f"{where}: tensor {name!r} is there twice, in two forms.")
        found[name] = form
    return found


def describes(stored: str) -> bool:
    """Whether a tensor of a quantized checkpoint only describes others, or activations: a name of the formats that are known."""
    return _BESIDE.search(stored) is not None


def told(forms: Mapping[str, Form]) -> tuple[str, ...]:
    """What a report says of a checkpoint's forms: a line for each that has to be undone."""
    counts = Counter(form.what for form in forms.values() if form.what is not None)
    return tuple(
        f"{count} of {len(forms)} tensors are stored {what}; they were dequantized one matrix at a time"
        for what, count in counts.items()
    )


def _as_it_is(read: Read, name: str) -> Tensor:
    values = read(name)
    return values if values.element_size() > 1 else values.float()  # float8 knows next to no arithmetic


# -- one finder for each form


def _float8(file: _File) -> Found:
    """float8, and whole numbers of eight bits, with scales: DeepSeek's, fbgemm's, compressed-tensors', modelopt's.

    Source of the names: transformers 5.24, quantizer_finegrained_fp8.py; compressed-tensors 0.20.
    """
    given = _blocks(file.settings)
    for name, span in file.spans.items():
        dtype = DTYPES[span.dtype]
        scale = _scale_of(name, file.spans)
        if (
            scale is None
            or dtype.itemsize > 1
            or not (dtype.is_floating_point or dtype == torch.int8)
            or not span.shape
        ):
            continue
        # DeepSeek-V4 packs two numbers of four bits into a byte that is called int8; their scales are powers of two.
        pairs = dtype == torch.int8 and file.dtype(scale) in (torch.uint8, torch.float8_e8m0fnu)
        shape = (*span.shape[:-1], 2 * span.shape[-1]) if pairs else span.shape
        block = block_of(shape, file.shape(scale), given)
        if block is None:
            raise CheckpointError(
                f"{name}: has the shape {shape} and {scale} the shape {file.shape(scale)}, wanted a scale for blocks of one "
                "size; weight_block_size in config.json says it where the last blocks are not full."
            )
        parts = [name, scale]
        zero = f"{name}_zero_point"
        if zero in file.spans and not pairs:
            if file.shape(zero) != file.shape(scale):
                raise CheckpointError(f"{zero}: has the shape {file.shape(zero)}, wanted that of {scale}.")
            parts.append(zero)
        word = "mxfp4" if pairs else dtype_name(dtype)
        shown = {"mxfp4": "4-bit floats", "int8": "int8"}.get(word, word.replace("_", " "))
        values = partial(_scaled_pairs if pairs else _scaled, parts=tuple(parts), block=block)
        scales = _scales_in_words(file.shape(scale), block, shape)
        yield name, Form(word, shape, tuple(parts), values, f"in {shown} with {scales}")


def _scale_of(name: str, spans: Mapping[str, Span]) -> str | None:
    owner = name.removesuffix(".weight")
    names = (f"{name}_scale_inv", f"{name}_scale")
    if owner != name:
        names += (f"{owner}.scale", f"{owner}.qscale_weight", f"{owner}.scale_inv")
    return next((n for n in names if n in spans), None)


def _blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Sizes of blocks that config.json names."""
    said = [settings.get("weight_block_size")]
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        said.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    found = []
    for size in said:
        if size is not None:
            rows, columns = checked(size, tuple[Count, Count], "config.json: quantization_config: the size of blocks")
            if rows and columns:
                found.append((rows, columns))
    return found


def _scales_in_words(scale: Sequence[int], block: tuple[int, int], shape: Sequence[int]) -> str:
    if math.prod(scale) == 1:
        return "one scale for each tensor"
    if block[0] == 1 and block[1] == shape[-1]:
        return "a scale for each row"
    if block[0] == shape[-2] and block[1] == shape[-1]:
        return "one scale for each expert"
    return f"scales for blocks of {block[0]} x {block[1]}"


def _scaled(read: Read, parts: Sequence[str], block: tuple[int, int]) -> Tensor:
    values, scale, *zero = (read(part) for part in parts)
    if zero:
        values = values.float() - scaled(torch.ones(values.shape), zero[0].float(), block)
    return scaled(values, scale, block)


def _scaled_pairs(read: Read, parts: Sequence[str], block: tuple[int, int]) -> Tensor:
    return scaled(e2m1(read(parts[0])), read(parts[1]), block)


def _mxfp4(file: _File) -> Found:
    """gpt-oss's experts: (E, out, in / 32, 16) of blocks; transformers holds them as (E, in, out).

    Source: transformers 5.24, integrations/mxfp4.py.
    """
    for name in file.spans:
        if not name.endswith("_blocks") or name.removesuffix("blocks") + "scales" not in file.spans:
            continue
        scales = name.removesuffix("blocks") + "scales"
        shape = file.shape(name)
        if (
            len(shape) != 4
            or shape[-1] != 16
            or file.shape(scales) != shape[:-1]
            or {file.dtype(name), file.dtype(scales)} != {torch.uint8}
        ):
            raise CheckpointError(
                f"{name}: is {file.spans[name].dtype} {shape} and {scales} {file.spans[scales].dtype} {file.shape(scales)}, "
                "wanted MXFP4: U8 of (experts, out, in / 32, 16) and (experts, out, in / 32)."
            )
        yield (
            name.removesuffix("_blocks"),
            Form(
                "mxfp4",
                (shape[0], 32 * shape[2], shape[1]),
                (name, scales),
                partial(_unpacked_mxfp4, blocks=name, scales=scales),
                "in MXFP4, blocks of 32",
            ),
        )


def _unpacked_mxfp4(read: Read, blocks: str, scales: str) -> Tensor:
    return mxfp4(read(blocks), read(scales)).transpose(-1, -2).contiguous()


def _gptq_and_awq(file: _File) -> Found:
    """GPTQ packs along the inputs, AWQ along the outputs: the shapes tell them apart."""
    for name in file.spans:
        if not name.endswith(".qweight"):
            continue
        owner = name.removesuffix("qweight")
        zeros, scales = f"{owner}qzeros", f"{owner}scales"
        if zeros not in file.spans or scales not in file.spans:
            raise CheckpointError(f"{name}: has no {'scales' if zeros in file.spans else 'qzeros'} beside it.")
        words, points, factors = file.shape(name), file.shape(zeros), file.shape(scales)
        if not len(words) == len(points) == len(factors) == 2 or {file.dtype(name), file.dtype(zeros)} != {torch.int32}:
            raise CheckpointError(
                f"{name}: is {file.spans[name].dtype} {words}, qzeros {points}, scales {factors}, wanted matrices of GPTQ or AWQ."
            )
        outputs = factors[1]
        if (
            (words[1] * 8, points) == (outputs, (factors[0], words[1]))
            and words[0]
            and factors[0]
            and not words[0] % factors[0]
        ):
            yield (
                f"{owner}weight",
                Form(
                    "awq4",
                    (outputs, words[0]),
                    (name, zeros, scales),
                    partial(_unpacked_awq, owner=owner),
                    f"in AWQ 4-bit, groups of {words[0] // factors[0]}",
                    turned=True,
                ),
            )
            continue
        yield f"{owner}weight", _gptq(file, owner, words, points, factors)


def _gptq(file: _File, owner: str, words: Sequence[int], points: Sequence[int], factors: Sequence[int]) -> Form:
    index = f"{owner}g_idx" if f"{owner}g_idx" in file.spans else None
    if index is not None:
        inputs = math.prod(file.shape(index))
        bits = words[0] * 32 // inputs if inputs else 0
    else:
        bits = checked(file.settings.get("bits", 4), Count, "config.json: quantization_config: bits")
        inputs = words[0] * 32 // bits if bits else 0
    if (
        bits not in (2, 3, 4, 8)
        or not factors[0]
        or words[0] != math.ceil(inputs * bits / 32)
        or words[1] != factors[1]
        or tuple(points) != (factors[0], math.ceil(factors[1] * bits / 32))
        or (index is None and inputs % factors[0])
    ):
        raise CheckpointError(
            f"{owner}qweight: has the shape {tuple(words)}, qzeros {tuple(points)}, scales {tuple(factors)}, "
            "wanted those of a matrix of GPTQ of 2, 3, 4 or 8 bits, or of AWQ's gemm layout of 4 bits."
        )
    # GPTQModel's gptq_v2 stores zero points as they are; others take 1 off before they store them.
    first = 0 if file.settings.get("checkpoint_format") == "gptq_v2" else 1
    parts = (f"{owner}qweight", f"{owner}qzeros", f"{owner}scales")
    return Form(
        f"gptq{bits}",
        (factors[1], inputs),
        (*parts, index) if index else parts,
        partial(_unpacked_gptq, owner=owner, index=index, inputs=inputs, bits=bits, first=first),
        f"in GPTQ {bits}-bit",
        turned=True,
    )


def _unpacked_awq(read: Read, owner: str) -> Tensor:
    return awq(read(f"{owner}qweight"), read(f"{owner}qzeros"), read(f"{owner}scales"))


def _unpacked_gptq(read: Read, owner: str, index: str | None, inputs: int, bits: int, first: int) -> Tensor:
    scales = read(f"{owner}scales")
    groups = _groups(read, index, inputs, len(scales), owner)
    return gptq(read(f"{owner}qweight"), read(f"{owner}qzeros"), scales, groups, bits, first)


def _groups(read: Read, index: str | None, inputs: int, count: int, owner: str) -> Tensor:
    """(inputs,) int64: the group of each input.

    Raises:
        CheckpointError: a group that has no scale.
    """
    if index is None:
        return torch.arange(inputs) // (inputs // count)
    groups = read(index).long().reshape(-1)
    if len(groups) != inputs or (inputs and not 0 <= int(groups.min()) <= int(groups.max()) < count):
        raise CheckpointError(f"{index}: names groups that {owner}weight has no scales for, wanted 0 to {count - 1}.")
    return groups


def _packed(file: _File) -> Found:
    """compressed-tensors' pack-quantized: whole numbers of few bits, packed along the inputs."""
    for name in file.spans:
        if not name.endswith(".weight_packed") or file.dtype(name) == torch.uint8:
            continue
        owner = name.removesuffix("weight_packed")
        scale, said = f"{owner}weight_scale", f"{owner}weight_shape"
        if scale not in file.spans or said not in file.spans or math.prod(file.shape(said)) != 2:
            raise CheckpointError(f"{name}: has no weight_scale and weight_shape beside it, wanted both.")
        rows, inputs = (int(n) for n in file.read(said).reshape(-1))
        words, factors = file.shape(name), file.shape(scale)
        bits = next((b for b in range(1, 9) if words == (rows, math.ceil(inputs * b / 32))), None) if inputs else None
        zeros = f"{owner}weight_zero_point" if f"{owner}weight_zero_point" in file.spans else None
        index = f"{owner}weight_g_idx" if f"{owner}weight_g_idx" in file.spans else None
        if (
            bits is None
            or file.dtype(name) != torch.int32
            or len(factors) != 2
            or factors[0] != rows
            or not factors[1]
            or (index is None and inputs % factors[1])
            or (zeros is not None and file.shape(zeros) != (math.ceil(rows * bits / 32), factors[1]))
            or (zeros is not None and file.dtype(zeros) != torch.int32)
        ):
            raise CheckpointError(
                f"{name}: is {file.spans[name].dtype} {words} with scales {factors} for a matrix of {(rows, inputs)}, "
                "wanted I32 with 1 to 8 bits for each number and a scale for each row and group."
            )
        parts = tuple(part for part in (name, scale, said, zeros, index) if part is not None)
        size = "" if index else f", groups of {inputs // factors[1]}"
        yield (
            f"{owner}weight",
            Form(
                f"int{bits}",
                (rows, inputs),
                parts,
                partial(_unpacked_rows, owner=owner, zeros=zeros, index=index, inputs=inputs, bits=bits),
                f"in whole numbers of {bits} bits (compressed-tensors{size})",
            ),
        )


def _float4(file: _File) -> Found:
    """NVFP4 and MXFP4 of single matrices: two numbers in a byte along the inputs, 16 or 32 of them with a scale; NVFP4's scales
    are float8 and have one factor for the matrix, by which compressed-tensors divides and modelopt multiplies.

    Source: compressed-tensors 0.20, compressors/nvfp4 and mxfp4; NVIDIA Model Optimizer 0.47, qtensor/nvfp4_tensor.py
        `dequantize`.
    """
    for name in file.spans:
        owner, _, last = name.rpartition(".")
        scale, factor = f"{owner}.weight_scale", f"{owner}.weight_global_scale"
        if last == "weight":
            factor = f"{owner}.weight_scale_2"
            if factor not in file.spans:
                continue
        if last not in ("weight", "weight_packed") or file.dtype(name) != torch.uint8:
            continue
        half, whole = file.shape(name), factor if factor in file.spans else None
        of, wanted = (16, torch.float8_e4m3fn) if whole else (32, torch.uint8)
        shape = (*half[:-1], 2 * half[-1]) if half else ()
        if (
            len(shape) != 2
            or scale not in file.spans
            or file.dtype(scale) != wanted
            or file.shape(scale) != (shape[0], shape[1] / of)
            or (whole is not None and math.prod(file.shape(whole)) != 1)
        ):
            seen = f"{file.spans[scale].dtype} {file.shape(scale)}" if scale in file.spans else "missing"
            raise CheckpointError(
                f"{name}: is U8 {half} and {scale} {seen}, wanted NVFP4 (F8_E4M3 for 16 numbers of a row, and a factor for the "
                "matrix) or MXFP4 (U8 for 32)."
            )
        parts = (name, scale) if whole is None else (name, scale, whole)
        word = "mxfp4" if whole is None else "nvfp4"
        values = partial(_unpacked_float4, parts=parts, of=of, divide=last != "weight")
        yield f"{owner}.weight", Form(word, shape, parts, values, f"in {word.upper()}, blocks of {of}")


def _unpacked_float4(read: Read, parts: Sequence[str], of: int, divide: bool) -> Tensor:
    pairs, scale, *factor = (read(part) for part in parts)
    scale = exponents(scale)
    for whole in factor:
        scale = scale / whole.float() if divide else scale * whole.float()
    return scaled(e2m1(pairs), scale, (1, of))


def _unpacked_rows(read: Read, owner: str, zeros: str | None, index: str | None, inputs: int, bits: int) -> Tensor:
    scale = read(f"{owner}weight_scale")
    groups = _groups(read, index, inputs, scale.shape[1], owner)
    return packed_rows(read(f"{owner}weight_packed"), None if zeros is None else read(zeros), scale, groups, bits)


@dataclass(frozen=True)
class _QuantState:
    """What bitsandbytes writes beside a 4-bit matrix. Source: bitsandbytes 0.50, functional.py, `QuantState.as_dict`."""

    shape: tuple[Count, Count]
    blocksize: _BLOCK_SIZES
    quant_type: Literal["nf4", "fp4"]
    dtype: Literal["float16", "bfloat16", "float32"]
    nested_blocksize: _BLOCK_SIZES | None = None
    nested_dtype: str | None = None
    nested_offset: float | None = None


def _bitsandbytes(file: _File) -> Found:
    """4-bit and 8-bit weights, as `save_pretrained` of a quantized model stores them."""
    beside: dict[str, list[str]] = {}
    for name in file.spans:
        owner, dot, _ = name.partition(".weight.")
        if dot:
            beside.setdefault(f"{owner}.weight", []).append(name)
    for name, parts in beside.items():
        state = next((n for n in parts if re.search(r"\.quant_state\.bitsandbytes__(nf4|fp4)$", n)), None)
        if state is not None and name in file.spans:
            yield (
                name,
                Form(
                    state.rpartition("__")[2],
                    _described(file, name, state).shape,
                    (name, *parts),
                    partial(_unpacked_4bit, parts=(name, *parts)),
                    "in bitsandbytes 4-bit",
                ),
            )
    for name, span in file.spans.items():
        scales = f"{name.removesuffix('weight')}SCB"
        if not name.endswith(".weight") or scales not in file.spans:
            continue
        rows = file.spans[scales]
        if (span.dtype, rows.dtype, math.prod(rows.shape)) != ("I8", "F32", (span.shape or (0,))[0]):
            raise CheckpointError(f"{name}: is no int8 matrix with a scale in float32 for each row.")
        values = partial(_unpacked_int8, name=name, scales=scales)
        yield name, Form("int8", span.shape, (name, scales), values, "in bitsandbytes 8-bit")


def _unpacked_4bit(read: Read, parts: Sequence[str]) -> Tensor:
    return dequantize_4bit(read(parts[0]), {part: read(part) for part in parts[1:]})


def _unpacked_int8(read: Read, name: str, scales: str) -> Tensor:
    return int8_values(read(name), read(scales))


def _described(file: _File, name: str, state: str) -> _QuantState:
    """The state of a 4-bit matrix, whose parts are as large as it says: bitsandbytes' own code does not look.

    Raises:
        CheckpointError: it is damaged.
    """
    text = bytes(file.read(state).view(torch.uint8).numpy()).decode("utf-8", "replace")
    found = checked(parse_json(text, state), _QuantState, state)
    values = math.prod(found.shape)
    blocks = -(-values // found.blocksize)
    wanted = {"": (values + 1) // 2, ".absmax": blocks, ".quant_map": 16}
    if found.nested_blocksize is not None:
        wanted |= {".nested_absmax": -(-blocks // found.nested_blocksize), ".nested_quant_map": 256}
    for part, count in wanted.items():
        span = file.spans.get(f"{name}{part}")
        if span is None or math.prod(span.shape) != count:
            seen = "missing" if span is None else f"of the shape {span.shape}"
            raise CheckpointError(
                f"{name}{part}: is {seen}, wanted {count} values for a 4-bit matrix of {found.shape}."
            )
    return found


_FINDERS: tuple[Callable[[_File], Found], ...] = (_bitsandbytes, _float8, _mxfp4, _gptq_and_awq, _packed, _float4)
