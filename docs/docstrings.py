"""For the API page: a blank line before each section of a docstring, which this project's docstrings go without.

griffe, which reads them for mkdocstrings, takes a section that follows text without one for text.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"(?<=[^\n])\n(?=(?:Args|Returns|Raises|Attributes|Yields):\n)")


class Sections(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub("\n\n", obj.docstring.value)
