"""The probe against autograd, sample by sample; that it leaves no trace; what it refuses; the batches made for it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, batch_for
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from running import same_bytes
from transformers import LlamaForCausalLM

from spectrum_peft import (
    GradientReport,
    SpectrumConfig,
    calibration_batches,
    load_model_with_spectrum,
    make_plan,
    names,
    probe_gradients,
    scan_weights,
)
from spectrum_peft.errors import DataError, OptionError
from spectrum_peft.memory.tracker import StorageTracker
from spectrum_peft.plan import MODES
from spectrum_peft.probe.collectors import ComponentImportance, MeanGradients
from spectrum_peft.scan import SingularTriplets
from spectrum_peft.tuner import base_parameters
from spectrum_peft.weights import LiveWeights

PAD = 256


def batch_of(rows: list[list[int]], masked: int = 2, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of different lengths in one padded batch; the first `masked` tokens are not learnt."""
    width = max(map(len, rows))
    result: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        rest = width - len(row)
        labels = [-100] * masked + row[masked:]
        for key, values, fill in (
            ("input_ids", row, PAD),
            ("attention_mask", [1] * len(row), 0),
            ("labels", labels, -100),
        ):
            result[key].append(values + [fill] * rest)
    return {k: torch.tensor(v) for k, v in result.items()}


def rows_of(count: int = 4, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (5 + 3 * i,), generator=generator).tolist() for i in range(count)]


def single(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Each sample as a batch of its own, without its padding."""
    for i in range(len(batch["labels"])):
        length = int(batch["attention_mask"][i].sum())
        yield {k: v[i : i + 1, :length] if v.dim() > 1 else v[i : i + 1] for k, v in batch.items()}


def loss_of(model: Any, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over a batch's label tokens in the logits' own dtype; transformers' is in float32 at most."""
    labels = sample["labels"]
    logits = model(**{k: v for k, v in sample.items() if k != "labels" or labels.dim() > 1}).logits
    if labels.dim() > 1 and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def exact(
    model: Any, samples: list[dict[str, torch.Tensor]]
) -> tuple[dict[str, float], dict[str, torch.Tensor], float]:
    """By autograd, with a weight gradient for each sample: (mean squared derivative, mean gradient, mean loss)."""
    model = copy.deepcopy(model).eval()
    parameters = {n: p for n, p in model.named_parameters() if names.role(n, p.shape) == "linear"}
    mass = dict.fromkeys(parameters, 0.0)
    mean = {n: torch.zeros_like(p) for n, p in parameters.items()}
    total = 0.0
    for sample in samples:
        loss = loss_of(model, sample)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        total += loss.item()
        for name, g in zip(parameters, found, strict=True):
            if g is not None:
                mass[name] += g.double().square().mean().item() / len(samples)
                mean[name] += g / len(samples)
    return mass, mean, total / len(samples)


def close(report: GradientReport, mass: dict[str, float], relative: float) -> None:
    assert set(report.scores) == set(mass)
    top = max(mass.values())
    assert top > 0
    # Callers state the bound; 1e-9 is the same float64 sums in another order.
    for name, value in mass.items():
        assert report.scores[name] == pytest.approx(value, rel=relative, abs=relative * top), name


# --- Fisher mass -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in {"llama", "gpt2", "bert", "t5"} else [pytest.mark.slow]) for f in ARCHITECTURES],
)
def test_fisher_is_the_per_sample_reference_in_every_family(family: str) -> None:
    architecture = ARCHITECTURES[family]
    model = architecture.build().double()
    if any("experts" in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    batch = batch_for(architecture, model)
    if architecture.task_type != "SEQ_CLS":  # another number of tokens to learn in each sample
        batch["labels"][0, :5] = -100
    mass, _, loss = exact(model, list(single(batch)))
    report = probe_gradients(model, [batch])
    close(report, mass, 1e-9)
    assert report.loss == pytest.approx(loss, rel=1e-9)
    assert report.samples == 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_how_samples_are_batched_is_of_no_consequence(size: int) -> None:
    model = ARCHITECTURES["llama"].build().double()
    rows = rows_of(4)
    mass, _, loss = exact(model, [batch_of([row]) for row in rows])
    report = probe_gradients(model, [batch_of(rows[i : i + size]) for i in range(0, 4, size)])
    close(report, mass, 1e-9)
    # Float64, summed in another order.
    assert report.loss == pytest.approx(loss, rel=1e-9)
    assert report.samples == 4


def test_a_token_weighs_by_the_length_of_its_sample() -> None:
    # The loss of a batch as transformers has it would weigh long samples more: the two must differ here.
    model = ARCHITECTURES["llama"].build().double()
    batch = batch_of(rows_of(4))
    mass, _, _ = exact(model, [batch])
    assert probe_gradients(model, [batch]).loss != pytest.approx(loss_of(model, batch).item(), rel=1e-4)
    name = next(iter(mass))
    # Samples of unlike length are weighed unlike: by tens of percents, seen far above both.
    assert probe_gradients(model, [batch]).scores[name] != pytest.approx(mass[name], rel=1e-2)


def test_both_ways_to_a_squared_norm_agree() -> None:
    # Few tokens: by pairs of tokens. Many: by the product. The border lies where they cost the same.
    from spectrum_peft.probe.collectors import FisherMass

    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 3, 24, 25, 200):
        x = torch.randn(2, tokens, 40, generator=generator, dtype=torch.float64)
        g = torch.randn(2, tokens, 60, generator=generator, dtype=torch.float64)
        collector = FisherMass()
        collector.see("a", x, g)
        wanted = sum((b.T @ a).square().sum().item() for a, b in zip(x, g, strict=True))
        # Sums of up to 200 and then 2,400 products in float64: 2,600 * 1.1e-16 is 3e-13.
        assert collector.fields("a", 2400, 2)["fisher"] == pytest.approx(wanted / 2 / 2400, rel=1e-12)


