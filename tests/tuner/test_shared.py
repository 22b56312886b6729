"""Factors that layers share: grouping, one tensor everywhere, exact gradients, files, gains, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from running import IDS, assert_same, logits, token_rows, trainer, values
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectrum_peft import (
    Plan,
    SpectrumCallback,
    SpectrumConfig,
    calibration_batches,
    demo,
    export_lora,
    make_plan,
    merge_into_base,
    parameter_groups,
    probe_gradients,
    scan_weights,
)
from spectrum_peft.errors import MismatchError, OptionError, TrainingSetupError
from spectrum_peft.plan import explain
from spectrum_peft.plan.policies import LIKENESS
from spectrum_peft.records import PlanEntry, count_trainable
from spectrum_peft.tuner.factors import factors
from spectrum_peft.tuner.shared import SharedFactor
from spectrum_peft.weights.adapters import AdapterState

BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
WAYS = [{}, {"share": "both"}, {"group_gain": True}, {"share": "both", "group_gain": True}]


def config(**options: Any) -> SpectrumConfig:
    options = {"spectrum_ratio": 1.0, "similarity_threshold": -1.0, "r": 4, **options}
    return SpectrumConfig(mode="sgm", task_type="CAUSAL_LM", calibration_data=[BATCH], **options)


def stir(model: Any, seed: int = 0) -> None:
    """Values in every tensor that trains, so that no product is zero and no gain is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.05


def exact_loss(model: Any) -> torch.Tensor:
    """In the model's own dtype; transformers' loss is in float32 at most."""
    out = model(input_ids=IDS).logits
    return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


# --- the policy ------------------------------------------------------------------------------------------------------


def test_neighbours_group_and_what_has_no_like_stays_alone(llama_report, gradients_of):
    report = llama_report(6)
    plan = make_plan(report, mode="sgm", gradients=gradients_of(report), spectrum_ratio=1.0, similarity_threshold=0.4)
    by_kind: dict[str, list[str | None]] = {}
    for e in plan.entries:
        by_kind.setdefault(e.kind, []).append(e.group)
        assert e.action == ("lora" if e.group is None else "shared")
    # The likeness halves with each block between: pairs of neighbours, cut where the mean falls below 0.4.
    for kind, groups in by_kind.items():
        letter = "B" if kind in {"self_attn.o_proj", "mlp.down_proj"} else "A"
        assert groups == [f"{letter}:{kind}:{i}" for i in (0, 0, 1, 1, 2, 2)]
    alone = make_plan(report, mode="sgm", gradients=gradients_of(report), similarity_threshold=0.9)
    assert {e.action for e in alone.entries} == {"lora", "freeze"}
    assert alone.trainable_parameters == make_plan(report, mode="spectra_qlora").trainable_parameters


def test_only_what_was_chosen_is_grouped_and_the_choice_is_that_of_the_scores(llama_report, gradients_of):
    report = llama_report(8)
    plan = make_plan(report, mode="sgm", gradients=gradients_of(report), similarity_threshold=-1.0)
    assert plan.trainable_names == make_plan(report, mode="spectra_qlora").trainable_names
    assert {
        len({e.group for e in plan.entries if e.kind == kind and e.trains}) for kind in {e.kind for e in plan.entries}
    } == {1}
    assert all(e.group is None for e in plan.entries if not e.trains)


