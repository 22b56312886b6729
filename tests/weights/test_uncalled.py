"""Linear layers that an adapter cannot stand beside, held against what hooks see in a forward."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers
from odd_architectures import ODD_ARCHITECTURES
from torch import nn

from spectrum_peft.weights import computes_gradients_itself, skeleton_of, unquantized_modules, without_adapters
from spectrum_peft.weights.uncalled import changed_in_place


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.looked, self.tied, self.sliced = (nn.Linear(4, 4) for _ in range(5))
        self.tied.weight = self.called.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x) @ self.read.weight.mT
        if isinstance(self.looked.weight, torch.Tensor):
            x = x.to(self.looked.weight.dtype)
        return self.looked(x) + nn.functional.linear(x, self.sliced.weight[:, :4])


class Inherits(Reads):
    pass


class Grouped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...gi,goi->...go", x, self.weight.view(2, 3, 4))


def test_a_weight_that_is_multiplied_without_a_call_is_named() -> None:
    for kind in (Reads, Inherits):
        found = without_adapters(nn.ModuleDict({"a": kind()}))
        assert list(found) == ["a.read.weight"]
        assert kind.__name__ in found["a.read.weight"]


class Scores(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores.sigmoid(), scores


def test_a_linear_that_returns_more_than_a_product_is_none() -> None:
    Scores.__module__ = "transformers_modules.scores"
    assert "something else" in without_adapters(nn.ModuleDict({"a": Scores(4, 6)}))["a.weight"]


def test_a_linear_with_a_forward_of_its_own_is_asked_what_it_takes() -> None:
    """Groups are no rows; FalconLinear writes the same product in other words."""
    Grouped.__module__ = "transformers_modules.grouped"
    assert "something else" in without_adapters(nn.ModuleDict({"a": Grouped(4, 6)}))["a.weight"]
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    assert without_adapters(falcon) == {}


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "granite_moe", "bart", "nomic_bert", "roberta_mlm"])
def test_no_layer_that_a_forward_leaves_uncalled_is_missed(name: str) -> None:
    """Hooks see this machine's path only, so what they miss must be named, and more may be."""
    kind, config, inputs = ODD_ARCHITECTURES[name]()
    model = kind(config).eval()
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    called: set[str] = set()
    for path, module in linears.items():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    model(**inputs)
    assert {f"{path}.weight" for path in linears if path not in called} <= set(without_adapters(model))


class Changes(nn.Module):
    """In place: a weight, the weight of a child's child, an output; and what only looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.clamped, self.output, self.begins, self.summed, self.turned = (nn.Linear(4, 4) for _ in range(5))
        self.block = nn.ModuleDict({"value": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
        self.begins.weight.data.zero_()

    def reset_parameters(self) -> None:
        self.begins.weight.data.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clamped.weight.data.clamp_(-1, 1)
        for block in (self.block,):
            block.value.weight.mul_(2)
        y = self.output(x)
        if self.training:
            y /= 2
        z = self.summed(y)
        z = z + y
        z += y
        return z + self.turned(z).requires_grad_()


class HandsOut(nn.Module):
    """The output of `last` among others; that of `inside` is computed with."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.inside, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = self.inside(x)
        out = self.last(inner)
        return out, inner + 1


class ChangesWhatIsHandedOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.assign, self.mlp = HandsOut(bias=True), HandsOut(bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, rest = self.assign(x)
        y += rest
        z, rest = self.mlp(y)
        z += rest
        return z


def test_what_a_model_changes_in_place_is_named() -> None:
    model = nn.ModuleDict({"a": Changes(), "b": ChangesWhatIsHandedOut()})
    assert set(changed_in_place(model)) == {"a.clamped", "a.block.value", "a.output", "b.assign.last"}


def test_bitsandbytes_lets_the_output_be_changed_where_there_is_no_bias() -> None:
    """The reason for the bias in `changed_in_place`; where this fails, more may be quantized."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for bias in (True, False):
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
        out = layer(torch.randn(2, 3, 64, requires_grad=True))
        with pytest.raises(RuntimeError, match="is a view") if bias else nullcontext():
            out += 1


def test_the_same_in_models_of_transformers() -> None:
    """A 4-bit weight is no number to clamp, and the output of its product no tensor that may change in place."""
    longformer = transformers.LongformerConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_window=[4],
    )
    skipped = unquantized_modules(skeleton_of(transformers.LongformerForSequenceClassification, longformer))
    attention = "longformer.encoder.layer.0.attention.self"
    assert {m for m in skipped if m.startswith(attention)} == {f"{attention}.query", f"{attention}.query_global"}
    rwkv = transformers.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)
    skipped = unquantized_modules(skeleton_of(transformers.RwkvForCausalLM, rwkv))
    assert {"rwkv.blocks.0.attention.output", "rwkv.blocks.0.feed_forward.value"} <= set(skipped)
    assert "rwkv.blocks.0.attention.key" not in skipped


def test_a_model_that_computes_its_gradients_itself_is_known() -> None:
    reformer = transformers.ReformerConfig(
        vocab_size=96, hidden_size=32, feed_forward_size=48, attn_layers=["local"], num_attention_heads=2, is_decoder=True,
        attention_head_size=16, axial_pos_embds=False, max_position_embeddings=64,
    )  # fmt: skip
    assert computes_gradients_itself(transformers.ReformerModelWithLMHead(reformer))
    kind, config, _ = ODD_ARCHITECTURES["bart"]()
    assert not computes_gradients_itself(kind(config))
