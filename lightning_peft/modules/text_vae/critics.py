"""A critic for posteriors that are Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.regularizers.critics import Critic


class GaussianCritic(Critic):
    """T(x, z) = ln N(z; W x + b, diag v) - ln N(z; c, diag u): of the form that the log ratio of a Gaussian VAE has.

    The best critic of I(h(x); z) is ln q(z | x) - ln q(z). A TextVAE's posterior is Gaussian, its mean is linear in the
    encoder's state, and its aggregate is near a Gaussian: so this critic has the best one in reach, where variances are
    alike for all x. A general network has to find that form from the few pairs of a batch, and sees little information
    later: in a short run, when the divergence has taken it away.

    Args:
        d_x: width of x.
        d_z: width of z.

    Reference:
        Our choice. A variational q(z | x) as in Barber and Agakov 2003 (remembered), put into the critic's place.
    """

    def __init__(self, d_x: int, d_z: int) -> None:
        super().__init__(d_x, d_z)
        self.mean = nn.Linear(d_x, d_z)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        self.log_v, self.c, self.log_u = (nn.Parameter(torch.zeros(d_z)) for _ in range(3))

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        mean, precision = self.mean(x), (-self.log_v).exp()
        # Squares written out: no (N, M, d_z) is made.
        of_x = -(mean.square() @ precision)[:, None]
        of_z = (z - self.c).square() @ (-self.log_u).exp() - z.square() @ precision
        both: Tensor = (mean * precision) @ z.T + (of_x + of_z + (self.log_u - self.log_v).sum()) / 2
        return both
