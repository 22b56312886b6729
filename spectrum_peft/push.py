"""What a run, a merge or an export wrote, into a repository of the hub: its own files and no others, in one commit.

What is sent is a list of names, so that nothing goes by accident: no caches, no trainer's state, no data, no paths of this
machine. Checkpoints with their optimizer's state go only when they are asked for.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hub
from .card import CARD, PICTURE, card_of, results_of, snippet
from .errors import CheckpointError, HubError, OptionError, no_such
from .records import BESIDE_FILE, PLAN_FILE, REPORT_FILE, Plan, SnrReport, own_file, read_mapping
from .weights import find_shards

WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
CONFIGS = ("adapter_config.json", "config.json", "generation_config.json", BESIDE_FILE)
TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
RECORDS = (CARD, PICTURE, PLAN_FILE, REPORT_FILE)
_PATH = re.compile(r"(?<![\w.:/])/[\w.-]+(?:/[\w.-]+)+")
# What may name the folder that the base lay in.
_TEXTS = frozenset({*CONFIGS, CARD, PLAN_FILE, REPORT_FILE, "tokenizer_config.json"})


@dataclass(frozen=True)
class Pushed:
    """What was pushed.

    Attributes:
        left: names at the folder's top that stayed here. snippet: code that loads what was pushed.
    """

    sent: hub.Sent
    left: tuple[str, ...]
    snippet: str

    def __str__(self) -> str:
        left = f"\nleft here: {', '.join(self.left)}" if self.left else ""
        return f"pushed {', '.join(self.sent.files)}\nto {self.sent.url}{left}\n\n{self.snippet}"


def own_files(folder: Path, checkpoints: bool = False) -> tuple[dict[str, Path], list[str]]:
    """(path in the repository -> file, names that stay here) of a folder that a run, a merge or an export wrote.

    Args:
        checkpoints: those of the trainer too, with the optimizer's state.
    Raises:
        CheckpointError: no such folder; neither an adapter nor a model in it, or not all of its shards; a link out of it.
    """
    if not folder.is_dir():
        raise CheckpointError(no_such("folder", folder))
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and not (folder / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"{folder}: has adapter_config.json and no adapter_model.safetensors.")
    if not adapter:
        find_shards(folder)
    there = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    patterns = (*WEIGHTS, *CONFIGS, *TOKENIZERS, *RECORDS)
    mine = [name for name in there if any(_is(name, pattern) for pattern in patterns)]
    if checkpoints:
        mine += [name for name in there if _is(name.partition("/")[0], "checkpoint-*") and "/" in name]
    left = sorted({name.partition("/")[0] for name in there} - {name.partition("/")[0] for name in mine})
    return {name: own_file(folder / name) for name in mine}, left


def _is(name: str, pattern: str) -> bool:
    """A `*` does not go over a `/`."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    base: str | None = None,
    checkpoints: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Push what a run, a merge or an export wrote.

    The card is sent with the repository's name in it; where a file names the folder that the base was trained from, its hub
    id stands instead. Nothing in the folder changes. After an upload that broke, the same call sends what is still missing.

    Args:
        repo_id: ORG/NAME; None for the folder's name under the user who is logged in. It is made where there is none.
        base: hub id of the base, for an adapter that was trained on a local folder.
        checkpoints: those of the trainer too, with the optimizer's state.
        private: of a repository that is made. revision: branch. message: of the commit. token: None for the stored one.
    Raises:
        CheckpointError: the folder holds nothing to push.
        OptionError: an adapter's base is a folder of this machine; the form of an id.
        HubError: offline, not logged in, no access, an upload that broke.
    """
    folder = Path(folder)
    files, left = own_files(folder, checkpoints)
    repo = repo_id or _own_repository(folder, token)
    adapter = read_mapping(folder / "adapter_config.json") if "adapter_config.json" in files else {}
    results = results_of(folder)
    plan = Plan.load(folder / PLAN_FILE) if PLAN_FILE in files else None
    if base is not None and not hub.is_hub_id(base):
        raise OptionError(f"base is {base!r}, wanted the hub id of the base, ORG/NAME.")
    trained_from = [adapter.get("base_model_name_or_path"), results.get("model"), plan.model_id if plan else None]
    if adapter and base is None and not is_on_hub(trained_from[0]):
        raise OptionError(
            f"{folder}: its base is {trained_from[0]!r}, a folder that nobody else has; base='ORG/NAME' names it on the hub."
        )
    instead = {str(folder.resolve()): repo, str(folder): repo}
    for path in trained_from:
        if path and not is_on_hub(str(path)):
            instead[str(path)] = base or Path(str(path)).name
    contents: dict[str, Path | bytes] = dict(files)
    for name in sorted(_TEXTS & files.keys()):
        before = files[name].read_text(encoding="utf-8")
        after = _named(before, instead, folder.name, repo, base) if name == CARD else _replaced(before, instead)
        if after != before:
            contents[name] = after.encode()
    if CARD not in files:
        picture = PICTURE if PICTURE in files else None
        shown = base or next((str(p) for p in trained_from if is_on_hub(p)), None)
        contents[CARD] = card_of(folder, results, plan, name=repo, picture=picture, base=shown).encode()
    said = message or f"{'adapter' if adapter else 'model'} trained with spectrum_peft"
    sent = hub.send(contents, repo, message=said, private=private, revision=revision, token=token)
    return Pushed(
        sent, tuple(left), snippet(folder, repo, base or next((str(p) for p in trained_from if is_on_hub(p)), None))
    )


def push_record(path: str | os.PathLike[str], repo_id: str, *, model_id: str | None = None, **how: Any) -> hub.Sent:
    """Push a report or a plan that was saved; see `SnrReport.push_to_hub`.

    Raises:
        CheckpointError: the file is neither.
    """
    kind = read_mapping(path).get("record")
    record: Plan | SnrReport = Plan.load(path) if kind == "plan" else SnrReport.load(path)
    return record.push_to_hub(repo_id, model_id=model_id, **how)


def is_on_hub(name: Any) -> bool:
    """Whether a base is named by a hub id: with an organization, or one of the old ones without."""
    return isinstance(name, str) and (hub.is_hub_id(name) or hub.is_hub_id(f"x/{name}")) and not Path(name).exists()


def _own_repository(folder: Path, token: str | None) -> str:
    from huggingface_hub import HfApi, get_token

    if hub.offline() or (token or get_token()) is None:
        why = (
            "HF_HUB_OFFLINE forbids to ask the hub"
            if hub.offline()
            else "nobody is logged in (hf auth login, or HF_TOKEN)"
        )
        raise HubError(f"{folder}: nothing is pushed, {why}.")
    with hub.asked(folder.resolve().name):
        return f"{hub.patiently(lambda: HfApi(token=token).whoami())['name']}/{folder.resolve().name}"


def _replaced(text: str, instead: Mapping[str, str]) -> str:
    """A text without the folders' names, longest first, as they stand in JSON too."""
    for path in sorted(instead, key=len, reverse=True):
        if os.sep in path:  # a plain word may mean anything
            for form in (path, json.dumps(path)[1:-1]):
                text = text.replace(form, instead[path])
    return text


def _named(card: str, instead: Mapping[str, str], name: str, repo: str, base: str | None) -> str:
    """The card, whoever has edited it, with the repository's name in its title and its code, and the base's in its metadata;
    of other folders and files of this machine only their names."""
    card = _PATH.sub(lambda m: Path(m[0]).name if Path(m[0]).exists() else m[0], _replaced(card, instead))
    head, _, rest = card.removeprefix("---\n").partition("\n---\n")
    if base is not None and card.startswith("---\n") and not re.search(r"^base_model:", head, re.MULTILINE):
        card = f"---\nbase_model: {base}\n{head}\n---\n{rest}"
    card = card.replace(f"\n# {name}\n", f"\n# {repo}\n").replace(json.dumps(name), json.dumps(repo))
    return card.replace("  # its base is looked for where it was trained from", "")
