"""Terms of the loss."""

from lightning_peft.regularizers.auxiliary import Auxiliary
from lightning_peft.regularizers.base import Regularizer, UntilTail, Warmup, regularized
from lightning_peft.regularizers.club import CLUB, CategoricalCLUB
from lightning_peft.regularizers.critics import BilinearCritic, ConcatCritic, Critic, CriticFactory, SeparableCritic
from lightning_peft.regularizers.dem import DEM
from lightning_peft.regularizers.distillation import Distillation
from lightning_peft.regularizers.everyone import Everyone
from lightning_peft.regularizers.mutual_information import MutualInformation
from lightning_peft.regularizers.orthogonality import Orthogonality
from lightning_peft.regularizers.pac_bayes import PACBayes
from lightning_peft.regularizers.posterior import Posterior
from lightning_peft.regularizers.rank_masks import BudgetPenalty, MaskAlignment
from lightning_peft.regularizers.vib import VIB

__all__ = [
    "CLUB",
    "DEM",
    "VIB",
    "Auxiliary",
    "BilinearCritic",
    "BudgetPenalty",
    "CategoricalCLUB",
    "ConcatCritic",
    "Critic",
    "CriticFactory",
    "Distillation",
    "Everyone",
    "MaskAlignment",
    "MutualInformation",
    "Orthogonality",
    "PACBayes",
    "Posterior",
    "Regularizer",
    "SeparableCritic",
    "UntilTail",
    "Warmup",
    "regularized",
]
