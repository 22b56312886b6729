"""Large files in pieces that every way of carrying takes, and back: for the wheels of `make gpu`.

python benchmarks/pieces.py split wheels      # NAME becomes NAME.piece-000, ... of at most 60 MiB, and NAME.sha256
python benchmarks/pieces.py join wheels       # and back; the sum is compared, the pieces go
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

MOST = 60 * 2**20
_BLOCK = 2**20


def split(folder: Path, most: int = MOST) -> list[Path]:
    """Cut every file above `most` bytes; returns what was cut."""
    cut = []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.stat().st_size > most):
        digest = hashlib.sha256()
        with path.open("rb") as source:
            for number in range(-(-path.stat().st_size // most)):
                with path.with_name(f"{path.name}.piece-{number:03}").open("wb") as piece:
                    left = most
                    while left and (block := source.read(min(_BLOCK, left))):
                        piece.write(block)
                        digest.update(block)
                        left -= len(block)
        path.with_name(f"{path.name}.sha256").write_text(digest.hexdigest() + "\n")
        path.unlink()
        cut.append(path)
    return cut


def join(folder: Path) -> list[Path]:
    """Put together what was cut; returns it.

    Raises:
        SystemExit: the sum of the pieces is another: one is missing or damaged. They stay.
    """
    joined = []
    for sums in sorted(folder.glob("*.sha256")):
        path = sums.with_suffix("")
        pieces = sorted(folder.glob(f"{path.name}.piece-[0-9][0-9][0-9]"))
        whole, digest = path.with_name(f"{path.name}.joining"), hashlib.sha256()
        with whole.open("wb") as target:
            for piece in pieces:
                with piece.open("rb") as source:
                    while block := source.read(_BLOCK):
                        target.write(block)
                        digest.update(block)
        if digest.hexdigest() != sums.read_text().strip():
            whole.unlink()
            raise SystemExit(
                f"{path}: the sum of its {len(pieces)} pieces is not the one in {sums.name}; one is missing or damaged."
            )
        whole.replace(path)
        for used in (*pieces, sums):
            used.unlink()
        joined.append(path)
    return joined


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("split", "join"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for path in (split if options.what == "split" else join)(options.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
