"""torchmetrics that the package adds."""

from lightning_peft.metrics.pac_bayes_bound import PACBayesBound

__all__ = ["PACBayesBound"]
