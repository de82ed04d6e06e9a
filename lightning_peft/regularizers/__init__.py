"""Terms of the loss."""

from lightning_peft.regularizers.base import Regularizer, UntilTail, regularized
from lightning_peft.regularizers.dem import DEM
from lightning_peft.regularizers.distillation import Distillation
from lightning_peft.regularizers.orthogonality import Orthogonality

__all__ = ["DEM", "Distillation", "Orthogonality", "Regularizer", "UntilTail", "regularized"]
