"""What is known of single model types, where neither a checkpoint nor transformers' rules say it: the one table of its kind.

The architectures of GGUF, which have names of their own, are in `gguf.py` and `export/gguf.py`.
"""

from __future__ import annotations

# Blocks are built of transformers' Conv1D, which stores (in, out). Source: `Conv1D` in their modeling files, transformers 5.24.
CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"})
# Fused experts are stored as (experts, in, out). Source: `is_transposed` in their modeling files, transformers 5.24.
TURNED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
