"""Rank-adaptive, parameter-efficient fine-tuning for PyTorch Lightning: one callback, and the model stays as it is."""

from lightning_peft import presets
from lightning_peft.adapters import (
    AdaLoRA,
    Adapter,
    AdapterFactory,
    CubicBudget,
    DynamicDoRA,
    Factorized,
    GoRA,
    GroupImportance,
    Growth,
    LoRA,
    LowRank,
    ModuleSensitivity,
    NormShare,
    PartlyOpen,
    PruneAndGrow,
    SoftThreshold,
    SoRA,
    TripletImportance,
    WeightDecomposed,
)
from lightning_peft.callbacks import (
    AdapterCheckpoint,
    AdapterInjection,
    Adoption,
    Calibration,
    RankAllocation,
    RankMonitor,
    RankPruning,
    Regularization,
)
from lightning_peft.checkpoint import AdapterFileError, adapter_state_dict, load
from lightning_peft.convert import Conversion, convert
from lightning_peft.export import Merged, compact, merge
from lightning_peft.heat_map import rank_heat_map
from lightning_peft.interop.adoption import adopt, release
from lightning_peft.interop.folder import Export
from lightning_peft.interop.from_peft import from_hf_peft
from lightning_peft.interop.hf_peft import to_hf_peft
from lightning_peft.interop.merged import save_merged
from lightning_peft.planning import Plan, plan
from lightning_peft.rank import (
    EVA,
    Budget,
    Cubic,
    Gate,
    Importance,
    Policy,
    Probe,
    RankBudget,
    RankPolicy,
    Schedule,
    Site,
    SlowCubic,
    Taylor,
)
from lightning_peft.regularizers import DEM, Distillation, Orthogonality, Regularizer, UntilTail, regularized
from lightning_peft.surgery import Injection, eject, inject, small_parameters

__version__ = "0.1.0"

__all__ = [
    "DEM",
    "EVA",
    "AdaLoRA",
    "Adapter",
    "AdapterCheckpoint",
    "AdapterFactory",
    "AdapterFileError",
    "AdapterInjection",
    "Adoption",
    "Budget",
    "Calibration",
    "Conversion",
    "Cubic",
    "CubicBudget",
    "Distillation",
    "DynamicDoRA",
    "Export",
    "Factorized",
    "Gate",
    "GoRA",
    "GroupImportance",
    "Growth",
    "Importance",
    "Injection",
    "LoRA",
    "LowRank",
    "Merged",
    "ModuleSensitivity",
    "NormShare",
    "Orthogonality",
    "PartlyOpen",
    "Plan",
    "Policy",
    "Probe",
    "PruneAndGrow",
    "RankAllocation",
    "RankBudget",
    "RankMonitor",
    "RankPolicy",
    "RankPruning",
    "Regularization",
    "Regularizer",
    "Schedule",
    "Site",
    "SlowCubic",
    "SoRA",
    "SoftThreshold",
    "Taylor",
    "TripletImportance",
    "UntilTail",
    "WeightDecomposed",
    "adapter_state_dict",
    "adopt",
    "compact",
    "convert",
    "eject",
    "from_hf_peft",
    "inject",
    "load",
    "merge",
    "plan",
    "presets",
    "rank_heat_map",
    "regularized",
    "release",
    "save_merged",
    "small_parameters",
    "to_hf_peft",
]
