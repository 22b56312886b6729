"""ModernBERT learns a tag for every token: LoRA on the best-scored matrices and a head that is new on this checkpoint.

python examples/modernbert_tokens.py --out adapter
The checkpoint is a tiny body that is made here. With a real one and rows of words and tags, the command does the same:
spectrum-peft train --task token_classification (examples/token_classification.yaml).
"""

import argparse
import tempfile

import torch
import transformers

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum


def tiny_model(folder):
    config = transformers.ModernBertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, local_attention=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    transformers.ModernBertModel(config).save_pretrained(folder)


def row(i):
    """Twelve tokens; the tag says whether a token is odd and whether its left neighbour is."""
    ids = torch.randint(3, 96, (12,))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 2 + 2 * (ids.roll(1) % 2)}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--out", default="adapter")
options = parser.parse_args()

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    tiny_model(folder)
    model, _ = load_model_with_spectrum(
        folder,
        SpectrumConfig(mode="spectra_qlora", spectrum_ratio=0.5, r=8, train_embeddings=True),
        dtype="float32",
        model_class=transformers.ModernBertForTokenClassification,
        num_labels=4,
    )
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            options.out, max_steps=options.steps, learning_rate=1e-2, per_device_train_batch_size=8, logging_steps=1,
            report_to=[], save_strategy="no", dataloader_pin_memory=False,
        ),
        train_dataset=[row(i) for i in range(64)],
        callbacks=[SpectrumCallback()],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(options.out)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
