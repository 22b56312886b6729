"""`SpectrumCallback`: carries a plan through transformers' Trainer and TRL's trainers.

The optimizer exists before `on_train_begin`, so a plain model is frozen in `on_init_end`; `on_train_begin` checks that what
the optimizer holds is the plan, and raises with the remedy where it is not.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .. import names
from ..devices import memory_is_measured, peak_memory
from ..errors import MismatchError, OptionError, TrainingSetupError, first_of
from ..plan import LONG_RUN, MODES, rank_of, ratio_of, replan
from ..records import ADAPTER_ACTIONS, PLAN_FILE, REPORT_FILE, Plan, SnrReport, write_text
from ..scan import scan_weights
from ..tuner import (
    SpectrumModel,
    freeze_to_plan,
    let_gradients_in,
    plan_parameters,
    settle_plan,
    share_in_dtype,
    trainable_mismatch,
)
from ..tuner.config import SpectrumConfig
from .optim import StepRatios, has_own_ratios, innermost, ratios_by_parameter
from .processes import (
    Sharing,
    check_plans_agree,
    check_rows_agree,
    from_first_process,
    refuse_lost_ratios,
    refuse_unfit_sharing,
)
from .unmoved import look_at_first_outputs, without_gradient

logger = logging.getLogger(__name__)

# A rate more than this many times off a mode's default is worth a line: real weights and adapters differ by ten.
_RATE_FACTOR = 5.0
# Trainers of preferences and rewards go slower than those of text. How much is the ratio of TRL's own defaults for the same
# weights: trl 1.16, learning_rate of DPOConfig, KTOConfig, GRPOConfig and RLOOConfig (1e-6), against 2e-5 of SFTConfig.
_SLOWER = {"DPOConfig": 20.0, "KTOConfig": 20.0, "GRPOConfig": 20.0, "RLOOConfig": 20.0}


def slower_by(arguments: type[TrainingArguments]) -> float:
    """How many times slower than with text the trainer of these arguments goes."""
    return next((_SLOWER[c.__name__] for c in arguments.__mro__ if c.__name__ in _SLOWER), 1.0)


def usual_rates(plan: Plan, args: TrainingArguments) -> tuple[float, float]:
    """The learning rates that a plan usually takes under the trainer that these arguments are for: in a long run, as if all
    matrices trained, and in this one; in the shortest where its steps are not known yet."""
    mode, r = MODES[plan.mode], rank_of(plan.options)
    slower = slower_by(type(args))
    if slower != 1:
        return mode.default_lr / slower, mode.default_lr / slower
    steps = args.max_steps if args.max_steps > 0 else 1
    return mode.rate_for(LONG_RUN, r), mode.rate_for(steps, r, ratio_of(plan.options, 1.0))


class SpectrumCallback(TrainerCallback, ExportableState):
    """Pass it in `callbacks=[...]` when the trainer is built.

    On a plain model, `SpectrumCallback(SpectrumConfig(mode="spectrum", ...))` freezes everything but the plan; modes `full`
    and `spectrum` only. On a `PeftModel` with a `SpectrumConfig`, or on a model from `load_model_with_spectrum`, the model
    carries its plan already: `SpectrumCallback()`.

    It applies the plan's learning-rate ratios, keeps trainers from rounding what trains, lets backward stop where nothing
    below trains, writes `spectrum_plan.yaml` beside every checkpoint, refuses a resume under another plan, and logs trained
    parameters, tokens per second and peak memory.

    Args:
        config: for a plain model without a plan; None where the model carries one.
    Raises:
        TrainingSetupError: (on train begin) the callback was added after the trainer was built, `model_init` built another
            model, or the optimizer holds other tensors than the plan.
        OptionError: (on init end) an adapter mode on a plain model; a config on a model that carries a plan.
    """

    def __init__(self, config: SpectrumConfig | None = None) -> None:
        self.config = config
        self.plan: Plan | None = None
        self.report: SnrReport | None = None
        self.initial_digest: str | None = None
        self.saw_init_end = False
        self.history: list[dict[str, Any]] = []
        self.budget: int | None = None
        self.rows_per_step: int | None = None
        self.sums_up = True  # a last line about time and memory; False where somebody else writes it
        self._ratios: StepRatios | None = None
        self._silenced: list[Any] = []
        self._sharing = Sharing()
        self._started: tuple[float, int, int] | None = None
        self._looked = False  # at the gradients of the first step

    # --- setting up -----------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Freeze a plain model to its plan; take over what a PEFT model's plan needs from the trainer."""
        self.saw_init_end = True
        tuner = tuner_of(model)
        carried = getattr(model, "spectrum_plan", None)
        if tuner is not None or carried is not None:
            if self.config is not None:
                raise OptionError("SpectrumCallback(config): the model carries a plan already; use SpectrumCallback().")
            self._take_plan(model)
        elif self.config is None:
            raise TrainingSetupError(
                "SpectrumCallback() on a model without a plan: give it a config, SpectrumCallback(SpectrumConfig(...)), or "
                "load the model with load_model_with_spectrum, or wrap it with get_peft_model."
            )
        else:
            mode = self.config.mode
            if not MODES[mode].plain_model:
                raise OptionError(
                    f"SpectrumCallback: mode {mode!r} puts adapters into the model, which a callback cannot do. Use "
                    f"get_peft_model(model, SpectrumConfig(mode={mode!r}, ...)), or peft_config= of TRL's trainers."
                )
            model.spectrum_plan = settle_plan(model, self.config)
            model.spectrum_report = self.config.report
            freeze_to_plan(model, model.spectrum_plan)
            self._take_plan(model)
        assert self.plan is not None
        if tuner is not None:
            tuner.attended()
            if tuner.restore_dtypes():
                logger.info(
                    "the adapter trains in float32: the trainer had made it bfloat16, and its exact values were put back"
                )
        self._sharing = refuse_unfit_sharing(args, self.plan, model)
        check_plans_agree(self.plan)  # before the weights are shared out, where other plans would let processes wait
        share_in_dtype(model, self._sharing.computes_in)
        self._refuse_reentrant_sharing(args)
        self._stop_backward_early(args, model)
        low, high = usual_rates(self.plan, args)
        if args.learning_rate and not low / _RATE_FACTOR <= args.learning_rate <= high * _RATE_FACTOR:
            logger.warning(
                "learning_rate=%g; the usual rate of mode %r with %s is about %s", args.learning_rate, self.plan.mode,
                type(args).__name__, f"{low:g}" if low == high else f"{low:g} (long runs) to {high:g}",
            )  # fmt: skip

    def _take_plan(self, model: Any) -> None:
        tuner = tuner_of(model)
        if tuner is None:
            self.plan = model.spectrum_plan
            self.report = getattr(model, "spectrum_report", self.report)
        else:
            self._take_plan_of(tuner)

    def _take_plan_of(self, tuner: SpectrumModel) -> None:
        config = tuner.peft_config[tuner.active_adapters[0]]
        tuner.follow_layers(tuner.active_adapters[0])
        self.plan = config.plan
        if isinstance(config.report, SnrReport):
            self.report = config.report

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check model, optimizer and checkpoint against the plan; hook the rates into the optimizer's step."""
        if not self.saw_init_end:
            raise TrainingSetupError(
                "SpectrumCallback was added after the trainer was built, so the optimizer may hold other tensors than the "
                "plan. Pass it when the trainer is built: Trainer(..., callbacks=[SpectrumCallback(...)])."
            )
        tuner = tuner_of(model)
        if tuner is None and getattr(model, "spectrum_plan", None) is None:
            raise TrainingSetupError(
                "the model that trains is not the one that was frozen: Trainer(model_init=...) builds it anew in train(). "
                "Freeze inside model_init, for example by returning load_model_with_spectrum(...)[0] from it."
            )
        self._take_plan(model)
        plan = self.plan
        assert plan is not None
        if tuner is not None:
            tuner.attended()
            tuner.restore_dtypes()  # a resume has loaded the adapter again
        problem = trainable_mismatch(model, plan)
        if problem:
            raise TrainingSetupError(
                f"when training began, {problem}. Something changed requires_grad after the plan did."
            )
        self._check_optimizer(args, model, optimizer)
        _refuse_lost_moments(state, optimizer)
        self._resume(args, state, tuner)
        plan = self.plan
        check_plans_agree(plan)
        check_rows_agree(getattr(train_dataloader, "dataset", None))
        self._stop_backward_early(args, model)
        ratios = ratios_by_parameter(model, plan, plan_parameters(model))
        rescoring = plan.options.get("rescore_every") is not None and tuner is not None
        wanted = rescoring or any(q != 1.0 for q in ratios.values())
        if wanted and optimizer is not None and not has_own_ratios(optimizer):
            refuse_lost_ratios(self._sharing, ratios.values())
            self._ratios = StepRatios(optimizer, ratios)
            self._leave_out_resting(tuner)
            used = sorted(set(ratios.values()))
            logger.info(
                "learning rates by importance: %d from %.3g to %.3g (%.3g to %.3g times the scheduled rate)",
                len(used), args.learning_rate * used[0], args.learning_rate * used[-1], used[0], used[-1],
            )  # fmt: skip
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        slots = "" if not rescoring else f" ({trained:,} are allocated, so that ranks may move)"
        logger.info(
            "mode %s trains %s parameters %s%s", plan.mode,
            f"{plan.trainable_parameters if rescoring else trained:,}", _places_in_words(plan), slots,
        )  # fmt: skip
        if not args.torch_compile:  # compiled forwards are not hooked
            look_at_first_outputs(model, plan)
        self._started = (time.perf_counter(), state.global_step, int(state.num_input_tokens_seen or 0))

    def _check_optimizer(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
        if optimizer is None or getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            logger.info("the optimizer's tensors are sharded or not at hand; they were not compared with the plan")
            return
        held = {id(p) for group in innermost(optimizer).param_groups for p in group["params"]}
        wanted = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        missing = [name for key, name in wanted.items() if key not in held]
        if missing or held - set(wanted):
            raise TrainingSetupError(
                f"the optimizer holds {len(held)} tensors and the plan trains {len(wanted)}"
                + (f", {missing[0]} is not in it" if missing else "")
                + ". It was built before the model was frozen; build the trainer with callbacks=[SpectrumCallback(...)]."
            )

    def _resume(self, args: TrainingArguments, state: TrainerState, tuner: SpectrumModel | None) -> None:
        """Compare the plan that the checkpoint began with, and the rows of its steps; go on with the plan it had come to."""
        stored = state.stateful_callbacks.get("SpectrumCallback")
        stored = stored[-1] if isinstance(stored, list) and stored else stored
        kept = (stored or {}).get("attributes", {})
        assert self.plan is not None
        mine = self.plan.digest if tuner is None else tuner.plan_digests[tuner.active_adapters[0]]
        self.initial_digest, self.history, self.budget = mine, [], self.plan.trainable_parameters
        self.rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if not state.global_step or not kept.get("initial_digest"):
            return
        if mine not in (kept["initial_digest"], kept["current_digest"]):
            raise MismatchError(
                f"resume: the checkpoint was trained under plan {kept['initial_digest'][:12]}, this run's plan is "
                f"{mine[:12]}. Use the same options, or the spectrum_plan.yaml in the checkpoint as plan=."
            )
        before = kept.get("rows_per_step")
        if before not in (None, self.rows_per_step) and not (args.ignore_data_skip or args.auto_find_batch_size):
            raise MismatchError(
                f"resume: a step of the checkpoint took {before} rows and one of this run takes {self.rows_per_step} "
                f"({args.train_batch_size} on each of {args.world_size} processes, {args.gradient_accumulation_steps} times), so "
                "that rows would be left out or seen twice. Change per_device_train_batch_size or gradient_accumulation_steps."
            )
        self.initial_digest, self.history, self.budget = kept["initial_digest"], list(kept["history"]), kept["budget"]
        if tuner is not None and kept["places"]:
            tuner.restore_plan(tuner.active_adapters[0], kept["places"])
            self._take_plan_of(tuner)

    def _refuse_reentrant_sharing(self, args: TrainingArguments) -> None:
        """DDP wants each parameter ready once in a backward, and reentrant checkpointing runs one backward a block."""
        if args.world_size == 1 or not args.gradient_checkpointing or self.plan is None:
            return
        group = next((e.group for e in self.plan.entries if e.group is not None and e.trains), None)
        if group is not None and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise TrainingSetupError(
                f"gradient_checkpointing_kwargs has use_reentrant=True, and layers share factors (group {group}): over several "
                "processes that marks a parameter ready twice. Wanted use_reentrant=False."
            )

    def _stop_backward_early(self, args: TrainingArguments, model: Any) -> None:
        """Without a gradient to the embeddings, backward ends at the lowest block that trains.

        Trainers ask for that gradient (`enable_input_require_grads`) for reentrant checkpointing, which needs it.
        """
        assert self.plan is not None
        below = [
            e.name
            for e in self.plan.entries
            if e.trains and names.block_index(e.name) is None and names.role(e.name, e.shape) == "embedding"
        ]
        how = args.activation_checkpointing_kwargs or {}
        reentrant = args.activation_checkpointing and how.get("use_reentrant", False)
        if self.plan.options.get("backward_depth", 1.0) == 1.0 or below:
            return
        if reentrant:
            logger.warning(
                "backward_depth saves no backward with reentrant gradient checkpointing; set use_reentrant=False"
            )
            return
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.disable_input_require_grads()
        # That takes off what was put on last. PEFT's k-bit preparation, PeftModel and trainers each put one on, and only the
        # last handle is kept.
        for module in base.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                    del module._forward_hooks[key]
        let_gradients_in(base)

    # --- while it runs --------------------------------------------------------------------------------------------

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """After the first backward passes of a run: name what was planned and got no gradient, once."""
        if self._looked or self.plan is None:
            return
        self._looked = True
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):  # which keep gradients elsewhere
            return
        unused = without_gradient(model, self.plan)
        if unused and state.is_world_process_zero:
            logger.warning(
                "%d of %d planned tensors got no gradient in the first step: %s; the forward does not use them, or sent nothing "
                "through them", len(unused), len(self.plan.trainable_names), first_of(unused, 20),
            )  # fmt: skip

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Every `rescore_every` steps, or at the end of an epoch: score W + dW again and move ranks.

        Here the gradients are zero and the checkpoint of this step is not written yet.
        """
        tuner = tuner_of(model)
        if tuner is not None and self.evaluates_at(state):
            self._rescore(state, model, tuner, optimizer)

    def evaluates_at(self, state: TrainerState) -> bool:
        """Whether ranks are evaluated again at the end of the step that `state` is at."""
        every = None if self.plan is None else self.plan.options.get("rescore_every")
        if every is None or state.global_step >= state.max_steps:
            return False
        at_epoch_end = state.epoch is not None and abs(state.epoch - round(state.epoch)) < 1e-6
        return at_epoch_end if every == "epoch" else state.global_step % every == 0

    def _rescore(self, state: TrainerState, model: Any, tuner: SpectrumModel, optimizer: Any) -> None:
        adapter = tuner.active_adapters[0]
        plan = self.plan
        assert plan is not None
        wanted = None
        if state.is_world_process_zero:
            report = scan_weights(model, plan.criterion, seed=plan.options.get("seed", 0))
            matrices = {e.name for e in plan.entries if e.action != "save"}
            wanted = replan(plan, {n: q for n, q in report.scores.items() if n in matrices}, budget=self.budget)
        wanted = from_first_process(wanted)
        before = {e.name for e in plan.entries if e.trains}
        changes = tuner.move_ranks(
            adapter, wanted, step=state.global_step, optimizer=None if optimizer is None else innermost(optimizer)
        )
        self._take_plan_of(tuner)
        after = {e.name for e in self.plan.entries if e.trains}
        if self._ratios is not None:
            self._ratios.ratios = ratios_by_parameter(model, self.plan, plan_parameters(model))
            self._leave_out_resting(tuner)
        self.history.append(
            {
                "step": state.global_step,
                "activated": sorted(after - before),
                "deactivated": sorted(before - after),
                "ranks": [dataclasses.asdict(c) for c in changes],
                "trainable_parameters": self.plan.trainable_parameters,
                "digest": self.plan.digest,
            }
        )
        for change in changes:
            logger.info(
                "step %d: %s rank %d -> %d%s", state.global_step, change.name, change.before, change.after,
                f", largest dropped singular value {change.dropped:.3g}" if change.dropped else "",
            )  # fmt: skip
        logger.info(
            "step %d: ranks evaluated again; %d layers moved, %d activated, %d deactivated, %s parameters train",
            state.global_step, len(changes), len(after - before), len(before - after), f"{self.plan.trainable_parameters:,}",
        )  # fmt: skip

    def _leave_out_resting(self, tuner: SpectrumModel | None) -> None:
        """Adapters that are deactivated: no step for them, and no part in the norm that gradients are clipped by."""
        for handle in self._silenced:
            handle.remove()
        resting = [] if tuner is None else tuner.resting(tuner.active_adapters[0])
        self._silenced = [p.register_hook(torch.zeros_like) for p in resting]
        if self._ratios is not None:
            self._ratios.frozen = frozenset(map(id, resting))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write plan and report beside the checkpoint."""
        if state.is_world_process_zero and self.plan is not None:
            self.write_records(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def write_records(self, folder: Path) -> None:
        """`spectrum_plan.yaml`, and `spectrum_report.json` where a report is at hand."""
        if self.plan is not None and folder.is_dir():
            self.plan.save(folder / PLAN_FILE)
            if self.report is not None:
                self.report.save(folder / REPORT_FILE)
            if self.history:
                write_text(folder / "plan_history.json", json.dumps(self.history, indent=1) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Leave optimizer and model as they were; say what the run took."""
        tuner = tuner_of(model)
        if tuner is not None:
            best = Path(state.best_model_checkpoint or "", PLAN_FILE)
            if args.load_best_model_at_end and self.history and best.is_file():  # its factors are loaded by now
                tuner.restore_plan(tuner.active_adapters[0], _places(Plan.load(best)))
                self._take_plan_of(tuner)
            tuner.attended(False)
        if self.history and state.is_world_process_zero:
            write_text(Path(args.output_dir) / "plan_history.json", json.dumps(self.history, indent=1) + "\n")
        if self._ratios is not None:
            self._ratios.remove()
            self._ratios = None
            self._leave_out_resting(None)
        if self._started is None:
            return
        began, step, tokens = self._started
        self._started = None
        if not self.sums_up:
            return
        seconds, steps = time.perf_counter() - began, state.global_step - step
        seen = int(state.num_input_tokens_seen or 0) - tokens
        rate = f"{seen / seconds:,.0f} tokens/s" if seen > 0 else "tokens/s not counted (include_num_input_tokens_seen)"
        if memory_is_measured():
            memory = f"peak {peak_memory() / 2**30:.2f} GiB on the device"
        else:
            memory = f"{psutil.Process().memory_info().rss / 2**30:.2f} GiB resident at the end"
        logger.info("%d steps, %.3g s a step on average, %s, %s", steps, seconds / max(steps, 1), rate, memory)

    def state(self) -> dict[str, Any]:
        """What travels in `trainer_state.json`: the digest of the plan that training began with, and of today's."""
        moves = self.plan is not None and self.plan.options.get("rescore_every") is not None
        return {
            "args": {},
            "attributes": {
                "initial_digest": self.initial_digest,
                "current_digest": None if self.plan is None else self.plan.digest,
                "saw_init_end": self.saw_init_end,
                "places": _places(self.plan) if self.plan is not None and moves else [],
                "history": self.history,
                "budget": self.budget,
                "rows_per_step": self.rows_per_step,
            },
        }


def _places_in_words(plan: Plan) -> str:
    """`beside 210 matrices and in 2 tensors of the base`: adapters lie beside what they change, real weights are in it."""
    beside = sum(1 for entry in plan.entries if entry.trains and entry.action in ADAPTER_ACTIONS)
    inside = len(plan.trainable_names) - beside
    parts = [f"beside {beside:,} matrices"] if beside else []
    parts += [f"in {inside:,} tensors"] if inside or not beside else []
    return " and ".join(parts) + " of the base"


def _places(plan: Plan) -> list[list[Any]]:
    """(name, rank, alpha, learning-rate ratio, active, score) of every adapter entry: what re-evaluation moves."""
    return [
        [e.name, e.rank, e.alpha, e.lr_ratio, e.active, e.score] for e in plan.entries if e.action in ADAPTER_ACTIONS
    ]


def tuner_of(model: Any) -> SpectrumModel | None:
    """The SpectrumModel inside a PeftModel, or None."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, SpectrumModel) else None


def _refuse_lost_moments(state: TrainerState, optimizer: Any) -> None:
    """
    Raises:
        TrainingSetupError: the run is resumed and an optimizer with moments has none: the trainer says nothing of it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if state.global_step and "betas" in getattr(inner, "defaults", {}) and not getattr(inner, "state", True):
        raise TrainingSetupError(
            f"resume: step {state.global_step} goes on without the optimizer's state; optimizer.pt or scheduler.pt is missing in "
            "the checkpoint (it was saved with save_only_model, or cut off). Resume from the one before."
        )
