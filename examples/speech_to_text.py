"""Whisper learns to write what it hears: real weights of its encoder and decoder, a plain checkpoint.

python examples/speech_to_text.py --out tuned
The model is a tiny Whisper that is made here. With a real one, leave out `tiny_model`, and let its processor make the rows:
AutoProcessor.from_pretrained(MODEL)(audio=..., text=..., return_tensors="pt").
"""

import argparse
import tempfile

import torch
import transformers

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum


def tiny_model(folder):
    config = transformers.WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=24, max_target_positions=32,
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)


def row(i):
    """A low or a high tone as a spectrogram of 16 bands x 48 steps, and the word for it."""
    sound = torch.randn(16, 48) * 0.1
    sound[3 if i % 2 else 12] += 2
    return {"input_features": sound, "labels": torch.tensor([10 + i % 2, 20 + i % 2, 2])}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="tuned")
options = parser.parse_args()

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    tiny_model(folder)
    config = SpectrumConfig(mode="spectrum", spectrum_ratio=0.5, train_embeddings=True)
    model, _ = load_model_with_spectrum(folder, config, dtype="float32")
    trainer = transformers.Seq2SeqTrainer(
        model,
        transformers.Seq2SeqTrainingArguments(
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
