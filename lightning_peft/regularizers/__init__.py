"""Terms of the loss."""

from lightning_peft.regularizers.base import Regularizer, UntilTail, regularized
from lightning_peft.regularizers.critics import BilinearCritic, ConcatCritic, Critic, CriticFactory, SeparableCritic
from lightning_peft.regularizers.dem import DEM
from lightning_peft.regularizers.distillation import Distillation
from lightning_peft.regularizers.everyone import Everyone
from lightning_peft.regularizers.orthogonality import Orthogonality
from lightning_peft.regularizers.pac_bayes import PACBayes
from lightning_peft.regularizers.posterior import Posterior
from lightning_peft.regularizers.rank_masks import BudgetPenalty, MaskAlignment

__all__ = [
    "DEM",
    "BilinearCritic",
    "BudgetPenalty",
    "ConcatCritic",
    "Critic",
    "CriticFactory",
    "Distillation",
    "Everyone",
    "MaskAlignment",
    "Orthogonality",
    "PACBayes",
    "Posterior",
    "Regularizer",
    "SeparableCritic",
    "UntilTail",
    "regularized",
]
