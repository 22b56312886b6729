"""The only reader of raw weights: one tensor at a time, from safetensors files, a live model or a GGUF file.

Names are those of the live model. Files that keep one tensor per expert where transformers fuses them are presented
fused, `model.layers.0.mlp.experts.gate_up_proj` of shape (E, 2I, H), and read by expert, `...gate_up_proj[3]`.

Files are read with `pread` into fresh memory, not mapped: mapped pages count as resident until the mapping goes, and a
scan of shards would end up holding the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import names
from .errors import CheckpointError, near_matches
from .records import Fingerprint, read_mapping

if TYPE_CHECKING:
    pass

# safetensors' dtype tags, https://github.com/huggingface/safetensors, `Dtype`.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_SAMPLE = 64 * 1024  # bytes of each end of a tensor that the fingerprint covers
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Model types whose blocks are built of transformers' Conv1D, which stores (in, out).
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"})
_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
# Buffers that old files carry among the weights.
_BUFFERS = re.compile(
    r"(rotary_emb|rotary_pos_emb)\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$|position_ids$"
)
_EXPERT = re.compile(
    r"^(?P<owner>.*\.experts)\.(?P<expert>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$"
)
_EXPERT_NAME = re.compile(r"^(.*)\[(\d+)\]$")


# --- what a source is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """One parameter, before anything of it is read.

    Attributes:
        name: full parameter name in the base model.
        shape: of the parameter; of the dequantized matrix where it is stored quantized.
        dtype: as stored, `bfloat16`; `nf4`, `int8` or `q4_1` for quantized ones.
        role: one of `names.ROLES`.
        experts: number of experts of a fused parameter, (E, out, in), read as `name[e]`; None for any other.
        transposed: stored as (in, out), as transformers' Conv1D does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    experts: int | None = None
    transposed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@runtime_checkable
class WeightSource(Protocol):
    """Where weights come from. Safe to read from several threads at once.

    Attributes:
        model_id: hub id or folder; None for a model in memory without a name.
        revision: commit of the hub, where known.
        folder: local folder of the checkpoint, None without one.
        kind: `file`, `live` or `gguf`.
        notes: what the reader of a report must know.
        tied: groups of names that are one tensor, (kept name, other names...).
    """

    @property
    def model_id(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def kind(self) -> Literal["file", "live", "gguf"]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def tied(self) -> tuple[tuple[str, ...], ...]: ...

    def tensors(self) -> list[TensorInfo]:
        """All parameters in checkpoint order, tied ones once where they are stored once."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, or one expert `name[e]` of a fused one, dequantized where it is quantized.

        Returns:
            A tensor of the parameter's shape in a floating dtype. From files it is fresh memory; from a live model it
            may be the model's own: do not change it.
        Raises:
            CheckpointError: no such tensor (near names are shown), or its bytes cannot be read.
        """
        ...

    def fingerprint(self) -> Fingerprint:
        """Identity, see `records.Fingerprint`."""
        ...

    def identity(self) -> str:
        """A key for caches: differs whenever a sampled byte of any tensor does, for live models too."""
        ...


def split_expert(name: str) -> tuple[str, int | None]:
    """`a.gate_up_proj[3]` -> (`a.gate_up_proj`, 3); a name without brackets -> (name, None)."""
    match = _EXPERT_NAME.match(name)
    return (match[1], int(match[2])) if match else (name, None)


def structure_of(tensors: Iterable[TensorInfo]) -> str:
    """sha256 of the sorted (name, shape) of the matrices in the blocks, names without the base-model prefix."""
    rows = sorted(
        (where, list(t.shape)) for t in tensors if t.role == "linear" and (where := names.canonical(t.name)) is not None
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def open_weights(model_or_path: Any, revision: str | None = None) -> WeightSource:
    """Open whatever holds weights, reading headers only.

    Args:
        model_or_path: an `nn.Module` (a PeftModel gives W + dW under the base's names); a folder with safetensors
            files, one such file, a `.gguf` file; or a hub id, of which safetensors and json files are fetched.
        revision: branch, tag or commit of a hub id.
    Raises:
        CheckpointError: not there; empty, truncated or not safetensors; a shard missing; only pickle files; a
            quantization that cannot be undone here.
    """
    if isinstance(model_or_path, nn.Module):
        return LiveWeights(model_or_path)
    return open_located(*locate(model_or_path, revision))


def locate(model_or_path: str | os.PathLike[str], revision: str | None = None) -> tuple[Path, str, str | None]:
    """Where a checkpoint or adapter lies: (file or folder, what it is called, revision); a hub id is fetched.

    Raises:
        CheckpointError: not there, or it cannot be fetched.
    """
    if not isinstance(model_or_path, str | os.PathLike):
        kind = type(model_or_path).__name__
        raise CheckpointError(f"the weights to open are a {kind}, wanted a model, a path or a hub id.")
    path = Path(model_or_path).expanduser()
    if path.exists():
        return path, str(path), None
    text = os.fspath(model_or_path)
    if text.count("/") > 1 or text.startswith((".", "~", "/")) or path.suffix in {".gguf", ".safetensors", *_PICKLES}:
        raise CheckpointError(f"{path}: no such file or folder.")
    folder = fetch(text, revision)
    # A snapshot of the hub's cache lies in a folder named by its commit.
    return folder, text, folder.name if folder.parent.name == "snapshots" else revision


def open_located(path: Path, model_id: str, revision: str | None) -> WeightSource:
    """`open_weights` of a file or folder that is there."""
    if path.is_dir():
        if holds_adapter(path):
            raise CheckpointError(f"{path}: holds an adapter, wanted a model; adapter_config.json names its base.")
        return FileWeights(find_shards(path), model_id=model_id, revision=revision, folder=path)
    if path.suffix == ".gguf":
        return GgufWeights(path)
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path}: pickle files are not read, wanted safetensors.{_CONVERT}")
    return FileWeights([path], model_id=model_id)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is that of a PEFT adapter and not of a model."""
    return (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors"))


_CONVERT = " Convert them: AutoModel.from_pretrained(folder).save_pretrained(new_folder) writes safetensors."


def fetch(model_id: str, revision: str | None, patterns: Sequence[str] = ("*.safetensors", "*.json")) -> Path:
    """The local snapshot of a hub repository, with the files of its top folder that match the patterns.

    Raises:
        CheckpointError: no such repository, or it is not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*", "consolidated*.safetensors"],
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"{model_id!r} is neither a file, a folder nor a hub id: {_one_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model_id!r}: no such file or folder here, not in the hub's cache, and the hub cannot be reached."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(f"{model_id!r}{at} cannot be fetched from the hub: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- safetensors files -----------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Where a tensor lies in a safetensors file.

    Attributes:
        dtype: safetensors' tag, `BF16`.
        shape: as stored.
        begin, end: byte range in the file (not in its data part); end - begin is the tensor's size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | os.PathLike[str]) -> dict[str, Span]:
    """The header of a safetensors file: {name: Span} in order of the bytes; every range is checked against the file.

    Raises:
        CheckpointError: not there, empty, truncated, not safetensors, or ranges that overlap, leave holes or do not fit
            shape and dtype; the message names file and tensor.
    Source: https://github.com/huggingface/safetensors#format
    """
    path = Path(path)
    header, data_start, size = _raw_header(path)
    spans = []
    for name, row in header.items():
        if name == "__metadata__":
            continue
        where = f"{path}: tensor {name!r}"
        try:
            tag, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{where}: its header entry is {row!r}, wanted dtype, shape and data_offsets."
            ) from error
        if tag not in DTYPES:
            raise CheckpointError(f"{where}: dtype is {tag!r}, wanted one of {sorted(DTYPES)}.")
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
            raise CheckpointError(f"{where}: shape {shape} and offsets [{begin}, {end}], wanted integers from 0 up.")
        wanted = math.prod(shape) * DTYPES[tag].itemsize
        if end - begin != wanted:
            raise CheckpointError(
                f"{where}: offsets [{begin}, {end}] hold {end - begin} bytes, wanted {wanted} for {tag} {shape}."
            )
        if data_start + end > size:
            raise CheckpointError(
                f"{where}: ends at byte {data_start + end}, the file has {size}: it is truncated, fetch it again."
            )
        spans.append((name, Span(tag, shape, data_start + begin, data_start + end)))
    spans.sort(key=lambda item: (item[1].begin, item[1].end))
    at, before = data_start, "the header"
    for name, span in spans:
        if span.begin != at:
            what = "overlaps" if span.begin < at else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {span.begin}, wanted {at}: it {what} {before}."
            )
        at, before = span.end, f"{name!r}"
    if at != size:
        raise CheckpointError(f"{path}: the tensors end at byte {at}, the file has {size}, wanted them equal.")
    return dict(spans)


