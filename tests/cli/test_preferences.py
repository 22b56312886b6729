"""DPO and friends from the command line: real runs of TRL's trainers, by the examples' own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from spectrum_peft import Plan
from spectrum_peft.cli.main import main
from spectrum_peft.data import IGNORED
from spectrum_peft.errors import OptionError
from spectrum_peft.train.encoding import DataChoices
from spectrum_peft.train.rewards import reward_functions
from spectrum_peft.train.tasks import TASKS, build_trainer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE = EXAMPLES / "dpo.yaml"
FLAGS = "--output-dir out --dtype float32 --report-to none --save-strategy no"
REWARDS = """
def is_text(completions, answer, **kwargs):
    assert isinstance(completions[0], str) and answer[0] == answer[1]  # as in the rows, with a row's columns for each text
    return [sum(c.isascii() for c in text) / 8 for text in completions]

def broken(completions, **kwargs):
    raise KeyError('answer')

def short(completions, **kwargs):
    return [1.0]

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} squared is", "chosen": f" {i * i}", "rejected": f" {i + i}!"} for i in range(4)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_what_becomes_of_pairs_is_told_and_which_teach_nothing(
    task: str, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [("a", "b"), ("c", "c"), ("", "d"), ("e", "e"), ("f", " ")]
    rows = [{"prompt": "q", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"train --task {task} --mode lora --model {tiny_llama_folder} --dataset pairs.jsonl --output-dir out --show-rows 1"
    code = main(line.split())
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "training: 5 rows read; " in out
    assert [line for line in out.splitlines() if " the first is row " in line] == [
        "training: 1 row has an empty 'chosen' answer, the first is row 3",
        "training: 1 row has an empty 'rejected' answer, the first is row 5",
        "training: 2 rows have the same answer as chosen and as rejected, the first is row 2",
    ]


@pytest.mark.parametrize("mode", ["lora", "spectrum", pytest.param("sgm", marks=pytest.mark.slow)])
def test_preferences_are_learnt_and_the_example_runs(
    mode: str, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    more = (
        f"--mode {mode} --model {tiny_llama_folder} --dataset pairs.jsonl --eval-dataset pairs.jsonl --output-dir out"
    )
    more += " --max-steps 4 --logging-steps 4 --dtype float32 --learning-rate 1e-3" + (
        " --n-groups 1" if mode == "sgm" else ""
    )
    code = main(["train", "--config", str(EXAMPLE), *more.split()])
    _, err = capsys.readouterr()
    assert code == 0, err
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["task"] == "dpo"
    assert results["rows"]["training"]["read"] == 4 and results["rows"]["evaluation"]["doubts"] == []
    assert results["before"]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference are the same
    assert results["after"]["loss"] < results["before"]["loss"]
    assert results["after"]["reward_accuracy"] > results["before"]["reward_accuracy"]
    assert Plan.load("out/spectrum_plan.yaml").mode == mode
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_llama_folder).parameters())
    beside = 0 if mode == "spectrum" else results["trainable_parameters"]
    assert results["total_parameters"] == base + beside  # the adapter's copy, which is compared with, is no part of it
    logged = [entry["num_tokens"] for entry in results["log_history"] if "num_tokens" in entry and "loss" in entry]
    assert results["input_tokens"] == logged[-1] > 0
    assert f"{results['input_tokens']:,} tokens without padding" in Path("out/README.md").read_text()
    if mode == "lora":
        assert (
            f"parameters beside {len(Plan.load('out/spectrum_plan.yaml').trainable_names)} matrices of the base"
            in caplog.text
        )


def test_the_usual_rate_is_that_of_preferences(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"train --task dpo --mode lora --model {tiny_llama_folder} --dataset pairs.jsonl --output-dir out --max-steps 1"
    )
    assert main([*line.split(), "--dtype", "float32", "--max-length", "64", "--report-to", "none"]) == 0
    out, err = capsys.readouterr()
    assert "learning rate 1e-05 (the default of mode 'lora', over 20 for dpo)" in out
    assert "usual rate" not in err


def test_rows_without_a_pair_are_named(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts.jsonl").write_text('{"text": "t"}\n')
    line = f"train --task dpo --mode lora --model {tiny_llama_folder} --dataset texts.jsonl --output-dir out"
    assert main(line.split()) == 2
    assert (
        "no usable column for task 'dpo': it has ['text'], wanted prompt/chosen/rejected or" in capsys.readouterr().err
    )


# --- wanted or not, rewards, and reinforcement -----------------------------------------------------------------------


def _rows(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture
def run(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    def command(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(line.replace("MODEL", str(tiny_llama_folder)).split())
        return (code, *capsys.readouterr())

    return command


Run = Callable[[str], tuple[int, str, str]]


@pytest.mark.parametrize("mode", ["lora", pytest.param("spectrum", marks=pytest.mark.slow)])
def test_what_is_wanted_is_learnt(mode: str, run: Run) -> None:
    judged = [{"prompt": f"{i} is", "completion": [" good", " bad"][i % 2], "label": i % 2 == 0} for i in range(8)]
    rows = _rows("judged.jsonl", judged)
    line = f"train --config {EXAMPLES / 'kto.yaml'} --mode {mode} --model MODEL --dataset {rows} --eval-dataset {rows} {FLAGS}"
    code, _out, err = run(f"{line} --max-steps 4 --learning-rate 3e-3 --per-device-train-batch-size 4")
    assert code == 0, err
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["before"]["reward_margin"] == pytest.approx(0, abs=1e-5)  # the model is its own reference
    assert results["after"]["reward_margin"] > 0.01
    assert "of what was trained" not in err
    code, _, err = run(f"evaluate out --task kto --dataset {rows}")
    assert code == 2 and "judged beside the model as it was before training" in err


def test_a_reward_model_is_trained_judges_and_rewards(run: Run) -> None:
    """One after the other, as it is done: pairs make a reward model, and that rewards what a model writes."""
    pairs = _rows("pairs.jsonl", [{"prompt": f"{i}", "chosen": " yes!", "rejected": " no?"} for i in range(8)])
    line = f"train --config {EXAMPLES / 'reward.yaml'} --model MODEL --dataset {pairs} --eval-dataset {pairs} {FLAGS}"
    code, _, err = run(f"{line} --mode full --max-steps 8 --learning-rate 1e-3 --per-device-train-batch-size 4")
    assert code == 0, err
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["after"]["reward_margin"] > results["before"]["reward_margin"]
    assert results["after"]["reward_accuracy"] == 1
    code, out, err = run(f"evaluate out --dataset {pairs}")
    assert code == 0, err
    found = json.loads(out)
    assert found["task"] == "reward" and found["reward_accuracy"] == 1
    prompts = _rows("prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    flags = "--max-completion-length 4 --num-generations 2 --per-device-train-batch-size 2 --max-steps 1"
    line = f"train --task grpo --mode lora --model MODEL --dataset {prompts} {FLAGS.replace('dir out', 'dir policy')} {flags}"
    code, _, err = run(f"{line} --reward-function out")
    assert code == 0, err


def test_what_is_rewarded_is_written_more_often(run: Run) -> None:
    Path("rewards.py").write_text(REWARDS)
    rows = _rows("prompts.jsonl", [{"prompt": f"say {i}", "answer": str(i)} for i in range(8)])
    line = f"train --config {EXAMPLES / 'grpo.yaml'} --model MODEL --dataset {rows} --eval-dataset {rows} {FLAGS}"
    line += " --per-device-train-batch-size 16 --num-generations 8 --max-completion-length 8 --max-steps 16"
    code, _out, err = run(f"{line} --reward-function rewards.py:is_text --mode full --learning-rate 1e-2")
    assert code == 0, err
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["after"]["reward"] > results["before"]["reward"] + 0.1
    # 64 completions of 8 bytes, of which about half are letters: one standard deviation of their mean is 0.02


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("", "--reward-function is missing: task 'grpo' learns from what it returns"),
        ("--reward-function gone.py:f", "gone.py: no such file"),
        ("--reward-function rewards.py:is_txt", "rewards.py has no 'is_txt'. Did you mean 'is_text'"),
        ("--reward-function rewards.py:NUMBER", "NUMBER is a int, wanted a function"),
        ("--reward-function rewards", "wanted module:function, file.py:function, or the folder of a reward model"),
        ("--reward-function adapter", "adapter: is an adapter, wanted a whole model"),
        ("--reward-function wrong.py:f", "wrong.py cannot be imported (SyntaxError"),
        ("--reward-function rewards.py:broken", "rewards.py:broken: raised KeyError: 'answer' (--debug shows where)"),
        ("--reward-function rewards.py:short", "rewards.py:short: returned 1 values for 2 completions"),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_one_line(flag: str, said: str, run: Run) -> None:
    Path("rewards.py").write_text(REWARDS)
    Path("wrong.py").write_text("def f(:\n")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    rows = _rows("prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    line = (
        f"train --task grpo --mode lora --model MODEL --dataset {rows} {FLAGS} --max-completion-length 2 --max-steps 1"
    )
    code, _, err = run(f"{line} --num-generations 2 --per-device-train-batch-size 2 {flag}")
    assert code == 2
    assert said in err.splitlines()[-1]


def test_functions_of_modules_are_found_and_other_tasks_take_none(run: Run) -> None:
    [function] = reward_functions(["trl.rewards:think_format_reward"], strings=True)
    said = [[{"role": "assistant", "content": "<think>\nx\n</think>\ny"}]]
    with pytest.raises(OptionError, match="raised TypeError"):  # TRL's own is for messages, and the rows hold strings
        function(completions=said)
    [function] = reward_functions(["trl.rewards:think_format_reward"], strings=False)
    assert function(completions=said) == [1.0]
    code, _, err = run(
        f"train --task dpo --mode lora --model MODEL --dataset pairs.jsonl {FLAGS} --reward-function a.py:f"
    )
    assert code == 2 and "--reward-function is for task 'grpo', and the task is 'dpo'" in err


def test_what_trl_only_tries_is_refused_with_the_way_from_python(run: Run) -> None:
    code, _, err = run(f"train --task orpo --mode lora --model MODEL --dataset pairs.jsonl {FLAGS}")
    assert code == 2
    assert "TRL has it only as an experiment" in err and "trl.experimental.orpo.ORPOTrainer takes" in err


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        ("kto", {"prompt": "p", "completion": "c", "label": 1}, "column 'label' holds Value('int64'), wanted true or false"),
        ("kto", {"prompt": "p", "completion": "c"}, "wanted prompt/completion/label or prompt/chosen/rejected"),
        ("reward", {"text": "t"}, "no usable column for task 'reward': it has ['text'], wanted prompt/chosen/rejected or"),
        ("grpo", {"text": "t"}, "no usable column for task 'grpo': it has ['text'], wanted prompt; name yours with"),
    ],
)  # fmt: skip
def test_rows_of_another_kind_are_named(task: str, rows: dict[str, Any], said: str, run: Run) -> None:
    name = _rows("rows.jsonl", [rows])
    code, _, err = run(f"train --task {task} --mode lora --model MODEL --dataset {name} {FLAGS}")
    assert code == 2 and said in err.splitlines()[-1]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_the_tokens_that_are_shown_are_those_of_the_trainer(
    task: str, chat: bool, tiny_llama: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """`pieces` against what TRL's own trainer has made of the same rows."""
    row = {"prompt": "a b", "chosen": "yes", "rejected": "no"}
    rows = Dataset.from_list([row])
    data = DataChoices(template=chat)
    encoded = TASKS[task].encode(rows, tiny_tokenizer, 64, [], data)
    pieces = TASKS[task].pieces(encoded[0], tiny_tokenizer, [])
    args = TASKS[task].arguments_class()(
        str(tmp_path), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=2, disable_tqdm=True
    )
    if task == "reward":
        tiny_llama = LlamaForSequenceClassification(LlamaConfig(**{**tiny_llama.config.to_dict(), "num_labels": 1}))
    made = build_trainer(
        task, model=tiny_llama, tokenizer=tiny_tokenizer, args=args, train_dataset=rows, data=data
    ).train_dataset
    if task == "kto":
        expected = [(r["prompt_ids"], r["completion_ids"]) for r in made]
    else:
        expected = [(made[0].get("prompt_ids", []), made[0][f"{name}_ids"]) for name in ("chosen", "rejected")]
    assert [list(p.ids) for p in pieces] == [[*prompt, *answer] for prompt, answer in expected]
    if task != "reward":
        assert [list(p.labels) for p in pieces] == [[IGNORED] * len(prompt) + answer for prompt, answer in expected]
