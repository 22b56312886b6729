"""The stages do not import each other: data is the arrow between them. The table below is what may import what.

Read from the source (docs/architecture.py), so that imports inside functions count; those under `if TYPE_CHECKING:` do not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import spectrum_peft

PACKAGE = Path(spectrum_peft.__file__).parent
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))

import architecture  # noqa: E402
from architecture import files, imports_of, room_of  # noqa: E402

# Everybody may import these, which import nothing but each other.
GROUND = {"errors", "names", "machine", "hub", "records"}
# Nobody is told here what to import: they tie the rest together.
TOP = {"__init__", "__main__", "cli"}
# Who may import whom besides the ground: one line for each room. A new arrow is a line here; a new room without one fails.
ARROWS = {
    "arguments": "",
    "devices": "",
    # numbers and weights
    "weights": "",
    "scan": "devices weights",
    # the user's rows, and gradients on them
    "data": "",
    "probe": "data devices scan weights",
    # decisions
    "plan": "",
    "plots": "",
    "card": "plots",
    "push": "card weights",
    # models
    "tuner": "card devices plan probe push scan weights",
    "memory": "plan scan tuner weights",
    "train": "arguments card data devices memory plan plots probe push scan tuner",
    "export": "card tuner weights",
    # all of it together
    "doctor": "devices scan weights",
    "scanner": "memory plan scan",
    "compare": "arguments data plan plots scan train tuner weights",
    "demo": "plan plots scan scanner",
    "tuning": "compare data devices memory plan plots tuner",
}
# One door for each library that is heavy, optional or changes under our feet.
DOORS = {
    "peft": {"memory", "tuner"},
    "bitsandbytes": {"tuner", "weights"},
    "matplotlib": {"plots"},
    "trl": {"memory", "train"},
    "datasets": {"data", "probe", "train"},
    "sklearn": {"train"},
    "gguf": {"export", "weights"},
    "wrapt": {"__init__"},
    "aenum": {"tuner"},
    "rouge_score": {"train"},
    "optuna": {"tuning"},
}
# Who asks transformers what a checkpoint's names mean, where they are not those that most decoders share.
ASKS = {"weights/layouts.py"}
# A plan is made, a file scanned and a table of columns shown without these libraries.
WITHOUT = {
    "torch": GROUND | {"arguments", "data", "plan", "plots"},
    "transformers": GROUND | {"arguments", "data", "plan", "plots", "scan", "weights"},
}


def breaches(package: Path) -> list[str]:
    """Every import that the tables do not allow, as `file imports what`."""
    found = []
    for path in files(package):
        room = room_of(path, package)
        allowed = GROUND | {room} | set(ARROWS.get(room, "").split()) | {"__version__"}
        for name in sorted(imports_of(path, package)):
            library, _, rest = name.partition(".")
            wrong = False
            if library == package.name:
                ours = rest.partition(".")[0] or "__init__"
                wrong = room not in TOP and (ours not in GROUND if room in GROUND else ours not in allowed)
            else:
                asks = library == "transformers" and path.relative_to(package).as_posix() in ASKS
                wrong = room not in DOORS.get(library, {room}) or (room in WITHOUT.get(library, ()) and not asks)
            if wrong:
                found.append(f"{path.relative_to(package).as_posix()} imports {name}")
    return found


def circles(package: Path) -> list[str]:
    """The modules that can be reached from themselves."""
    arrows = architecture.between_files(package)
    return sorted(name for name in arrows if name in architecture.reach(arrows, name))


def test_every_import_is_an_arrow_of_the_table() -> None:
    assert breaches(PACKAGE) == []


def test_every_arrow_of_the_table_is_used() -> None:
    real = architecture.between_rooms(PACKAGE)
    unused = {room: sorted(set(others.split()) - real[room]) for room, others in ARROWS.items()}
    assert {room: others for room, others in unused.items() if others} == {}


def test_every_room_has_a_row() -> None:
    assert {room_of(path, PACKAGE) for path in files(PACKAGE)} - GROUND - TOP == set(ARROWS)


def test_no_file_can_be_reached_from_itself() -> None:
    assert circles(PACKAGE) == []


def test_stages_that_hand_over_data_do_not_know_each_other() -> None:
    arrows = {room: others.split() for room, others in ARROWS.items()}
    beyond = {room: set(architecture.reach(arrows, room)) for room in arrows}
    assert not any(room in beyond[room] for room in arrows)
    assert not beyond["plan"] & {"scan", "weights", "probe"}
    assert not beyond["scan"] & {"plan", "tuner", "train"}


def test_the_picture_of_the_rooms_is_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert architecture.main(["--check"]) == 0
    old = tmp_path / "architecture.svg"
    old.write_text(architecture.PICTURE.read_text(encoding="utf-8").replace("weights/", "loads/"), encoding="utf-8")
    monkeypatch.setattr(architecture, "PICTURE", old)
    assert architecture.main(["--check"]) == 1
    assert architecture.main([]) == 0 and architecture.main(["--check"]) == 0


def test_arrows_that_a_longer_way_stands_for_are_left_out() -> None:
    arrows = {"a": set[str](), "b": {"a"}, "c": {"a", "b"}, "d": {"a"}}
    assert architecture.reduced(arrows) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a"}}
    assert architecture.columns(arrows) == {"a": 0, "b": 1, "c": 2, "d": 1}


@pytest.mark.parametrize(("file", "line", "seen"), [
    ("plan/make.py", "from ..scan import scan_weights", "plan/make.py imports spectrum_peft.scan"),
    ("plan/make.py", "def late():\n    from .. import scan", "plan/make.py imports spectrum_peft.scan"),
    ("plan/make.py", "def late():\n    import spectrum_peft.scan", "plan/make.py imports spectrum_peft.scan"),
    ("plan/make.py", "from spectrum_peft import make_plan", "plan/make.py imports spectrum_peft.make_plan"),
    ("plan/choose.py", "class A:\n    def late(self):\n        import torch.nn", "plan/choose.py imports torch.nn"),
    ("scan/scan.py", "try:\n    import peft\nexcept ImportError:\n    raise", "scan/scan.py imports peft"),
    ("scan/svd.py", "def late():\n    from transformers import AutoModel", "scan/svd.py imports transformers"),
    ("records/plan.py", "from ..plan import make_plan", "records/plan.py imports spectrum_peft.plan"),
    ("weights/files.py", "def late():\n    import matplotlib.pyplot as plt", "weights/files.py imports matplotlib.pyplot"),
    ("tuner/layers.py", "from ..train.callback import A", "tuner/layers.py imports spectrum_peft.train"),
    ("tuner/layers.py", "def late():\n    from .. import cli", "tuner/layers.py imports spectrum_peft.cli"),
    ("scan/criteria.py", "import bitsandbytes", "scan/criteria.py imports bitsandbytes"),
    ("scan/criteria.py", "import_module('spectrum_peft.plan')", "scan/criteria.py imports spectrum_peft.plan"),
])  # fmt: skip
def test_a_planted_breach_is_seen(tmp_path: Path, file: str, line: str, seen: str) -> None:
    package = tmp_path / PACKAGE.name
    copy = package / file
    copy.parent.mkdir(parents=True)
    copy.write_text(f"{(PACKAGE / file).read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")
    # The other files of the package are not there: a module of theirs is seen as its folder or as a name in it.
    assert [breach for breach in breaches(package) if breach.startswith(seen)]


def test_a_planted_circle_is_seen(tmp_path: Path) -> None:
    package = tmp_path / PACKAGE.name
    (package / "scan").mkdir(parents=True)
    for name, text in {
        "one": "from .two import x",
        "two": "def late():\n    from . import one",
        "three": "import os",
    }.items():
        (package / "scan" / f"{name}.py").write_text(text, encoding="utf-8")
    assert circles(package) == [f"{PACKAGE.name}.scan.one", f"{PACKAGE.name}.scan.two"]


def test_imports_for_the_type_checker_do_not_count(tmp_path: Path) -> None:
    package = tmp_path / PACKAGE.name
    (package / "plan").mkdir(parents=True)
    (package / "plan" / "make.py").write_text(
        "if TYPE_CHECKING:\n    from ..scan import x\nelse:\n    import torch\n", encoding="utf-8"
    )
    assert breaches(package) == ["plan/make.py imports torch"]
