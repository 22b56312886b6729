"""Trained adapters as plain files: merged into the original checkpoint, as a LoRA for plain peft, as axolotl's YAML.

A merge goes through the base's files from front to back. Frozen tensors are byte ranges that the kernel copies; changed
ones are computed a few rows at a time in float32 and rounded once, so that memory does not grow with the model.
Adapters come from a folder without peft, or from a model in memory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import names
from .adapters import PEFT_PREFIX, AdapterState, Added, LowRank, Rows, Stored, Update, Value, may_grow
from .errors import CheckpointError, MismatchError, OptionError, near_matches
from .records import ADAPTER_ACTIONS, REAL_WEIGHT_ACTIONS, Plan, PlanEntry, read_mapping, write_text
from .rewrite import QUANTIZED, layout, main_dtype, write_index, write_shards
from .safetensors_io import SafetensorsWriter, header_bytes
from .weights import (
    DTYPES,
    FileWeights,
    TensorInfo,
    base_module,
    open_weights,
)

logger = logging.getLogger(__name__)

ONTO = ("original", "dequantized")
_TOKENIZER = re.compile(
    r"tokenizer.*|vocab\..*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model|.*\.tiktoken|.*\.spm"
    r"|chat_template\..*|additional_chat_templates"
)
_BESIDE = re.compile(
    r"generation_config\.json|(.*_)?processor_config\.json|preprocessor_config\.json|LICENSE.*|NOTICE.*|USE_POLICY.*",
    re.IGNORECASE,
)
# What a model class with a new head adds to the config of its body.
_HEAD_FIELDS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")
_CLASS_OF_TASK = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
# Fields of an adapter's config that say what it is and are the same in a plain LoRA.
_KEPT_FIELDS = (
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "lora_dropout",
    "fan_in_fan_out", "bias", "use_rslora", "use_dora", "lora_bias", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        out: the folder.
        changed: stored tensors whose values are not the base's, in file order.
        added: tensors that the base's files lack (a new head, an untied one).
        copied: how many tensors are the base's, byte for byte.
        rounding: largest |value as computed - value as stored|; 0.0 where nothing was rounded.
        rounding_at: tensor where that was; None if nothing was rounded.
        bytes: size of the weight files.
        seconds: wall time.
        notes: what a reader must know.
    """

    out: Path
    changed: tuple[str, ...]
    added: tuple[str, ...]
    copied: int
    rounding: float
    rounding_at: str | None
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"wrote {self.out}: {len(self.changed)} tensors changed, {len(self.added)} added, {self.copied} copied "
            f"byte for byte, {self.bytes / 2**30:.2f} GiB in {self.seconds:.1f} s"
        ]
        if self.rounding_at is not None:
            lines.append(f"largest rounding: {self.rounding:.3g}, in {self.rounding_at}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def merge_into_base(
    adapter: Any,
    base: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    onto: str = "original",
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    *,
    quantization: Any = None,
    adapter_name: str | None = None,
) -> MergeReport:
    """Write the base checkpoint with a trained adapter merged in: a plain folder that transformers opens.

    Shards, tensor order and metadata are the base's; frozen tensors are its bytes. config.json, generation config, chat
    template and tokenizer come along; where the adapter's folder has a tokenizer, that one does. A tied head stays
    tied, unless embeddings and head have become different: then `tie_word_embeddings` is false and both are written.

    `onto="dequantized"` merges into the weights that a quantized base computed with, w' = dequantize(quantize(w)),
    instead of the original w. An adapter trained over w' has learned to correct w' as well as the task; added to w,
    that correction is one too many. The larger the quantization error is beside the update (4 bit, small models, long
    training), the more it matters; real weights (`train` entries) were never quantized and come out the same either
    way. `spectrum-peft evaluate` on both tells. Merging onto the original keeps frozen weights exact.

    Args:
        adapter: folder of an adapter (ours, or a plain PEFT LoRA), or a `PeftModel`.
        base: folder or hub id; None for the one that the adapter names.
        out: folder to write; must not exist, or be empty. It appears whole or not at all.
        onto: `original` or `dequantized`.
        dtype: of every floating parameter; None keeps each tensor's own. With it frozen tensors are cast too, so their
            bytes are no longer the base's, and the config says the new dtype.
        force: merge although the base is not the one that the plan was made for.
        quantization: how the base was loaded, for `onto="dequantized"` from a folder: `nf4`, `fp4`, `int8` (as
            `load_model_with_spectrum` takes them), a `BitsAndBytesConfig` or its fields; None for what the training
            run noted. A model in memory says it itself.
        adapter_name: which adapter of a model in memory; None for the active one.
    Returns:
        what was written, with the largest rounding.
    Raises:
        OptionError: an option has no such value; `out` is not empty; `onto="dequantized"` and nobody says how.
        CheckpointError: a file that is missing, broken or of a kind that cannot be merged (GGUF, pickle); a base that
            is only there in 4 bit (`onto="original"`); values that are not finite.
        MismatchError: another base than the plan's; a tensor of the adapter with a wrong shape or an unknown name.
    """
    began = time.perf_counter()
    if onto not in ONTO:
        raise OptionError(f"onto is {onto!r}." + near_matches(str(onto), ONTO))
    cast = _dtype_of(dtype)
    source = _open_adapter(adapter, adapter_name)
    target = _checked_out(out)
    files = _open_base(source.state.base if base is None else base, source)
    notes = list(_check_fingerprint(source, files, force))
    if onto == "original" and files.config.get("quantization_config"):
        raise CheckpointError(
            f"{files.folder}: holds weights in {_stored_bits(files)} only, wanted the float checkpoint that they were "
            "made from (--base) to merge onto the original; or merge with onto='dequantized'."
        )
    updates = _updates(source, files)
    changes, untied = _settle_ties(_by_name(updates), files, bool(source.state.config.get("ensure_weight_tying")))
    starts: dict[str, Callable[[], Tensor]] = {}
    if onto == "dequantized":
        starts = source.dequantized(files, quantization)
        notes.append(f"{len(starts)} matrices are dequantized: their frozen values are not the original checkpoint's")
    shards = layout(files, changes, starts, cast)
    config = _config(files, source, changes, untied, cast)
    with _whole_folder(target) as folder:
        tally = write_shards(shards, folder)
        write_index(files, shards, folder)
        _copy_beside(files, source, folder)
        # Last: a folder without a config is no checkpoint, should everything else be there when the process dies.
        _write_config(files, config, folder)
    return MergeReport(
        target,
        tuple(tally.changed),
        tuple(tally.added),
        len(tally.copied),
        tally.rounding,
        tally.rounding_at,
        sum(shard.size for shard in shards),
        time.perf_counter() - began,
        tuple(notes),
    )


