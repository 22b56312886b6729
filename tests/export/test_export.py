"""Merging and exporting: what comes out computes what the adapter computed, and is the base's bytes everywhere else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from architectures import ARCHITECTURES, Architecture, batch_for
from peft import LoraConfig, PeftModel, get_peft_model
from running import options_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from spectrum_peft import SpectrumConfig, load_model_with_spectrum
from spectrum_peft.cli.main import main
from spectrum_peft.errors import CheckpointError, MismatchError, OptionError
from spectrum_peft.export import export_axolotl, export_lora, merge_into_base
from spectrum_peft.export.quantized import quantization_settings, quantized_names
from spectrum_peft.records import Plan
from spectrum_peft.tuner.factors import factors
from spectrum_peft.tuner.ranks import live_rank
from spectrum_peft.weights import open_weights, settle_quantized
from spectrum_peft.weights.adapters import AdapterState

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# Two roads to one sum in float32, over two blocks, logits of order 1.
ROUNDING = 5e-6
ROOT = Path(__file__).resolve().parents[2]


def beside_the_card(folder: Path) -> list[Path]:
    """The files of a folder but its README.md, which names the folder."""
    return [path for path in folder.iterdir() if path.name != "README.md"]


# --- bases and adapters ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a tiny model of a family: `base_of("llama", torch.bfloat16, shard="40KB", headless=False)`."""
    made: dict[Any, Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32, shard: str | None = None, headless: bool = False) -> Path:
        key = (name, dtype, shard, headless)
        if key not in made:
            model = ARCHITECTURES[name].build().to(dtype)
            model = model.base_model if headless else model
            made[key] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[key], **({} if shard is None else {"max_shard_size": shard}))
        return made[key]

    return make


