"""Which stored tensors make which parameters of a model class: asked of transformers, which renames, merges, splits and
turns tensors while it loads, class by class.

The class is built without weights. Its conversion mapping says the names; what the operations do is found by running
transformers' own code on the *numbers* of rows or of elements instead of their values, so no operation is known here by
name, and what was moved can be moved back exactly.

Source: transformers 5, core_model_loading.py (`convert_and_load_state_dict_in_model`) and conversion_mapping.py.
"""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import names
from ..errors import CheckpointError, one_line
from .roles import roles_of
from .towers import towers_of
from .uncalled import changed_in_place, without_adapters

# The names that most decoders share. transformers renames none of them for a causal class, so a scan of such a file need
# not load the modelling code (seconds, and some hundred MB) to be told so.
_SHARED = re.compile(
    r"(model\.(embed_tokens|norm)|lm_head"
    r"|model\.layers\.(?P<layer>\d+)\.(self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj"
    r"|(input|post_attention|pre_feedforward|post_feedforward)_layernorm))\.(weight|bias|SCB|weight_format)(\..+)?"
)


def must_ask(config: Mapping[str, Any], stored: Sequence[str]) -> bool:
    """Whether the model class has to say what the stored names mean: they are not those that most decoders share."""
    named = str((config.get("architectures") or [""])[0])
    layers = config.get("num_hidden_layers")
    if not named.endswith("ForCausalLM") or not isinstance(layers, int):
        return True
    found = [_SHARED.fullmatch(name) for name in stored]
    return not all(match and int(match["layer"] or 0) < layers for match in found)


def _part_for(kind: Any, config: Any) -> Any:
    """The config itself, or the part of it that a class is of: a text class on a checkpoint of a model that sees."""
    wanted = getattr(kind, "config_class", None)
    if not isinstance(wanted, type) or isinstance(config, wanted):
        return config
    return next((part for part in vars(config).values() if isinstance(part, wanted)), config)


def skeleton_of(kind: Any, config: Any) -> nn.Module:
    """The model of a class and a config, or the part of one, on the meta device: modules, shapes and ties, no values.

    Raises:
        CheckpointError: the class cannot be built from this config.
    """
    config = copy.deepcopy(_part_for(kind, config))
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the float model's names; what is quantized keeps its module's name
    try:
        with torch.device("meta"):
            model: nn.Module = kind._from_config(config)
    except Exception as error:  # whatever a class raises where its config lacks something
        raise CheckpointError(f"{kind.__name__} cannot be built from its config: {one_line(error)}") from error
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


def skeleton_in(folder: Path, config: Mapping[str, Any]) -> nn.Module | None:
    """The skeleton of the class that a checkpoint's config names; None where transformers has no such class.

    Raises:
        CheckpointError: see `skeleton_of`.
    """
    named = (config.get("architectures") or [None])[0]
    if not named or not config.get("model_type"):
        return None
    import transformers

    kind = getattr(transformers, str(named), None)
    if kind is None or not hasattr(kind, "_from_config") or "auto_map" in config:
        return None
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class has its own errors for fields of wrong types
        raise CheckpointError(f"{folder / 'config.json'}: {one_line(error)}") from error
    return skeleton_of(kind, settings)


_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def skeletons_for(folder: Path, classes: Sequence[str], task: str | None) -> Iterator[nn.Module]:
    """The skeletons of the classes named, and of what transformers opens the checkpoint as for a task of PEFT's; those that
    cannot be built are left out."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # each config class has its own errors for fields of wrong types
        return
    kinds = [(getattr(transformers, name, None), config) for name in classes]
    auto = getattr(transformers, _AUTO_CLASSES.get(str(task), ""), None)
    if auto is not None:
        kinds.append((auto, config))
    for kind, settings in kinds:
        if kind is None:
            continue
        try:
            if hasattr(kind, "_model_mapping"):  # an auto class, which for a text class takes the text part's config
                with torch.device("meta"):
                    found = kind.from_config(settings)
            else:
                found = skeleton_of(kind, settings)
        except Exception:  # the same of model classes
            continue
        yield found  # outside of the device's context, which would hold for whoever takes it


def skeleton_like(model: nn.Module) -> nn.Module | None:
    """The skeleton of a live model's class and config, as it was before PEFT or a quantizer put layers into it; None where
    the model is none of transformers'."""
    config = getattr(model, "config", None)
    if not hasattr(model, "_from_config") or config is None:
        return None
    return skeleton_of(type(model), config)


def unquantized_modules(skeleton: nn.Module) -> list[str]:
    """Modules that stay unquantized where nobody lists any: the output head, what is tied to it, the last one, as transformers
    has it, and those whose weight is read without calling the layer (Mamba), which would be read packed, or changed in place."""
    from transformers.quantizers.base import get_keys_to_not_convert

    uncalled = [*(names.module_name(name) for name in without_adapters(skeleton)), *changed_in_place(skeleton)]
    # Every part of a head: those of a task train whole (ModernBERT's `head.dense` before its classifier).
    linear = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    uncalled += [name for name in linear if names.in_head(f"{name}.weight")]
    try:
        return sorted({*get_keys_to_not_convert(skeleton), *uncalled})
    except (AttributeError, NotImplementedError):  # none of transformers' models, or one without a head
        return uncalled


