"""torchmetrics that the package adds."""

from lightning_peft.metrics.latent import (
    ActiveUnits,
    AggregateMutualInformation,
    ImportanceWeightedNLL,
    PriorDivergence,
)
from lightning_peft.metrics.mutual_information import BatchMutualInformation, MutualInformation
from lightning_peft.metrics.pac_bayes_bound import PACBayesBound

__all__ = [
    "ActiveUnits",
    "AggregateMutualInformation",
    "BatchMutualInformation",
    "ImportanceWeightedNLL",
    "MutualInformation",
    "PACBayesBound",
    "PriorDivergence",
]
