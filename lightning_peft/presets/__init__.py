"""Whole methods as lists of callbacks, a file each: `Trainer(callbacks=[*presets.dynamic_dora(final_rank=8)])`."""

from lightning_peft.presets.adalora import adalora
from lightning_peft.presets.ars import ars
from lightning_peft.presets.base import Preset
from lightning_peft.presets.blob import blob
from lightning_peft.presets.dept import dept
from lightning_peft.presets.dpt import dpt
from lightning_peft.presets.dynamic_dora import dynamic_dora
from lightning_peft.presets.elalora import elalora
from lightning_peft.presets.eva import eva
from lightning_peft.presets.gora import gora
from lightning_peft.presets.increlora import increlora
from lightning_peft.presets.lora import lora
from lightning_peft.presets.pac_bayes import pac_bayes
from lightning_peft.presets.pac_tuning import pac_tuning
from lightning_peft.presets.prompt_tuning import prompt_tuning
from lightning_peft.presets.rankdyna import rankdyna
from lightning_peft.presets.rlora import rlora
from lightning_peft.presets.sora import sora
from lightning_peft.presets.sparta import sparta
from lightning_peft.presets.vib import vib
from lightning_peft.presets.weight_decomposed import weight_decomposed, weight_decomposed_fixed

__all__ = [
    "Preset",
    "adalora",
    "ars",
    "blob",
    "dept",
    "dpt",
    "dynamic_dora",
    "elalora",
    "eva",
    "gora",
    "increlora",
    "lora",
    "pac_bayes",
    "pac_tuning",
    "prompt_tuning",
    "rankdyna",
    "rlora",
    "sora",
    "sparta",
    "vib",
    "weight_decomposed",
    "weight_decomposed_fixed",
]
