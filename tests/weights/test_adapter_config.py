"""Patterns of an adapter's config: which of them a module meets."""

from __future__ import annotations

import random
import re

from peft.utils.other import get_pattern_key

from spectrum_peft.weights.adapter_config import ByPattern

NAMES = [
    f"model.layers.{i}.{part}"
    for i in (1, 2, 11, 12)
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.w-1")
]


def test_a_module_gets_what_peft_gives_it() -> None:
    ways = [
        lambda name: "^" + re.escape(name),
        lambda name: "^" + name,  # its dots are any character
        re.escape,
        lambda name: name.rpartition(".")[2],
        lambda name: name.partition(".")[2],
        lambda name: rf"layers\.{name.split('.')[2]}\..*",
        lambda name: "^" + re.escape(name[:-1]),
        lambda name: "^" + name.replace(".", r"\d"),
    ]
    draw = random.Random(0)
    met = 0
    for _ in range(400):
        keys = [draw.choice(ways)(draw.choice(NAMES)) for _ in range(draw.randint(0, 5))]
        patterns = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        found = ByPattern(patterns)
        for name in NAMES:
            wanted = patterns.get(get_pattern_key(list(patterns), name), "none")
            assert found.get(name, "none") == wanted, (patterns, name)
            met += wanted != "none"
    assert 400 < met < 400 * len(NAMES)
