"""export_gguf: a checkpoint, or an adapter as a LoRA, in llama.cpp's file format, written by the published `gguf` package.

What its readers fix and no package says: Llama's rotary halves lie interleaved (`_turned`), a LoRA's scale is one alpha over each
tensor's own rank (`_factors`), text is split by a rule that is known by name (`gguf_tokens`).
Sources: llama.cpp, docs/development/HOWTO-add-model.md, src/llama-model.cpp, src/llama-adapter.h and gguf-py.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError, OptionError, near_matches, quoted
from ..records import whole_file, write_text
from ..weights import FileWeights, holds_adapter, open_weights
from ..weights.updates import LowRank
from .adapters import open_adapter, open_base, updates_of
from .gguf_tokens import add_tokenizer

TYPES = ("f32", "f16", "bf16", "q8_0")
_BY_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes a family of models.

    Attributes:
        name: llama.cpp's architecture.
        interleaved: its rotary embedding turns neighbouring rows of a head's queries and keys, where transformers turns row i
            and row i + d/2.
    """

    name: str
    interleaved: bool = False


# By transformers' model_type.
FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
}


@dataclass(frozen=True)
class _Model:
    """A model's config in the words that are needed here."""

    family: Family
    config: Mapping[str, Any]
    heads: int
    kv_heads: int
    head: int
    blocks: int

    def stored_name(self, name: str) -> str | None:
        """The name in the file of a parameter of transformers' model."""
        import gguf

        arch = next(key for key, word in gguf.MODEL_ARCH_NAMES.items() if word == self.family.name)
        found: str | None = gguf.get_tensor_name_map(arch, self.blocks).get_name(
            name, try_suffixes=(".weight", ".bias")
        )
        return found


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file.

    Attributes:
        shape: rows first, as in torch. kind: of `gguf.GGMLQuantizationType`.
        read: gives the values, float.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], Tensor]


