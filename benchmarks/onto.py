"""Where an adapter that was trained on a 4-bit base belongs: merged onto the original weights, or onto the dequantized ones?

    python benchmarks/onto.py [--steps 40]

Trains SmolLM2-135M on the standard library's documentation topics over an nf4 base, once as `spectra_qlora` and once as
`spectrum`, merges both ways, and judges all on held-out topics with `spectrum-peft evaluate`, beside the untrained base.
Everything goes through the command line. Some 15 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from spectrum_peft.demo import smollm2_folder, topics

MODES = {"spectra_qlora": "0.5", "spectrum": "0.25"}
LENGTH = "256"


def verb(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "spectrum_peft", *words], check=True, stdout=subprocess.DEVNULL)


def judged(model: Path | str, held_out: Path, folder: Path, *more: str) -> dict[str, Any]:
    """Held-out loss, perplexity and token accuracy of a folder."""
    out = folder / "metrics.json"
    verb(
        "evaluate",
        str(model),
        "--dataset",
        str(held_out),
        "--dtype",
        "float32",
        "--max-length",
        LENGTH,
        "-o",
        str(out),
        *more,
    )
    return {
        k: v for k, v in json.loads(out.read_text()).items() if k in ("loss", "perplexity", "token_accuracy", "tokens")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("-o", "--output", default=str(Path(__file__).parent / "results" / "onto.json"))
    options = parser.parse_args()
    base = str(smollm2_folder())
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, texts in zip(("train", "held_out"), topics(), strict=True):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        held_out = folder / "held_out.jsonl"
        rows["base"] = {"original": judged(base, held_out, folder)}
        for mode, ratio in MODES.items():
            adapter = folder / mode
            verb(
                "train", "--model", base, "--mode", mode, "--ratio", ratio, "--quantization", "nf4", "--dtype", "float32",
                "--dataset", str(folder / "train.jsonl"), "--max-steps", str(options.steps), "--max-length", LENGTH,
                "--per-device-train-batch-size", "4", "--save-strategy", "no", "--report-to", "none",
                "--output-dir", str(adapter),
            )  # fmt: skip
            row = {"adapter on nf4": judged(adapter, held_out, folder, "--quantization", "nf4")}
            for onto in ("original", "dequantized"):
                out = folder / f"{mode}-{onto}"
                verb("merge", str(adapter), "--base", base, "-o", str(out), "--onto", onto)
                row[f"merged onto {onto}"] = judged(out, held_out, folder)
            rows[mode] = row
    common.save(options.output, "onto", {"steps": options.steps, "length": int(LENGTH), "held_out_loss": rows})
    for mode, row in rows.items():
        for what, metrics in row.items():
            print(f"{mode:15} {what:24} loss {metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
