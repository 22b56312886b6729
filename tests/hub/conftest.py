"""The stand-in hub, and huggingface_hub turned to it as HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import StandIn


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A running stand-in with nothing in it; huggingface_hub asks it, with a cache of its own and no token."""
    from huggingface_hub import close_session, constants

    with StandIn() as server:
        # What variables of the environment set when huggingface_hub is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        where = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", where)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(tmp_path / "scans"))
        yield server
        close_session()
