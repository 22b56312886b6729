"""Each front end its own words: what Python spells `spectrum_ratio=0.5` is a flag on the command line, in every error."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import spectrum_peft
from spectrum_peft import errors
from spectrum_peft.cli.main import VERBS, main
from spectrum_peft.cli.words import as_typed, flags_by_name
from spectrum_peft.plan import MODES
from spectrum_peft.records import SnrReport

PACKAGE = Path(spectrum_peft.__file__).parent
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
# Keywords and calls that stay, because no command leads to the error, or none does what is asked for.
PYTHON_ONLY = {
    "adapter_name": "several adapters in one model in memory",
    "AutoModelForCausalLM.from_pretrained": "no command turns a .gguf into a folder",
    "from_pretrained": "the same",
    "gguf_file": "the same",
    "save_embedding_layers": "of PEFT's save_pretrained",
    "combination_type": "of add_weighted_adapter",
    "disable_adapter": "a call on a model in memory",
    "bias": "of adapter_names, which no command takes",
    "model.eval": "of adapter_names",
    "init_lora_weights": "has no flag",
    "torch_dtype": "a second name of dtype, of Python's loader",
    "quantization_config": "of from_pretrained",
    "dequantize": "of from_pretrained",
    "callbacks": "a trainer of the user's own",
    "parameter_groups": "the same",
    "SpectrumCallback": "the same",
    "SpectrumConfig": "the same",
    "peft_config": "the same",
    "get_peft_model": "the same",
    "Trainer": "the same",
    "train": "the same",
    "model_init": "the same",
    "load_model_with_spectrum": "the same",
    "quantization_config_for": "a base that somebody loaded",
    "use_reentrant": "a field of gradient_checkpointing_kwargs",
    "relative_step": "a field of optim_args",
    "TrainingArguments": "a model that was opened by the user's own trainer",
    "deepspeed": "the same",
}


def _text(node: ast.expr) -> str:
    """What a message says, each value that is put in as the letter `v`."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "v"
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "v"


def messages() -> list[tuple[str, str]]:
    """(place, what the command line is told) of every error that the package raises."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {*ERRORS, "_refused"}:
                shell = next((k.value for k in node.keywords if k.arg == "shell"), None)
                for text in [shell] if shell is not None else node.args:
                    found.append((f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno}", _text(text)))
    return found


def test_no_error_speaks_python_on_the_command_line() -> None:
    flags = flags_by_name(None, VERBS.values())
    said = [(place, as_typed(text, flags)) for place, text in messages()]
    assert len(said) > 300
    left = [
        (place, word, text)
        for place, text in said
        for word in re.findall(r"(?<![\w.-])([a-z][a-z_0-9]*)=(?!=)|\b([A-Za-z_][\w.]*)\((?!s\))", text)
        if not {*word} & {"v", *PYTHON_ONLY}
    ]
    assert left == []


@pytest.mark.parametrize(
    ("python", "typed"),
    [
        ("spectrum_ratio=0.5 means nothing", "--spectrum-ratio 0.5 means nothing"),
        ("use keep_base='host'.", "use --keep-base host."),
        ("or give force=True.", "or give --force."),
        ("train_head=False, and", "--train-head false, and"),
        ("Plan with lr_ratio=(1, 1).", "Plan with --lr-ratio 1 1."),
        ("exclude_modules=['a.b', 'c'].", "--exclude-modules a.b c."),
        ("give gradients=FILE, which", "give --gradients FILE, which"),
        ("gradients=probe_gradients(model, batches)", "--gradients"),
        ("needs base=, a model", "needs --base, a model"),
        ("callbacks=[SpectrumCallback()]", "callbacks=[SpectrumCallback()]"),
        ("a==b and /tmp/x=y/z", "a==b and /tmp/x=y/z"),
    ],
)
def test_keywords_become_flags(python: str, typed: str) -> None:
    flags = {**flags_by_name(None, VERBS.values()), "base": "--base"}
    assert as_typed(python, flags) == typed


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan report.json --mode sgm", "--gradients gradients.json gives them"),
        ("plan report.json --mode lora --ratio 0.5", "--spectrum-ratio 0.5 means nothing in mode 'lora'"),
        ("scan MODEL --criterion fisher", "give `spectrum-peft plan` --gradients FILE"),
        (
            "export MODEL --format gguf --from base -o out.gguf",
            "--from base is what the Modelfile of an adapter starts from",
        ),
        (
            "plan report.json --mode sgm --similarity-threshold 0.5 --n-groups 2",
            "--similarity-threshold 0.5 and --n-groups 2 are both given",
        ),
    ],
)
def test_commands_are_told_flags(
    line: str, says: str, llama_report: SnrReport, tiny_llama_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    llama_report().save("report.json")  # type: ignore[operator]
    assert main([word.replace("MODEL", str(tiny_llama_folder)) for word in line.split()]) == 2
    assert says in capsys.readouterr().err


def test_python_hears_of_no_flags() -> None:
    """The rooms that know nothing of the command line do not speak of its flags where Python has a word."""
    rooms = {"plan", "probe", "memory", "records"}
    flagged = [(p, t) for p, t in messages() if p.partition("/")[0] in rooms and re.search(r"(?<!\w)--[a-z]", t)]
    assert [f for f in flagged if "spectrum-peft" not in f[1]] == []


def test_memory_takes_several_modes(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--max-length 8 --batch-size 1 --device cpu"
    assert main(f"memory {tiny_llama_folder} --mode full lora -o {tmp_path}/rows.json {flags}".split()) == 0
    out, err = capsys.readouterr()
    assert {line.split()[0] for line in out.splitlines() if line.startswith(tuple(MODES))} == {"full", "lora"}
    assert "scanning" not in out + err  # nothing is
    peaks = [row["peak_bytes"] for row in json.loads((tmp_path / "rows.json").read_text())]
    assert max(peaks) == peaks[0] > 1.1 * peaks[1]
    between = f"{(peaks[0] + peaks[1]) // 2048}KiB"
    fit = f"memory {tiny_llama_folder} --mode full lora --fit {between} --margin 0 -o {tmp_path}/plan.yaml {flags}"
    assert main(fit.split()) == 0
    assert "mode: lora" in (tmp_path / "plan.yaml").read_text()
