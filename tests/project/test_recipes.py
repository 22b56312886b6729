"""Examples and recipes are read by the real command, and so is what `--init` and `--from-axolotl` write; the recipes'
predictions are current."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectrum_peft.cli.main import main
from spectrum_peft.train.axolotl import from_axolotl
from spectrum_peft.train.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
_TURNS = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
_PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ROWS: dict[str, dict[str, Any]] = {
    "causal_lm": _TURNS, "dpo": _PAIR, "reward": _PAIR, "kto": {"prompt": "a", "completion": "b", "label": True},
    "grpo": {"prompt": "a"}, "classification": {"text": "a", "label": "x"}, "multi_label": {"text": "a", "label": ["x", "y"]},
    "regression": {"text": "a", "label": 0.5}, "token_classification": {"tokens": ["a"], "tags": ["x"]},
}  # fmt: skip
Read = Callable[[Path], tuple[int, str, str]]


@pytest.fixture
def read(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Read:
    """Hand a YAML to `train`, with the model and the data of the tests in the place of its own, as far as the first rows."""
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text("def score(completions, **_):\n    return [0.0 for _ in completions]\n")

    def command(path: Path) -> tuple[int, str, str]:
        task = yaml.safe_load(path.read_text(encoding="utf-8")).get("task", "causal_lm")
        rows = [ROWS[task], {**ROWS[task], **({"label": "y"} if task == "classification" else {})}]
        rows += [{**ROWS[task], "tags": ["y"]}] if task == "token_classification" else []
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = f"--model {tiny_llama_folder} --dataset rows.jsonl --output-dir out --show-rows 1"
        more = "--reward-function rewards.py:score" if task == "grpo" else ""
        capsys.readouterr()
        code = main(["train", "--config", str(path), *line.split(), *more.split()])
        return (code, *capsys.readouterr())

    return command


@pytest.mark.parametrize("path", [*EXAMPLES, *RECIPES], ids=lambda path: path.stem)
def test_an_example_is_read_by_the_command(path: Path, read: Read) -> None:
    code, out, err = read(path)
    assert code == 0, err
    assert "row 1" in out


def test_there_is_an_example_for_each_task() -> None:
    """Of text and of sequence to sequence the README and the recipes speak."""
    assert {yaml.safe_load(path.read_text())["task"] for path in EXAMPLES} == set(TASKS) - {"causal_lm", "seq2seq"}


@pytest.fixture(scope="module")
def recipes() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import recipes as script
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return script


def test_the_recipes_are_those_of_the_table(recipes: Any) -> None:
    assert [path.stem for path in RECIPES] == sorted(recipes.RECIPES)


_SMALLEST = "1b_classification_8gb"


@pytest.mark.parametrize(
    "name", [_SMALLEST, *(pytest.param(p.stem, marks=pytest.mark.slow) for p in RECIPES if p.stem != _SMALLEST)]
)
def test_the_predicted_peak_is_current(name: str, recipes: Any) -> None:
    """The file again, by the same table and a dry run of today; that it fits its card is a condition of the script."""
    text = (ROOT / "examples" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text == recipes.text_of(name), f"python benchmarks/recipes.py --only {name}"


@pytest.mark.slow
def test_a_recipe_that_does_not_fit_is_refused(recipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, what, recipe = recipes.RECIPES[_SMALLEST]
    monkeypatch.setitem(recipes.RECIPES, _SMALLEST, (1, what, recipe))
    with pytest.raises(SystemExit, match=r"needs \d\.\d\d GiB, which a card of 1 GB has not to spare"):
        recipes.text_of(_SMALLEST)


# --- written for the user --------------------------------------------------------------------------------------------


def said(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(f"train {line}".split())
    return (code, *capsys.readouterr())


@pytest.mark.parametrize(
    "task", ["causal_lm", *(pytest.param(t, marks=pytest.mark.slow) for t in ("dpo", "grpo", "multi_label"))]
)
def test_init_writes_what_the_command_reads(
    task: str, read: Read, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(f"--init --model {tiny_llama_folder} --memory 4GiB --task {task} -o run.yaml", capsys)
    assert code == 0, err
    fields = yaml.safe_load(Path("run.yaml").read_text())
    assert fields["mode"] == "lora" and "quantization" not in fields  # the first that is tried
    code, out, err = read(Path("run.yaml"))
    assert code == 0 and "row 1" in out, err


@pytest.mark.slow
def test_init_takes_less_on_a_smaller_card_and_says_where_nothing_fits(
    tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(f"--init --model {tiny_llama_folder} --memory 1KiB", capsys)
    assert code == 2 and "the least that was tried needs" in err and "spectra_qlora on nf4, batch 1: " in err


def test_init_wants_a_card(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(f"--init --model {tiny_llama_folder} --memory 4", capsys)
    assert code == 2 and "--memory is '4': the unit is missing" in err
    assert "--memory is for --init" in said(f"--model {tiny_llama_folder} --memory 4GiB", capsys)[2]


AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: rows.jsonl
    type: chat_template
    roles_to_train: [assistant]
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
flash_attention: false
deepspeed: zero2.json
"""


