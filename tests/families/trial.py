"""One family through everything: the cells of a row of `docs/families.md`.

A cell is `("ok", "")`, `("refused", the line of the SpectrumError)`, `("-", why it does not apply)`, or
`("failed", what was seen)`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from listing import Family

from spectrum_peft import (
    SpectrumConfig,
    export_lora,
    load_model_with_spectrum,
    make_plan,
    merge_into_base,
    names,
    parameter_groups,
    scan_weights,
)
from spectrum_peft.errors import SpectrumError
from spectrum_peft.train.unmoved import refuse_untouched
from spectrum_peft.tuner import settle_plan
from spectrum_peft.tuner.loading import load_trained, task_type_of

COLUMNS = ("scan", "plan", "real weights", "adapters", "4-bit", "merge", "export")
Cell = tuple[str, str]
# Sums in another order, in float32, over two to four blocks: some hundred roundings of 6e-8 of the largest output.
SAME = 1e-4
# A step of AdamW moves every weight by its rate, here a tenth of the weights' spread; whatever was trained is seen.
RATE = 1e-2
SHARE = 0.5


class Fault(Exception):
    """What was seen, where it is not what is promised."""


class NotApplicable(Exception):
    """Why a column says nothing about a family."""


def row_of(family: Family, folder: Path) -> dict[str, Cell]:
    """All cells of a family; `folder` is emptied of what a cell leaves before the next.

    Raises:
        Exception: transformers cannot build, save or load the family, or its own outputs are not repeatable.
    """
    ground = _Ground(family, folder / "base")
    cells: dict[str, Cell] = {}
    for column, check in zip(COLUMNS, (_scan, _plan, _real, _adapters, _four_bit, _merge, _export), strict=True):
        cells[column] = _judged(check, ground, folder / "work")
        shutil.rmtree(folder / "work", ignore_errors=True)
    return cells


class _Ground:
    """A family's checkpoint on disk, its inputs and its outputs."""

    def __init__(self, family: Family, base: Path) -> None:
        self.family, self.base, self.kind = family, base, family.kind
        torch.manual_seed(0)
        model = family.build()
        self.inputs = family.inputs(model)
        with torch.no_grad():  # signal in every matrix, and no zeros, which would hide a missing path
            for parameter in model.parameters():
                if parameter.ndim > 1 or not parameter.any():
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
            _settle_statistics(model, self.inputs)
        model.save_pretrained(base)
        self.model = self.load()
        self.plain = self.outputs(self.model)
        if not torch.isfinite(self.plain).all():
            raise Fault("the base's outputs are not finite")
        if apart(self.plain, self.outputs(self.load())) > 0:
            raise Fault("the base's outputs differ from one loading to the next")
        self._report: Any = None

    @property
    def report(self) -> Any:
        if self._report is None:
            self._report = scan_weights(self.base)
        return self._report

    def load(self, folder: Path | None = None, **options: Any) -> Any:
        return self.kind.from_pretrained(folder or self.base, dtype=torch.float32, **options).eval()

    def keys(self) -> dict[str, set[str]]:
        """What of the class the checkpoint lacks and has beyond it: a text class leaves the towers alone."""
        _, info = self.kind.from_pretrained(self.base, output_loading_info=True)
        return {what: set(info[what]) for what in ("missing_keys", "unexpected_keys")}

    @torch.no_grad()
    def outputs(self, model: Any) -> torch.Tensor:
        model.eval()
        torch.manual_seed(0)
        return first_tensor(model(**self.inputs)).clone()

    def step(self, model: Any) -> list[str]:
        """One step of AdamW; the names that train and got no gradient."""
        model.train()
        torch.manual_seed(0)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=RATE))
        # LoRA's A gets its first gradient when B is no longer zero.
        for _ in range(2):
            out = model(**self.inputs)
            refuse_untouched(out, model, _plan_of(model))
            try:
                _loss(out).backward()
            except RuntimeError as error:
                self._trains_whole(error)
                raise
            optimizer.step()
        return [n for n, p in trained.items() if p.grad is None]

    def _trains_whole(self, error: Exception) -> None:
        """
        Raises:
            NotApplicable: the plain model with all of its weights has the same fault.
        """
        model = self.load().train()
        try:
            _loss(model(**self.inputs)).backward()
        except RuntimeError as its_own:
            if str(its_own)[:60] == str(error)[:60]:
                raise NotApplicable(f"the plain model cannot train in transformers: {error}") from error

    def adapter(self, mode: str) -> Any:
        config = SpectrumConfig(
            mode=mode, spectrum_ratio=SHARE, r=4, report=self.report, task_type=task_type_of(self.model)
        )
        return peft.get_peft_model(self.load(), config)


