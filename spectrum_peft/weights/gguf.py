"""Weights in a `.gguf` file, under the names of transformers' model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError, no_such, quoted
from ..records import Fingerprint, checked
from ..records.schema import Count, Name
from .parameters import Logical
from .shards import ends_of, read_bytes
from .source import TensorInfo, split_found, structure_of

# gguf architectures whose transformers twin has Llama's module names. Source: gguf.constants.MODEL_TENSORS and the
# conversion classes of llama.cpp.
_GGUF_LLAMA_LIKE = frozenset({"llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3"})
_GGUF_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_INSIDE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_GGUF_EXCEPT = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    **{
        arch: {
            "ffn_norm": "pre_feedforward_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
        for arch in ("gemma2", "gemma3")
    },
}
# Limits of a header. llama.cpp has at most 4 dimensions (GGML_MAX_DIMS); the longest text is a chat template.
_MOST_TEXT = 1 << 24
_MOST_DIMENSIONS = 4
_Alignment = Literal[8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
# Frequencies that transformers computes from the config.
_GGUF_SKIPPED = re.compile(r"(^|\.)rope_(freqs|factors_long|factors_short)\.weight$")


class _GgufSpan(NamedTuple):
    kind: int  # GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as in torch
    begin: int
    end: int


class GgufWeights:
    """A GGUF file of an architecture with Llama's module names, dequantized one tensor at a time.

    Raises:
        CheckpointError: not GGUF, truncated, or of an architecture whose names are not known here.
    """

    kind: Literal["gguf"] = "gguf"
    received: int | None = None
    revision: str | None = None
    folder: Path | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.model_id = path, str(path)
        self.metadata, self._spans = read_gguf_header(path)
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in _GGUF_LLAMA_LIKE:
            raise CheckpointError(
                f"{path}: general.architecture is {quoted(self.architecture)}, wanted one of {sorted(_GGUF_LLAMA_LIKE)};"
                " convert it with transformers (from_pretrained(..., gguf_file=...)) and scan the model."
            )
        self._logical = {item.info.name: item for item in self._present()}
        kinds = sorted({t.dtype for t in self.tensors() if len(t.shape) > 1})
        self.notes = (f"weights are stored as {', '.join(kinds)}; they were dequantized one tensor at a time",)
        self.tied: tuple[tuple[str, ...], ...] = ()
        if "output.weight" not in self._spans:
            self.tied = (("model.embed_tokens.weight", "lm_head.weight"),)

    def _present(self) -> Iterator[Logical]:
        from gguf import GGMLQuantizationType

        renames = {**_GGUF_INSIDE, **_GGUF_EXCEPT.get(self.architecture, {})}
        for stored, span in self._spans.items():
            if _GGUF_SKIPPED.search(stored):
                continue
            parts: tuple[tuple[str, ...], ...] = ((stored,),)
            match = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)", stored)
            shape = span.shape
            if stored in _GGUF_OUTSIDE:
                live = _GGUF_OUTSIDE[stored]
            elif match and match[2] in renames:
                live = f"model.layers.{match[1]}.{renames[match[2]]}.{match[3]}"
            elif match and match[2] in {"ffn_gate_exps", "ffn_down_exps"}:
                owner = f"model.layers.{match[1]}.mlp.experts"
                live = f"{owner}.down_proj"
                if match[2] == "ffn_gate_exps":
                    live, up = f"{owner}.gate_up_proj", stored.replace("gate", "up")
                    if up not in self._spans or not len(shape) == len(self._spans[up].shape) == 3:
                        raise CheckpointError(
                            f"{self.path}: {stored!r} and {up!r}: wanted both, a matrix for each expert."
                        )
                    parts, shape = ((stored, up),), (shape[0], shape[1] + self._spans[up].shape[1], shape[2])
            elif match and match[2] == "ffn_up_exps":
                continue
            else:
                raise CheckpointError(
                    f"{self.path}: tensor {stored!r} has no known name in a {self.architecture} model."
                )
            role = names.role(live, shape)
            dtype = GGMLQuantizationType(span.kind).name.lower()
            yield Logical(TensorInfo(live, shape, dtype, role, shape[0] if len(shape) == 3 else None), parts)

    def tensors(self) -> list[TensorInfo]:
        return [item.info for item in self._logical.values()]

    def read(self, name: str) -> Tensor:
        item, expert = split_found(name, self._logical, self.path)
        stored = item.parts[0]
        weight = (
            torch.cat([self._stored(part, expert) for part in stored], dim=-2)
            if len(stored) > 1
            else self._stored(stored[0], expert)
        )
        if self.architecture == "llama" and stored[0].endswith(("attn_q.weight", "attn_k.weight")):
            return _unpermute(weight, self._heads(stored[0]))
        if self.architecture.startswith("gemma") and item.info.role == "norm":
            return weight - 1  # transformers' Gemma norms multiply by 1 + weight, llama.cpp stores the sum
        return weight

    def _heads(self, stored: str) -> int:
        heads = self.metadata.get("llama.attention.head_count")
        key = "llama.attention.head_count_kv" if "attn_k" in stored else "llama.attention.head_count"
        found = checked(self.metadata.get(key, heads), Count, f"{self.path}: {key}")
        rows = self._spans[stored].shape[0]
        if found == 0 or rows % (2 * found):
            raise CheckpointError(
                f"{self.path}: {key} is {found}, wanted a number of heads that {rows} rows divide into, by two."
            )
        return found

    def _stored(self, name: str, expert: int | None = None) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        span = self._spans[name]
        begin, end, shape = span.begin, span.end, span.shape
        if expert is not None:
            size = (end - begin) // shape[0]
            begin, end, shape = begin + expert * size, begin + (expert + 1) * size, shape[1:]
        raw = read_bytes(self.path, begin, end)
        kind = GGMLQuantizationType(span.kind)
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(
            kind.name
        )
        if plain:
            return raw.view(plain).reshape(shape)
        try:
            values = dequantize(raw.numpy(), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as {kind.name}, which gguf cannot dequantize."
            ) from error
        return torch.from_numpy(values).reshape(shape)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(structure_of(self.tensors()), None, "gguf")

    def identity(self) -> str:
        digest = hashlib.sha256()
        for name, span in self._spans.items():
            digest.update(json.dumps([name, span.kind, list(span.shape)]).encode())
            for begin, end in ends_of(span.begin, span.end):
                digest.update(read_bytes(self.path, begin, end).numpy().data)
        return digest.hexdigest()


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in transformers' order: llama.cpp interleaves the two halves of each head's rotary dimensions.

    Source: llama.cpp convert_hf_to_gguf.py, `LlamaModel.permute`, undone.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, _GgufSpan]]:
    """Metadata (arrays left out) and the place of every tensor in a GGUF file.

    gguf's own reader maps the file and makes an array of every token of the vocabulary, 3 s for a 98 MB file; this one
    skips over arrays.

    Raises:
        CheckpointError: not there, not GGUF, of another version, or truncated.
    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    import struct

    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size

            def number(form: str) -> Any:
                return struct.unpack(form, file.read(struct.calcsize(form)))[0]

            def skip(length: int) -> None:
                if length > total - file.tell():
                    raise struct.error("something is longer than the file")
                file.seek(length, os.SEEK_CUR)

            def text() -> str:
                length = number("<Q")
                if length > _MOST_TEXT:
                    raise struct.error(f"a text has {length} bytes, more than {_MOST_TEXT}")
                return file.read(length).decode("utf-8", "replace")

            def value(kind: int) -> Any:
                if kind == 8:
                    return text()
                if kind != 9:
                    return number(sizes[kind])
                inner, count = number("<I"), number("<Q")
                if inner == 9:
                    raise struct.error("an array of arrays, which no writer makes")
                if inner in sizes:
                    skip(struct.calcsize(sizes[inner]) * count)
                else:
                    for _ in range(count):
                        skip(number("<Q"))
                return None

            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file, it does not start with 'GGUF'.")
            version = number("<I")
            if version not in (2, 3):
                raise CheckpointError(f"{path}: GGUF version is {version}, wanted 2 or 3.")
            tensors, pairs = number("<Q"), number("<Q")
            metadata = {}
            for _ in range(pairs):
                key = text()
                metadata[key] = value(number("<I"))
            rows = []
            for _ in range(tensors):
                name, dimensions = text(), number("<I")
                if dimensions > _MOST_DIMENSIONS:
                    raise struct.error(f"a tensor has {dimensions} dimensions, more than {_MOST_DIMENSIONS}")
                shape = tuple(number("<Q") for _ in range(dimensions))[::-1]
                rows.append((name, shape, number("<I"), number("<Q")))
            align = checked(metadata.get("general.alignment", 32), _Alignment, f"{path}: general.alignment")
            start = (file.tell() + align - 1) // align * align
    except FileNotFoundError:
        raise CheckpointError(no_such("file", path)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (struct.error, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path}: truncated or not GGUF: its header cannot be read ({error}).") from error
    spans: dict[str, _GgufSpan] = {}
    checked([name for name, *_ in rows], list[Name], f"{path}: names of tensors")
    for name, shape, kind, offset in sorted(rows, key=lambda row: row[3]):
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {kind}.") from error
        if shape and shape[-1] % block:
            raise CheckpointError(
                f"{path}: tensor {name!r} has rows of {shape[-1]} values, wanted whole blocks of {block}."
            )
        begin, end = start + offset, start + offset + math.prod(shape) // block * size
        if end > total:
            raise CheckpointError(f"{path}: tensor {name!r} ends at byte {end}, the file has {total}: it is truncated.")
        before = next(reversed(spans), None)
        if name in spans or (before is not None and begin < spans[before].end):
            raise CheckpointError(f"{path}: tensor {name!r} is there twice, or lies over {before!r}.")
        spans[name] = _GgufSpan(kind, shape, begin, end)
    # In the order of the header, which is that of the blocks.
    return metadata, {name: spans[name] for name, *_ in rows}
