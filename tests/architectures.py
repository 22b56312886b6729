"""Tiny random models of the families that the contract runs on, one builder each.

Sizes are multiples of 32, which bitsandbytes' CPU kernels want, and no two dimensions of a family are equal by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCABULARY = 264  # the byte tokenizer of conftest.py
_IDS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
_LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **_IDS,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A family: how to make its config, and the class and PEFT task that it is trained as."""

    config: Callable[[], Any]
    auto_class: str = "AutoModelForCausalLM"
    task_type: str = "CAUSAL_LM"

    def build(self, seed: int = 0) -> Any:
        import torch
        import transformers

        torch.manual_seed(seed)
        return getattr(transformers, self.auto_class).from_config(self.config(), dtype=torch.float32).eval()


def _of(class_name: str, **values: Any) -> Callable[[], Any]:
    def config() -> Any:
        import transformers

        return getattr(transformers, class_name)(**values)

    return config


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_of("LlamaConfig", **_LLAMA)),
    "llama_tied": Architecture(_of("LlamaConfig", **_LLAMA, tie_word_embeddings=True)),
    "mistral": Architecture(_of("MistralConfig", **_LLAMA, sliding_window=None)),
    "qwen3": Architecture(_of("Qwen3Config", **_LLAMA, head_dim=16)),
    "gemma2": Architecture(_of("Gemma2Config", **_LLAMA, head_dim=16)),
    "phi3": Architecture(_of("Phi3Config", **_LLAMA)),
    "falcon": Architecture(
        _of(
            "FalconConfig", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            ffn_hidden_size=96, **_IDS,
        )
    ),
    "gpt2": Architecture(
        _of("GPT2Config", vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256, n_inner=96, **_IDS)
    ),
    "gpt_neox": Architecture(
        _of(
            "GPTNeoXConfig", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256, **_IDS,
        )
    ),
    "bert": Architecture(
        _of(
            "BertConfig", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256, num_labels=3, pad_token_id=256,
        ),
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
    ),
    "t5": Architecture(
        _of(
            "T5Config", vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
            pad_token_id=256, eos_token_id=258, decoder_start_token_id=256,
        ),
        "AutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
    ),
    "mixtral": Architecture(_of("MixtralConfig", **_LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": Architecture(
        _of(
            "Qwen3MoeConfig", **_LLAMA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        )
    ),
}  # fmt: skip


def batch_for(architecture: Architecture, model: Any, seed: int = 0) -> dict[str, Any]:
    """Inputs with labels: two rows of twelve tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (2, 12), generator=generator)
    if architecture.task_type == "SEQ_CLS":
        labels = torch.randint(0, model.config.num_labels, (2,), generator=generator)
    else:
        labels = ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
