"""The PEFT side: importing this package makes PEFT know the method `spectrum`.

The prefix is `lora_`, on purpose: PEFT keeps one prefix per method and uses it to notice missing keys; the adapter modes
save `lora_A` and `lora_B`, and with another prefix a missing one would load without a word.
"""

from __future__ import annotations

import warnings

from aenum import extend_enum
from peft import PeftType
from peft.utils import register_peft_method

from .config import PEFT_TYPE, SpectrumConfig

if PEFT_TYPE not in PeftType.__members__:
    extend_enum(PeftType, PEFT_TYPE, PEFT_TYPE)

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .apply import settle_plan
from .freezing import freeze_to_plan, let_gradients_in, trainable_mismatch
from .layers import SpectrumLayer
from .model import SpectrumModel
from .parameters import base_parameters, plan_parameters
from .plain_lora import find_plans
from .shared import share_in_dtype

if PeftType[PEFT_TYPE] not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="spectrum", config_cls=SpectrumConfig, model_cls=SpectrumModel, prefix="lora_")
find_plans()

# PEFT and TRL ask every model, and TRL's configs set, by names that transformers 5.24 calls deprecated: theirs to mend.
warnings.filterwarnings(
    "ignore", message=r"`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated", category=FutureWarning
)

__all__ = [
    "SpectrumLayer",
    "SpectrumModel",
    "base_parameters",
    "freeze_to_plan",
    "let_gradients_in",
    "plan_parameters",
    "settle_plan",
    "share_in_dtype",
    "trainable_mismatch",
]
