"""Which checkpoint of a run can be resumed: the newest whose saving was not cut off."""

from __future__ import annotations

import logging
import re
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, OptionError, SpectrumError, one_line
from ..records import checked, is_stream, read_mapping

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
# What the trainer saves for a run on one process or on several with whole copies; a sharded run has folders instead.
_TORCH_FILES = ("optimizer.pt", "scheduler.pt")
# Bytes of what names the tensors in such a file: 100 for each, and more is not read here.
_MOST_PICKLE = 1 << 28
_SHARDED = ("global_step*", "pytorch_model_fsdp*", "optimizer_[0-9]*", "optimizer_bin*", "rank*-of-*")


@dataclass(frozen=True)
class _State:
    """The fields of trainer_state.json that are read here, and those that the trainer goes on counting from.

    What is not there the trainer begins with its own: older versions wrote fewer.
    """

    global_step: Annotated[int, Meta(ge=0)]
    total_flos: float = 0.0
    num_input_tokens_seen: int = 0
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    epoch: float | None = None
    log_history: list[dict[str, Any]] | None = None
    stateful_callbacks: dict[str, Any] | None = None


def checkpoint_to_resume(value: str | None, output_dir: str) -> str | None:
    """The folder to resume from.

    Args:
        value: of `--resume-from-checkpoint`: a folder, `true` for the newest in `output_dir` that is whole, `false`.
    Raises:
        OptionError: no such folder.
        CheckpointError: that folder is not whole, in which case the one before it is named; there is none that is.
    """
    if value is None or value.lower() in {"false", "no"}:
        return None
    if value.lower() in {"true", "yes", "last"}:
        found = _saved_in(Path(output_dir))
        if not found:
            raise CheckpointError(
                f"{output_dir}: holds no checkpoint to resume from; leave --resume-from-checkpoint out."
            )
        whole = _newest_whole(found)
        if whole is None:
            raise CheckpointError(
                f"{found[0]}: cannot be resumed, {problem_of(found[0])}; no other in {output_dir} can. "
                "--overwrite-output-dir starts anew."
            )
        for folder in found[: found.index(whole)]:
            logger.warning("%s: its saving was cut off (%s); going on from %s", folder, problem_of(folder), whole.name)
        return str(whole)
    folder = Path(value)
    if not folder.is_dir():
        raise OptionError(f"resume_from_checkpoint is {value!r}, wanted a checkpoint folder or true.")
    problem = problem_of(folder)
    if problem:
        before = _newest_whole([other for other in _saved_in(folder.parent) if _step(other) < _step(folder)])
        hint = f" The one before is whole: {before}." if before else ""
        raise CheckpointError(f"{folder}: cannot be resumed, {problem}.{hint}")
    return value


def _step(folder: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d{1,12})", folder.name)
    return int(match[1]) if match else -1


def _saved_in(output: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    try:
        folders = [path for path in output.iterdir() if _step(path) >= 0 and path.is_dir()]
    except OSError:
        return []
    return sorted(folders, key=_step, reverse=True)


def _newest_whole(folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if problem_of(folder) is None), None)


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed, None if it can. The trainer would start its optimizer anew without a word."""
    if stream := next((path for path in sorted(folder.glob("*")) if is_stream(path)), None):
        return f"{stream.name} is a device or a pipe"
    try:
        step = checked(read_mapping(folder / _STATE), _State, folder / _STATE).global_step
    except CheckpointError as error:
        return f"{_STATE} is missing or damaged ({error})"
    if _step(folder) not in (-1, step):
        return f"{_STATE} is of step {step}"
    if any(path for pattern in _SHARDED for path in folder.glob(pattern)):
        return None
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("*.bin")):
        return "it holds no weights"
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is damaged ({one_line(error)})"
    random_states = sorted(folder.glob("rng_state*.pth"))
    for path in (*(folder / name for name in _TORCH_FILES), *(random_states or [folder / "rng_state.pth"])):
        if not path.is_file():
            return f"{path.name} is missing"
        try:
            if not zipfile.is_zipfile(path):  # torch's format; its end is written last
                return f"{path.name} is cut off"
            with zipfile.ZipFile(path) as parts:
                for part in parts.infolist():
                    if part.filename.endswith("/data.pkl") and part.file_size <= _MOST_PICKLE:
                        # Its checksum is compared; that of the values would take as long as loading them.
                        parts.read(part)
        except Exception as error:  # zipfile has one of many classes for what is damaged
            return f"{path.name} is damaged ({one_line(error)})"
    return None


def refuse_other_sharing(folder: str | None, asked: str | None) -> None:
    """A checkpoint's optimizer is read by what wrote it alone; on how many processes is of no consequence.

    Args:
        folder: to resume from, or None.
        asked: what shares the model out in this run, `FSDP`, `DeepSpeed` or None (one process, or DDP).
    Raises:
        CheckpointError: it was another that saved it.
    """
    if folder is None:
        return
    saved = next((name for name, patterns in _OF.items() for p in patterns if any(Path(folder).glob(p))), None)
    if saved != asked:
        shown = {None: "without sharing the model out", "FSDP": "under FSDP2", "DeepSpeed": "under DeepSpeed"}
        raise CheckpointError(
            f"{folder}: was saved {shown[saved]} and this run is {shown[asked]}, which cannot read its optimizer's state. "
            f"Resume it {shown[saved]}, on any number of processes; or train on from its weights as a new run."
        )


# What lies in the checkpoints of those who share a model out, and in no other.
_OF = {"FSDP": ("pytorch_model_fsdp*", "optimizer.bin", "optimizer_[0-9]*"), "DeepSpeed": ("global_step*",)}


# transformers' functions that read a checkpoint's states.
_READING = {
    "_load_optimizer_and_scheduler", "_load_rng_state", "_load_callback_state", "_load_from_checkpoint", "_load_scaler",
    "load_from_json",
}  # fmt: skip


@contextmanager
def resuming(folder: str | None) -> Iterator[None]:
    """Around a training that goes on from a checkpoint: states that hold something else, whatever is raised of that.

    Raises:
        CheckpointError: names the checkpoint.
    """
    try:
        yield
    except (SpectrumError, MemoryError):
        raise
    except Exception as error:
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        # A state of other types is taken as it is, and the first step stumbles over it.
        inside = any(Path(code.co_filename).parent.name == "optim" for code in codes)
        reads = inside or not _READING.isdisjoint(code.co_name for code in codes)
        if folder is None or not reads or type(error).__name__ == "OutOfMemoryError":
            raise
        raise CheckpointError(
            f"{folder}: cannot be resumed ({type(error).__name__}: {one_line(error)[:200]}). Resume from one before it, or "
            "start anew with --overwrite-output-dir."
        ) from error


@contextmanager
def saving(output: str) -> Iterator[None]:
    """Around what trains and saves: a disk that is full is no fault of ours.

    Raises:
        CheckpointError: something could not be written.
    """
    try:
        yield
    except SpectrumError:
        raise
    except (OSError, SafetensorError) as error:
        where = getattr(error, "filename", None) or output
        raise CheckpointError(
            f"{where}: cannot be written ({getattr(error, 'strerror', None) or one_line(error)})."
        ) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(
            error
        ):  # `torch.save` has no error of its own
            raise
        raise CheckpointError(f"{output}: a checkpoint cannot be written ({one_line(error)}).") from error
