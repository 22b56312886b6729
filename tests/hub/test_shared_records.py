"""Reports and plans in repositories: pushed, found again by model, commit and criterion, and held to the weights."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from stand_in_hub import Blob, StandIn

from spectrum_peft import Plan, SnrReport, make_plan, scan_weights
from spectrum_peft.errors import CheckpointError, HubError, MismatchError, OptionError
from spectrum_peft.scan import check_report, find_report

MODEL, SHARED = "org/model", "someone/scans"


@pytest.fixture
def logged_in(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_report_and_a_plan_come_back_equal(kind: str, hub: StandIn, tiny_llama_folder: Path) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    commit = repo.branches["main"]
    report = scan_weights(MODEL)
    plan = make_plan(report, mode="spectrum", spectrum_ratio=0.5)
    sent = report.push_to_hub(SHARED, kind=kind)  # type: ignore[arg-type]
    plan.push_to_hub(SHARED, kind=kind)  # type: ignore[arg-type]
    assert sent.files == (f"spectrum_reports/org--model/{commit}/spectrum.json",)
    assert sent.commit in hub.repos[f"{kind}s", SHARED].commits and sent.commit in sent.url
    where = {"model_id": MODEL, "kind": kind}
    assert SnrReport.from_hub(SHARED, **where) == SnrReport.from_hub(SHARED, commit=commit, **where) == report
    assert (
        Plan.from_hub(SHARED, **where) == Plan.from_hub(SHARED, mode="spectrum", criterion="spectrum", **where) == plan
    )
    assert report.push_to_hub(SHARED, kind=kind).commit == hub.repos[f"{kind}s", SHARED].branches["main"]  # type: ignore[arg-type]


@pytest.mark.usefixtures("logged_in")
def test_what_is_not_there_and_what_is_there_twice(hub: StandIn, tiny_llama_folder: Path) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    report = scan_weights(MODEL)
    report.push_to_hub(SHARED)
    with pytest.raises(HubError, match=r"someone/scans: has no snr report of org/modle.* Did you mean 'org/model'"):
        SnrReport.from_hub(SHARED, model_id="org/modle")
    with pytest.raises(
        HubError, match=r"has no snr report of someone/scans\. It has those of org/model: name the model"
    ):
        SnrReport.from_hub(SHARED)
    with pytest.raises(HubError, match=f"It has those of {report.revision}"):
        SnrReport.from_hub(SHARED, model_id=MODEL, commit="0" * 40)
    with pytest.raises(HubError, match="has no snr report by 'mp'"):
        SnrReport.from_hub(SHARED, model_id=MODEL, criterion="mp")
    repo.commit({"README.md": Blob(b"new")})
    scan_weights(MODEL).push_to_hub(SHARED)
    with pytest.raises(OptionError, match="has 2 of org/model, wanted one"):
        SnrReport.from_hub(SHARED, model_id=MODEL)
    assert SnrReport.from_hub(SHARED, model_id=MODEL, commit=report.revision) == report
    moved = f"spectrum_reports/org--model/{'1' * 40}/spectrum.json"
    other = hub.repos["models", SHARED]
    other.commit({moved: next(iter(other.head.values()))})
    with pytest.raises(CheckpointError, match=r"is of org/model at .*, wanted org/model at 1111.*, as its place says"):
        SnrReport.from_hub(SHARED, model_id=MODEL, commit="1" * 40)


def test_a_report_of_a_folder_is_pushed_under_a_name_only(
    hub: StandIn, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = scan_weights(tiny_llama_folder)
    report = dataclasses.replace(report, notes=(f"with the adapter in {tiny_llama_folder} applied", "a plain note"))
    with pytest.raises(OptionError, match="give it as ORG/MODEL"):
        report.push_to_hub(SHARED)
    with pytest.raises(HubError, match="nobody is logged in"):
        report.push_to_hub(SHARED, model_id=MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    path = report.push_to_hub(SHARED, model_id=MODEL).files[0]
    assert path.startswith(f"spectrum_reports/org--model/content-{report.fingerprint.content[:12]}/")  # type: ignore[index]
    assert str(tiny_llama_folder).encode() not in hub.repos["models", SHARED].head[path].read()
    back = SnrReport.from_hub(SHARED, model_id=MODEL)
    assert back.scores == report.scores and back.notes == ("a plain note",)


@pytest.mark.usefixtures("logged_in")
def test_a_report_of_a_part_does_not_take_the_place_of_the_whole(hub: StandIn, tiny_llama_folder: Path) -> None:
    hub.add(MODEL, tiny_llama_folder)
    whole = scan_weights(MODEL)
    whole.push_to_hub(SHARED)
    scan_weights(MODEL, kinds="q_proj").push_to_hub(SHARED)
    assert SnrReport.from_hub(SHARED, model_id=MODEL) == whole


# --- reports that are believed ---------------------------------------------------------------------------------------


def changed(folder: Path, to: Path) -> Path:
    """The same names and shapes, other values."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, to, {"format": "pt"})
    return to


