"""A prior whose width is chosen on the data: what that costs, and the objective of Dziugaite and Roy made of it.

Reference:
    Dziugaite and Roy, Computing nonvacuous generalization bounds for deep (stochastic) neural networks, UAI 2017,
    arXiv 1703.11008 (its code).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_peft.functional.pac_bayes import Scalar, require_share, wide


def dziugaite_roy(
    risk: Scalar, kl: Scalar, n: float, delta: float = 0.025, *, prior_sigma: Scalar, b: float = 100.0, c: float = 0.1
) -> Tensor:
    """The objective of Dziugaite and Roy, in which lambda is learnt and paid for.

        R + sqrt( [KL + 2 ln(b ln(c / lambda^2)) + ln(pi^2 n / (6 delta))] / (2 (n - 1)) )

    Args:
        risk: R.
        kl: the divergence at that lambda.
        n: number of examples, at least 2.
        delta: failure probability, in (0, 1).
        prior_sigma: lambda; several (one of each group of parameters) cost the sum, see :func:`prior_sigma_cost`.
        b: as in :func:`prior_sigma_cost`.
        c: as in :func:`prior_sigma_cost`.

    Raises:
        ValueError: n is less than 2, or delta is not in (0, 1).

    Reference:
        Dziugaite and Roy, Computing nonvacuous generalization bounds, UAI 2017, arXiv 1703.11008 (its code).
    """
    require_share("delta", delta)
    if n < 2:
        raise ValueError(f"n must be at least 2, the number of examples. Got {n!r}.")
    kl = wide(kl)
    paid = kl + prior_sigma_cost(prior_sigma, b, c).to(kl) + math.log(n / delta)
    return wide(risk) + (paid / (2 * (n - 1))).sqrt()


def prior_sigma_cost(prior_sigma: Scalar, b: float = 100.0, c: float = 0.1) -> Tensor:
    """What lambdas chosen on the data cost, in nats: to be added to the divergence in any of the bounds.

        sum over lambdas of [ 2 ln j + ln(pi^2 / 6) ]          j = b ln(c / lambda^2) >= 1

    lambda = sqrt(c exp(-j / b)) for j = 1, 2, ... is a grid, of which the member j fails with probability at most
    6 delta / (pi^2 j^2): together delta. In training j is any number from 1 on; what is certified stands on the grid,
    see :func:`prior_sigma_neighbours`.

    Args:
        prior_sigma: lambda of each group of parameters, of any shape.
        b: steps of the grid for a factor e in lambda^2.
        c: the largest lambda^2 is a little below it. A lambda beyond it costs what j = 1 costs: keep it below.

    Returns:
        A scalar.
    """
    j = b * torch.log(c / wide(prior_sigma).square())
    return (2 * j.clamp(min=1).log() + math.log(math.pi**2 / 6)).sum()


def prior_sigma_neighbours(prior_sigma: float, b: float = 100.0, c: float = 0.1) -> tuple[float, float]:
    """The members of the grid of :func:`prior_sigma_cost` on both sides of a lambda; the same twice at the grid's end.

    Args:
        prior_sigma: lambda, positive.
        b: as in :func:`prior_sigma_cost`.
        c: as in :func:`prior_sigma_cost`.

    Returns:
        The smaller and the larger; a certificate takes the one that gives the better bound.

    Raises:
        ValueError: lambda is not positive.
    """
    if not 0 < prior_sigma < math.inf:
        raise ValueError(f"prior_sigma must be a positive number. Got {prior_sigma!r}.")
    j = max(b * math.log(c / prior_sigma**2), 1.0)
    smaller, larger = (math.sqrt(c * math.exp(-k / b)) for k in (math.ceil(j), math.floor(j)))
    return smaller, larger


def best_prior_sigma(mean: Tensor, sigma: Tensor, prior_mean: Scalar) -> Tensor:
    """The lambda, one for all entries, that leaves the least divergence.

        lambda*^2 = mean(sigma^2 + (mu - mu0)^2)           KL* = k ln lambda* - sum ln sigma

    It is chosen on data: a bound has to pay for it, by :func:`prior_sigma_cost` of a neighbour on the grid.

    Args:
        mean: mu, of any shape, k entries.
        sigma: of mean's shape.
        prior_mean: mu0, broadcast against `mean`.

    Returns:
        A scalar.
    """
    mean, sigma = wide(mean), wide(sigma)
    return (sigma.square() + (mean - prior_mean).square()).mean().sqrt()
