"""The folder that a run writes to: it holds the result of one run, of one kind."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..data import sources_of
from ..errors import OptionError
from ..records import BESIDE_FILE, EXPORTED, PLAN_FILE, REPORT_FILE, RESULTS_FILE, clear_parts_in, mode_of

# What a run leaves; a tokenizer is the same whatever was trained, and a user's own files stay.
_RESULT = (
    "adapter_config.json", "adapter_model*", "model*.safetensors", "model.safetensors.index.json", "config.json",
    "generation_config.json", BESIDE_FILE, PLAN_FILE, REPORT_FILE, "plan_history.json", RESULTS_FILE,
    "history.csv", "loss.png", "training_args.bin", *EXPORTED.values(),
)  # fmt: skip
_CHECKPOINTS = "checkpoint-*"


def _found(folder: Path, checkpoints: bool) -> list[Path]:
    patterns = (*_RESULT, _CHECKPOINTS) if checkpoints else _RESULT
    folder = folder.resolve()  # `gone/../there` leads there once `gone` is made
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def check_output(folder: Path, *, overwrite: bool, resumed: bool, sources: Iterable[object] = ()) -> None:
    """
    Args:
        sources: what the run reads: a model's folder, a plan, rows; None, and names that are no paths here, are passed over.
    Raises:
        OptionError: the folder holds another run's result or checkpoints, and neither goes this run on from one of them nor
            may it write over them; or this run reads what it would remove.
    """
    found = _found(folder, checkpoints=True)
    for source in () if resumed else sources:
        if source and mode_of(str(source)) and (lost := _removed_with(found, Path(str(source)))):
            raise OptionError(
                f"{folder}: {lost.name} there belongs to {source}, which this run reads; name another --output-dir."
            )
    if found and not overwrite and not resumed:
        raise OptionError(
            f"{folder}: holds another run's {found[0].name}. Name another --output-dir; --overwrite-output-dir removes that "
            "run's files first, --resume-from-checkpoint true goes on with it."
        )


def sources_read(options: argparse.Namespace) -> list[object]:
    """What the flags of a run name to be read."""
    rows = [
        part for name in ("dataset", "eval_dataset") if (v := getattr(options, name, None)) for part, _ in sources_of(v)
    ]
    named = ("model", "plan", "report", "gradients", "peft_config")
    return [*(getattr(options, name, None) for name in named), *rows]


def _removed_with(found: Sequence[Path], source: Path) -> Path | None:
    """What of a source would go, were these removed: the source itself, a file of its folder, or a folder about it."""
    real = source.resolve()
    return next((p for p in found if real in (there := p.resolve(), there.parent) or there in real.parents), None)


def clear_killed(folder: Path) -> None:
    """Remove what a run that was killed was writing into the folder and its checkpoints."""
    for place in (folder, *folder.glob(_CHECKPOINTS)):
        clear_parts_in(place)


def clear_output(folder: Path, *, checkpoints: bool) -> None:
    """Remove what an earlier run left, so that no file of it lies beside this run's: an adapter beside a whole model would
    be taken for the result.

    Args:
        checkpoints: those too.
    """
    for path in _found(folder, checkpoints):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