# --- where the adapter comes from ------------------------------------------------------------------------------------


@dataclass
class _Adapter:
    """An adapter from a folder."""

    state: AdapterState

    @property
    def described(self) -> Mapping[str, Any]:
        """The config of the adapted model, where it is known: names of a new head's classes."""
        config = self.state.folder / "config.json" if self.state.folder else None
        return read_mapping(config) if config is not None and config.is_file() else {}

    def from_memory(self, base: Mapping[str, TensorInfo]) -> list[Value]:
        """New values that the adapter's own tensors do not hold; a folder has none."""
        return []

    @property
    def noted(self) -> Mapping[str, Any]:
        """What the training run wrote down: `quantization` and `dtype` of its base among others."""
        results = self.state.folder / "train_results.json" if self.state.folder else None
        return read_mapping(results) if results is not None and results.is_file() else {}

    def quantization(self) -> Any:
        """How the base was quantized in training, a word or a config; None if nobody knows."""
        return self.noted.get("quantization")

    def dequantized(self, files: FileWeights, quantization: Any) -> dict[str, Callable[[], Tensor]]:
        """{parameter: reads the float weight that the quantized base computed with}, in its stored shape."""
        from .weights import through_quantization

        stored = [t for t in files.tensors() if t.dtype in QUANTIZED]
        if stored:
            return {t.name: _reader(files, t.name) for t in stored}
        settings = _quantization_settings(
            self.quantization() if quantization is None else quantization, self.state.plan
        )
        dtype = _dtype_of(self.noted.get("dtype"))  # the base was cast to it before it was quantized
        infos = {t.name: t for t in files.tensors()}

        def reader(name: str) -> Callable[[], Tensor]:
            turned = infos[name].transposed  # bitsandbytes holds a Conv1D as (out, in)

            def read() -> Tensor:
                weight = files.read(name)
                weight = weight if dtype is None else weight.to(dtype)
                seen = through_quantization(weight.T if turned else weight, settings)
                return seen.T if turned else seen

            return read

        return {name: reader(name) for name in _quantized_names(files, settings)}