def _raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, first byte of the data, size of the file)."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty, wanted safetensors.")
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _HEADER_LIMIT or length > size - 8:
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated: its first 8 bytes ask for a header of {length}"
                    f" bytes, the file has {size}."
                )
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: not a safetensors file: its header is a {type(header).__name__}, wanted a mapping."
        )
    return header, 8 + length, size


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in a folder, as transformers would choose them.

    `model.safetensors`; else the shards of `model.safetensors.index.json`; else `model-00001-of-0000N.safetensors`, all
    N; else every safetensors file there is.

    Raises:
        CheckpointError: none (pickle or GGUF files are named), or a shard that the index or the numbering names is
            missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        mapping = read_mapping(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{index}: field 'weight_map' is {type(mapping).__name__}, wanted {{tensor: file}}.")
        files = []
        for name in dict.fromkeys(mapping.values()):
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index}: names the file {name!r}, wanted a plain file name in the same folder.")
            if not (folder / name).is_file():
                first = next(tensor for tensor, where in mapping.items() if where == name)
                raise CheckpointError(f"{folder / name}: no such file, but {index.name} names it (for {first!r}).")
            files.append(folder / name)
        return sorted(files)
    found = sorted(folder.glob("*.safetensors"))
    numbered = {path: re.fullmatch(r".*-(\d+)-of-(\d+)\.safetensors", path.name) for path in found}
    shards = [path for path, match in numbered.items() if match]
    if shards:
        match = numbered[shards[0]]
        assert match is not None
        total = int(match[2])
        present = {int(m[1]) for m in numbered.values() if m}
        missing = sorted(set(range(1, total + 1)) - present)
        if missing:
            raise CheckpointError(
                f"{folder}: of {total} shards number {missing[0]} is missing (have {sorted(present)})."
            )
        return shards
    if found:
        return found
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if others:
        raise CheckpointError(f"{folder}: holds only pickle files ({others[0]}), which are not read.{_CONVERT}")
    ggufs = sorted(p for p in folder.iterdir() if p.suffix == ".gguf")
    if ggufs:
        raise CheckpointError(f"{folder}: no safetensors file; give the GGUF file itself: {ggufs[0]}")
    raise CheckpointError(f"{folder}: no safetensors file, wanted model.safetensors or shards of it.")


