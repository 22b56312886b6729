"""The verb `cache`."""

from __future__ import annotations

import argparse

from ..arguments import Rest
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", nargs="*", metavar="KIND", help="remove what is kept, all of it or some kinds")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..scan import cache_folder, cache_sizes, clear_cache

    before = cache_sizes()
    if options.clear is not None:
        clear_cache(options.clear)
    print(cache_folder())
    after = cache_sizes()
    for kind, size in before.items():
        print(f"  {kind:<12}{size / 2**20:>12,.1f} MiB{'' if kind in after else '   removed'}")
    if not before:
        print("  nothing is kept")


VERB = Verb(
    "cache",
    "cache [--clear [KIND ...]]",
    "what is kept between runs: finished and unfinished scans, singular vectors, models of the demo; and remove it",
    "cache --clear partial",
    add_arguments,
    run,
)
