"""The one place that asks the hub, through huggingface_hub: its tokens, cache and retries, HF_ENDPOINT and HF_HUB_OFFLINE.

asking   which commit a revision is and what files it has; refusals in words
ranges   bytes of a file of a commit, by HTTP ranges
sending  files into a repository, by one commit
finding  reports and plans in a repository, by model, commit and criterion
"""

from __future__ import annotations

from ..errors import HubError
from .asking import (
    HubFile,
    Kind,
    Snapshot,
    asked,
    cached_file,
    is_commit,
    is_hub_id,
    may_be_id,
    offline,
    patiently,
    resolve,
    small_file,
)
from .finding import Place, place, places, the_one
from .ranges import STOP, RangeReader
from .sending import Sent, send

__all__ = [
    "STOP",
    "HubError",
    "HubFile",
    "Kind",
    "Place",
    "RangeReader",
    "Sent",
    "Snapshot",
    "asked",
    "cached_file",
    "is_commit",
    "is_hub_id",
    "may_be_id",
    "offline",
    "patiently",
    "place",
    "places",
    "resolve",
    "send",
    "small_file",
    "the_one",
]
