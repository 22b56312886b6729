"""One script, every mode: only the word after --mode changes. Trains, then writes what can be used without this library.

    python examples/swap_modes.py MODEL_FOLDER --mode spectrum
    python examples/swap_modes.py MODEL_FOLDER --mode spectra_qlora --quantization nf4

OUT/trained: a plain checkpoint, or an adapter. OUT/merged: an adapter merged into the base. OUT/lora: as a plain LoRA.
"""

import argparse
import sys
from pathlib import Path
from pydoc_data.topics import topics  # 79 pages about Python that come with it

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from spectrum_peft import (
    SpectrumCallback,
    SpectrumConfig,
    calibration_batches,
    export_lora,
    load_model_with_spectrum,
    merge_into_base,
)
from spectrum_peft.errors import SpectrumError
from spectrum_peft.plan import DEFAULT_RATIO, MODES

HELD_OUT = 8


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--mode", default="spectrum", choices=list(MODES))
    parser.add_argument("--quantization", choices=["nf4", "fp4", "int8"], help="of the base; default: none")
    parser.add_argument("--learning-rate", type=float, help="default: the mode's own")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 where the device is fast at it")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default="swap_modes_output")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    mode, out = MODES[options.mode], Path(options.out)
    texts = [{"text": text} for _, text in sorted(topics.items())]
    config = SpectrumConfig(mode=mode.name)
    rate = options.learning_rate or mode.rate_for(options.steps, ratio=DEFAULT_RATIO)
    if mode.needs_data:  # gradients on the first rows that it will train on
        config.calibration_data = calibration_batches(texts[:16], AutoTokenizer.from_pretrained(options.model), n=16)
    how = {"dtype": options.dtype, "quantization": options.quantization}
    model, tokenizer = load_model_with_spectrum(options.model, config, **how)
    args = SFTConfig(
        output_dir=str(out / "runs"), max_steps=options.steps, learning_rate=rate, per_device_train_batch_size=2,
        max_length=256, report_to=[], bf16=model.dtype == torch.bfloat16, use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, processing_class=tokenizer, callbacks=[SpectrumCallback()],
        train_dataset=Dataset.from_list(texts[:-HELD_OUT]), eval_dataset=Dataset.from_list(texts[-HELD_OUT:]),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(out / "trained"))
    if isinstance(trainer.model, PeftModel):
        merge_into_base(out / "trained", options.model, out / "merged")
        if not mode.real_weights:
            export_lora(out / "trained", out / "lora")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"{mode.name}: {trained:,} parameters at {rate:g}, held-out loss {before:.4f} -> {after:.4f}, saved in {out}")


if __name__ == "__main__":
    try:
        main(read_options())
    except SpectrumError as error:
        sys.exit(f"error: {error}")
