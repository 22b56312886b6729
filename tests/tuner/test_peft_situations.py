"""What PEFT's own tests ask of a tuner, asked of every mode: it works as in PEFT, or one line says why not and what instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    set_base_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from running import IDS, LIBRARIES, logits, options_of
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from spectrum_peft import SpectrumConfig, names, parameter_groups
from spectrum_peft.errors import SpectrumError
from spectrum_peft.plan import MODES

pytestmark = LIBRARIES

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# A model and its plain copy do the same sums in another order at most (rows one by one, a merged weight): some roundings
# of values of order 1.
ROUNDINGS = 5e-6


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=264, num_key_value_heads=2, **SIZES, **changes)).eval()


def config_of(mode: str, **changes: Any) -> SpectrumConfig:
    return SpectrumConfig(mode=mode, **{"task_type": "CAUSAL_LM", "r": 4} | options_of(mode) | changes)


def trained(model: Any, adapter: str = "default", seed: int = 0, size: float = 0.1) -> Any:
    """The model with an adapter's values moved, as training moves them."""
    generator = torch.Generator().manual_seed(seed)
    before = model.active_adapter
    model.set_adapter(adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)
    model.set_adapter(before)
    return model


# --- rows of several adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_each_row_of_a_mixed_batch_has_its_own_adapter(mode: str, norms: bool) -> None:
    options = {"train_norms": True} if norms and not MODES[mode].whole_model else {}
    model = get_peft_model(llama(), config_of(mode, **options), "one")
    model.add_adapter("two", config_of(mode, **options))
    trained(trained(model, "one", 1), "two", 2)
    ids = IDS[[0, 1, 0, 1]]
    alone = {"__base__": logits(llama(), ids)}
    for name in ("two", "one"):
        model.set_adapter(name)
        alone[name] = logits(model, ids)
    rows = ["two", "__base__", "one", "two"]
    with torch.no_grad():
        mixed = model.eval()(input_ids=ids, adapter_names=rows).logits
    wanted = torch.stack([alone[name][i] for i, name in enumerate(rows)])
    assert (mixed - wanted).abs().max() < ROUNDINGS
    assert min((alone[a] - alone[b]).abs().max() for a, b in (("one", "two"), ("one", "__base__"))) > 0.01
    assert torch.equal(logits(model, ids), alone["one"])  # nothing of it stays


def test_an_adapter_that_saves_no_copy_of_a_module_uses_the_bases_in_its_rows() -> None:
    model = get_peft_model(llama(), config_of("lora"), "plain")
    model.add_adapter("head", config_of("lora", train_head=True))
    trained(trained(model, "plain", 1), "head", 2)
    alone = {}
    for name in ("head", "plain"):  # the one that is switched on has no head of its own
        model.set_adapter(name)
        alone[name] = logits(model)
    with torch.no_grad():
        mixed = model.eval()(input_ids=IDS, adapter_names=["plain", "head"]).logits
    assert (mixed[0] - alone["plain"][0]).abs().max() < ROUNDINGS
    assert (mixed[1] - alone["head"][1]).abs().max() < ROUNDINGS


@pytest.mark.parametrize("mode", MODES)
def test_beam_search_gives_each_row_its_own_adapter(mode: str) -> None:
    model = trained(get_peft_model(llama(), config_of(mode)), size=0.3).eval()
    how = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=IDS, adapter_names=["__base__", "default"], **how)
    base, adapted = llama().generate(input_ids=IDS, **how), model.generate(input_ids=IDS, **how)
    assert mixed[0].tolist() == base[0].tolist() and mixed[1].tolist() == adapted[1].tolist()
    assert base[1].tolist() != adapted[1].tolist()


@pytest.mark.parametrize(("change", "names", "message"), [
    ({}, ["default", "tow"], "no adapter is called 'tow'"),
    ({}, "default", "wanted a list"),
    ({"bias": "all"}, ["default", "__base__"], "bias='all'"),
    ({"modules_to_save": ["mlp"]}, ["default", "__base__"], "mlp .* cannot differ from row to row"),
])  # fmt: skip
def test_rows_that_cannot_be_kept_apart_are_refused(change: dict[str, Any], names: Any, message: str) -> None:
    model = get_peft_model(llama(), config_of("lora", target_modules=["q_proj"], **change)).eval()
    with pytest.raises(SpectrumError, match=message):
        model(input_ids=IDS, adapter_names=names)


