"""What each method of PEFT does in each mode: the table of docs/peft_methods.md, measured.

Every row is a method and a law that holds where it works. A refusal is one line, a `SpectrumError` or PEFT's own `ValueError`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    PeftModel,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
)
from peft.helpers import rescale_adapter_scale
from running import IDS, LIBRARIES, logits
from test_peft_situations import ROUNDINGS, config_of, llama, mixtral, trained

from spectrum_peft.errors import SpectrumError
from spectrum_peft.plan import MODES

pytestmark = LIBRARIES

DOCS = Path(__file__).resolve().parents[2] / "docs"
Row = Callable[[str, Path], None]
ROWS: dict[str, Row] = {}


def row(title: str) -> Callable[[Row], Row]:
    def register(function: Row) -> Row:
        ROWS[title] = function
        return function

    return register


def one(mode: str, **changes: Any) -> Any:
    return trained(get_peft_model(llama(), config_of(mode, **changes), "one"), "one", 1)


def two(mode: str, **changes: Any) -> Any:
    model = one(mode, **changes)
    model.add_adapter("two", config_of(mode, **changes))
    return trained(model, "two", 2)


def alone(model: Any) -> Iterator[torch.Tensor]:
    for name in ("two", "one"):
        model.set_adapter(name)
        yield logits(model)


@row("`save_pretrained`, `from_pretrained`")
def _save(mode: str, folder: Path) -> None:
    model = one(mode)
    model.save_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder / "one")), logits(model))


@row("`load_adapter` of transformers")
def _load_plain(mode: str, folder: Path) -> None:
    model = one(mode)
    model.save_pretrained(folder)
    plain = llama()
    plain.load_adapter(folder / "one")
    assert torch.equal(logits(plain), logits(model))


@row("`inject_adapter_in_model`")
def _inject(mode: str, folder: Path) -> None:
    plain = inject_adapter_in_model(config_of(mode), llama(), "one")
    assert torch.equal(logits(plain), logits(llama()))
    assert any("lora_" in name and p.requires_grad for name, p in plain.named_parameters())


@row("`add_adapter`, `set_adapter`, `delete_adapter`")
def _several(mode: str, folder: Path) -> None:
    model = two(mode)
    second, first = alone(model)
    assert not torch.equal(first, second) and torch.equal(first, logits(one(mode)))
    model.delete_adapter("two")
    assert torch.equal(logits(model), first)


@row("`disable_adapter`, `unload`")
def _off(mode: str, folder: Path) -> None:
    model, base = one(mode), logits(llama())
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model.unload()), base)


@row("`merge_adapter`, `unmerge_adapter`, `merge_and_unload`")
def _merge(mode: str, folder: Path) -> None:
    model = one(mode)
    wanted = logits(model)
    model.merge_adapter(safe_merge=True)
    assert (logits(model) - wanted).abs().max() < ROUNDINGS
    model.unmerge_adapter()
    assert (logits(model) - wanted).abs().max() < ROUNDINGS
    assert (logits(model.merge_and_unload()) - wanted).abs().max() < ROUNDINGS


@row("two adapters active at once")
def _at_once(mode: str, folder: Path) -> None:
    model = two(mode)
    second, first = alone(model)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert (both - first).abs().max() > 0.01 and (both - second).abs().max() > 0.01


@row("merging two adapters at once")
def _merge_two(mode: str, folder: Path) -> None:
    model = two(mode)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["one", "two"])
    model.base_model.set_adapter(["one", "two"])
    assert (logits(merged) - logits(model)).abs().max() < ROUNDINGS


@row("`adapter_names`: an adapter for each row of a batch")
def _rows(mode: str, folder: Path) -> None:
    model = two(mode)
    second, _ = alone(model)
    with torch.no_grad():
        mixed = model.eval()(input_ids=IDS, adapter_names=["__base__", "two"]).logits
    assert (mixed[0] - logits(llama())[0]).abs().max() < ROUNDINGS
    assert (mixed[1] - second[1]).abs().max() < ROUNDINGS


def _sum(mode: str, combination: str) -> None:
    model = two(mode)
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", combination_type=combination, svd_rank=64)
    for layer in model.modules():
        if "sum" in getattr(layer, "lora_A", ()):
            parts = [(n, w) for n, w in (("one", 0.5), ("two", -2.0)) if n in layer.lora_A]
            wanted = sum(w * layer.get_delta_weight(n) for n, w in parts)
            if combination != "linear":  # which mixes the factors, and is the sum only by chance
                assert (layer.get_delta_weight("sum") - wanted).abs().max() < 1e-5 * wanted.abs().max()


@row("`add_weighted_adapter`: `svd`, `cat`")
def _sum_of_products(mode: str, folder: Path) -> None:
    _sum(mode, "svd")
    _sum(mode, "cat")


@row("`add_weighted_adapter`: `linear`, `ties`, `dare_*`, `magnitude_prune`")
def _sum_of_factors(mode: str, folder: Path) -> None:
    _sum(mode, "linear")


@row("`get_base_model_state_dict`")
def _base_state(mode: str, folder: Path) -> None:
    found, stored = get_base_model_state_dict(one(mode)), llama().state_dict()
    assert set(found) == set(stored) and all(torch.equal(found[n], value) for n, value in stored.items())


@row("`get_model_status`, `get_layer_status`")
def _status(mode: str, folder: Path) -> None:
    status = get_model_status(two(mode))
    assert status.available_adapters == ["one", "two"] and status.active_adapters == ["one"]
    assert status.trainable_params > 0 and get_layer_status(one(mode))


@row("`modules_to_save`")
def _whole(mode: str, folder: Path) -> None:
    model = one(mode, modules_to_save=["lm_head"])
    assert model.get_output_embeddings().modules_to_save["one"].weight.requires_grad
    model.save_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder / "one")), logits(model))


@row("`trainable_token_indices`")
def _tokens(mode: str, folder: Path) -> None:
    model = one(mode, trainable_token_indices=[3, 4])
    model(input_ids=IDS, labels=IDS).loss.backward()
    embedding = model.get_input_embeddings()
    if MODES[mode].whole_model:  # the whole embedding trains, its rows with it
        assert embedding.modules_to_save["one"].weight.requires_grad
    else:
        assert embedding.token_adapter.trainable_tokens_delta["one"].shape[0] == 2
    model.save_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder / "one")), logits(model))


@row("`target_modules`, `exclude_modules`, `layers_to_transform`")
def _narrowed(mode: str, folder: Path) -> None:
    model = one(mode, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], layers_to_transform=[0])
    names = model.peft_config["one"].plan.trainable_names
    assert names == ["model.layers.0.self_attn.q_proj.weight"]


@row("`target_parameters` (fused experts)")
def _experts(mode: str, folder: Path) -> None:
    config = config_of(
        mode, **({"exclude_modules": None} if mode == "lorsa" else {}), target_parameters=["experts.down_proj"]
    )
    model = get_peft_model(mixtral(), config)
    assert {e.kind for e in model.peft_config["default"].plan.entries if e.trains} == {"mlp.experts.down_proj"}


@row("gradient checkpointing")
def _checkpointing(mode: str, folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = one(mode)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@row("`initialize_lora_eva_weights`")
def _eva(mode: str, folder: Path) -> None:
    config = config_of(mode, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True)
    ids = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    initialize_lora_eva_weights(model, dataloader=[batch] * 3, show_progress_bar=False)
    assert torch.equal(logits(model), logits(llama()))


@row("`rescale_adapter_scale`")
def _scaled(mode: str, folder: Path) -> None:
    model = one(mode)
    before = logits(model)
    with rescale_adapter_scale(model, 0.0):
        assert (logits(model) - logits(llama())).abs().max() < ROUNDINGS
    assert torch.equal(logits(model), before)


@row("`copy.deepcopy`, `pickle`")
def _copied(mode: str, folder: Path) -> None:
    model = one(mode)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))


@row("`torch.compile` without graph breaks")
def _compiled(mode: str, folder: Path) -> None:
    torch._dynamo.reset()
    found = torch._dynamo.explain(one(mode).get_base_model())(input_ids=IDS)
    assert found.graph_break_count == 0, found.break_reasons


@row("`safe_merge=True` refuses NaN")
def _not_merged(mode: str, folder: Path) -> None:
    model = one(mode)
    next(p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter one seems to be broken"):
        model.merge_and_unload(safe_merge=True)


@row("`.to(torch.bfloat16)`, before or after wrapping")
def _cast(mode: str, folder: Path) -> None:
    wanted = logits(llama().to(torch.bfloat16))
    after = one(mode).to(torch.bfloat16)
    before = trained(get_peft_model(llama().to(torch.bfloat16), config_of(mode), "one"), "one", 1)
    for model in (before, after):
        moved = logits(model)
        assert moved.dtype == torch.bfloat16 and (moved - wanted).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(logits(model), wanted)


def cells() -> dict[tuple[str, str], str]:
    """{(row, mode): what the page says}."""
    lines = (DOCS / "peft_methods.md").read_text(encoding="utf-8").splitlines()
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head = next(i for i, line in enumerate(table) if line[0] == "method")
    modes = [c.strip("`") for c in table[head][1:]]
    found = {}
    for line in table[head + 2 :]:
        if len(line) != len(modes) + 1:
            break
        found |= {(line[0], mode): cell for mode, cell in zip(modes, line[1:], strict=True)}
    return found


# Said by torch's own tracer of any autograd function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("title", ROWS)
def test_a_method_does_what_the_page_says(title: str, mode: str, tmp_path: Path) -> None:
    try:
        ROWS[title](mode, tmp_path)
        measured = "works"
    except (SpectrumError, ValueError) as error:
        measured = "refused" if "\n" not in str(error) else f"{error}"
    assert cells().get((title, mode), "").partition(" ")[0] == measured, f"docs/peft_methods.md: {title}, {mode}"


def test_the_page_has_no_other_rows() -> None:
    assert {title for title, _ in cells()} == set(ROWS) and {mode for _, mode in cells()} == set(MODES)
