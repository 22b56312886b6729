"""Trained adapters as plain data: what a folder, or a model in memory, changes in its base, parameter by parameter.

No peft: a file's keys and the fields of its config say everything. Merge, export and the scan of W + dW are written on
`Value`, `LowRank`, `Rows` and `Added`; a new kind of adapter joins by being read into them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import names
from ..errors import CheckpointError, MismatchError, near_matches, no_such, quoted
from ..records import Plan, PlanEntry, checked
from ..records.schema import Count
from . import model_types
from .adapter_config import ByPattern, read_adapter_config
from .headers import read_config, read_header
from .rotations import core_matrix, digest_of, rotation_bases
from .source import TensorInfo
from .updates import WRAPPERS, Added, LowRank, Rows, Stored, Update, Value, may_grow

# Inits that rewrite the base when the adapter is made: such an adapter belongs to a base that is in no file.
_REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields of a LoRA config that change what the layers compute in a way that a sum W + dW cannot say.
_NOT_A_SUM = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


_KEY = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<part>lora_[AB]\.(?:weight|shared|gain)|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?"
    r"|(?P<singular>lora_A\.(?:left|values|right|digest)|lora_B\.(?:shift|p|q))"
    r"|(?P<lines>lora_A\.columns|lora_B\.rows)"
    r"|lora_spectrum\.(?P<held>.+)|token_adapter\.(?P<rows>trainable_tokens_delta))"
)
_MAGNITUDE = "lora_magnitude_vector"
_BIAS = "lora_B.bias"
PEFT_PREFIX = "base_model.model."


def _parameter(key: str, match: re.Match[str] | None) -> str:
    """The parameter of the adapted model that a key belongs to, wrappers taken out of its name."""
    if match is None:
        return WRAPPERS.sub("", key.removeprefix(PEFT_PREFIX))
    return WRAPPERS.sub("", f"{match['module']}.{match['held'] or ('bias' if match['part'] == _BIAS else 'weight')}")


class AdapterState:
    """A trained adapter, parameter by parameter: its config and its tensors, from a folder or from a model in memory.

    Knows plain LoRA (rank and alpha patterns, rsLoRA, DoRA, fan_in_fan_out, embeddings, fused experts, lora_bias,
    modules_to_save, trainable_token_indices, bias), our real weights and adapters in the singular basis, without peft.

    Args:
        config: the fields of `adapter_config.json`.
        tensors: {key as in `adapter_model.safetensors`: tensor}.
        where: for messages.
        folder: that it was read from.
    Raises:
        CheckpointError: another kind of adapter, or one whose layers do not compute W + dW on the checkpoint's W.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Stored], where: str, folder: Path | None = None
    ) -> None:
        self.config, self.tensors, self.where, self.folder = dict(config), dict(tensors), where, folder
        if config.get("peft_type") not in {"LORA", "SPECTRUM"}:
            raise CheckpointError(f"{where}: peft_type is {quoted(config.get('peft_type'))}, wanted LORA or SPECTRUM.")
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_REWRITING_INITS):
            raise CheckpointError(
                f"{where}: init_lora_weights is {init!r}, which rewrote the base when the adapter was made, so the "
                "adapter does not fit the checkpoint. Save it with PEFT's path_initial_model_for_weight_conversion."
            )
        for field_name in _NOT_A_SUM:
            if config.get(field_name):
                raise CheckpointError(
                    f"{where}: {field_name} is {quoted(config[field_name])}; such an adapter is not a sum W + dW."
                )
        self._alphas = ByPattern(config.get("alpha_pattern"))
        self._made: dict[str, Stored] = {}  # factors of single layers that follow from a group's
        plan = config.get("plan")
        self.plan: Plan | None = Plan.from_dict(plan, f"{where}: plan") if isinstance(plan, Mapping) else plan

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> AdapterState:
        """Read the header of an adapter folder; tensors are read when they are asked for.

        Raises:
            CheckpointError: no adapter there, a pickle file, a broken file.
        """
        folder = Path(folder)
        config = folder / "adapter_config.json"
        if not folder.exists():
            raise CheckpointError(no_such("folder", folder))
        if not config.is_file():
            already = ""
            if any(folder.glob("*.safetensors")):
                already = " It holds a plain checkpoint: real weights trained without PEFT are saved as one, ready to be used."
            raise CheckpointError(
                f"{folder}: has no adapter_config.json, wanted the folder of a trained adapter.{already}"
            )
        file = folder / "adapter_model.safetensors"
        if not file.is_file() and any(folder.glob("adapter_model.*")):
            raise CheckpointError(f"{folder}: the adapter is a pickle file, which is not read, wanted {file.name}.")
        tensors = {key: Stored.in_file(file, span) for key, span in read_header(file).items()}
        return cls(read_adapter_config(config), tensors, str(file), folder)

    @property
    def base(self) -> str | None:
        """Folder or hub id that the adapter was trained on, as its config says."""
        return self.config.get("base_model_name_or_path") or None

    def changed_parameters(self) -> set[str]:
        """Names, in the adapted model, of the parameters that the adapter's tensors change; without fused experts, whose
        names its keys do not hold."""
        keys = {key: _KEY.fullmatch(key.removeprefix(PEFT_PREFIX)) for key in self.tensors}
        planned = {e.name for e in self.plan.entries if e.trains} if self.plan else set()
        named = {_parameter(key, match) for key, match in keys.items() if ".original_module." not in key}
        return planned or {name for name in named if not name.removesuffix(".weight").endswith("experts")}

    def classes(self) -> list[str]:
        """Model classes that the adapter's folder names, the likeliest first."""
        found = [(self.config.get("auto_mapping") or {}).get("base_model_class")]
        config = self.folder / "config.json" if self.folder else None
        if config is not None:
            found += read_config(config).get("architectures") or []
        return [name for name in found if name]

    def planned(self) -> list[TensorInfo]:
        """The base's parameters as far as the plan knows them."""
        planned = self.plan.entries if self.plan else ()
        entries = [dataclasses.replace(e, shape=e.shape or self._shape_of(e)) for e in planned]
        return [
            TensorInfo(
                e.name, e.shape, "unknown", names.role(e.name, e.shape), e.shape[0] if len(e.shape) == 3 else None
            )
            for e in entries
            if e.shape is not None
        ]

    def _shape_of(self, entry: PlanEntry) -> tuple[int, ...] | None:
        """(out, in) of a matrix that a plan made from published scores says no shape of, from the factors beside it."""
        module = PEFT_PREFIX + names.module_name(entry.name)
        a, b = (self.tensors.get(f"{module}.lora_{x}.weight") for x in "AB")
        if a is not None and b is not None:
            return (b.shape[0], a.shape[-1]) if len(a.shape) == len(b.shape) == 2 else None
        left, right = (self.tensors.get(f"{module}.lora_A.{side}") for side in ("left", "right"))
        if left is None or right is None or not (len(left.shape) == len(right.shape) == 2):
            return None
        return left.shape[-1], right.shape[-1]

    def updates(self, base: Iterable[TensorInfo], model_type: str | None = None) -> list[Update]:
        """What the adapter does to a base, names as the base has them.

        Args:
            base: the base's parameters; a name that is tied to a stored one may be among them.
            model_type: of the base's config; decides how fused experts of equal width and height lie.
        Raises:
            MismatchError: a tensor that fits nothing or has another shape, one factor without the other, a planned
                tensor that is missing; the message names it.
        """
        infos = {t.name: t for t in base}
        keys: dict[str, re.Match[str] | None] = {
            key: _KEY.fullmatch(key.removeprefix(PEFT_PREFIX)) for key in self.tensors
        }
        wanted = {key: _parameter(key, match) for key, match in keys.items()}
        grouped = [e.name for e in self.plan.entries if e.group is not None] if self.plan else []
        found = names.align([*wanted.values(), *grouped], infos)
        # With a resized vocabulary PEFT writes saved tables once more, with the wrapper in the name.
        bare = {key: key.replace(".modules_to_save.", ".") for key in keys}
        spare = {key for key in keys if ".original_module." in key or (bare[key] != key and bare[key] in keys)}
        result: list[Update] = []
        for key, match in keys.items():
            if key not in spare and (match is None or match["held"]):
                value = self._value(key, wanted[key], infos.get(found.get(wanted[key], "")), infos)
                result.append(value)
                if not value.new:  # a table may have grown, and what else changes it has the new size
                    infos[value.name] = dataclasses.replace(infos[value.name], shape=value.stored.shape)
        low_rank: dict[str, dict[str, str]] = {}
        singular: dict[str, dict[str, str]] = {}
        for key, match in keys.items():
            if match is not None and match["rows"]:
                result.append(self._rows(key, wanted[key], infos.get(found.get(wanted[key], "")), infos))
            elif match is not None and match["part"]:
                low_rank.setdefault(match["module"], {})[match["part"]] = key
            elif match is not None and match["singular"]:
                singular.setdefault(match["module"], {})[match["singular"].partition(".")[2]] = key
            elif match is not None and match["lines"]:
                part, made = self._one_hot(key, wanted[key], infos.get(found.get(wanted[key], "")), infos)
                low_rank.setdefault(match["module"], {})[part] = made
        low_rank = self._with_shared(low_rank)
        for module, parts in sorted(low_rank.items(), key=lambda item: WRAPPERS.sub("", f"{item[0]}.weight") in found):
            result += self._low_rank(module, parts, infos, found, model_type)
        for module, parts in singular.items():
            result.append(self._singular(module, parts, infos, found))
        self._check_complete(result)
        return result

    def _with_shared(self, low_rank: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        """{module: {part: key}} with every layer of a group, and `lora_A.weight` or `lora_B.weight` of each, where the file has
        the group's factor only at the first layer.

        Raises:
            MismatchError: a shared factor that no group of the plan owns, or that two layers of a group hold.
        """
        held = [
            (module, part)
            for module, parts in low_rank.items()
            for part in parts
            if part.endswith((".shared", ".gain"))
        ]
        groups: dict[str, list[str]] = {}
        for entry in self.plan.entries if self.plan else ():
            if entry.group is not None and entry.trains:
                groups.setdefault(entry.group, []).append(names.module_name(entry.name))
        if not held and not groups:
            return low_rank
        modules = {WRAPPERS.sub("", module): module for module in low_rank}
        group_of = {owner: label for label, owners in groups.items() for owner in owners}
        shared: dict[tuple[str, str], str] = {}
        for module, part in held:
            owner, letter = WRAPPERS.sub("", module), part[: len("lora_A")]
            label = group_of.get(owner)
            problem = (
                "no group of the plan has that layer"
                if label is None
                else f"group {label} does not share it"
                if letter[-1] not in label.partition(":")[0]
                else f"group {label} has it twice"
                if part.endswith(".shared") and (label, letter) in shared
                else None
            )
            if label is None or problem:
                raise MismatchError(
                    f"{self.where}: tensor {low_rank[module][part]!r} is of a factor that layers share, and {problem}."
                )
            if part.endswith(".shared"):
                shared[label, letter] = low_rank[module][part]
        result = {module: dict(parts) for module, parts in low_rank.items()}
        for (label, letter), key in shared.items():
            for owner in groups[label]:
                parts = result.setdefault(modules.get(owner, owner), {})
                parts.pop(f"{letter}.shared", None)
                parts[f"{letter}.weight"] = self._gained(key, parts.pop(f"{letter}.gain", None))
        return result

    def _one_hot(self, key: str, name: str, info: TensorInfo | None, known: Iterable[str]) -> tuple[str, str]:
        """Which factor, and its key, selects the columns or rows whose numbers stand under `key`: A (k, in) or B (out, k).

        Raises:
            MismatchError: no such parameter, numbers that are none of its columns or rows, or others than the plan's.
        """
        rows = key.endswith("lora_B.rows")
        what, part, factor = ("rows", "lora_B.rows", "A") if rows else ("columns", "lora_A.columns", "B")
        other = key.removesuffix(part) + f"lora_{factor}.weight"
        if info is None or other not in self.tensors:
            lacking = (
                "fits no parameter of the base." + near_matches(name, known) if info is None else f"lacks {other!r}."
            )
            raise MismatchError(f"{self.where}: tensor {key!r} {lacking}")
        numbers, entry = self.tensors[key].whole(), None if self.plan is None else self.plan.by_name.get(name)
        width = info.numel // max(
            1, self.tensors[other].shape[1 if rows else 0]
        )  # one of no rows fits no numbers below
        right = numbers.dtype == torch.int64 and numbers.dim() == 1 and bool(((0 <= numbers) & (numbers < width)).all())
        planned = None if entry is None else getattr(entry, what)
        if not right or (planned is not None and numbers.tolist() != list(planned)):
            raise MismatchError(
                f"{self.where}: tensor {key!r} holds {numbers.flatten()[:3].tolist()} ..., wanted the numbers of {what} of "
                f"{name}, below {width}, as in the plan."
            )
        made = key.removesuffix(what) + "weight"
        shape, along, index = (
            ((width, len(numbers)), 0, numbers[None]) if rows else ((len(numbers), width), 1, numbers[:, None])
        )
        self._made[made] = Stored.computed(shape, lambda: torch.zeros(shape).scatter_(along, index, 1))
        return part[: len("lora_A")] + ".weight", made

    def _gained(self, key: str, gain: str | None) -> str:
        """Key of a group's factor as one layer has it: times the layer's gain, where there is one."""
        if gain is None:
            return key
        made = gain.removesuffix(".gain") + ".weight"
        factor, number = self.tensors[key], self.tensors[gain]
        if number.shape != (1, 1):
            raise MismatchError(f"{self.where}: tensor {gain!r} has the shape {number.shape}, wanted (1, 1).")

        def read(begin: int, end: int, out: Tensor | None = None) -> Tensor:
            # The product that the layer forms, so that its values are the same to the last bit.
            values = factor.read(begin, end) * number.whole().reshape(())
            return values if out is None else out.copy_(values)

        self._made[made] = Stored(factor.shape, factor.dtype, read)
        return made

    def factors(self, base: Sequence[TensorInfo] | None = None) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """(entry name, B, A, scale) of every low-rank update: dW = scale * B @ A; shapes as in `LowRank.factors`.

        Args:
            base: the base's parameters; None where the adapter carries a plan.
        """
        for update in self.updates(self.planned() if base is None else base):
            if isinstance(update, LowRank):
                yield update.name, *update.factors()

    def saves(self, name: str) -> bool:
        """Whether a parameter that the base lacks may come with the adapter: planned to be saved, a head, or of a module that
        is listed."""
        listed = self.config.get("modules_to_save") or ()
        entry = self.plan.by_name.get(name) if self.plan else None
        if entry is not None and entry.action == "save":
            return True
        return names.in_head(name) or any(f".{module}." in f".{name}" for module in listed)

    def _value(self, key: str, name: str, info: TensorInfo | None, known: Iterable[str]) -> Value:
        stored = self.tensors[key]
        if info is None:
            if not self.saves(name):
                raise MismatchError(
                    f"{self.where}: tensor {key!r} fits no parameter of the base.{near_matches(name, known)}"
                )
            return Value(name, key, stored, new=True)
        if stored.shape != info.shape and not may_grow(info, stored.shape):
            raise MismatchError(
                f"{self.where}: tensor {key!r} has the shape {stored.shape}, wanted {info.shape} for {info.name}."
            )
        return Value(info.name, key, stored)

    def _rows(self, key: str, name: str, info: TensorInfo | None, known: Iterable[str]) -> Rows:
        stored = self.tensors[key]
        chosen = self.config.get("trainable_token_indices")
        if isinstance(chosen, Mapping):
            module = names.module_name(name)
            chosen = next((indices for layer, indices in chosen.items() if f".{module}".endswith(f".{layer}")), None)
        if not chosen or info is None:
            raise MismatchError(
                f"{self.where}: tensor {key!r} holds rows of {name!r}, for which "
                + (
                    "the base has no parameter." + near_matches(name, known)
                    if info is None
                    else "trainable_token_indices names none."
                )
            )
        if stored.shape != (len(chosen), *info.shape[1:]):
            raise MismatchError(
                f"{self.where}: tensor {key!r} has the shape {stored.shape}, wanted {(len(chosen), *info.shape[1:])}."
            )
        return Rows(info.name, key, tuple(chosen), stored)

    def _low_rank(
        self,
        module: str,
        parts: Mapping[str, str],
        infos: Mapping[str, TensorInfo],
        found: Mapping[str, str],
        model_type: str | None,
    ) -> Iterator[LowRank | Added]:
        table = any(part.startswith("lora_embedding") for part in parts)
        a_key, b_key = (parts.get(f"lora_embedding_{x}" if table else f"lora_{x}.weight") for x in "AB")
        owner = WRAPPERS.sub("", module)
        info = infos.get(found.get(f"{owner}.weight", ""))
        choices = [info] if info else self._experts_in(owner, next(iter(parts.values())), infos)
        if a_key is None or b_key is None:
            raise MismatchError(f"{self.where}: {next(iter(parts.values()))!r} stands without both LoRA factors.")
        a, b = ((self._made.get(key) or self.tensors[key]) for key in (a_key, b_key))
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise MismatchError(
                f"{self.where}: {a_key!r} has the shape {a.shape}, wanted a matrix; convolutions are not supported."
            )
        made = (b.shape[0], a.shape[1])
        fitting = [t for t in choices if t.shape[1:] == made] or [t for t in choices if t.shape[1:] == made[::-1]]
        if not info and len(fitting) != 1:
            which = f"{[t.name for t in fitting]} equally" if fitting else f"none of {[t.name for t in choices]}"
            raise MismatchError(f"{self.where}: {b_key!r} times {a_key!r} gives {made}, which fits {which}.")
        info = info or fitting[0]
        rank, experts = a.shape[0], info.experts
        if rank == 0 or b.shape[1] != rank or (experts and rank % experts) or sorted(info.shape[-2:]) != sorted(made):
            raise MismatchError(
                f"{self.where}: {b_key!r} {b.shape} times {a_key!r} {a.shape} gives {made}, wanted {info.shape} for "
                f"{info.name}, with one rank for both factors."
            )
        rank //= experts or 1
        scale = self._scale(info.name if experts else owner, rank)
        magnitude = self.tensors[parts[_MAGNITUDE]] if _MAGNITUDE in parts else None
        if magnitude is not None and math.prod(magnitude.shape) != made[0]:
            raise MismatchError(
                f"{self.where}: {parts[_MAGNITUDE]!r} has the shape {magnitude.shape}, wanted ({made[0]},)."
            )
        turned = self._turned(info, made, table, model_type)
        yield LowRank(info.name, module, a, b, scale, experts, turned, table, magnitude)
        key = parts.get(_BIAS)
        if key is not None:
            bias = infos.get(found.get(f"{owner}.bias", ""))
            if bias is None or bias.shape != self.tensors[key].shape:
                raise MismatchError(f"{self.where}: tensor {key!r} is added to {owner}.bias, which the base lacks.")
            yield Added(bias.name, key, self.tensors[key], scale)

    def _singular(
        self, module: str, parts: Mapping[str, str], infos: Mapping[str, TensorInfo], found: Mapping[str, str]
    ) -> LowRank:
        """An adapter in the singular basis as the low-rank product that it is: B = [U P] M, A = [V Q]^T, scale 1.

        Raises:
            MismatchError: a tensor is missing or of another shape than the plan says; other P and Q than it was trained
                with.
        """
        name = f"{WRAPPERS.sub('', module)}.weight"
        entry = None if self.plan is None else self.plan.by_name.get(name)
        info = infos.get(found.get(name, ""))
        if entry is None or entry.components is None or entry.rank is None or info is None or self.plan is None:
            lacking = "the base has no parameter" if info is None else "the plan has no components"
            known = infos if info is None else (self.plan.by_name if self.plan else ())
            raise MismatchError(
                f"{self.where}: {lacking} for {next(iter(parts.values()))!r}.{near_matches(name, known)}"
            )
        missing = [part for part in ("left", "values", "right", "digest", "shift", "p", "q") if part not in parts]
        if missing:
            raise MismatchError(f"{self.where}: lacks {missing[0]!r} of {name!r}; it holds {sorted(parts)}.")
        count, rank = len(entry.components), entry.rank
        out, inside = ((self.tensors[parts[side]].shape or (0,))[-1] for side in ("left", "right"))
        shapes = {"left": (count, out), "values": (count,), "right": (count, inside), "digest": (32,)}
        shapes |= {"shift": (count,), "p": (count, rank), "q": (count, rank)}
        for part, shape in shapes.items():
            stored = self.tensors[parts[part]].shape
            if stored != shape or sorted(info.shape) != sorted((out, inside)):
                sides = f"{(out, inside)} by left and right, and " if stored == shape else ""
                raise MismatchError(
                    f"{self.where}: tensor {parts[part]!r} has the shape {stored}, wanted {shape} {sides}"
                    f"for {len(entry.components)} components of {info.name}, {info.shape}."
                )
        seed = checked(self.plan.options.get("seed"), Count, f"{self.where}: seed of the plan")
        p_rows, q_rows = rotation_bases(seed, name, out, inside, rank)
        if not torch.equal(self.tensors[parts["digest"]].whole(), digest_of(p_rows, q_rows)):
            raise MismatchError(
                f"{self.where}: tensor {parts['digest']!r} is not the digest of the directions that seed "
                f"{seed} gives {name}: the plan or the file was changed."
            )

        def read(part: str) -> Tensor:
            return self.tensors[parts[part]].whole().float()

        def b() -> Tensor:
            core = core_matrix(read("values"), read("shift"), read("p"), read("q"))
            return torch.cat((read("left"), p_rows)).T @ core

        made_a = Stored.computed((count + rank, inside), lambda: torch.cat((read("right"), q_rows)))
        return LowRank(
            info.name,
            module,
            made_a,
            Stored.computed((out, count + rank), b),
            1.0,
            turned=self._turned(info, (out, inside)),
        )

    def _turned(
        self, info: TensorInfo, made: tuple[int, int], table: bool = False, model_type: str | None = None
    ) -> bool:
        """Whether the parameter is stored as the transpose of B @ A."""
        if info.shape[-1] != info.shape[-2]:
            return info.shape[-2:] != made
        if info.experts:
            return model_type in model_types.TURNED_EXPERTS
        return table or info.transposed or bool(self.config.get("fan_in_fan_out"))

    def _experts_in(self, owner: str, key: str, infos: Mapping[str, TensorInfo]) -> list[TensorInfo]:
        """The fused experts' parameters of a module that the adapter may be beside.

        Raises:
            MismatchError: the base has no such module.
        """
        targets = self.config.get("target_parameters") or ()
        fused = [t for t in infos.values() if t.experts]
        module = names.align([owner], [names.module_name(t.name) for t in fused]).get(owner)
        inside = [t for t in fused if names.module_name(t.name) == module]
        if not inside:
            raise MismatchError(
                f"{self.where}: tensor {key!r} fits no parameter of the base." + near_matches(f"{owner}.weight", infos)
            )
        chosen = [t for t in inside if any(f".{t.name}".endswith(f".{target}") for target in targets)]
        return chosen or inside

    def _scale(self, target: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA. Source: peft 0.21 tuners/lora/layer.py, `update_layer`."""
        alpha = self.config.get("lora_alpha")
        alpha = self._alphas.get(target, 8 if alpha is None else alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _check_complete(self, updates: Iterable[Update]) -> None:
        """PEFT loads a file that lacks planned tensors without a word; here it is an error."""
        have = {update.name for update in updates}
        planned = (
            [e.name for e in self.plan.entries if e.trains and (e.action == "train" or e.rank)] if self.plan else []
        )
        matched = names.align(planned, have)
        missing = [name for name in planned if name not in matched]
        if missing:
            raise MismatchError(
                f"{self.where}: lacks {len(missing)} of {len(planned)} planned tensors, first {missing[0]!r}."
            )