@pytest.mark.slow
def test_on_a_real_model_sharing_saves_what_it_is_for(smollm2: Path) -> None:
    """At one rank, of what `spectra_qlora` trains: at most 0.75 by default, 0.35 with both factors shared."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [{"text": text} for text in demo.topics()[0]]
    batches = calibration_batches(texts, tokenizer, 16, batch_size=4, max_length=96)
    gradients = probe_gradients(
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), batches, fisher=False
    )
    report = scan_weights(smollm2)
    for ratio in (0.5, 1.0):
        plain = make_plan(report, mode="spectra_qlora", spectrum_ratio=ratio).trainable_parameters
        for share, most in (("residual_side", 0.75), ("both", 0.35)):
            plan = make_plan(report, mode="sgm", spectrum_ratio=ratio, gradients=gradients, share=share)
            assert plan.trainable_parameters <= most * plain, (ratio, share)


@pytest.mark.parametrize("n_groups", [1, 2, 3, 50])
def test_a_number_of_groups_of_each_kind(llama_report, gradients_of, n_groups):
    report = llama_report(6)
    plan = make_plan(report, mode="sgm", gradients=gradients_of(report), spectrum_ratio=1.0, n_groups=n_groups)
    for kind in {e.kind for e in plan.entries}:
        members = [e for e in plan.entries if e.kind == kind]
        assert len({e.group or e.name for e in members}) == min(n_groups, 6)


def test_matrices_of_two_shapes_are_never_in_one_group(llama_report, gradients_of):
    report = llama_report(4)
    stats = [
        dataclasses.replace(s, shape=(48, 64), numel=48 * 64) if ".k_proj" in s.name and ".3." in s.name else s
        for s in report.stats
    ]
    report = dataclasses.replace(report, stats=tuple(stats))
    plan = make_plan(report, mode="sgm", gradients=gradients_of(report), spectrum_ratio=1.0, similarity_threshold=-1.0)
    groups = {e.name: e.group for e in plan.entries if e.kind == "self_attn.k_proj"}
    assert [groups[f"model.layers.{i}.self_attn.k_proj.weight"] is None for i in range(4)] == [False] * 3 + [True]


def test_both_kinds_of_similarity_are_read_and_have_a_threshold_of_their_own(llama_report, gradients_of):
    report = llama_report(4)
    found = gradients_of(report)
    flat = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
    found = dataclasses.replace(
        found, similarities=tuple(dataclasses.replace(s, cosine=flat) for s in found.similarities)
    )
    options = {"mode": "sgm", "gradients": found, "spectrum_ratio": 1.0}
    assert any(e.group for e in make_plan(report, **options).entries)
    assert not any(e.group for e in make_plan(report, similarity="cosine", **options).entries)
    assert set(LIKENESS) == {"subspace", "cosine"}


def test_a_shared_factor_counts_once(llama_report, gradients_of):
    report = llama_report(4)
    options = {
        "mode": "sgm",
        "gradients": gradients_of(report),
        "spectrum_ratio": 1.0,
        "similarity_threshold": -1.0,
        "r": 4,
    }
    for share, gain in (("residual_side", False), ("both", False), ("both", True)):
        plan = make_plan(report, share=share, group_gain=gain, **options)
        wanted = 0
        for kind in {e.kind for e in plan.entries}:
            members = [e for e in plan.entries if e.kind == kind]
            rows, columns = members[0].shape
            hidden = 64
            other = rows + columns - hidden
            wanted += 4 * (hidden + (other if share == "both" else 4 * other)) + 4 * gain
        assert plan.trainable_parameters == wanted
        # The table of explain() adds up to the same.
        assert (
            sum(count_trainable(e for e in plan.entries if e.kind == k) for k in {e.kind for e in plan.entries})
            == wanted
        )
    assert "groups" in explain(plan) and f"{wanted:,}" in explain(plan)


def test_what_was_not_compared_does_not_pass_for_what_has_no_like(llama_report, gradients_of):
    report = llama_report()
    gradients = gradients_of(report)
    with pytest.raises(OptionError, match=r"compare no two matrices.*directions=0"):
        make_plan(report, mode="sgm", gradients=dataclasses.replace(gradients, similarities=()))
    few = dataclasses.replace(gradients, stats=gradients.stats[1:])
    with pytest.raises(OptionError, match="is chosen, and the gradients do not list it"):
        make_plan(report, mode="sgm", spectrum_ratio=1.0, gradients=few)


def test_gradients_under_a_prefix_that_the_report_lacks_make_the_same_plan(llama_report, gradients_of):
    report = llama_report()
    gradients = gradients_of(report)
    renamed = gradients.renamed({name: f"base.{name}" for name in gradients.by_name})
    for options in ({"mode": "sgm"}, {"criterion": "fisher"}):
        wanted = make_plan(report, gradients=gradients, **options)
        assert make_plan(report, gradients=renamed, **options) == wanted
    assert any(e.group for e in make_plan(report, gradients=renamed, mode="sgm", similarity_threshold=-1.0).entries)


def test_wrong_options_are_refused(llama_report, gradients_of):
    report = llama_report(4)
    with pytest.raises(OptionError, match=r"mode 'sgm' needs gradients on data.*calibration_batches"):
        make_plan(report, mode="sgm")
    for options, words in (
        ({"similarity_threshold": 0.5, "n_groups": 2}, "both given"),
        ({"n_groups": 0}, "n_groups is 0"),
        ({"share": "neither"}, "share is 'neither'"),
        ({"similarity": "angle"}, "similarity is 'angle'"),
        ({"similarity_threshold": 2}, r"similarity_threshold is 2, wanted a likeness in \[-1, 1\]"),
    ):
        with pytest.raises(OptionError, match=words):
            make_plan(report, mode="sgm", gradients=gradients_of(report), **options)
    with pytest.raises(OptionError, match="share=both means nothing in mode 'lora'"):
        make_plan(report, mode="lora", share="both")


# --- one tensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_shared_factor_is_one_tensor_in_model_optimizer_and_file(tiny_llama, tmp_path, way):
    model = get_peft_model(tiny_llama, config(**way))
    plan: Plan = model.peft_config["default"].plan
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (
        sum(p.numel() for p in trained)
        == plan.trainable_parameters
        == sum(v.numel() for v in values(model, trainable=True).values())
    )
    groups = parameter_groups(model, lr=1e-3)
    assert sorted(map(id, (p for g in groups for p in g["params"]))) == sorted(map(id, trained))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == plan.trainable_parameters
    header = 8 + int.from_bytes((tmp_path / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "adapter_model.safetensors").stat().st_size - header == 4 * plan.trainable_parameters


@pytest.mark.parametrize("way", WAYS)
def test_its_gradient_is_the_sum_over_the_group(tiny_gpt2, way):
    """Against finite differences, in GPT-2, whose norms stay in float64 (Llama's compute in float32 at most)."""
    model = get_peft_model(tiny_gpt2.double(), config(trainable_dtype="base", **way)).double().eval()
    stir(model)
    exact_loss(model).backward()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    chosen = [n for n in parameters if ".h.0." in n]
    assert any(n.endswith(".shared") for n in chosen)
    generator = torch.Generator().manual_seed(1)
    for name in chosen:
        p = parameters[name]
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        with torch.no_grad():
            p += 1e-5 * direction
            above = float(exact_loss(model))
            p -= 2e-5 * direction
            below = float(exact_loss(model))
            p += 1e-5 * direction
        slope = (above - below) / 2e-5
        assert float((p.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-9), name


def test_gradient_merging_is_exact(tiny_llama):
    model = get_peft_model(tiny_llama.double(), config(trainable_dtype="base")).double().eval()
    stir(model)
    apart = copy.deepcopy(model)
    layers = [m for m in apart.modules() if hasattr(m, "lora_A")]
    copies: dict[int, list[torch.nn.Parameter]] = {}
    for layer in layers:  # each layer gets its own copy of what it shared
        for container in (layer.lora_A, layer.lora_B):
            factor = container["default"]
            if isinstance(factor, SharedFactor):
                holder = factor._holder[0] if factor._holder else factor
                own = torch.nn.Linear(1, 1, bias=False)
                own.weight = torch.nn.Parameter(holder.shared.detach().clone())
                copies.setdefault(id(holder), []).append(own.weight)
                container["default"] = own
    assert {len(c) for c in copies.values()} == {4}

    exact_loss(model).backward()
    exact_loss(apart).backward()
    shared = [p for n, p in model.named_parameters() if n.endswith(".shared")]
    for parameter, own in zip(shared, copies.values(), strict=True):
        merged = sum(p.grad for p in own)
        # Float64: four gradients, added in another order.
        assert (parameter.grad - merged).abs().max() < 1e-12 * merged.abs().max()
        assert all((parameter.grad - p.grad).abs().max() > 1e-3 * merged.abs().max() for p in own)


@pytest.mark.parametrize("way", WAYS)
def test_training_moves_every_factor_and_both_sides(tiny_llama, way):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama, config(**way))
    start, base = values(model, trainable=True), logits(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    model.train()
    for _ in range(3):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [n for n, v in values(model, trainable=True).items() if torch.equal(v, start[n])]
    assert still == []
    assert (logits(model) - base).abs().max() > 1e-3


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_merge_export_and_factors(tiny_llama_folder, tiny_llama, tmp_path, way, low_cpu_mem_usage):
    from transformers import AutoModelForCausalLM

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)

    model = get_peft_model(tiny_llama, config(**way))
    stir(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        fresh(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert torch.equal(logits(loaded), wanted)
    assert_same(values(loaded, trainable=True), values(model, trainable=True))
    # The layers are still one: a step of the reloaded adapter is a step of the first one.
    for m in (model, loaded):
        m.train()
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        m(**BATCH).loss.backward()
        optimizer.step()
    assert_same(values(loaded, trainable=True), values(model, trainable=True))
    model = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")

    live = {name: scale * b @ a for name, b, a, scale in factors(model)}
    on_disk = {name: s * b @ a for name, b, a, s in AdapterState.from_folder(tmp_path / "adapter").factors()}
    assert set(live) == set(on_disk) == set(model.peft_config["default"].plan.trainable_names)
    for name, delta in live.items():
        layer = model.get_base_model().get_submodule(name.removesuffix(".weight"))
        assert torch.equal(delta, on_disk[name])
        # A product of rank 8 at most in float32, below 0.1: 8 * 6e-8 * 0.1.
        assert (delta - layer.get_delta_weight("default")).abs().max() < 1e-7

    merge_into_base(tmp_path / "adapter", str(tiny_llama_folder), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    # Merging rounds W + dW once to float32: some ten roundings of 1.2e-7 of logits of order one.
    assert (logits(merged) - wanted).abs().max() < 2e-6
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(fresh(), tmp_path / "lora")
    assert torch.equal(logits(plain), wanted)
    assert {type(m).__name__ for m in plain.modules()}.isdisjoint({"SharedFactor"})


def test_transformers_own_loaders_read_it(tiny_llama_folder, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = get_peft_model(tiny_llama, config(group_gain=True))
    model.peft_config["default"].base_model_name_or_path = str(tiny_llama_folder)
    stir(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), logits(model))


@pytest.mark.parametrize("harm", ["missing", "unknown", "twice", "shape"])
def test_a_file_that_does_not_fit_the_groups_is_refused(tiny_llama_folder, tiny_llama, tmp_path, harm):
    from transformers import AutoModelForCausalLM

    model = get_peft_model(tiny_llama, config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("q_proj.lora_A.shared"))
    if harm == "missing":
        del tensors[key]
    elif harm == "unknown":
        tensors[key.replace("lora_A", "lora_B")] = torch.zeros(64, 4)
    elif harm == "twice":
        tensors[key.replace("layers.0", "layers.1")] = tensors[key].clone()
    else:
        tensors[key] = tensors[key][:2].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MismatchError):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path)
    with pytest.raises(MismatchError):
        merge_into_base(tmp_path, str(tiny_llama_folder), tmp_path / "merged")


# --- PEFT's switches -------------------------------------------------------------------------------------------------


def test_switching_adding_and_deleting_adapters(tiny_llama):
    model = get_peft_model(tiny_llama, config())
    stir(model)
    first = logits(model)
    model.add_adapter("other", config(share="both", r=2))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    stir(model, seed=1)
    second = logits(model)
    assert (first - second).abs().max() > 1e-3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".other." in n for n in trained)
    assert any(n.endswith("lora_A.other.shared") for n in trained)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any(".default." in n for n, _ in model.named_parameters())


def test_a_bfloat16_base_trains_its_shared_factors_in_float32(tiny_llama):
    model = get_peft_model(tiny_llama.to(torch.bfloat16), config(group_gain=True))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(**BATCH).loss.backward()


def test_dropping_groups_of_unequal_members_and_unfit_settings(tiny_llama):
    model = get_peft_model(copy.deepcopy(tiny_llama), config())
    plan: Plan = model.peft_config["default"].plan
    entries = list(plan.entries)
    i = next(i for i, e in enumerate(entries) if e.kind == "self_attn.q_proj" and e.group)
    entries[i] = dataclasses.replace(entries[i], rank=2, alpha=4.0)
    with pytest.raises(MismatchError, match=r"group A:self_attn.q_proj:0: .* has rank 4, .* has 2"):
        get_peft_model(copy.deepcopy(tiny_llama), SpectrumConfig(plan=plan.replace(entries=tuple(entries)), r=4))
    k = next(i for i, e in enumerate(plan.entries) if e.kind == "self_attn.k_proj" and e.group)
    entries = list(plan.entries)
    entries[k] = dataclasses.replace(entries[k], group="A:self_attn.q_proj:0")
    with pytest.raises(MismatchError, match="needs one shape"):
        get_peft_model(copy.deepcopy(tiny_llama), SpectrumConfig(plan=plan.replace(entries=tuple(entries)), r=4))
    for options in ({"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "orthogonal"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            get_peft_model(copy.deepcopy(tiny_llama), config(**options))


def test_fused_experts_are_not_shared():
    model = get_peft_model(ARCHITECTURES["mixtral"].build(), config())
    plan: Plan = model.peft_config["default"].plan
    experts = [e for e in plan.entries if len(e.shape) == 3]
    assert experts and {(e.action, e.group) for e in experts} == {("lora", None)}
    assert any(e.group for e in plan.entries)


def test_reentrant_checkpointing_over_processes_is_refused(tiny_llama, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    model = get_peft_model(tiny_llama, config())
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(TrainingSetupError, match="use_reentrant=False"):
        trainer(
            model, tmp_path, [SpectrumCallback()], token_rows(), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip


# --- the way through the stages --------------------------------------------------------------------------------------


def test_gradients_from_a_file_or_from_calibration_data_give_the_same_plan(
    tiny_llama_folder, tiny_llama, tiny_tokenizer, tmp_path
):
    batches = calibration_batches([{"text": f"{i} and {i * i}"} for i in range(8)], tiny_tokenizer, n=8)
    path = probe_gradients(tiny_llama, batches).save(tmp_path / "gradients.json")
    options = {"mode": "sgm", "spectrum_ratio": 1.0, "n_groups": 2, "r": 4}
    by_hand = make_plan(scan_weights(str(tiny_llama_folder)), gradients=path, **options)
    for data in ({"gradients": str(path)}, {"calibration_data": batches}):
        settings = SpectrumConfig(task_type="CAUSAL_LM", **data, **options)
        model = get_peft_model(copy.deepcopy(tiny_llama), settings)
        taken = model.peft_config["default"]
        assert taken.plan.digest == by_hand.digest
        assert taken.calibration_data is None
        assert "calibration_data" not in json.dumps(taken.to_dict()["plan"])
    with pytest.raises(OptionError, match="needs gradients on data"):
        get_peft_model(copy.deepcopy(tiny_llama), SpectrumConfig(mode="sgm", task_type="CAUSAL_LM"))
    with pytest.raises(OptionError, match="gradients and calibration_data are both given"):
        SpectrumConfig(task_type="CAUSAL_LM", gradients=str(path), calibration_data=batches, **options)


def test_gradients_of_another_model_are_refused(tiny_llama, tiny_gpt2, llama_report, gradients_of, tmp_path):
    wrong = probe_gradients(tiny_gpt2, [BATCH])
    with pytest.raises(MismatchError, match="the gradients"):
        get_peft_model(tiny_llama, SpectrumConfig(mode="sgm", gradients=wrong, task_type="CAUSAL_LM"))
    with pytest.raises(MismatchError, match="the gradients"):
        make_plan(llama_report(4), mode="sgm", gradients=wrong)


def test_an_entry_keeps_its_own_count(tmp_path):
    entry = PlanEntry("a.weight", "shared", rank=4, alpha=8.0, group="A:a:0", shape=(6, 8), shared=32, gain=True)
    assert entry.trainable_numel == 4 * 14 + 1
    twin = dataclasses.replace(entry, name="b.weight")
    assert count_trainable([entry, twin]) == 2 * 57 - 32
    assert count_trainable([entry, dataclasses.replace(twin, active=False)]) == 57
    plan = Plan("sgm", (entry, twin))
    assert Plan.load(plan.save(tmp_path / "plan.yaml")) == plan
    without = dataclasses.replace(entry, gain=False)
    assert Plan("sgm", (without,)).digest != Plan("sgm", (entry,)).digest
    shutil.rmtree(tmp_path)
