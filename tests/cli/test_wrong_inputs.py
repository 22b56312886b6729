"""One line, exit code 2, no traceback and no word of a library, whatever is named wrongly."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spectrum_peft.cli.main import main

Run = Callable[[str], str]


@pytest.fixture
def refused(
    tiny_llama_folder: Path, llama_report: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(tiny_llama_folder)
    Path("rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    Path("nowhere.yaml").symlink_to("gone")
    Path("broken.jsonl").write_text('{"text": "one"}\n{"text": "two"\n')
    Path("keys.yaml").write_text("modle: tiny\noutput_dir: out\n")
    llama_report(4).save("report.json")  # type: ignore[attr-defined]

    def command(line: str) -> str:
        capsys.readouterr()
        assert main(line.split()) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith("spectrum-peft: error: ")
        return err.removeprefix("spectrum-peft: error: ").rstrip("\n")

    return command


_TRAIN = "train --model tiny --dataset rows.jsonl --mode lora --output-dir out"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --model ./tinny --dataset rows.jsonl --output-dir out", "./tinny: no such file or folder. Did you mean 'tiny'?"),
        ("memory ./tinny", "./tinny: no such file or folder. Did you mean 'tiny'?"),
        ("scan /nowhere/model", "/nowhere/model: no such file or folder."),
        ("generate ./nope --prompt x", "./nope: no such file or folder."),
        ("merge ./nope -o out", "nope: no such folder."),
        ("train --model tinny --dataset rows.jsonl --output-dir out", "tinny: no such folder, and not loadable from the hub ("),
        ("plan tiny", "tiny: is a folder, wanted a report of `scan`: `spectrum-peft scan tiny -o report.json` writes one"),
        ("memory report.json", "report.json: is a report of `scan`, wanted a model: its folder"),
        ("train --model rows.jsonl --dataset rows.jsonl --output-dir out", "rows.jsonl: is a .jsonl file, wanted a model"),
        ("memory tiny --plan report.json", "report.json: is a report of `scan`, wanted a plan"),
        ("train --model tiny --dataset row.jsonl --output-dir out", "row.jsonl: no such file. Did you mean 'rows.jsonl'?"),
        ("train --model tiny --dataset ./rows --output-dir out", "./rows: no such file or folder. Did you mean 'rows.jsonl'?"),
        (
            "train --model tiny --dataset broken.jsonl --output-dir out",
            "broken.jsonl: line 2 is not JSON: Expecting ',' delimiter at character 15: '{\"text\": \"two\"'.",
        ),
        (
            "train --model tiny --dataset rows.jsonl --eval-split validation --output-dir out",
            "rows.jsonl: is one file and has no split 'validation': all its rows are 'train'",
        ),
        (
            "train --config keys.yaml --dataset rows.jsonl",
            "--model is missing. keys.yaml: unknown key 'modle'. Did you mean 'mode', 'model'",
        ),
        (f"{_TRAIN} --overwrite-output-dir --output-dir tiny", "tiny: config.json there belongs to tiny, which this run reads"),
        (
            f"{_TRAIN} --overwrite-output-dir --output-dir gone/../tiny",
            "gone/../tiny: config.json there belongs to tiny, which this run reads; name another --output-dir.",
        ),
        ("plan nowhere.yaml", "nowhere.yaml: no such file."),
        ("memory tiny --mode lora --max-length 99999999999999999999", "batch_size * max_length is 99,999,999,999,999,999,999,"),
        ("tune --model tiny --dataset rows.jsonl -o out --run-name [x --metric los", "command line: metric is 'los'. Did"),
        (f"{_TRAIN} --r eight", "--r is 'eight', wanted a whole number."),
        (f"{_TRAIN} --r 0", "--r is 0, wanted a whole number of at least 1."),
        (f"{_TRAIN} --optim adam", "--optim is 'adam'. Did you mean"),
        (f"{_TRAIN} --bf16 maybe", "--bf16 is 'maybe', wanted true or false."),
        (f"{_TRAIN} --max-steps", "--max-steps needs a value."),
        (f"{_TRAIN} --max-length -5", "--max-length is -5, wanted a whole number of at least 1."),
        (f"{_TRAIN} --per-device-train-batch-size 0", "--per-device-train-batch-size is 0, wanted at least 1."),
        (f"{_TRAIN} --num-train-epochs nan", "--num-train-epochs is nan, wanted a number of at least 0."),
        (f"{_TRAIN} --max-steps 0", "--max-steps is 0 and --num-train-epochs 3: nothing to train."),
        (f"{_TRAIN} --lora-dropout 3", "--lora-dropout is 3, wanted a share in [0, 1)."),
        (f"{_TRAIN} --quantization nf8", "--quantization is 'nf8'. Did you mean 'nf4'"),
        ("train --model tiny --dataset tiny --output-dir out", "tiny: is the folder of a model, wanted rows."),
        ("train --config report.json", "report.json: is a report of `scan`, wanted a file with flags as keys."),
        ("memory tiny --fit 24", "--fit is '24': the unit is missing"),
        ("chat tiny --top-p 0", "--top-p is 0, wanted a share in (0, 1]."),
        ("probe tiny --dataset rows.jsonl --samples 0", "--samples is 0, wanted at least 1."),
        ("scan tiny --criterion snr", "--criterion is 'snr'. Known: 'first'"),
        ("compare --config keys.yaml --dataset rows.jsonl", "--model is missing. keys.yaml: unknown key 'modle'."),
        ("train --modle tiny", "--model and --dataset and --output-dir are missing. Unknown argument '--modle'."),
    ],
)  # fmt: skip
def test_what_is_named_wrongly_is_one_line(line: str, said: str, refused: Run) -> None:
    assert refused(line).startswith(said)


def test_an_empty_prompt_is_refused(refused: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "tiny", "--prompt", " "]) == 2
    assert capsys.readouterr().err == "spectrum-peft: error: --prompt is ' ', wanted a text to write on from.\n"


def test_a_slash_is_answered_and_a_cut_answer_says_so(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chat(text: str, tokens: int) -> tuple[str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        flags = ["--dtype", "float32", "--max-new-tokens", str(tokens)]
        assert main(["chat", str(tiny_llama_folder), *flags]) == 0
        return capsys.readouterr()

    out, err = chat("/help\n/foo bar\n", 4)
    assert not out and err.count("/reset forgets what was said") == 3 and "/foo is no command." in err
    out, err = chat(" /foo bar\n/etc/hosts is what?\n", 4)
    assert err.count("[cut after 4 tokens; --max-new-tokens allows more]") == 2 and "no command" not in err
