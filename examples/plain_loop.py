"""Training in a loop of your own, in any mode: no Trainer, any torch optimizer.

python examples/plain_loop.py MODEL_FOLDER --mode alors
"""

import argparse
from pydoc_data.topics import topics  # 79 pages about Python that come with it

import torch
from transformers import AutoTokenizer

from spectrum_peft import SpectrumConfig, calibration_batches, load_model_with_spectrum, parameter_groups
from spectrum_peft.plan import MODES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="hub id or folder")
parser.add_argument("--mode", default="spectrum", choices=list(MODES))
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", help="where to save: a plain checkpoint if the weights themselves train, else an adapter")
options = parser.parse_args()

texts = sorted(topics.values())
config = SpectrumConfig(mode=options.mode)
if MODES[options.mode].needs_data:  # gradients on rows that it will train on
    rows, tokenizer = [{"text": text} for text in texts[:16]], AutoTokenizer.from_pretrained(options.model)
    config.calibration_data = calibration_batches(rows, tokenizer, n=16, max_length=128)
model, tokenizer = load_model_with_spectrum(options.model, config, dtype="float32")
optimizer = torch.optim.AdamW(parameter_groups(model, lr=MODES[options.mode].default_lr, weight_decay=0.01))
model.train()
for step in range(options.steps):
    batch = tokenizer(texts[step % len(texts)], return_tensors="pt", truncation=True, max_length=128).to(model.device)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")
if options.out:
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
