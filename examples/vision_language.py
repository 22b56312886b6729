"""A vision-language model learns from pictures: LoRA in its language model, the projector whole, the vision tower frozen.

python examples/vision_language.py --out adapter
The model is a tiny Qwen3-VL that is made here. With a real one, leave out `tiny_model`, and let its processor make the rows:
AutoProcessor.from_pretrained(MODEL)(text=..., images=..., return_tensors="pt").
"""

import argparse
import tempfile

import torch
import transformers

from spectrum_peft import SpectrumCallback, SpectrumConfig, load_model_with_spectrum

IMAGE, START, END, SIDE = 90, 92, 93, 4  # tokens around a picture of SIDE x SIDE patches, of which each four become one


def tiny_model(folder):
    text = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 4,
        "temporal_patch_size": 1, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


def row(i):
    """A picture, dark or light, and a word that says which."""
    light = i % 2
    ids = torch.tensor([START, *[IMAGE] * (SIDE * SIDE // 4), END, 5, 10 + light])
    return {
        "input_ids": ids,
        "labels": torch.where(ids < IMAGE, ids, -100),
        "pixel_values": torch.randn(SIDE * SIDE, 3 * 4 * 4) * 0.1 + (1 if light else -1),
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def collate(rows):
    flat = ("pixel_values", "image_grid_thw")  # the patches of all pictures, one after the other
    return {name: (torch.cat if name in flat else torch.stack)([row[name] for row in rows]) for name in rows[0]}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="adapter")
options = parser.parse_args()

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    tiny_model(folder)
    config = SpectrumConfig(mode="lora", r=8, towers="language", train_projectors=True)
    model, _ = load_model_with_spectrum(folder, config, dtype="float32")
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            options.out, max_steps=options.steps, learning_rate=5e-3, per_device_train_batch_size=4, logging_steps=1,
            remove_unused_columns=False, report_to=[], save_strategy="no", dataloader_pin_memory=False,
        ),
        train_dataset=[row(i) for i in range(32)],
        data_collator=collate,
        callbacks=[SpectrumCallback()],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(options.out)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
