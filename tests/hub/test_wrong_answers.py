"""A server that answers wrongly, or not at all: one line that says what, no wrong report, and no token to strangers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_in_hub import Blob, StandIn

from spectrum_peft import scan_weights
from spectrum_peft.cli.main import main
from spectrum_peft.errors import CheckpointError, HubError
from spectrum_peft.hub import ranges
from spectrum_peft.weights import open_weights

MODEL, WEIGHTS, INDEX = "org/model", "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited for, without the wait."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(ranges, "_FIRST_WAIT", 0.001)
    return waited


@pytest.mark.parametrize("status", [302, 303, 307, 308])
def test_the_token_does_not_follow_to_another_host(
    status: int, hub: StandIn, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    hub.add(MODEL, tiny_llama_folder, token="hf_ours")
    hub.troubles.redirect = status
    for download in (False, True):
        assert scan_weights(MODEL, kinds="q_proj", download=download).scores
    assert {r.token for r in hub.requests if "/resolve/" in r.path} == {"hf_ours"}
    assert {r.token for r in hub.requests if r.host == "localhost"} == {None}
    assert sum(r.host == "localhost" for r in hub.requests) >= 3


def test_a_token_that_is_not_known(
    hub: StandIn, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(MODEL, tiny_llama_folder)
    source = open_weights(MODEL, download=False)
    hub.troubles.tokens = frozenset({"hf_ours"})
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    said = r"the hub refuses \(401\): it takes the token for invalid \(hf auth login, HF_TOKEN\)"
    with pytest.raises(HubError, match=said):
        scan_weights(MODEL)
    with pytest.raises(HubError, match=said):  # it was revoked during the scan
        source.read("model.layers.0.mlp.up_proj.weight")
    assert main(["scan", MODEL]) == 2
    assert "hf_mistyped" not in capsys.readouterr().err


def test_a_repository_that_moved_is_followed(
    hub: StandIn, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    hub.add(MODEL, tiny_llama_folder, token="hf_ours")
    hub.moved["old/name"] = MODEL
    assert scan_weights("old/name").scores == scan_weights(MODEL).scores


@pytest.mark.usefixtures("waits")
def test_a_circle_of_redirects(hub: StandIn, tiny_llama_folder: Path) -> None:
    hub.add(MODEL, tiny_llama_folder)
    hub.troubles.circle = True
    with pytest.raises(
        HubError, match=rf"'org/model' at revision '[0-9a-f]+': the hub at {hub.url} redirects in a circle"
    ):
        scan_weights(MODEL)
    hub.moved["old/name"] = "old/name"
    with pytest.raises(HubError, match="redirects in a circle"):
        scan_weights("old/name")


def test_compressed_bytes_are_refused(hub: StandIn, tiny_llama_folder: Path) -> None:
    hub.add(MODEL, tiny_llama_folder)
    source = open_weights(MODEL, download=False)
    hub.troubles.compressed = True
    with pytest.raises(HubError, match=r"model.safetensors: the server sends it as gzip, wanted its bytes as they are"):
        source.read("model.layers.0.mlp.up_proj.weight")


def test_servers_that_fail_are_waited_for_and_given_up(
    hub: StandIn, tiny_llama_folder: Path, waits: list[float]
) -> None:
    hub.add(MODEL, tiny_llama_folder)
    hub.troubles.failing = (3, 500)
    assert scan_weights(MODEL).scores
    hub.troubles.limited = (1, 55)
    waits.clear()
    scan_weights(MODEL, kinds="q_proj")
    assert [w for w in waits if w > 50] == [55.5]  # until the window of the rate limit ends, and not before
    hub.troubles.failing = (99, 502)
    with pytest.raises(HubError, match=r"the hub refuses \(502\)"):
        scan_weights(MODEL)
    hub.troubles.failing, hub.troubles.broken = (0, 500), 999
    with pytest.raises(HubError, match=r"'org/model' at revision .*the hub refuses \(503\)"):
        scan_weights(MODEL)


# --- files that are not what they should be --------------------------------------------------------------------------


def header(rows: str, size: int = 0) -> bytes:
    return len(rows).to_bytes(8, "little") + rows.encode() + bytes(size)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty, wanted safetensors"),
        (b"\x10\x00", "not a safetensors file, or truncated"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "ask for a header of 1048576 bytes, the file has 10"),
        (header("{"), "its header"),
        (header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 2), "tensor 'a'.*truncated"),
        (
            header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
                   '"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', 8),
            "the key 'a' stands twice",
        ),
        (header('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', 4), "wanted 36"),
    ],
)  # fmt: skip
def test_headers_that_are_none(content: bytes, said: str, hub: StandIn) -> None:
    hub.add(MODEL, {WEIGHTS: content, "config.json": b"{}"})
    with pytest.raises(CheckpointError, match=rf"org/model/model.safetensors: .*{said}"):
        scan_weights(MODEL)


def test_an_index_that_does_not_fit_its_shards(hub: StandIn, tiny_llama_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama_folder / WEIGHTS)
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    first, second = shards
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    where = {name: file for file, part in shards.items() for name in part}
    files = {p.name: Blob(p) for p in tmp_path.glob("*.safetensors")}
    config = Blob((tiny_llama_folder / "config.json").read_bytes())

    def repository(name: str, where: dict[str, str], **changed: Blob | None) -> str:
        index = Blob(json.dumps({"metadata": {}, "weight_map": where}).encode())
        all_of_them = {INDEX: index, "config.json": config, **files, **changed}
        hub.add(name, {n: b for n, b in all_of_them.items() if b is not None})
        return name

    with pytest.raises(CheckpointError, match=rf"org/missing/{second}: no such file, but {INDEX} names it \(for '"):
        scan_weights(repository("org/missing", where, **{second: None}))
    with pytest.raises(CheckpointError, match=r"tensor 'more' should be in .*, and is not"):
        scan_weights(repository("org/more", {**where, "more": first}))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./other', wanted a plain file name"):
        scan_weights(repository("org/outside", {**where, "more": "../other"}))
    shutil.copy(tmp_path / first, tmp_path / "twice")
    with pytest.raises(CheckpointError, match=rf"{second}: tensor '{names[0]}' is also in {first}"):
        scan_weights(repository("org/twice", where, **{second: Blob(tmp_path / "twice")}))


def test_values_that_are_none_name_their_tensor(hub: StandIn, tmp_path: Path) -> None:
    values = torch.ones(8, 8)
    values[3, 4] = float("nan")
    save_file({"model.layers.0.mlp.up_proj.weight": values}, tmp_path / WEIGHTS)
    hub.add(MODEL, {WEIGHTS: tmp_path / WEIGHTS})
    with pytest.raises(CheckpointError, match=r"org/model: .*model.layers.0.mlp.up_proj.weight"):
        scan_weights(MODEL)
