"""The examples run, in every mode, as a user starts them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from spectrum_peft.plan import MODES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("mode", MODES)
def test_the_plain_loop(
    mode: str, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("plain_loop.py", str(tiny_llama_folder), "--mode", mode, "--steps", "4", monkeypatch=monkeypatch)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) == 4 and losses[-1] != losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("mode", MODES)
def test_swapping_modes(
    mode: str, quantization: str | None, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    if quantization and MODES[mode].whole_model:
        pytest.skip("a mode that trains every weight has nothing to quantize; refused by name in test_cli.py")
    words = [str(tiny_llama_folder), "--mode", mode, "--steps", "2", "--out", str(tmp_path)]
    run("swap_modes.py", *words, *(["--quantization", quantization] if quantization else []), monkeypatch=monkeypatch)
    plain = tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(plain if plain.exists() else tmp_path / "trained")
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(tiny_llama_folder).num_parameters()
    assert (tmp_path / "lora").exists() == (not MODES[mode].real_weights)


def test_what_cannot_be_done_is_said_in_one_line(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(tiny_llama_folder), "--mode", "full", "--quantization", "nf4", "--out", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"^error: mode 'full' trains every weight, so none can be quantized; use mode="
    ):
        run("swap_modes.py", *words, monkeypatch=monkeypatch)


def test_the_examples_stay_short() -> None:
    assert len((EXAMPLES / "plain_loop.py").read_text().splitlines()) <= 40
    assert len((EXAMPLES / "swap_modes.py").read_text().splitlines()) < 80


@pytest.mark.parametrize(
    ("name", "adapter", "inside"),
    [
        pytest.param("vision_language.py", True, {"multi_modal", "merger"}, marks=pytest.mark.slow),
        pytest.param("speech_to_text.py", False, set(), marks=pytest.mark.slow),
        ("image_classification.py", True, {"classifier"}),
        pytest.param("speech_ctc.py", False, {"lm_head"}, marks=pytest.mark.slow),
        pytest.param("modernbert_tokens.py", True, {"classifier"}, marks=pytest.mark.slow),
    ],
)
def test_models_that_see_hear_or_read(
    name: str,
    adapter: bool,
    inside: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss falls, and what has no place in the base is in the file that is left."""
    import safetensors.torch

    run(name, "--out", str(tmp_path / "out"), monkeypatch=monkeypatch)
    first, last = map(float, capsys.readouterr().out.splitlines()[-1].removeprefix("loss ").split(" -> "))
    assert last < 0.9 * first
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    kept = safetensors.torch.load_file(tmp_path / "out" / file)
    assert not inside or any(part in key for key in kept for part in inside)
