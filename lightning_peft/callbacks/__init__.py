"""Callbacks say when; the plain functions that they call say what."""

from lightning_peft.callbacks.adoption import Adoption
from lightning_peft.callbacks.adversarial_noise import AdversarialNoise
from lightning_peft.callbacks.allocation import RankAllocation
from lightning_peft.callbacks.calibration import Calibration
from lightning_peft.callbacks.certificate import RiskCertificate
from lightning_peft.callbacks.checkpoint import AdapterCheckpoint
from lightning_peft.callbacks.information import InformationMonitor
from lightning_peft.callbacks.injection import AdapterInjection
from lightning_peft.callbacks.monitor import RankMonitor
from lightning_peft.callbacks.pruning import RankPruning
from lightning_peft.callbacks.r_drop import RDrop
from lightning_peft.callbacks.random_position_noise import RandomPositionNoise
from lightning_peft.callbacks.regularization import Regularization
from lightning_peft.callbacks.sampling import PosteriorSampling
from lightning_peft.callbacks.selection import RankSelection
from lightning_peft.callbacks.simple_noise import GaussianNoise, SaltAndPepper, TokenCutoff

__all__ = [
    "AdapterCheckpoint",
    "AdapterInjection",
    "Adoption",
    "AdversarialNoise",
    "Calibration",
    "GaussianNoise",
    "InformationMonitor",
    "PosteriorSampling",
    "RDrop",
    "RandomPositionNoise",
    "RankAllocation",
    "RankMonitor",
    "RankPruning",
    "RankSelection",
    "Regularization",
    "RiskCertificate",
    "SaltAndPepper",
    "TokenCutoff",
]
