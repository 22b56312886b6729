"""Trained adapters as plain files: merged into the original checkpoint, as a LoRA for plain peft, for axolotl, for llama.cpp.

adapters   what is exported: an adapter from a folder without peft, or from a model in memory
merge      merge_into_base        rewrite    the base's files, byte ranges copied, changed tensors computed
tables     ties and tables that grew         quantized  which modules of a base were quantized
folder     config, tokenizer and what else lies beside the weights
lora       export_lora            axolotl    export_axolotl
gguf       export_gguf            gguf_tokens  a tokenizer in its file
"""

from __future__ import annotations

from .axolotl import export_axolotl
from .gguf import export_gguf
from .lora import export_lora
from .merge import merge_into_base

__all__ = [
    "export_axolotl",
    "export_gguf",
    "export_lora",
    "merge_into_base",
]
