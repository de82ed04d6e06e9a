"""Adapters: one paper, one file."""

from lightning_peft.adapters.adalora import AdaLoRA, CubicBudget, TripletImportance
from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.adapters.dynamic_dora import DynamicDoRA, NormShare, component_shares
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.adapters.sora import SoftThreshold, SoRA
from lightning_peft.adapters.weight_decomposed import WeightDecomposed

__all__ = [
    "AdaLoRA",
    "Adapter",
    "AdapterFactory",
    "CubicBudget",
    "DynamicDoRA",
    "LoRA",
    "LowRank",
    "NormShare",
    "SoRA",
    "SoftThreshold",
    "TripletImportance",
    "WeightDecomposed",
    "component_shares",
]
