"""ViT learns to tell pictures apart: LoRA on the best-scored matrices and a head that is new on this checkpoint.

python examples/image_classification.py --out adapter
The checkpoint is a tiny body that is made here. With a real one, leave out `tiny_model`, and let its image processor make the
rows: AutoImageProcessor.from_pretrained(MODEL)(images=..., return_tensors="pt").
"""

import argparse
import tempfile

import torch
import transformers

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum


def tiny_model(folder):
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder)


def row(i):
    """A picture that is light on its left, in its middle or on its right."""
    picture = torch.randn(3, 32, 32) * 0.1
    picture[:, :, 10 * (i % 3) : 10 * (i % 3) + 10] += 1
    return {"pixel_values": picture, "labels": i % 3}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="adapter")
options = parser.parse_args()

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    tiny_model(folder)
    model, _ = load_model_with_spectrum(
        folder,
        SpectrumConfig(mode="spectra_qlora", spectrum_ratio=0.5, r=8),
        dtype="float32",
        model_class=transformers.ViTForImageClassification,
        num_labels=3,
    )
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            options.out, max_steps=options.steps, learning_rate=1e-2, per_device_train_batch_size=6, logging_steps=1,
            label_names=["labels"], report_to=[], save_strategy="no", dataloader_pin_memory=False,
        ),
        train_dataset=[row(i) for i in range(36)],
        callbacks=[SpectrumCallback()],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(options.out)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