@pytest.mark.usefixtures("logged_in")
def test_auto_takes_what_is_kept_then_the_models_repository_then_scans(
    hub: StandIn,
    tiny_llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    caplog.set_level(logging.INFO, "spectrum_peft")
    report = find_report(MODEL)  # neither: scanned and kept
    assert "has no report by 'spectrum' in its repository" in caplog.text
    assert report == scan_weights(MODEL)
    before = hub.files_read()
    assert find_report(MODEL) == report
    assert "taking the finished scan of the same weights" in caplog.text

    monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(tmp_path / "another machine"))
    report.push_to_hub(MODEL)  # makes a new commit, whose weights are the same
    assert repo.branches["main"] != report.revision
    caplog.clear()
    before = hub.files_read()
    assert find_report(MODEL) == report
    assert "taking the report in the repository of org/model: the report is of commit" in caplog.text
    # The header's 64 KiB and the report itself, and no tensor.
    assert hub.files_read() - before <= 64 * 1024 + len(report.text())

    repo.commit({"model.safetensors": Blob(changed(tiny_llama_folder, tmp_path / "changed.safetensors"))})
    caplog.clear()
    anew = find_report(MODEL)
    assert "is not used: the report does not belong to org/model: fingerprint content is" in caplog.text
    assert anew == scan_weights(MODEL) and anew.scores != report.scores


def test_check_report_says_what_it_could_compare(
    hub: StandIn, tiny_llama_folder: Path, tiny_gpt2_folder: Path, tmp_path: Path
) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    report = scan_weights(MODEL)
    assert "whose safetensors files are those of org/model" in check_report(report, MODEL)
    repo.commit({"README.md": Blob(b"new")})
    assert "whose safetensors files are those of org/model" in check_report(report, MODEL)
    local = scan_weights(tiny_llama_folder)
    assert "the first and last 64 KiB of each tensor agree" in check_report(local, MODEL)
    hub.add("org/other", tiny_gpt2_folder)
    with pytest.raises(MismatchError, match="does not belong to org/other: fingerprint structure"):
        check_report(report, "org/other")
    repo.commit({"model.safetensors": Blob(changed(tiny_llama_folder, tmp_path / "changed.safetensors"))})
    for some in (report, local):
        with pytest.raises(MismatchError, match="fingerprint content"):
            check_report(some, MODEL)
    with pytest.raises(MismatchError, match="fingerprint structure"):  # whatever commit it claims
        check_report(
            dataclasses.replace(scan_weights(tiny_gpt2_folder), model_id=MODEL, revision=report.revision), MODEL
        )


# --- published scans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_published_scans_are_imported_in_both_layouts(grouped: bool, hub: StandIn, tiny_llama_folder: Path) -> None:
    scores = scan_weights(tiny_llama_folder).scores
    modules = {name.removesuffix(".weight"): value for name, value in scores.items()}
    if grouped:
        kinds: dict[str, dict[str, float]] = {}
        for module, value in modules.items():
            kinds.setdefault(module.split(".", 3)[3], {})[module] = value
        text = json.dumps(kinds)
    else:
        text = json.dumps({m: {"snr": value, "type": m.split(".", 3)[3]} for m, value in modules.items()})
    file = "model_snr_results/snr_results_org-model.json"
    hub.add(MODEL, tiny_llama_folder)
    hub.add("someone/published", {file: text.encode()}, "datasets")
    found = SnrReport.from_hub("someone/published", model_id=MODEL, kind="dataset")
    assert found == SnrReport.from_hub("someone/published", file=file, model_id=MODEL, kind="dataset")
    assert found.scores == scores and found.fingerprint.source == "published" and found.model_id == MODEL
    assert "names and scores only" in check_report(found, MODEL)
    assert Plan.from_dict(make_plan(found, spectrum_ratio=0.5).to_dict()).trainable_names
    with pytest.raises(HubError, match=r"has no file .missing\.json"):
        SnrReport.from_hub("someone/published", file="missing.json", kind="dataset")


def test_a_published_scan_of_another_model_is_told_by_its_names(hub: StandIn, tiny_gpt2_folder: Path) -> None:
    text = json.dumps({"model.layers.0.self_attn.q_proj": {"snr": 1.0, "type": "self_attn.q_proj"}})
    hub.add("someone/published", {"snr_results_org-model.json": text.encode()})
    hub.add(MODEL, tiny_gpt2_folder)
    found = SnrReport.from_hub("someone/published", model_id=MODEL)
    with pytest.raises(MismatchError, match=r"it scores 'model.layers.0.self_attn.q_proj.weight', which that does not"):
        check_report(found, MODEL)
    assert "Used all the same" in check_report(found, MODEL, force=True)


def test_the_published_scans_themselves(hub: StandIn, shared: Path) -> None:
    files = {p.name: p for p in sorted((shared / "reference_snr").glob("snr_results_*.json"))}
    hub.add("someone/published", files, "datasets")
    for name, path in files.items():
        model = name.removeprefix("snr_results_").removesuffix(".json").replace("-", "/", 1)
        found = SnrReport.from_hub("someone/published", model_id=model, kind="dataset")
        assert found.scores == SnrReport.load(path).scores and found.model_id == model


def test_offline_nothing_is_asked(hub: StandIn, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    report = scan_weights(tiny_llama_folder)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        report.push_to_hub(SHARED, model_id=MODEL)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        SnrReport.from_hub(MODEL)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        find_report(MODEL)
    assert find_report(str(tiny_llama_folder)).scores == report.scores
    assert len(hub.requests) == 0
