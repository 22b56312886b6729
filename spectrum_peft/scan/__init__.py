"""Weights in, `SnrReport` out.

scan      every matrix of a checkpoint, several at a time
only      which kinds and layers it is narrowed to
ahead     what comes over a network is fetched while other matrices are scored
found     a report that is there already, and whether it is believed
criteria  what a matrix scores
edges     where the singular values of noise end
gram      its singular values, by the library that is fastest here
cache     results of a scan that may be killed
spectrum  the singular values of one matrix
svd       leading singular triplets
"""

from __future__ import annotations

from .cache import cache_folder, cache_sizes, clear_cache
from .criteria import CRITERIA, score_values
from .found import check_report, find_report, report_named
from .scan import scan_weights
from .spectrum import spectrum_of
from .svd import SingularTriplets, cached_svd

__all__ = [
    "CRITERIA",
    "SingularTriplets",
    "cache_folder",
    "cache_sizes",
    "cached_svd",
    "check_report",
    "clear_cache",
    "find_report",
    "report_named",
    "scan_weights",
    "score_values",
    "spectrum_of",
]