@dataclass
class _LiveAdapter(_Adapter):
    """An adapter of a PeftModel."""

    model: nn.Module = field(kw_only=True)

    @property
    def described(self) -> Mapping[str, Any]:
        config = getattr(self.model, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            return {}
        inner = base_module(self.model)
        fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return fields | {"architectures": [type(inner).__name__]}

    def from_memory(self, base: Mapping[str, TensorInfo]) -> list[Value]:
        """Parameters of the model that its checkpoint lacks or has in another size: new heads, tables with new rows."""
        from .tuner import base_parameters

        parameters = base_parameters(self.model)
        found = names.align(parameters, base)
        result = []
        for name, (owner, leaf) in parameters.items():
            parameter = owner._parameters.get(leaf)
            if parameter is None or not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
                continue
            info, stored = base.get(found.get(name, "")), Stored.in_memory(parameter)
            if info is None:
                result.append(Value(name, name, stored, new=True))
            elif info.shape != stored.shape:
                if not may_grow(info, stored.shape):
                    raise MismatchError(f"{name}: has the shape {stored.shape} in the model, {info.shape} in the base.")
                result.append(Value(info.name, name, stored))
        return result

    def quantization(self) -> Any:
        return getattr(getattr(self.model, "config", None), "quantization_config", None)

    def dequantized(self, files: FileWeights, quantization: Any) -> dict[str, Callable[[], Tensor]]:
        from .weights import dequantized_weights

        if quantization is not None:
            raise OptionError("quantization is said by the model in memory; leave it out.")
        live = dequantized_weights(self.model)
        if not live:
            raise OptionError("onto='dequantized': the model holds no quantized weights; use onto='original'.")
        found = names.align(live, [t.name for t in files.tensors()])
        lacking = [name for name in live if name not in found]
        if lacking:
            raise MismatchError(f"{lacking[0]}: is quantized in the model, and the base has no such parameter.")

        return {found[name]: read for name, read in live.items()}


def _updates(source: _Adapter, files: FileWeights) -> list[Update]:
    """What the adapter, and the model that it was taken from, change in the base's files."""
    infos = {t.name: t for t in files.tensors()}
    for first, *others in files.tied:
        infos = {
            n: dataclasses.replace(infos[first], name=n) for n in others if n not in infos and first in infos
        } | infos
    memory = source.from_memory(infos)
    infos |= {v.name: dataclasses.replace(infos[v.name], shape=v.stored.shape) for v in memory if not v.new}
    updates = source.state.updates(infos.values(), files.config.get("model_type"))
    replaced = {u.name for u in updates if isinstance(u, Value)}
    return [*updates, *(value for value in memory if value.name not in replaced)]


def _reader(files: FileWeights, name: str) -> Callable[[], Tensor]:
    return lambda: files.read(name)


def _open_adapter(adapter: Any, adapter_name: str | None = None) -> _Adapter:
    if isinstance(adapter, nn.Module):
        if not hasattr(adapter, "peft_config"):
            raise OptionError(
                f"the model is a plain {type(adapter).__name__} without an adapter: save_pretrained writes it as it is."
            )
        from .tuner.factors import adapter_state

        return _LiveAdapter(adapter_state(adapter, adapter_name), model=adapter)
    if not isinstance(adapter, str | os.PathLike):
        raise OptionError(f"adapter is a {type(adapter).__name__}, wanted a folder or a PeftModel.")
    if adapter_name is not None:
        raise OptionError(f"adapter_name={adapter_name!r} is for a model in memory; a folder holds one adapter.")
    return _Adapter(AdapterState.from_folder(adapter))


def _open_base(base: str | os.PathLike[str] | None, source: _Adapter) -> FileWeights:
    if not base:
        raise OptionError(f"{source.state.where}: base_model_name_or_path is empty; say the base (--base).")
    if str(base).endswith(".gguf"):
        raise CheckpointError(
            f"{base}: a .gguf is no base to merge onto, wanted a folder of safetensors. Convert it first: "
            f"AutoModelForCausalLM.from_pretrained({str(Path(base).parent)!r}, gguf_file={Path(base).name!r}), then "
            "put its state_dict into a model made from its config without quantization_config, and save that."
        )
    revision = source.state.config.get("revision") if str(base) == source.state.base else None
    try:
        files = open_weights(base, revision)
    except CheckpointError as error:
        if str(base) != source.state.base:
            raise
        raise CheckpointError(
            f"{error} The adapter names it as its base; give another place with base (--base)."
        ) from error
    if not isinstance(files, FileWeights) or files.folder is None:
        raise CheckpointError(
            f"{base}: is no checkpoint to merge onto, wanted a folder with config.json and safetensors files."
        )
    if not files.config:
        raise CheckpointError(f"{files.folder}: has no config.json, wanted a checkpoint that transformers opens.")
    return files


def _stored_bits(files: FileWeights) -> str:
    kinds = sorted({t.dtype for t in files.tensors()} & QUANTIZED)
    return "8 bit" if kinds == ["int8"] else f"4 bit ({', '.join(kinds)})"


def _check_fingerprint(source: _Adapter, files: FileWeights, force: bool) -> Iterator[str]:
    plan = source.state.plan
    if plan is None or plan.fingerprint is None:
        yield "the adapter carries no fingerprint of its base; names and shapes were checked"
        return
    note = plan.fingerprint.check(
        files.fingerprint(), this="the adapter's plan", that=f"the base {files.model_id}", force=force
    )
    if note:
        yield note


def _dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        known = {str(d).removeprefix("torch."): d for d in DTYPES.values() if d.is_floating_point}
        if dtype.removeprefix("torch.") not in known:
            raise OptionError(f"dtype is {dtype!r}." + near_matches(dtype, known))
        return known[dtype.removeprefix("torch.")]
    return dtype


# --- quantized bases -------------------------------------------------------------------------------------------------


def _quantization_settings(given: Any, plan: Plan | None) -> dict[str, Any]:
    """The fields of a `BitsAndBytesConfig`: from one, from its fields, or from the word that `load_model_with_spectrum`
    takes, which means double quantization, heads and the plan's real weights left out."""
    if given in (None, "none"):
        raise OptionError(
            "onto='dequantized': nothing says how the base was quantized in training; give quantization='nf4', 'fp4', "
            "'int8' or the BitsAndBytesConfig (--quantization)."
        )
    if not isinstance(given, str):
        return dict(given if isinstance(given, Mapping) else given.to_dict())
    known = ("nf4", "fp4", "int8")
    if given not in known:
        raise OptionError(f"quantization is {given!r}." + near_matches(given, known))
    real = (
        [names.module_name(e.name) for e in plan.entries if e.trains and e.action in REAL_WEIGHT_ACTIONS]
        if plan
        else []
    )
    return {
        "load_in_8bit": given == "int8",
        "load_in_4bit": given != "int8",
        "bnb_4bit_quant_type": given,
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": [*real, *sorted(names.HEADS)],
    }


def _quantized_names(files: FileWeights, settings: Mapping[str, Any]) -> list[str]:
    """Parameters of the base that transformers puts into bitsandbytes layers on loading: every Linear and Conv1D that
    no skip rule matches. The model is built without weights: only its classes say which matrix is a Linear."""
    import transformers
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert files.folder is not None
    config = transformers.AutoConfig.from_pretrained(files.folder)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise CheckpointError(
            f"{files.folder}: architectures in config.json is {config.architectures!r}, wanted a class of "
            "transformers, which says what was quantized; merge from the model in memory instead."
        )
    with torch.device("meta"):
        model = kind._from_config(config)
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, settings.get("llm_int8_skip_modules"), model._keep_in_fp32_modules
    )
    chosen = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped)
    ]
    infos = {t.name for t in files.tensors()}
    return sorted(names.align(chosen, infos).values())


