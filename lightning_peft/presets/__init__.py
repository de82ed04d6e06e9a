"""Whole methods as lists of callbacks, a file each: `Trainer(callbacks=[*presets.dynamic_dora(final_rank=8)])`."""

from lightning_peft.presets.adalora import adalora
from lightning_peft.presets.base import Preset
from lightning_peft.presets.dynamic_dora import dynamic_dora
from lightning_peft.presets.lora import lora
from lightning_peft.presets.sora import sora
from lightning_peft.presets.weight_decomposed import weight_decomposed, weight_decomposed_fixed

__all__ = ["Preset", "adalora", "dynamic_dora", "lora", "sora", "weight_decomposed", "weight_decomposed_fixed"]