def test_a_config_of_axolotl_becomes_ours_and_the_rest_is_named(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    Path("axolotl.yaml").write_text(AXOLOTL)
    code, _, err = said("--from-axolotl axolotl.yaml -o ours.yaml", capsys)
    assert code == 0
    named = [line.partition(": ")[2].split(":")[0] for line in err.splitlines()]
    assert named == ["datasets", "val_set_size", "deepspeed"]
    text = Path("ours.yaml").read_text()
    assert "# not understood: deepspeed: 'zero2.json'" in text
    fields = yaml.safe_load(text)
    assert fields == {
        "model": "NousResearch/Llama-3.2-1B", "r": 32, "lora_alpha": 16, "dataset": "rows.jsonl", "max_length": 2048,
        "packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3,
        "optim": "adamw_8bit", "lr_scheduler_type": "cosine", "learning_rate": 0.0002, "dtype": "bfloat16",
        "quantization": "nf4", "mode": "lora",
    }  # fmt: skip
    code, out, err = read(Path("ours.yaml"))
    assert code == 0 and "row 1" in out, err


@pytest.mark.parametrize(
    ("given", "fields", "unknown"),
    [
        ({"plugins": ["spectrum"], "spectrum_top_fraction": 0.5}, {"mode": "spectrum", "spectrum_ratio": 0.5}, []),
        ({"rl": "dpo", "rl_beta": 0.2}, {"mode": "full", "task": "dpo", "beta": 0.2}, []),
        ({"rl": "ipo"}, {"mode": "full"}, ["rl: 'ipo'"]),
        ({"adapter": "llama-adapter"}, {}, ["adapter: 'llama-adapter' (a method of PEFT's own goes to --peft-config)"]),
        ({"unfrozen_parameters": ["^lm_head"]}, {"mode": "full"}, ["unfrozen_parameters (a plan says what trains"]),
        ({"load_in_8bit": True, "adapter": "lora"}, {"mode": "lora", "quantization": "int8"}, []),
        ({"train_on_inputs": True, "save_steps": 5},
         {"mode": "full", "loss_on": "all", "save_steps": 5, "save_strategy": "steps"}, []),
        ({"warmup_ratio": 0.1, "group_by_length": True},
         {"mode": "full", "warmup_steps": 0.1, "train_sampling_strategy": "group_by_length"}, []),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, {"mode": "full", "warmup_steps": 5}, ["warmup_ratio: 0.1"]),
        ({"eval_steps": 5}, {"mode": "full"}, ["eval_strategy: 'steps' (there are no rows", "eval_steps: 5 (there are"]),
        ({"datasets": [{"path": "a", "type": "completion", "field": "body"}, {"path": "b"}]},
         {"mode": "full", "dataset": "a,b", "text_column": "body"}, []),
        ({"datasets": [{"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "ds_type": "json", "type": "my.own"}]},
         {"mode": "full", "dataset": "a.jsonl,b.jsonl"}, ["datasets: type: 'my.own'"]),
    ],
)  # fmt: skip
def test_keys_of_axolotl(given: dict[str, Any], fields: dict[str, Any], unknown: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"base_model": "m", **given}))
    found, said = from_axolotl(str(path))
    assert found == {"model": "m", **fields}
    assert len(said) == len(unknown) and all(line.startswith(start) for line, start in zip(said, unknown, strict=True))


SHAREGPT = """
base_model: m
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
warmup_ratio: 0.1
wandb_project: ours
rl: dpo
sample_packing: true
lora_r: half
"""


def test_what_is_written_is_taken_and_what_became_of_the_rest_is_said(
    read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("axolotl.yaml").write_text(SHAREGPT)
    code, _, err = said("--from-axolotl axolotl.yaml -o ours.yaml", capsys)
    assert code == 0
    refused = [line.split(": ")[1] for line in err.splitlines() if line.startswith("not understood: ")]
    assert refused == ["packing", "r"]  # no field of a DPOConfig, and no number
    assert "warmup_ratio became warmup_steps: 0.1, which below 1 is a share of all steps" in err
    assert "wandb_project became report_to: wandb; the name goes into the environment, WANDB_PROJECT=ours" in err
    fields = yaml.safe_load(Path("ours.yaml").read_text())
    assert fields["warmup_steps"] == 0.1 and fields["messages_column"] == "turns" and "packing" not in fields


def test_what_axolotl_is_given_comes_back(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from spectrum_peft import make_plan
    from spectrum_peft.export import export_axolotl
    from spectrum_peft.memory import report_of_config

    plan = make_plan(report_of_config(str(tiny_llama_folder)), mode="lora", r=8, lora_alpha=24)
    found, said = from_axolotl(str(export_axolotl(plan, tmp_path / "a.yaml", quantization="none")))
    assert (found["mode"], found["r"], found["lora_alpha"], said) == ("lora", 8, 24, [])
    assert len(found["target_modules"]) == len(plan.trainable_names)
