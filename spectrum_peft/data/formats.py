"""Layouts of other projects' files, brought into `messages` or `prompt` and `completion`.

Sources: ShareGPT's `conversations` as FastChat reads them (lm-sys/FastChat, docs/training.md), with the role names of
hiyouga/LLaMA-Factory data/README.md; Alpaca's `instruction`, `input`, `output` (tatsu-lab/stanford_alpaca, README).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import DataError, near_matches, quoted

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "function_call": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
# Columns beside the format's own that it takes where they are there.
EXTRAS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("conversations",): ("system", "tools"),
    ("instruction", "output"): ("input", "system"),
    ("messages",): ("tools", "chat_template_kwargs"),
}


def converted(dataset: Dataset, chosen: tuple[str, ...], source: str) -> tuple[Dataset, tuple[str, ...]]:
    """Rows of a format as rows of a standard one.

    Returns:
        (rows, names of the standard columns); those that were standard before are not touched.
    Raises:
        DataError: a turn without a text, or by a role that is not known; names the row.
    """
    if chosen == ("conversations",):
        rows = dataset.map(
            lambda row, i: {"messages": _turns(row, f"{source}: row {i + 1}")},
            with_indices=True,
            remove_columns=[name for name in ("conversations", "system") if name in dataset.column_names],
        )
        return rows, ("messages",)
    if chosen == ("instruction", "output"):
        if "system" in dataset.column_names and any(dataset["system"]):
            return dataset.map(_alpaca_chat, remove_columns=dataset.column_names), ("messages",)
        return dataset.map(_alpaca, remove_columns=dataset.column_names), ("prompt", "completion")
    return dataset, chosen


def is_sharegpt(feature: Any) -> bool:
    """Whether a column's turns say who speaks by `from`."""
    turn = getattr(feature, "feature", None) or (feature[0] if isinstance(feature, list) else None)
    return isinstance(turn, Mapping) and "from" in turn


_SPEAKERS = ", ".join(ROLES)


def _turns(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    found = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row["conversations"]:
        role = turn["from"] if turn.get("from") is not None else turn.get("role")
        text = turn["value"] if turn.get("value") is not None else turn.get("content")
        if role is None:
            raise DataError(f"{where}: a turn has no 'from', wanted who speaks: {_SPEAKERS}.")
        if role not in ROLES:
            raise DataError(
                f"{where}: a turn is from {quoted(role)}." + (near_matches(str(role), ROLES) or f" Wanted {_SPEAKERS}.")
            )
        if not isinstance(text, str):
            raise DataError(f"{where}: a turn of {role!r} has no text in 'value'.")
        found.append({"role": ROLES[role], "content": text})
    return found


def _instruction(row: Mapping[str, Any]) -> str:
    return "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)


def _alpaca(row: Mapping[str, Any]) -> dict[str, str]:
    return {"prompt": _instruction(row), "completion": row["output"]}


def _alpaca_chat(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    turns = [{"role": "user", "content": _instruction(row)}, {"role": "assistant", "content": row["output"]}]
    return {"messages": system + turns}