# --- what is tied ----------------------------------------------------------------------------------------------------


def _by_name(updates: Iterable[Update]) -> dict[str, list[Update]]:
    """{parameter: its updates, a new value first}."""
    result: dict[str, list[Update]] = {}
    for update in updates:
        mine = result.setdefault(update.name, [])
        if isinstance(update, Value):
            if mine and isinstance(mine[0], Value):
                raise MismatchError(f"{update.name}: {mine[0].key!r} and {update.key!r} both replace it.")
            mine.insert(0, update)
        else:
            mine.append(update)
    return result


def _settle_ties(
    changes: dict[str, list[Update]], files: FileWeights, ensured: bool
) -> tuple[dict[str, list[Update]], dict[str, str]]:
    """Make the changes of tied tensors one, or find that they have become different.

    Args:
        ensured: the adapter was trained with PEFT's `ensure_weight_tying`.
    Returns:
        (changes, {name that is no longer tied: stored name of the tensor it was tied to}).
    Raises:
        MismatchError: tensors differ that a model class always ties.
    """
    changes, untied = dict(changes), {}
    infos = {t.name: t for t in files.tensors()}
    for kept, *others in files.tied:
        for other in others:
            mine, theirs = changes.get(kept, []), changes.get(other, [])
            if not (mine or theirs):
                continue
            if ensured or _still_equal(mine, theirs, files, kept):
                changes.pop(other, None)
                if mine or theirs:
                    changes[kept] = mine or theirs
                if other in infos:
                    changes[other] = changes[kept]
            elif names.in_head(other):
                untied[other] = kept
                changes[other] = theirs
            else:
                raise MismatchError(
                    f"{kept} and {other} are one tensor in this architecture, and the adapter makes them two."
                )
    return changes, untied


