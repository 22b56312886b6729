"""Wav2Vec2 learns to spell what it hears, by CTC: real weights, and a head that is new on this checkpoint.

python examples/speech_ctc.py --out tuned
The checkpoint is a tiny body that is made here. With a real one, leave out `tiny_model`, and let its processor make the rows:
AutoProcessor.from_pretrained(MODEL)(audio=..., text=..., return_tensors="pt").
"""

import argparse
import tempfile

import torch
import transformers

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum


def tiny_model(folder):
    config = transformers.Wav2Vec2Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, conv_dim=(16, 16),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0, pad_token_id=0, ctc_zero_infinity=True,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).save_pretrained(folder)


def row(i):
    """Half a second of a slow or a fast wave, and two letters."""
    wave = torch.sin(torch.arange(800) * (0.05 if i % 2 else 0.5)) + torch.randn(800) * 0.1
    return {"input_values": wave, "labels": torch.tensor([4 + i % 2, 8 + i % 2])}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="tuned")
options = parser.parse_args()

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    tiny_model(folder)
    model, _ = load_model_with_spectrum(
        folder,
        SpectrumConfig(mode="spectrum", spectrum_ratio=0.5),
        dtype="float32",
        model_class=transformers.Wav2Vec2ForCTC,
    )
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            options.out, max_steps=options.steps, learning_rate=3e-3, per_device_train_batch_size=4, logging_steps=1,
            report_to=[], save_strategy="no", dataloader_pin_memory=False,
        ),
        train_dataset=[row(i) for i in range(32)],
        callbacks=[SpectrumCallback()],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(options.out)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
