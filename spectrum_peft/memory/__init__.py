"""Know the memory before training: a dry run of one training step, and the largest plan that fits a budget.

The dry run is the real thing without the numbers: the model's own class is built from its config, the plan is applied
by the code that applies it for training, and forward, loss, backward, clipping and the optimizer's step run on fake
tensors (`torch._subclasses.FakeTensorMode`), which have shapes, dtypes and storages but no values. A dispatch mode sees
every storage come and go. No weights are read and no GPU is needed; an 8B model takes seconds and a few hundred MB.

What is modelled is one step in the steady state: optimizer states exist, and with gradient accumulation the gradients
of the earlier micro-batches do too. The first steps never need more. The same tracker on real tensors is
`measure_memory`.

Fake tensors say they are on the CPU, since a torch without CUDA aborts on fake CUDA tensors. What a GPU does otherwise
is put in by hand where it matters for memory (`device="cuda"`): the attention kernels, foreach optimizers, int8
products, blocks of 512 bytes. Not modelled: CUDA's context, cuBLAS workspaces, memory that the allocator holds and does
not use.
"""

from .estimate import (
    SHARDINGS,
    estimate_memory,
    gradients_of_report,
    least_weights,
    measure_memory,
    report_of_config,
    shard,
    usual_step,
)
from .fit import (
    MARGIN,
    RATIOS,
    Fit,
    Row,
    describe_memory,
    describe_step,
    describe_table,
    find_fit,
    fit_to_memory,
    format_bytes,
    memory_table,
    parse_bytes,
    refuse_small_budget,
)
from .step import DEVICES, DTYPES, EIGHT_BIT_ADAM, OPTIMIZERS, TRAINERS, Step
from .tracker import CATEGORIES, PHASES, StorageTracker

__all__ = [
    "CATEGORIES",
    "DEVICES",
    "DTYPES",
    "EIGHT_BIT_ADAM",
    "MARGIN",
    "OPTIMIZERS",
    "PHASES",
    "RATIOS",
    "SHARDINGS",
    "TRAINERS",
    "Fit",
    "Row",
    "Step",
    "StorageTracker",
    "describe_memory",
    "describe_step",
    "describe_table",
    "estimate_memory",
    "find_fit",
    "fit_to_memory",
    "format_bytes",
    "gradients_of_report",
    "least_weights",
    "measure_memory",
    "memory_table",
    "parse_bytes",
    "refuse_small_budget",
    "report_of_config",
    "shard",
    "usual_step",
]
