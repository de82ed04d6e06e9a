"""The loss per token and perplexity as metrics, from mean losses of batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean loss per predicted token, over all batches and processes: its weights are tokens, and not batches.

    Lightning's own mean over processes divides whole numbers of tokens, and rounds.

    Example:
        >>> metric = TokenLoss()
        >>> metric.update(torch.tensor(1.0), tokens=30)
        >>> metric.update(torch.tensor(4.0), tokens=15)
        >>> float(metric.compute())
        2.0
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: int | Tensor) -> None:
        """Add a batch.

        Args:
            loss: mean negative log-likelihood per token, in nats.
            tokens: how many tokens it is the mean of; a loss of none, which is no number, counts for nothing.
        """
        count = torch.as_tensor(tokens, dtype=torch.float64, device=loss.device)
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.total = self.total + torch.where(count > 0, loss.detach().double() * count, 0.0)
        self.tokens = self.tokens + count

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.tokens


class Perplexity(TokenLoss):
    """exp of the mean loss per predicted token, over all batches and processes.

    torchmetrics' own takes the logarithm of softmax probabilities, and is infinite as soon as one of them underflows
    (a loss of 104): a model that was only just compressed has such tokens. It also needs all probabilities at once,
    which are gigabytes with a large vocabulary. From mean losses neither happens; where nothing underflows, the values
    agree.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor(1.0), tokens=30)
        >>> metric.update(torch.tensor(4.0), tokens=15)
        >>> round(float(metric.compute().log()), 6)
        2.0
    """

    def compute(self) -> Tensor:
        """The perplexity."""
        return super().compute().exp()
