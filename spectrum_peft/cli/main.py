"""The command `spectrum-peft`: finds the verb and runs it.

Exit code 0: done; 2: an input is wrong (one line on standard error, no traceback); 1: a failure of ours (a traceback).
A library that refuses a value, or a device whose memory is full, is an input that is wrong: `--debug` shows its traceback.
The verbs that only read weights and plans import neither transformers nor peft; what a verb needs, it imports itself.
A new verb is a file of this folder with a `VERB`, and its name in the import and in the tuple below.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import OptionError, SpectrumError, near_matches, one_line
from . import (
    cache,
    chat,
    compare,
    completion,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    memory,
    merge,
    plan,
    plot,
    probe,
    push,
    scan,
    train,
    tune,
)
from .terminal import Escaping, shown
from .verb import PROG, Verb
from .words import flags_by_name, wording

# In the order of the overview: that of the work.
VERBS: dict[str, Verb] = {
    module.VERB.name: module.VERB
    for module in (
        scan,
        probe,
        plan,
        train,
        evaluate,
        generate,
        chat,
        compare,
        tune,
        merge,
        export,
        push,
        memory,
        plot,
        demo,
        doctor,
        cache,
    )
}
VERBS["completion"] = completion.verb_over(VERBS)
# Seconds. torchrun ends the others within a second of the first; how far their imports lie apart is more on a busy machine.
_PATIENCE = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (a failure that is not an input error raises)."""
    with shown():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    argv, debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(Escaping())
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    # For developers of the libraries below; a user of the command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy, level in {
        "httpx": "WARNING",
        "httpx2": "WARNING",
        "datasets": "WARNING",
        "datasets.packaged_modules": "CRITICAL",  # what it says of a file that it cannot read, our error says
        "filelock": "WARNING",
        "gguf": "WARNING",
        "bitsandbytes": "ERROR",
    }.items():
        logging.getLogger(noisy).setLevel(level)
    quiet: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if _rank():  # one of several processes of a launcher: the first speaks for all
        logging.getLogger().setLevel(logging.WARNING)
        quiet = contextlib.redirect_stdout(io.StringIO())
    try:
        # What asks a process to end, a scheduler or `timeout`, lets it clean up as Ctrl-C does.
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        with quiet:
            _run(argv)
    except SpectrumError as error:
        _let_the_first_speak()
        if debug:
            traceback.print_exception(error)
        verb = VERBS.get(argv[0]) if argv else None
        print(f"{PROG}: error: {wording(error, flags_by_name(verb, VERBS.values()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        said = _what_a_library_said(error)
        if said is None:
            raise
        _let_the_first_speak()
        if debug:
            traceback.print_exception(error)
        print(f"{PROG}: error: {said} (--debug shows where)", file=sys.stderr)
        return 2
    return 0


def _rank() -> int:
    """Of this process among those of a launcher; `train` refuses one that is no number."""
    given = os.environ.get("RANK") or "0"
    return int(given) if given.isdecimal() and len(given) < 10 else 0


def _let_the_first_speak() -> None:
    """On a later process of several: wait for the first to say the same, upon which the launcher ends this one. What is
    wrong on this process alone is said after that."""
    if _rank():
        time.sleep(_PATIENCE)


def _without_debug(argv: list[str]) -> tuple[list[str], bool]:
    """`--debug` alone is ours; with a word after it, it is the trainer's flag of that name."""
    for i, word in enumerate(argv):
        if word == "--debug" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            return argv[:i] + argv[i + 1 :], True
    return argv, False


def _what_a_library_said(error: Exception) -> str | None:
    """One line for what a library refused; None where the failure may be ours.

    A `ValueError`, an `ImportError` or an `OSError` that was raised in the code of a library is how that library says what it
    was given wrong. Other errors, and those raised in a frame of this package, are bugs until shown otherwise. What the system
    says of a file, gone, full or locked, comes from outside wherever it is raised.
    """
    name, text = type(error).__name__, one_line(error)[:500]
    if name in ("OutOfMemoryError", "AcceleratorError") and "out of memory" in text:
        return f"the device's memory is full ({text[:160]}). `spectrum-peft memory` says beforehand what a step needs."
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text:
        asked = f" ({text[:160]})" if text else ""
        return f"this machine's memory is full{asked}. `spectrum-peft memory` says beforehand what a step needs."
    if isinstance(error, OSError) and error.errno:
        return f"{error.filename or 'the system refuses'}: {error.strerror}"
    if not isinstance(error, ValueError | ImportError | OSError):
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    library = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if library in ("", "__main__", __package__.partition(".")[0]) or library in sys.stdlib_module_names:
        return None
    return f"{library} refuses: {text}"


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(_overview())
    elif argv[0] in {"-V", "--version"}:
        print(f"{PROG} {__version__}")
    elif argv[0] not in VERBS:
        raise OptionError(f"{argv[0]!r} is not a command." + near_matches(argv[0], VERBS))
    else:
        VERBS[argv[0]].run(argv[1:])


def _overview() -> str:
    lines = [f"{PROG} {__version__}: selective fine-tuning by weight spectrum", "", "commands:"]
    lines += [f"  {name:<12}{verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "examples:", *(f"  {PROG} {verb.example}" for verb in VERBS.values())]
    lines += [
        "",
        f"{PROG} COMMAND --help lists a command's flags. --config FILE reads them from YAML; --debug shows tracebacks.",
    ]
    return "\n".join(lines)