def test_a_matrix_that_is_used_twice_has_the_gradient_of_both_uses() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(264, 8)
            self.layer = torch.nn.Linear(8, 8, bias=False)
            self.lm_head = torch.nn.Linear(8, 264, bias=False)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None) -> Any:
            logits = self.lm_head(torch.tanh(self.layer(torch.tanh(self.layer(self.embed(input_ids))))))
            flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            return type("Output", (), {"logits": logits, "loss": torch.nn.functional.cross_entropy(*flat)})()

    torch.manual_seed(0)
    model = Twice().double()
    rows = rows_of(3)
    mass, _, _ = exact(model, [batch_of([row]) for row in rows])
    assert set(mass) == {"layer.weight"}
    close(probe_gradients(model, [batch_of(rows)]), mass, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fisher_in_the_dtypes_that_models_have(dtype: torch.dtype) -> None:
    reference, _, _ = exact(ARCHITECTURES["llama"].build().double(), [batch_of([row]) for row in rows_of(4)])
    report = probe_gradients(ARCHITECTURES["llama"].build().to(dtype), [batch_of(rows_of(4))])
    close(report, reference, 1e-4 if dtype == torch.float32 else 0.1)
    assert report.settings["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_measured_by_the_weight_it_computes_with(quantization: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    from spectrum_peft import quantization_config_for

    ARCHITECTURES["llama"].build().save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization_config_for(None, None, quantization)
    )
    source = LiveWeights(quantized)
    twin = ARCHITECTURES["llama"].build()
    for name, parameter in twin.named_parameters():
        if names.role(name, parameter.shape) == "linear":
            source._file_name = {}  # what the layer multiplies with, not what the folder holds
            parameter.data = source.read(name).float()
    mass, _, _ = exact(twin, [batch_of([row]) for row in rows_of(4)])
    report = probe_gradients(quantized, [batch_of(rows_of(4))])
    close(report, mass, 2e-2)
    assert report.settings["quantization"] == quantization


# --- the model stays as it was ---------------------------------------------------------------------------------------


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "objects": {n: (id(p), None if p.grad is None else id(p.grad)) for n, p in model.named_parameters()},
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "parameter_hooks": {n: (p._backward_hooks, p._post_accumulate_grad_hooks) for n, p in model.named_parameters()},
        "config": str(getattr(model, "config", None)),
        "random": torch.get_rng_state(),
    }


