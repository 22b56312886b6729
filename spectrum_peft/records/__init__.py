"""The records that the stages hand to each other: plain frozen data, no torch, no I/O but their own files.

`scan` writes an `SnrReport`, `probe` a `GradientReport`, `plan` turns them into a `Plan`, the tuner, the callback and the export
read the plan. A record saved and loaded again is equal to the first; the same record gives the same bytes. JSON and YAML by
the file's ending.
"""

from __future__ import annotations

from .files import (
    BESIDE_FILE,
    EXPORTED,
    PLAN_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    TOKENIZER_FILES,
    check_files_beside,
    finite_only,
    parse_json,
    read_mapping,
    read_text,
    record_of,
)
from .gradients import GradientReport, GradientStat, Similarity
from .memory import MemoryReport
from .plan import ADAPTER_ACTIONS, REAL_WEIGHT_ACTIONS, Plan, PlanEntry, count_trainable
from .report import Fingerprint, MatrixStat, SnrReport
from .schema import checked
from .shared import repository_named
from .whole import (
    clear_parts_in,
    is_file,
    is_stream,
    mode_of,
    move_over,
    own_file,
    whole_file,
    whole_folder,
    with_usual_modes,
    write_text,
)

__all__ = [
    "ADAPTER_ACTIONS",
    "BESIDE_FILE",
    "EXPORTED",
    "PLAN_FILE",
    "REAL_WEIGHT_ACTIONS",
    "REPORT_FILE",
    "RESULTS_FILE",
    "TOKENIZER_FILES",
    "Fingerprint",
    "GradientReport",
    "GradientStat",
    "MatrixStat",
    "MemoryReport",
    "Plan",
    "PlanEntry",
    "Similarity",
    "SnrReport",
    "check_files_beside",
    "checked",
    "clear_parts_in",
    "count_trainable",
    "finite_only",
    "is_file",
    "is_stream",
    "mode_of",
    "move_over",
    "own_file",
    "parse_json",
    "read_mapping",
    "read_text",
    "record_of",
    "repository_named",
    "whole_file",
    "whole_folder",
    "with_usual_modes",
    "write_text",
]
