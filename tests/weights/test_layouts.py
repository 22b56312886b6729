"""What a checkpoint's tensors are in a model class, held against transformers' own loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from odd_architectures import ODD_ARCHITECTURES, saved

from spectrum_peft.errors import CheckpointError
from spectrum_peft.weights import FileWeights, Recipe, open_weights, skeleton_of
from spectrum_peft.weights.layouts import layout_of, must_ask


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def opened(folder: Path) -> FileWeights:
    files = open_weights(folder)
    assert isinstance(files, FileWeights)
    return files


@pytest.mark.parametrize("name", ODD_ARCHITECTURES)
def test_every_parameter_reads_as_transformers_loads_it(name: str, tmp_path: Path) -> None:
    kind = saved(name, tmp_path)
    model = kind.from_pretrained(tmp_path, dtype=torch.float32)
    files = opened(tmp_path)
    loaded = dict(model.named_parameters())  # tied ones once
    read = {info.name: files.read(info.name) for info in files.tensors()}
    ties = [set(group) for group in files.tied]
    assert {n for n in loaded if n not in read and not any(n in tie and tie & set(read) for tie in ties)} == set()
    for parameter, value in read.items():
        assert torch.equal(value, model.get_parameter(parameter)), parameter
    for group in files.tied:
        assert len({id(model.get_parameter(n)) for n in group}) == 1


@pytest.mark.parametrize("name", ODD_ARCHITECTURES)
def test_a_layout_knows_what_transformers_finds_missing_and_unexpected(name: str, tmp_path: Path) -> None:
    kind = saved(name, tmp_path)
    stored = stored_in(tmp_path)
    dropped = next(
        n for n in stored if ".1." in n and n.endswith("weight") and stored[n].ndim == 2 and ".experts." not in n
    )
    del stored[dropped]
    stored["mtp.layers.0.extra.weight"] = torch.zeros(3, 3)
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    layout = layout_of(skeleton_of(kind, model.config), {n: tuple(t.shape) for n, t in stored.items()})
    assert set(layout.new) == set(info["missing_keys"]) != set()
    assert layout.ignored == ("mtp.layers.0.extra.weight",)


@pytest.mark.parametrize("name", ODD_ARCHITECTURES)
def test_what_is_put_back_loads_as_what_was_wanted(name: str, tmp_path: Path) -> None:
    kind = saved(name, tmp_path)
    stored = stored_in(tmp_path)
    layout = layout_of(skeleton_of(kind, ODD_ARCHITECTURES[name]()[1]), {n: tuple(t.shape) for n, t in stored.items()})
    for recipe in layout.recipes.values():
        wanted = {n: torch.randn(v.shape) for n, v in recipe.convert(stored).items()}
        back = recipe.put_back(wanted, stored)
        again = recipe.convert(back)
        assert set(back) == set(recipe.stored)
        assert all(torch.equal(again[n], wanted[n]) for n in wanted)
        for part, (owner, row) in (recipe.places or {}).items():
            rows = wanted[owner].reshape(-1, wanted[owner].shape[-1] if wanted[owner].ndim > 1 else 1)
            flat = back[part].reshape(-1, back[part].shape[-1] if back[part].ndim > 1 else 1)
            assert torch.equal(rows[row : row + len(flat)], flat)


def test_an_operation_that_computes_is_not_put_back(tmp_path: Path) -> None:
    doubled = Recipe(("a",), ("b",), None, lambda values: {"b": values["a"] * 2.5})
    with pytest.raises(CheckpointError, match="computes b"):
        doubled.put_back({"b": torch.ones(2, 2)}, {"a": torch.ones(2, 2)})


def test_the_names_that_most_decoders_share_are_nobody_asked_about(tmp_path: Path) -> None:
    """Without asking, the answer is the one that asking gives."""
    for kind, config in (
        (transformers.LlamaForCausalLM, transformers.LlamaConfig),
        (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
        (transformers.Gemma2ForCausalLM, transformers.Gemma2Config),
    ):
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        model = kind(config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
        folder = tmp_path / kind.__name__
        model.save_pretrained(folder)
        files = opened(folder)
        assert files.layout is None
        asked = files.seen_by(skeleton_of(kind, model.config))
        assert asked.layout is not None
        assert asked.tensors() == files.tensors()
        assert asked.tied == files.tied
        assert asked.fingerprint() == files.fingerprint()


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "mtp.norm.weight", "model.layers.0.mlp.gate.weight"]
)
def test_any_other_name_is_asked_about(name: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    shared = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]
    assert not must_ask(config, shared)
    assert must_ask(config, [*shared, name])
    assert must_ask({**config, "architectures": ["LlamaForSequenceClassification"]}, shared)


def test_a_tie_between_stored_tensors_that_differ_is_none(tmp_path: Path) -> None:
    """transformers ties two stored tensors only where they are equal."""
    kind = saved("roberta_mlm", tmp_path)
    name, twin = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    for value, tied in ((0.0, True), (1.0, False)):
        stored = stored_in(tmp_path)
        stored[twin] = stored[name] + value
        safetensors.torch.save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        model = kind.from_pretrained(tmp_path)
        assert (model.get_parameter(name) is model.get_parameter(twin)) is tied
        assert any(set(group) == {name, twin} for group in opened(tmp_path).tied) is tied


def test_a_text_class_leaves_the_towers_alone(tmp_path: Path) -> None:
    saved("qwen3_5", tmp_path)
    model = transformers.Qwen3_5ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    files = opened(tmp_path).seen_by(skeleton_of(type(model), model.config))
    assert files.layout is not None
    assert files.layout.ignored and all(".visual." in n for n in files.layout.ignored)
    assert not files.layout.new
    for info in files.tensors():
        assert torch.equal(files.read(info.name), model.get_parameter(info.name))


def test_float8_is_read_as_it_stands_or_with_its_scale(tmp_path: Path) -> None:
    values = torch.randn(32, 32).to(torch.float8_e4m3fn)
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors.torch.save_file({name: values}, tmp_path / "plain.safetensors")
    assert torch.equal(open_weights(tmp_path / "plain.safetensors").read(name), values.float())
    for scale in ("_scale", "_scale_inv"):
        tensors = {name: values, f"{name}{scale}": torch.full((1,), 3.0)}
        safetensors.torch.save_file(tensors, tmp_path / "scaled.safetensors")
        assert torch.equal(open_weights(tmp_path / "scaled.safetensors").read(name), 3 * values.float())
