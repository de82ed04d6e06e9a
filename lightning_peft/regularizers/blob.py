"""BLoB's objective: the loss, and a divergence that is spread over the steps of a cycle (Wang et al., NeurIPS 2024)."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.blob import kl_cycle, kl_weight
from lightning_peft.regularizers.objectives import Objective
from lightning_peft.regularizers.posterior import Posterior


class BLoB(Objective):
    """The evidence lower bound per example, with a divergence whose weight doubles from step to step of a cycle.

        F = R + pi_i KL / batch,     pi_i = 2^i / (2^(M + 1) - 1),     M = 100 n^(pi / gamma) / batch

    A cycle's steps see M batch examples and pay for the divergence once. Not a bound of the risk.

    Args:
        batch_size: examples per optimizer step, of all processes.
        gamma: the larger, the shorter the cycle and the heavier the divergence.

    Raises:
        TypeError: batch_size is no integer, or gamma no number.
        ValueError: one is not positive.

    Reference:
        Wang et al., BLoB, NeurIPS 2024, arXiv 2406.11675 (its code); Blundell et al., 2015, for the weights. Departure:
        the divergence is in the loss, where the code has a step of its own for it, with another optimizer.
    """

    is_bound = False

    def __init__(self, batch_size: int = 8, gamma: float = 8.0) -> None:
        super().__init__()
        require_integer("batch_size", batch_size)
        require_number("gamma", gamma)
        kl_cycle(2, batch_size, gamma)  # checks them
        self.batch_size, self.gamma = batch_size, gamma
        self._step = 1

    def prepare(self, step: int, total: int) -> None:
        self._step = step

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        share = kl_weight(self._step - 1, kl_cycle(n, self.batch_size, self.gamma))
        return risk + share / self.batch_size * (kl + posterior.prior_cost())
