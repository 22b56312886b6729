"""What is a plain LoRA is saved as one: plain peft and transformers open it in a process that does not know this package.

The references are the logits of the trained model; the readers run in another process, PEFT's and transformers' own code.
`old_adapter/` was written before adapters were saved as plain LoRAs: `alors` with norms, peft_type SPECTRUM.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from stand_in_hub import StandIn
from transformers import Trainer, TrainingArguments

from spectrum_peft import SpectrumCallback, SpectrumConfig, export_lora, merge_into_base
from spectrum_peft.errors import CheckpointError, MismatchError
from spectrum_peft.weights.adapters import AdapterState

OLD = Path(__file__).parent / "old_adapter"
_LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
_MOE = {
    **_LLAMA, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "head_dim": 4,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CAUSAL = ("LlamaForCausalLM", "LlamaConfig", _LLAMA)
_TIED = ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True})
_CLASSES = ("LlamaForSequenceClassification", "LlamaConfig", {**_LLAMA, "num_labels": 3, "pad_token_id": 0})
CASES: dict[str, tuple[tuple[str, str, dict[str, Any]], dict[str, Any]]] = {
    "lora": (_CAUSAL, {"mode": "lora"}),
    "spectra_qlora": (_CAUSAL, {"mode": "spectra_qlora", "spectrum_ratio": 0.5}),
    "alors": (_CAUSAL, {"mode": "alors", "spectrum_ratio": 1.0, "r": 8}),
    "alors_rslora": (_CAUSAL, {"mode": "alors", "r": 8, "use_rslora": True}),
    "alors_moving": (_CAUSAL, {"mode": "alors", "spectrum_ratio": 0.6, "r": 8, "rescore_every": 2}),
    "no_task": (_CAUSAL, {"mode": "lora", "task_type": None}),
    "patterns": (_CAUSAL, {"mode": "lora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "dora": (_CAUSAL, {"mode": "lora", "use_dora": True}),
    "norms": (_CAUSAL, {"mode": "alors", "spectrum_ratio": 1.0, "train_norms": True}),
    "embeddings": (_CAUSAL, {"mode": "lora", "train_embeddings": True, "train_head": True}),
    "tied": (_TIED, {"mode": "lora", "train_embeddings": True}),
    "rows": (_TIED, {"mode": "lora", "trainable_token_indices": [3, 5]}),
    "head": (_CAUSAL, {"mode": "lora", "modules_to_save": ["lm_head"]}),
    "new_head": (_CLASSES, {"mode": "lora", "task_type": "SEQ_CLS"}),
    "biases": (("GPT2LMHeadModel", "GPT2Config", _GPT2), {"mode": "lora", "bias": "all"}),
    "experts": (("DeepseekV3ForCausalLM", "DeepseekV3Config", _MOE), {"mode": "lora"}),
}
IDS = torch.arange(16).reshape(2, 8) + 1
# transformers' own `load_adapter` does not find DoRA's magnitudes, of whomever.
BY_TRANSFORMERS = [name for name in CASES if name != "dora"]
# Beside a parameter PEFT forms x (W + BA)^T where a layer forms x W^T + (x A^T) B^T: ten roundings of float32 at logits below 1.
ROUNDING = {"experts": 1e-6}
_READER = """
import json, sys, warnings
from pathlib import Path
import torch, transformers
from peft import PeftModel
transformers.logging.set_verbosity_error()
found = {}
for folder in map(Path, sys.argv[1:]):
    of = getattr(transformers, (folder / "class").read_text())
    wanted, ids = torch.load(folder / "logits.pt"), torch.arange(16).reshape(2, 8) + 1
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(of.from_pretrained(folder / "base"), folder / "adapter").eval()
        by_peft = (model(input_ids=ids).logits - wanted).abs().max().item()
        said = [str(w.message) for w in caught if "missing" in str(w.message) or "nexpected" in str(w.message)]
        model = of.from_pretrained(folder / "base")
        model.load_adapter(str(folder / "adapter"))
        found[folder.name] = [by_peft, (model.eval()(input_ids=ids).logits - wanted).abs().max().item(), said]