def _settle_statistics(model: Any, inputs: Mapping[str, Any]) -> None:
    """Running statistics become those of the inputs, as in a model that was trained; with a fresh model's, batch norms let
    what small weights compute vanish from block to block."""
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        torch.manual_seed(0)
        model.train()(**inputs)
        for norm in norms:  # a channel that is the same everywhere would be blown up, and the next ones with it
            norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))


def _plan_of(model: Any) -> Any:
    carried = getattr(model, "spectrum_plan", None)
    return model.peft_config["default"].plan if carried is None else carried


def _loss(out: Any) -> torch.Tensor:
    loss: torch.Tensor | None = getattr(out, "loss", None)
    if loss is None:  # no power of the values, which are of length 1 in retrievers
        values = first_tensor(out)
        loss = (values * torch.linspace(-1, 1, values.numel()).reshape(values.shape)).sum()
    return loss


def first_tensor(out: Any) -> torch.Tensor:
    for name in ("logits", "logits_per_image", "last_hidden_state", "prediction_logits", "start_logits"):
        value = getattr(out, name, None)
        if isinstance(value, torch.Tensor):
            return value.float()
    for value in out.values():
        value = value[-1] if isinstance(value, tuple) and value else value  # maps of a backbone's stages
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.is_floating_point():
            return value.float()
    raise Fault("no tensor in the output")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference as a share of the largest value; values of a mask are cut."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.clamp(-1e6, 1e6), b.clamp(-1e6, 1e6)
    size = a[a.abs() < 1e6].abs().max().clamp(min=1e-3) if (a.abs() < 1e6).any() else torch.tensor(1.0)
    return float((a - b).abs().max() / size)


def _equal(what: str, seen: torch.Tensor, wanted: torch.Tensor) -> None:
    if not (off := apart(wanted, seen)) < SAME:
        raise Fault(f"{what}: outputs off by {off:.1e}")


def _moved(before: torch.Tensor, after: torch.Tensor) -> None:
    if not apart(before, after) > 10 * SAME:
        raise Fault("training changed nothing")


def _judged(check: Callable[[_Ground, Path], None], ground: _Ground, work: Path) -> Cell:
    try:
        check(ground, work)
    except NotApplicable as why:
        return "-", str(why)
    except SpectrumError as error:
        return "refused", _anywhere(error, ground)
    except Fault as fault:
        return "failed", str(fault)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {_anywhere(error, ground)}"
    return "ok", ""


def _anywhere(error: Exception, ground: _Ground) -> str:
    """The words of an error in one line, without this run's folder."""
    text = " ".join(str(error).split())
    return text.replace(str(ground.base), "the checkpoint").replace(str(ground.base.parent), "")


# --- the columns -------------------------------------------------------------------------------------------------------


def _scan(ground: _Ground, work: Path) -> None:
    """The folder's report is the model's: the same matrices, roles and scores."""
    files = {s.name: s for s in ground.report.stats}
    live = {s.name: s for s in scan_weights(ground.model).stats}
    if ground.family.saved_as:  # a part of what the folder holds, under names of its own
        scores = sorted(s.score for s in files.values() if s.role == "linear")
        for stat in live.values():
            near = min(scores, key=lambda score: abs(score - stat.score)) if stat.role == "linear" else stat.score
            if stat.role == "linear" and abs(near - stat.score) > 1e-3 * stat.score:
                raise Fault(f"{stat.name} scores {stat.score:.4g} in the model, and nothing in the folder does")
        return
    # A tensor that lies at two places of the model has the name of one in the file, and may have the other's in the model.
    places = {name: group for group in ground.report.tied for name in group}
    there = {base for base, _, _ in (name.partition("[") for name in files)}
    for name in [n for n in live if n.partition("[")[0] not in there]:
        base, bracket, expert = name.partition("[")
        other = next((twin for twin in places.get(base, ()) if twin in there), None)
        if other is not None:
            live[other + bracket + expert] = live.pop(name)
    found = names.align(files, live)
    lost = [n for n in files if files[n].role == "linear" and n not in found]
    back = set(found.values())
    lost += [n for n in live if live[n].role == "linear" and n not in back]
    if lost:
        raise Fault(f"{lost[0]} and {len(lost) - 1} others are in the folder's report or the model's, not in both")
    for name, there in found.items():
        a, b = files[name], live[there]
        if a.role != b.role:
            raise Fault(f"{name} is {a.role!r} in the folder's report, {b.role!r} in the model's")
        if a.score is not None and b.score is not None and abs(a.score - b.score) > 1e-3 * max(abs(a.score), 1e-6):
            raise Fault(f"{name} scores {a.score:.4g} in the folder, {b.score:.4g} in the model")


