"""One script, every mode: only the word after --mode changes.

    python examples/swap_modes.py --model MODEL_FOLDER --mode spectrum
    python examples/swap_modes.py --model MODEL_FOLDER --mode spectra_qlora --quantization nf4
"""

import argparse
import sys
from pydoc_data.topics import topics  # 79 pages about Python that come with it

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum
from spectrum_peft.errors import SpectrumError
from spectrum_peft.policies import MODES

HELD_OUT = 8


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--mode", default="spectrum", choices=list(MODES))
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the matrices, in modes that choose")
    parser.add_argument("--quantization", default="none", choices=["none", "nf4", "fp4", "int8"])
    parser.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 where the device is fast at it")
    parser.add_argument("--learning-rate", type=float, help="default: the mode's own")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--output", default="swap_modes_output")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    mode = MODES[options.mode]
    rate = options.learning_rate or mode.default_lr
    config = SpectrumConfig(mode=mode.name, spectrum_ratio=options.ratio if mode.selective else None)
    model, tokenizer = load_model_with_spectrum(
        options.model, config, dtype=options.dtype, quantization=options.quantization
    )
    texts = [{"text": text} for _, text in sorted(topics.items())]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            max_length=options.max_length,
            learning_rate=rate,
            per_device_train_batch_size=2,
            bf16=model.dtype == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=Dataset.from_list(texts[:-HELD_OUT]),
        eval_dataset=Dataset.from_list(texts[-HELD_OUT:]),
        processing_class=tokenizer,
        callbacks=[SpectrumCallback()],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(options.output)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{mode.name} (base {options.quantization}): {trained:,} parameters trained at {rate:g}, "
          f"held-out loss {before:.4f} -> {after:.4f}, saved in {options.output}")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except SpectrumError as error:
        sys.exit(f"error: {error}")
