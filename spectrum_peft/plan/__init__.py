"""Scores become a decision: which matrices train, by which means, rank, scale and rate.

Reads records, writes records; knows neither weights nor models.

    options     names, defaults, ranges of what can be asked for, and what excludes each other
    modes       the table of modes
    rates       learning rates where the user set none
    candidates  the rows of a report that could train
    choose      how many of them, in which order
    policies    what the chosen ones become
    budget      ranks within a number of parameters
    make        make_plan: all of it together
    published   the published tool's choice and its file
    explain     a plan in words        diff  two plans        replan  the ranks, decided anew
"""

from __future__ import annotations

from ..records import Plan
from .candidates import in_towers
from .diff import diff_plans
from .explain import explain, format_table
from .make import make_plan, worth_probing
from .modes import MODES, USUAL_MODE, Mode, get_mode
from .options import (
    COLUMNS_BY,
    COLUMNS_BY_DATA,
    CRITERIA,
    DEFAULT_RATIO,
    OPTIONS,
    check_options,
    checked_plan,
    needs_gradients,
    owners_of,
    ratio_of,
)
from .policies import columns_of_rank, with_columns
from .rates import LONG_RUN, LORA_RANK, edge_of, rank_of
from .replan import replan

__all__ = [
    "COLUMNS_BY",
    "COLUMNS_BY_DATA",
    "CRITERIA",
    "DEFAULT_RATIO",
    "LONG_RUN",
    "LORA_RANK",
    "MODES",
    "OPTIONS",
    "USUAL_MODE",
    "Mode",
    "Plan",
    "check_options",
    "checked_plan",
    "columns_of_rank",
    "diff_plans",
    "edge_of",
    "explain",
    "format_table",
    "get_mode",
    "in_towers",
    "make_plan",
    "needs_gradients",
    "owners_of",
    "rank_of",
    "ratio_of",
    "replan",
    "with_columns",
    "worth_probing",
]
