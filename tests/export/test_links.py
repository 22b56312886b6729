"""What lies beside the weights is copied into what people publish: nothing from elsewhere may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spectrum_peft.errors import CheckpointError
from spectrum_peft.export.folder import checked_out, copy_entry


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(folder of an adapter, folder of the export, a secret elsewhere)."""
    adapter, out, secret = tmp_path / "adapter", tmp_path / "out", tmp_path / "home" / "key"
    for folder in (adapter, out, secret.parent):
        folder.mkdir()
    secret.write_text("private")
    return adapter, out, secret


def test_a_link_out_of_the_folder_is_refused(places: tuple[Path, Path, Path]) -> None:
    adapter, out, secret = places
    (adapter / "tokenizer.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link out of its folder"):
        copy_entry(adapter / "tokenizer.json", out)
    assert list(out.iterdir()) == []


def test_a_folder_that_is_a_link_and_a_link_inside_a_folder_are_refused(places: tuple[Path, Path, Path]) -> None:
    adapter, out, secret = places
    (adapter / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        copy_entry(adapter / "additional_chat_templates", out)
    (adapter / "tokenizer_files").mkdir()
    (adapter / "tokenizer_files" / "a").symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        copy_entry(adapter / "tokenizer_files", out)


def test_a_pipe_is_refused_instead_of_waited_for(places: tuple[Path, Path, Path]) -> None:
    adapter, out, _ = places
    os.mkfifo(adapter / "tokenizer.json")
    with pytest.raises(CheckpointError, match="is neither a file nor a folder"):
        copy_entry(adapter / "tokenizer.json", out)


def test_a_snapshot_of_the_hub_is_copied_from_its_blobs_only(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, out, secret = places
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("tokens")
    (snapshot / "tokenizer.json").symlink_to(Path("..", "..", "blobs", "123"))
    copy_entry(snapshot / "tokenizer.json", out)
    assert (out / "tokenizer.json").read_text() == "tokens"
    assert not (out / "tokenizer.json").is_symlink()
    (blobs / "123").unlink()
    blobs.rmdir()
    blobs.symlink_to(secret.parent)  # a folder that only looks like a cache
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(blobs / "key")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        copy_entry(snapshot / "tokenizer.json", out)


def test_a_link_as_output_leads_to_the_folder(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, out, _ = places
    (tmp_path / "link").symlink_to(out)
    assert checked_out(tmp_path / "link") == out.resolve()