def loaded_together(skeleton: nn.Module, modules: Iterable[str]) -> list[str]:
    """The modules named, and those whose weight comes out of the same stored tensor (query, key and value of GTE): transformers
    quantizes what one step of loading makes all or not at all."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    several = [
        sorted(entry.target_patterns, key=len, reverse=True)
        for entry in get_model_conversion_mapping(skeleton)
        if isinstance(entry, WeightConverter) and len(entry.target_patterns) > 1
    ]
    groups: dict[str, set[tuple[int, str, str]]] = {}
    for name, _ in skeleton.named_parameters(remove_duplicate=False):
        for number, targets in enumerate(several):
            target = next((t for t in targets if t in name), None)
            if target is not None:
                before, _, after = name.partition(target)
                groups.setdefault(names.module_name(name), set()).add((number, before, after))
    modules = list(modules)
    wanted = {key for module in modules for key in groups.get(module, ())}
    return [*modules, *(m for m, keys in groups.items() if keys & wanted and m not in modules)]


@dataclass(frozen=True)
class Recipe:
    """One step of loading: some stored tensors become some parameters.

    Attributes:
        stored: in the order that transformers collects them.
        parameters: in the order that they come out.
        places: {stored tensor: (parameter, first row)} where each stored tensor lies whole and in order in one parameter,
            both seen as matrices with the leading dimensions one below the other; None where elements are mixed.
        convert: {stored tensor: values} -> {parameter: values}, transformers' own operations; the values' dtype is kept.
    """

    stored: tuple[str, ...]
    parameters: tuple[str, ...]
    places: Mapping[str, tuple[str, int]] | None
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    _numbers: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def put_back(self, parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors that would load as the given parameters; elements that no parameter takes stay.

        Args:
            parameters: all of this recipe's, of one float dtype. stored: values as they are, any dtype.
        Raises:
            CheckpointError: an operation computes instead of moving elements, so it cannot be undone.
        """
        shapes = {name: stored[name].shape for name in self.stored}
        ends = [0]
        for name in self.stored:
            ends.append(ends[-1] + math.prod(shapes[name]))
        numbers = {
            name: torch.arange(first, last).reshape(shapes[name])
            for name, first, last in zip(self.stored, ends[:-1], ends[1:], strict=True)
        }
        moved = self.convert(numbers)
        dtype = next(iter(parameters.values())).dtype
        flat = torch.cat([stored[name].reshape(-1).to(dtype) for name in self.stored])
        for name, value in parameters.items():
            to = moved[name]
            if to.dtype != torch.int64 or to.shape != value.shape or (to.numel() and int(to.max()) >= len(flat)):
                raise CheckpointError(
                    f"{self.stored[0]}: transformers computes {name} from it on loading, so a changed {name} cannot be "
                    "written back; wanted an operation that moves elements."
                )
            flat[to.reshape(-1)] = value.reshape(-1)
        return {
            name: flat[first:last].reshape(shapes[name])
            for name, first, last in zip(self.stored, ends[:-1], ends[1:], strict=True)
        }


@dataclass(frozen=True)
class Layout:
    """What a model class makes of a checkpoint's tensors.

    Attributes:
        recipes: {parameter: the step that makes it}, in the order of the stored tensors.
        shapes: {parameter: shape in the class}.
        roles: {parameter: one of `names.ROLES`}; transposed: those stored as (in, out).
        towers: {prefix of parameters: one of `names.Tower`}, empty for a model of one part.
        ignored: stored tensors that the class does not take.
        new: parameters that the checkpoint ought to give and does not; of a tied group, none of it.
        tied: groups of parameters that are one tensor in the class, one that the checkpoint gives first.
    """

    recipes: Mapping[str, Recipe]
    shapes: Mapping[str, tuple[int, ...]]
    roles: Mapping[str, str]
    towers: Mapping[str, names.Tower]
    transposed: frozenset[str]
    ignored: tuple[str, ...]
    new: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]

    def stranger(self) -> str | None:
        """The first parameter in a block where no block is given, as of a text class that another family's model has inside,
        and for which transformers knows no names; a head, or a table, may fit by chance."""
        blocks = [name for name in self.new if names.block_index(name) is not None]
        given = any(names.block_index(name) is not None for name in self.recipes)
        if len(self.new) <= len(self.recipes) or given:
            return None
        return next(iter(blocks or self.new))


class _Sized:
    """Stands for the model where an operation asks for a parameter's shape or dtype; anything else the skeleton says."""

    def __init__(self, skeleton: nn.Module, shapes: Mapping[str, tuple[int, ...]], rows: bool, dtype: torch.dtype):
        self._skeleton, self._shapes, self._rows, self._dtype = skeleton, shapes, rows, dtype

    def get_parameter(self, name: str) -> Tensor:
        shape = self._shapes[name]
        shape = (*shape[:-1], 1) if self._rows and len(shape) > 1 else shape
        return torch.empty(shape, dtype=self._dtype, device="meta")

    get_parameter_or_buffer = get_parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._skeleton, name)


