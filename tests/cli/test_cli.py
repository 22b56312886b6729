"""The command line: what each verb writes, that flags and config files agree, and one clear line for every wrong input.

Verbs run in this process (`main` returns the exit code); a few run as a command, for what only a process shows.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from architectures import ARCHITECTURES
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file

from spectrum_peft import (
    GradientReport,
    Plan,
    SnrReport,
    SpectrumConfig,
    SpectrumScanner,
    __version__,
    make_plan,
    memory,
)
from spectrum_peft.arguments import keys_of, set_defaults_from
from spectrum_peft.cli.main import VERBS, main
from spectrum_peft.errors import OptionError
from spectrum_peft.plan import OPTIONS

# Small and the same everywhere: three steps on rows of at most 32 tokens.
TRAIN_FLAGS = (
    "--max-steps 3 --per-device-train-batch-size 2 --max-length 32 --logging-steps 1 --save-strategy no --dtype float32"
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed; returns what it printed."""

    def command(line: str, *more: object) -> str:
        capsys.readouterr()
        code = main([*line.split(), *map(str, more)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return command


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused: exit code 2, one line, no traceback, no new file; returns the line."""

    def command(line: str, *more: object) -> str:
        before = sorted(Path().rglob("*"))
        capsys.readouterr()
        code = main([*line.split(), *map(str, more)])
        _, err = capsys.readouterr()
        assert code == 2, err
        assert "Traceback" not in err
        lines = [one for one in err.splitlines() if one.startswith("spectrum-peft: error: ")]
        assert len(lines) == 1, err
        assert err.rstrip().splitlines()[-1] == lines[0]
        assert sorted(Path().rglob("*")) == before
        return lines[0]

    return command


@pytest.fixture(scope="session")
def tiny_report(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from spectrum_peft import scan_weights

    return scan_weights(str(tiny_llama_folder)).save(tmp_path_factory.mktemp("report") / "report.json")


def write_rows(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts() -> str:
    return write_rows("texts.jsonl", [{"text": f"number {i} is followed by {i + 1}"} for i in range(8)])


# --- help ------------------------------------------------------------------------------------------------------------


def test_version_and_overview(run: Callable[..., str]) -> None:
    assert run("--version").split() == ["spectrum-peft", __version__]
    overview = run("--help")
    for name, verb in VERBS.items():
        assert f"  {name} " in overview
        assert verb.example in overview


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_has_its_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"spectrum-peft {VERBS[name].example}" in capsys.readouterr().out


@pytest.mark.parametrize("name", VERBS)
def test_the_example_of_a_verb_is_understood(name: str) -> None:
    verb, *argv = shlex.split(VERBS[name].example)
    assert verb == name
    _, rest = VERBS[name].parser().parse_known_args(argv)
    assert rest == [] or VERBS[name].passes_on


def test_every_plan_option_has_a_flag_of_its_name() -> None:
    assert set(OPTIONS) <= set(keys_of(VERBS["plan"].parser()))
    assert set(OPTIONS) <= set(keys_of(VERBS["train"].parser()))


def test_the_flags_of_the_trainer_are_listed_on_request(run: Callable[..., str]) -> None:
    assert "--per_device_train_batch_size" in run("train --help-trainer")
    assert "--packing" in run("train --help-trainer --task causal_lm")
    assert "--predict_with_generate" in run("train --help-trainer --task seq2seq")


# --- scan, plan, plot ------------------------------------------------------------------------------------------------


def test_scan_writes_what_the_function_finds(
    run: Callable[..., str], tiny_llama_folder: Path, tiny_report: Path
) -> None:
    out = run(f"scan {tiny_llama_folder} -o report.json")
    assert Path("report.json").read_bytes() == tiny_report.read_bytes()
    assert "28 of" in out
    assert "self_attn.q_proj" in out


def test_scan_takes_its_flags(run: Callable[..., str], tiny_llama_folder: Path) -> None:
    run(f"scan {tiny_llama_folder} --criterion mp --jobs 2 --score linear head -o report.yaml")
    report = SnrReport.load("report.yaml")
    assert report.criterion == "mp"
    assert "lm_head.weight" in report.scores


def test_plan_explains_and_writes(run: Callable[..., str], tiny_report: Path) -> None:
    out = run(f"plan {tiny_report} --mode spectrum --ratio 0.25 -o plan.yaml")
    plan = Plan.load("plan.yaml")
    assert len(plan.trainable_names) == 7
    assert "Training 7 of 28 matrices" in out


def test_probe_and_plan_by_its_gradients(
    run: Callable[..., str], refused: Callable[..., str], tiny_llama_folder: Path, tiny_report: Path, texts: str
) -> None:
    flags = "--samples 8 --batch-size 4 --max-length 32 --dtype float32"
    said = run(f"probe {tiny_llama_folder} --dataset {texts} {flags} -o gradients.json")
    assert "Fisher mass of 28 matrices on 8 samples" in said and "neighbours alike" in said
    gradients = GradientReport.load("gradients.json")
    assert gradients.samples == 8 and len(gradients.similarities) == 7
    run(f"plan {tiny_report} --criterion fisher --gradients gradients.json -o fisher.yaml")
    best = {
        k: max((s for s in gradients.stats if s.kind == k), key=lambda s: s.fisher).name
        for k in {s.kind for s in gradients.stats}
    }
    assert set(best.values()) <= set(Plan.load("fisher.yaml").trainable_names)
    run(f"plan {tiny_report} --mode sgm --ratio 1 --n-groups 1 --share both --gradients gradients.json -o sgm.yaml")
    assert {e.group.partition(":")[0] for e in Plan.load("sgm.yaml").entries if e.trains} == {"AB"}
    assert "--gradients gradients.json gives them" in refused(f"plan {tiny_report} --mode sgm")
    assert "--gradients gradients.json gives them" in refused(f"plan {tiny_report} --criterion fisher")
    run(f"probe {tiny_llama_folder} --dataset {texts} {flags} --directions 0 --quantization nf4 -o bare.json")
    bare = GradientReport.load("bare.json")
    assert not bare.similarities and bare.settings["quantization"] == "nf4"
    run(f"probe {tiny_llama_folder} --dataset {texts} {flags} --directions 0 --svd-rank 16 -o components.json")
    for count in (4, 8):
        given = f"--gradients components.json --svd-rank 16 --n-components {count} -o {count}.yaml"
        run(f"plan {tiny_report} --mode lorsa {given}")
        assert {len(e.components or ()) for e in Plan.load(f"{count}.yaml").entries if e.trains} == {count}
    assert "wrote components.png" in run("plot --components 4.yaml 8.yaml -o components.png")
    assert "chooses no singular components" in refused("plot --components sgm.yaml -o components.png")
    assert "the gradients know none" in refused(f"plan {tiny_report} --mode lorsa --gradients gradients.json")
    assert "no such file" in refused(f"probe {tiny_llama_folder} --dataset nothing.jsonl")
    assert "rows, wanted at least one batch of 64" in refused(
        f"probe {tiny_llama_folder} --dataset {texts} --batch-size 64 --samples 64"
    )


@pytest.mark.parametrize(
    "how",
    [
        "--mode sgm --n-groups 2",
        "--mode lorsa --svd-rank 16 --n-components 8",
        "--mode lora --criterion fisher",
        "--mode spectrum --ratio 0.5 --criterion fisher",
    ],
)
def test_training_probes_the_first_training_rows_where_it_needs_to(
    run: Callable[..., str], tiny_llama_folder: Path, texts: str, how: str
) -> None:
    said = run(f"train --model {tiny_llama_folder} --dataset {texts} {how} --output-dir out {TRAIN_FLAGS}")
    assert "probing gradients on the first" in said
    plan = Plan.load("out/spectrum_plan.yaml")
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["trainable_parameters"] == plan.trainable_parameters > 0
    assert plan.criterion == ("fisher" if "fisher" in how else "spectrum")


def test_without_a_mode_lora_is_trained_on_every_matrix(
    run: Callable[..., str], tiny_llama_folder: Path, texts: str
) -> None:
    said = run(f"train --model {tiny_llama_folder} --dataset {texts} --output-dir out {TRAIN_FLAGS}")
    assert "mode lora" in said and "no --mode was given, and none was shown to be the best one" in said
    plan = Plan.load("out/spectrum_plan.yaml")
    assert plan.mode == "lora" and all(e.action == "lora" for e in plan.entries)
    assert Path("out/adapter_model.safetensors").is_file()


def test_plan_says_how_two_plans_differ(run: Callable[..., str], tiny_report: Path) -> None:
    run(f"plan {tiny_report} --ratio 0.25 -o a.yaml")
    run(f"plan {tiny_report} --ratio 0.5 -o b.yaml")
    assert "7 in the second only" in run("plan --diff a.yaml b.yaml")


@pytest.mark.parametrize("spelling", ["--spectrum-ratio 0.25", "--spectrum_ratio 0.25", "--ratio=0.25"])
def test_flags_may_have_dashes_or_underscores(run: Callable[..., str], tiny_report: Path, spelling: str) -> None:
    run(f"plan {tiny_report} {spelling} -o plan.yaml")
    assert Plan.load("plan.yaml").options["spectrum_ratio"] == 0.25


def test_a_config_file_says_the_same_as_flags_and_flags_win(run: Callable[..., str], tiny_report: Path) -> None:
    config = {
        "report": str(tiny_report), "mode": "alors", "spectrum-ratio": 0.5, "r_high": 8, "lr_ratio": [0.5, 4.0],
        "train_norms": True,
    }  # fmt: skip
    Path("c.yaml").write_text(yaml.safe_dump(config))
    run("plan --config c.yaml -o file.yaml")
    run(f"plan {tiny_report} --mode alors --ratio 0.5 --r-high 8 --lr-ratio 0.5 4 --train-norms -o flags.yaml")
    assert Path("file.yaml").read_bytes() == Path("flags.yaml").read_bytes()
    run("plan --config c.yaml --r-high 4 --train-norms false -o won.yaml")
    assert Plan.load("won.yaml").options["r_high"] == 4
    assert Plan.load("won.yaml").options["train_norms"] is False


def test_plot_draws_a_report_and_one_matrix(
    run: Callable[..., str], tiny_llama_folder: Path, tiny_report: Path
) -> None:
    run(f"plan {tiny_report} -o plan.yaml")
    assert "wrote scores.png" in run(f"plot {tiny_report} --plan plan.yaml -o scores.png")
    run(f"plot --matrix model.layers.1.mlp.up_proj.weight --model {tiny_llama_folder} -o matrix.svg")
    assert Path("scores.png").read_bytes().startswith(b"\x89PNG")
    assert "Marchenko-Pastur" in Path("matrix.svg").read_text()


# --- the scanner -----------------------------------------------------------------------------------------------------


def test_the_scanner_saves_the_plan_and_sums_it_up(
    tiny_llama_folder: Path, tiny_report: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    scanner = SpectrumScanner(model_name=str(tiny_llama_folder), spectrum_ratio=0.5, dtype="bfloat16")
    run(f"plan {tiny_report} --ratio 0.5 -o plan.yaml")
    assert scanner.scan_and_save("scanner.yaml").read_bytes() == Path("plan.yaml").read_bytes()
    lines = scanner.summary().splitlines()
    assert lines[0] == "Parameter groups scanned: 7 (28 matrices)"
    assert lines[1] == "Training: 14 / 28 matrices (50.0 %)"
    total = sum(t.numel() for t in load_file(tiny_llama_folder / "model.safetensors").values())
    trained = scanner.plan.trainable_parameters
    assert lines[2] == f"Trainable parameters: {trained:,} / {total:,} ({100 * trained / total:.1f} %)"
    full, ours = (
        memory.estimate_memory(tiny_llama_folder, plan, **memory.usual_step(tiny_llama_folder)).peak_bytes
        for plan in (make_plan(scanner.report, mode="full"), scanner.plan)
    )
    assert (
        f"full fine-tuning: {100 * (1 - ours / full):.1f} % ({full / 2**20:.1f} MiB to {ours / 2**20:.1f} MiB"
        in lines[3]
    )
    assert "batch 8 of 256 tokens, bfloat16" in lines[3]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tiny_llama_folder / "model.safetensors", alone)
    assert "not known" in SpectrumScanner(str(alone / "model.safetensors")).summary().splitlines()[3]


def test_the_scanner_takes_every_option_of_a_plan(tiny_llama_folder: Path) -> None:
    scanner = SpectrumScanner(str(tiny_llama_folder), mode="alors", snr_threshold=0.0, criterion="mean_std", r=4)
    assert scanner.report.criterion == "mean_std"
    assert {e.rank for e in scanner.plan.entries if e.trains} == {4, 1}
    with pytest.raises(OptionError, match="unknown option 'ratio'"):
        SpectrumScanner(str(tiny_llama_folder), ratio=0.5)
    with pytest.raises(OptionError, match="dtype is 'float8'"):
        SpectrumScanner(str(tiny_llama_folder), dtype="float8")


# --- train and evaluate ----------------------------------------------------------------------------------------------


def _encoder(folder: Path) -> Path:
    from transformers import BertModel

    BertModel(ARCHITECTURES["bert"].config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _sequence_to_sequence(folder: Path) -> Path:
    ARCHITECTURES["t5"].build().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


_LABELLED = [{"body": f"row {i}", "label": ["good", "bad", "odd"][i % 3]} for i in range(9)]
_PAIRS = [{"prompt": f"what follows {i}?", "completion": f" {i + 1}"} for i in range(8)]


@pytest.mark.parametrize("mode", ["spectrum", "lora"])
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq", "classification"])
def test_a_trained_model_is_judged_as_it_was_when_training_ended(
    task: str, mode: str, run: Callable[..., str], tmp_path: Path, tiny_llama_folder: Path
) -> None:
    columns = ""
    if task == "causal_lm":
        model, rows = tiny_llama_folder, _PAIRS
    elif task == "seq2seq":
        model, rows = _sequence_to_sequence(tmp_path / "base"), _PAIRS
    else:
        model, rows, columns = _encoder(tmp_path / "base"), _LABELLED, "--task classification --text-column body"
    data = write_rows("rows.jsonl", rows)
    length = "--max-length 64" if task == "causal_lm" else ""  # with the chat template around them
    flags = TRAIN_FLAGS.replace("--max-length 32", length)
    out = run(
        f"train --model {model} --dataset {data} --eval-dataset {data} {columns} --mode {mode} --output-dir out {flags}"
    )
    rate, at = 0.0018, " at rank 16"
    if mode == "spectrum":  # under a head the ratio is no part of it
        rate, at = (0.00025, "") if task == "classification" else (0.00036, " at ratio 0.5")
    assert f"learning rate {rate:g} (the default of mode '{mode}' for 3 steps{at})" in out
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["steps"] == 3
    assert results["task"] == task
    assert results["after"]["loss"] != results["before"]["loss"]
    plan = Plan.load("out/spectrum_plan.yaml")
    assert plan.mode == mode
    assert SnrReport.load("out/spectrum_report.json").fingerprint == plan.fingerprint
    assert results["trainable_parameters"] == sum(e.trainable_numel for e in plan.entries)

    run(f"evaluate out --dataset {data} {columns} --dtype float32 -o metrics.json")
    metrics = json.loads(Path("metrics.json").read_text())
    assert metrics["task"] == task
    for name, value in results["after"].items():
        # The same weights from a file: batches may be padded otherwise, which orders the float32 sums of some dozen
        # tokens anew.
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    if task == "classification":
        config = json.loads(Path("out/config.json").read_text())
        assert config["id2label"] == {"0": "bad", "1": "good", "2": "odd"}


@pytest.mark.parametrize("mode", ["spectrum", "lora", "spectra_qlora"])
def test_a_4bit_base_is_judged_in_the_same_numbers_too(
    mode: str, run: Callable[..., str], tiny_llama_folder: Path, texts: str
) -> None:
    run(
        f"train --model {tiny_llama_folder} --dataset {texts} --eval-dataset {texts} --mode {mode} --quantization nf4 "
        f"--output-dir out {TRAIN_FLAGS}"
    )
    results = json.loads(Path("out/train_results.json").read_text())
    out = run(f"evaluate out --dataset {texts} --dtype float32 --max-length 32")  # 4 bit, as the results say
    assert json.loads(out[out.index("{") :])["loss"] == pytest.approx(results["after"]["loss"], rel=1e-6)
    if mode == "lora":  # nothing stays unquantized in it: the base alone is what it was before training
        out = run(f"evaluate {tiny_llama_folder} --dataset {texts} --dtype float32 --max-length 32 --quantization nf4")
        assert json.loads(out[out.index("{") :])["loss"] == pytest.approx(results["before"]["loss"], rel=1e-6)
    base = sum(t.numel() for t in load_file(tiny_llama_folder / "model.safetensors").values())
    adapters = 0 if mode == "spectrum" else results["trainable_parameters"]
    assert results["total_parameters"] == base + adapters


def test_real_weights_are_saved_as_a_plain_checkpoint(
    run: Callable[..., str], tiny_llama_folder: Path, texts: str
) -> None:
    from transformers import AutoModelForCausalLM

    run(
        f"train --model {tiny_llama_folder} --dataset {texts} --mode spectrum --ratio 0.25 --output-dir out {TRAIN_FLAGS} "
        "--learning-rate 1e-2"
    )
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before, after = load_file(tiny_llama_folder / "model.safetensors"), load_file("out/model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(changed) == Plan.load("out/spectrum_plan.yaml").trainable_names
    assert model.dtype == torch.float32


def test_real_weights_step_in_float32_and_are_stored_in_the_dtype_they_were_loaded_in(
    run: Callable[..., str], tiny_llama_folder: Path, texts: str
) -> None:
    """Twelve steps that bfloat16 would mostly round away, one by one, add up to a change that it can hold."""
    line = (
        f"train --model {tiny_llama_folder} --dataset {texts} --mode spectrum --ratio 0.25 {TRAIN_FLAGS} "
        "--lr-scheduler-type constant "
    )
    line = line.replace("--dtype float32", "--dtype bfloat16").replace("--max-steps 3", "--max-steps 12")
    run(f"{line} --learning-rate 2e-5 --output-dir master")
    run(f"{line} --learning-rate 2e-5 --trainable-dtype base --output-dir pure")
    before = {name: t.bfloat16() for name, t in load_file(tiny_llama_folder / "model.safetensors").items()}
    moved = {}
    for name in ("master", "pure"):
        after = load_file(f"{name}/model.safetensors")
        assert {t.dtype for t in after.values()} == {torch.bfloat16}
        trained = Plan.load(f"{name}/spectrum_plan.yaml").trainable_names
        assert all(torch.equal(before[n], after[n]) for n in before if n not in trained)
        moved[name] = sum((before[n] != after[n]).sum().item() for n in trained)
    assert moved["master"] > 1.3 * moved["pure"]


def test_a_switch_that_is_on_by_default_can_be_turned_off_in_a_file(tmp_path: Path) -> None:
    from spectrum_peft.arguments import Rest
    from spectrum_peft.train.arguments import trainer_arguments

    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    for value in (False, True):
        rest = Rest((), {"gradient_checkpointing": value}, "train.yaml")
        assert trainer_arguments("causal_lm", rest, defaults).gradient_checkpointing is value


def test_a_config_file_trains_as_the_same_flags_do(
    run: Callable[..., str], tiny_llama_folder: Path, texts: str
) -> None:
    pairs = dict(zip(*[iter(TRAIN_FLAGS.split())] * 2, strict=True))
    config = {flag.removeprefix("--").replace("-", "_"): yaml.safe_load(value) for flag, value in pairs.items()}
    config |= {
        "model": str(tiny_llama_folder), "dataset": texts, "mode": "lora", "r": 4, "learning_rate": "3e-3", "seed": 7,
        "lr_scheduler_kwargs": {"num_cycles": 1}, "lr_scheduler_type": "cosine", "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    config["save_strategy"] = "no"  # YAML reads a bare no as false
    Path("c.yaml").write_text(yaml.safe_dump(config))
    run("train --config c.yaml --output-dir file")
    out = run(
        f"train --model {tiny_llama_folder} --dataset {texts} --mode lora --r 4 --learning_rate 3e-3 --seed 7 "
        f"--lr-scheduler-type cosine --target-modules q_proj v_proj --output-dir flags {TRAIN_FLAGS} "
        "--lr_scheduler_kwargs",
        '{"num_cycles": 1}',
    )
    assert "learning rate 0.003 (set by you)" in out
    file, flags = (load_file(f"{name}/adapter_model.safetensors") for name in ("file", "flags"))
    assert file.keys() == flags.keys()
    assert all(torch.equal(file[name], flags[name]) for name in file)
    assert json.loads(Path("file/adapter_config.json").read_text())["r"] == 4


def test_a_plan_and_a_report_are_carried_out(
    run: Callable[..., str], tiny_llama_folder: Path, tiny_report: Path, texts: str
) -> None:
    run(f"plan {tiny_report} --mode spectra_qlora --ratio 0.25 --r 2 -o plan.yaml")
    run(f"train --model {tiny_llama_folder} --dataset {texts} --plan plan.yaml --output-dir out {TRAIN_FLAGS}")
    assert Plan.load("out/spectrum_plan.yaml").trainable_names == Plan.load("plan.yaml").trainable_names
    run(
        f"train --model {tiny_llama_folder} --dataset {texts} --report {tiny_report} --mode spectrum --ratio 0.25 "
        f"--output-dir two {TRAIN_FLAGS}"
    )
    assert Plan.load("two/spectrum_plan.yaml").trainable_names == Plan.load("plan.yaml").trainable_names


def test_training_goes_on_from_a_checkpoint(run: Callable[..., str], tiny_llama_folder: Path, texts: str) -> None:
    flags = TRAIN_FLAGS.replace("--save-strategy no", "--save-strategy steps --save-steps 2").replace(
        "--max-steps 3", "--max-steps 4"
    )
    line = f"train --model {tiny_llama_folder} --dataset {texts} --mode lora {flags} --output-dir"
    run(f"{line} whole")
    shutil.copytree("whole/checkpoint-2", "parts/checkpoint-2")
    run(f"{line} parts --resume-from-checkpoint parts/checkpoint-2")
    whole, parts = (load_file(f"{name}/adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_base_is_judged_too(run: Callable[..., str], tiny_llama_folder: Path, texts: str) -> None:
    out = run(f"evaluate {tiny_llama_folder} --dataset {texts} --dtype float32")
    metrics = json.loads(out[out.index("{") :])
    assert metrics["tokens"] == sum(len(json.loads(row)["text"]) for row in Path(texts).read_text().splitlines())
    assert metrics["loss"] == pytest.approx(5.6, abs=0.2)  # a random model: about ln 264


# --- wrong inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "PREFIX"),
        ("scann x", "'scann' is not a command. Did you mean 'scan'"),
        ("plan REPORT --ratio 0", "--spectrum-ratio is 0.0"),
        ("plan REPORT --ratio -0.5", "--spectrum-ratio is -0.5"),
        ("plan REPORT --ratio 25", "--spectrum-ratio is 25.0"),
        ("plan REPORT --ratio nan", "--spectrum-ratio is nan"),
        ("plan REPORT --ratio half", "--ratio is 'half', wanted a number"),
        ("plan REPORT --ratio 0.5 --snr-threshold 1", "--spectrum-ratio 0.5 and --snr-threshold 1.0 are both given"),
        ("plan REPORT --mode spectrom", "mode is 'spectrom'. Did you mean 'spectrum'"),
        ("plan REPORT --criterion mpp", "criterion is 'mpp'. Did you mean 'mp'"),
        ("plan REPORT --snr-threshold 1e9", "leaves nothing to train: the scores of 28 candidates go from"),
        ("plan REPORT --train-norms maybe", "--train-norms is 'maybe', wanted true or false"),
        ("plan REPORT --rescore-every often", "'often'"),
        ("plan REPORT --ration 0.5", "unknown argument '--ration'. Did you mean '--ratio'"),
        ("plan", "REPORT is missing"),
        ("plan gone.json", "gone.json: no such file"),
        ("scan", "MODEL is missing"),
        ("scan FOLDER --criterion spectrom", "criterion is 'spectrom'"),
        ("scan FOLDER --device gpu0", "device is 'gpu0'"),
        ("scan FOLDER --jobs 0", "jobs is 0"),
        ("scan FOLDER --score heads", "'heads'"),
        ("scan gone", "gone"),
        ("scan FOLDER -o REPORT/out.json", "report.json: is a file, wanted a folder"),
        ("plan REPORT -o REPORT/plan.yaml", "report.json: is a file, wanted a folder"),
        ("plot REPORT", "-o is missing"),
        ("plot REPORT -o scores.gif", "scores.gif: a picture ends in one of"),
        (
            "plot --matrix model.layers.1.mlp.up_porj.weight --model FOLDER -o m.png",
            "Did you mean 'model.layers.1.mlp.up_p",
        ),
    ],
)
def test_a_wrong_input_is_named(
    line: str,
    says: str,
    refused: Callable[..., str],
    run: Callable[..., str],
    tiny_llama_folder: Path,
    tiny_report: Path,
) -> None:
    line = line.replace("REPORT", str(tiny_report)).replace("FOLDER", str(tiny_llama_folder))
    if says == "PREFIX":
        assert "commands:" in run(line)  # no command at all shows the overview
    else:
        assert says in refused(line)


def _checkpoint(folder: Path, change: Callable[[Path], None]) -> Callable[[Path], str]:
    def made(base: Path) -> str:
        shutil.copytree(base, folder)
        change(folder)
        return str(folder)

    return made


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _spoil(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def _lose_a_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    index = {"weight_map": {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (_truncate, "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_text("weights, honestly"), "model.safetensors"),
        (_lose_a_shard, "model-00002-of-00002.safetensors"),
        (_spoil(float("nan")), "model.layers.1.mlp.up_proj.weight"),
        (_spoil(float("inf")), "model.layers.1.mlp.up_proj.weight"),
        (_only_pickle, "pytorch_model.bin"),
    ],
    ids=["empty", "truncated", "not safetensors", "missing shard", "nan", "inf", "pickle only"],
)
def test_a_checkpoint_that_cannot_be_scanned_is_named(
    change: Callable[[Path], None], says: str, refused: Callable[..., str], tiny_llama_folder: Path
) -> None:
    shutil.copytree(tiny_llama_folder, "broken")
    change(Path("broken"))
    assert says in refused("scan broken -o report.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ratio: 0.5\nradius: 3\n", "c.yaml: unknown key 'radius'"),
        ("mode: !!python/object/apply:os.getcwd []\n", "c.yaml: not plain YAML"),
        ("spectrum_ratio: [0.5]\n", "c.yaml: spectrum_ratio is [0.5], wanted a single value"),
        ("r: many\n", "c.yaml: r is 'many', wanted int"),
        ("train_norms: perhaps\n", "c.yaml: train_norms is 'perhaps', wanted true or false"),
        ("lr_ratio: [0.5]\n", "c.yaml: lr_ratio has 1 values, wanted 2"),
        ("r: [1, 2]\n", "c.yaml: r is [1, 2], wanted a single value"),
        ("r: 2.5\n", "c.yaml: r is 2.5, wanted int"),
        ("r: 10000000000000000000\n", "c.yaml: r is 10000000000000000000, wanted int"),
        ("ratio: .nan\n", "c.yaml: ratio is nan, wanted a number"),
        ("ratio: {a: 1}\n", "c.yaml: ratio is {'a': 1}, wanted a single value"),
        ("criterion: [[a]]\n", "c.yaml: criterion is [['a']], wanted a single value"),
        ("lr_ratio: [[0.5], 2]\n", "c.yaml: lr_ratio is [0.5], wanted a number"),
        (f"scope: {'x' * 20_000}\n", "wanted a single value of at most 10,000 characters"),
        ("- ratio\n", "c.yaml: holds a list, wanted a mapping"),
        ("max_steps: 10\nmax-steps: 3\n", "c.yaml: max_steps stands twice, once with - and once with _"),
        ("", "c.yaml: the file is empty"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(
    text: str, says: str, refused: Callable[..., str], tiny_report: Path
) -> None:
    Path("c.yaml").write_text(text)
    assert says in refused(f"plan {tiny_report} --config c.yaml -o plan.yaml")


def test_a_flag_that_may_be_given_several_times_is_a_list_in_a_file(tmp_path: Path) -> None:
    parser = VERBS["generate"].parser()
    assert set_defaults_from(parser, "c.yaml", {"prompt": "one"}) == {}
    assert parser.parse_args([]).prompt == ["one"] and parser.parse_args(["--prompt", "two"]).prompt == ["one", "two"]
    set_defaults_from(parser, "c.yaml", {"prompt": ["a", "b"]})
    assert parser.parse_args([]).prompt == ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "--dataset is missing"),
        ("--dataset gone.jsonl", "gone.jsonl: no such file"),
        ("--dataset DATA --text-column body", "no column 'body' (--text-column)"),
        ("--dataset DATA --task classification", "no usable column for task 'classification': it has ['text']"),
        ("--dataset DATA --task translation", "task is 'translation'."),
        ("--dataset DATA --mode spectrum --ratio 0", "--spectrum-ratio is 0.0"),
        (
            "--dataset DATA --ratio 0.5",
            "--mode is missing: without it the mode is lora, in which --spectrum-ratio 0.5 means nothing",
        ),
        ("--dataset DATA --criterion random", "--mode is missing"),
        ("--dataset DATA --mode spectrom", "mode is 'spectrom'"),
        ("--dataset DATA --quantization nf5", "quantization is 'nf5'. Did you mean 'nf4'"),
        ("--dataset DATA --dtype float8", "dtype is 'float8'"),
        ("--dataset DATA --learning-rat 1", "unknown argument '--learning-rat'. Did you mean '--learning-rate'"),
        ("--dataset DATA --learning-rate fast", "--learning-rate is 'fast', wanted a number, or auto"),
        ("--dataset DATA --learning-rate AUTO", "--learning-rate is 'AUTO', wanted a number, or auto"),
        ("--dataset DATA --eval-strategy often", "--eval-strategy is 'often'."),
        ("--dataset DATA --eval-strategy steps", "eval_strategy is 'steps', but there is no --eval-dataset"),
        ("--dataset DATA --load-best-model-at-end", "training arguments: "),
        ("--dataset DATA --mode spectrum --report OTHER", "the report does not belong to this model: fingerprint"),
        ("--dataset DATA --plan ELSEWHERE", "model.layers.9.mlp.up_proj.weight, which the model lacks"),
        ("--dataset DATA --target-modules q_porj", "'q_porj' matches no Linear of the model. Did you mean 'q_proj'"),
        ("--dataset DATA --config c.yaml", "c.yaml: unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        ("--dataset DATA --resume-from-checkpoint gone", "resume_from_checkpoint is 'gone'"),
    ],
)
def test_a_training_run_that_cannot_begin_says_why(
    flags: str,
    says: str,
    refused: Callable[..., str],
    tiny_llama_folder: Path,
    tiny_gpt2_folder: Path,
    tiny_report: Path,
    texts: str,
) -> None:
    from spectrum_peft import make_plan, scan_weights

    if "OTHER" in flags:
        scan_weights(str(tiny_gpt2_folder)).save("other.json")
    if "ELSEWHERE" in flags:
        text = make_plan(SnrReport.load(tiny_report), spectrum_ratio=1.0).save("plan.yaml").read_text()
        Path("plan.yaml").write_text(text.replace("layers.2.mlp.up_proj", "layers.9.mlp.up_proj"))
    Path("c.yaml").write_text("learning_rat: 0.1\n")
    flags = flags.replace("DATA", texts).replace("OTHER", "other.json").replace("ELSEWHERE", "plan.yaml")
    assert says in refused(f"train --model {tiny_llama_folder} --output-dir out {flags}")


def test_a_model_or_output_that_cannot_be_used_is_named(
    refused: Callable[..., str], tiny_llama_folder: Path, texts: str
) -> None:
    Path("file").write_text("")
    train = f"train --model {tiny_llama_folder} --dataset {texts}"
    assert "file: is a file, wanted a folder" in refused(f"{train} --output-dir file/out")
    assert "gone: no such folder" in refused(f"train --model gone --dataset {texts} --output-dir out")
    assert "model.gguf: a .gguf can be scanned, not trained" in refused(
        f"train --model model.gguf --dataset {texts} --output-dir out"
    )
    assert ".: no config.json there" in refused(f"evaluate . --dataset {texts}")
    assert "--dataset is missing" in refused(f"evaluate {tiny_llama_folder}")


def test_a_bare_encoder_asks_for_the_task(
    refused: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, texts: str
) -> None:
    folder = _encoder(tmp_path_factory.mktemp("bert"))
    assert "pass --task" in refused(f"train --model {folder} --dataset {texts} --output-dir out")


# --- as a process ----------------------------------------------------------------------------------------------------


def test_as_a_command_a_wrong_input_is_one_line_and_exit_code_2() -> None:
    done = subprocess.run([sys.executable, "-m", "spectrum_peft", "plan", "gone.json"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "spectrum-peft: error: gone.json: no such file.\n"


def test_as_a_command_a_failure_of_ours_has_a_traceback_and_exit_code_1() -> None:
    program = (
        "import sys, spectrum_peft, spectrum_peft.plan as plan\n"
        "from spectrum_peft.cli.main import main\n"
        "plan.diff_plans = lambda a, b: 1 / 0\n"
        "spectrum_peft.Plan.load = classmethod(lambda cls, path: None)\n"
        "sys.exit(main(['plan', '--diff', 'a', 'b']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_the_config_of_an_adapter_that_was_trained_here_is_ours(
    run: Callable[..., str], tiny_llama_folder: Path, texts: str
) -> None:
    run(f"train --model {tiny_llama_folder} --dataset {texts} --mode lora --output-dir out {TRAIN_FLAGS}")
    config = SpectrumConfig.from_pretrained("out")
    assert config.task_type == "CAUSAL_LM"
    assert config.plan.mode == "lora"


# --- what must not pass in silence -----------------------------------------------------------------------------------


def test_a_run_that_becomes_nan_ends_before_anything_is_saved(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama_folder, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in weights if n.endswith("up_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two three"}\n' * 8)
    output = tmp_path / "out"
    code = main(
        f"train --model {broken} --mode lora --dataset {rows} --output-dir {output} --max-steps 2 --dtype float32".split()
    )
    assert code == 2
    assert "NaN" in capsys.readouterr().err
    assert not list(output.glob("*.safetensors"))


def test_rows_that_are_all_cut_away_are_told(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a long prompt " * 20, "completion": "end"}) + "\n")
    code = main(
        f"train --model {tiny_llama_folder} --mode lora --dataset {rows} --output-dir {tmp_path / 'out'} --max-steps 1 "
        "--max-length 8 --dtype float32".split()
    )
    assert code == 2
    assert "none of its 1 rows is left to train on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--mode lora --learning-rate -1", "learning_rate is -1"),
        ("--plan {plan} --ratio 0.9", "--spectrum-ratio is 0.9"),
    ],
)
def test_flags_that_would_be_of_no_effect_or_crash_later_are_refused(
    tiny_llama_folder: Path,
    tiny_report: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    says: str,
) -> None:
    plan = tmp_path / "plan.yaml"
    assert main(f"plan {tiny_report} --mode spectrum --ratio 0.5 -o {plan}".split()) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two three"}\n')
    command = f"train --model {tiny_llama_folder} --dataset {rows} --output-dir {tmp_path / 'out'} --dtype float32"
    assert main(f"{command} {flags.format(plan=plan)}".split()) == 2
    assert says in capsys.readouterr().err


def test_merging_a_plain_checkpoint_says_that_it_is_one(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"merge {tiny_llama_folder} -o {tmp_path / 'merged'}".split()) == 2
    assert "ready to be used" in capsys.readouterr().err


def test_the_memory_table_takes_the_ratio_that_was_asked_for(
    tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"memory {tiny_llama_folder} --mode spectrum --ratio 0.5 --max-length 8 --device cpu".split()) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("spectrum")]
    assert len(rows) == 1
    assert " 0.5 " in rows[0]