def _still_equal(mine: Sequence[Update], theirs: Sequence[Update], files: FileWeights, kept: str) -> bool:
    """Whether two tied tensors are equal after their changes.

    Rows for new tokens follow the tie without being written twice (PEFT sees to it); low-rank changes do not.
    """
    values = [next((u for u in side if isinstance(u, Value)), None) for side in (mine, theirs)]
    if any(isinstance(u, LowRank | Added) for u in (*mine, *theirs)):
        return False
    rows = [u for u in mine if isinstance(u, Rows)]
    for other in (u for u in theirs if isinstance(u, Rows)):
        if not any(r.indices == other.indices and torch.equal(r.stored.whole(), other.stored.whole()) for r in rows):
            return False
    if values == [None, None]:
        return True
    first, second = (files.read(kept) if value is None else value.stored.whole() for value in values)
    return first.shape == second.shape and torch.equal(first, second.to(first.dtype))


# --- configs and other files -----------------------------------------------------------------------------------------


def _config(
    files: FileWeights,
    source: _Adapter,
    changes: Mapping[str, Sequence[Update]],
    untied: Mapping[str, str],
    cast: torch.dtype | None,
) -> dict[str, Any]:
    """The base's config with what the merge makes different."""
    config: dict[str, Any] = json.loads(json.dumps(files.config))
    scopes = [config, *(part for part in config.values() if isinstance(part, dict) and "vocab_size" in part)]
    rows = _table_rows(files, changes)
    for old, new in rows.items():
        for scope in scopes:
            if scope.get("vocab_size") == old:
                scope["vocab_size"] = new
    if untied:
        config["tie_word_embeddings"] = False
        for scope in scopes[1:]:
            if "tie_word_embeddings" in scope:
                scope["tie_word_embeddings"] = False
    quantized = bool(config.pop("quantization_config", None))
    if cast is not None or quantized:
        said = str(cast or main_dtype(files)).removeprefix("torch.")
        for scope in scopes:
            for key in ("dtype", "torch_dtype"):
                if key in scope:
                    scope[key] = said
        if not {"dtype", "torch_dtype"} & set(config):
            config["dtype"] = said
    heads = {n: mine for n, mine in changes.items() if names.in_head(n) and mine and isinstance(mine[0], Value)}
    present = {t.name: t for t in files.tensors()}
    replaced = {n for n in heads if (_shape(heads[n]) != present[n].shape if n in present else n not in untied)}
    if {n for n in replaced if not _is_language_head(n)}:
        _describe_head(config, files, source, {n: heads[n] for n in replaced})
    return config


def _shape(mine: Sequence[Update]) -> tuple[int, ...]:
    assert isinstance(mine[0], Value)
    return mine[0].stored.shape


def _is_language_head(name: str) -> bool:
    return bool({"lm_head", "embed_out"} & set(name.split(".")))


def _table_rows(files: FileWeights, changes: Mapping[str, Sequence[Update]]) -> dict[int, int]:
    """{rows of the token table in the base: rows after the merge} where that changes.

    Raises:
        MismatchError: embeddings and output head end up with different numbers of rows.
    """
    result, ends = {}, {}
    for info in (t for t in files.tensors() if t.shape):
        mine = changes.get(info.name, ())
        grown = _shape(mine)[0] if mine and isinstance(mine[0], Value) else info.shape[0]
        table = info.role == "embedding" and len(info.shape) == 2
        if grown != info.shape[0] and table:
            result[info.shape[0]] = grown
        if (table and info.shape[0] == files.config.get("vocab_size")) or _is_language_head(info.name):
            ends[info.name] = grown
        for update in mine:
            outside = [row for row in getattr(update, "indices", ()) if not 0 <= row < grown]
            if outside:
                raise MismatchError(
                    f"{update.key!r} holds row {outside[0]} of {info.name}, which has {grown}: the adapter was trained on "
                    "a larger vocabulary. Save it with save_embedding_layers=True."
                )
    if len(set(ends.values())) > 1:
        (a, rows_a), (b, rows_b) = list(ends.items())[:2]
        raise MismatchError(f"after the merge {a} has {rows_a} rows and {b} {rows_b}, wanted them equal.")
    return result


def _describe_head(
    config: dict[str, Any], files: FileWeights, source: _Adapter, heads: Mapping[str, Sequence[Update]]
) -> None:
    """Name the class and the labels of a head that the base lacks or has in another size."""
    described = source.described
    adapter = source.state.config
    for key in _HEAD_FIELDS:
        if described.get(key) is not None:
            config[key] = described[key]
    named = described.get("architectures")
    if named in (None, files.config.get("architectures")):  # a config saved without its model keeps the body's class
        mapping = adapter.get("auto_mapping") or {}
        found = mapping.get("base_model_class") or _class_of_task(config.get("model_type"), adapter.get("task_type"))
        if found:
            config["architectures"] = [found]
    labels = [_shape(mine)[0] for name, mine in heads.items() if len(_shape(mine)) == 2]
    if labels and "id2label" not in described and adapter.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        last = labels[-1]
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(last)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(last)}


