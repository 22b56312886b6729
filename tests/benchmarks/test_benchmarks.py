"""The benchmarks run, on a tiny model: what they write has every field, and their counting is right."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import components  # noqa: E402
import modes  # noqa: E402
import tables  # noqa: E402
import tensors  # noqa: E402
import turns  # noqa: E402


def _run(tmp_path: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    output = tmp_path / "modes.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "modes.py", "--models", folder, "--repeats", "1", "--steps", "2",
         "--output", output, *options],
        capture_output=True, text=True, check=False, env={**os.environ, "SPECTRUM_PEFT_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout + done.stderr


def _check(result: dict[str, Any], groups: list[str]) -> None:
    assert result["benchmark"] == "modes"
    assert {"cpu", "cores", "memory_bytes", "packages", "commit", "load_average"} <= set(result["machine"])
    assert result["settings"]["repeats"] == 1
    assert result["settings"]["dtype"] == "float32"
    [model] = result["models"].values()
    assert list(model["contestants"]) == [name for group in groups for name in modes.GROUPS[group]]
    for name, row in model["contestants"].items():
        assert len(row["step_seconds"][0]) == 2, name
        assert row["step"]["n"] == 1
        assert row["step"]["median"] > 0
        assert row["optimizer_bytes"] >= row["trainable_bytes"], name
        assert row["gradient_bytes"] == row["trainable_bytes"], name
        assert row["weight_bytes"] >= row["trainable_bytes"], name
        assert row["activation_bytes"] > 0, name
        if row["peak_bytes"] is not None:
            assert row["peak_bytes"] > row["interpreter_bytes"], name
            assert row["peak_private_bytes"] > row["weight_bytes"], name
        assert row["trainable_parameters"] > 0, name


@pytest.mark.slow
def test_a_small_run_of_modes_gives_every_field_and_is_kept(tmp_path: Path, tiny_llama_folder: Path) -> None:
    result, _ = _run(tmp_path, tiny_llama_folder, "--groups", "adapters")
    _check(result, ["adapters"])
    rows = next(iter(result["models"].values()))["contestants"]
    ours, theirs = rows["lora"], rows["LoRA of peft"]
    for field in ("trainable_parameters", "weight_bytes", "optimizer_bytes", "activation_bytes"):
        assert ours[field] == theirs[field], field
    [claim] = result["claims"]
    assert claim["wanted"] == "0.98 to 1.02"
    assert claim["pass"] == (abs(claim["seen"] - 1) <= 0.02)

    [kept] = (tmp_path / "cache" / "benchmarks").glob("modes-*/*-adapters-0.json")
    seconds = json.loads(kept.read_text())["contestants"]["lora"]["step_seconds"]
    assert [round(s, 4) for s in seconds] == ours["step_seconds"][0]


@pytest.mark.slow
def test_all_of_modes_runs_and_the_bytes_are_as_claimed(tmp_path: Path, tiny_llama_folder: Path) -> None:
    result, text = _run(tmp_path, tiny_llama_folder)
    _check(result, list(modes.GROUPS))
    [model] = result["models"].values()
    rows = model["contestants"]
    assert rows["full"]["trainable_parameters"] * 4 == rows["full"]["trainable_bytes"]
    assert rows["LoRA of peft, SFT"]["trainable_dtypes"] == ["bfloat16"]
    assert rows["lora, SFT"]["trainable_dtypes"] == ["float32"]
    assert rows["alors 0.5 re-evaluated, SFT"]["rescore"]["median"] > 0
    counted = [claim for claim in result["claims"] if claim["claim"].startswith("bytes")]
    assert len(counted) == 5
    assert all(claim["pass"] for claim in counted), counted
    assert "spectra_qlora 0.5, upper half, SFT" in text

    again, _ = _run(tmp_path, tiny_llama_folder)
    assert again["models"] == result["models"]  # the same seconds to the digit: nothing was run again


def test_a_contestant_that_fails_is_named_with_its_error() -> None:
    here, there = multiprocessing.Pipe()
    runner = turns.Runner("lora, nf4", None, here)
    there.send({"error": "ValueError: of its own"})
    with pytest.raises(turns.ContestantFailed, match=r"lora, nf4:\nValueError: of its own"):
        runner.turn()


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        modes.main(["--models", str(tmp_path)])
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_what_is_saved_for_backward_is_counted_once_and_without_weights() -> None:
    import torch

    layer = torch.nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    saved = tensors.SavedForBackward(layer)
    with saved:
        y = layer(x)  # keeps x and the weight
        z = (y.sigmoid() * y.sigmoid()).sum()  # keeps each sigmoid once, for itself and for the product
        dropped = layer(x * 2)
        del dropped
    assert saved.bytes == 4 * 8 * 4 + 2 * 4 * 16 * 4
    z.backward()
    assert saved.bytes == 0


def test_a_ratio_of_times_pairs_the_steps_of_a_round() -> None:
    rows = [
        {"contestants": {"one": {"step_seconds": [1.0, 3.0, 2.0]}, "other": {"step_seconds": [2.0, 4.0, 2.0]}}},
        {"contestants": {"one": {"step_seconds": [9.0]}, "other": {"step_seconds": [10.0]}}},
        {"contestants": {"one": {"step_seconds": [5.0]}}},
    ]
    ratio = modes.time_ratio(rows, "one", "other")
    assert ratio is not None
    assert (ratio["min"], ratio["max"], ratio["n"]) == (0.75, 0.9, 2)
    assert math.isclose(ratio["median"], 0.825)
    assert modes.time_ratio(rows, "one", "nobody") is None


def test_a_child_is_measured_by_its_own_peak() -> None:
    held = bytearray(200 * 2**20)  # in this process, and not to be counted for the child
    code = "import time; held = b'x' * (100 * 2**20); time.sleep(0.1); print(len(held))"
    child = common.run_child([sys.executable, "-c", code])
    assert child.returncode == 0
    assert child.stdout.strip() == str(100 * 2**20)
    if child.peak_bytes is not None:
        assert 100 * 2**20 < child.peak_bytes < 100 * 2**20 + len(held)


def test_the_peak_begins_again_when_it_is_reset() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux lets a peak begin again")
    held = bytearray(100 * 2**20)
    del held
    before = common.peak_resident()
    common.reset_peak()
    assert common.peak_resident() < before - 50 * 2**20


def test_two_halves_of_a_task_have_no_row_in_common(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": f"Row {n}, is it?", "label": "a_b"}) + "\n" for n in range(50)))
    _, restored = components.TASKS["punctuation"]
    one, other = components.halves(path, restored, 20)
    assert len(one) == len(other) == 20 and (one, other) == components.halves(path, restored, 20)
    assert not {row["completion"] for row in one} & {row["completion"] for row in other}
    number = one[0]["completion"].removeprefix(" Row ").partition(",")[0]
    assert one[0]["prompt"].startswith(f"row {number} is it\n")
    _, classified = components.TASKS["intents"]
    assert classified({"text": "Hi.", "label": "a_b"}) == {"prompt": "Hi.\nIntent:", "completion": " a b"}


def test_decay_of_a_matrix_of_known_values(tmp_path: Path) -> None:
    values = torch.tensor([3.0] + [1.0] * 18 + [0.0])
    save_file({"model.layers.0.mlp.up_proj.weight": torch.diag(values)}, tmp_path / "model.safetensors")
    assert components.decay(str(tmp_path))["median"] == pytest.approx(10 / 27)


def test_the_rule_for_rates_finds_a_law_that_was_planted() -> None:
    """rate = 7 usual(means) / sqrt(steps), and no rate of the search that is asked about is among the others."""

    def best(means: str, steps: int) -> tables._Best:
        usual = {"real weights": 0.01, "LoRA": 0.1}[means]
        return tables._Best("a", "m", steps, f"{means} {steps}", means, 7 * usual / steps**0.5, usual, 1.0, False)

    others = [best(means, steps) for means in ("real weights", "LoRA") for steps in (25, 150)]
    for means in ("real weights", "LoRA"):
        asked = best(means, 1000)
        # A mean of logarithms in float64 of an exact law.
        assert tables._fitted_rate(asked._replace(rate=7.0), others) == pytest.approx(asked.rate, rel=1e-9)


def test_a_made_checkpoint_is_the_same_bytes_however_it_is_asked_for() -> None:
    import made
    from safetensors.torch import load

    shapes = {"a.weight": (700, 1000), "b.weight": (41, 7)}
    file = made.MadeFile(3, shapes)
    whole = b"".join(file.pieces(0, file.size))
    cuts = [0, 5, 100, file.size // 3, file.size - 1, file.size]
    again = made.MadeFile(3, shapes)
    assert whole == b"".join(piece for a, b in itertools.pairwise(cuts) for piece in again.pieces(a, b))
    assert len(whole) == file.size
    tensors = {name: tensor.float() for name, tensor in load(whole).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "a.weight": (700, 1000),
        "b.weight": (41, 7),
    }
    assert torch.linalg.matrix_rank(tensors["b.weight"]) == 7
    # Independent, mean zero, of the least size 2^-6 and the largest 2^-5: the mean of 700,000 lies within 5 standard errors.
    assert abs(tensors["a.weight"].mean()) < 5 * 0.024 / 700_000**0.5
    assert 2**-6 <= tensors["a.weight"].abs().min() < tensors["a.weight"].abs().max() < 2**-5
