"""What there is to work with: versions beside the tested ones, devices, kernels that run, memory, hub, cache.

Every line was tried, not looked up: a kernel counts as there when its product of small numbers is right.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, Literal, NamedTuple

# What the tests of this version ran with. README.md says the same, which tests/test_doctor.py holds to it.
TESTED = {
    "torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2", "trl": "1.16.0", "bitsandbytes": "0.50.2",
    "datasets": "5.2.0", "accelerate": "1.15.0",
}  # fmt: skip
# Package -> what it is for.
OPTIONAL = {
    "matplotlib": "pictures", "scikit-learn": "accuracy and F1", "rouge-score": "ROUGE-L",
    "flash-attn": "--attn-implementation flash_attention_2", "liger-kernel": "--use-liger-kernel",
    "deepspeed": "--deepspeed", "wandb": "--report-to wandb", "tensorboard": "--report-to tensorboard",
    "trackio": "--report-to trackio",
}  # fmt: skip

Verdict = Literal["ok", "note", "bad"]


class Finding(NamedTuple):
    """One line: what was looked at, how it is, and whether that is as it should be."""

    what: str
    seen: str
    verdict: Verdict = "ok"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    from . import __version__

    yield Finding("spectrum_peft", f"{__version__} on Python {platform.python_version()}, {platform.platform()}")
    try:
        wanted = {r.name: r.specifier for r in map(Requirement, requires("spectrum-peft") or ()) if r.marker is None}
    except PackageNotFoundError:  # run from a folder that is not installed
        wanted = {}
    for package, tested in TESTED.items():
        seen = _installed(package)
        if seen is None:
            yield Finding(package, "not installed", "bad")
        elif package in wanted and not wanted[package].contains(seen, prereleases=True):
            yield Finding(package, f"{seen}, wanted {wanted[package]} (tested: {tested})", "bad")
        else:
            same = seen.partition("+")[0] == tested
            yield Finding(package, seen if same else f"{seen} (tested: {tested})", "ok" if same else "note")
    for package, purpose in OPTIONAL.items():
        seen = _installed(package)
        yield Finding(package, seen or f"not installed; for {purpose}")


def _tried(what: str, attempt: Callable[[], str | None]) -> Finding:
    """A finding from something that returns None when it works, and says or raises why not."""
    try:
        problem = attempt()
    except Exception as error:  # whatever a library raises where its kernels are not there
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Finding(
        what, "works" if problem is None else f"does not work: {problem}", "ok" if problem is None else "note"
    )


def _devices() -> Iterator[Finding]:
    import torch

    from . import devices
    from .machine import cores, machine
    from .weights import quantized_product_works

    yield Finding("processor", f"{machine()['cpu']}, {cores()} cores")
    accelerators = [torch.device(devices.default_device().type, number) for number in devices.generators()]
    found = [torch.device("cpu"), *accelerators]
    for device in found:
        memory = devices.free_memory(device)
        sizes = "" if memory is None else f", {memory[0] / 2**30:.1f} of {memory[1] / 2**30:.1f} GiB free"
        fast = str(devices.fast_dtype(device)).removeprefix("torch.")
        yield Finding(f"device {device}", f"{devices.name_of(device)}{sizes}; trains in {fast} by default")
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            name = str(dtype).removeprefix("torch.")
            yield _tried(f"  {name} products", lambda device=device, dtype=dtype: devices.works(device, dtype))
        for kind in ("nf4", "int8"):
            yield _tried(f"  {kind} products", lambda device=device, kind=kind: quantized_product_works(kind, device))


def _hub(offline: bool) -> Iterator[Finding]:
    import huggingface_hub
    import huggingface_hub.constants

    endpoint = huggingface_hub.constants.ENDPOINT
    token = huggingface_hub.get_token()
    yield Finding("hub token", "there is one" if token else "none; public repositories need none")
    if offline or huggingface_hub.constants.HF_HUB_OFFLINE:
        yield Finding("hub", f"{endpoint}, not asked: offline")
        return

    def ask() -> str | None:
        answer = huggingface_hub.get_session().head(endpoint, timeout=5.0)
        return None if answer.status_code < 500 else f"status {answer.status_code}"

    yield _tried(f"hub {endpoint}", ask)


def _cache() -> Iterator[Finding]:
    from .scan import cache_folder, cache_sizes

    folder = cache_folder()
    sizes = cache_sizes()
    yield Finding("cache", f"{folder}, {sum(sizes.values()) / 2**20:,.1f} MiB (spectrum-peft cache)")
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        yield Finding("cache", f"{nearest} cannot be written: scans are not kept, and killed ones begin anew", "note")


def examine(*, offline: bool = False) -> list[Finding]:
    """All findings, in the order of a person's questions.

    Args:
        offline: ask nothing of the network.
    """
    return [*_versions(), *_devices(), *_hub(offline), *_cache()]


def describe(findings: list[Finding]) -> str:
    """The findings as aligned lines; what is not as tested is marked `!`, what cannot work `X`."""
    width = max(len(f.what) for f in findings)
    marks: dict[Any, str] = {"ok": " ", "note": "!", "bad": "X"}
    return "\n".join(f"{marks[f.verdict]} {f.what:<{width}}  {f.seen}" for f in findings)