@dataclass(frozen=True)
class _Logical:
    """A parameter of the live model and the stored tensors it is made of: `parts[e]` are joined along the rows.

    `slab` means that one stored tensor holds all experts, one after the other.
    """

    info: TensorInfo
    parts: tuple[tuple[str, ...], ...]
    slab: bool = False


class FileWeights:
    """A checkpoint in safetensors files.

    Args:
        files: all of its files; `config.json` is read beside the first.
        model_id, revision: what it is called.
        folder: that the files make up, None for a file that was given alone.
    """

    kind: Literal["file"] = "file"

    def __init__(
        self,
        files: Sequence[Path],
        model_id: str | None = None,
        revision: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.model_id, self.revision, self.folder = model_id, revision, folder
        self.files = tuple(files)
        self.notes: tuple[str, ...] = ()
        self._spans: dict[str, tuple[Path, Span]] = {}
        for path in self.files:
            for name, span in read_header(path).items():
                if name in self._spans:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is also in {self._spans[name][0].name}, wanted it once."
                    )
                self._spans[name] = (path, span)
        index = self.files[0].with_name("model.safetensors.index.json")
        if folder and index.is_file() and self.files[0].name != "model.safetensors":
            for name, file in read_mapping(index)["weight_map"].items():
                if name not in self._spans:
                    raise CheckpointError(f"{index}: tensor {name!r} should be in {file}, and is not.")
        config = self.files[0].with_name("config.json")
        self.config: dict[str, Any] = read_mapping(config) if config.is_file() else {}
        self._quantization = self._quantization_method()
        if self._quantization:
            self.notes += (f"weights are stored {self._quantization}; they were dequantized one matrix at a time",)
        self._logical = {item.info.name: item for item in self._present()}
        if not self._logical:
            raise CheckpointError(f"{self.files[0]}: holds no floating-point tensors.")
        self.tied = self._tied()

    # -- what is there

    def _quantization_method(self) -> str | None:
        settings = self.config.get("quantization_config")
        if not isinstance(settings, dict):
            return None
        method = str(settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "unknown"))
        if method != "bitsandbytes":
            raise CheckpointError(
                f"{self.files[0].parent}: weights are quantized by {method!r}, wanted float or bitsandbytes weights; use"
                " the checkpoint they were quantized from."
            )
        return f"in bitsandbytes {'4-bit' if settings.get('load_in_4bit') else '8-bit'}"

    def _present(self) -> Iterator[_Logical]:
        """Stored tensors as parameters of the live model, in checkpoint order."""
        fused: dict[str, dict[int, dict[str, str]]] = {}
        renamed_moe = any(".block_sparse_moe.experts." in name for name in self._spans)
        conv1d = self.config.get("model_type") in _CONV1D_MODELS
        for name in self._spans:
            match = _EXPERT.match(name)
            if match:
                fused.setdefault(match["owner"], {}).setdefault(int(match["expert"]), {})[match["part"]] = name
        for name, (_path, span) in self._spans.items():
            match = _EXPERT.match(name)
            if match:
                owner = match["owner"]
                if owner in fused:  # the first of them stands for all
                    yield from self._fuse(owner, fused.pop(owner))
                continue
            quantized = self._quantized_info(name)
            if quantized:
                yield quantized
                continue
            dtype = DTYPES[span.dtype]
            if not dtype.is_floating_point or _is_buffer(name, span.shape) or self._belongs_to_quantized(name):
                continue
            # transformers 5, conversion_mapping.py, "mixtral": `.block_sparse_moe.` -> `.mlp.`; GPTNeoXForCausalLM:
            # `embed_out.` -> `lm_head.`
            live = name.replace(".block_sparse_moe.", ".mlp.") if renamed_moe else name
            live = re.sub(r"^embed_out\.", "lm_head.", live)
            live = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", live))
            role = names.role(live, span.shape)
            slab = role == "linear" and len(span.shape) == 3
            turned = conv1d and names.module_name(live).rpartition(".")[2] in _CONV1D_NAMES and len(span.shape) == 2
            info = TensorInfo(live, span.shape, _dtype_name(dtype), role, span.shape[0] if slab else None, turned)
            yield _Logical(info, ((name,),), slab)

    def _fuse(self, owner: str, experts: dict[int, dict[str, str]]) -> Iterator[_Logical]:
        """One tensor per expert in the file, one 3-D parameter in the model.

        Source: transformers 5 conversion_mapping.py, "mixtral" (w1, w3 -> gate_up_proj; w2 -> down_proj) and
            "qwen2_moe".
        """
        live_owner = owner.replace(".block_sparse_moe.", ".mlp.")
        if sorted(experts) != list(range(len(experts))):
            raise CheckpointError(f"{owner}: experts are numbered {sorted(experts)}, wanted 0 to {len(experts) - 1}.")
        have = set(experts[0])
        recipes = {
            "gate_up_proj": next(
                (pair for pair in (("w1", "w3"), ("gate_proj", "up_proj")) if have >= set(pair)), None
            ),
            "up_proj": ("up_proj",) if "up_proj" in have and "gate_proj" not in have else None,
            "down_proj": next(((part,) for part in ("w2", "down_proj") if part in have), None),
        }
        for live, recipe in recipes.items():
            if recipe is None:
                continue
            parts = []
            shapes = set()
            for e in range(len(experts)):
                lacking = [part for part in recipe if part not in experts[e]]
                if lacking:
                    raise CheckpointError(
                        f"{owner}.{e}.{lacking[0]}.weight: not in the checkpoint, but expert 0 has it."
                    )
                stored = tuple(experts[e][part] for part in recipe)
                spans = [self._spans[name][1] for name in stored]
                shapes.add((sum(span.shape[0] for span in spans), *spans[0].shape[1:]))
                parts.append(stored)
            if len(shapes) > 1:
                raise CheckpointError(
                    f"{owner}.*.{recipe[0]}: the experts have the shapes {sorted(shapes)}, wanted one shape."
                )
            name = f"{live_owner}.{live}"
            shape = (len(parts), *shapes.pop())
            dtype = _dtype_name(DTYPES[self._spans[parts[0][0]][1].dtype])
            yield _Logical(TensorInfo(name, shape, dtype, names.role(name, shape), len(parts)), tuple(parts))

    def _quantized_info(self, name: str) -> _Logical | None:
        """A bitsandbytes weight as `save_pretrained` of a quantized model stores it."""
        if not self._quantization or not name.endswith(".weight"):
            return None
        state = next(
            (n for n in (f"{name}.quant_state.bitsandbytes__{t}" for t in ("nf4", "fp4")) if n in self._spans), None
        )
        if state:
            described = json.loads(bytes(self._stored(state).numpy()))
            shape = tuple(int(n) for n in described["shape"])
            return _Logical(TensorInfo(name, shape, state.rpartition("__")[2], names.role(name, shape)), ((name,),))
        if name.removesuffix("weight") + "SCB" in self._spans:
            shape = self._spans[name][1].shape
            return _Logical(TensorInfo(name, shape, "int8", names.role(name, shape)), ((name,),))
        return None

    def _belongs_to_quantized(self, name: str) -> bool:
        return bool(self._quantization) and (".weight." in name or name.endswith((".SCB", ".weight_format")))

    def _tied(self) -> tuple[tuple[str, ...], ...]:
        """What the model class will tie on loading: the head to the embedding, T5's stacks to the shared table."""
        present = self._logical
        architecture = str((self.config.get("architectures") or [""])[0])
        if "shared.weight" in present:
            others = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
            if self.config.get("tie_word_embeddings", "lm_head.weight" not in present):
                others.append("lm_head.weight")
            return (("shared.weight", *others),)
        heads = [t.info.name for t in present.values() if t.info.role == "head" and len(t.info.shape) == 2]
        tables = [
            t.info.name
            for t in present.values()
            if t.info.role == "embedding"
            and names.module_name(t.info.name).rpartition(".")[2]
            in {"embed_tokens", "wte", "embed_in", "word_embeddings"}
        ]
        causal = "CausalLM" in architecture or "LMHead" in architecture
        # A causal model without a stored head has a tied one; with one, the config must say that they are tied.
        if causal and tables and (not heads or self.config.get("tie_word_embeddings") is True):
            return ((tables[0], heads[0] if heads else "lm_head.weight"),)
        return ()

    def tensors(self) -> list[TensorInfo]:
        return [item.info for item in self._logical.values()]

    # -- reading

    def read(self, name: str) -> Tensor:
        base, expert = split_expert(name)
        item = self._logical.get(base)
        if item is None:
            raise CheckpointError(f"{self.model_id}: no tensor {base!r}.{near_matches(base, self._logical)}")
        if expert is not None and not (item.info.experts and 0 <= expert < item.info.experts):
            raise CheckpointError(f"{self.model_id}: no tensor {name!r}, {base!r} has the shape {item.info.shape}.")
        if item.slab:
            return self._stored(item.parts[0][0], slab=expert)
        if item.info.experts is None:
            return self._matrix(item.parts[0][0], item.info)
        chosen = range(item.info.experts) if expert is None else [expert]
        read = [torch.cat([self._stored(n) for n in item.parts[e]]) for e in chosen]
        return torch.stack(read) if expert is None else read[0]

    def _matrix(self, stored: str, info: TensorInfo) -> Tensor:
        if info.dtype == "int8":
            return _int8_values(self._stored(stored), self._stored(stored.removesuffix("weight") + "SCB"))
        if info.dtype in {"nf4", "fp4"}:
            parts = {n: self._stored(n) for n in self._spans if n.startswith(f"{stored}.")}
            return _dequantize_4bit(self._stored(stored), parts)
        return self._stored(stored)

    def _stored(self, name: str, slab: int | None = None) -> Tensor:
        path, span = self._spans[name]
        begin, end, shape = span.begin, span.end, span.shape
        if slab is not None:
            size = (end - begin) // shape[0]
            begin, end, shape = begin + slab * size, begin + (slab + 1) * size, shape[1:]
        return read_bytes(path, begin, end).view(DTYPES[span.dtype]).reshape(shape)

    def place_of(self, stored: str) -> tuple[Path, Span]:
        """The file and the byte range of a stored tensor, by its name in the file."""
        return self._spans[stored]

    def spans(self, path: Path) -> dict[str, Span]:
        """{stored tensor: Span} of one of the files, in the order of the bytes."""
        return {name: span for name, (where, span) in self._spans.items() if where == path}

    def ends(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        """The first and the last `size` bytes of a tensor stored as such, as flat values."""
        path, span = self._spans[self._logical[name].parts[0][0]]
        dtype = DTYPES[span.dtype]
        head = read_bytes(path, span.begin, min(span.end, span.begin + size))
        tail = read_bytes(path, max(span.begin, span.end - size), span.end)
        return head.view(dtype), tail.view(dtype)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(structure_of(self.tensors()), self._content, "file")

    def identity(self) -> str:
        return self._content

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._spans):
            path, span = self._spans[name]
            digest.update(json.dumps([name, span.dtype, list(span.shape)]).encode())
            _sample_file(digest, path, span.begin, span.end)
        return digest.hexdigest()


