"""Which folder of the package imports which, read from the source, as a picture: python docs/architecture.py

It writes docs/images/architecture.svg; `--check` fails where it would change it. tests/project/test_layering.py holds the
imports to its table by the same reading.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "spectrum_peft"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def room_of(path: Path, package: Path) -> str:
    """`scan` for every file of the folder scan, `names` for names.py."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def module_of(path: Path, package: Path) -> str:
    """Dotted name of a file, that of its folder for an `__init__`."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, package: Path) -> frozenset[str]:
    """Dotted names of all that a file may import when it runs: ours as `spectrum_peft.x`, others as `torch.nn`.

    Imports inside functions count; those under `if TYPE_CHECKING:` do not, they never run.
    """
    return _imports_in(path.read_text(encoding="utf-8"), path, package)


@functools.cache
def _imports_in(text: str, path: Path, package: Path) -> frozenset[str]:
    inside = [package.name, *path.relative_to(package).with_suffix("").parts[:-1]]  # the package that the file lies in
    found: set[str] = set()

    def is_module(name: str) -> bool:
        place = package.parent.joinpath(*name.split("."))
        return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:  # `from . import scan` names a module, `from .scan import x` does not
                whole = f"{name}.{alias.name}"
                ours = name == package.name or (name.startswith(f"{package.name}.") and is_module(whole))
                found.add(whole if ours else name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"}:
                found.add(str(node.args[0].value))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
    return frozenset(found)


def between_files(package: Path) -> dict[str, set[str]]:
    """Module of ours -> the modules of ours that it imports."""
    modules = {module_of(path, package): path for path in files(package)}
    return {
        name: {other for other in imports_of(path, package) if other in modules and other != name}
        for name, path in modules.items()
    }


def between_rooms(package: Path) -> dict[str, set[str]]:
    """Folder, or file of the top level -> those whose names it imports, without the package itself."""
    rooms = {room_of(path, package): set[str]() for path in files(package)}
    for path in files(package):
        for name in imports_of(path, package):
            library, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if library == package.name and room in rooms and room != room_of(path, package):
                rooms[room_of(path, package)].add(room)
    return rooms


def reach(arrows: Mapping[str, Iterable[str]], start: str) -> Iterator[str]:
    """All that can be reached from a node by at least one arrow; itself too where there is a circle."""
    seen: set[str] = set()
    todo = list(arrows.get(start, ()))
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += arrows.get(node, ())


def reduced(arrows: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer way stands for; they must make no circle."""
    return {
        node: {
            other for other in others if not any(other in reach(arrows, between) for between in others - {other})
        }
        for node, others in arrows.items()
    }  # fmt: skip


# What is drawn: pixels of a box, and between the middles of two.
BOX, ROW, COLUMN = (96, 30), 46, 140


def columns(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """How many rooms must be there before one: the length of the longest way that leads to it."""
    found: dict[str, int] = {}

    def column(room: str) -> int:
        if room not in found:
            found[room] = max((column(other) + 1 for other in arrows[room]), default=0)
        return found[room]

    for room in arrows:
        column(room)
    return found


def with_bends(
    arrows: Mapping[str, set[str]], column: Mapping[str, int]
) -> tuple[dict[str, set[str]], dict[str, int], dict[tuple[str, str], list[str]]]:
    """A long arrow gets a place of its own in each column that it crosses, so that it runs beside the rooms there.

    Returns:
        the arrows from place to place, the places' columns, and the places of each arrow.
    """
    places, numbers, ways = {room: set[str]() for room in arrows}, dict(column), {}
    for room in sorted(arrows):
        for other in sorted(arrows[room]):
            between = [f"{other} to {room}, {number}" for number in range(column[other] + 1, column[room])]
            ways[other, room] = [other, *between, room]
            for number, (one, next_one) in enumerate(pairwise(ways[other, room]), start=column[other] + 1):
                places.setdefault(next_one, set()).add(one)
                numbers[next_one] = number
    return places, numbers, ways


def heights(places: Mapping[str, set[str]], column: Mapping[str, int]) -> dict[str, float]:
    """Where each place stands in its column: in the order of the mean height of what leads to it, around the middle."""
    found: dict[str, float] = {}
    for number in range(max(column.values()) + 1):
        here = [place for place in sorted(column) if column[place] == number]
        mean = {p: sum(found[o] for o in places[p]) / len(places[p]) if places[p] else 0.0 for p in here}
        here.sort(key=lambda place: (mean[place], place))
        found |= {place: i - (len(here) - 1) / 2 for i, place in enumerate(here)}
    return found


def picture(package: Path = PACKAGE) -> str:
    """The folders as SVG, an arrow from what is known to who knows it: the way that data goes, from left to right.

    The files of the top level are left out: what everybody may know, and what ties stages together. Their arrows hide the others.
    """
    folders = {room for room in between_rooms(package) if (package / room).is_dir()}
    arrows = reduced({room: others & folders for room, others in between_rooms(package).items() if room in folders})
    places, column, ways = with_bends(arrows, columns(arrows))
    height_of = heights(places, column)
    lowest, highest = min(height_of.values()), max(height_of.values())
    width = COLUMN * max(column.values()) + BOX[0] + 20
    height = round(ROW * (highest - lowest)) + BOX[1] + 20
    middle = {
        p: (10 + BOX[0] // 2 + COLUMN * column[p], 10 + BOX[1] // 2 + round(ROW * (height_of[p] - lowest)))
        for p in places
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#7a8a99"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for way in ways.values():
        stops = [middle[place] for place in way]
        begin, end = (stops[0][0] + BOX[0] // 2, stops[0][1]), (stops[-1][0] - BOX[0] // 2, stops[-1][1])
        path = f"M{begin[0]} {begin[1]}"
        for (a, b), (x, y) in pairwise([begin, *stops[1:-1], end]):
            bend = (x - a) // 2
            path += f"C{a + bend} {b} {x - bend} {y} {x} {y}"
        lines.append(f'<path d="{path}" fill="none" stroke="#7a8a99" stroke-width="1.3" marker-end="url(#tip)"/>')
    for room in sorted(arrows):
        x, y = middle[room]
        lines.append(
            f'<rect x="{x - BOX[0] // 2}" y="{y - BOX[1] // 2}" width="{BOX[0]}" height="{BOX[1]}" rx="4" '
            'fill="#e3edf6" stroke="#33475b"/>'
        )
        lines.append(f'<text x="{x}" y="{y + 5}" text-anchor="middle" fill="#16202a">{room}/</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main(argv: list[str]) -> int:
    new = picture()
    if "--check" in argv:
        same = PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == new
        if not same:
            print(f"{PICTURE.name} is not the picture of the imports; run python docs/architecture.py")
        return int(not same)
    PICTURE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
