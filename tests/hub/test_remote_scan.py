"""Scans of a repository over HTTP, by huggingface_hub's own client against the stand-in: the same report as of the files."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_in_hub import Blob, StandIn

from spectrum_peft import make_plan, scan_weights
from spectrum_peft.errors import CheckpointError, HubError, OptionError
from spectrum_peft.hub import ranges
from spectrum_peft.records import SnrReport
from spectrum_peft.weights import neighbours, open_weights

MODEL = "org/model"
WEIGHTS = "model.safetensors"


def sharded(folder: Path, to: Path) -> Path:
    """The checkpoint in two shards with an index."""
    to.mkdir()
    shutil.copy(folder / "config.json", to)
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, to / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


def same(remote: SnrReport, local: SnrReport) -> bool:
    """Equal in all but where they came from."""
    return dataclasses.replace(remote, model_id=None, revision=None) == dataclasses.replace(local, model_id=None)


@pytest.fixture
def moe_folder(tmp_path: Path) -> Path:
    """Mixtral: its experts are stored one by one, and the class fuses them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter waits after a connection broke."""
    monkeypatch.setattr(ranges, "_FIRST_WAIT", 0.01)


def test_a_single_file_gives_the_report_of_the_folder(hub: StandIn, tiny_llama_folder: Path) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    report = scan_weights(MODEL)
    assert same(report, scan_weights(tiny_llama_folder))
    assert (report.model_id, report.revision) == (MODEL, repo.branches["main"])
    assert report.fingerprint.content is not None


def test_shards_and_a_branch(hub: StandIn, tiny_llama_folder: Path, tiny_gpt2_folder: Path, tmp_path: Path) -> None:
    repo = hub.add(MODEL, tiny_gpt2_folder)
    folder = sharded(tiny_llama_folder, tmp_path / "sharded")
    commit = repo.commit({p.name: Blob(p) for p in folder.iterdir()}, branch="other", keep=False)
    report = scan_weights(MODEL, revision="other")
    assert same(report, scan_weights(folder)) and report.revision == commit
    assert scan_weights(MODEL, revision=commit).revision == commit


@pytest.mark.parametrize("name", ["tiny_llama_tied_folder", "tiny_gpt2_folder", "moe_folder"])
def test_tied_tensors_transposed_matrices_and_experts(name: str, hub: StandIn, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    hub.add(MODEL, folder)
    report = scan_weights(MODEL)
    assert same(report, scan_weights(folder))
    assert bool(report.tied) == ("tied" in name or "gpt2" in name)


def test_what_is_read_is_what_is_scored_and_the_ends_of_the_rest(hub: StandIn, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(512, 384) for i in range(4)}
    tensors["model.embed_tokens.weight"] = torch.randn(4096, 384)
    save_file(tensors, tmp_path / WEIGHTS)
    hub.add(MODEL, {WEIGHTS: tmp_path / WEIGHTS})
    report = scan_weights(MODEL)
    scored = sum(4 * s.numel for s in report.stats if s.score is not None)
    # The header's first request asks for 64 KiB, and 64 KiB of each end of the table are part of the fingerprint.
    assert scored < hub.files_read() <= scored + 3 * 64 * 1024
    assert hub.files_read() < 0.5 * (tmp_path / WEIGHTS).stat().st_size + scored / 2
    kept = [p for p in (tmp_path / "hub_cache").rglob("*") if p.is_file() and p.stat().st_size > 1 << 16]
    assert kept == []


def ranges_asked(hub: StandIn) -> int:
    return sum(r.status == 206 for r in hub.requests)


def test_neighbours_come_by_one_request(hub: StandIn, moe_folder: Path, tmp_path: Path) -> None:
    """A mixture stores three tensors for each expert, which the class puts together in another order."""
    hub.add(MODEL, moe_folder)
    report = scan_weights(MODEL)
    assert same(report, scan_weights(moe_folder))
    # The header; one run of all that is scored, with the norms between; the embeddings, the head and the last norm at the
    # file's ends, which the fingerprint asks for.
    assert ranges_asked(hub) == 5 < len(report.scores) == 20
    # A header of less than 64 KiB comes with what follows it.
    assert hub.files_read() <= sum(4 * s.numel for s in report.stats) + 64 * 1024 + 2048
    torn = sharded(moe_folder, tmp_path / "sharded")  # an expert's gate in one file, its up in the other
    hub.add("org/torn", torn)
    assert same(scan_weights("org/torn"), scan_weights(torn))


def test_a_request_for_neighbours_has_a_limit(hub: StandIn, moe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_MOST", 40_000)
    hub.add(MODEL, moe_folder)
    assert same(scan_weights(MODEL), scan_weights(moe_folder))
    sizes = [r.sent for r in hub.requests if r.status == 206][1:]
    expert = 3 * 4 * 32 * 48  # gate and up lie around down, and come in one piece
    assert 2 * expert <= max(sizes) <= 40_000 and len(sizes) >= 6


def test_a_run_that_is_cut_goes_on_where_it_was(hub: StandIn, moe_folder: Path) -> None:
    hub.add(MODEL, moe_folder)
    open_weights(MODEL, download=False)
    hub.troubles.cuts, hub.troubles.cut_after = 7, 9_000
    assert same(scan_weights(MODEL), scan_weights(moe_folder))
    assert hub.troubles.cuts == 0


def test_kinds_and_layers_read_only_what_they_name(hub: StandIn, tiny_llama_folder: Path, tmp_path: Path) -> None:
    hub.add(MODEL, tiny_llama_folder)
    whole = scan_weights(tiny_llama_folder)
    part = scan_weights(MODEL, kinds="q_proj,mlp.down_proj", layers="1-2")
    names = {f"model.layers.{i}.{k}.weight" for i in (1, 2) for k in ("self_attn.q_proj", "mlp.down_proj")}
    assert part.scores == {name: whole.scores[name] for name in whole.scores if name in names} and len(names) == 4
    assert len(part.stats) == len(whole.stats) and part.fingerprint.content is None
    assert part.fingerprint.structure == whole.fingerprint.structure
    size = sum(4 * s.numel for s in part.stats if s.score is not None)
    assert hub.files_read() <= size + 64 * 1024 + (tiny_llama_folder / "config.json").stat().st_size
    local = scan_weights(tiny_llama_folder, kinds=["q_proj", "mlp.down_proj"], layers=[1, 2])
    assert local.scores == part.scores and local.fingerprint == whole.fingerprint
    assert any("only matrices of the kinds q_proj, mlp.down_proj in the layers 1-2" in note for note in part.notes)


def test_a_plan_of_a_part_chooses_in_that_part(tiny_llama_folder: Path) -> None:
    report = scan_weights(tiny_llama_folder, kinds="q_proj,down_proj", layers="2-3")
    plan = make_plan(report, mode="spectrum", spectrum_ratio=0.5)
    assert {e.name for e in plan.entries} == set(report.scores) and len(plan.trainable_names) == 2
    assert "24 matrices were not scored: no candidates, they stay frozen." in plan.notes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kinds": "q_prj"}, "kinds names 'q_prj'.*'q_proj'"),
        ({"layers": "0-9"}, "layers names 4; this model has layers 0-3"),
        ({"layers": "3-1"}, "layers is '3-1'"),
        ({"layers": [True]}, "layers is"),
        ({"kinds": ","}, "kinds is ','"),
        ({"kinds": "lm_head"}, "nothing to score"),
    ],
)
def test_limits_that_name_nothing_are_refused(given: dict[str, Any], said: str, tiny_llama_folder: Path) -> None:
    with pytest.raises(OptionError, match=said):
        scan_weights(tiny_llama_folder, **given)


# --- a line that is not good -----------------------------------------------------------------------------------------


def cut(hub: StandIn) -> None:
    hub.troubles.cuts, hub.troubles.cut_after = 9, 5_000


def busy(hub: StandIn) -> None:
    hub.troubles.busy = 1  # with `Retry-After: 0`, huggingface_hub waits for a second


def broken(hub: StandIn) -> None:
    hub.troubles.broken = 1


def slow(hub: StandIn) -> None:
    hub.troubles.delay = 0.005


@pytest.mark.parametrize("trouble", [cut, busy, broken, slow])
def test_trouble_that_passes_does_not_show(
    trouble: Callable[[StandIn], None], hub: StandIn, tiny_llama_folder: Path
) -> None:
    hub.add(MODEL, tiny_llama_folder)
    open_weights(MODEL, download=False)  # the small files are in the cache, so that the trouble is the weights'
    trouble(hub)
    assert same(scan_weights(MODEL), scan_weights(tiny_llama_folder))
    assert (hub.troubles.cuts, hub.troubles.busy, hub.troubles.broken) == (0, 0, 0)


def test_after_a_cut_only_the_rest_is_asked_for(hub: StandIn, tiny_llama_folder: Path) -> None:
    hub.add(MODEL, tiny_llama_folder)
    source = open_weights(MODEL, download=False)
    hub.troubles.cuts, hub.troubles.cut_after = 1, 5_000
    before = hub.files_read()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.read(name), load_file(tiny_llama_folder / WEIGHTS)[name])
    assert hub.files_read() - before == 64 * 128 * 4


def test_a_line_that_stays_dead_is_given_up_and_the_scan_goes_on_later(
    hub: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    save_file({f"layers.{i}.mlp.up_proj.weight": torch.randn(512, 384) for i in range(8)}, tmp_path / WEIGHTS)
    hub.add(MODEL, {WEIGHTS: tmp_path / WEIGHTS})
    # The header and five matrices of the eight that come together, then nothing any more.
    hub.troubles.dead_after, hub.troubles.cuts, hub.troubles.cut_after = 2, 1, 5 * 4 * 512 * 384
    with pytest.raises(HubError, match=r"the connection broke 6 times in a row.*the same command goes on from there"):
        scan_weights(MODEL, jobs=1)
    for thread in threading.enumerate():
        if thread.name.startswith("ahead"):
            thread.join(30)
            assert not thread.is_alive()
    hub.troubles.dead_after = None
    before = hub.files_read()
    with caplog.at_level(logging.INFO, "spectrum_peft"):
        report = scan_weights(MODEL, jobs=1)
    done = int(re.search(r"going on with a stopped scan: (\d) of 8", caplog.text)[1])  # type: ignore[index]
    assert 1 <= done <= 5
    assert same(report, scan_weights(tmp_path / WEIGHTS))
    # Of a matrix that is done, only its ends come again, for the fingerprint.
    assert hub.files_read() - before <= (8 - done) * 4 * 512 * 384 + (1 + 2 * done) * 64 * 1024


def test_a_server_that_ignores_ranges_is_refused_before_its_bytes_come(hub: StandIn, tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4096, 1024)}, tmp_path / WEIGHTS)
    hub.add(MODEL, {WEIGHTS: tmp_path / WEIGHTS})
    hub.troubles.ignore_ranges = True
    with pytest.raises(HubError, match=r"ignores ranges .*status 200, wanted 206.*download=True"):
        scan_weights(MODEL)


def test_a_wrong_etag_is_refused(hub: StandIn, tiny_llama_folder: Path) -> None:
    hub.add(MODEL, tiny_llama_folder)
    open_weights(MODEL, download=False)
    hub.troubles.wrong_etag = True
    with pytest.raises(HubError, match=r"model.safetensors: its etag is .0000.*wanted"):
        scan_weights(MODEL)


def test_a_shard_that_changes_between_two_reads_is_refused(hub: StandIn, tiny_llama_folder: Path) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    source = open_weights(MODEL, download=False)
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    source.read(first)
    changed = bytearray((tiny_llama_folder / WEIGHTS).read_bytes())
    changed[-1] ^= 1
    repo.commits[repo.branches["main"]][WEIGHTS] = Blob(bytes(changed))
    with pytest.raises(HubError, match="the file changed, or another one is sent; nothing of it is used"):
        source.read(second)


def test_a_new_commit_during_a_scan_is_not_seen(hub: StandIn, tiny_llama_folder: Path) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    source = open_weights(MODEL, download=False)
    name = "model.layers.0.mlp.up_proj.weight"
    changed = {n: t + 1 for n, t in load_file(tiny_llama_folder / WEIGHTS).items()}
    save_file(changed, tiny_llama_folder.parent / "changed.safetensors")
    repo.commit({WEIGHTS: Blob(tiny_llama_folder.parent / "changed.safetensors")})
    assert torch.equal(source.read(name), load_file(tiny_llama_folder / WEIGHTS)[name])
    assert source.revision != repo.branches["main"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_gated_private_missing_and_pickles_each_say_so(
    hub: StandIn, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", tiny_llama_folder, gated=True)
    hub.add("org/private", tiny_llama_folder, token="hf_ours")
    hub.add("org/pickles", {"pytorch_model.bin": b"cos\nsystem\n", "config.json": b"{}"})
    hub.add("org/gguf", {"model-q4.gguf": b"GGUF"})
    hub.add("org/nothing", {"README.md": b""})
    for name, said in {
        "org/gated": f"is gated: accept its terms at {hub.url}/org/gated and log in; no token was sent",
        "org/private": "it is missing, or private",
        "org/missing": "it is missing, or private",
        "org/pickles": r"holds only pickle files \(pytorch_model.bin\), which are not read: opening one runs the code",
        "org/gguf": "give the GGUF file itself",
        "org/nothing": "no safetensors file",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            scan_weights(name)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(
        HubError,
        match="and the hub has no such repository, or it is private and the token that was sent may not",
    ):
        scan_weights("org/private")
    with pytest.raises(HubError, match="the token that was sent has no access"):
        scan_weights("org/gated")
    hub.add(MODEL, tiny_llama_folder)
    with pytest.raises(HubError, match="no revision 'v9'"):
        scan_weights(MODEL, revision="v9")
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    assert scan_weights("org/private").scores
    # The storage behind the hub is another host: the token stays with the hub.
    assert {r.token for r in hub.requests if r.path.startswith("/cdn/")} == {None}


def test_a_hub_that_is_not_there(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the hub cannot be reached \(http://127.0.0.1:9"):
        scan_weights(MODEL)


def test_a_damaged_header_names_file_and_tensor(hub: StandIn, tiny_llama_folder: Path) -> None:
    whole = (tiny_llama_folder / WEIGHTS).read_bytes()
    hub.add(MODEL, {WEIGHTS: whole[:-100]})
    with pytest.raises(CheckpointError, match=r"org/model/model.safetensors: tensor .* it is truncated"):
        scan_weights(MODEL)


# --- what is stored here ---------------------------------------------------------------------------------------------


def test_download_stores_the_files_and_the_next_scan_reads_them(hub: StandIn, tiny_llama_folder: Path) -> None:
    repo = hub.add(MODEL, tiny_llama_folder)
    report = scan_weights(MODEL, download=True)
    assert same(report, scan_weights(tiny_llama_folder)) and report.revision == repo.branches["main"]
    before = hub.files_read()
    assert scan_weights(MODEL).scores == report.scores
    assert hub.files_read() == before


def test_offline_asks_nobody(hub: StandIn, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(MODEL, tiny_llama_folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not in the hub's cache, and HF_HUB_OFFLINE forbids to ask the hub"):
        scan_weights(MODEL)
    assert len(hub.requests) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    scan_weights(MODEL, download=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert same(scan_weights(MODEL), scan_weights(tiny_llama_folder))
    assert len(hub.requests) == asked > 0


def test_a_kept_scan_of_the_hub_is_found_again_with_the_files(hub: StandIn, tiny_llama_folder: Path) -> None:
    hub.add(MODEL, tiny_llama_folder)
    report = scan_weights(MODEL, cache=True)
    before = hub.files_read()
    assert scan_weights(MODEL, cache=True) == report
    assert hub.files_read() - before <= 64 * 1024
    kept = list((Path(tiny_llama_folder)).glob("*"))
    assert scan_weights(tiny_llama_folder, cache=True).scores == report.scores and kept


def test_an_adapter_of_the_hub_is_scanned_over_its_base(hub: StandIn, tiny_llama_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    local = scan_weights(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": MODEL}))
    hub.add(MODEL, tiny_llama_folder)
    hub.add("org/adapter", tmp_path / "adapter")
    assert scan_weights("org/adapter").scores == local.scores