def _is_buffer(name: str, shape: Sequence[int]) -> bool:
    # GPT-2's `attn.bias` of four dimensions is its causal mask; GPT-NeoX has `attention.bias` alike.
    match = _BUFFERS.search(name)
    return bool(match) and (not name.endswith(".bias") or len(shape) == 4)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_bytes(path: str | os.PathLike[str], begin: int, end: int, out: Tensor | None = None) -> Tensor:
    """(end - begin,) uint8: that range of a file, in fresh memory, or in `out`, which has that shape and dtype.

    Raises:
        CheckpointError: the file cannot be read, or ends before `end`.
    """
    buffer = torch.empty(end - begin, dtype=torch.uint8) if out is None else out
    if begin == end:
        return buffer
    view = buffer.numpy().data
    try:
        with Path(path).open("rb", buffering=0) as file:
            done = 0
            while done < len(view):  # one call reads at most 2 GiB
                got = os.preadv(file.fileno(), [view[done:]], begin + done)
                if got == 0:
                    raise CheckpointError(
                        f"{path}: ends at byte {begin + done}, wanted bytes up to {end}: it is truncated."
                    )
                done += got
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return buffer


def _sample_file(digest: Any, path: Path, begin: int, end: int) -> None:
    if end - begin <= 2 * _SAMPLE:
        digest.update(read_bytes(path, begin, end).numpy().data)
    else:
        digest.update(read_bytes(path, begin, begin + _SAMPLE).numpy().data)
        digest.update(read_bytes(path, end - _SAMPLE, end).numpy().data)


