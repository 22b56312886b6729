"""Files and folders that appear whole or not at all, and what killed runs have left of theirs.

What is written has a hidden name beside its place, `.NAME.PROCESS.*.part`, until it is complete; then it is renamed. Where the
place is no regular file but a pipe, a terminal or a device, the bytes go through it; a link stays and leads to the new file.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

_STREAM = re.compile(r"/(?:dev|proc/self)/fd/(\d+)|/dev/(?:(stdout)|(stderr))")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file or nothing; into a pipe or a device as it is.

    Raises:
        CheckpointError: the folder does not exist or cannot be written, or there is no room.
    """
    path = Path(path)
    try:
        if is_stream(path):
            with os.fdopen(_opened_stream(path), "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            return
        with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, text that is no Unicode
        raise CheckpointError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}).") from error


def mode_of(path: str | os.PathLike[str]) -> int:
    """`st_mode` of what a path leads to; 0 where there is nothing, or the name is none that a file could have."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):  # too long, below a file, a circle of links; a NUL in it
        return 0


def own_file(entry: Path) -> Path:
    """The file that lies at a place, to be copied or sent from there.

    Raises:
        CheckpointError: it is a link out of its folder, or a pipe or device: what is exported or pushed gets published, and
            whoever made the folder could have it publish any file of the reader's. A snapshot of the hub's cache is made of
            links, to the `blobs` beside it, which are followed.
    """
    real = Path(os.path.realpath(entry))
    snapshot = next((parent for parent in entry.absolute().parents if parent.parent.name == "snapshots"), None)
    homes = [Path(os.path.realpath(entry.parent))]
    if snapshot is not None:
        homes.append(Path(os.path.realpath(snapshot.parent.parent)) / "blobs")
    if real.parent not in homes:
        raise CheckpointError(
            f"{entry}: is a link out of its folder, to {real}, which is not copied; put the file itself there."
        )
    if not real.is_file():
        raise CheckpointError(f"{entry}: is neither a file nor a folder, wanted one of them.")
    return real


def is_file(path: str | os.PathLike[str]) -> bool:
    """`Path.is_file`, which raises where a name is too long."""
    return stat.S_ISREG(mode_of(path))


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to something that is written through and not replaced: a pipe, a terminal, a device."""
    mode = mode_of(path)
    return bool(_STREAM.fullmatch(os.fspath(path))) or not (mode == 0 or stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _opened_stream(path: Path) -> int:
    """A descriptor to write to. A stream of this process is shared, and with it the place in a file it may lead to."""
    match = _STREAM.fullmatch(os.fspath(path))
    if match is None:
        return os.open(path, os.O_WRONLY)
    sys.stdout.flush()
    return os.dup(1 if match[2] else 2 if match[3] else int(match[1]))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that takes its place when the block ends well."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_parts(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        move_over(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def move_over(new: Path, path: Path) -> None:
    """Rename a file over another. Windows refuses while somebody has that one open: some time is given to a reader to end.

    Raises:
        PermissionError: it stays open for two seconds.
    """
    _patiently(lambda: new.replace(path))


def _patiently(rename: Callable[[], object]) -> None:
    """A renaming, tried again for two seconds where somebody has the file, or one in the folder, open (Windows)."""
    for pause in (0.05, 0.25, 0.7, 1.0):
        try:
            rename()
            return
        except PermissionError:
            time.sleep(pause)
    rename()


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and goes when it does not.

    Args:
        out: is not there, or an empty folder.
    Raises:
        CheckpointError: it cannot be written, there is no room, or somebody removes it meanwhile.
    """
    try:
        out = Path(os.path.realpath(out))
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_parts(out)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out), suffix=".part"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error}).") from error
    try:
        temporary.chmod(0o777 & ~_umask())
        # Whoever removes the folder meanwhile removes files; those that come later make it anew, and it would look whole.
        mark = temporary / ".begun"
        mark.touch()
        yield temporary
        mark.unlink()
        if out.is_dir():
            out.rmdir()  # empty, as was checked; a folder that was filled meanwhile is not replaced
        _patiently(lambda: temporary.rename(out))
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}).") from error
    except CheckpointError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(str(error).replace(str(temporary), str(out))) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def with_usual_modes(folder: Path) -> None:
    """Give the safetensors files of a folder, and of the folders in it, the rights that other new files have.

    safetensors 0.8 writes to a temporary file, which nobody but its owner may read, and renames it.
    """
    for path in folder.glob("**/*.safetensors"):
        with suppress(OSError):  # somebody else's, or gone
            if stat.S_IMODE(path.stat().st_mode) == 0o600:
                path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- what killed runs have left --------------------------------------------------------------------------------------


def _node() -> str:
    """This machine, in a few letters: process numbers mean nothing on another."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _prefix(path: Path) -> str:
    return f".{path.name[:100]}.{os.getpid()}-{_node()}."


def clear_parts(path: Path) -> None:
    """Remove what processes that are no more have left of this file or folder; what another machine writes is left alone."""
    _clear(path.parent, re.escape(path.name[:100]))


def clear_parts_in(folder: Path) -> None:
    """The same for every file that was being written into a folder."""
    _clear(folder, ".+")


def _clear(folder: Path, name: str) -> None:
    """
    Args:
        name: a regex of what the file or folder was to be called.
    """
    mine = re.compile(rf"\.{name}\.(\d+)-([0-9a-f]{{8}})\..*\.part", re.DOTALL)
    try:
        left = [(entry, match) for entry in os.scandir(folder) if (match := mine.fullmatch(entry.name))]
    except OSError:
        return
    for entry, match in left:
        if match[2] != _node() or _is_alive(int(match[1])):
            continue
        logger.info("%s: left by a run that was killed; removed", entry.path)
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with suppress(OSError):
                Path(entry.path).unlink()


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # there `os.kill` with 0 ends a process
        import psutil

        return bool(psutil.pid_exists(process))
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