def test_real_weights_of_a_module_that_mixes_its_rows_are_refused() -> None:
    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(vocab_size=264, num_key_value_heads=2, head_dim=8, num_local_experts=4, **SIZES)
    )
    model = get_peft_model(model, SpectrumConfig(mode="full")).eval()
    with pytest.raises(SpectrumError, match=r"self_attn .* cannot differ from row to row"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


def test_rows_that_are_not_as_many_as_names_are_refused() -> None:
    model = get_peft_model(llama(), config_of("spectrum")).eval()
    with pytest.raises(SpectrumError, match=r"3 names, .* has 2 rows"):
        model(input_ids=IDS, adapter_names=["default"] * 3)


# --- modules with parts ----------------------------------------------------------------------------------------------


def _with_parts(family: str) -> tuple[Callable[[], Any], dict[str, torch.Tensor]]:
    """How to make a model with modules that own parameters and have children, and inputs for it."""
    ids = torch.randint(0, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    experts = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}

    def make() -> Any:
        torch.manual_seed(0)
        model: nn.Module = {
            "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(vocab_size=100, **experts, **SIZES)),
            "deberta": lambda: DebertaModel(DebertaConfig(vocab_size=100, **SIZES)),
            "vit": lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES)),
        }[family]()
        return model.eval()

    return make, {"pixel_values": pixels} if family == "vit" else {"input_ids": ids}


def _first(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]


@pytest.mark.parametrize("family", ["gpt_oss", "deberta", "vit"])
def test_full_holds_the_parameters_of_modules_with_parts(family: str, tmp_path: Path) -> None:
    make, inputs = _with_parts(family)
    base = make()
    start, stored = _first(base, inputs), {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(base, SpectrumConfig(mode="full"))
    assert all(p.requires_grad for n, p in model.named_parameters() if "original_module" not in n)
    assert torch.equal(_first(model, inputs), start)
    moved = _first(trained(model), inputs)
    assert (moved - start).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(_first(model, inputs), start)
    model.save_pretrained(tmp_path)
    assert torch.equal(_first(PeftModel.from_pretrained(make(), tmp_path), inputs), moved)
    # A second adapter finds the modules inside those that the first one has wrapped.
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(_first(model, inputs), moved)
    plain = copy.deepcopy(model).unload()
    assert set(plain.state_dict()) == set(stored)
    assert all(torch.equal(value, stored[name]) for name, value in plain.state_dict().items())
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(_first(merged, inputs), moved) and set(merged.state_dict()) == set(stored)
    model.delete_adapter("default")
    assert torch.equal(_first(model, inputs), moved)


@pytest.mark.parametrize("mode", ["full", "spectrum"])
def test_an_adapter_of_any_name_trains_in_modules_with_parts(mode: str) -> None:
    make = mixtral if mode == "spectrum" else _with_parts("gpt_oss")[0]
    model = get_peft_model(make(), SpectrumConfig(mode=mode), "some name")
    held = [p for n, p in model.named_parameters() if ".lora_spectrum.some name." in n]
    assert held and all(p.requires_grad for p in held)


def test_the_layer_shows_what_the_module_shows() -> None:
    make, _ = _with_parts("gpt_oss")
    model = get_peft_model(make(), SpectrumConfig(mode="full"))
    plain, wrapped = make().model.layers[0].self_attn, model.get_base_model().model.layers[0].self_attn
    assert wrapped.head_dim == plain.head_dim and wrapped.layer_idx == 0
    assert torch.equal(wrapped.sinks, plain.sinks)
    assert torch.equal(wrapped.q_proj.weight, plain.q_proj.weight)
    wrapped.scaling = 7.0  # what is set through the layer is the module's
    assert wrapped.base_layer.scaling == 7.0 and "scaling" not in vars(wrapped)
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrapped.no_such


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_cast_to_bfloat16_before_or_after_wrapping_computes(mode: str, when: str, tmp_path: Path) -> None:
    cast = llama().to(torch.bfloat16)
    start = logits(cast)
    model = get_peft_model(cast if when == "before" else llama(), config_of(mode))
    trained(model)
    model = model.to(torch.bfloat16) if when == "after" else model
    moved = logits(model)
    assert moved.dtype == torch.bfloat16 and (moved - start).abs().max() > 0.01
    model(input_ids=IDS, labels=IDS).loss.backward()
    with model.disable_adapter():
        # Real weights are cast from the kept original, which is what the cast of the plain model did.
        assert torch.equal(logits(model), start)
    merged = copy.deepcopy(model).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    # The merged weight is rounded to eight bits, twice where the product of factors was rounded before.
    assert (logits(merged) - moved).abs().max() < 2**-5 * moved.abs().max()
    assert {p.dtype for p in copy.deepcopy(model).unload().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{"mode": "full"}, {"mode": "spectrum", "train_norms": True}])
