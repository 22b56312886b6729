"""merge_into_base: a plain checkpoint with a trained adapter in it.

A merge goes through the base's files from front to back. Frozen tensors are byte ranges that the kernel copies; changed
ones are computed a few rows at a time in float32 and rounded once, so that memory does not grow with the model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..card import write_card
from ..errors import CheckpointError, OptionError, near_matches
from ..records import whole_folder
from ..weights import FileWeights
from .adapters import TrainedAdapter, dtype_named, open_adapter, open_base, updates_of
from .folder import checked_out, copy_beside, merged_config, write_config
from .rewrite import layout, write_index, write_shards
from .tables import settle_ties, updates_by_name

ONTO = ("original", "dequantized")


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
            is only there quantized (`onto="original"`); values that are not finite.
        MismatchError: another base than the plan's; a tensor of the adapter with a wrong shape or an unknown name.
    """
    began = time.perf_counter()
    if onto not in ONTO:
        raise OptionError(f"onto is {onto!r}." + near_matches(str(onto), ONTO))
    cast = dtype_named(dtype)
    source = open_adapter(adapter, adapter_name)
    target = checked_out(out)
    files = open_base(source.state.base if base is None else base, source)
    notes = list(_check_fingerprint(source, files, force))
    quantized = files.quantized()
    if onto == "original" and quantized:
        kinds = " and ".join(dict.fromkeys(quantized.values()))
        raise CheckpointError(
            f"{files.folder}: holds weights {kinds} only, wanted the float checkpoint that they were made from (--base) to "
            "merge onto the original; or merge with onto='dequantized'."
        )
    updates = updates_of(source, files)
    changes, untied = settle_ties(updates_by_name(updates), files, bool(source.state.config.get("ensure_weight_tying")))
    starts: dict[str, Callable[[], Tensor]] = {}
    if onto == "dequantized":
        starts = source.dequantized(files, quantization)
        count = len(starts) or len(quantized)
        notes.append(f"{count} matrices are dequantized: their frozen values are not the original checkpoint's")
    shards = layout(files, changes, starts, cast)
    config = merged_config(files, source, changes, untied, cast)
    with whole_folder(target) as folder:
        tally = write_shards(shards, folder)
        write_index(files, shards, folder)
        copy_beside(files, source, folder)
        # Last: a folder without a config is no checkpoint, should everything else be there when the process dies.
        write_config(files, config, folder)
        write_card(
            folder, records=source.state.folder, name=target.name, merged_from=str(source.state.folder or "in memory"),
            base=source.state.base,
        )  # fmt: skip
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


def _check_fingerprint(source: TrainedAdapter, files: FileWeights, force: bool) -> Iterator[str]:
    plan = source.state.plan
    if plan is None or plan.fingerprint is None:
        yield "the adapter carries no fingerprint of its base; names and shapes were checked"
        return
    note = plan.fingerprint.check(
        files.fingerprint(), this="the adapter's plan", that=f"the base {files.model_id}", force=force
    )
    if note:
        yield note