def _dequantize_4bit(packed: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """bitsandbytes' packed 4-bit values and the statistics beside them, as one (out, in) matrix."""
    import bitsandbytes.functional as bnb

    values: Tensor = bnb.dequantize_4bit(packed, bnb.QuantState.from_dict(dict(parts), device=packed.device))
    return values


def expert_product(a: Tensor, b: Tensor, experts: int, expert: int) -> Tensor:
    """(out, in) float32: the product B A of one expert of a fused parameter.

    Args:
        a: (experts * rank, in). b: (out, rank * experts), the experts innermost.
    Source: peft 0.21 tuners/lora/layer.py, `ParamWrapper.get_delta_weight`.
    """
    rank = a.shape[0] // experts
    return b.view(b.shape[0], rank, experts)[:, :, expert].float() @ a.view(experts, rank, -1)[expert].float()


def apply_delta(weight: Tensor, delta: Tensor, magnitude: Tensor | None, transposed: bool = False) -> Tensor:
    """W + dW in float32; with DoRA's magnitudes m each output's row is rescaled to length m.

    Args:
        weight, delta: of one shape, (out, in), or (in, out) if `transposed`. magnitude: (out,) or None.
    Source: Liu et al. (2024), "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5.
    """
    changed = weight.float() + delta.to(weight.device, torch.float32)
    if magnitude is None:
        return changed
    along = 0 if transposed else 1
    length = torch.linalg.vector_norm(changed, dim=along, keepdim=True)
    rescaled: Tensor = changed * (magnitude.flatten().to(changed).reshape(length.shape) / length)
    return rescaled


# --- live models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Live:
    """A parameter in memory and the PEFT layers around it, innermost first."""

    info: TensorInfo
    owner: nn.Module
    parameter: Tensor
    layers: tuple[nn.Module, ...] = ()

    @property
    def quantized(self) -> bool:
        return self.info.dtype in {"nf4", "fp4", "int8"}


def base_module(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel and its tuner; any other module as it is."""
    # A PeftModel and a tuner both hold `peft_config`; so does a plain model with an adapter loaded into it, whose
    # `base_model` is a property and not a child.
    while hasattr(model, "peft_config"):
        if "base_model" in model._modules:
            model = model.get_submodule("base_model")
        elif "model" in model._modules and hasattr(model, "targeted_module_names"):
            model = model.get_submodule("model")
        else:
            break
    return model


def checkpoint_folder(model: nn.Module) -> Path | None:
    """The local folder that a model was loaded from: its path, or its snapshot in the hub's cache; None without one."""
    config = getattr(base_module(model), "config", None)
    origin = getattr(config, "_name_or_path", None)
    if not origin:
        return None
    if Path(origin).is_dir():
        return Path(origin)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(origin, "config.json", revision=getattr(config, "_commit_hash", None))
    except HFValidationError:  # a folder that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


class LiveWeights:
    """The parameters of a model in memory, under the base model's names, adapters applied.

    Quantized matrices are read from the model's own checkpoint folder where that is local and holds them in float, else
    dequantized one at a time; `notes` says which.
    """

    kind: Literal["live"] = "live"

    def __init__(self, model: nn.Module) -> None:
        self.model = base_module(model)
        config = getattr(self.model, "config", None)
        self.model_id: str | None = getattr(config, "_name_or_path", None) or None
        self.revision: str | None = getattr(config, "_commit_hash", None)
        self.folder = checkpoint_folder(self.model)
        self._live: dict[str, _Live] = {}
        groups: dict[int, list[str]] = {}
        for item in _walk(self.model, "", ()):
            group = groups.setdefault(id(item.parameter), [])
            group.append(item.info.name)
            if len(group) == 1:
                self._live[item.info.name] = item
        self.tied = tuple(tuple(group) for group in groups.values() if len(group) > 1)
        if not self._live:
            raise CheckpointError(f"{type(model).__name__}: has no floating-point parameters.")
        self.notes: tuple[str, ...] = ()
        self._file_name: dict[str, str] = {}
        quantized = [item.info for item in self._live.values() if item.quantized]
        if quantized:
            self._file_name = self._float_twins(quantized)
            how = (
                f"read from the float checkpoint {self.folder}"
                if self._file_name
                else "dequantized one matrix at a time (no local float checkpoint)"
            )
            self.notes += (f"{len(quantized)} {quantized[0].dtype} weights were {how}",)
        if any(_changes(item) for item in self._live.values()):
            self.notes += ("scores are of the weights with the active adapters applied",)

    @cached_property
    def _files(self) -> FileWeights | None:
        """The checkpoint the model came from, or None where there is none to read."""
        if self.folder is None:
            return None
        try:
            return FileWeights(find_shards(self.folder), model_id=str(self.folder), folder=self.folder)
        except CheckpointError as error:
            self.notes += (f"the model's folder was not used: {error}",)
            return None

    def _float_twins(self, quantized: list[TensorInfo]) -> dict[str, str]:
        """{live name: name in the folder} if the folder holds every one of them in float, else {}."""
        if self._files is None:
            return {}
        stored = {t.name: t for t in self._files.tensors()}
        twins = names.align([t.name for t in quantized], stored)
        fits = all(
            t.name in twins
            and stored[twins[t.name]].shape == t.shape
            and stored[twins[t.name]].dtype not in {"nf4", "fp4", "int8"}
            for t in quantized
        )
        return twins if fits else {}

    def tensors(self) -> list[TensorInfo]:
        return [item.info for item in self._live.values()]

    def read(self, name: str) -> Tensor:
        base, expert = split_expert(name)
        item = self._live.get(base)
        if item is None:
            raise CheckpointError(
                f"{self.model_id or type(self.model).__name__}: no parameter {base!r}.{near_matches(base, self._live)}"
            )
        _refuse_meta(base, item.parameter)
        if item.quantized and base in self._file_name:
            assert self._files is not None
            weight = self._files.read(self._file_name[base])
        else:
            weight = _dequantized(item)
        if expert is not None:
            weight = weight[expert]
        for layer, adapter in _changes(item):
            if expert is None:
                delta = layer.get_delta_weight(adapter)
                delta = delta.T if item.quantized and item.info.transposed else delta
            else:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                delta = expert_product(a, b, layer.num_experts, expert) * layer.scaling[adapter]
                delta = delta if layer._did_swap_in_out_features else delta.T
            magnitudes = getattr(layer, "lora_magnitude_vector", {})
            magnitude = magnitudes[adapter].weight.detach() if adapter in magnitudes else None
            weight = apply_delta(weight, delta.detach(), magnitude, transposed=item.info.transposed)
        return weight

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(structure_of(self.tensors()), self._content, "live")

    @cached_property
    def _content(self) -> str | None:
        """That of the checkpoint folder, if the weights in memory are still the ones in it."""
        files = self._files
        if files is None or any(_changes(item) for item in self._live.values()):
            return None
        stored = {t.name: t for t in files.tensors()}
        plain = [
            item
            for item in self._live.values()
            if item.info.role == "linear" and not item.quantized and not item.info.experts
        ]
        twins = names.align([item.info.name for item in plain], stored)
        if len(twins) < len(plain) or structure_of(self.tensors()) != structure_of(files.tensors()):
            return None
        if all(_starts_alike(item.parameter, files, twins[item.info.name]) for item in plain):
            return files.fingerprint().content
        self.notes += (f"the weights in memory are no longer those in {self.folder}",)
        return None

    def identity(self) -> str:
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            _refuse_meta(name, parameter)
            digest.update(json.dumps([name, str(parameter.dtype), list(parameter.shape)]).encode())
            flat = parameter.detach().reshape(-1)
            count = max(1, _SAMPLE // flat.element_size())
            for part in (flat[:count], flat[-count:]):
                digest.update(part.contiguous().cpu().view(torch.uint8).numpy().data)
        for item in self._live.values():  # switching adapters on and off leaves every parameter as it is
            digest.update(json.dumps([item.info.name, [adapter for _, adapter in _changes(item)]]).encode())
        return digest.hexdigest()


def _walk(module: nn.Module, prefix: str, layers: tuple[nn.Module, ...]) -> Iterator[_Live]:
    """The base model's parameters, PEFT's wrappers taken out of the names."""
    children = module._modules
    wrapped = children.get("base_layer")
    if wrapped is not None:
        layer: Any = module
        if "lora_spectrum" in children and not layer.merged:  # the base holds None where the layer has its own value
            for own, value in layer.current().items():
                yield _live(wrapped, prefix, own, value, (*layers, module))
        yield from _walk(wrapped, prefix, (*layers, module))
        return
    saved, original = children.get("modules_to_save"), children.get("original_module")
    if isinstance(saved, nn.ModuleDict) and original is not None:
        wrapper: Any = module
        active = [] if wrapper.disable_adapters else [a for a in wrapper.active_adapters if a in saved]
        yield from _walk(saved[active[0]] if active else original, prefix, layers)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None and (parameter.is_floating_point() or _quantization_of(parameter)):
            yield _live(module, prefix, name, parameter, layers)
    for name, child in children.items():
        if child is not None:
            # What a wrapper says holds for the parameters of the wrapped module itself, not for modules inside it.
            yield from _walk(child, f"{prefix}{name}.", ())


def _live(owner: nn.Module, prefix: str, name: str, parameter: Tensor, layers: tuple[nn.Module, ...]) -> _Live:
    full = prefix + name
    shape = tuple(parameter.shape)
    dtype = _quantization_of(parameter)
    if dtype in {"nf4", "fp4"}:
        shape = tuple(parameter.quant_state.shape)  # type: ignore[attr-defined]
    role = names.role(full, shape)
    experts = shape[0] if role == "linear" and len(shape) == 3 else None
    # transformers turns a Conv1D's matrix before bitsandbytes quantizes it; its name here means the matrix as stored.
    kind = getattr(owner, "source_cls", type(owner)) if dtype else type(owner)
    turned = kind.__name__ == "Conv1D" and len(shape) == 2
    shape = shape[::-1] if turned and dtype else shape
    return _Live(
        TensorInfo(full, shape, dtype or _dtype_name(parameter.dtype), role, experts, turned), owner, parameter, layers
    )


def _quantization_of(parameter: Tensor) -> str | None:
    """`nf4`, `fp4` or `int8` for a bitsandbytes parameter that is quantized, else None."""
    kind = type(parameter).__name__
    if kind == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
        return str(parameter.quant_state.quant_type)  # type: ignore[attr-defined]
    if kind == "Int8Params" and parameter.dtype == torch.int8:
        return "int8"
    return None


def _unpacked_4bit(parameter: Any) -> tuple[Tensor, Any]:
    """Data and quantization state of a 4-bit parameter in bitsandbytes' usual layout; the parameter stays as it is."""
    import bitsandbytes.functional as bnb

    state = parameter.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return bnb._convert_weight_packed_for_cpu_inverse(parameter.data, state)
    return parameter.data, state


def keep_4bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, and undo it where it did; call it before training.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2, `Linear4bit.forward`) repacks a weight in the first forward in eval
    mode, for a faster product that has no backward: after one evaluation, a training step ends at that layer and says
    so only in a warning. The layer's output changes within rounding. Without a repacked weight, or without such a CPU,
    nothing happens.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        module.support_avx512bf16_for_cpu = False
        weight: Any = module.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            weight.data, weight.quant_state = _unpacked_4bit(weight)


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


def _int8_values(values: Tensor, scale: Tensor) -> Tensor:
    """LLM.int8: whole numbers times the largest absolute value of each row over 127."""
    return values.float() * (scale.float() / 127.0).unsqueeze(1)


def _dequantized(item: _Live) -> Tensor:
    values = _layer_values(item)
    return values.T if item.quantized and item.info.transposed else values


def _layer_values(item: _Live) -> Tensor:
    """The matrix that the layer multiplies with."""
    if item.info.dtype in {"nf4", "fp4"}:
        import bitsandbytes.functional as bnb

        values: Tensor = bnb.dequantize_4bit(*_unpacked_4bit(item.parameter))
        return values
    if item.info.dtype == "int8":
        # After the first forward the scales have moved from the parameter to the module's state.
        owner: Any = item.owner
        scale = getattr(item.parameter, "SCB", None)
        scale = owner.state.SCB if scale is None else scale
        return _int8_values(item.parameter.detach(), scale.to(item.parameter.device))
    return item.parameter.detach()


def _changes(item: _Live) -> list[tuple[Any, str]]:
    """(PEFT layer, adapter) pairs whose product is added to this parameter now."""
    found: list[tuple[Any, str]] = []
    layer: Any
    for layer in reversed(item.layers):
        if not hasattr(layer, "get_delta_weight") or layer.disable_adapters or layer.merged:
            continue
        target = getattr(layer, "parameter_name", "weight")
        if target != item.info.name.rpartition(".")[2]:
            continue
        have = {*layer.lora_A, *layer.lora_embedding_A}
        found += [(layer, adapter) for adapter in layer.active_adapters if adapter in have]
    return found


def _refuse_meta(name: str, parameter: Tensor) -> None:
    if parameter.device.type == "meta":
        raise CheckpointError(
            f"{name}: lies on the meta device and has no values; give the checkpoint's folder instead."
        )


def _starts_alike(parameter: Tensor, files: FileWeights, name: str) -> bool:
    """Whether the first and last values of a parameter are those of the file, cast to the parameter's dtype."""
    head, tail = files.ends(name, _SAMPLE)
    flat = parameter.detach().reshape(-1)
    return all(
        torch.equal(part.to(flat.dtype), mine.cpu())
        for part, mine in ((head, flat[: len(head)]), (tail, flat[len(flat) - len(tail) :]))
    )


# --- GGUF ------------------------------------------------------------------------------------------------------------

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
    revision: str | None = None
    folder: Path | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.model_id = path, str(path)
        self.metadata, self._spans = read_gguf_header(path)
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in _GGUF_LLAMA_LIKE:
            raise CheckpointError(
                f"{path}: general.architecture is {self.architecture!r}, wanted one of {sorted(_GGUF_LLAMA_LIKE)};"
                " convert it with transformers (from_pretrained(..., gguf_file=...)) and scan the model."
            )
        self._logical = {item.info.name: item for item in self._present()}
        kinds = sorted({t.dtype for t in self.tensors() if len(t.shape) > 1})
        self.notes = (f"weights are stored as {', '.join(kinds)}; they were dequantized one tensor at a time",)
        self.tied: tuple[tuple[str, ...], ...] = ()
        if "output.weight" not in self._spans:
            self.tied = (("model.embed_tokens.weight", "lm_head.weight"),)

    def _present(self) -> Iterator[_Logical]:
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
                    if up not in self._spans:
                        raise CheckpointError(f"{self.path}: holds {stored!r} and not {up!r}, wanted both.")
                    parts, shape = ((stored, up),), (shape[0], shape[1] + self._spans[up].shape[1], shape[2])
            elif match and match[2] == "ffn_up_exps":
                continue
            else:
                raise CheckpointError(
                    f"{self.path}: tensor {stored!r} has no known name in a {self.architecture} model."
                )
            role = names.role(live, shape)
            dtype = GGMLQuantizationType(span.kind).name.lower()
            yield _Logical(TensorInfo(live, shape, dtype, role, shape[0] if len(shape) == 3 else None), parts)

    def tensors(self) -> list[TensorInfo]:
        return [item.info for item in self._logical.values()]

    def read(self, name: str) -> Tensor:
        base, expert = split_expert(name)
        item = self._logical.get(base)
        if item is None:
            raise CheckpointError(f"{self.path}: no tensor {base!r}.{near_matches(base, self._logical)}")
        if expert is not None and not (item.info.experts and 0 <= expert < item.info.experts):
            raise CheckpointError(f"{self.path}: no tensor {name!r}, {base!r} has the shape {item.info.shape}.")
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
        heads = int(self.metadata["llama.attention.head_count"])
        return int(self.metadata.get("llama.attention.head_count_kv", heads)) if "attn_k" in stored else heads

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
            _sample_file(digest, self.path, span.begin, span.end)
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

            def text() -> str:
                length = number("<Q")
                if length > total:
                    raise struct.error("a text is longer than the file")
                return file.read(length).decode("utf-8", "replace")

            def value(kind: int) -> Any:
                if kind == 8:
                    return text()
                if kind != 9:
                    return number(sizes[kind])
                inner, count = number("<I"), number("<Q")
                if inner in sizes:
                    file.seek(struct.calcsize(sizes[inner]) * count, os.SEEK_CUR)
                else:
                    for _ in range(count):
                        if inner == 8:
                            file.seek(number("<Q"), os.SEEK_CUR)
                        else:
                            value(inner)
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
                name = text()
                shape = tuple(number("<Q") for _ in range(number("<I")))[::-1]
                rows.append((name, shape, number("<I"), number("<Q")))
            align = int(metadata.get("general.alignment") or 32)
            start = (file.tell() + align - 1) // align * align
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (struct.error, KeyError) as error:
        raise CheckpointError(f"{path}: truncated or not GGUF: its header cannot be read ({error}).") from error
    spans = {}
    for name, shape, kind, offset in rows:
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {kind}.") from error
        begin, end = start + offset, start + offset + math.prod(shape) // block * size
        if end > total:
            raise CheckpointError(f"{path}: tensor {name!r} ends at byte {end}, the file has {total}: it is truncated.")
        spans[name] = _GgufSpan(kind, shape, begin, end)
    return metadata, spans


# --- what a quantized base computes with -----------------------------------------------------------------------------


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
        return _int8_values(values, scale)
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=64,
        compress_statistics=bool(settings.get("bnb_4bit_use_double_quant", False)),
        quant_type=str(settings.get("bnb_4bit_quant_type", "fp4")),
    )
    return bnb.dequantize_4bit(packed, state)


def dequantized_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """{parameter: reads the float weight that its quantized layer computes with}, on the CPU; empty for a float model."""

    def reader(item: _Live) -> Callable[[], Tensor]:
        return lambda: _dequantized(item).cpu()

    return {item.info.name: reader(item) for item in _walk(base_module(model), "", ()) if item.quantized}


# --- where stored tensors lie in the model ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies in the model: rows [first, first + rows) of a parameter seen as a matrix.

    Attributes:
        name: of the parameter. rows, columns: of the stored tensor; fused experts lie one below the other.
    """

    name: str
    first: int
    rows: int
    columns: int


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a parameter seen as a matrix: leading dimensions one below the other, a vector as a column."""
    return (math.prod(shape), 1) if len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])


def places(files: FileWeights) -> dict[str, Place]:
    """{stored tensor: where it lies in the model}, for all that are, or belong to, a parameter of it."""
    found = {}
    for item in files._logical.values():
        first = 0
        for part in (stored for parts in item.parts for stored in parts):
            span = files._spans[part][1]
            rows, columns = as_matrix(item.info.shape if len(item.parts) == len(item.parts[0]) == 1 else span.shape)
            found[part] = Place(item.info.name, first, rows, columns)
            first += rows
    return found