def _class_of_task(model_type: str | None, task: str | None) -> str | None:
    if task not in _CLASS_OF_TASK or model_type is None:
        return None
    from transformers.models.auto import modeling_auto

    named: str | None = getattr(modeling_auto, _CLASS_OF_TASK[task]).get(model_type)
    return named


def _write_config(files: FileWeights, config: Mapping[str, Any], folder: Path) -> None:
    assert files.folder is not None
    if config == files.config:
        shutil.copyfile(files.folder / "config.json", folder / "config.json")
    else:
        write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _copy_beside(files: FileWeights, source: _Adapter, folder: Path) -> None:
    """The base's configs for generation and processing, its licence and custom code; the adapter's or its tokenizer."""
    assert files.folder is not None
    base = _with_tokenizer(files)
    own = source.state.folder
    tokenized = own is not None and any(
        (own / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    )
    for entry in sorted(base.iterdir()):
        code = entry.suffix == ".py" and "auto_map" in files.config
        if _BESIDE.fullmatch(entry.name) or code or (_TOKENIZER.fullmatch(entry.name) and not tokenized):
            _copy_entry(entry, folder)
    if own is not None:
        for entry in sorted(own.iterdir()):
            if _TOKENIZER.fullmatch(entry.name) and (tokenized or entry.name.startswith("chat_template.")):
                _copy_entry(entry, folder)


def _with_tokenizer(files: FileWeights) -> Path:
    """The base's folder; of a hub id, the small files that reading the weights did not fetch are fetched."""
    assert files.folder is not None
    if files.folder.parent.name != "snapshots":
        return files.folder
    from .weights import fetch

    assert files.model_id is not None
    return fetch(
        files.model_id,
        files.revision,
        ("*.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.jinja", "*.py", "LICENSE*"),
    )


def _copy_entry(entry: Path, folder: Path) -> None:
    if entry.is_dir():
        shutil.copytree(entry, folder / entry.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(entry, folder / entry.name)


# --- folders that appear whole ---------------------------------------------------------------------------------------


def _checked_out(out: str | os.PathLike[str] | None) -> Path:
    if out is None:
        raise OptionError("out is missing: the folder to write.")
    path = Path(out).absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OptionError(f"{path}: exists and is not empty; choose another folder, or remove it.")
    return path


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and goes when it does not."""
    for left in out.parent.glob(f".{out.name}.*.part"):
        logger.warning(
            "%s: half a folder of a run that was killed, or of one that still runs; delete it if nothing runs", left
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}).") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
        if out.is_dir():
            out.rmdir()  # empty, as was checked; a folder that was filled meanwhile is not replaced
        temporary.rename(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}).") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# --- as a plain LoRA -------------------------------------------------------------------------------------------------


def export_lora(adapter_or_model: Any, out: str | os.PathLike[str], *, adapter_name: str | None = None) -> Path:
    """Write an adapter as a LoRA that plain peft opens, without spectrum_peft: the same function, the same factors.

    Every low-rank update is written from its factors (B, A, scale), with `rank_pattern` and `alpha_pattern`; modules
    that train whole go into `modules_to_save`. A plain PEFT LoRA comes out as it is.

    Args:
        adapter_or_model: folder of an adapter, or a `PeftModel`.
        out: folder to write; must not exist, or be empty.
        adapter_name: which adapter of a model in memory; None for the active one.
    Raises:
        OptionError: real weights were trained, which are no low-rank update; `out` is not empty.
        CheckpointError, MismatchError: as in `merge_into_base`.
    """
    source = _open_adapter(adapter_or_model, adapter_name)
    target = _checked_out(out)
    state = source.state
    if state.config["peft_type"] == "LORA":
        config = json.loads(json.dumps(state.config, default=_as_json))
        tensors = {key: stored.whole() for key, stored in state.tensors.items()}
    else:
        config, tensors = _as_lora(state)
    with _whole_folder(target) as folder:
        order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
        header = header_bytes({k: (tensors[k].dtype, tuple(tensors[k].shape)) for k in order}, {"format": "pt"}, order)
        size = sum(tensor.nbytes for tensor in tensors.values())
        with SafetensorsWriter(folder / "adapter_model.safetensors", header, size) as writer:
            at = 0
            for key in order:
                writer.write(tensors[key], at)
                at += tensors[key].nbytes
        if state.folder is not None:
            for entry in sorted(state.folder.iterdir()):
                # config.json has the names of a classifier's labels, and with them the size of its head.
                if _TOKENIZER.fullmatch(entry.name) or entry.name == "config.json":
                    _copy_entry(entry, folder)
        write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return target


def _as_json(value: Any) -> Any:
    """What PEFT configs hold beside plain data: sets, enums, small dataclasses."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return getattr(value, "value", str(value))


def _as_lora(state: AdapterState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, {key: tensor}) of a plain LoRA with the same function."""
    updates = state.updates(state.planned())
    by_name = {} if state.plan is None else state.plan.by_name
    for update in updates:
        entry = by_name.get(update.name)
        if isinstance(update, Value) and entry is not None and entry.action == "train":
            assert state.plan is not None
            raise OptionError(
                f"mode {state.plan.mode!r} trains real weights, first {update.name}: that is no low-rank update, so "
                "there is no LoRA of it. Merge it: merge_into_base(adapter, base, out), or spectrum-peft merge."
            )
    low = [u for u in updates if isinstance(u, LowRank)]
    if not low:
        raise OptionError(f"{state.where}: holds no low-rank update; merge it instead (merge_into_base).")
    root = math.sqrt if state.config.get("use_rslora") else float
    ranks = {u.key: u.factors()[1].shape[-2] for u in low}
    alphas = {u.key: _whole_number(u.scale * root(ranks[u.key])) for u in low}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    tensors: dict[str, Tensor] = {}
    saved = list(state.config.get("modules_to_save") or ())
    for update in updates:
        if isinstance(update, LowRank):
            tensors |= _peft_tensors(update)
        elif isinstance(update, Value) and ".lora_spectrum." in update.key:  # a norm that trains beside the adapters
            module, _, leaf = update.key.removeprefix(PEFT_PREFIX).partition(".lora_spectrum.")
            tensors[f"{PEFT_PREFIX}{module}.{leaf}"] = update.stored.whole()
            saved.append(module)
        else:
            tensors[update.key] = update.stored.whole()
    config = {
        **{key: state.config[key] for key in _KEPT_FIELDS if key in state.config},
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(u): ranks[u.key] for u in low if ranks[u.key] != rank},
        "alpha_pattern": {_anchored(u): alphas[u.key] for u in low if alphas[u.key] != alpha},
        "target_modules": sorted({u.module for u in low if u.experts is None}),
        "target_parameters": sorted({u.name for u in low if u.experts is not None}) or None,
        "modules_to_save": list(dict.fromkeys(saved)) or None,
    }
    return json.loads(json.dumps(config, default=_as_json)), tensors


def _whole_number(value: float) -> float:
    """alpha / rank * rank is not always the alpha it was."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value


def _most_common(values: Iterable[Any]) -> Any:
    counted = Counter(values)
    return max(counted, key=lambda v: (counted[v], v))


def _anchored(update: LowRank) -> str:
    return "^" + re.escape(update.name if update.experts is not None else update.module)


def _peft_tensors(update: LowRank) -> dict[str, Tensor]:
    """The factors in PEFT's layout, from (B, A)."""
    b, a, _ = update.factors()
    if update.experts is not None:
        a, b = a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
    names_of = ("lora_embedding_A", "lora_embedding_B") if update.table else ("lora_A.weight", "lora_B.weight")
    found = {f"{PEFT_PREFIX}{update.key}.{leaf}": t.contiguous() for leaf, t in zip(names_of, (a, b), strict=True)}
    if update.magnitude is not None:
        found[f"{PEFT_PREFIX}{update.key}.lora_magnitude_vector"] = update.magnitude.whole()
    return found


# --- for axolotl -----------------------------------------------------------------------------------------------------


def export_axolotl(
    adapter_or_plan: Any,
    out: str | os.PathLike[str],
    *,
    quantization: str | None = None,
    adapter_name: str | None = None,
) -> Path:
    """Write the part of an axolotl config that carries out the same plan: what trains, and how.

    Real weights become `unfrozen_parameters`; adapters become `adapter: lora` or `qlora` with one rank and the modules
    by their full names. Data, batch size and learning rate are the user's to add.

    Args:
        adapter_or_plan: a Plan or its file, an adapter folder, or a `PeftModel`.
        out: the YAML file.
        quantization: of the base: `none`, `nf4`, `fp4`, `int8`; None for what the training run noted, and for 4 bit
            where the mode is made for it.
    Raises:
        OptionError: the plan says what axolotl cannot: ranks or learning rates that differ, re-evaluation, real weights
            on a quantized base.
    Source of the keys: axolotl-ai-cloud/axolotl@00564c8 src/axolotl/utils/schemas/peft.py and config.py.
    """
    import yaml

    plan, state, known = _planned(adapter_or_plan, adapter_name)
    quantization = quantization or known or ("nf4" if plan.mode == "spectra_qlora" else "none")
    if quantization not in ("none", "nf4", "fp4", "int8"):
        raise OptionError(
            f"quantization is {quantization!r}." + near_matches(quantization, ("none", "nf4", "fp4", "int8"))
        )
    model = plan.model_id or (state.base if state else None)
    head = [f"# spectrum_peft: mode {plan.mode}, {len(plan.trainable_names)} of {len(plan.entries)} tensors train."]
    data: dict[str, Any] = {} if model is None else {"base_model": model}
    if plan.revision and not str(model or "").startswith(("/", ".")):
        data["revision_of_model"] = plan.revision
    adapters = [e for e in plan.entries if e.trains and e.action in ADAPTER_ACTIONS]
    if adapters:
        data |= _axolotl_lora(plan, adapters, {} if state is None else state.config, quantization)
        head.append("# axolotl has one rank and one alpha for all modules; here they are the same in the plan.")
    else:
        if quantization != "none":
            raise OptionError(
                f"axolotl trains real weights on a float base only, and the base is quantized ({quantization})."
            )
        data["unfrozen_parameters"] = list(plan.unfrozen_parameters)
    path = Path(out)
    write_text(path, "\n".join(head) + "\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))
    return path


def _planned(given: Any, adapter_name: str | None) -> tuple[Plan, AdapterState | None, str | None]:
    """(plan, adapter, quantization that the training run noted)."""
    if isinstance(given, Plan):
        return given, None, None
    if isinstance(given, str | os.PathLike) and not Path(given).is_dir():
        return Plan.load(given), None, None
    source = _open_adapter(given, adapter_name)
    if source.state.plan is None:
        raise OptionError(
            f"{source.state.where}: carries no plan, so what trains is not known; export the adapter's own plan."
        )
    noted = source.quantization()
    if noted is not None and not isinstance(noted, str):
        fields = dict(noted) if isinstance(noted, Mapping) else noted.to_dict()
        noted = "int8" if fields.get("load_in_8bit") else fields.get("bnb_4bit_quant_type", "nf4")
    return source.state.plan, source.state, noted


def _axolotl_lora(
    plan: Plan, adapters: Sequence[PlanEntry], config: Mapping[str, Any], quantization: str
) -> dict[str, Any]:
    scales = Counter((e.rank, e.alpha) for e in adapters)
    if len(scales) > 1:
        tiers = ", ".join(
            f"rank {rank} (alpha {alpha:g}) on {n} modules" for (rank, alpha), n in sorted(scales.items(), reverse=True)
        )
        raise OptionError(f"mode {plan.mode!r} has {tiers}; axolotl has one lora_r. Export as LoRA, or plan one rank.")
    if plan.options.get("rescore_every") is not None:
        raise OptionError(
            f"rescore_every is {plan.options['rescore_every']!r}; axolotl cannot evaluate the choice again in training."
        )
    uneven = next((e for e in adapters if e.lr_ratio != 1.0), None)
    if uneven is not None:
        raise OptionError(
            f"{uneven.name} has lr_ratio {uneven.lr_ratio:g}; axolotl cannot say it. Plan with lr_ratio=(1, 1)."
        )
    shared = next((e for e in adapters if e.action != "lora"), None)
    if shared is not None:
        raise OptionError(f"{shared.name} has the action {shared.action!r}; axolotl knows plain LoRA only.")
    (rank, alpha), _ = scales.most_common(1)[0]
    if rank is None or alpha is None or alpha != int(alpha):
        raise OptionError(f"alpha is {alpha}; axolotl's lora_alpha is a whole number.")
    fused = [e.name for e in adapters if e.shape is not None and len(e.shape) == 3]
    saved = [names.module_name(e.name) for e in plan.entries if e.trains and e.action == "save"]
    four = quantization in ("nf4", "fp4")
    data = {
        "adapter": "qlora" if four else "lora",
        "load_in_4bit": four,
        "load_in_8bit": quantization == "int8",
        "lora_r": rank,
        "lora_alpha": int(alpha),
        "lora_dropout": float(config.get("lora_dropout") or 0.0),
        "lora_target_modules": [names.module_name(e.name) for e in adapters if e.name not in fused],
        "lora_target_parameters": fused or None,
        "lora_modules_to_save": list(dict.fromkeys(saved)) or None,
        "peft_use_rslora": bool(config.get("use_rslora") or plan.options.get("use_rslora")) or None,
        "peft_use_dora": bool(config.get("use_dora")) or None,
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"} if quantization == "fp4" else None,
    }
    return {key: value for key, value in data.items() if value is not None}
