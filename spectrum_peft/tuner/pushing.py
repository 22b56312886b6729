"""A model in memory, pushed with its plan, report and card: `model.push_to_hub` of what `load_model_with_spectrum` gives."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from ..card import write_card
from ..errors import OptionError, quoted
from ..hub import is_hub_id
from ..push import Pushed, push_folder
from ..records import PLAN_FILE, REPORT_FILE, Plan, SnrReport


def plan_of(model: Any) -> Plan | None:
    """The plan that a model carries out, which it carries with it."""
    found = getattr(getattr(model, "active_peft_config", None), "plan", None) or getattr(model, "spectrum_plan", None)
    return found if isinstance(found, Plan) else None


def push_model(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    report: SnrReport | None = None,
    base: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Push an adapter, or a model that trained real weights, with its plan, report and card; nothing else goes.

    Args:
        model: of `load_model_with_spectrum`, or any `PeftModel` or transformers model. repo_id: ORG/NAME.
        tokenizer, report: pushed too where they are given. base: hub id of the base of an adapter on a local folder.
        private, revision, commit_message, token: see `push_folder`.
    Raises:
        OptionError, HubError: see `push_folder`.
    """
    if not is_hub_id(repo_id):
        raise OptionError(f"the repository to push to is {quoted(repo_id)}, wanted ORG/NAME.")
    with tempfile.TemporaryDirectory(prefix="spectrum_peft_push_") as scratch:
        folder = Path(scratch) / repo_id.rpartition("/")[2]
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        plan = plan_of(model)
        if plan is not None:
            plan.save(folder / PLAN_FILE)
        if report is not None:
            report.save(folder / REPORT_FILE)
        write_card(folder)
        return push_folder(
            folder, repo_id, base=base, private=private, revision=revision, message=commit_message, token=token
        )


def give_push(model: Any, tokenizer: Any, report: SnrReport | None) -> None:
    """Make `model.push_to_hub(repo_id)` that of this file, with the tokenizer and the report at hand."""
    model.push_to_hub = partial(push_model, model, tokenizer=tokenizer, report=report)
