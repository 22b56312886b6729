"""Which folder of the package imports which, read from the source: python docs/architecture.py writes the picture.

Between `<!-- picture -->` and `<!-- end -->` in docs/architecture.md stands what this script writes; `--check` fails where it
would change the page. tests/project/test_layering.py holds the imports to its table by the same reading.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "spectrum_peft"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- picture -->\n", "<!-- end -->"


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def room_of(path: Path, package: Path) -> str:
    """`scan` for every file of the folder scan, `names` for names.py."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def module_of(path: Path, package: Path) -> str:
    """Dotted name of a file, that of its folder for an `__init__`."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, package: Path) -> set[str]:
    """Dotted names of all that a file may import when it runs: ours as `spectrum_peft.x`, others as `torch.nn`.

    Imports inside functions count; those under `if TYPE_CHECKING:` do not, they never run.
    """
    inside = [package.name, *path.relative_to(package).with_suffix("").parts[:-1]]  # the package that the file lies in
    modules = {module_of(other, package) for other in files(package)}
    found: set[str] = set()

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
                found.add(whole if whole in modules or name == package.name else name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"}:
                found.add(str(node.args[0].value))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


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


def picture(package: Path = PACKAGE) -> str:
    """The rooms as a Mermaid graph, an arrow from what is known to who knows it: the way that data goes."""
    hidden = {"__init__", "__main__", "errors", "names", "machine", "devices", "arguments"}
    rooms = {
        room: others - hidden for room, others in between_rooms(package).items() if room not in hidden
    }  # fmt: skip
    lines = ["graph LR"]
    for room in sorted(rooms):
        is_folder = (package / room).is_dir()
        lines.append(f"    {room}[{room}/]" if is_folder else f"    {room}([{room}.py])")
    for room, others in sorted(reduced(rooms).items()):
        lines += [f"    {other} --> {room}" for other in sorted(others)]
    return "```mermaid\n" + "\n".join(lines) + "\n```\n"


def main(argv: list[str]) -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    new = f"{before}{BEGIN}{picture()}{end}{after}"
    if "--check" in argv:
        if new != text:
            print(f"{PAGE.relative_to(ROOT)}: the picture is not that of the imports; run python docs/architecture.py")
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
