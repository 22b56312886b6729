"""What `train` knows before it loads a model, it says before; a folder holds one result; what libraries refuse is one line."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from spectrum_peft import Plan
from spectrum_peft.cli.main import main
from spectrum_peft.compare.settings import KEYS
from spectrum_peft.train import run as training

FLAGS = (
    "--max-steps 1 --per-device-train-batch-size 2 --max-length 32 --save-strategy no --dtype float32 --report-to none"
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": f"{i} is before {i + 1}"}) + "\n" for i in range(4)))


@pytest.fixture
def train(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str]]:
    def command(flags: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(f"train --model {tiny_llama_folder} --dataset texts.jsonl {FLAGS} {flags}".split())
        return code, capsys.readouterr().err

    return command


# --- what --export cannot give ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--mode lora --export gguf", "--export is 'gguf'"),
        (
            "--mode spectrum --export lora",
            "--export lora: mode 'spectrum' trains real weights, of which there is no LoRA",
        ),
        ("--mode full --export merged", "--export merged: mode 'full' writes a plain checkpoint already"),
    ],
)
def test_an_export_that_the_run_cannot_have_is_refused_at_once(
    train: Callable[[str], tuple[int, str]], flags: str, error: str
) -> None:
    code, err = train(f"{flags} --output-dir out")
    assert code == 2 and error in err and not Path("out").exists()


def test_export_writes_the_plain_form_at_the_end(
    train: Callable[[str], tuple[int, str]], tiny_llama_folder: Path
) -> None:
    assert train("--mode columns --output-dir out --export lora")[0] == 0
    assert json.loads(Path("out/adapter_config.json").read_text())["peft_type"] == "SPECTRUM"
    assert json.loads(Path("out/exported_lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert train("--mode lora --output-dir out --export merged --overwrite-output-dir")[0] == 0
    assert json.loads(Path("out/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not Path("out/exported_lora").exists()
    assert {path.name for path in Path("out/exported_merged").glob("*.safetensors")} == {"model.safetensors"}


# --- a folder holds one result ---------------------------------------------------------------------------------------


def test_a_folder_with_another_runs_result_is_refused_until_it_may_be_overwritten(
    train: Callable[[str], tuple[int, str]],
) -> None:
    assert train("--mode lora --output-dir out")[0] == 0
    Path("out/notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    code, err = train("--mode spectrum --output-dir out")
    assert code == 2
    assert "out: holds another run's adapter_config.json" in err
    assert "--overwrite-output-dir" in err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before

    assert train("--mode spectrum --output-dir out --overwrite-output-dir")[0] == 0
    assert Path("out/model.safetensors").is_file()
    assert not list(Path("out").glob("adapter_*"))
    assert Path("out/notes.txt").read_text() == "mine"
    assert train("--mode lora --output-dir out --overwrite-output-dir")[0] == 0
    assert Path("out/adapter_config.json").is_file()
    assert not list(Path("out").glob("model*.safetensors"))


def test_checkpoints_of_a_run_that_did_not_end_are_another_runs_too(
    train: Callable[[str], tuple[int, str]],
) -> None:
    Path("out/checkpoint-3").mkdir(parents=True)
    code, err = train("--mode lora --output-dir out")
    assert code == 2
    assert "out: holds another run's checkpoint-3" in err


def test_the_saved_config_is_the_bases_where_training_only_switched_something_off(
    train: Callable[[str], tuple[int, str]], tiny_llama_folder: Path
) -> None:
    assert train("--mode spectrum --output-dir out --gradient-checkpointing true")[0] == 0
    base, saved = (json.loads((f / "config.json").read_text()) for f in (tiny_llama_folder, Path("out")))
    assert base["use_cache"] is saved["use_cache"] is True


# --- known before loading --------------------------------------------------------------------------------------------

_ABSENT = [name for name in ("wandb", "tensorboard", "comet_ml", "mlflow") if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        *((f"--report-to {name}", f"--report-to {name} needs the package") for name in _ABSENT),
        ("--report-to wandbb", "--report-to is 'wandbb'. Did you mean 'wandb'"),
        ("--attn-implementation flash_attention_9", "--attn-implementation flash_attention_9: "),
        ("--push-to-hub", "--push-to-hub: the hub does not answer"),
        pytest.param(
            "--use-liger-kernel", "pip install liger-kernel",
            marks=pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="it is installed"),
        ),
        pytest.param(
            "--attn-implementation flash_attention_2", "--attn-implementation flash_attention_2: ",
            marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed"),
        ),
        pytest.param(
            "--optim lomo", "--optim",
            marks=pytest.mark.skipif(importlib.util.find_spec("lomo_optim") is not None, reason="it is installed"),
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_the_model_is_loaded(
    flags: str, says: str, train: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(training, "load_run", loaded)
    code, err = train(f"--mode lora --output-dir out {flags}")
    assert code == 2
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not Path("out").exists()


def test_an_empty_key_of_a_config_file_is_one_that_was_not_given(tmp_path: Path) -> None:
    from spectrum_peft.arguments import Rest
    from spectrum_peft.train.arguments import trainer_arguments

    keys = {"max_steps": None, "num_train_epochs": None, "weight_decay": None, "max_length": None}
    args = trainer_arguments(
        "causal_lm", Rest(config=keys, source="c.yaml"), {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    )
    assert (args.max_steps, args.num_train_epochs, args.weight_decay) == (-1, 3.0, 0.0)
    assert args.max_length is None  # which may be none: rows are not cut


# --- known only later ------------------------------------------------------------------------------------------------


def test_what_a_library_refuses_later_is_one_line_and_its_traceback_is_behind_debug(
    train: Callable[[str], tuple[int, str]],
) -> None:
    flags = "--mode lora --output-dir out --chat-template-path gone"
    code, err = train(flags)
    assert code == 2
    assert re.match(r"spectrum-peft: error: \w+ refuses: .*--debug shows where", err.splitlines()[-1])
    assert "Traceback" not in err
    code, err = train(f"{flags} --debug")
    assert code == 2
    assert "Traceback" in err
    assert re.match(r"spectrum-peft: error: \w+ refuses: .*--debug shows where", err.splitlines()[-1])


def test_a_value_error_of_our_own_code_is_a_failure_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys\n"
        "import spectrum_peft.cli.plan as plan\n"
        "from spectrum_peft.cli.main import main\n"
        "plan.required = lambda *_: int('x')\n"
        "sys.exit(main(['plan', 'report.json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def _out_of_the_system() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))  # as a read raises it, which knows no name


@pytest.mark.parametrize(("fails", "said"), [
    (_out_of_the_system, f"the system refuses: {os.strerror(errno.EIO)}"),
    (lambda: bytearray(2**62), "this machine's memory is full. `spectrum-peft memory` says"),
    (lambda: torch.empty(2**60, dtype=torch.uint8), "this machine's memory is full ("),
])  # fmt: skip
def test_what_the_system_refuses_without_the_name_of_a_file_is_one_line(
    fails: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spectrum_peft.cli.plan.required", lambda *_: fails())
    assert main(["plan", "report.json"]) == 2
    assert capsys.readouterr().err.startswith(f"spectrum-peft: error: {said}")


# --- what is said once -----------------------------------------------------------------------------------------------


def test_of_several_processes_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(["--version"]) == 0
        assert bool(capsys.readouterr().out) is said


def test_a_python_session_begins_in_silence() -> None:
    program = "from spectrum_peft import SpectrumConfig, load_model_with_spectrum"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- compare ---------------------------------------------------------------------------------------------------------


def test_compare_says_at_once_that_its_folder_is_missing() -> None:
    program = (
        "import sys\n"
        "from spectrum_peft.cli.main import main\n"
        "code = main(['compare', '--model', 'm', '--dataset', 'd'])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'imported for one line'\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "spectrum-peft: error: --output-dir is missing.\n")


def test_the_help_of_compare_names_every_key_and_a_near_one_is_found(
    tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out.replace("-", "_")
    assert [key for key in KEYS if key not in shown] == []
    Path("c.yaml").write_text("generat: [exact_match]\n")
    assert main(f"compare --config c.yaml --model {tiny_llama_folder} --dataset texts.jsonl -o out".split()) == 2
    assert "c.yaml: unknown key 'generat'. Did you mean 'generate'" in capsys.readouterr().err


# --- last lines ------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_one_time_and_one_memory(tiny_llama_folder: Path) -> None:
    line = f"train --model {tiny_llama_folder} --dataset texts.jsonl {FLAGS} --mode lora --output-dir out"
    done = subprocess.run([sys.executable, "-m", "spectrum_peft", *line.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count("s a step") == said.count("s a step (median), peak memory") == 1
    assert said.count("GiB") == 2  # the peak, and how much of it was there before
    assert said.count("GiB of it before the model was loaded") == 1


def test_a_fit_that_is_written_scans_by_itself(tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"memory {tiny_llama_folder} --fit 1GiB --max-length 8 --device cpu -o plan.yaml"
    assert main(line.split()) == 0
    err = capsys.readouterr().err
    assert all(e.score is not None for e in Plan.load("plan.yaml").entries if e.action != "save")
    assert "None" not in err


def test_values_and_columns_are_looked_at_before_anything_is_loaded(
    train: Callable[[str], tuple[int, str]],
    tiny_llama_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spectrum_peft.train.preview.settle", None)  # not callable: the rows are not looked at
    code, err = train("--output-dir out --show-rows -1")
    assert code == 2 and "--show-rows is -1, wanted at least 1." in err
    assert main(["export", "out", "--format", "guff"]) == 2
    assert "--format is 'guff'. Did you mean 'gguf'?" in capsys.readouterr().err
    Path("pairs.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    monkeypatch.setattr("spectrum_peft.train.saved.load_trained", None)
    assert main(["evaluate", str(tiny_llama_folder), "--dataset", "pairs.jsonl"]) == 2
    assert "no usable column" in capsys.readouterr().err


def test_a_misspelt_target_is_refused_before_the_scan(
    train: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "report_named", None)  # not callable: nothing is scanned
    code, err = train("--output-dir out --mode spectra_qlora --target-modules q_prj v_proj")
    assert code == 2 and "--target-modules: 'q_prj' matches no Linear of the model. Did you mean 'q_proj'" in err