def test_a_family_that_asks_a_weight_for_its_dtype_computes_in_bfloat16(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=264, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    base = T5ForConditionalGeneration(config).to(torch.bfloat16)
    model = get_peft_model(base, SpectrumConfig(**options))
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_spectrum" in n)


# --- tied embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mode": "full"}, {"mode": "spectrum", "train_embeddings": True}])
def test_a_second_adapter_on_a_tied_model_is_what_it_was_alone(options: dict[str, Any], tmp_path: Path) -> None:
    alone = {}
    for seed, name in enumerate(("one", "two"), start=1):
        model = trained(get_peft_model(llama(tie_word_embeddings=True), SpectrumConfig(**options)), seed=seed)
        model.save_pretrained(tmp_path / name)
        alone[name] = logits(model)
    both = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "one", "one")
    both.load_adapter(tmp_path / "two", "two")
    for name in ("two", "one"):
        both.set_adapter(name)
        assert torch.equal(logits(both), alone[name])
        head, embedding = both.get_output_embeddings(), both.get_input_embeddings()
        assert head.modules_to_save[name].weight is embedding.modules_to_save[name].weight


# --- loaded and run by other libraries -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_transformers_own_loader_gives_the_adapter_that_was_saved(mode: str, tmp_path: Path) -> None:
    model = trained(get_peft_model(llama(), config_of(mode)))
    model.save_pretrained(tmp_path)
    wanted = {n.removeprefix("base_model.model."): p.requires_grad for n, p in model.named_parameters()}
    plain = llama()
    plain.load_adapter(tmp_path, is_trainable=True)
    assert torch.equal(logits(plain), logits(model))
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == wanted


# --- the base's own state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_bases_state_dict_is_whole_and_can_be_replaced(mode: str, tied: bool) -> None:
    model = trained(get_peft_model(llama(tie_word_embeddings=tied), config_of(mode)))
    stored = llama(tie_word_embeddings=tied).state_dict()
    found = get_base_model_state_dict(model)
    assert set(found) == set(stored) and all(torch.equal(found[name], value) for name, value in stored.items())
    other = {name: value + 1 for name, value in stored.items()}
    result = set_base_model_state_dict(model, other)
    assert not result.missing_keys and not result.unexpected_keys
    plain = model.unload()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in other.items())
    assert not plain._state_dict_hooks and not plain._load_state_dict_pre_hooks


# --- roles by what a module is ---------------------------------------------------------------------------------------