def assert_as_before(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("objects", "trains", "modes", "hooks", "config"):
        assert before[key] == after[key], key
    for key in ("weights", "grads"):
        for name, value in before[key].items():
            assert (value is None and after[key][name] is None) or same_bytes(value, after[key][name]), (key, name)
    for pair in after["parameter_hooks"].values():
        assert not any(pair)
    assert torch.equal(before["random"], after["random"])


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral"])
def test_the_model_is_as_it_was(family: str) -> None:
    architecture = ARCHITECTURES[family]
    model = architecture.build()
    model.train()
    model.get_input_embeddings().eval()
    batch = batch_for(architecture, model)
    model(**batch).loss.backward()  # gradients that must stay
    first, *rest = model.parameters()
    first.requires_grad_(False)
    rest[0].grad = None
    before = snapshot(model)
    probe_gradients(model, [batch])
    assert_as_before(before, snapshot(model))
    broken = {**batch, "labels": torch.full_like(batch["labels"], 10**6)}
    with pytest.raises((IndexError, RuntimeError, DataError)):
        probe_gradients(model, [batch, broken])
    assert_as_before(before, snapshot(model))


def test_inside_no_grad_it_works_as_well() -> None:
    model = ARCHITECTURES["llama"].build()
    batch = batch_of(rows_of(2))
    wanted = probe_gradients(model, [batch])
    with torch.no_grad():
        assert probe_gradients(model, [batch]) == wanted


@pytest.mark.parametrize("mode", ["lora", "spectrum"])
def test_under_peft_the_base_is_measured_with_adapters_on_or_off(mode: str) -> None:
    base = ARCHITECTURES["llama"].build().double()
    batch = batch_of(rows_of(3))
    plain = probe_gradients(base, [batch])
    model = get_peft_model(base, SpectrumConfig(mode=mode, task_type="CAUSAL_LM", trainable_dtype="base"))
    model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_spectrum" in name:
                p += 0.02
    before = snapshot(model)
    on = probe_gradients(model, [batch])
    assert_as_before(before, snapshot(model))
    with model.disable_adapter():
        off = probe_gradients(model, [batch])
    merged = probe_gradients(copy.deepcopy(model).merge_and_unload(), [batch])
    # Float64, other orders of the same sums of some thousand products: 1e3 * 1.1e-16, with room for what cancels.
    assert off.scores == pytest.approx(plain.scores, rel=1e-9)
    assert on.scores == pytest.approx(merged.scores, rel=1e-9)
    # The adapter is no rounding: it moves every score.
    assert on.scores != pytest.approx(off.scores, rel=1e-2)
    assert (on.settings["adapted"], off.settings["adapted"]) == (mode == "lora", False)


def test_a_plain_lora_of_peft_is_as_good() -> None:
    model = get_peft_model(ARCHITECTURES["llama"].build(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    report = probe_gradients(model, [batch_of(rows_of(2))])
    assert set(report.scores) == {
        n
        for n, (owner, leaf) in base_parameters(model).items()
        if names.role(n, getattr(owner, leaf).shape) == "linear"
    }


# --- memory ----------------------------------------------------------------------------------------------------------


def test_extra_memory_is_one_gradient_and_the_sketches() -> None:
    config = ARCHITECTURES["llama"].config()
    config.update({"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 192})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    batch = batch_of([rows_of(1)[0] * 3 for _ in range(2)])
    gc.collect()

    def peak(run: Any) -> int:
        tracker = StorageTracker()
        tracker.adopt(model.parameters(), "weights")
        base = tracker.total
        with tracker:
            run()
        return max(p[0] for p in tracker.peaks.values()) - base

    def backward_through_all() -> None:
        # What full fine-tuning holds for its backward, without a gradient of any weight being made.
        first = model.model.layers[0].self_attn.q_proj.register_forward_hook(
            lambda m, a, out: seen.append(out) and None
        )
        seen: list[Any] = []
        try:
            loss = model(**batch).loss
            torch.autograd.grad(loss, seen)
        finally:
            first.remove()

    linear = [p for n, p in model.named_parameters() if names.role(n, p.shape) == "linear"]
    largest = max(p.numel() for p in linear) * 4
    every = sum(p.numel() for p in linear) * 4
    logits = 4 * 2 * batch["labels"].numel() * 264  # the loss is computed twice: by the model, and by sample
    least = peak(backward_through_all)
    assert peak(lambda: probe_gradients(model, [batch], directions=0)) - least <= largest + logits
    # Of rank 4 the sketches and random matrices are small beside the gradients of all layers.
    sketches = sum(4 * (4 * p.shape[0] + 6 * p.shape[1]) for p in linear)
    random = sum(4 * (4 * w + 6 * h) for h, w in {tuple(p.shape) for p in linear})
    extra = peak(lambda: probe_gradients(model, [batch], directions=2, sketch=4)) - least
    assert extra <= largest + sketches + random + logits < every


# --- similarities ----------------------------------------------------------------------------------------------------


def exact_tables(mean: dict[str, torch.Tensor], members: tuple[str, ...], side: str, directions: int) -> Any:
    parts = [torch.linalg.svd(mean[n].double(), full_matrices=False) for n in members]
    vectors = [p[2].T if side == "in" else p[0] for p in parts]
    subspace = [
        [(a[:, :directions].T @ b[:, :directions]).square().sum() / directions for b in vectors] for a in vectors
    ]
    flat = [mean[n].double().flatten() for n in members]
    cosine = [[a @ b / a.norm() / b.norm() for b in flat] for a in flat]
    return torch.tensor(subspace), torch.tensor(cosine)


def test_similarities_are_those_of_the_exact_mean_gradients(tiny_llama: Any) -> None:
    model = tiny_llama.double()
    samples = [batch_of([row]) for row in rows_of(6)]
    _, mean, _ = exact(model, samples)
    report = probe_gradients(model, [batch_of(rows_of(6))], sketch=64)
    assert {s.kind: s.side for s in report.similarities} == {
        "self_attn.q_proj": "in", "self_attn.k_proj": "in", "self_attn.v_proj": "in", "self_attn.o_proj": "out",
        "mlp.gate_proj": "in", "mlp.up_proj": "in", "mlp.down_proj": "out",
    }  # fmt: skip
    for s in report.similarities:
        assert len(s.names) == 4
        subspace, cosine = exact_tables(mean, s.names, s.side, 8)
        # The sketch is as wide as the matrix: nothing is approximated but the rounding to six digits.
        assert torch.allclose(torch.tensor(s.subspace, dtype=torch.float64), subspace, atol=2e-6), s.kind
        assert torch.allclose(torch.tensor(s.cosine, dtype=torch.float64), cosine, atol=2e-6), s.kind


def test_a_narrow_sketch_is_near_though_these_gradients_hardly_decay(tiny_llama: Any) -> None:
    model = tiny_llama.double()
    _, mean, _ = exact(model, [batch_of([row]) for row in rows_of(6)])
    report = probe_gradients(model, [batch_of(rows_of(6))], sketch=40)
    for s in report.similarities:
        subspace, cosine = exact_tables(mean, s.names, s.side, 8)
        # 40 of 64 directions: what the sketch leaves out of a spectrum that hardly decays; cosines need the products
        # only.
        assert (torch.tensor(s.subspace) - subspace).abs().max() < 0.1, s.kind
        assert (torch.tensor(s.cosine) - cosine).abs().max() < 0.02, s.kind


def test_a_gradient_of_low_rank_comes_back_exactly_and_a_high_one_nearly() -> None:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means = MeanGradients(sketch=16)
    x, g = rand(3, 4, 50), rand(3, 4, 40)  # twelve tokens: rank 12
    means.see("low", x[:2], g[:2])
    means.see("low", x[2:], g[2:])
    u, s, v = means.svd("low")
    wanted = g.flatten(0, 1).T @ x.flatten(0, 1)
    assert len(s) == 12
    # Float64, entries of size 60 at most: 50 * 2.2e-16 * 60 is 7e-13 for each of the few products and the SVD.
    assert torch.allclose(u * s @ v.T, wanted, atol=1e-10)
    decaying = torch.linalg.qr(rand(50, 40))[0] * 0.7 ** torch.arange(40)
    means.see("high", decaying.T[None], torch.eye(40, dtype=torch.float64)[None])
    u, s, v = means.svd("high")
    tail = (0.7 ** torch.arange(16, 40, dtype=torch.float64)).square().sum().sqrt()
    assert ((u * s) @ v.T - decaying.T).norm() < 10 * tail


def test_without_directions_nothing_is_compared_or_kept() -> None:
    model = ARCHITECTURES["llama"].build()
    batch = batch_of(rows_of(2))
    report = probe_gradients(model, [batch], directions=0)
    assert report.similarities == ()
    assert report.stats == probe_gradients(model, [batch]).stats


def test_without_fisher_the_rest_is_the_same_and_the_criterion_is_refused(tiny_llama: Any, tmp_path: Any) -> None:
    batches = [batch_of(rows_of(4)), batch_of(rows_of(4, seed=1))]
    whole = probe_gradients(tiny_llama, batches, svd_rank=8)
    less = probe_gradients(tiny_llama, batches, svd_rank=8, fisher=False)
    assert len(whole.scores) == len(whole.stats) and less.scores == {}
    assert [s.importance for s in less.stats] == [s.importance for s in whole.stats]
    assert less.similarities == whole.similarities and less.loss == whole.loss
    less.save(tmp_path / "gradients.json")
    assert GradientReport.load(tmp_path / "gradients.json") == less
    with pytest.raises(
        OptionError, match="criterion 'fisher' scores by the Fisher mass, which these gradients do not have"
    ):
        make_plan(scan_weights(tiny_llama), criterion="fisher", gradients=less)
    with pytest.raises(OptionError, match="fisher is False, directions and svd_rank are 0"):
        probe_gradients(tiny_llama, batches, fisher=False, directions=0)


def test_only_the_first_batch_is_asked_for_the_models_own_loss(tiny_llama: Any) -> None:
    seen: list[bool] = []
    handle = tiny_llama.register_forward_pre_hook(lambda m, a, k: seen.append("labels" in k), with_kwargs=True)
    probe_gradients(tiny_llama, [batch_of(rows_of(4)), batch_of(rows_of(4, seed=1))])
    handle.remove()
    assert seen == [False, True, False]  # the look at the model, the first batch, the second


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 1e-5), (torch.float32, 1e-5), (torch.float64, 1e-12)]
)
def test_importance_in_the_precision_that_the_model_computes_in(dtype: torch.dtype, error: float) -> None:
    """Against float64, from the same rounded inputs; derivatives as small as those of half precision are no zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 24, generator=generator).to(dtype)
    g = (1e-6 * torch.randn(3, 40, 16, generator=generator)).to(dtype)
    left, values, right = torch.linalg.svd(
        torch.randn(16, 24, generator=generator, dtype=torch.float64), full_matrices=False
    )
    collector = ComponentImportance({"w": SingularTriplets(left.T, values, right)})
    collector.see("w", x[:2], g[:2])
    collector.see("w", x[2:], g[2:])
    found = torch.tensor(collector.fields("w", 1, samples=3)["importance"], dtype=torch.float64)
    slopes = torch.stack(
        [(left.T @ (b.T @ a) @ right.T).diagonal() for a, b in zip(x.double(), g.double(), strict=True)]
    )
    wanted = values.square() * slopes.square().mean(dim=0)
    assert float((found - wanted).norm() / wanted.norm()) < error
    assert (found > 0).all()


@pytest.mark.parametrize(
    ("kind", "shape", "side"),
    [
        ("self_attn.q_proj", (64, 64), "in"), ("self_attn.o_proj", (64, 64), "out"), ("self_attn.q_proj", (96, 64), "in"),
        ("mlp.down_proj", (64, 96), "out"), ("attention.output.dense", (64, 64), "out"), ("output.dense", (64, 64), "out"),
        ("attention.self.query", (64, 64), "in"), ("intermediate.dense", (64, 64), "in"), ("attention.dense", (64, 64), "out"),
        ("self_attention.dense", (64, 64), "out"), ("attn.c_proj", (64, 64), "out"), ("attn.c_attn", (192, 64), "in"),
        ("encoder.SelfAttention.o", (64, 64), "out"), ("decoder.EncDecAttention.k", (64, 64), "in"),
        ("anything", (64, 8), "out"), ("anything", (8, 64), "in"), ("anything", (8, 8), "in"),
    ],
)  # fmt: skip
def test_the_side_of_the_residual_stream(kind: str, shape: tuple[int, int], side: str) -> None:
    assert names.residual_side(kind, shape, 64) == side


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_batches_are_refused() -> None:
    model = ARCHITECTURES["llama"].build()
    good = batch_of(rows_of(2))
    for batches, words in (
        ([], "there is no batch"),
        (
            [{k: v for k, v in good.items() if k != "labels"}],
            r"batch 0: has \['attention_mask', 'input_ids'\], wanted labels",
        ),
        ([{**good, "labels": torch.full_like(good["labels"], -100)}], "no sample has a token to predict"),
        ([{**good, "labels": good["labels"].float()}], "labels are torch.float32"),
    ):
        with pytest.raises(DataError, match=words):
            probe_gradients(model, batches)
    with pytest.raises(OptionError, match=r"candidates: 'model.layers.0.self_attn.q_pro.weight'.*Did you mean"):
        probe_gradients(model, [good], candidates=["model.layers.0.self_attn.q_pro.weight"])
    with pytest.raises(OptionError, match="directions is 9 and sketch is 8"):
        probe_gradients(model, [good], directions=9, sketch=8)


def test_class_ids_fit_the_head_or_are_masked() -> None:
    model = ARCHITECTURES["bert"].build()
    good = batch_for(ARCHITECTURES["bert"], model)
    ids = good["labels"]
    assert ids.dim() == 1
    with pytest.raises(DataError, match=r"a class id is 99, and the model has \d+ classes"):
        probe_gradients(model, [{**good, "labels": torch.full_like(ids, 99)}])
    with pytest.raises(DataError, match="no sample has a token to predict"):
        probe_gradients(model, [{**good, "labels": torch.full_like(ids, -100)}])
    half = {**good, "labels": torch.where(torch.arange(len(ids)) == 0, ids, -100)}
    alone = probe_gradients(model, [{k: v[:1] for k, v in good.items()}])
    assert probe_gradients(model, [half]).samples == 1
    close(probe_gradients(model, [half]), alone.scores, 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused(value: float) -> None:
    model = ARCHITECTURES["llama"].build()
    with torch.no_grad():
        model.lm_head.weight[3] = value
    with pytest.raises(DataError, match=r"calibration batch 0: the loss of sample 0 is (nan|inf)"):
        probe_gradients(model, [batch_of(rows_of(2))])


def test_a_loss_without_a_gradient_is_refused() -> None:
    model = ARCHITECTURES["llama"].build()
    model.model.layers = model.model.layers[:0]
    with pytest.raises((DataError, OptionError), match="linear matrix"):
        probe_gradients(model, [batch_of(rows_of(2))])
    model = ARCHITECTURES["llama"].build()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # Every derivative is zero there, and that is a result; only what no derivative reaches at all is an error.
    assert set(probe_gradients(model, [batch_of(rows_of(2))]).scores.values()) == {0.0}
    model.lm_head.forward = lambda x: torch.zeros(*x.shape[:-1], 264)
    with pytest.raises((DataError, RuntimeError)):
        probe_gradients(model, [batch_of(rows_of(2))])


def test_samples_without_a_token_to_predict_do_not_count(caplog: Any) -> None:
    model = ARCHITECTURES["llama"].build().double()
    batch = batch_of(rows_of(3))
    wanted = probe_gradients(model, [{k: v[1:] for k, v in batch.items()}])
    batch["labels"][0] = -100
    with caplog.at_level("INFO"):
        report = probe_gradients(model, [batch])
    assert report.samples == 2
    # Float64, the same sums without a row of zeros, in another order.
    assert report.scores == pytest.approx(wanted.scores, rel=1e-9)
    assert "1 samples have no token to predict" in caplog.text


def test_a_report_is_saved_and_loaded_whole(tmp_path: Any) -> None:
    report = probe_gradients(ARCHITECTURES["llama"].build(), [batch_of(rows_of(2))])
    assert GradientReport.load(report.save(tmp_path / "gradients.json")) == report
    assert report.fingerprint is not None and report.fingerprint.structure


# --- the criterion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("mode", [name for name, row in MODES.items() if row.selective])
def test_fisher_chooses_in_every_mode_on_float_and_4_bit_bases(mode: str, quantization: Any, tmp_path: Any) -> None:
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path)
    batches = [batch_of(rows_of(4))]
    options: dict[str, Any] = {"mode": mode, "criterion": "fisher", "task_type": "CAUSAL_LM", "spectrum_ratio": 0.5}
    load: dict[str, Any] = {"dtype": torch.float32, "quantization": quantization}
    if quantization and MODES[mode].real_weights:
        # Which modules stay unquantized must be known before there is a model to probe.
        with pytest.raises(OptionError, match="Probe the float model first"):
            load_model_with_spectrum(str(tmp_path), SpectrumConfig(calibration_data=batches, **options), **load)
        bases = {"svd_rank": 16} if "svd_rank" in MODES[mode].own_options else {}
        options["gradients"] = probe_gradients(ARCHITECTURES["llama"].build(), batches, **bases)
    else:
        options["calibration_data"] = batches
    config = SpectrumConfig(**options)
    model, _ = load_model_with_spectrum(str(tmp_path), config, **load)
    plan = model.peft_config["default"].plan if hasattr(model, "peft_config") else model.spectrum_plan
    scores = config.resolved_gradients().scores
    assert plan.criterion == "fisher" and {e.name: e.score for e in plan.entries} == pytest.approx(scores)
    for kind in {e.kind for e in plan.entries}:
        best, other = sorted((e for e in plan.entries if e.kind == kind), key=lambda e: -e.score)
        assert best.trains and not other.trains
    assert config.calibration_data is None


def test_fisher_says_where_to_go(tmp_path: Any) -> None:
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="gradients=probe_gradients"):
        scan_weights(str(tmp_path), criterion="fisher")
    with pytest.raises(OptionError, match=r"calibration_batches\(dataset, tokenizer\)"):
        load_model_with_spectrum(str(tmp_path), SpectrumConfig(criterion="fisher"), dtype=torch.float32)
    with pytest.raises(OptionError, match="criterion 'fisher' is of gradients on calibration data"):
        SpectrumConfig(mode="alors", criterion="fisher", rescore_every=1).options()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_of_text_end_with_the_end_token(tiny_tokenizer: Any) -> None:
    batches = calibration_batches([{"text": "ab" * (i + 1)} for i in range(6)], tiny_tokenizer, n=6, batch_size=4)
    assert [len(b["labels"]) for b in batches] == [4, 2]
    first = batches[0]
    assert first["input_ids"][0].tolist()[:3] == [*tiny_tokenizer("ab")["input_ids"], tiny_tokenizer.eos_token_id]
    assert first["labels"][0].tolist() == [*first["input_ids"][0].tolist()[:3], *[-100] * 6]
    assert first["attention_mask"][0].tolist() == [1] * 3 + [0] * 6


def test_prompts_are_masked_and_chats_take_the_template(tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "what? ", "completion": "that"}] * 2
    (batch,) = calibration_batches(rows, tiny_tokenizer, n=2, batch_size=2)
    learnt = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert learnt == [*tiny_tokenizer("that")["input_ids"], tiny_tokenizer.eos_token_id]
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    (chat,) = calibration_batches([{"messages": [user, answer]}] * 2, tiny_tokenizer, n=2, batch_size=2)
    wanted = tiny_tokenizer.apply_chat_template([user, answer], return_dict=True)["input_ids"]
    assert chat["input_ids"][0].tolist() == list(wanted)
    assert chat["labels"][0][chat["labels"][0] != -100].tolist() == tiny_tokenizer("yo</s>")["input_ids"]
    (pair,) = calibration_batches([{"prompt": [user], "completion": [answer]}] * 2, tiny_tokenizer, n=2, batch_size=2)
    assert pair["input_ids"][0].tolist() == list(wanted)
    known = len(tiny_tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True)["input_ids"])
    assert (pair["labels"][:, :known] == -100).all() and (pair["labels"][:, known:] != -100).all()


def test_classes_and_sequences(tiny_tokenizer: Any) -> None:
    rows = [{"text": "a", "label": "yes"}, {"text": "bb", "label": "no"}]
    (batch,) = calibration_batches(rows, tiny_tokenizer, n=2, batch_size=2)
    assert batch["labels"].tolist() == [1, 0]  # sorted names: no, yes
    (named,) = calibration_batches(rows, tiny_tokenizer, n=2, batch_size=2, labels=["yes", "no"])
    assert named["labels"].tolist() == [0, 1]
    pairs = [{"prompt": "in", "completion": "out!"}] * 2
    (seq,) = calibration_batches(pairs, tiny_tokenizer, n=2, batch_size=2, task="seq2seq")
    assert seq["input_ids"].shape == (2, 2) and seq["labels"].shape == (2, 4)


def test_the_draw_is_seeded_and_its_order_is_not_the_datasets(tiny_tokenizer: Any) -> None:
    rows = Dataset.from_dict({"text": [f"{i:03d}" for i in range(100)]})

    def drawn(seed: int) -> list[str]:
        batches = calibration_batches(rows, tiny_tokenizer, n=16, seed=seed)
        return sorted(tiny_tokenizer.decode(ids[:3]) for b in batches for ids in b["input_ids"])

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 16


def test_bad_calibration_data_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="3 rows, wanted at least one batch of 8"):
        calibration_batches([{"text": "a"}] * 3, tiny_tokenizer)
    with pytest.raises(DataError, match="0 rows, wanted at least one batch"):
        calibration_batches([], tiny_tokenizer)
    with pytest.raises(DataError, match="no usable column"):
        calibration_batches([{"body": "a"}] * 9, tiny_tokenizer)
    with pytest.raises(OptionError, match="n is 0"):
        calibration_batches([{"text": "a"}] * 9, tiny_tokenizer, n=0)


def test_gradients_that_overflow_are_refused_where_their_likeness_is_asked() -> None:
    seen = MeanGradients(sketch=4)
    huge = torch.full((1, 2, 6), 1e30)
    seen.see("layer", huge, huge)
    with pytest.raises(DataError, match=r"the sum of the gradients of layer is no finite matrix"):
        seen.svd("layer")
