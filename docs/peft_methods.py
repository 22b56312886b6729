"""Writes the tables of docs/peft_methods.md that say what is in the code: python docs/peft_methods.py; `--check` only compares.

The table of methods is measured by tests/tuner/test_peft_methods.py and written by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from spectrum_peft.plan import MODES
from spectrum_peft.tuner.lora_fields import FIELDS, INITS

PAGE = Path(__file__).with_suffix(".md")
END = "<!-- end -->"


def _modes(actions: frozenset[str]) -> str:
    fitting = [f"`{mode.name}`" for mode in MODES.values() if mode.action in actions]
    return "every mode" if len(fitting) == len(MODES) else ", ".join(fitting)


def fields() -> str:
    lines = ["| field | here | why, or where | instead |", "| --- | --- | --- | --- |"]
    for name, row in FIELDS.items():
        where = _modes(row.actions) if row.does in ("low rank", "no effect") else ""
        why = "; ".join(part for part in (where, row.why) if part)
        lines.append(f"| `{name}` | {row.does} | {why} | {row.instead} |")
    return "\n".join(lines) + "\n"


def inits() -> str:
    lines = ["| value | modes |", "| --- | --- |"]
    lines += [f"| `{value!r}` | {_modes(actions)} |" for value, actions in INITS.items()]
    lines.append("| `'pissa'`, `'olora'`, `'corda'`, `'loftq'`, `'lora_ga'` | none: they rewrite the base |")
    lines.append("| `'mica'` | none: it trains one factor of the two |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with its tables as the code says."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("fields", fields()), ("inits", inits())):
        begin = f"<!-- {name} -->\n"
        before, _, rest = text.partition(begin)
        text = before + begin + table + END + rest.partition(END)[2]
    return text


def main(argv: list[str]) -> int:
    new = page()
    if "--check" in argv:
        same = PAGE.read_text(encoding="utf-8") == new
        if not same:
            print(f"{PAGE.name} is not what the code says; run python docs/peft_methods.py")
        return int(not same)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
