"""Negative log-likelihood as a metric, which torchmetrics has for tokens only."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class NegativeLogLikelihood(Metric):
    """Mean of -ln p of the true class, in nats: what over-confident errors cost.

    Shape:
        probabilities: (batch, classes); labels: (batch,)
    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(1.0397, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        shares = probabilities.detach().double().gather(1, labels[:, None])[:, 0]
        tiny = torch.finfo(probabilities.dtype).tiny  # a probability that has become 0 by rounding
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.total = self.total - shares.clamp(min=tiny).log().sum()
        self.count = self.count + len(labels)

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.count
