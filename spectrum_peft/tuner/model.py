"""`SpectrumModel`: PEFT's LoRA tuner, steered by a plan.

PEFT's own layers and their bitsandbytes dispatch carry the adapters; `layers.SpectrumLayer` carries real weights. What is
added here is that the plan says what goes where, that it is checked afterwards, and that files and dtypes are exact.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .. import names
from ..errors import MismatchError, OptionError, SpectrumError, TrainingSetupError, near_matches
from ..records import Plan, PlanEntry
from ..weights import output_embeddings, settle_quantized
from .adapter_files import checked_tensors, follow_layers, live_tensors
from .apply import settle_plan, token_layers
from .base_state import keep_state_whole
from .columns import install_columns
from .config import SpectrumConfig
from .freezing import let_gradients_in, trainable_mismatch, with_groups
from .layers import Aside, SpectrumLayer, has_parts, refuse_two_values
from .lorsa import install, singular_layers, take_base_dtype
from .mixed_batches import check_rows, names_for_rows
from .originals import original_keeper
from .parameters import input_embedding, modules_tied_to_embedding, plan_parameters, tied_modules
from .places import (
    allocated_rank,
    alpha_for_scale,
    describe,
    is_fused,
    is_held,
    is_movable,
    is_placed,
    is_saved,
    pattern_of,
    patterns_of,
    scale_of,
)
from .plain_lora import held_as_saved, saved_as_held
from .ranks import RankChange, allocate, live_rank, moments, set_rank, set_scaling
from .retargeting import misread, retargeted, types_in
from .shared import refuse_unshareable, share_factors
from .weighted import OF_FACTORS, check_summands, concatenated, fill, sum_config, sum_plan

logger = logging.getLogger(__name__)


class SpectrumModel(LoraModel):
    """The tuner behind `get_peft_model(model, SpectrumConfig(...))`.

    Args and attributes as `peft.LoraModel`.
    """

    prefix: str = "lora_"
    tuner_layer_cls = (LoraLayer, SpectrumLayer)

    def train(self, mode: bool = True) -> SpectrumModel:
        """As in torch, but that running statistics (batch norms of speech and vision models) stay the base's: no adapter holds
        them, and training would move those of the base under the adapter."""
        super().train(mode)
        for module in self.model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.train(False)
        return self

    # --- injection ------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Settle the plan for this model, put its layers in, and check that what came out is the plan.

        Raises:
            MismatchError: the plan does not fit the model, or an adapter of another kind is already on a module.
        """
        config = self.peft_config[adapter_name]
        if any(c is config for name, c in self.peft_config.items() if name != adapter_name):
            # TRL's reference adapter comes with the policy's own config; the plan of one must not move the other's.
            config = self.peft_config[adapter_name] = copy.copy(config)
        settle_quantized(model)  # for inference, too: merging and unloading read the weights in the usual layout
        config.plan = settle_plan(model, config, layers=True)
        self._aim(config, model)
        self._refuse_mixtures(config, model, adapter_name)
        refuse_unshareable(config)
        # Of the plan that the adapter came with; the plan in the config may move.
        self.__dict__.setdefault("plan_digests", {})[adapter_name] = config.plan.digest
        self._keep_original = original_keeper(model, config.keep_base)
        try:
            with warnings.catch_warnings():
                # PEFT looks for rank patterns among modules only, not among the fused expert parameters it adapts too.
                warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
                with Aside(model) as self._aside:
                    super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            config.rank_pattern, config.alpha_pattern = self._patterns
            del self._keep_original, self._aside, self._held_in, self._patterns
        self._repair_tied_modules(adapter_name, config)
        if is_movable(config):
            self._allocate(adapter_name, config)
        share_factors(self.model, adapter_name, config.plan)
        describe(config, config.plan)
        self._check_injected(model, adapter_name, config)
        if "_state_hooks" not in self.__dict__:
            self.__dict__["_state_hooks"] = keep_state_whole(self.model)
        let_gradients_in(model)
        self._arm()

    def _aim(self, config: SpectrumConfig, model: nn.Module) -> None:
        """Say the plan in PEFT's words: targets, rank and alpha patterns, modules to save."""
        plan: Plan = config.plan
        held = [e for e in plan.entries if is_held(e, config)]
        adapters = [e for e in plan.entries if is_placed(e, config)]
        self._held_in: dict[str, list[str]] = {}
        for entry in held:
            self._held_in.setdefault(names.module_name(entry.name), []).append(entry.name.rpartition(".")[2])
        modules = [*self._held_in, *(names.module_name(e.name) for e in adapters if not is_fused(e))]
        config.target_modules = list(dict.fromkeys(modules))
        # PEFT shortens long lists of targets to suffixes before it matches; what is matched is this set.
        config.planned_modules = frozenset(modules)
        config.target_parameters = [e.name for e in adapters if is_fused(e)] or None
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None  # the list above is final
        # Conv1D keeps its weight as (in, out); PEFT asks to be told, and sorts it out by layer where kinds are mixed.
        owners = [model.get_submodule(m) for m in modules]
        config.fan_in_fan_out = any(type(getattr(o, "base_layer", o)).__name__ == "Conv1D" for o in owners)
        allocated = allocated_rank(plan) if is_movable(config) else None
        if allocated is not None and config.target_parameters:
            raise OptionError(
                f"rescore_every={config.rescore_every!r}: the rank of fused experts cannot change during training, and "
                f"{config.target_parameters[0]} is a candidate. Leave them out with exclude_modules, or rescore_every."
            )
        self._patterns = patterns_of(adapters, config, allocated)
        # PEFT tries each module's name on every pattern; each module gets its own instead, see `_create_and_replace`.
        config.rank_pattern, config.alpha_pattern = {}, {}
        described = getattr(model, "config", None)
        types = types_in(described) if hasattr(described, "to_dict") else ()
        config.retargeted = frozenset(retargeted(types, (names.module_name(e.name) for e in adapters)))
        config.misread = frozenset(misread(model, (names.module_name(e.name) for e in adapters if not is_fused(e))))
        self._save_whole_modules(config, model, [e for e in plan.entries if is_saved(e, config)])

    def _save_whole_modules(self, config: SpectrumConfig, model: nn.Module, entries: list[PlanEntry]) -> None:
        rows = token_layers(model, config)
        entries = [e for e in entries if not any(names.module_name(e.name).endswith(layer) for layer in rows)]
        if not entries:
            return
        already = config.modules_to_save or []
        modules = dict.fromkeys(names.module_name(e.name) for e in entries)
        new = [m for m in modules if not names.lies_in(f"{m}.weight", already)]
        config.modules_to_save = [*already, *new] or None
        embedding = input_embedding(model)
        if any(model.get_submodule(m) is embedding for m in modules) and self._get_module_names_tied_with_embedding():
            config.ensure_weight_tying = True
        known = {*modules, *self._get_module_names_tied_with_embedding()}
        config.twins = {twin: module for module in modules for twin in tied_modules(model, module) if twin not in known}
        config.modules_to_save = [*(config.modules_to_save or ()), *config.twins] or None

    def _repair_tied_modules(self, adapter_name: str, config: SpectrumConfig) -> None:
        """PEFT makes every module that is tied to the embeddings a Linear without bias; T5 ties further embeddings to them, and
        RoBERTa's head has a bias."""
        for name in getattr(config, "modules_to_tie", None) or ():
            wrapper = self.model.get_submodule(name)
            if not isinstance(wrapper, ModulesToSaveWrapper):
                continue
            made = wrapper.modules_to_save[adapter_name]
            bias = getattr(wrapper.original_module, "bias", None)
            if type(made) is not type(wrapper.original_module) or (bias is not None and made.bias is None):
                twin = copy.deepcopy(wrapper.original_module)
                twin.weight = made.weight
                if bias is not None:  # RoBERTa's: the base's own, which nobody planned to train, so not as a parameter
                    del twin.bias
                    twin.__dict__["bias"] = bias
                wrapper.modules_to_save[adapter_name] = twin
        for name, first in config.twins.items():  # one tensor in the base is one in the copies that train
            twin, made = (self.model.get_submodule(m).modules_to_save[adapter_name] for m in (name, first))
            twin.weight = made.weight
        # TRL multiplies by the head's weight and adds its bias by itself; of a head that is tied to an embedding with
        # trainable rows, PEFT's wrapper shows the weight only. Not as a parameter: it is the base layer's.
        head = output_embeddings(self.model)
        if isinstance(head, TrainableTokensWrapper):
            head.__dict__["bias"] = head.original_module.bias

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """By the tensors, not by the class's list of names: PEFT takes whatever is tied to be tied to the input embeddings,
        and asks a model that has none, which raises."""
        return modules_tied_to_embedding(self.model)

    def _check_tied_modules(self, model: nn.Module, peft_config: SpectrumConfig) -> None:
        """PEFT's own check knows embeddings by two names; here the tie follows the module, whatever it is called."""
        tied = self._get_module_names_tied_with_embedding()
        if peft_config.ensure_weight_tying and tied and peft_config.modules_to_save:
            self._add_modules_to_save_to_tie(peft_config, tied)
        else:
            super()._check_tied_modules(model, peft_config)

    @staticmethod
    def _check_target_module_exists(peft_config: SpectrumConfig, key: str) -> bool:
        return key in peft_config.planned_modules

    def _create_and_replace(
        self,
        lora_config: SpectrumConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        held = self._held_in.get(current_key)
        if held is None or parameter_name is not None:
            lora_config.rank_pattern, lora_config.alpha_pattern = (
                {key: found[key] for key in (pattern_of(current_key),) if key in found} for found in self._patterns
            )
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
            )
            entry = lora_config.plan.by_name.get(f"{current_key}.weight")
            if entry is not None and entry.action == "columns":
                install_columns(getattr(parent, target_name), adapter_name, entry)
            if entry is not None and entry.components is not None:
                options = lora_config.plan.options
                install(
                    getattr(parent, target_name),
                    adapter_name,
                    entry,
                    svd_rank=options["svd_rank"],
                    seed=options["seed"],
                    keeps_dtype=lora_config.trainable_dtype == "float32",
                    from_file=lora_config.plan_from_file,
                )
            return
        layer = target if isinstance(target, SpectrumLayer) else self._aside.around(target)
        if layer is None:
            layer = SpectrumLayer(target, current_key)
            layer.set_adapter(self.active_adapters)  # PEFT switches what it finds in the model; this may stand aside
        layer.update_layer(
            adapter_name,
            held,
            dtype=torch.float32 if lora_config.trainable_dtype == "float32" else None,
            original=self._keep_original,
            inference_mode=lora_config.inference_mode,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.lora_spectrum[adapter_name].requires_grad_(False)
            if has_parts(target):
                self._aside.add(parent, target_name, layer)
            else:
                setattr(parent, target_name, layer)

    def _refuse_mixtures(self, config: SpectrumConfig, model: nn.Module, adapter_name: str) -> None:
        """One module holds real weights or low-rank products, not both. Asked before anything is put in.

        Raises:
            MismatchError: another adapter holds the other kind there.
        """
        held = {names.module_name(e.name) for e in config.plan.entries if is_held(e, config)}
        placed = {names.module_name(e.name) for e in config.plan.entries if is_placed(e, config)}
        empty: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            for wanted, other, wants, has in (
                (held, LoraLayer, "its real weights", "low-rank factors"),
                (placed, SpectrumLayer, "low-rank factors", "real weights"),
            ):
                if name not in wanted or not isinstance(module, other):
                    continue
                owners = sorted(module._all_available_adapter_names())
                if owners:
                    raise MismatchError(
                        f"{name} carries {has} of adapter {owners[0]!r}, and adapter {adapter_name!r} wants {wants} there. "
                        "One module holds one kind; delete the other adapter, load it on a base of its own, or exclude the "
                        "module."
                    )
                empty[name] = module
        for name, module in empty.items():  # PEFT leaves a layer behind when its last adapter is deleted
            parent, _, leaf = name.rpartition(".")
            real = isinstance(module, SpectrumLayer)
            base = module.unload_and_optionally_merge_module(merge=False) if real else module.get_base_layer()
            setattr(model.get_submodule(parent), leaf, base)

    def _check_injected(self, model: nn.Module, adapter_name: str, config: SpectrumConfig) -> None:
        plan: Plan = config.plan
        placed = with_groups(plan, plan_parameters(self, adapter_name).values())
        wanted = {e.name for e in plan.entries if is_held(e, config) or is_placed(e, config)}
        missing = sorted(wanted - placed)
        if missing:
            raise MismatchError(
                f"{len(missing)} of {len(wanted)} planned tensors got no trainable layer, first {missing[0]}."
                + near_matches(missing[0], placed)
            )
        if adapter_name in self.active_adapters and len(self.peft_config) == 1 and not config.inference_mode:
            problem = trainable_mismatch(self, plan)
            if problem:
                raise MismatchError(f"after injection {problem}.")

    # --- ranks that move ------------------------------------------------------------------------------------------

    def _adapter_layers(self, config: SpectrumConfig) -> dict[str, Any]:
        """{plan entry name: LoRA layer} of the entries that have one, fused experts left out."""
        return {
            e.name: self.model.get_submodule(names.module_name(e.name))
            for e in config.plan.entries
            if is_placed(e, config) and not is_fused(e)
        }

    def _allocate(self, adapter_name: str, config: SpectrumConfig) -> None:
        by_name = config.plan.by_name
        for name, layer in self._adapter_layers(config).items():
            allocate(layer, adapter_name, by_name[name].rank or 0)

    def move_ranks(self, adapter_name: str, wanted: Plan, *, step: int, optimizer: Any = None) -> list[RankChange]:
        """Carry out another plan of the same candidates: ranks, learning rates, which adapters train.

        An adapter that `wanted` deactivates keeps its factors, so the function stays, and stops training; activated again,
        it goes on from them. In a distributed run every process ends with rank 0's factors and moments.

        Args:
            wanted: the new plan, as `make_plan` gives it.
            step: optimizer step, for the seed of new rows.
            optimizer: torch optimizer whose moments follow.
        Returns:
            the layers whose rank moved, in plan order.
        """
        config = self.peft_config[adapter_name]
        layers = self._adapter_layers(config)
        entries, changes = [], []
        for entry in config.plan.entries:
            new = wanted.by_name.get(entry.name)
            layer = layers.get(entry.name)
            if new is None or layer is None:
                entries.append(entry)
            elif not new.trains:
                entries.append(dataclasses.replace(entry, active=False, lr_ratio=1.0, score=new.score))
            else:
                live = live_rank(layer, adapter_name)
                if live == 0:
                    set_scaling(layer, adapter_name, scale_of(new, config))
                if live != new.rank:
                    change = set_rank(
                        layer, adapter_name, new.rank, name=entry.name, step=step, seed=config.seed, optimizer=optimizer
                    )
                    changes.append(change)
                entries.append(
                    dataclasses.replace(
                        entry,
                        active=True,
                        rank=new.rank,
                        alpha=alpha_for_scale(layer.scaling[adapter_name], new.rank, config),
                        lr_ratio=new.lr_ratio,
                        score=new.score,
                    )
                )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for change in changes:
                layer = layers[change.name]
                for factor in (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight):
                    for tensor in (factor.data, *moments(optimizer, factor, change.name).values()):
                        torch.distributed.broadcast(tensor, src=0)
        describe(config, config.plan.replace(entries=tuple(entries)))
        return changes

    def restore_plan(self, adapter_name: str, places: Iterable[Sequence[Any]]) -> None:
        """Take up the plan that a run had come to: rows (name, rank, alpha, lr_ratio, active, score).

        Raises:
            MismatchError: the factors that were loaded are of another rank than a row says.
        """
        config = self.peft_config[adapter_name]
        rows = {row[0]: row[1:] for row in places}
        layers = self._adapter_layers(config)
        entries = []
        for entry in config.plan.entries:
            if entry.name in rows and entry.name in layers:
                rank, alpha, lr_ratio, active, score = rows[entry.name]
                live = live_rank(layers[entry.name], adapter_name)
                if live != (rank or 0):
                    raise MismatchError(
                        f"resume: {entry.name} was loaded with rank {live}, trainer_state.json says {rank}. The adapter file "
                        "and the trainer state are of different steps."
                    )
                entry = dataclasses.replace(
                    entry, rank=rank, alpha=alpha, lr_ratio=lr_ratio, active=active, score=score
                )
                if rank:
                    set_scaling(layers[entry.name], adapter_name, scale_of(entry, config))
            entries.append(entry)
        describe(config, config.plan.replace(entries=tuple(entries)))

    def follow_layers(self, adapter_name: str) -> None:
        """Take into the plan what PEFT's EVA did to the layers since; in the dtype that the plan's adapters train in."""
        config = self.peft_config[adapter_name]
        before = config.plan
        follow_layers(self.model, config, adapter_name)
        if config.plan is not before:
            self._cast_adapter_dtype(adapter_name)

    def resting(self, adapter_name: str) -> list[Tensor]:
        """The parameters of deactivated adapters: they are in the function and do not train."""
        config = self.peft_config[adapter_name]
        by_name = config.plan.by_name
        return [
            factor[adapter_name].weight
            for name, layer in self._adapter_layers(config).items()
            if not by_name[name].trains
            for factor in (layer.lora_A, layer.lora_B)
        ]

    # --- which adapters are in force ------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; two values of one weight are refused before anything is switched."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            refuse_two_values(self.model, adapter_name, verb="activate")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    # --- sums of adapters -----------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """As PEFT's: a new adapter, not active and not trained, that is a weighted sum of others. Its mode is `lora`.

        Args:
            as in `peft.LoraModel.add_weighted_adapter`. A layer's rank is the one that it needs: of `cat` the sum of the
            adapters' ranks there, of `svd` and its kin the largest, else the common one.
        Raises:
            OptionError: an adapter trains anything but low-rank products; ranks differ where they must not.
        """
        if adapter_name in self.peft_config:
            return
        combination = check_summands(self.model, self.peft_config, adapters, weights, combination_type)
        plan = sum_plan(self.model, self.peft_config, adapters, combination, svd_rank)
        self.peft_config[adapter_name] = sum_config(plan, self.peft_config[adapters[0]])
        try:
            self.inject_adapter(self.model, adapter_name)
        except SpectrumError:
            self.peft_config.pop(adapter_name)
            raise
        self.set_requires_grad(adapter_name, False)

        def factors(layer: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            if combination == "cat":
                return concatenated(layer, adapters, weights)
            if combination in OF_FACTORS:
                pair = self._generalized_task_arithmetic_weighted_adapter(
                    combination, adapters, weights, layer, density, majority_sign_method
                )
            else:
                pair = self._svd_generalized_task_arithmetic_weighted_adapter(
                    combination, adapters, weights, len(a), layer, a, b, density, majority_sign_method, svd_clamp,
                    full_matrices=svd_full_matrices, driver=svd_driver,
                )  # fmt: skip
            return pair[0], pair[1]

        fill(self.model, plan, adapter_name, factors)

    # --- rows of several adapters ---------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """As PEFT's; the rows that `adapter_names` gives out may belong to adapters of real weights, too."""
        rows = kwargs.get("adapter_names")
        if rows is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        check_rows(self.model, self.peft_config, rows)
        with names_for_rows(self.model, rows, beams=kwargs.get("num_beams") or 1):
            yield

    # --- dtypes ---------------------------------------------------------------------------------------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """One dtype for what trains, `trainable_dtype`, after injection and after every load; the base's where PEFT is told
        `autocast_adapter_dtype=False`.

        On a quantized base, SFTTrainer's constructor rounds every trainable tensor to bfloat16. The exact values are kept
        here for `restore_dtypes`, which the callback calls before the first step.
        """
        config = self.peft_config[adapter_name]
        if not autocast_adapter_dtype and config.trainable_dtype == "float32":
            for layer in self.model.modules():
                if isinstance(layer, SpectrumLayer):
                    layer.take_base_dtype(adapter_name)
            for name, _ in singular_layers(self.model, adapter_name):
                take_base_dtype(self.model.get_submodule(name), adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype and config.trainable_dtype == "float32")
        if getattr(self.model, "is_quantized", False):
            self._keep_exact(adapter_name)

    def _keep_exact(self, adapter_name: str) -> None:
        parameters = dict(self.named_parameters())
        wanted = [parameters[n] for n in plan_parameters(self, adapter_name) if n in parameters]
        self.__dict__.setdefault("_exact", {})[adapter_name] = _Exact((p, p.data) for p in wanted)

    def restore_dtypes(self) -> list[str]:
        """Give back the exact values where a trainer rounded them; nothing else is touched.

        Returns:
            names of the adapters that had been cast.
        """
        restored = []
        kept = self.__dict__.get("_exact", {})
        for adapter_name in list(kept):
            cast = False
            for parameter, exact in kept.pop(adapter_name):
                if parameter.dtype == exact.dtype or parameter.shape != exact.shape:
                    continue
                rounded = exact.to(device=parameter.device, dtype=parameter.dtype)
                # Only if the parameter is still the rounding of what is kept: a value that moved on is the newer one.
                same = torch.equal(rounded, parameter.data)
                parameter.data = (exact if same else parameter.data).to(device=parameter.device, dtype=exact.dtype)
                cast = True
            if cast:
                restored.append(adapter_name)
            if adapter_name in self.peft_config:  # the next trainer will round what this one trained
                self._keep_exact(adapter_name)
        return restored

    # --- guards ---------------------------------------------------------------------------------------------------

    def _why_a_callback_is_needed(self, adapter_name: str) -> str | None:
        plan = self.peft_config[adapter_name].plan
        if any(e.trains and e.lr_ratio != 1.0 for e in plan.entries):
            return "it gives tensors learning rates of their own (lr_ratio)"
        if plan.options.get("rescore_every") is not None:
            return "it changes ranks during training (rescore_every)"
        if getattr(self.model, "is_quantized", False) and any(e.action == "train" and e.trains for e in plan.entries):
            return "it trains real weights on a quantized base, which trainers round to bfloat16"
        return None

    def attended(self, yes: bool = True) -> None:
        """Say that somebody (`SpectrumCallback`, `parameter_groups`) carries out what a plan needs beyond layers, or that
        nobody does any longer."""
        if yes:
            self._disarm()
        else:
            self._arm()

    def _arm(self) -> None:
        if not hasattr(self, "_guard") and any(self._why_a_callback_is_needed(name) for name in self.peft_config):
            self._guard = self.model.register_forward_pre_hook(self._refuse_unattended_training)

    def _disarm(self) -> None:
        if hasattr(self, "_guard"):
            self._guard.remove()
            del self._guard

    def _refuse_unattended_training(self, module: nn.Module, args: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        for adapter_name in self.active_adapters:
            reason = self._why_a_callback_is_needed(adapter_name)
            if reason:
                raise TrainingSetupError(
                    f"the plan of adapter {adapter_name!r} needs SpectrumCallback: {reason}. Add "
                    "callbacks=[SpectrumCallback()] to the trainer, or use parameter_groups(model, plan, ...) in a loop "
                    "of your own."
                )

    # --- merging and unloading ------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's; two values of one weight are refused before anything is merged."""
        refuse_two_values(self.model, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's, and modules that train whole are the merged adapter's; without a merge they are the base's."""
        if merge:
            refuse_two_values(self.model, adapter_names)
        self._disarm()
        for handle in self.__dict__.pop("_state_hooks", ()):
            handle.remove()
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if not isinstance(module, ModulesToSaveWrapper):
                continue
            if not merge:
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, module.original_module)
            elif adapter_names is not None:  # PEFT would take the active adapter's copy, whichever is merged
                module._active_adapter = next((n for n in adapter_names if n in module.modules_to_save), [])
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SpectrumConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's selection, live slots only, and a plan that says their ranks: the config is written after this."""
        follow_layers(model, config, adapter_name)
        for _, basis in singular_layers(model, adapter_name):
            basis.settle()
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return held_as_saved(live_tensors(model, adapter_name, selected), config, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SpectrumConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's mapping, then a check that PEFT does not make: the file holds what the plan says, and nothing else.

        Raises:
            MismatchError: a tensor is missing, unknown, or of another shape.
        """
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return checked_tensors(model, config, adapter_name, saved_as_held(mapped, config, adapter_name))


class _Exact(list[tuple[nn.Parameter, Tensor]]):
    """(parameter, its exact value): the same storage, until somebody replaces the parameter's data by a rounded one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Exact:
        pairs = ((copy.deepcopy(p, memo), p, exact) for p, exact in self)
        return _Exact((q, q.data if p.data_ptr() == exact.data_ptr() else exact.clone()) for q, p, exact in pairs)
