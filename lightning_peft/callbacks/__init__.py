"""Callbacks say when; the plain functions that they call say what."""

from lightning_peft.callbacks.adoption import Adoption
from lightning_peft.callbacks.allocation import RankAllocation
from lightning_peft.callbacks.calibration import Calibration
from lightning_peft.callbacks.certificate import RiskCertificate
from lightning_peft.callbacks.checkpoint import AdapterCheckpoint
from lightning_peft.callbacks.information import InformationMonitor
from lightning_peft.callbacks.initial_prompt import InitialPrompt
from lightning_peft.callbacks.injection import AdapterInjection
from lightning_peft.callbacks.monitor import RankMonitor
from lightning_peft.callbacks.pruning import RankPruning
from lightning_peft.callbacks.regularization import Regularization
from lightning_peft.callbacks.sampling import PosteriorSampling
from lightning_peft.callbacks.selection import RankSelection

__all__ = [
    "AdapterCheckpoint",
    "AdapterInjection",
    "Adoption",
    "Calibration",
    "InformationMonitor",
    "InitialPrompt",
    "PosteriorSampling",
    "RankAllocation",
    "RankMonitor",
    "RankPruning",
    "RankSelection",
    "Regularization",
    "RiskCertificate",
]