def _plan(ground: _Ground, work: Path) -> None:
    plan = make_plan(ground.report, mode="spectrum", spectrum_ratio=SHARE)
    settled = settle_plan(ground.model, SpectrumConfig(mode="spectrum", plan=plan))
    present = dict(ground.model.named_parameters(remove_duplicate=False))
    if lost := [n for n in settled.trainable_names if n not in present]:
        raise Fault(f"the plan trains {lost[0]}, which the model lacks")


def _real(ground: _Ground, work: Path) -> None:
    config = SpectrumConfig(mode="spectrum", spectrum_ratio=SHARE, report=ground.report)
    model, _ = load_model_with_spectrum(ground.base, config, dtype="float32", model_class=ground.kind)
    ground.step(model)
    after = ground.outputs(model)
    _moved(ground.plain, after)
    model.save_pretrained(work)
    seen = ground.outputs(ground.load(work))
    if apart(after, seen) > SAME:
        ground.load().save_pretrained(work / "untouched")
        if apart(ground.plain, ground.outputs(ground.load(work / "untouched"))) > SAME:
            raise NotApplicable("what save_pretrained writes of the untouched model, too, loads as another one")
    _equal("saved and loaded", seen, after)


def _adapters(ground: _Ground, work: Path) -> None:
    model = ground.adapter("spectra_qlora")
    _equal("a new adapter", ground.outputs(model), ground.plain)
    ground.step(model)
    after = ground.outputs(model)
    _moved(ground.plain, after)
    with model.disable_adapter():
        _equal("disable_adapter", ground.outputs(model), ground.plain)
    model.save_pretrained(work)
    again = peft.PeftModel.from_pretrained(ground.load(), work)
    _equal("saved and loaded", ground.outputs(again), after)


def _four_bit(ground: _Ground, work: Path) -> None:
    config = SpectrumConfig(mode="spectrum", spectrum_ratio=SHARE, report=ground.report)
    model, _ = load_model_with_spectrum(
        ground.base, config, dtype="float32", model_class=ground.kind, quantization="nf4"
    )
    before = ground.outputs(model)
    ground.step(model)
    after = ground.outputs(model)
    _moved(before, after)
    model.save_pretrained(work)
    again, _ = load_trained(str(work), dtype="float32", model_class=ground.kind, quantization="nf4")
    _equal("saved and loaded", ground.outputs(again), after)


def _merge(ground: _Ground, work: Path) -> None:
    """Both kinds of adapters, from their folder: the merged checkpoint computes what was trained, under the base's names."""
    base = safetensors.torch.load_file(ground.base / "model.safetensors")
    known = ground.keys()
    for mode in ("spectra_qlora", "spectrum"):
        model = ground.adapter(mode)
        ground.step(model)
        after = ground.outputs(model)
        _moved(ground.plain, after)
        model.save_pretrained(work / mode)
        merge_into_base(work / mode, ground.base, work / f"merged_{mode}")
        merged, info = ground.kind.from_pretrained(
            work / f"merged_{mode}", dtype=torch.float32, output_loading_info=True
        )
        _equal(f"merged, mode {mode}", ground.outputs(merged), after)
        if any(set(info[what]) - keys for what, keys in known.items()):
            raise Fault(f"mode {mode}: missing or unexpected keys in the merged file")
        stored = safetensors.torch.load_file(work / f"merged_{mode}" / "model.safetensors")
        if extra := sorted(stored.keys() ^ base.keys()):
            raise Fault(f"mode {mode}: {extra[0]} is in the merged file or the base's, not in both")


def _export(ground: _Ground, work: Path) -> None:
    model = ground.adapter("spectra_qlora")
    ground.step(model)
    after = ground.outputs(model)
    model.save_pretrained(work / "adapter")
    export_lora(work / "adapter", work / "lora")
    try:
        again = peft.PeftModel.from_pretrained(ground.load(), work / "lora")
    except Exception as error:
        _wrapped_by_peft(ground, model)
        raise Fault(f"plain peft cannot read it: {type(error).__name__}: {error}") from error
    _equal("read by plain peft", ground.outputs(again), after)


def _wrapped_by_peft(ground: _Ground, model: Any) -> None:
    """
    Raises:
        NotApplicable: plain peft cannot put a LoRA of its own on the class either.
    """
    target = next(name for name in model.peft_config["default"].target_modules)
    try:
        peft.get_peft_model(ground.load(), peft.LoraConfig(target_modules=[target]))
    except Exception as error:
        raise NotApplicable(f"peft cannot wrap the class: {type(error).__name__}: {error}") from error
