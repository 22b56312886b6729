"""The models of the benchmarks: real ones that wheels carry, and random ones of known shapes, made once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

# Hidden 1024 in 24 blocks with SmolLM2's tokens, tied: 359 million parameters.
LLAMA_350M = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def folder_of(model: str) -> Path:
    """A checkpoint folder with its tokenizer.

    Args:
        model: `smollm2`, `minilm`; `llama-350m`, `moe` or `t5` of random float32 weights with SmolLM2's tokenizer; else a folder.
    """
    from spectrum_peft import demo
    from spectrum_peft.scan import cache_folder

    if model == "smollm2":
        return Path(demo.smollm2_folder())
    if model == "minilm":
        return Path(demo.minilm_folder())
    if model not in ("llama-350m", "moe", "t5"):
        return Path(model)
    folder = cache_folder() / "models" / f"{model}-random"
    if not folder.is_dir():
        import torch
        import transformers

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            torch.manual_seed(0)
            made = Path(temporary) / "made"
            model_class, config = _random(model, transformers)
            model_class(config).save_pretrained(made)
            transformers.AutoTokenizer.from_pretrained(demo.smollm2_folder()).save_pretrained(made)
            made.rename(folder)
    return folder


def _random(model: str, transformers: Any) -> tuple[Any, Any]:
    if model == "llama-350m":
        return transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA_350M)
    if model == "moe":
        config = transformers.MixtralConfig(
            vocab_size=2048, hidden_size=384, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        )  # fmt: skip
        return transformers.MixtralForCausalLM, config
    config = transformers.T5Config(
        vocab_size=2048, d_model=384, d_kv=64, d_ff=1024, num_layers=4, num_heads=6, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration, config
