"""What a checkpoint lacks of its model, and has beyond it: a line each, in the place of transformers' table.

The table tells everybody to train what begins at random, also where an adapter is about to bring it, or a run about to train it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_of
from ..names import block_index
from ..names import kinds as kinds_of
from ..weights import read_header

logger = logging.getLogger(__name__)
_THEIRS = logging.getLogger("transformers.modeling_utils")


class _Held(logging.Filter):
    """Holds back the table."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        held = " LOAD REPORT" in record.getMessage()
        if held:
            self.records.append(record)
        return not held


def with_keys(loader: Any, name: str, **kwargs: Any) -> tuple[Any, Mapping[str, Any]]:
    """`loader.from_pretrained` without the table, which is shown all the same where loading fails.

    Returns:
        (model, {`missing_keys`, `unexpected_keys`: names; `mismatched_keys`: (name, stored shape, the model's shape)}).
    """
    held = _Held()
    _THEIRS.addFilter(held)
    try:
        found = loader.from_pretrained(name, output_loading_info=True, **kwargs)
    except BaseException:
        _THEIRS.removeFilter(held)
        for record in held.records:
            _THEIRS.handle(record)
        raise
    finally:
        _THEIRS.removeFilter(held)
    model, keys = found if isinstance(found, tuple) else (found, {})
    for module in model.modules():
        if getattr(getattr(module, "config", None), "return_dict", True) is not True:
            module.config.return_dict = True  # transformers' own causal models read what their bodies return by name
    return model, keys


def say_keys(keys: Mapping[str, Any], model: Any, name: str, adapter: Path | None = None) -> None:
    """Log what of a model its checkpoint `name` does not have, or has in another shape, and what it has beyond.

    A head that it lacks is an ordinary thing and no warning; a part of the body is one.

    Args:
        adapter: folder of one that comes on top; what its file holds is not lacking.
    Raises:
        CheckpointError: a block lacks what other blocks of its kind have.
    """
    brought: list[str] = []
    if adapter is not None and (adapter / "adapter_model.safetensors").is_file():
        brought = list(read_header(adapter / "adapter_model.safetensors"))
    lacking = [key for key in sorted(keys.get("missing_keys", ())) if not any(_is(key, other) for other in brought)]
    body = f"{getattr(model, 'base_model_prefix', '')}."
    heads = [key for key in lacking if not key.startswith(body)]
    inner = [key for key in lacking if key.startswith(body)]
    _refuse_torn(lacking, model, name)
    if heads:
        logger.info("%s has no such tensor, so that it begins at random: %s", name, first_of(heads, 4))
    if inner:
        logger.warning("%s lacks a part of the model's body, so that it begins at random: %s", name, first_of(inner, 4))
    for key, stored, wanted in sorted(keys.get("mismatched_keys", ())):
        if not any(_is(key, other) for other in brought):
            logger.warning("%s: %s is %s there and begins at random as %s", name, key, list(stored), list(wanted))
    beyond = sorted(keys.get("unexpected_keys", ()))
    if beyond:
        logger.info("%s: %s has no place for %s, left out", name, type(model).__name__, first_of(beyond, 4))


def _refuse_torn(lacking: Sequence[str], model: Any, name: str) -> None:
    """
    Raises:
        CheckpointError: some blocks have a tensor that one of them lacks: its values would be random, and that is no model.
    """
    kinds = kinds_of(model.state_dict())
    there = {kinds[key]: key for key in kinds if key not in lacking and block_index(key) is not None}
    torn = [key for key in lacking if block_index(key) is not None and kinds.get(key) in there]
    if torn:
        more = f" and {len(torn) - 1} more" if len(torn) > 1 else ""
        raise CheckpointError(
            f"{name}: lacks {torn[0]}{more}, and has {there[kinds[torn[0]]]}. The checkpoint is not whole, or its config counts "
            "more blocks than it has."
        )


def _is(key: str, stored: str) -> bool:
    return f".{stored}".endswith(f".{key}")