class Unnamed(nn.Module):
    """An embedding, a head and an attention whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin, self.tail = nn.Embedding(100, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def get_output_embeddings(self) -> nn.Module:
        return self.tail

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lin(self.emb(ids))
        return self.tail(self.mix(x, x, x)[0])


def test_adapters_go_to_linears_and_not_to_embeddings_or_heads_of_unknown_name() -> None:
    model = get_peft_model(Unnamed(), SpectrumConfig(mode="lora"))
    assert [n for n, m in model.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.lin"]


@pytest.mark.parametrize(("options", "trains"), [
    ({"mode": "spectrum", "train_embeddings": True}, {"emb.modules_to_save.default.weight"}),
    ({"mode": "lora", "train_head": True}, {"tail.modules_to_save.default.weight", "tail.modules_to_save.default.bias"}),
    ({"mode": "lora", "trainable_token_indices": {"emb": [0, 10]}}, {"emb.token_adapter.trainable_tokens_delta.default"}),
    ({"mode": "spectrum", "trainable_token_indices": {"emb": [0, 10]}},
     {"emb.token_adapter.trainable_tokens_delta.default"}),
])  # fmt: skip
def test_embeddings_and_heads_of_unknown_name_train_whole_or_by_rows(options: Any, trains: set[str]) -> None:
    model = get_peft_model(Unnamed(), SpectrumConfig(**options))
    model(torch.tensor([[0, 1, 10]])).sum().backward()
    found = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n in found if "lora_" not in n} == trains


def test_a_plan_is_made_beside_an_adapter_that_trains_rows_of_an_embedding() -> None:
    batches = [{"input_ids": IDS, "labels": IDS}]
    model = get_peft_model(llama(), config_of("lora", trainable_token_indices=[0, 1]))
    model.add_adapter("second", config_of("sgm", calibration_data=batches))
    alone = get_peft_model(llama(), config_of("sgm", calibration_data=batches))
    assert model.peft_config["second"].plan.digest == alone.peft_config["default"].plan.digest


# --- whole modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_modules_to_save_may_have_parts(mode: str, tmp_path: Path) -> None:
    batches = [{"input_ids": IDS, "labels": torch.tensor([0, 1])}]

    def make() -> Any:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(vocab_size=264, **SIZES)).eval()

    options = {"r": 4, **options_of(mode, batches)}
    model = get_peft_model(
        make(), SpectrumConfig(mode=mode, task_type="SEQ_CLS", modules_to_save=["pooler"], **options)
    )
    pooler = model.get_base_model().bert.pooler
    assert [n for n, p in pooler.named_parameters() if p.requires_grad] == [
        "modules_to_save.default.dense.weight", "modules_to_save.default.dense.bias",
    ]  # fmt: skip
    moved = _first(trained(model), {"input_ids": IDS})
    model.save_pretrained(tmp_path)
    assert torch.equal(_first(PeftModel.from_pretrained(make(), tmp_path), {"input_ids": IDS}), moved)
    assert (_first(copy.deepcopy(model).merge_and_unload(), {"input_ids": IDS}) - moved).abs().max() < ROUNDINGS


# --- targets ---------------------------------------------------------------------------------------------------------


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=264, num_key_value_heads=2, num_local_experts=4, **SIZES)).eval()


@pytest.mark.parametrize("mode", ["spectrum", "lora", "spectra_qlora", "alors"])
@pytest.mark.parametrize(("targets", "kinds"), [
    ({"target_parameters": ["experts.down_proj"]}, {"mlp.experts.down_proj"}),
    ({"target_parameters": ["experts.down_proj", "q_proj.weight"]}, {"mlp.experts.down_proj", "self_attn.q_proj"}),
    ({"target_parameters": ["experts.down_proj"], "target_modules": ["v_proj"]},
     {"mlp.experts.down_proj", "self_attn.v_proj"}),
])  # fmt: skip
def test_target_parameters_mean_what_they_name(mode: str, targets: Any, kinds: set[str]) -> None:
    model = get_peft_model(mixtral(), config_of(mode, **targets))
    assert {e.kind for e in model.peft_config["default"].plan.entries if e.trains} == kinds


def test_target_parameters_that_name_nothing_are_refused() -> None:
    with pytest.raises(SpectrumError, match=r"target_parameters: 'experts.no_proj' matches no matrix"):
        get_peft_model(mixtral(), config_of("lora", target_parameters=["experts.no_proj"]))


@pytest.mark.parametrize("mode", [name for name in MODES if not MODES[name].whole_model])
def test_layers_to_transform_leaves_the_other_blocks_alone(mode: str) -> None:
    model = get_peft_model(llama(), config_of(mode, layers_to_transform=[0]))
    assert {names.block_index(n) for n in model.peft_config["default"].plan.trainable_names} == {0}


# --- sums of adapters ------------------------------------------------------------------------------------------------

LOW_RANK = [name for name in MODES if not MODES[name].real_weights]


def _deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    layers = {n: m for n, m in model.named_modules() if adapter in getattr(m, "lora_A", ())}
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in layers.items()}


@pytest.mark.parametrize(("combination", "weights"), [("svd", [1.0]), ("svd", [0.5, -2.0]), ("cat", [0.5, -2.0])])
@pytest.mark.parametrize("mode", LOW_RANK)
def test_a_weighted_adapter_is_the_weighted_sum(
    mode: str, combination: str, weights: list[float], tmp_path: Path
) -> None:
    model = get_peft_model(llama(), config_of(mode), "one")
    model.add_adapter("two", config_of(mode, r=6))
    trained(trained(model, "one", 1), "two", 2)
    adapters = ["one", "two"][: len(weights)]
    model.add_weighted_adapter(adapters, weights, "sum", combination_type=combination, svd_rank=64)
    found, parts = _deltas(model, "sum"), [_deltas(model, name) for name in adapters]
    for name, delta in found.items():
        wanted = sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part)
        # An SVD in float32 of a matrix of width up to 48, then a product.
        assert (delta - wanted).abs().max() < 1e-5 * wanted.abs().max(), name
    assert found and not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    model.set_adapter("sum")
    moved = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "sum")), moved)


@pytest.mark.parametrize(("mode", "how", "message"), [
    ("spectrum", {}, "trains .* itself"),
    ("full", {}, "trains .* itself"),
    ("lora", {"combination_type": "linear"}, "needs one rank in all adapters"),
    ("lora", {"combination_type": "sdv"}, "combination_type is 'sdv'. Did you mean 'svd'"),
    ("lora", {"adapters": ["one", "three"]}, "no adapter is called 'three'"),
    ("lorsa", {"combination_type": "ties", "density": 0.5}, "basis of its own"),
])  # fmt: skip
def test_what_is_no_weighted_sum_is_refused(mode: str, how: dict[str, Any], message: str) -> None:
    model = get_peft_model(llama(), config_of(mode), "one")
    model.add_adapter("two", config_of(mode, r=6))
    with pytest.raises(SpectrumError, match=message):
        model.add_weighted_adapter(**{"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "sum"} | how)
    assert set(model.peft_config) == {"one", "two"}


# --- small ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_adapters_keep_the_bases_dtype_where_peft_is_told_so(mode: str) -> None:
    model = get_peft_model(llama().to(torch.bfloat16), config_of(mode), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_casting_of_inputs_can_be_switched_off(mode: str) -> None:
    model = get_peft_model(llama(), config_of(mode))
    with disable_input_dtype_casting(model):
        assert logits(model).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"rescore_every": 5, "lr_ratio": (1, 1)}])
def test_peft_can_scale_every_layer_dead_slots_and_all(options: dict[str, Any]) -> None:
    model = trained(get_peft_model(llama(), config_of("alors", **options)))
    layers = [m for m in model.modules() if hasattr(m, "set_scale")]
    before, moved = [layer.scaling["default"] for layer in layers], logits(model)
    for layer in layers:
        layer.set_scale("default", 2.0)
    assert not torch.equal(logits(model), moved)
    for layer in layers:
        layer.unscale_layer()
    assert [layer.scaling["default"] for layer in layers] == pytest.approx(before)
    assert torch.equal(logits(model), moved)


# --- ranks that PEFT moves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lora", "spectra_qlora", "alors"])
def test_eva_moves_ranks_and_the_plan_follows(mode: str, tmp_path: Path) -> None:
    config = config_of(mode, r=8, init_lora_weights="eva", eva_config=EvaConfig(rho=4.0))
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True)
    rows = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    before = model.peft_config["default"].plan
    initialize_lora_eva_weights(model, dataloader=[batch] * 3, show_progress_bar=False)
    parameter_groups(model)
    plan = model.peft_config["default"].plan
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert {e.name: e.rank for e in plan.entries if e.trains} == {
        f"{n}.weight": m.r["default"] for n, m in layers.items()
    }
    assert plan != before
    trained(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and loaded.peft_config["default"].plan == plan


# --- a class whose modules were renamed ------------------------------------------------------------------------------


class Renamed(nn.Module):
    """A model whose body was called `model` and is called `model.language_model`, as some of transformers' were renamed."""

    def __init__(self, new: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": nn.Linear(10, 10)}) for _ in range(2)])})
        self.model = nn.ModuleDict({"language_model": body}) if new else body
        if new:
            self._checkpoint_conversion_mapping = {r"^model(?!\.language_model)": "model.language_model"}
        self.layers = [layer["attn"] for layer in body["layers"]]

    def forward(self, rows: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        for layer in self.layers:
            rows = layer(rows)
        return SimpleNamespace(logits=rows)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_of_an_older_class_finds_the_renamed_modules(mode: str, tmp_path: Path) -> None:
    data = [{"rows": torch.randn(8, 10), "labels": torch.arange(8)}] if MODES[mode].needs_data else None
    config = SpectrumConfig(mode=mode, r=4, **(options_of(mode) | {"calibration_data": data}))
    model = trained(get_peft_model(Renamed(new=False), config))
    model.save_pretrained(tmp_path)
    if mode == "lorsa":  # its directions are drawn from a module's name
        with pytest.raises(SpectrumError, match=r"or the module's name was changed"):
            PeftModel.from_pretrained(Renamed(new=True), tmp_path)
        return
    loaded = PeftModel.from_pretrained(Renamed(new=True), tmp_path)
    old = {n.replace("model.layers", "model.language_model.layers"): p for n, p in model.named_parameters()}
    found = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert found and all(torch.equal(p, old[n]) for n, p in found.items())


# --- merging one of several ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_one_of_two_adapters_is_merged_whichever_is_active(mode: str) -> None:
    extra = {} if MODES[mode].whole_model else {"train_head": True}
    model = get_peft_model(llama(), config_of(mode, **extra), "one")
    model.add_adapter("two", config_of(mode, **extra))
    trained(trained(model, "one", 1), "two", 2)
    model.set_adapter("two")
    wanted = logits(model)
    model.set_adapter("one")
    assert (logits(model) - wanted).abs().max() > 0.01
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["two"])
    assert (logits(merged) - wanted).abs().max() < ROUNDINGS


@pytest.mark.parametrize("mode", MODES)
def test_merging_two_adapters_adds_products_and_is_refused_for_two_values_of_a_weight(mode: str) -> None:
    model = get_peft_model(llama(), config_of(mode), "one")
    model.add_adapter("two", config_of(mode))
    trained(trained(model, "one", 1), "two", 2)
    before = logits(model)
    if MODES[mode].real_weights:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(SpectrumError, match=r"each hold a value of it, .* merge one of them"):
                merge(adapter_names=["one", "two"])
        assert torch.equal(logits(model), before)  # nothing was merged
        return
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["one", "two"])
    assert (logits(merged) - both).abs().max() < ROUNDINGS


