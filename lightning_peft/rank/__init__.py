"""The one notion of rank: gates, their budget, and how it is spent over time."""

from lightning_peft.rank.allocation import close_lowest, close_some, open_best, open_highest, weighed
from lightning_peft.rank.budget import Budget, RankBudget, Site, clean_name
from lightning_peft.rank.eva import EVA
from lightning_peft.rank.gate import Gate
from lightning_peft.rank.importance import Importance, Taylor
from lightning_peft.rank.policy import Policy, RankPolicy
from lightning_peft.rank.probe import Probe
from lightning_peft.rank.sampling import KeepProbability, MaskSampler, SamplingPolicy
from lightning_peft.rank.schedule import Constant, Cubic, Linear, Schedule, SlowCubic, Step
from lightning_peft.rank.weighted_svd import WeightedSVD

__all__ = [
    "EVA",
    "Budget",
    "Constant",
    "Cubic",
    "Gate",
    "Importance",
    "KeepProbability",
    "Linear",
    "MaskSampler",
    "Policy",
    "Probe",
    "RankBudget",
    "RankPolicy",
    "SamplingPolicy",
    "Schedule",
    "Site",
    "SlowCubic",
    "Step",
    "Taylor",
    "WeightedSVD",
    "clean_name",
    "close_lowest",
    "close_some",
    "open_best",
    "open_highest",
    "weighed",
]
