"""`recipe.yaml`: what `spectrum-peft train --config` takes to do again what was best."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from ..data import from_anywhere
from ..records import write_text
from .prices import Price
from .settings import Asked

RECIPE = "recipe.yaml"


def recipe_of(asked: Asked, price: Price, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Keys of `train`: the user's own data, and what was found."""
    shared = {k: v for k, v in asked.train.items() if v is not None and k != "num_train_epochs"}
    if Path(shared["model"]).exists():
        shared["model"] = str(Path(shared["model"]).resolve())
    for name in ("dataset", "eval_dataset"):
        if shared.get(name):
            shared[name] = from_anywhere(shared[name])
    own = {**price.contestant.settings, **price.settings}
    return {**shared, "task": asked.task, **own, "learning_rate": rate, "max_steps": steps, "seed": seed}


def write_recipe(folder: Path, asked: Asked, price: Price, rate: float, steps: int, seed: int, says: str) -> None:
    """Write it, with a line that says what it is."""
    plain = json.loads(json.dumps(recipe_of(asked, price, rate, steps, seed), default=str))
    head = [
        f"# {says}",
        f"# spectrum-peft train --config {shlex.quote(str(folder / RECIPE))} --output-dir trained",
    ]
    if price.contestant.peft is not None:
        write_text(folder / "peft.yaml", yaml.safe_dump(dict(price.contestant.peft), sort_keys=False))
        plain.pop("report", None)  # PEFT's own methods are made of no scores
        plain["peft_config"] = str((folder / "peft.yaml").resolve())
    write_text(folder / RECIPE, "\n".join(head) + "\n" + yaml.safe_dump(plain, sort_keys=False))
