"""The stages do not import each other: data is the arrow between them. The table below is what may import what.

Read from the source, so that imports inside functions count; those under `if TYPE_CHECKING:` do not, they never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

import spectrum_peft

PACKAGE = Path(spectrum_peft.__file__).parent

# Everybody may import these, which import nothing but each other.
GROUND = {"errors", "names", "records"}
# Nobody is told here what to import: they tie the rest together.
TOP = {"__init__", "__main__", "cli"}
# Who may import whom besides the ground. A new arrow is a line here; a new module without a row fails. The tuner's
# files are one row.
ARROWS = {
    "machine": "",
    # numbers and weights
    "criteria": "",
    "weights": "",
    "svd": "",
    "threads": "",
    "safetensors_io": "weights",
    "adapters": "svd weights",
    "scan": "adapters criteria machine threads weights",
    "probe": "adapters criteria scan svd tasks weights",
    # decisions
    "policies": "",
    "plan": "policies",
    "scanner": "memory plan scan",
    "plots": "",
    # models
    "config": "plan policies",
    "tuner": "adapters config criteria plan policies probe scan svd weights",
    "loading": "config plan policies scan tuner weights",
    "memory": "config loading plan policies tuner weights",
    "rewrite": "adapters machine safetensors_io threads weights",
    "export": "adapters rewrite safetensors_io tuner weights",
    # training
    "optim": "tuner",
    "callback": "config optim plan policies scan tuner",
    "arguments": "",
    "tasks": "",
    "generation": "",
    "training": "arguments callback config generation loading machine plan policies probe scan tasks",
    "compare": "arguments config criteria generation machine plan plots policies scan tasks training",
    "demo": "loading memory plan plots policies scan scanner tasks training",
}
# One door for each library that is heavy, optional or changes under our feet.
DOORS = {
    "peft": {"config", "tuner", "loading", "export", "memory"},
    "bitsandbytes": {"weights", "loading"},
    "matplotlib": {"plots"},
    "trl": {"memory", "tasks", "training"},
    "sklearn": {"tasks"},
    "gguf": {"weights"},
    "wrapt": {"__init__"},
    "aenum": {"tuner"},
    "rouge_score": {"generation"},
}
# A plan is made, and a file scanned, without these libraries.
WITHOUT = {
    "torch": GROUND | {"policies", "plan", "plots", "arguments", "machine"},
    "transformers": GROUND
    | {"policies", "plan", "plots", "arguments", "machine", "criteria", "weights", "adapters", "scan"},
}


def unit_of(path: Path, package: Path) -> str:
    """`scan` for scan.py, `tuner` for every file of the folder tuner."""
    parts = path.relative_to(package).with_suffix("").parts
    return parts[0]


def imports_of(path: Path, package: Path) -> set[str]:
    """Dotted names of all that a file may import when it runs: ours as `spectrum_peft.x`, others as `torch.nn`."""
    inside = [package.name, *path.relative_to(package).with_suffix("").parts[:-1]]  # the package that the file lies in
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
            base = [*base, *(node.module.split(".") if node.module else [])]
            if base == [package.name]:  # from . import scan
                found.update(f"{package.name}.{alias.name}" for alias in node.names)
            else:
                found.add(".".join(base))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"}:
                found.add(str(node.args[0].value))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def breaches(package: Path) -> list[str]:
    """Every import that the tables do not allow, as `file imports what`."""
    found = []
    for path in files(package):
        unit = unit_of(path, package)
        allowed = GROUND | {unit} | set(ARROWS.get(unit, "").split()) | {"__version__"}
        for name in sorted(imports_of(path, package)):
            library, _, rest = name.partition(".")
            wrong = False
            if library == package.name:
                ours = rest.partition(".")[0] or "__init__"
                wrong = unit not in TOP and (ours not in GROUND if unit in GROUND else ours not in allowed)
            else:
                wrong = unit not in DOORS.get(library, {unit}) or unit in WITHOUT.get(library, ())
            if wrong:
                found.append(f"{path.relative_to(package).as_posix()} imports {name}")
    return found


def test_every_import_is_an_arrow_of_the_table() -> None:
    assert breaches(PACKAGE) == []


def test_every_module_has_a_row() -> None:
    units = {unit_of(path, PACKAGE) for path in files(PACKAGE)}
    assert units - GROUND - TOP <= set(ARROWS)


def test_the_arrows_make_no_cycle() -> None:
    def reach(unit: str, path: tuple[str, ...] = ()) -> Iterable[str]:
        assert unit not in path, " -> ".join([*path, unit])
        for other in ARROWS[unit].split():
            yield other
            yield from reach(other, (*path, unit))

    beyond = {unit: set(reach(unit)) for unit in ARROWS}
    assert not beyond["plan"] & {"scan", "weights", "criteria"}
    assert not beyond["scan"] & {"plan", "tuner", "loading", "config"}


@pytest.mark.parametrize(("file", "line", "seen"), [
    ("plan.py", "from .scan import scan_weights", "plan.py imports spectrum_peft.scan"),
    ("plan.py", "def late():\n    from . import scan", "plan.py imports spectrum_peft.scan"),
    ("plan.py", "def late():\n    import spectrum_peft.scan", "plan.py imports spectrum_peft.scan"),
    ("plan.py", "from spectrum_peft import make_plan", "plan.py imports spectrum_peft.make_plan"),
    ("policies.py", "class A:\n    def late(self):\n        import torch.nn", "policies.py imports torch.nn"),
    ("scan.py", "try:\n    import peft\nexcept ImportError:\n    raise", "scan.py imports peft"),
    ("scan.py", "def late():\n    from transformers import AutoModel", "scan.py imports transformers"),
    ("records.py", "from .plan import make_plan", "records.py imports spectrum_peft.plan"),
    ("weights/files.py", "def late():\n    import matplotlib.pyplot as plt", "weights/files.py imports matplotlib.pyplot"),
    ("tuner/layers.py", "from ..callback import SpectrumCallback", "tuner/layers.py imports spectrum_peft.callback"),
    ("tuner/layers.py", "def late():\n    from .. import cli", "tuner/layers.py imports spectrum_peft.cli"),
    ("tuner/layers.py", "import bitsandbytes", "tuner/layers.py imports bitsandbytes"),
    ("criteria.py", "import_module('spectrum_peft.plan')", "criteria.py imports spectrum_peft.plan"),
])  # fmt: skip
def test_a_planted_breach_is_seen(tmp_path: Path, file: str, line: str, seen: str) -> None:
    package = tmp_path / PACKAGE.name
    copy = package / file
    copy.parent.mkdir(parents=True)
    copy.write_text(f"{(PACKAGE / file).read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")
    assert breaches(package) == [seen]


def test_imports_for_the_type_checker_do_not_count(tmp_path: Path) -> None:
    package = tmp_path / PACKAGE.name
    package.mkdir()
    (package / "plan.py").write_text("if TYPE_CHECKING:\n    from .scan import x\nelse:\n    import torch\n")
    assert breaches(package) == ["plan.py imports torch"]
