"""The only reader of raw weights: one tensor at a time, from safetensors files, a live model or a GGUF file.

Names are those of the live model, asked of transformers where the files' are others (`layouts`). Files that keep one
tensor per expert where transformers fuses them are presented fused, `model.layers.0.mlp.experts.gate_up_proj` of shape
(E, 2I, H), and read by expert, `...gate_up_proj[3]`.
"""

from __future__ import annotations

from .adapted import AdaptedWeights, seen_as_trained
from .files import FileWeights, Place, as_matrix, places, read_stored
from .fresh import new_parameters
from .gguf import GgufWeights
from .headers import Span, find_shards, read_config, read_header, read_index, refuse_sharded
from .layouts import Layout, Recipe, loaded_together, skeleton_like, skeleton_of, unquantized_modules
from .live import LiveWeights, base_module, checkpoint_folder, dequantized_weights, matrix_of, refuse_partitioned
from .opening import fetch, holds_adapter, locate, open_weights, refuse_missing
from .quantized import (
    give_storage_without_values,
    int8_products_as_on,
    misread_in_4bit,
    quantized_product_works,
    settle_quantized,
    through_quantization,
    undivided_rows,
)
from .roles import output_embeddings, output_head, role_of
from .shards import read_bytes
from .source import DTYPES, TensorInfo, WeightSource, split_expert
from .towers import tower_in, towers_of
from .uncalled import computes_gradients_itself, without_adapters

__all__ = [
    "DTYPES",
    "AdaptedWeights",
    "FileWeights",
    "GgufWeights",
    "Layout",
    "LiveWeights",
    "Place",
    "Recipe",
    "Span",
    "TensorInfo",
    "WeightSource",
    "as_matrix",
    "base_module",
    "checkpoint_folder",
    "computes_gradients_itself",
    "dequantized_weights",
    "fetch",
    "find_shards",
    "give_storage_without_values",
    "holds_adapter",
    "int8_products_as_on",
    "loaded_together",
    "locate",
    "matrix_of",
    "misread_in_4bit",
    "new_parameters",
    "open_weights",
    "output_embeddings",
    "output_head",
    "places",
    "quantized_product_works",
    "read_bytes",
    "read_config",
    "read_header",
    "read_index",
    "read_stored",
    "refuse_missing",
    "refuse_partitioned",
    "refuse_sharded",
    "role_of",
    "seen_as_trained",
    "settle_quantized",
    "skeleton_like",
    "skeleton_of",
    "split_expert",
    "through_quantization",
    "tower_in",
    "towers_of",
    "undivided_rows",
    "unquantized_modules",
    "without_adapters",
]