@pytest.mark.parametrize("mode", MODES)
def test_the_models_config_is_the_one_that_was_given(mode: str) -> None:
    config = config_of(mode)
    assert get_peft_model(llama(), config).peft_config["default"] is config


# --- gradient checkpointing ------------------------------------------------------------------------------------------


def beit() -> Any:
    """Its blocks, which are what is checkpointed, own parameters."""
    torch.manual_seed(0)
    still = {"drop_path_rate": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return BeitForImageClassification(
        BeitConfig(image_size=16, patch_size=8, layer_scale_init_value=0.1, out_indices=[0, 1], **still, **SIZES)
    )


def _gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    model.train()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("mode", "make"), [*((mode, llama) for mode in MODES), ("full", beit)])
def test_checkpointing_gives_the_same_gradients(mode: str, make: Callable[[], Any], reentrant: bool) -> None:
    inputs = {"input_ids": IDS, "labels": IDS}
    if make is beit:
        generator = torch.Generator().manual_seed(0)
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1])}
    task = None if make is beit else "CAUSAL_LM"
    models = [trained(get_peft_model(make(), config_of(mode, task_type=task))) for _ in range(2)]
    models[1].prepare_model_for_gradient_checkpointing(models[1])
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain, again = (_gradients(model, inputs) for model in models)
    assert plain and set(plain) == set(again)
    for name, gradient in plain.items():
        assert (gradient is None) == (again[name] is None), name
        assert gradient is None or torch.equal(gradient, again[name]), name  # type: ignore[arg-type]
