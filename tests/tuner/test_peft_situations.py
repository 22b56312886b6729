"""What PEFT's own tests ask of a tuner, asked of every mode: it works as in PEFT, or one line says why not and what instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from running import IDS, LIBRARIES, logits, options_of
from torch import nn
from transformers import (
    DebertaConfig,
    DebertaModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from spectrum_peft import SpectrumConfig
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
    return SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **{"r": 4} | options_of(mode) | changes)


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


# Said by torch's own tracer of any autograd function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model_has_no_graph_breaks(mode: str) -> None:
    torch._dynamo.reset()
    model = trained(get_peft_model(llama(), config_of(mode)))
    found = torch._dynamo.explain(model.get_base_model())(input_ids=IDS)
    assert found.graph_break_count == 0, found.break_reasons
