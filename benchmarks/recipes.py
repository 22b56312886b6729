"""The recipes of examples/recipes: written from the table below, each with the peak that a dry run predicts for it.

    python benchmarks/recipes.py             # write all of them
    python benchmarks/recipes.py --only 1b   # those whose name contains a word
    python benchmarks/recipes.py --check     # exit code 1 where a file is not what would be written

A recipe is refused that does not fit its card. Shapes of models stand here, written by hand from the config.json of these
repositories; nothing is fetched.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import memory
import torch
import transformers

from spectrum_peft.train.recipe import Recipe, fits, predicted, with_some_head, written

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "recipes"

_QWEN3 = {
    "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": False, "architectures": ["Qwen3ForCausalLM"],
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-3.2-1B": ("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"],
    }),
    "meta-llama/Llama-3.2-3B": memory.CONFIGS["meta-llama/Llama-3.2-3B"],
    "Qwen/Qwen3-8B": ("Qwen3Config", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, **_QWEN3,
    }),
    "Qwen/Qwen3-14B": ("Qwen3Config", {
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40, **_QWEN3,
    }),
}  # fmt: skip
_1B, _3B, _8B, _14B = CONFIGS
_QUARTER, _HALF, _LORA = {"spectrum_ratio": 0.25}, {"spectrum_ratio": 0.5}, {"r": 16}
_PACKED = {"packing": True}
# Name of the file -> (the card in GB, what it is, recipe).
RECIPES: dict[str, tuple[int, str, Recipe]] = {
    "1b_instruct_8gb": (8, "conversations", Recipe(f"{_1B}-Instruct", "causal_lm", "lora", _LORA, None, 4, 4)),
    "1b_classification_8gb": (8, "classification", Recipe(_1B, "classification", "lora", _LORA, None, 16, 1, 256)),
    "1b_instruct_12gb": (12, "conversations", Recipe(f"{_1B}-Instruct", "causal_lm", "spectrum", _QUARTER, None, 4, 4)),
    "1b_dpo_12gb": (12, "preferences", Recipe(f"{_1B}-Instruct", "dpo", "lora", _LORA, None, 4, 4)),
    "1b_pretraining_16gb": (
        16, "continued pre-training", Recipe(_1B, "causal_lm", "spectrum", _HALF, None, 4, 8, 2048, _PACKED)
    ),
    "1b_instruct_24gb": (24, "conversations", Recipe(f"{_1B}-Instruct", "causal_lm", "full", {}, None, 4, 4)),
    "3b_instruct_8gb": (
        8, "conversations", Recipe(f"{_3B}-Instruct", "causal_lm", "spectra_qlora", {**_HALF, **_LORA}, "nf4", 4, 4)
    ),
    "3b_instruct_12gb": (12, "conversations", Recipe(f"{_3B}-Instruct", "causal_lm", "lora", _LORA, None, 4, 4)),
    "3b_dpo_16gb": (16, "preferences", Recipe(f"{_3B}-Instruct", "dpo", "lora", _LORA, None, 2, 8)),
    "3b_pretraining_24gb": (
        24, "continued pre-training", Recipe(_3B, "causal_lm", "spectrum", _QUARTER, None, 4, 8, 2048, _PACKED)
    ),
    "8b_instruct_12gb": (
        12, "conversations", Recipe(_8B, "causal_lm", "spectra_qlora", {**_HALF, **_LORA}, "nf4", 1, 16)
    ),
    "8b_dpo_16gb": (16, "preferences", Recipe(_8B, "dpo", "lora", _LORA, "nf4", 1, 16)),
    "8b_instruct_24gb": (24, "conversations", Recipe(_8B, "causal_lm", "lora", _LORA, None, 4, 4)),
    "8b_classification_24gb": (24, "classification", Recipe(_8B, "classification", "lora", _LORA, None, 8, 2, 512)),
    "8b_pretraining_80gb": (
        80, "continued pre-training", Recipe(_8B, "causal_lm", "spectrum", _HALF, None, 4, 8, 2048, _PACKED)
    ),
    "14b_instruct_24gb": (24, "conversations", Recipe(_14B, "causal_lm", "lora", _LORA, "nf4", 2, 8)),
    "14b_instruct_80gb": (
        80, "conversations", Recipe(_14B, "causal_lm", "spectrum", {"spectrum_ratio": 0.2}, None, 4, 4)
    ),
    "14b_dpo_80gb": (80, "preferences", Recipe(_14B, "dpo", "lora", _LORA, None, 4, 4)),
}  # fmt: skip


def config_of(model: str) -> Any:
    kind, fields = CONFIGS[model.removesuffix("-Instruct")]
    return getattr(transformers, kind)(**fields, dtype=torch.bfloat16)


def text_of(name: str) -> str:
    """What the file of a recipe says.

    Raises:
        SystemExit: the recipe does not fit its card.
    """
    gigabytes, what, recipe = RECIPES[name]
    found = predicted(recipe, with_some_head(config_of(recipe.model), recipe.task))
    if not fits(found, f"{gigabytes}GiB"):
        raise SystemExit(
            f"{name}: needs {found.peak_bytes / 2**30:.2f} GiB, which a card of {gigabytes} GB has not to spare"
        )
    return written(recipe, found, f"{recipe.model}, {what}, on a card of {gigabytes} GB.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    old = []
    for name in (name for name in RECIPES if options.only in name):
        path, text = FOLDER / f"{name}.yaml", text_of(name)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(name)
            if not options.check:
                FOLDER.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
        print(f"{name}: {text.splitlines()[2].split(': ')[1].split(' on ')[0]}", flush=True)
    print(f"{len(old)} {'not current' if options.check else 'written'}: {old or 'none'}")
    return int(bool(old) and options.check)


if __name__ == "__main__":
    raise SystemExit(main())
