"""Reports and plans as a user names them, `auto`, a file or a repository: the same wherever one is taken."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_in_hub import Blob, StandIn

from spectrum_peft import Plan, SnrReport, SpectrumConfig, SpectrumScanner, find_report, make_plan, scan_weights
from spectrum_peft.cli.main import main
from spectrum_peft.errors import CheckpointError, HubError, MismatchError, OptionError

MODEL, SHARED = "org/model", "someone/scans"
HALF: dict[str, Any] = {"spectrum_ratio": 0.5}


@pytest.fixture
def stored(hub: StandIn, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SnrReport:
    """A model whose repository, like another one, has a report with scores that no scan gives; nothing is kept here."""
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    hub.add(MODEL, tiny_llama_folder)
    report = scan_weights(MODEL)
    told = tuple(dataclasses.replace(s, score=1000.0 - i) if s.score else s for i, s in enumerate(report.stats))
    report = dataclasses.replace(report, stats=told)
    report.push_to_hub(MODEL)
    report.push_to_hub(SHARED, kind="dataset")
    monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(tmp_path / "another machine"))
    return report


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c d e f"}\n' * 4)
    return str(tmp_path / "rows.jsonl")


def by_loading(report: str, folder: Path) -> Plan:
    from spectrum_peft import load_model_with_spectrum

    config = SpectrumConfig(report=report, **HALF)
    return load_model_with_spectrum(MODEL, config, dtype="float32")[0].spectrum_plan


def by_a_model_in_memory(report: str, folder: Path) -> Plan:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = SpectrumConfig(mode="alors", r=2, report=report, **HALF)
    get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config)
    return config.plan


def by_the_scanner(report: str, folder: Path) -> Plan:
    return SpectrumScanner(MODEL, 0.5, report=report).plan


def by_a_dry_run(report: str, folder: Path) -> Plan:
    from spectrum_peft import fit_to_memory

    step = {"max_length": 8, "device": "cpu", "dtype": "float32"}
    return fit_to_memory(MODEL, report, budget="1GiB", **step)  # type: ignore[arg-type]


def by_plan(report: str, folder: Path) -> Plan:
    assert main(["plan", report, "--model", MODEL, "--ratio", "0.5", "-o", str(folder / "plan.yaml")]) == 0
    return Plan.load(folder / "plan.yaml")


def by_memory(report: str, folder: Path) -> Plan:
    step = ["--max-length", "8", "--device", "cpu", "--dtype", "float32", "-o", str(folder / "plan.yaml")]
    assert main(["memory", MODEL, "--fit", "1GiB", "--report", report, *step]) == 0
    return Plan.load(folder / "plan.yaml")


def by_train(report: str, folder: Path) -> Plan:
    out = ["--output-dir", str(folder / "out"), "--max-steps", "1", "--use-cpu", "--dtype", "float32"]
    data = ["--dataset", str(folder / "rows.jsonl"), "--mode", "spectrum", "--ratio", "0.5"]
    assert main(["train", "--model", MODEL, "--report", report, *data, *out]) == 0
    return Plan.load(folder / "out" / "spectrum_plan.yaml")


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("report", ["auto", f"datasets/{SHARED}"])
@pytest.mark.parametrize(
    "taken", [by_loading, by_a_model_in_memory, by_the_scanner, by_a_dry_run, by_plan, by_memory, by_train]
)
def test_a_report_means_the_same_wherever_it_is_taken(
    taken: Callable[[str, Path], Plan], report: str, stored: SnrReport, tmp_path: Path
) -> None:
    scores = {e.name: e.score for e in taken(report, tmp_path).entries if e.score is not None}
    assert scores == stored.scores


def test_a_comparison_takes_reports_that_are_there(stored: SnrReport, tmp_path: Path, rows: str) -> None:
    from spectrum_peft.compare.matrix import cells_of, contestants_of
    from spectrum_peft.compare.reading import read_comparison
    from spectrum_peft.compare.runs import inputs_of, scans_for

    def comparison(train: dict[str, Any], name: str) -> Any:
        (tmp_path / name / "scans").mkdir(parents=True)
        asked = {"modes": ["spectrum"], "controls": [], "learning_rates": [1e-4]}
        return read_comparison(
            asked, train={"model": MODEL, "dataset": rows, **train}, arguments=(), task="causal_lm",
            output=tmp_path / name, source="here",
        )  # fmt: skip

    found, plain = comparison({"report": "auto"}, "found"), comparison({}, "plain")
    assert "report" not in found.train
    for one, told in ((found, True), (plain, False)):
        cells = cells_of(one, contestants_of(one), inputs_of(one))
        report = SnrReport.load(scans_for(one, cells, lambda _: None)["spectrum"])
        assert (report.scores == stored.scores) is told
    with pytest.raises(OptionError, match="report is one run's, and compare makes many: leave it out, or say auto"):
        comparison({"report": "report.json"}, "refused")


def test_a_tune_takes_auto_and_no_other_report() -> None:
    from spectrum_peft import tuning

    asked = {"task": "causal_lm", "output": Path("out"), "source": "here"}
    known = {"model": MODEL, "dataset": "rows.jsonl", "eval_dataset": "rows.jsonl"}
    assert tuning.read_tune({}, train={**known, "report": "auto"}, **asked).train["report"] == "auto"  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="leave it out, or say auto"):
        tuning.read_tune({}, train={**known, "report": "report.json"}, **asked)  # type: ignore[arg-type]


def test_weights_that_were_changed_in_memory_get_no_report_of_their_files(stored: SnrReport) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert find_report(model).scores == stored.scores
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert find_report(model).scores == scan_weights(model).scores != stored.scores


def test_a_report_of_a_repository_is_held_to_the_model(
    stored: SnrReport, hub: StandIn, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_llama_folder / "model.safetensors")
    changed = tmp_path / "changed.safetensors"
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, changed, {"format": "pt"})
    hub.repos["models", MODEL].commit({"model.safetensors": Blob(changed)})
    with pytest.raises(MismatchError, match="the report does not belong to org/model: fingerprint content"):
        SpectrumScanner(MODEL, report=f"datasets/{SHARED}").report  # noqa: B018


def test_auto_without_a_model_says_what_is_wanting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match=r"of a report alone: make_plan\(find_report\(MODEL\), \.\.\.\)"):
        make_plan("auto")
    for verb in (["plan", "auto"], ["plot", "auto", "-o", "x.png"]):
        assert main(verb) == 2
        assert "REPORT is auto, which is of a model: name it by --model." in capsys.readouterr().err


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_of_a_repository_is_taken_as_a_file_is(
    stored: SnrReport, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spectrum_peft import estimate_memory

    plan = make_plan(stored, mode="lora", r=2)
    for to in (MODEL, SHARED):
        plan.push_to_hub(to)
    make_plan(stored, mode="spectrum", spectrum_ratio=0.25).push_to_hub(SHARED)
    assert SpectrumConfig(plan=MODEL).plan.digest == plan.digest
    step = {"max_length": 8, "device": "cpu", "dtype": "float32"}
    assert estimate_memory(MODEL, MODEL, **step).trainable_parameters == plan.trainable_parameters  # type: ignore[arg-type]
    out = [
        "--dataset",
        rows,
        "--output-dir",
        str(tmp_path / "out"),
        "--max-steps",
        "1",
        "--use-cpu",
        "--dtype",
        "float32",
    ]
    train = ["train", "--model", MODEL, *out, "--plan", SHARED]
    assert main(train) == 2
    assert "has 2 of org/model, wanted one" in capsys.readouterr().err
    assert main([*train, "--mode", "lora"]) == 0
    assert Plan.load(tmp_path / "out" / "spectrum_plan.yaml").digest == plan.digest
    assert main(["memory", MODEL, "--plan", MODEL, "--max-length", "8", "--device", "cpu"]) == 0
    assert main(["plan", "--diff", MODEL, str(tmp_path / "out" / "spectrum_plan.yaml")]) == 0


def test_what_a_run_left_in_a_repository_is_found(stored: SnrReport, hub: StandIn) -> None:
    plan = make_plan(stored, mode="lora", r=2)
    files = {"spectrum_plan.yaml": plan.text(yaml=True).encode(), "spectrum_report.json": stored.text().encode()}
    hub.add("someone/tuned", files)
    assert Plan.named("someone/tuned", model_id=MODEL) == Plan.named("someone/tuned") == plan
    assert SnrReport.named("someone/tuned", model_id=MODEL) == stored
    with pytest.raises(HubError, match=r"its spectrum_plan.yaml has model_id 'org/model', wanted 'org/other'"):
        Plan.named("someone/tuned", model_id="org/other")
    with pytest.raises(HubError, match=r"its spectrum_report.json has criterion 'spectrum', wanted 'mp'"):
        SnrReport.named("someone/tuned", criterion="mp")


def test_what_lies_here_is_a_file_whatever_it_is_called(
    hub: StandIn, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = scan_weights(tiny_llama_folder)
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    report.save("org/model.json")
    shutil.copy("org/model.json", "org/model")
    assert SnrReport.named("org/model.json") == SnrReport.named(Path("org/model.json")) == report
    assert SnrReport.named("org/model") == report
    for name in ("org/gone.json", Path("org/gone")):
        with pytest.raises(CheckpointError, match=r"org/gone.*no such file"):
            SnrReport.named(name)
    assert len(hub.requests) == 0
