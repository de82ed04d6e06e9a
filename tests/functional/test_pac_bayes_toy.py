"""Logistic regression with a posterior: how objectives order divergence, error and certificate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_peft.functional.pac_bayes import bounded_cross_entropy, f_bbb, f_classic, f_quad, gaussian_kl
from lightning_peft.functional.risk_bounds import certified_risk

N, D, LAMBDA, STEPS = 4000, 20, 0.3, 1500
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "classic": lambda risk, kl: f_classic(risk, kl, N),
    "quad": lambda risk, kl: f_quad(risk, kl, N),
    "bbb": lambda risk, kl: f_bbb(risk, kl, N, eta=0.1),
    "none": lambda risk, kl: risk,
}


class Outcome(NamedTuple):
    kl: float
    test_error: float
    certificate: float


def data(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels drawn from a logistic model whose best error is about an eighth."""
    x = torch.randn(n, D, generator=generator)
    p = torch.sigmoid(x @ torch.linspace(-1.4, 1.4, D))
    return x, (torch.rand(n, generator=generator) < p).long()


@cache
def fitted() -> dict[str, Outcome]:
    """Train a posterior for each objective from the prior, with a draw a step; evaluate it on 5,000 other examples.

    Side by side, as columns: each entry has its own noise and its own Adam, and the sum of losses mixes nothing.
    """
    generator, columns = torch.Generator().manual_seed(11), len(OBJECTIVES)
    (x, y), (x_test, y_test) = data(N, generator), data(5000, generator)
    mu = torch.zeros(D, columns, requires_grad=True)
    rho = torch.full((D, columns), math.log(LAMBDA), requires_grad=True)
    adam, labels = torch.optim.Adam([mu, rho], lr=1e-2), y.repeat_interleave(columns)
    for _ in range(STEPS):
        z = (x @ (mu + rho.exp() * torch.randn(D, columns, generator=generator))).flatten()
        risks = bounded_cross_entropy(torch.stack((-z / 2, z / 2), 1), labels).view(N, columns).mean(0)
        kls = [gaussian_kl(m, r.exp(), 0.0, LAMBDA) for m, r in zip(mu.T, rho.T, strict=True)]
        adam.zero_grad()
        torch.stack([f(risk, kl) for f, risk, kl in zip(OBJECTIVES.values(), risks, kls, strict=True)]).sum().backward()
        adam.step()
    return {
        name: evaluated(m, r.exp(), [(x, y), (x_test, y_test)], generator)
        for name, m, r in zip(OBJECTIVES, mu.detach().T, rho.detach().T, strict=True)
    }


def evaluated(mu: Tensor, sigma: Tensor, sets: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> Outcome:
    """Errors of 2,000 draws on both sets, and the certificate from those on the first."""
    draws = mu[:, None] + sigma[:, None] * torch.randn(D, 2000, generator=generator)
    empirical, error = (((x @ draws > 0) != y[:, None].bool()).float().mean().item() for x, y in sets)
    kl = gaussian_kl(mu, sigma, 0.0, LAMBDA, dtype=torch.float64).item()
    return Outcome(kl, error, certified_risk(empirical, 2000, kl, N)[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_property_11_what_is_certified_is_above_the_test_error_and_says_something(name: str) -> None:
    _, error, certificate = fitted()[name]
    assert error <= certificate < 0.35


def test_property_11_the_heavier_the_divergence_weighs_the_smaller_it_stays() -> None:
    divergences = [fitted()[name].kl for name in ("classic", "quad", "bbb", "none")]
    assert divergences == sorted(divergences)
    assert 5 < divergences[0] < 15  # another sample of the same kind had 11, 21, 91 and 117
    assert 15 < divergences[1] < 30
    assert 70 < divergences[2] < 110
    assert 90 < divergences[3] < 150


def test_property_11_the_error_falls_with_the_weight_of_the_divergence_and_the_certificate_does_not() -> None:
    """The mean alone fits best; what is certified of it is worse than of a posterior that was kept wide."""
    errors = [fitted()[name].test_error for name in ("none", "bbb", "quad", "classic")]
    assert errors == sorted(errors)
    certificates = {name: fitted()[name].certificate for name in OBJECTIVES}
    assert min(certificates, key=lambda name: certificates[name]) == "bbb"
    assert max(certificates, key=lambda name: certificates[name]) == "classic"
