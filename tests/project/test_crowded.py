"""Output folders that vanish, a base that cannot be written, a cache that two runs share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectrum_peft.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--max-steps 3 --save-steps 1 --per-device-train-batch-size 2 --max-length 32 --dtype float32 --report-to none"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"number {i} is followed by {i + 1}"} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# What stands for a whole result where a command makes its folder anew.
RESULTS = {
    "train": ("run/adapter_model.safetensors", "run/adapter_config.json", "run/checkpoint-3/optimizer.pt", "run/tokenizer.json"),
    "scan": ("report.json",), "plan": ("plan.yaml",), "evaluate": ("metrics.json",),
}  # fmt: skip


def vanishes(folder: str, how: str) -> None:
    """A folder that a command writes to goes away; nothing, or something else, stands in its place."""
    shutil.rmtree(folder)
    if how == "a file in its place":
        Path(folder).write_text("")


def once_before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], None]) -> None:
    real = getattr(owner, name)
    done: list[int] = []

    def instead(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(1)
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, instead)


@pytest.fixture
def adapter(tiny_llama_folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama_folder), LoraConfig(target_modules=["q_proj"])
    )
    model.peft_config["default"].base_model_name_or_path = str(tiny_llama_folder)
    model.save_pretrained("adapter")
    return Path("adapter")


@pytest.mark.multiprocess
def test_two_runs_that_share_a_cache_end_as_one_alone_does(tiny_llama_folder: Path) -> None:
    """Scans are kept there, decompositions of lorsa, and copies of bases: both runs find nothing, and write the same."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

    def start(out: str, cache: str) -> subprocess.Popen[str]:
        words = f"train --model {tiny_llama_folder} --dataset rows.jsonl --mode lorsa --n-components 8 --svd-rank 16 {FLAGS}"
        return subprocess.Popen(
            [sys.executable, "-m", "spectrum_peft", *words.split(), "--output-dir", out],
            env={**environment, "SPECTRUM_PEFT_CACHE": cache}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    runs = {name: start(name, "alone" if name == "one" else "shared") for name in ("one", "two", "three")}
    said = {name: process.communicate(timeout=300)[0] for name, process in runs.items()}
    assert {name: process.returncode for name, process in runs.items()} == dict.fromkeys(runs, 0), said
    weights = {name: Path(name, "adapter_model.safetensors").read_bytes() for name in runs}
    assert weights["one"] == weights["two"] == weights["three"]
    files = {cache: sorted(p.name for p in Path(cache).rglob("*") if p.is_file()) for cache in ("alone", "shared")}
    assert files["alone"] == files["shared"] != []
    assert not [name for name in files["shared"] if name.endswith(".part")]


@pytest.mark.multiprocess
def test_a_base_that_cannot_be_written_is_enough_for_every_verb(tiny_llama_folder: Path) -> None:
    """As a user who may only read it, whoever runs the tests; every file of it stays as it is."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        base, out = place / "base", place / "out"
        shutil.copytree(tiny_llama_folder, base)
        shutil.copy("rows.jsonl", place)
        out.mkdir()
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in base.iterdir()}
        for path in (*base.iterdir(), base):
            path.chmod(0o555 if path.is_dir() else 0o444)
        place.chmod(0o755)
        out.chmod(0o777)
        lines = [
            f"scan {base} --cache -o {out}/report.json",
            f"memory {base} --mode lora",
            f"probe {base} --dataset {place}/rows.jsonl -o {out}/gradients.json",
            f"train --model {base} --dataset {place}/rows.jsonl --mode spectrum --keep-base file --output-dir {out}/real {FLAGS}",
            f"train --model {base} --dataset {place}/rows.jsonl --mode lora --output-dir {out}/run {FLAGS}",
            f"evaluate {out}/run --dataset {place}/rows.jsonl --dtype float32",
            f"merge {out}/run --base {base} -o {out}/merged",
        ]
        program = "import sys, os; from spectrum_peft.cli.main import main\n"
        program += f"assert not os.access({str(base)!r}, os.W_OK)\n"
        program += "".join(f"assert main({line.split()!r}) == 0\n" for line in lines)
        # The owner of a folder that may not write it; root may write anything, unless it gives that up.
        root = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
        if root and shutil.which(root[0]) is None:
            pytest.skip("root may write anywhere, and there is no setpriv to give that up")
        folders = {
            "HOME": out,
            "SPECTRUM_PEFT_CACHE": out / "cache",
            "HF_HOME": out / "hf",
            "PYTHONPATH": ROOT,
            "TMPDIR": out,
        }
        environment = {**os.environ, **{variable: str(folder) for variable, folder in folders.items()}}
        words = [*root, sys.executable, "-c", program]
        done = subprocess.run(words, env=environment, cwd=out, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in base.iterdir()} == before
        base.chmod(0o755)


@pytest.mark.parametrize("how", ["nothing in its place", "a file in its place"])
@pytest.mark.parametrize("verb", ["train", "merge", "export", "scan", "plan", "evaluate", "compare"])
def test_an_output_folder_that_vanishes_is_one_line_or_made_again(
    verb: str, how: str, adapter: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import spectrum_peft.plan
    import spectrum_peft.scan
    from spectrum_peft.compare import runs
    from spectrum_peft.train import saved, watch
    from spectrum_peft.weights import writer

    Path("out").mkdir()
    lines = {
        "train": f"train --model {tiny_llama_folder} --dataset rows.jsonl --mode lora --output-dir out/run {FLAGS}",
        "merge": f"merge {adapter} --base {tiny_llama_folder} -o out/merged",
        "export": f"export {adapter} --format lora -o out/lora",
        "scan": f"scan {tiny_llama_folder} --criterion last -o out/report.json",
        "plan": "plan report.json -o out/plan.yaml",
        "evaluate": f"evaluate {adapter} --dataset rows.jsonl --dtype float32 -o out/metrics.json",
        "compare": f"compare --model {tiny_llama_folder} --dataset rows.jsonl -o out/c --modes lora {FLAGS} --controls",
    }
    if verb == "plan":
        assert main(lines["scan"].replace("out/", "").split()) == 0
    places = {
        "train": (watch.StepClock, "on_step_end"), "merge": (writer.SafetensorsWriter, "__exit__"),
        "export": (writer.SafetensorsWriter, "__exit__"), "scan": (spectrum_peft.scan, "scan_weights"),
        "plan": (spectrum_peft.plan, "explain"), "evaluate": (saved, "evaluate_saved"),
        "compare": (runs, "launch"),
    }  # fmt: skip
    once_before(monkeypatch, *places[verb], lambda: vanishes("out", how))
    code = main(lines[verb].split())
    said = capsys.readouterr().err
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("spectrum-peft: error: ")]
    assert (code, len(errors)) in {(0, 0), (2, 1)}
    if code:
        said = "No such file" if verb == "compare" and how == "nothing in its place" else "cannot be written"
        said = "Not a directory" if verb == "compare" and how == "a file in its place" else said
        assert "out/" in errors[0] and said in errors[0] and ".part" not in errors[0]
        assert not Path("out").is_dir() or not [path for path in Path("out").rglob("*") if path.is_file()]
    else:
        assert (verb, how) in {(v, "nothing in its place") for v in ("train", "scan", "plan", "evaluate")}
        assert [path.name for name in RESULTS[verb] for path in [Path("out", name)] if not path.is_file()] == []