def loaded(name: str, folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return getattr(transformers, ARCHITECTURES[name].auto_class).from_pretrained(folder, dtype=dtype, **kwargs)


def moved(model: Any, config: Any, size: float = 0.02) -> Any:
    """A PeftModel whose trainable tensors are off their start: both factors, magnitudes and weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", module=r"peft\."
        )  # advice about ties, patterns, missing save_embedding_layers
        model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        model.save_pretrained(folder)
    return folder


def logits(model: Any, architecture: Architecture) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch_for(architecture, model)).logits.float()


def config_for(kind: str, architecture: Architecture, **changes: Any) -> Any:
    """`peft`: plain LoRA on every linear; else a mode of ours on half of the matrices."""
    if kind == "peft":
        return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": architecture.task_type, **changes})
    ratio = {} if kind in ("full", "lora") else {"spectrum_ratio": 0.5}
    return SpectrumConfig(**{"mode": kind, "r": 4, "task_type": architecture.task_type, **ratio, **changes})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        result |= load_file(path)
    return result


def raw_header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
    )


@pytest.fixture(scope="module")
def adapter_of(base_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(folder of a saved adapter, logits of the model with it, the model), made once for each set of arguments."""
    made: dict[Any, Any] = {}

    def make(name: str, kind: str, dtype: torch.dtype = torch.float32, shard: str | None = None) -> Any:
        key = (name, kind, dtype, shard)
        if key not in made:
            architecture = ARCHITECTURES[name]
            model = moved(loaded(name, base_of(name, dtype, shard), dtype), config_for(kind, architecture))
            folder = saved(model, tmp_path_factory.mktemp(f"{name}_{kind}") / "adapter")
            made[key] = folder, logits(model, architecture), model
        return made[key]

    return make


# --- merging: the function ------------------------------------------------------------------------------------------

CASES = [
    ("llama", "peft"), ("llama", "spectrum"), ("llama", "full"), ("llama_tied", "alors"), ("llama_tied", "full"),
    ("gpt2", "lora"), ("gpt2", "spectrum"), ("gpt_neox", "alors"), ("phi3", "peft"), ("bert", "spectrum"),
    ("bert", "peft"),
    ("t5", "alors"), ("mixtral", "lora"), ("mixtral", "peft"), ("mixtral", "spectrum"), ("qwen3_moe", "alors"),
    ("qwen3_moe", "spectrum"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_merged_folder_computes_what_the_adapter_computed(
    name: str, kind: str, base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder, wanted, model = adapter_of(name, kind)
    base = base_of(name)
    report = merge_into_base(folder, out=tmp_path / "merged")
    found = logits(loaded(name, tmp_path / "merged"), ARCHITECTURES[name])
    assert (found - wanted).abs().max() < (1e-12 if kind in ("spectrum", "full") else ROUNDING)
    assert (logits(loaded(name, base), ARCHITECTURES[name]) - wanted).abs().max() > 1e-3
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert list(before) == list(after)
    different = {n for n in before if not same(before[n], after[n])}
    assert different == set(report.changed)
    assert report.copied == len(before) - len(different)
    assert report.added == ()
    assert raw_header(base / "model.safetensors") == raw_header(tmp_path / "merged" / "model.safetensors")
    assert (base / "config.json").read_bytes() == (tmp_path / "merged" / "config.json").read_bytes()
    live = merge_into_base(model, out=tmp_path / "live")
    assert live.changed == report.changed
    for path in beside_the_card(tmp_path / "merged"):
        assert path.read_bytes() == (tmp_path / "live" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("kind", ["peft", "spectrum"])
def test_shards_keep_their_layout_and_untouched_ones_their_bytes(
    kind: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_of("llama", shard="100KB")
    model = loaded("llama", base)
    only = {"layers_to_transform": [1]}
    changes = {"target_modules": ["q_proj", "down_proj"], **only}
    model = moved(model, config_for(kind, ARCHITECTURES["llama"], **changes))
    report = merge_into_base(saved(model, tmp_path / "adapter"), base, tmp_path / "merged")
    files = sorted(p.name for p in base.glob("model*"))
    assert len(files) > 3
    assert sorted(p.name for p in (tmp_path / "merged").glob("model*")) == files
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    touched = {index[name] for name in report.changed}
    assert 0 < len(touched) < len(files) - 1
    for file in files:
        equal = (base / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()
        assert equal == (file not in touched), file
    assert (
        logits(loaded("llama", tmp_path / "merged"), ARCHITECTURES["llama"]) - logits(model, ARCHITECTURES["llama"])
    ).abs().max() < ROUNDING


def test_a_bfloat16_base_is_rounded_once(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    base = base_of("llama", torch.bfloat16)
    folder, _, _ = adapter_of("llama", "alors", torch.bfloat16)
    report = merge_into_base(folder, out=tmp_path / "merged")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    worst, where = 0.0, None
    for name, b, a, scale in AdapterState.from_folder(folder).factors():
        exact = before[name].double() + scale * (b.double() @ a.double())
        assert after[name].dtype == torch.bfloat16
        # The nearest bfloat16, or (within float32's own error) the other neighbour of a tie.
        off = (after[name].double() - exact).abs()
        best = (exact.to(torch.bfloat16).double() - exact).abs()
        assert (off <= best + 1e-7).all()
        assert off.max() > 1e-4
        if float(off.max()) > worst:
            worst, where = float(off.max()), name
    # A rounding of 1e-4 or more, measured in float32 from values below 1: off by 1e-7, a thousandth.
    assert report.rounding == pytest.approx(worst, rel=1e-3)
    assert report.rounding_at == where
    assert {n for n in before if not same(before[n], after[n])} <= set(report.changed)


def test_dtype_casts_every_floating_tensor_and_the_config(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _, _ = adapter_of("llama", "spectrum")
    report = merge_into_base(folder, out=tmp_path / "merged", dtype="bfloat16")
    before, after = tensors_of(base_of("llama")), tensors_of(tmp_path / "merged")
    assert report.copied == 0
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    frozen = next(n for n in before if n.endswith("input_layernorm.weight"))
    assert same(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].bfloat16())
    assert same(after[frozen], before[frozen].bfloat16())
    assert report.rounding > 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_real_weights_keep_their_bits(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _, model = adapter_of("llama", "spectrum")
    report = merge_into_base(folder, out=tmp_path / "merged")
    held = {
        n.replace(".lora_spectrum.default", "").removeprefix("base_model.model."): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    after = tensors_of(tmp_path / "merged")
    assert set(held) == set(report.changed)
    for name, parameter in held.items():
        assert same(after[name], parameter.detach()), name
    assert report.rounding == 0.0
    assert report.rounding_at is None


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\..*_proj": 6},
        "alpha_pattern": {r".*\.down_proj": 5},
    },
    "bias_all": {"bias": "all"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 263]},
    "tokens_of_head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [5, 2], "embed_tokens": [9]},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_everything_that_a_lora_config_can_say(
    name: str, variant: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    model = moved(loaded(name, base_of(name)), config_for("peft", architecture, **VARIANTS[variant]))
    wanted = logits(model, architecture)
    merge_into_base(saved(model, tmp_path / "adapter"), out=tmp_path / "merged")
    assert (logits(loaded(name, tmp_path / "merged"), architecture) - wanted).abs().max() < ROUNDING
    merge_into_base(model, out=tmp_path / "live")
    assert tensors_of(tmp_path / "live").keys() == tensors_of(tmp_path / "merged").keys()
    assert all(same(t, tensors_of(tmp_path / "live")[n]) for n, t in tensors_of(tmp_path / "merged").items())


@pytest.mark.parametrize(
    "variant",
    [{"use_dora": True}, {"use_dora": True, "target_modules": ["wte", "c_attn"]}, {"bias": "all"}, {"lora_bias": True}],
)
def test_turned_matrices_and_biases(variant: dict[str, Any], base_of: Callable[..., Path], tmp_path: Path) -> None:
    architecture = ARCHITECTURES["gpt2"]
    changes = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, **variant}
    model = moved(loaded("gpt2", base_of("gpt2")), config_for("peft", architecture, **changes))
    wanted = logits(model, architecture)
    merge_into_base(saved(model, tmp_path / "adapter"), out=tmp_path / "merged")
    assert (logits(loaded("gpt2", tmp_path / "merged"), architecture) - wanted).abs().max() < ROUNDING


# --- ties, vocabularies, heads ---------------------------------------------------------------------------------------

TIES = [
    ({"target_modules": ["q_proj"]}, True),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}, True),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [4, 1]}}, False),
]


@pytest.mark.parametrize(("changes", "tied"), TIES)
def test_a_tied_head_stays_tied_unless_it_became_another(
    changes: dict[str, Any], tied: bool, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    architecture = ARCHITECTURES["llama_tied"]
    model = moved(loaded("llama_tied", base_of("llama_tied")), config_for("peft", architecture, **changes))
    wanted = logits(model, architecture)
    for source, name in ((saved(model, tmp_path / "adapter"), "merged"), (model, "live")):
        report = merge_into_base(source, out=tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied
        assert report.added == (() if tied else ("lm_head.weight",))
        assert ("lm_head.weight" in tensors_of(tmp_path / name)) is not tied
        plain = loaded("llama_tied", tmp_path / name)
        assert (plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()) is tied
        assert (logits(plain, architecture) - wanted).abs().max() < ROUNDING


def test_training_tied_embeddings_whole_keeps_the_tie(base_of: Callable[..., Path], tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama_tied"]
    config = SpectrumConfig(mode="spectrum", spectrum_ratio=0.5, train_embeddings=True, task_type="CAUSAL_LM")
    model = moved(loaded("llama_tied", base_of("llama_tied")), config)
    wanted = logits(model, architecture)
    report = merge_into_base(saved(model, tmp_path / "adapter"), out=tmp_path / "merged")
    assert "model.embed_tokens.weight" in report.changed
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert torch.equal(logits(loaded("llama_tied", tmp_path / "merged"), architecture), wanted)


VOCABULARIES = [
    {},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": [264, 265, 3]},
]


@pytest.mark.parametrize("changes", VOCABULARIES, ids=["frozen", "saved", "tokens"])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("kind", ["peft", "spectrum"])
def test_new_tokens_grow_the_vocabulary(
    kind: str, name: str, changes: dict[str, Any], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    model = loaded(name, base_of(name))
    torch.manual_seed(1)
    model.resize_token_embeddings(270, mean_resizing=False)
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = moved(model, config_for(kind, architecture, **targets, **changes))
    ids = torch.tensor([[1, 264, 269, 3, 265]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    assert wanted.shape[-1] == 270
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = name == "llama_tied" and torch.equal(*tables)
    assert (
        tied or name == "llama" or (kind == "peft" and "modules_to_save" in changes)
    )  # two tables then, trained apart
    for source, folder in ((saved(model, tmp_path / "adapter"), "merged"), (model, "live")):
        merge_into_base(source, out=tmp_path / folder)
        plain = loaded(name, tmp_path / folder)
        assert plain.config.vocab_size == 270
        assert (plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()) is tied
        with torch.no_grad():
            assert (plain(input_ids=ids).logits - wanted).abs().max() < ROUNDING


@pytest.mark.parametrize("kind", ["peft", "spectrum"])
def test_a_head_that_the_base_lacks_is_added_and_named(kind: str, base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("bert", headless=True)
    assert not any(n.startswith("bert.") for n in tensors_of(base))  # the encoder's own names, without the prefix
    architecture = ARCHITECTURES["bert"]
    labels = {0: "no", 1: "maybe", 2: "yes", 3: "never"}
    torch.manual_seed(2)
    model = loaded("bert", base, num_labels=4, id2label=labels, label2id={v: k for k, v in labels.items()})
    model = moved(model, config_for(kind, architecture, target_modules=["query", "output.dense"]))
    wanted = logits(model, architecture)
    adapter = saved(model, tmp_path / "adapter")
    merge_into_base(adapter, base, tmp_path / "bare")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare", dtype=torch.float32)
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert plain.config.architectures == ["BertForSequenceClassification"]
    assert plain.config.num_labels == 4
    assert (logits(plain, architecture) - wanted).abs().max() < ROUNDING
    report = merge_into_base(model, base, tmp_path / "live")  # the model in memory knows what the classes are called
    assert set(report.added) == {"classifier.weight", "classifier.bias"}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "live").id2label == labels
    model.config.save_pretrained(adapter)  # as the verb `train` does
    merge_into_base(adapter, base, tmp_path / "named")
    named = transformers.AutoConfig.from_pretrained(tmp_path / "named")
    assert named.id2label == labels
    assert named.architectures == ["BertForSequenceClassification"]
    before, after = tensors_of(base), tensors_of(tmp_path / "named")
    frozen = [n for n in before if n not in report.changed]
    assert len(frozen) > 20
    assert all(same(before[n], after[n]) for n in frozen)


def test_a_language_model_becomes_a_classifier(base_of: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base_of("llama"), num_labels=5, dtype=torch.float32
    )
    model = moved(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    report = merge_into_base(saved(model, tmp_path / "adapter"), out=tmp_path / "merged")
    assert report.added == ("score.weight",)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(plain).__name__ == "LlamaForSequenceClassification"
    with torch.no_grad():
        assert (plain(input_ids=ids).logits - wanted).abs().max() < ROUNDING


# --- several adapters, ranks that move -------------------------------------------------------------------------------


def test_one_of_several_adapters(base_of: Callable[..., Path], tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    model = moved(loaded("llama", base_of("llama")), config_for("peft", architecture))
    model.add_adapter("second", config_for("peft", architecture, target_modules=["up_proj"]))
    model.set_adapter("second")
    model.base_model.model.model.layers[0].mlp.up_proj.lora_B["second"].weight.data.normal_(std=0.1)
    wanted = logits(model, architecture)
    merge_into_base(model, out=tmp_path / "active")
    assert (logits(loaded("llama", tmp_path / "active"), architecture) - wanted).abs().max() < ROUNDING
    model.set_adapter("default")
    wanted = logits(model, architecture)
    model.set_adapter("second")
    merge_into_base(model, out=tmp_path / "named", adapter_name="default")
    assert (logits(loaded("llama", tmp_path / "named"), architecture) - wanted).abs().max() < ROUNDING
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(OptionError, match=r"adapters \['default', 'second'\] are active, wanted one"):
        merge_into_base(model, out=tmp_path / "both")


def test_live_rows_only_where_ranks_move(base_of: Callable[..., Path], tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    config = config_for("alors", architecture, rescore_every=5, r_high=8, r_medium=2, spectrum_ratio=1.0)
    model = loaded("llama", base_of("llama"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        model = get_peft_model(model, config)
    for module in model.modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            rank = live_rank(module, "default")
            module.lora_B["default"].weight.data[:, :rank].normal_(std=0.05)
    wanted = logits(model, architecture)
    assert {u[2].shape[0] for u in factors(model)} == {2, 8}
    merge_into_base(model, out=tmp_path / "merged")
    assert (logits(loaded("llama", tmp_path / "merged"), architecture) - wanted).abs().max() < ROUNDING
    out = export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(loaded("llama", base_of("llama")), out)
    assert (logits(plain, architecture) - wanted).abs().max() < ROUNDING


def test_a_merge_leaves_the_model_in_memory_as_it_was(base_of: Callable[..., Path], tmp_path: Path) -> None:
    model = loaded("llama", base_of("llama"))
    model.resize_token_embeddings(270, mean_resizing=False)
    changes = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    model = moved(model, config_for("peft", ARCHITECTURES["llama"], **changes))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    merge_into_base(model, out=tmp_path / "merged", dtype="bfloat16")
    export_lora(model, tmp_path / "lora")
    assert all(same(before[n], p.detach()) for n, p in model.named_parameters())


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_go_back_to_one_tensor_each(
    name: str, base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _, model = adapter_of(name, "lora")
    before = tensors_of(base_of(name))
    assert any(".experts.3." in n for n in before)
    assert not any("gate_up_proj" in n for n in before)
    merge_into_base(folder, out=tmp_path / "merged")
    after = tensors_of(tmp_path / "merged")
    gate, up, down = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    fused = {n: (b, a, scale) for n, b, a, scale in factors(model) if "experts" in n}
    assert len(fused) == 4
    for parameter, (b, a, scale) in fused.items():
        for e in range(4):
            delta = scale * (b[e].double() @ a[e].double())
            owner = parameter.rpartition(".")[0]
            if name == "mixtral":
                owner = owner.replace(".mlp.", ".block_sparse_moe.")
            parts = (gate, up) if parameter.endswith("gate_up_proj") else (down,)
            stored = torch.cat(
                [
                    (after[f"{owner}.{e}.{p}.weight"].double() - before[f"{owner}.{e}.{p}.weight"].double())
                    for p in parts
                ]
            )
            assert delta.abs().max() > 1e-3
            # Weights below 0.2 in float32: W + dW is rounded once, to 2**-24 of it, and dW is a float32 product of
            # rank 4.
            assert (stored - delta).abs().max() < 1e-6, (parameter, e)


# --- the files beside ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_merged_folder_generates_where_we_are_not_installed(tiny_llama_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama_folder, tmp_path / "base")
    (base / "LICENSE").write_text("as you like")
    (base / "optimizer.pt").write_bytes(b"not ours")
    model = moved(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        config_for("alors", ARCHITECTURES["llama"]),
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    merge_into_base(saved(model, tmp_path / "adapter"), out=tmp_path / "merged")
    present = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
    } <= present
    assert "optimizer.pt" not in present
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "merged")!r})
text = tokenizer.apply_chat_template([{{"role": "user", "content": "Hi"}}], add_generation_prompt=True, tokenize=False)
made = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
assert made.shape[1] > 5
assert "peft" not in sys.modules and "spectrum_peft" not in sys.modules
torch.save(model(input_ids=torch.tensor([[5, 6, 7]])).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    run_python(code, tmp_path)
    assert (torch.load(tmp_path / "logits.pt") - wanted).abs().max() < ROUNDING


def run_python(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter outside the checkout, so that this package is not importable there."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_adapters_tokenizer_wins(
    tiny_llama_folder: Path, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = saved(moved(tiny_llama, config_for("peft", ARCHITECTURES["llama"])), tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    merge_into_base(folder, out=tmp_path / "template")
    assert (tmp_path / "template" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "template" / "tokenizer.json").read_bytes() == (
        tiny_llama_folder / "tokenizer.json"
    ).read_bytes()
    tiny_tokenizer.save_pretrained(folder)
    changed = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    merge_into_base(folder, out=tmp_path / "merged")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").model_max_length == 77


def test_an_exported_lora_keeps_the_labels_and_the_chat_template(tiny_llama: Any, tmp_path: Path) -> None:
    folder = saved(moved(tiny_llama, config_for("peft", ARCHITECTURES["llama"])), tmp_path / "adapter")
    kept = {"config.json": '{"label2id": {"spam": 1}}', "chat_template.jinja": "{{ messages }}"}
    for name, text in kept.items():
        (folder / name).write_text(text)
    export_lora(folder, tmp_path / "lora")
    assert {name: (tmp_path / "lora" / name).read_text() for name in kept} == kept


def test_metadata_and_header_order_stay_when_a_tensor_grows(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = shutil.copytree(base_of("llama"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    extra = {"model.counts": torch.arange(7, dtype=torch.int32), "odd.bias": torch.ones(3, dtype=torch.bfloat16)}
    save_file(weights | extra, base / "model.safetensors", metadata={"format": "pt", "made_by": "someone"})
    model = loaded("llama", base)
    model.resize_token_embeddings(266, mean_resizing=False)
    model = moved(model, config_for("peft", ARCHITECTURES["llama"], target_modules=["q_proj"]))
    merge_into_base(model, base, tmp_path / "merged")
    before, after = (json.loads(raw_header(p / "model.safetensors")[8:]) for p in (base, tmp_path / "merged"))
    assert list(before) == list(after)
    assert after["__metadata__"] == {"format": "pt", "made_by": "someone"}
    assert len(raw_header(tmp_path / "merged" / "model.safetensors")) % 8 == 0
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert same(file.get_tensor("model.counts"), extra["model.counts"])
        assert same(file.get_tensor("odd.bias"), extra["odd.bias"])
        assert file.get_tensor("model.embed_tokens.weight").shape == (266, 64)


def test_a_hub_id_is_read_from_the_cache(
    tiny_llama_folder: Path, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    cached = tmp_path / "cache" / "models--some--llama"
    shutil.copytree(tiny_llama_folder, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = saved(moved(tiny_llama, config_for("peft", ARCHITECTURES["llama"])), tmp_path / "adapter")
    merge_into_base(folder, "some/llama", tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()
    with pytest.raises(CheckpointError, match=r"'some/other'.*not in the hub's cache"):
        merge_into_base(folder, "some/other", tmp_path / "again")


def test_buffers_are_no_parameters_and_keep_their_dtype(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    base = shutil.copytree(base_of("llama"), tmp_path / "base")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(base / "model.safetensors") | {buffer: torch.ones(8)}, base / "model.safetensors")
    merge_into_base(adapter_of("llama", "peft")[0], base, tmp_path / "merged", dtype="bfloat16")
    dtypes = {n: t.dtype for n, t in tensors_of(tmp_path / "merged").items()}
    assert dtypes.pop(buffer) == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.slow
def test_a_real_model_says_the_same_after_the_merge(smollm2: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = moved(model, SpectrumConfig(mode="alors", spectrum_ratio=0.5, r=8, task_type="CAUSAL_LM"), size=0.005)
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        said = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    report = merge_into_base(saved(model, tmp_path / "adapter"), smollm2, tmp_path / "merged")
    assert len(report.changed) == 105
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        found = plain(input_ids=ids).logits
        # Thirty blocks add up roundings of 2**-24 each, of weights and of sums: some hundred of the logits' largest.
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert torch.equal(plain.generate(input_ids=ids, max_new_tokens=12, do_sample=False), said)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template is not None


# --- a merge that dies -----------------------------------------------------------------------------------------------


def test_a_merge_that_fails_leaves_nothing(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter_of("llama", "peft")[0], tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(k for k in tensors if "layers.1" in k and "lora_B" in k)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1.*not finite in float32"):
        merge_into_base(folder, out=tmp_path / "merged")
    with pytest.raises(CheckpointError, match=r"layers\.1.*lora_B.*holds NaN or Inf"):
        export_lora(folder, tmp_path / "lora")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.multiprocess
def test_a_killed_merge_leaves_no_folder_that_looks_whole(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    base, folder = base_of("llama", shard="100KB"), adapter_of("llama", "peft")[0]
    code = f"""
import os, signal
from spectrum_peft import export
from spectrum_peft.export import rewrite
class Dying(rewrite.SafetensorsWriter):
    def __init__(self, path, *rest):
        super().__init__(path, *rest)
        self.name = path.name
    def __exit__(self, *error):
        super().__exit__(*error)
        if self.name.startswith("model-00003"):
            print("dying", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
rewrite.SafetensorsWriter = Dying
export.merge_into_base({str(folder)!r}, {str(base)!r}, {str(tmp_path / "merged")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "dying" in done.stdout
    assert not (tmp_path / "merged").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".merged.")
    assert len(list(left.glob("*.safetensors"))) == 3
    assert not (left / "config.json").exists()
    assert not (left / "model.safetensors.index.json").exists()
    merge_into_base(folder, base, tmp_path / "merged")  # what is left over is in nobody's way
    assert logits(loaded("llama", tmp_path / "merged"), ARCHITECTURES["llama"]).isfinite().all()


# --- bad input -------------------------------------------------------------------------------------------------------


def edited(
    folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **config: Any
) -> Path:
    """A copy of an adapter folder with other tensors or config fields."""
    shutil.copytree(folder, target)
    if change is not None:
        tensors = load_file(target / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, target / "adapter_model.safetensors")
    fields = json.loads((target / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(fields))
    return target


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NORM = "base_model.model.model.norm."
UP7 = "base_model.model.model.layers.7.mlp.up_proj.lora_spectrum.weight"


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def add(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


def without_first(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Drop the first row of the tensors whose names contain `part`."""
    return lambda tensors: tensors.update({k: v[1:].contiguous() for k, v in tensors.items() if part in k})


WRONG_FILES = [
    ("peft", rename(Q0, Q0.replace("q_proj", "z_proj")), r"z_proj\.lora_A\.weight' fits no parameter.*Did you mean"),
    ("peft", lambda t: t.pop(Q0), "q_proj.lora_B.weight' stands without both LoRA factors"),
    ("peft", add(Q0, 4, 63), r"q_proj.*gives \(64, 63\), wanted \(64, 64\)"),
    ("peft", without_first("layers.0.self_attn.q_proj.lora_A"), r"q_proj\.lora_A\.weight' \(3, 64\)"),
    ("peft", add(NORM + "wait", 64), r"norm\.wait.*Did you mean 'model\.norm\.weight'"),
    ("peft", add(NORM + "weight", 63), r"norm\.weight' has the shape \(63,\), wanted \(64,\)"),
    ("peft", add(Q0, 0, 64), r"q_proj\.lora_A\.weight' \(0, 64\)"),
    ("spectrum", lambda t: t.pop(next(iter(t))), r"lacks 1 of 7 planned tensors, first 'model\.layers"),
    ("spectrum", without_first("down_proj"), r"down_proj.*\(63, 96\), wanted \(64, 96\)"),
    ("spectrum", add(UP7, 96, 64), r"layers\.7\.mlp\.up_proj\.lora_spectrum\.weight' fits no parameter"),
]


@pytest.mark.parametrize(("kind", "change", "match"), WRONG_FILES)
def test_a_tensor_that_does_not_fit_is_named(
    kind: str, change: Any, match: str, adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder = edited(adapter_of("llama", kind)[0], tmp_path / "adapter", change)
    with pytest.raises(MismatchError, match=match):
        merge_into_base(folder, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


WRONG_CONFIGS = [
    ({"init_lora_weights": "pissa_niter_4"}, CheckpointError, "init_lora_weights is 'pissa_niter_4'"),
    ({"use_qalora": True}, CheckpointError, "use_qalora"),
    ({"alpha_pattern": {"q_proj(": 3}}, CheckpointError, r"adapter_config\.json: 'q_proj\(' is no regex"),
    ({"lora_alpha": "much"}, CheckpointError, r"lora_alpha is 'much', wanted a number"),
    ({"peft_type": "IA3"}, CheckpointError, "peft_type is 'IA3', wanted LORA or SPECTRUM"),
    ({"base_model_name_or_path": None}, OptionError, "base_model_name_or_path is empty"),
    ({"base_model_name_or_path": "/nowhere/model"}, CheckpointError, r"/nowhere/model.*another place with base"),
]


@pytest.mark.parametrize(("config", "error", "match"), WRONG_CONFIGS)
def test_an_adapter_that_cannot_be_merged_is_refused(
    config: dict[str, Any], error: type[Exception], match: str, adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder = edited(adapter_of("llama", "peft")[0], tmp_path / "adapter", **config)
    with pytest.raises(error, match=match):
        merge_into_base(folder, out=tmp_path / "merged")


def test_another_base_than_the_plans_is_refused_unless_forced(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder = adapter_of("llama", "spectrum")[0]
    other = tmp_path / "other"
    ARCHITECTURES["llama"].build(seed=9).save_pretrained(other)
    with pytest.raises(MismatchError, match=r"fingerprint content is .*force=True"):
        merge_into_base(folder, other, tmp_path / "merged")
    report = merge_into_base(folder, other, tmp_path / "merged", force=True)
    assert any("force" in note for note in report.notes)
    (tmp_path / "smaller").mkdir()
    with pytest.raises(MismatchError, match="fingerprint"):
        merge_into_base(folder, base_of("gpt2"), tmp_path / "again")


def test_a_gguf_base_is_refused_with_the_way_to_convert_it(adapter_of: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"from_pretrained\('/models', gguf_file='m.Q4_1.gguf'\)"):
        merge_into_base(adapter_of("llama", "peft")[0], "/models/m.Q4_1.gguf", tmp_path / "merged")


def test_what_is_no_checkpoint_is_refused(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = adapter_of("llama", "peft")[0]
    with pytest.raises(CheckpointError, match="holds an adapter, wanted a model"):
        merge_into_base(adapter, adapter, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="no checkpoint to merge onto"):
        merge_into_base(adapter, base_of("llama") / "model.safetensors", tmp_path / "merged")
    bare = shutil.copytree(base_of("llama"), tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        merge_into_base(adapter, bare, tmp_path / "merged")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        merge_into_base(base_of("llama"), base_of("llama"), tmp_path / "merged")
    with pytest.raises(OptionError, match="plain LlamaForCausalLM without an adapter"):
        merge_into_base(loaded("llama", base_of("llama")), out=tmp_path / "merged")


def test_shard_names_that_leave_the_folder_are_refused(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    base = shutil.copytree(base_of("llama", shard="100KB"), tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index["weight_map"][first] = name
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="plain file name in the same folder"):
            merge_into_base(adapter_of("llama", "peft")[0], base, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_options_are_checked_before_anything_is_written(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = adapter_of("llama", "peft")[0]
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(OptionError, match="exists and is not empty"):
        merge_into_base(adapter, out=full)
    with pytest.raises(OptionError, match=r"onto is 'original_'.*Did you mean 'original'"):
        merge_into_base(adapter, out=tmp_path / "x", onto="original_")
    with pytest.raises(OptionError, match=r"dtype is 'bfloat17'.*Did you mean 'bfloat16'"):
        merge_into_base(adapter, out=tmp_path / "x", dtype="bfloat17")
    with pytest.raises(OptionError, match="out is missing"):
        merge_into_base(adapter)
    with pytest.raises(OptionError, match=r"adapter_name is 'defualt'.*Did you mean 'default'"):
        merge_into_base(adapter_of("llama", "peft")[2], out=tmp_path / "x", adapter_name="defualt")
    assert (full / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    merge_into_base(adapter, out=tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize(("row", "match"), [
    (264, r"holds row 264 of model\.embed_tokens\.weight, which has 264"),
    (-1, r"trainable_token_indices\[1\] is -1, wanted a whole number of at least 0"),
])  # fmt: skip
def test_a_row_that_the_table_lacks_is_named(
    row: int, match: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_for("peft", ARCHITECTURES["llama"], target_modules=["q_proj"], trainable_token_indices=[3, 7])
    folder = saved(moved(loaded("llama", base_of("llama")), config), tmp_path / "adapter")
    folder = edited(folder, tmp_path / "edited", trainable_token_indices=[3, row])
    with pytest.raises((MismatchError, CheckpointError), match=match):
        merge_into_base(folder, out=tmp_path / "merged")


def test_a_value_that_the_dtype_cannot_hold_is_refused(adapter_of: Callable[..., Any], tmp_path: Path) -> None:
    folder = edited(adapter_of("llama", "peft")[0], tmp_path / "adapter", lora_alpha=10**9)
    with pytest.raises(CheckpointError, match="not finite in float16"):
        merge_into_base(folder, out=tmp_path / "merged", dtype="float16")


# --- quantized bases -------------------------------------------------------------------------------------------------

FOUR_BIT = ["llama", "gpt2", "bert", "t5"]


def quantized(name: str, base: Path, config: Any, quantization: str = "nf4", **kwargs: Any) -> Any:
    """A PeftModel on a quantized base, as the short way loads it."""
    kind = getattr(transformers, ARCHITECTURES[name].auto_class)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.|bitsandbytes")
        model, _ = load_model_with_spectrum(
            str(base), config, **{"dtype": "float32", **kwargs}, quantization=quantization, model_class=kind
        )
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", FOUR_BIT)
def test_onto_dequantized_is_what_the_quantized_model_computes(
    name: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, architecture = base_of(name), ARCHITECTURES[name]
    model = quantized(name, base, config_for("spectra_qlora", architecture))
    wanted = logits(model, architecture)
    report = merge_into_base(model, out=tmp_path / "live", onto="dequantized")
    found = logits(loaded(name, tmp_path / "live"), architecture)
    assert (found - wanted).abs().max() < ROUNDING
    plain = merge_into_base(model, out=tmp_path / "original")
    assert (logits(loaded(name, tmp_path / "original"), architecture) - wanted).abs().max() > 1e-3
    assert plain.copied > report.copied
    adapter = saved(model, tmp_path / "adapter")
    again = merge_into_base(adapter, out=tmp_path / "folder", onto="dequantized", quantization="nf4")
    assert again.changed == report.changed
    for path in beside_the_card(tmp_path / "live"):  # the same codes from the file as from the model in memory
        assert path.read_bytes() == (tmp_path / "folder" / path.name).read_bytes(), path.name


def test_the_dtype_that_was_quantized_is_the_one_that_training_noted(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_for("spectra_qlora", ARCHITECTURES["llama"])
    model = quantized("llama", base_of("llama"), config, dtype="bfloat16")
    adapter = saved(model, tmp_path / "adapter")
    (adapter / "train_results.json").write_text(json.dumps({"quantization": "nf4", "dtype": "bfloat16"}))
    merge_into_base(model, out=tmp_path / "live", onto="dequantized")
    merge_into_base(adapter, out=tmp_path / "noted", onto="dequantized")
    (adapter / "train_results.json").unlink()
    merge_into_base(adapter, out=tmp_path / "said", onto="dequantized", quantization="nf4")  # of the file's float32
    live, noted, said = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("live", "noted", "said"))
    assert live == noted
    assert live != said


def test_eight_bit_bases_go_the_same_way(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base, architecture = base_of("llama"), ARCHITECTURES["llama"]
    model = quantized("llama", base, config_for("lora", architecture), "int8")
    adapter = saved(model, tmp_path / "adapter")
    (adapter / "train_results.json").write_text(json.dumps({"quantization": "int8"}))  # as the verb `train` writes
    merge_into_base(model, out=tmp_path / "live", onto="dequantized")
    merge_into_base(adapter, out=tmp_path / "folder", onto="dequantized")
    assert (tmp_path / "live" / "model.safetensors").read_bytes() == (
        tmp_path / "folder" / "model.safetensors"
    ).read_bytes()
    # The forward rounds activations to 8 bit as well, which no weight can say.
    near = (logits(loaded("llama", tmp_path / "live"), architecture) - logits(model, architecture)).abs().max()
    assert near < 0.02


def test_real_weights_on_a_four_bit_base_merge_without_loss(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    model = quantized("llama", base, config_for("spectrum", ARCHITECTURES["llama"]))
    assert any(type(m).__name__ == "Linear4bit" for m in model.modules())
    report = merge_into_base(saved(model, tmp_path / "adapter"), out=tmp_path / "merged")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    held = {
        n.replace(".lora_spectrum.default", "").removeprefix("base_model.model."): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert set(report.changed) == set(held)
    assert all(same(after[n], held[n].detach()) if n in held else same(after[n], before[n]) for n in before)


def test_a_base_that_is_only_there_in_four_bit(base_of: Callable[..., Path], tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    small = loaded("llama", base_of("llama"), quantization_config=settings)
    small.save_pretrained(tmp_path / "small")
    model = moved(loaded("llama", tmp_path / "small"), config_for("peft", architecture))
    settle_quantized(model)  # bitsandbytes' packed form for CPUs wants widths that are multiples of 64
    wanted = logits(model, architecture)
    adapter = saved(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"holds weights in bitsandbytes 4-bit only.*onto='dequantized'"):
        merge_into_base(adapter, out=tmp_path / "merged")
    for source, folder in ((adapter, "merged"), (model, "live")):
        merge_into_base(source, tmp_path / "small", tmp_path / folder, onto="dequantized", dtype="float32")
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "float32"
        assert set(tensors_of(tmp_path / folder)) == set(tensors_of(base_of("llama")))
        assert (logits(loaded("llama", tmp_path / folder), architecture) - wanted).abs().max() < ROUNDING


def test_what_the_device_of_training_decides_is_not_guessed(tmp_path: Path) -> None:
    """Rows of 48 values stay unquantized where a model is loaded for a CPU, and only there."""
    odd = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(odd).save_pretrained(tmp_path / "odd")
    files = open_weights(tmp_path / "odd")
    with pytest.raises(
        OptionError, match=r"whether 1 matrices such as model\.layers\.0\.mlp\.down_proj\.weight were in 4 bit"
    ):
        quantized_names(files, quantization_settings("nf4", None))
    assert "model.layers.0.mlp.down_proj.weight" in quantized_names(files, quantization_settings("int8", None))


def test_onto_dequantized_needs_to_know_how(adapter_of: Callable[..., Any], tmp_path: Path) -> None:
    folder, _, model = adapter_of("llama", "peft")
    with pytest.raises(OptionError, match=r"nothing says how the base was quantized.*quantization='nf4'"):
        merge_into_base(folder, out=tmp_path / "merged", onto="dequantized")
    with pytest.raises(OptionError, match=r"quantization is 'nf5'.*Did you mean 'nf4'"):
        merge_into_base(folder, out=tmp_path / "merged", onto="dequantized", quantization="nf5")
    with pytest.raises(OptionError, match="holds no quantized weights"):
        merge_into_base(model, out=tmp_path / "merged", onto="dequantized")


# --- as a LoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("llama", "alors", {}),
        ("llama", "alors", {"use_rslora": True, "lora_alpha": 5}),
        ("llama", "lora", {"use_dora": True}),
        ("llama", "spectra_qlora", {"train_norms": True}),
        ("llama", "spectra_qlora", {"trainable_token_indices": [1, 2]}),
        ("llama", "lora", {"train_embeddings": True, "train_head": True}),
        ("llama_tied", "lora", {"train_embeddings": True}),
        ("llama", "lora", {"bias": "all"}),
        ("gpt2", "alors", {}),
        ("bert", "alors", {"train_norms": True}),
        ("mixtral", "alors", {}),
    ],
)
def test_the_exported_lora_is_the_same_function_in_plain_peft(
    name: str, kind: str, changes: dict[str, Any], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    model = moved(loaded(name, base_of(name)), config_for(kind, architecture, **changes))
    wanted = logits(model, architecture)
    known = {f.name for f in LoraConfig.__dataclass_fields__.values()}
    for source, folder in ((saved(model, tmp_path / "adapter"), "folder"), (model, "live")):
        out = export_lora(source, tmp_path / folder)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert set(config) <= known
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"peft\.")
            plain = PeftModel.from_pretrained(loaded(name, base_of(name)), out)
        assert plain.peft_config["default"].peft_type == "LORA"
        assert torch.equal(logits(plain, architecture), wanted)
    left, right = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("folder", "live"))
    assert left.keys() == right.keys()
    assert all(same(left[k], right[k]) for k in left)


@pytest.mark.parametrize("kind", ["alors", "lora", "lorsa"])
def test_with_one_rank_readers_of_one_alpha_find_the_same_update(
    kind: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Both readers: the alpha over each tensor's own rank, as llama.cpp's converter takes it (convert_lora_to_gguf.py keeps
    one adapter.lora.alpha, llama-adapter.cpp divides by the tensor's rank), and over the config's r."""
    architecture = ARCHITECTURES["llama"]
    options = options_of("lorsa") if kind == "lorsa" else {}
    model = moved(loaded("llama", base_of("llama")), config_for(kind, architecture, **options))
    wanted = logits(model, architecture)
    source = saved(model, tmp_path / "adapter")
    config, tensors = {}, {}
    for name, uniform in (("plain", False), ("uniform", True)):
        out = export_lora(source, tmp_path / name, uniform_rank=uniform)
        config[name] = json.loads((out / "adapter_config.json").read_text())
        tensors[name] = load_file(out / "adapter_model.safetensors")
    assert not config["uniform"]["rank_pattern"] and not config["uniform"]["alpha_pattern"]
    assert tensors["plain"].keys() == tensors["uniform"].keys()
    alpha, r = config["uniform"]["lora_alpha"], config["uniform"]["r"]
    patterns = config["plain"]["rank_pattern"], config["plain"]["alpha_pattern"]
    for key in (k for k in tensors["plain"] if k.endswith("lora_A.weight")):
        pair = [(t[key].double(), t[key.replace("lora_A", "lora_B")].double()) for t in tensors.values()]
        (a, b), (padded_a, padded_b) = pair
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, own = (
            next((v for p, v in pattern.items() if p == "^" + re.escape(module)), config["plain"][default])
            for pattern, default in zip(patterns, ("r", "lora_alpha"), strict=True)
        )
        assert rank == a.shape[0]
        update = own / rank * b @ a
        for reader in (alpha / padded_a.shape[0], alpha / r):
            found = reader * padded_b @ padded_a
            # Zeros add nothing. lorsa has a scale for each layer: B is rounded once more to float32.
            assert torch.allclose(
                found, update, rtol=0, atol=update.abs().max().item() * (0 if kind != "lorsa" else 2**-22)
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        again = PeftModel.from_pretrained(loaded("llama", base_of("llama")), tmp_path / "uniform")
    assert (logits(again, architecture) - wanted).abs().max() < 1e-5  # sums of zeros may be added in another order


@pytest.mark.slow
def test_the_exported_lora_opens_where_we_are_not_installed(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder, wanted, _ = adapter_of("llama", "lora")
    export_lora(folder, tmp_path / "lora")
    code = f"""
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "lora")!r}, dtype=torch.float32).eval()
assert not any(name.startswith("spectrum_peft") for name in sys.modules)
ids = torch.load({str(tmp_path / "ids.pt")!r})
torch.save(model(input_ids=ids).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    torch.save(batch_for(ARCHITECTURES["llama"], loaded("llama", base_of("llama")))["input_ids"], tmp_path / "ids.pt")
    run_python(code, tmp_path)
    # The same factors under the same ranks, in another process; a library may order the float32 sums of order one
    # otherwise.
    assert (torch.load(tmp_path / "logits.pt") - wanted).abs().max() < 1e-6


def test_a_plain_lora_comes_out_as_it_is(
    adapter_of: Callable[..., Any], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder, wanted, model = adapter_of("llama", "peft")
    for source, name in ((folder, "a"), (model, "b")):
        out = export_lora(source, tmp_path / name)
        plain = PeftModel.from_pretrained(loaded("llama", base_of("llama")), out)
        assert torch.equal(logits(plain, ARCHITECTURES["llama"]), wanted)


@pytest.mark.parametrize("kind", ["spectrum", "full"])
def test_real_weights_are_no_lora(kind: str, adapter_of: Callable[..., Any], tmp_path: Path) -> None:
    folder, _, model = adapter_of("llama", kind)
    for source in (folder, model):
        with pytest.raises(OptionError, match=rf"mode '{kind}' trains real weights, first .*merge_into_base"):
            export_lora(source, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "alors"), ("gpt2", "lora"), ("mixtral", "alors"), ("llama", "peft")]
)
def test_the_factors_are_those_of_peft(name: str, kind: str, adapter_of: Callable[..., Any]) -> None:
    folder, _, model = adapter_of(name, kind)
    inner = model.get_base_model()
    found = list(factors(model))
    assert len(found) >= 4
    for entry, b, a, scale in found:
        owner, _, leaf = entry.rpartition(".")
        layer = inner.get_submodule(owner)
        while getattr(layer, "parameter_name", "weight") != leaf:
            layer = layer.base_layer
        delta = layer.get_delta_weight("default")
        made = scale * (b @ a)
        # A product of rank 8 at most in float32, below 0.1: 8 * 6e-8 * 0.1.
        assert torch.allclose(made.mT if layer.fan_in_fan_out else made, delta, atol=1e-7), entry
    if kind != "peft":
        from_folder = AdapterState.from_folder(folder).factors()
        for one, other in zip(sorted(found, key=itemgetter(0)), sorted(from_folder, key=itemgetter(0)), strict=True):
            assert one[0] == other[0]
            assert torch.equal(one[1], other[1])
            assert torch.equal(one[2], other[2])
            assert one[3] == other[3]


# --- for axolotl -----------------------------------------------------------------------------------------------------


def test_axolotl_gets_the_real_weights_as_patterns(adapter_of: Callable[..., Any], tmp_path: Path) -> None:
    import re

    folder, _, model = adapter_of("llama", "spectrum")
    for source in (folder, model, model.peft_config["default"].plan):
        text = export_axolotl(source, tmp_path / "axolotl.yaml").read_text()
        data = yaml.safe_load(text)
        assert set(data) == {"base_model", "unfrozen_parameters"}
        names = [n for n, _ in loaded("llama", Path(data["base_model"])).named_parameters()]
        # axolotl: a parameter trains if one of the patterns matches its name from the start
        unfrozen = sorted(n for n in names if any(re.match(p, n) for p in data["unfrozen_parameters"]))
        assert unfrozen == model.peft_config["default"].plan.trainable_names


def test_axolotl_gets_one_rank_and_the_modules(
    adapter_of: Callable[..., Any], base_of: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_for(
        "spectra_qlora",
        ARCHITECTURES["llama"],
        r=8,
        lora_alpha=24,
        lora_dropout=0.1,
        use_rslora=True,
        modules_to_save=["lm_head"],
    )
    model = moved(loaded("llama", base_of("llama")), config)
    plan = model.peft_config["default"].plan
    data = yaml.safe_load(export_axolotl(saved(model, tmp_path / "adapter"), tmp_path / "a.yaml").read_text())
    assert data["adapter"] == "qlora"
    assert data["load_in_4bit"] is True
    assert (data["lora_r"], data["lora_alpha"], data["lora_dropout"]) == (8, 24, 0.1)
    assert data["peft_use_rslora"] is True
    assert data["lora_modules_to_save"] == ["lm_head"]
    # What axolotl hands to PEFT makes the same adapters.
    again = get_peft_model(
        loaded("llama", base_of("llama")),
        LoraConfig(
            r=8, lora_alpha=24, use_rslora=True, target_modules=data["lora_target_modules"], modules_to_save=["lm_head"]
        ),
    )
    ours = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == ours
    plain = yaml.safe_load(
        export_axolotl(plan.replace(mode="lora"), tmp_path / "b.yaml", quantization="none").read_text()
    )
    assert (plain["adapter"], plain["load_in_4bit"]) == ("lora", False)


def test_axolotl_gets_ranks_by_pattern(base_of: Callable[..., Path], tmp_path: Path) -> None:
    config = config_for("alors", ARCHITECTURES["llama"], spectrum_ratio=1.0, lr_ratio=(1.0, 1.0))
    model = moved(loaded("llama", base_of("llama")), config)
    data = yaml.safe_load(export_axolotl(saved(model, tmp_path / "adapter"), tmp_path / "a.yaml").read_text())
    # PEFT reads the patterns as axolotl hands them on.
    again = get_peft_model(
        loaded("llama", base_of("llama")),
        LoraConfig(
            r=data["lora_r"], lora_alpha=data["lora_alpha"], target_modules=data["lora_target_modules"],
            rank_pattern=data["lora_rank_pattern"], alpha_pattern=data["lora_alpha_pattern"],
        ),
    )  # fmt: skip
    plan = model.peft_config["default"].plan
    assert len({e.rank for e in plan.entries if e.trains}) == 2
    for entry in plan.entries:
        if entry.trains:
            layer = again.get_base_model().get_submodule(entry.name.removesuffix(".weight"))
            assert (layer.r["default"], layer.lora_alpha["default"]) == (entry.rank, entry.alpha)


def test_a_folder_of_real_weights_brings_its_plan_to_axolotl(adapter_of: Callable[..., Any], tmp_path: Path) -> None:
    plan: Plan = adapter_of("llama", "spectrum")[2].peft_config["default"].plan
    (tmp_path / "tuned").mkdir()
    plan.save(tmp_path / "tuned" / "spectrum_plan.yaml")
    found, wanted = (
        export_axolotl(source, tmp_path / "a.yaml", quantization="none").read_text()
        for source in (tmp_path / "tuned", plan)
    )
    assert found == wanted


def test_axolotl_is_not_told_what_it_cannot_do(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path
) -> None:
    config = config_for("alors", ARCHITECTURES["llama"], spectrum_ratio=1.0)
    folder = saved(moved(loaded("llama", base_of("llama")), config), tmp_path / "adapter")
    out = tmp_path / "a.yaml"
    with pytest.raises(OptionError, match="has lr_ratio"):
        export_axolotl(folder, out)
    lora: Plan = adapter_of("mixtral", "lora")[2].peft_config["default"].plan
    assert yaml.safe_load(export_axolotl(lora, tmp_path / "fused.yaml").read_text())["lora_target_parameters"][
        0
    ].endswith("experts.down_proj")
    first = lora.entries[0]
    with pytest.raises(OptionError, match="has lr_ratio 2"):
        export_axolotl(lora.replace(entries=(type(first)(**{**vars(first), "lr_ratio": 2.0}), *lora.entries[1:])), out)
    with pytest.raises(OptionError, match="rescore_every is 5"):
        export_axolotl(lora.replace(options={**lora.options, "rescore_every": 5}), out)
    with pytest.raises(OptionError, match="real weights on a float base only"):
        export_axolotl(adapter_of("llama", "spectrum")[0], out, quantization="nf4")
    with pytest.raises(OptionError, match="carries no plan"):
        export_axolotl(adapter_of("llama", "peft")[0], out)
    assert not out.exists()


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_verbs_do_what_the_functions_do(
    base_of: Callable[..., Path], adapter_of: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = adapter_of("llama", "alors")[0], base_of("llama")
    assert main(["merge", str(folder), "--base", str(base), "-o", str(tmp_path / "cli"), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "0 copied byte for byte" in printed
    assert "largest rounding: " in printed
    merge_into_base(folder, base, tmp_path / "api", dtype="bfloat16")
    assert (tmp_path / "cli" / "model.safetensors").read_bytes() == (
        tmp_path / "api" / "model.safetensors"
    ).read_bytes()
    assert main(["export", str(folder), "--format", "lora", "-o", str(tmp_path / "lora")]) == 0
    export_lora(folder, tmp_path / "lora2")
    assert (tmp_path / "lora" / "adapter_config.json").read_bytes() == (
        tmp_path / "lora2" / "adapter_config.json"
    ).read_bytes()
    plan = tmp_path / "plan.yaml"
    adapter_of("llama", "spectrum")[2].peft_config["default"].plan.save(plan)
    assert main(["export", str(plan), "--format", "axolotl", "-o", str(tmp_path / "axolotl.yaml")]) == 0
    assert len(yaml.safe_load((tmp_path / "axolotl.yaml").read_text())["unfrozen_parameters"]) == 7


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("merge {adapter} -o {out} --onto somewhere", "onto is 'somewhere'"),
        ("merge {adapter}", "-o is missing"),
        ("merge {adapter} --base /nowhere/x -o {out}", "no such file or folder"),
        ("merge {adapter} --base /models/x.gguf -o {out}", "gguf_file='x.gguf'"),
        ("export {adapter} -o {out}", "--format is missing"),
        ("export {adapter} --format loar -o {out}", "Did you mean 'lora'"),
        ("export {adapter} --format lora -o {out}", "trains real weights"),
        (
            "export {adapter} --format lora -o {out} --quantization nf4",
            "--quantization is for --format axolotl, and --format is lora",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    line: str, match: str, adapter_of: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter_of("llama", "spectrum")[0]
    capsys.readouterr()  # what was written while the adapter was made
    assert main(line.format(adapter=folder, out=tmp_path / "out").split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert match in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_merging_a_folder_imports_neither_peft_nor_transformers(adapter_of: Callable[..., Any], tmp_path: Path) -> None:
    """Where the stored names are the model's own; of others, such as a mixture's experts, transformers is asked."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from spectrum_peft.cli.main import main
assert main(["merge", {str(adapter_of("llama", "alors")[0])!r}, "-o", "merged"]) == 0
assert not {{"peft", "transformers", "bitsandbytes"}} & set(sys.modules), "a heavy import"
"""
    run_python(code, tmp_path)
    assert (tmp_path / "merged" / "config.json").is_file()