def export_gguf(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str | None = None,
    modelfile: bool = False,
    base: str | None = None,
) -> Path:
    """Write a checkpoint, or an adapter of low rank as a LoRA, as a `.gguf` file, one tensor in memory at a time.

    Matrices are stored in one type, vectors and a LoRA's factors in float32. A LoRA's factors are scaled so that llama.cpp's
    reader, alpha over the tensor's own rank, gives every module its scale: exact where the quotient is a power of two (`lora`,
    `alors`), rounded once to float32 where it is not.

    Args:
        source: folder of a plain checkpoint (merged, or trained in `full` or `spectrum`), a hub id, or a folder of an adapter.
        out: the file; replaced when the new one is whole.
        type: of the matrices of a checkpoint: f32, f16, bf16 or q8_0; None: as the checkpoint stores them.
        modelfile: also write Ollama's `Modelfile` beside it.
        base: what the Modelfile of a LoRA starts FROM: a model of Ollama or a `.gguf` of the same base.
    Raises:
        OptionError: an option that does not fit; an adapter that is no LoRA on matrices alone (merge it).
        CheckpointError: a family, a rotary embedding or a tokenizer that is not known here; something is missing or damaged.
    """
    path = Path(out)
    if type is not None and type not in TYPES:
        raise OptionError(f"type is {type!r}." + near_matches(type, TYPES))
    adapter = holds_adapter(Path(source))
    if adapter and type is not None:
        raise OptionError(f"type={type!r} is for a checkpoint; a LoRA's factors are stored in float32.")
    if base is not None and not (adapter and modelfile):
        raise OptionError(
            f"base={base!r} is what the Modelfile of an adapter starts from: for an adapter, with modelfile=True."
        )
    if adapter and modelfile and base is None:
        raise OptionError(
            "modelfile=True: an adapter's needs base=, a model of Ollama or a .gguf file of the same base."
        )
    if path.is_dir():
        raise OptionError(f"{path}: is a folder, wanted the name of a file.")
    for made in [path, *([path.parent / "Modelfile"] if modelfile else [])]:
        if made.is_file():
            raise OptionError(f"{made}: is there already; remove it, or name another file.")
    with whole_file(path) as part:
        if adapter:
            _write_adapter(source, part)
        else:
            _write_model(source, part, type, path.stem)
    if modelfile:
        lines = [f"FROM {base}", f"ADAPTER ./{path.name}"] if adapter else [f"FROM ./{path.name}"]
        write_text(path.parent / "Modelfile", "\n".join(lines) + "\n")
    return path


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def _write_model(source: str | os.PathLike[str], path: Path, chosen: str | None, name: str) -> None:
    import gguf

    files = open_weights(source)
    if not isinstance(files, FileWeights) or files.folder is None:
        raise CheckpointError(f"{source}: is no checkpoint, wanted a folder with config.json and safetensors files.")
    model = _model_of(files)
    kinds = {t.dtype for t in files.tensors() if len(t.shape) > 1}
    unknown = sorted(kinds - _BY_DTYPE.keys())
    if unknown:
        raise CheckpointError(f"{source}: holds weights in {unknown[0]}, wanted a float checkpoint; merge onto one.")
    if chosen is None:
        chosen = "f32" if "float32" in kinds else _BY_DTYPE[min(kinds)]
    entries = list(_entries(files, model, gguf.GGMLQuantizationType[chosen.upper()]))
    writer = gguf.GGUFWriter(path, model.family.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    _add_config(writer, model)
    rows = next(t.shape[0] for t in files.tensors() if t.role == "embedding")
    add_tokenizer(writer, files.folder, rows)
    word = "ALL_F32" if chosen == "f32" else f"MOSTLY_{chosen.upper()}"
    writer.add_file_type(gguf.LlamaFileType[word])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write(writer, entries)


def _entries(files: FileWeights, model: _Model, kind: Any) -> Iterator[_Entry]:
    import gguf

    single = gguf.GGMLQuantizationType.F32
    factors = _rope_factors(model)
    if factors is not None:
        yield _Entry("rope_freqs.weight", tuple(factors.shape), single, lambda: factors)
    for info in files.tensors():
        if info.name == "lm_head.weight" and model.config.get("tie_word_embeddings"):
            continue
        stored = model.stored_name(info.name)
        if stored is None:
            raise CheckpointError(
                f"{files.folder}: {info.name} has no name in llama.cpp's architecture {model.family.name!r}; convert it with "
                "llama.cpp's own convert_hf_to_gguf.py."
            )
        as_stored = single if len(info.shape) == 1 else kind
        if as_stored is gguf.GGMLQuantizationType.Q8_0 and info.shape[-1] % gguf.GGML_QUANT_SIZES[as_stored][0]:
            as_stored = gguf.GGMLQuantizationType.F16  # as llama.cpp's converter does where rows are no whole blocks
        yield _Entry(stored, info.shape, as_stored, _reader(files, model, info.name))


def _reader(files: FileWeights, model: _Model, name: str) -> Callable[[], Tensor]:
    return lambda: _turned(model, name, files.read(name))


def _turned(model: _Model, name: str, value: Tensor) -> Tensor:
    """Rows of queries and keys as llama.cpp's rotary embedding wants them: (2, d/2) of each head become (d/2, 2)."""
    owner = names.module_name(name).rpartition(".")[2]
    if not model.family.interleaved or owner not in ("q_proj", "k_proj"):
        return value
    heads = model.heads if owner == "q_proj" else model.kv_heads
    return value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _model_of(files: FileWeights) -> _Model:
    """
    Raises:
        CheckpointError: a family that is not known here, or a config that lacks a size.
    """
    config = files.config
    kind = str(config.get("model_type"))
    where = f"{files.folder}: config.json"
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {quoted(kind)}; known here are {', '.join(sorted(FAMILIES))}. Convert others with "
            "llama.cpp's own convert_hf_to_gguf.py."
        )
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "rms_norm_eps"):
        if not isinstance(config.get(name), int | float):
            raise CheckpointError(f"{where}: {name} is {quoted(config.get(name))}, wanted a number.")
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return _Model(FAMILIES[kind], config, heads, kv_heads, head, config["num_hidden_layers"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters; transformers 5 has them in one field, earlier versions in two."""
    return {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }


def _add_config(writer: Any, model: _Model) -> None:
    import gguf

    config, rope = model.config, _rope(model.config)
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(model.blocks)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(model.head)
    if model.head * model.heads != config["hidden_size"]:
        writer.add_key_length(model.head)
        writer.add_value_length(model.head)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise CheckpointError(
            f"config.json: rope_type is {quoted(kind)}; known here are default, linear and llama3. Convert it with "
            "llama.cpp's own convert_hf_to_gguf.py."
        )


def _rope_factors(model: _Model) -> Tensor | None:
    """What the rotary frequencies are divided by, (head / 2,), for Llama 3's longer contexts.

    Source: the rule of Llama 3.1 as Meta published it (models/llama3/reference_impl, `apply_scaling`): wavelengths above
    original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor stay, between them the two
    are mixed.
    """
    rope = _rope(model.config)
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    found = []
    for i in range(0, model.head, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (i / model.head)
        stays = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        found.append(1 / ((1 - stays) / factor + stays))
    return torch.tensor(found)


# --- an adapter ------------------------------------------------------------------------------------------------------


def _write_adapter(source: str | os.PathLike[str], path: Path) -> None:
    import gguf

    trained = open_adapter(source)
    files = open_base(trained.state.base, trained)
    model = _model_of(files)
    merge = "merge it, and export the merged checkpoint."
    updates = updates_of(trained, files)
    for update in updates:
        if not isinstance(update, LowRank) or update.table or update.magnitude is not None:
            raise OptionError(
                f"{trained.state.where}: {update.name} is changed by more than a product of two matrices, which llama.cpp's LoRA "
                f"does not hold; {merge}"
            )
    low = [update for update in updates if isinstance(update, LowRank)]
    if not low:
        raise OptionError(f"{trained.state.where}: holds no low-rank update; {merge}")
    alpha = Counter(u.scale * u.a.shape[0] for u in low).most_common(1)[0][0]
    entries = []
    for update in low:
        stored = model.stored_name(update.name)
        if stored is None or update.experts is not None or update.turned:
            raise OptionError(f"{trained.state.where}: {update.name} has no place in llama.cpp's LoRA; {merge}")
        kind = gguf.GGMLQuantizationType.F32
        b, a = _factors(model, update, alpha)
        entries += [
            _Entry(f"{stored}.lora_a", tuple(a.shape), kind, lambda a=a: a),
            _Entry(f"{stored}.lora_b", tuple(b.shape), kind, lambda b=b: b),
        ]
    writer = gguf.GGUFWriter(path, model.family.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    _write(writer, entries)


def _factors(model: _Model, update: LowRank, alpha: float) -> tuple[Tensor, Tensor]:
    """(B, A), float32, for a reader that multiplies B A by alpha / rank. Rows of B are rows of the matrix."""
    b, a, scale = update.factors()
    b = (b.double() * (scale * a.shape[0] / alpha)).float()
    return _turned(model, update.name, b), a.float()


# --- the file --------------------------------------------------------------------------------------------------------


def _write(writer: Any, entries: list[_Entry]) -> None:
    """Header, then the tensors one after the other."""
    import gguf

    for entry in entries:
        count, size = gguf.GGML_QUANT_SIZES[entry.kind]
        bytes_of = math.prod(entry.shape) // count * size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), bytes_of, entry.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            values = entry.read().float().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(values, entry.kind))
    finally:
        writer.close()
