"""What a forked cell finds loaded; see benchmarks/tune.py."""

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, Trainer  # noqa: F401
from trl import SFTTrainer  # noqa: F401

import spectrum_peft.cli.main
import spectrum_peft.compare.cell
import spectrum_peft.train.run  # noqa: F401

torch.set_num_threads(1)
# The buffers that MKL packs matrices into, and keeps, are no run's.
torch.ones(512, 576) @ torch.ones(576, 49152)
