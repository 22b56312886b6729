"""Linear layers that an adapter cannot stand beside, held against what hooks see in a forward."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import FAMILIES
from torch import nn

from spectrum_peft.weights import without_adapters


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
    kind, config, inputs = FAMILIES[name]()
    model = kind(config).eval()
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    called: set[str] = set()
    for path, module in linears.items():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    model(**inputs)
    assert {f"{path}.weight" for path in linears if path not in called} <= set(without_adapters(model))