assert "spectrum_peft" not in sys.modules
print(json.dumps(found))
"""


def trained(case: str, base: Any) -> Any:
    """The case's adapter, every number that trains moved away from where it began."""
    options = {"r": 4, "task_type": "CAUSAL_LM", **CASES[case][1]}
    model = get_peft_model(base, SpectrumConfig(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{case}/base, adapter, class, logits.pt."""
    root = tmp_path_factory.mktemp("plain")
    for case, ((of, config, fields), _) in CASES.items():
        torch.manual_seed(0)
        getattr(transformers, of)(getattr(transformers, config)(**fields)).save_pretrained(root / case / "base")
        model = trained(case, getattr(transformers, of).from_pretrained(root / case / "base"))
        torch.save(logits(model), root / case / "logits.pt")
        model.save_pretrained(root / case / "adapter")
        (root / case / "class").write_text(of)
    return root


def base_of(folder: Path) -> Any:
    return getattr(transformers, (folder / "class").read_text()).from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def elsewhere(folders: Path) -> dict[str, list[Any]]:
    """{case: [largest difference in peft, in transformers, warnings]}, read in a process that has only these."""
    ran = subprocess.run(
        [sys.executable, "-c", _READER, *(str(folders / case) for case in CASES)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(json.loads(ran.stdout.splitlines()[-1]))


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_gives_the_same_logits(elsewhere: dict[str, list[Any]], case: str) -> None:
    """Bit for bit: the same layers with the same numbers."""
    by_peft, by_transformers, said = elsewhere[case]
    assert by_peft <= ROUNDING.get(case, 0) and said == []
    assert by_transformers <= ROUNDING.get(case, 0) or case not in BY_TRANSFORMERS


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_found_again(folders: Path, tmp_path: Path, case: str) -> None:
    """By `PeftModel.from_pretrained`, `PeftConfig.from_pretrained` and the reader without peft; saved again it is the same."""
    adapter = folders / case / "adapter"
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and set(written) <= set(LoraConfig.__dataclass_fields__)
    model = PeftModel.from_pretrained(base_of(folders / case), adapter)
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, SpectrumConfig) and config.plan == model.peft_config["default"].plan
    assert AdapterState.from_folder(adapter).plan == config.plan and config.plan.mode == CASES[case][1]["mode"]
    assert torch.equal(logits(model), torch.load(folders / case / "logits.pt"))
    model.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "adapter_config.json").read_text())
    again["modules_to_save"] = again["modules_to_save"] and list(
        dict.fromkeys(again["modules_to_save"])
    )  # PEFT adds heads anew
    assert again == written and PeftConfig.from_pretrained(tmp_path).plan == config.plan
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("case", ["alors", "norms", "rows", "new_head", "experts"])
def test_merged_and_exported_as_before(folders: Path, tmp_path: Path, case: str) -> None:
    """Merging rounds W + dW once to float32: tolerance of some ten roundings of logits of order one."""
    wanted = torch.load(folders / case / "logits.pt")
    merge_into_base(folders / case / "adapter", folders / case / "base", tmp_path / "merged")
    merged = type(base_of(folders / case)).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)
    export_lora(folders / case / "adapter", tmp_path / "lora")
    plain = PeftModel.from_pretrained(base_of(folders / case), tmp_path / "lora")
    assert type(plain.base_model).__name__ == "LoraModel"
    assert (logits(plain) - wanted).abs().max() <= ROUNDING.get(case, 0)


@pytest.mark.parametrize("case", ["lora", "spectra_qlora", "alors", "norms"])
def test_readers_with_one_scale_for_all_are_right(folders: Path, case: str) -> None:
    """vLLM multiplies every B A by lora_alpha / r of the config, whatever the patterns say: in these modes that is the scale."""
    adapter = folders / case / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    scales = {scale for *_, scale in AdapterState.from_folder(adapter).factors()}
    assert scales == {config["lora_alpha"] / config["r"]}
    assert case not in {"alors", "norms"} or config["rank_pattern"]


def test_a_lora_of_anybody_else_stays_what_it_is(folders: Path, tmp_path: Path) -> None:
    model = get_peft_model(base_of(folders / "lora"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig


def test_on_the_hub_the_plan_is_found_and_missed_as_in_a_folder(hub: StandIn, folders: Path) -> None:
    adapter = folders / "alors" / "adapter"
    hub.add("someone/planned", adapter)
    hub.add("someone/plain", {p.name: p for p in adapter.iterdir() if p.name != "spectrum_adapter.json"})
    hub.add("someone/many", {f"inside/{p.name}": p for p in adapter.iterdir()})
    plan = AdapterState.from_folder(adapter).plan
    assert PeftConfig.from_pretrained("someone/planned").plan == plan
    assert type(PeftConfig.from_pretrained("someone/plain")) is LoraConfig
    assert PeftConfig.from_pretrained("someone/many", subfolder="inside").plan == plan
    model = PeftModel.from_pretrained(base_of(folders / "alors"), "someone/planned")
    assert torch.equal(logits(model), torch.load(folders / "alors" / "logits.pt"))


def test_what_lies_beside_another_adapter_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "alors" / "adapter", tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"][::-1]  # the order is of no meaning
    (tmp_path / "mixed" / "adapter_config.json").write_text(json.dumps(config))
    PeftConfig.from_pretrained(tmp_path / "mixed")
    (tmp_path / "mixed" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.raises(MismatchError, match=r"spectrum_adapter\.json: belongs to another adapter"):
        PeftConfig.from_pretrained(tmp_path / "mixed")
    with pytest.raises(MismatchError, match=r"Remove spectrum_adapter\.json"):
        AdapterState.from_folder(tmp_path / "mixed")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plan": None}, "holds no plan"),
        ({"peft_type": "IA3"}, "holds no plan, wanted the config of an adapter of peft_type SPECTRUM"),
        ({"plan": 7}, "plan is 7, wanted a mapping"),
        ({"r": "x"}, "r is 'x', wanted a whole number"),
    ],
)
def test_a_damaged_file_beside_is_named(folders: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    shutil.copytree(folders / "lora" / "adapter", tmp_path / "adapter")
    beside = tmp_path / "adapter" / "spectrum_adapter.json"
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **change}))
    for read in (PeftConfig.from_pretrained, AdapterState.from_folder):
        with pytest.raises(CheckpointError, match=rf"spectrum_adapter\.json: {says}"):
            read(tmp_path / "adapter")


_DATA = {"calibration_data": [{"input_ids": IDS, "labels": IDS}]}


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sgm", "spectrum_ratio": 1.0, "n_groups": 1, **_DATA},
        {"mode": "lorsa", "n_components": 4, "svd_rank": 8, "rotation_rank": 2, **_DATA},
        {"mode": "columns"},
        {"mode": "spectrum"},
        {
            "mode": "lora",
            "bias": "all",
            "train_norms": True,
        },  # PEFT keeps a norm's bias apart from the norm that is saved whole
    ],
    ids=lambda options: "_".join(map(str, [v for k, v in options.items() if k in {"mode", "bias"}])),
)
def test_what_is_no_plain_lora_stays_spectrum(folders: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Also where the folder held a plain LoRA before."""
    name = "biases" if "bias" in options else "lora"
    shutil.copytree(folders / name / "adapter", tmp_path / "adapter")
    model = get_peft_model(base_of(folders / name), SpectrumConfig(r=2, task_type="CAUSAL_LM", **options))
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "SPECTRUM"
    assert not (tmp_path / "adapter" / "spectrum_adapter.json").exists()
    again = PeftModel.from_pretrained(base_of(folders / name), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_a_folder_of_an_earlier_version_loads_and_is_saved_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**_LLAMA, "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8})
    )
    model = PeftModel.from_pretrained(copy.deepcopy(base), OLD)
    stored = load_file(OLD / "adapter_model.safetensors")
    assert any(".lora_spectrum." in key for key in stored)
    state = model.state_dict()
    for key, tensor in stored.items():
        for part in ("lora_A", "lora_B", "lora_spectrum"):
            key = key.replace(f"{part}.", f"{part}.default.")
        assert torch.equal(state[key], tensor)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ids = IDS % 16
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.peft_config["default"].plan == model.peft_config["default"].plan


def test_checkpoints_of_a_trainer_open_anywhere_and_resume(folders: Path, tmp_path: Path) -> None:
    """Three steps at once, and two and one from a checkpoint that is a plain LoRA: the same numbers."""

    def run(steps: int, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        config = SpectrumConfig(mode="alors", r=4, criterion="last", train_norms=True, task_type="CAUSAL_LM")
        model = get_peft_model(base_of(folders / "lora"), config)
        args = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
            learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=2,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[SpectrumCallback()])
        trainer.train(**kwargs)
        return model

    whole = run(3)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "LORA"
    (checkpoint / "spectrum_adapter.json").rename(tmp_path / "aside")
    plain = PeftModel.from_pretrained(base_of(folders / "lora"), checkpoint)
    (tmp_path / "aside").rename(checkpoint / "spectrum_adapter.json")
    tuned = PeftModel.from_pretrained(base_of(folders / "lora"), checkpoint)
    assert type(plain.base_model).__name__ == "LoraModel" and torch.equal(logits(plain), logits(tuned))
    assert torch.equal(logits(run(3, resume_from_checkpoint=str(checkpoint))), logits(whole))
