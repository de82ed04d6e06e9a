"""Terms of the loss."""

from lightning_peft.regularizers.base import Regularizer, UntilTail, Warmup, regularized
from lightning_peft.regularizers.dem import DEM
from lightning_peft.regularizers.distillation import Distillation
from lightning_peft.regularizers.orthogonality import Orthogonality
from lightning_peft.regularizers.pac_bayes import PACBayes
from lightning_peft.regularizers.posterior import Posterior
from lightning_peft.regularizers.rank_masks import BudgetPenalty, MaskAlignment
from lightning_peft.regularizers.vib import VIB

__all__ = [
    "DEM",
    "VIB",
    "BudgetPenalty",
    "Distillation",
    "MaskAlignment",
    "Orthogonality",
    "PACBayes",
    "Posterior",
    "Regularizer",
    "UntilTail",
    "Warmup",
    "regularized",
]
