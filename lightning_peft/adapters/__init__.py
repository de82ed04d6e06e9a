"""Adapters: one paper, one file."""

from lightning_peft.adapters.adalora import AdaLoRA, CubicBudget, TripletImportance
from lightning_peft.adapters.ars import ElementMasks, Hypernetwork, MonotoneMasks
from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.adapters.dynamic_dora import DynamicDoRA, NormShare, component_shares
from lightning_peft.adapters.elalora import PruneAndGrow
from lightning_peft.adapters.entry_selection import EntrySelection
from lightning_peft.adapters.factorized import Factorized
from lightning_peft.adapters.gora import GoRA
from lightning_peft.adapters.increlora import Growth, ModuleSensitivity
from lightning_peft.adapters.learned_ranks import LearnedRanks
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.low_rank import LowRank, LowRankUpdate
from lightning_peft.adapters.partly_open import PartlyOpen
from lightning_peft.adapters.prompts import DPT, DePT, Prompt, SoftPrompt
from lightning_peft.adapters.rankdyna import GroupImportance
from lightning_peft.adapters.regrowth import DropAndRegrow
from lightning_peft.adapters.rlora import RLoRA
from lightning_peft.adapters.sora import SoftThreshold, SoRA
from lightning_peft.adapters.sparse_budget import SparseBudget
from lightning_peft.adapters.sparta import SpaRTA
from lightning_peft.adapters.thin import ThinLinear
from lightning_peft.adapters.weight_decomposed import WeightDecomposed

__all__ = [
    "DPT",
    "AdaLoRA",
    "Adapter",
    "AdapterFactory",
    "CubicBudget",
    "DePT",
    "DropAndRegrow",
    "DynamicDoRA",
    "ElementMasks",
    "EntrySelection",
    "Factorized",
    "GoRA",
    "GroupImportance",
    "Growth",
    "Hypernetwork",
    "LearnedRanks",
    "LoRA",
    "LowRank",
    "LowRankUpdate",
    "ModuleSensitivity",
    "MonotoneMasks",
    "NormShare",
    "PartlyOpen",
    "Prompt",
    "PruneAndGrow",
    "RLoRA",
    "SoRA",
    "SoftPrompt",
    "SoftThreshold",
    "SpaRTA",
    "SparseBudget",
    "ThinLinear",
    "TripletImportance",
    "WeightDecomposed",
    "component_shares",
]
