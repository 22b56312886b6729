"""What goes to the hub of what was trained, merged or exported, and that the code it is pushed with loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_hub import StandIn

from spectrum_peft import (
    Plan,
    SpectrumConfig,
    load_model_with_spectrum,
    make_plan,
    merge_into_base,
    push_folder,
    scan_weights,
)
from spectrum_peft.cli.main import main
from spectrum_peft.errors import CheckpointError, HubError, OptionError
from spectrum_peft.push import own_files
from spectrum_peft.records import PLAN_FILE, REPORT_FILE, SnrReport

BASE, TO = "org/base", "someone/tuned"
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(autouse=True)
def logged_in(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")


@pytest.fixture
def adapter(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A folder as a run leaves it, with much that is not to leave the machine."""
    from spectrum_peft.card import write_card

    report = scan_weights(tiny_llama_folder)
    config = SpectrumConfig(mode="alors", r=2, spectrum_ratio=0.5, task_type="CAUSAL_LM", report=report)
    model, tokenizer = load_model_with_spectrum(str(tiny_llama_folder), config, dtype="float32")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "tuned"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.active_peft_config.plan.save(folder / PLAN_FILE)
    report.save(folder / REPORT_FILE)
    write_card(folder)
    for name in (
        "training_args.bin", "train_results.json", "data.jsonl", ".env", "loss.png", "runs/events.out", "__pycache__/x.pyc",
        ".cache/huggingface/x", "checkpoint-2/optimizer.pt", "checkpoint-2/trainer_state.json", "pytorch_model.bin",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def runs(code: str) -> Any:
    """The model that a snippet loads."""
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["tokenizer"]("a")
    return names["model"].eval()


def test_an_adapter_goes_with_its_records_and_nothing_else(
    hub: StandIn, adapter: Path, tiny_llama_folder: Path
) -> None:
    hub.add(BASE, tiny_llama_folder)
    with pytest.raises(
        OptionError, match=r"its base is '/.*', a folder that nobody else has; base='ORG/NAME' names it on the hub"
    ):
        push_folder(adapter, TO)
    before = {p: p.read_bytes() for p in adapter.rglob("*") if p.is_file()}
    pushed = push_folder(adapter, TO, base=BASE)
    head = hub.repos["models", TO].head
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", PLAN_FILE, REPORT_FILE} <= set(head)
    assert not {n for n in head if n.startswith((".", "runs", "check", "__", "train", "data", "pytorch", "loss"))}
    assert set(pushed.sent.files) == set(head) and {"training_args.bin", "runs", ".env", "checkpoint-2"} <= set(
        pushed.left
    )
    for name, blob in head.items():
        assert str(tiny_llama_folder).encode() not in blob.read(), name
    card = head["README.md"].read().decode()
    assert f"\n# {TO}\n" in card and f'from_pretrained("{TO}")' in card and f"base_model: {BASE}" in card
    assert {p: p.read_bytes() for p in adapter.rglob("*") if p.is_file()} == before
    from spectrum_peft.tuner.loading import load_trained

    there, here = runs(pushed.snippet), load_trained(str(adapter), dtype="float32")[0]
    assert torch.equal(there(TOKENS).logits, here(TOKENS).logits)


def test_checkpoints_go_only_when_they_are_asked_for(adapter: Path, hub: StandIn) -> None:
    files, left = own_files(adapter, checkpoints=True)
    assert {"checkpoint-2/optimizer.pt", "checkpoint-2/trainer_state.json"} <= set(files) and "checkpoint-2" not in left
    assert not any("checkpoint" in name for name in own_files(adapter)[0])


def test_an_upload_that_broke_goes_on(hub: StandIn, adapter: Path) -> None:
    hub.troubles.refuse_uploads = 1
    with pytest.raises(HubError, match="someone/tuned"):
        push_folder(adapter, TO, base=BASE)
    assert hub.repos["models", TO].head == {}
    push_folder(adapter, TO, base=BASE)
    uploads = [r for r in hub.requests if r.method == "PUT"]
    assert len(uploads) == 2 and "adapter_model.safetensors" in hub.repos["models", TO].head
    commits = len(hub.repos["models", TO].commits)
    push_folder(adapter, TO, base=BASE)
    assert [r for r in hub.requests if r.method == "PUT"] == uploads  # what is there is not sent again
    assert len(hub.repos["models", TO].commits) == commits


def test_a_merge_goes_and_its_code_loads_it(
    hub: StandIn, adapter: Path, tmp_path: Path, tiny_llama_folder: Path
) -> None:
    merge_into_base(adapter, None, tmp_path / "merged")
    pushed = push_folder(tmp_path / "merged", TO, private=True)
    assert hub.repos["models", TO].token == "hf_ours"
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(pushed.sent.files)
    assert str(tiny_llama_folder) not in hub.repos["models", TO].head["README.md"].read().decode()
    from transformers import AutoModelForCausalLM

    here = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(runs(pushed.snippet)(TOKENS).logits, here(TOKENS).logits)


def test_an_edited_card_stays_edited(hub: StandIn, adapter: Path) -> None:
    text = (adapter / "README.md").read_text()
    (adapter / "README.md").write_text(text + "\nWritten by hand.\n")
    push_folder(adapter, TO, base=BASE)
    assert "Written by hand." in hub.repos["models", TO].head["README.md"].read().decode()


@pytest.mark.parametrize("mode", ["spectrum", "lora"])
def test_a_model_in_memory_pushes_itself(mode: str, hub: StandIn, tiny_llama_folder: Path) -> None:
    hub.add(BASE, tiny_llama_folder)
    report = scan_weights(BASE)
    how: dict[str, Any] = {"r": 2} if mode == "lora" else {"spectrum_ratio": 0.5}
    config = SpectrumConfig(mode=mode, task_type="CAUSAL_LM", report=report, **how)
    model, _ = load_model_with_spectrum(BASE, config, dtype="float32")
    pushed = model.push_to_hub(TO)
    head = hub.repos["models", TO].head
    assert {PLAN_FILE, REPORT_FILE, "README.md", "tokenizer.json"} <= set(head)
    assert not {n for n in head if n.endswith((".bin", ".pt", ".py"))}
    assert Plan.from_dict(__import__("yaml").safe_load(head[PLAN_FILE].read())).mode == mode
    assert torch.equal(runs(pushed.snippet)(TOKENS).logits, model.eval()(TOKENS).logits)


def test_train_pushes_what_it_wrote(hub: StandIn, tiny_llama_folder: Path, tmp_path: Path, capsys: Any) -> None:
    hub.add(BASE, tiny_llama_folder)
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", str(tmp_path / "rows.jsonl"), "--mode", "spectrum", "--ratio", "0.5", "--max-steps", "1"]
    flags += [
        "--report",
        "auto",
        "--push-to-hub",
        "--use-cpu",
        "--dtype",
        "float32",
        "--save-strategy",
        "steps",
        "--save-steps",
        "1",
    ]
    assert main(["train", "--model", BASE, "--output-dir", str(tmp_path / "tuned"), *flags]) == 0
    said = capsys.readouterr().out
    head = hub.repos["models", "me/tuned"].head
    assert {"config.json", "model.safetensors", "README.md", PLAN_FILE, REPORT_FILE} <= set(head)
    assert not {n for n in head if n.endswith((".bin", ".pt")) or n.startswith(("checkpoint", "train"))}
    assert len(hub.repos["models", "me/tuned"].commits) == 2  # the empty one and ours
    assert "left here: checkpoint-1" in said
    code = said[said.index("from transformers import") :].partition("\ntrained ")[0]
    assert runs(code)(TOKENS).logits.shape[-1] == 264
    assert str(tmp_path).encode() not in b"".join(
        blob.read() for name, blob in head.items() if "safetensors" not in name
    )


def test_an_adapter_on_a_folder_is_refused_before_it_trains(
    hub: StandIn, tiny_llama_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c"}\n' * 4)
    flags = [
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--mode",
        "lora",
        "--push-to-hub",
        "--use-cpu",
        "--dtype",
        "float32",
    ]
    assert main(["train", "--model", str(tiny_llama_folder), "--output-dir", str(tmp_path / "out"), *flags]) == 2
    assert "--push-to-hub: an adapter on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_verb_pushes_folders_reports_and_plans(
    hub: StandIn, adapter: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["push", str(adapter), "--base", BASE]) == 0
    assert "adapter_model.safetensors" in hub.repos["models", "me/tuned"].head
    report = scan_weights(tiny_llama_folder)
    report.save(tmp_path / "report.json")
    make_plan(report, spectrum_ratio=0.5).save(tmp_path / "plan.yaml")
    for file in ("report.json", "plan.yaml"):
        assert main(["push", str(tmp_path / file), "--to", TO, "--model-id", BASE, "--repo-type", "dataset"]) == 0
    assert SnrReport.from_hub(TO, model_id=BASE, kind="dataset").scores == report.scores
    assert Plan.from_hub(TO, model_id=BASE, kind="dataset").mode == "spectrum"
    capsys.readouterr()
    for words, said in {
        ("push", str(adapter), "--model-id", BASE): "--model-id and --repo-type are for reports and plans",
        ("push", str(tmp_path / "report.json")): "--to",
        ("push", str(tmp_path / "plan.yaml"), "--to", "no id", "--model-id", BASE): "wanted ORG/NAME",
        ("push", str(tmp_path / "nowhere")): "no such folder",
    }.items():
        assert main(list(words)) == 2
        assert said in capsys.readouterr().err


def test_a_link_out_of_the_folder_is_not_sent(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (adapter / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointError, match=r"merges\.txt: is a link out of its folder, to .*secret, which is not copied"
    ):
        push_folder(adapter, TO)
    shutil.rmtree(adapter)


def test_what_is_no_result_is_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        push_folder(tmp_path / "empty", TO)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json and no adapter_model\.safetensors"):
        push_folder(adapter, TO)
    shutil.rmtree(adapter)


def test_nothing_is_tried_offline_or_by_nobody(hub: StandIn, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    for to in (TO, None):
        with pytest.raises(HubError, match="nobody is logged in"):
            push_folder(adapter, to, base=BASE)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for to in (TO, None):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
            push_folder(adapter, to, base=BASE)
    assert len(hub.requests) == 0
