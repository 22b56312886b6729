"""What the cache keeps and what is removed from it; scans that are kept are tested in test_scan.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_peft.errors import OptionError
from spectrum_peft.scan import cache_sizes, clear_cache, scan_weights
from spectrum_peft.scan.cache import PartialResults
from spectrum_peft.scan.svd import cached_svd


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(tmp_path / "cache"))
    for kind in ("reports", "svd", "letters"):
        (tmp_path / "cache" / kind).mkdir(parents=True)
        (tmp_path / "cache" / kind / "one").write_text("12345")
    return tmp_path / "cache"


def test_only_our_own_kinds_are_counted_and_removed(cache: Path) -> None:
    """The folder may be named wrongly, a home for one."""
    assert cache_sizes() == {"reports": 5, "svd": 5}
    with pytest.raises(OptionError, match=r"'letters' is not kept in .*cache\. Known: 'reports', 'svd'"):
        clear_cache(["letters"])
    clear_cache(["svd"])
    assert sorted(path.name for path in cache.iterdir()) == ["letters", "reports"]
    clear_cache()
    assert (cache / "letters" / "one").is_file() and not (cache / "reports").exists()


def test_what_a_link_leads_to_is_not_removed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (cache / "models").symlink_to(tmp_path / "other")
    with pytest.raises(OptionError, match=r"models: is a link, to .*other; remove what is kept there yourself"):
        clear_cache()
    assert (tmp_path / "other").is_dir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_the_place_of_a_file_is_gone_around(
    cache: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To open one is to wait for whoever opens its other end."""
    matrix = torch.randn(6, 4)
    wanted = cached_svd(matrix, 2, cache / "svd")
    [file] = (cache / "svd").glob("*.safetensors")
    file.unlink()
    os.mkfifo(file)
    assert torch.equal(cached_svd(matrix, 2, cache / "svd").values, wanted.values)
    report = scan_weights(str(tiny_llama_folder), cache=False)
    monkeypatch.setattr("spectrum_peft.scan.scan.PartialResults", _in_a_pipe)
    assert scan_weights(str(tiny_llama_folder), cache=False) == report
    assert caplog.text.count("a device or a pipe") == 2


def _in_a_pipe(path: Path, shapes: Any) -> PartialResults:
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    return PartialResults(path, shapes)