def layout_of(skeleton: nn.Module, stored: Mapping[str, tuple[int, ...]]) -> Layout:
    """What the skeleton's class makes of stored tensors of the given names and shapes.

    Raises:
        CheckpointError: transformers' own operations fail on these shapes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = dict(skeleton.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}

    def renamed(name: str) -> tuple[str, str | None]:
        prefix = skeleton.base_model_prefix
        found, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if found not in state and name in state:
            found, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        return found, pattern

    plain: dict[str, list[str]] = {}
    collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    ignored = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = renamed(name)
        if target not in state:
            ignored.append(name)
        elif pattern is None:
            plain.setdefault(target, []).append(name)
        else:
            collected.setdefault(target, (by_pattern[pattern], []))[1].append((pattern, name))

    recipes = [_renamed(target, sources[-1]) for target, sources in plain.items()]
    recipes += [
        _converted(target, converter, sources, skeleton, stored, shapes)
        for target, (converter, sources) in collected.items()
    ]
    order = {name: i for i, name in enumerate(stored)}
    recipes.sort(key=lambda recipe: min(order[name] for name in recipe.stored))
    made = {name: recipe for recipe in recipes for name in recipe.parameters if name in parameters}
    tied = _tied(skeleton, made)
    given = set(made) | {name for group in tied if group[0] in made for name in group}
    roles, transposed = roles_of(skeleton)
    return Layout(
        made,
        shapes,
        roles,
        towers_of(skeleton),
        transposed,
        tuple(name for name in stored if name in set(ignored)),
        tuple(name for name in shapes if name in parameters and name not in given and not _is_made(skeleton, name)),
        tied,
    )


def _is_made(skeleton: nn.Module, name: str) -> bool:
    """Whether a class makes a parameter by a formula and expects it in no file (sinusoids, ...)."""
    patterns = getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()
    return not skeleton.get_parameter(name).requires_grad or any(re.search(pattern, name) for pattern in patterns)


def _renamed(target: str, source: str) -> Recipe:
    return Recipe((source,), (target,), {source: (target, 0)}, lambda values: {target: values[source]})


def _converted(
    target: str,
    converter: Any,
    sources: Sequence[tuple[str, str]],
    skeleton: nn.Module,
    stored: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Recipe:
    names = tuple(name for _, name in sources)

    def run(values: Mapping[str, Tensor], rows: bool) -> dict[str, Tensor]:
        step = copy.deepcopy(converter)
        for pattern, name in sources:
            step.collected_tensors[pattern].append(values[name])
        sized = _Sized(skeleton, shapes, rows, next(iter(values.values())).dtype)
        made = step.convert(target, model=sized, config=skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def convert(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return run(values, rows=False)
        except Exception as error:  # of any operation, on shapes it was not made for
            shown = [tuple(v.shape) for v in values.values()]
            raise CheckpointError(
                f"{names[0]}: transformers cannot make {target} of {len(names)} stored tensors of the shapes "
                f"{sorted(set(shown))}: {one_line(error)}"
            ) from error

    places = _places(run, names, stored, shapes)
    if places is not None:
        made = tuple(dict.fromkeys(parameter for parameter, _ in places.values()))
    else:
        made = tuple(convert({name: torch.empty(stored[name], device="meta") for name in names}))
    return Recipe(names, made, places, convert)


def _places(
    run: Callable[..., dict[str, Tensor]],
    names: Sequence[str],
    stored: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[str, int]] | None:
    """`Recipe.places`, from a run on the numbers of the rows; None where rows do not stay rows, whole and in order."""
    numbers, owner = {}, {}
    at = 0
    for name in names:
        shape = stored[name]
        count = math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)
        numbers[name] = torch.arange(at, at + count).reshape((*shape[:-1], 1) if len(shape) > 1 else shape)
        owner[at] = (name, count)
        at += count
    try:
        made = run(numbers, rows=True)
    except Exception:  # an operation on the last dimension, which a row's number does not have
        return None
    places: dict[str, tuple[str, int]] = {}
    for parameter, rows in made.items():
        shape = shapes.get(parameter)
        wanted = shape if shape is None or len(shape) < 2 else (*shape[:-1], 1)
        if rows.dtype != torch.int64 or wanted is None or tuple(rows.shape) != tuple(wanted):
            return None
        flat = rows.reshape(-1).tolist()
        first = 0
        while first < len(flat):
            name, count = owner.get(flat[first], (None, 0))
            if (
                name is None
                or name in places
                or flat[first : first + count] != list(range(flat[first], flat[first] + count))
            ):
                return None
            if len(shape or ()) > 1 and stored[name][-1:] != tuple(shape or ())[-1:]:
                return None
            places[name] = (parameter, first)
            first += count
    return places if len(places) == len(names) else None


def _tied(skeleton: nn.Module, made: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(sorted(group, key=lambda name: name not in made)) for group in groups.values() if len(group) > 1)
