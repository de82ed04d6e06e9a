from __future__ import annotations

import math

import pytest
import torch

from lightning_peft.functional.dziugaite_roy import (
    best_prior_sigma,
    dziugaite_roy,
    prior_sigma_cost,
    prior_sigma_neighbours,
)
from lightning_peft.functional.pac_bayes import gaussian_kl
from lightning_peft.functional.risk_bounds import inverse_bernoulli_kl


def test_the_objective_is_its_equation() -> None:
    risk, kl, n, delta, width = 0.03, 400.0, 5000, 0.05, math.exp(-3)
    paid = kl + 2 * math.log(100 * math.log(0.1 / width**2)) + math.log(math.pi**2 * n / (6 * delta))
    found = dziugaite_roy(torch.tensor(risk, dtype=torch.float64), kl, n, delta, prior_sigma=width)
    assert found.item() == pytest.approx(risk + math.sqrt(paid / (2 * (n - 1))), rel=1e-12)


@pytest.mark.parametrize(("risk", "kl", "bound"), [(0.028, 5144.0, 0.161), (0.028, 6534.0, 0.186)])
def test_published_bounds_follow_from_published_errors_and_divergences(risk: float, kl: float, bound: float) -> None:
    """Binary MNIST, 55,000 examples, 600 and 600-600 hidden units; at the width that the reference begins with."""
    n, delta = 55_000, 0.025
    paid = kl + prior_sigma_cost(math.exp(-3)).item() + math.log(n / delta)
    assert inverse_bernoulli_kl(risk, paid / (n - 1)) == pytest.approx(bound, abs=1e-3)


def test_property_5_the_best_width_leaves_the_least_divergence() -> None:
    mean, sigma = torch.randn(40, dtype=torch.float64) / 5, torch.rand(40, dtype=torch.float64) / 5 + 0.01
    prior_mean = torch.randn(40, dtype=torch.float64) / 5
    best = best_prior_sigma(mean, sigma, prior_mean)
    least = gaussian_kl(mean, sigma, prior_mean, best)
    assert least.item() == pytest.approx((40 * best.log() - sigma.log().sum()).item(), rel=1e-12)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert gaussian_kl(mean, sigma, prior_mean, best * factor) > least


def test_widths_stand_on_a_grid_of_which_all_failures_are_one_delta() -> None:
    for width in (1e-4, 0.01, 0.05, 0.3):
        smaller, larger = prior_sigma_neighbours(width)
        assert smaller <= width * (1 + 1e-12)
        assert width <= larger * (1 + 1e-12)
        for member in (smaller, larger):
            j = 100 * math.log(0.1 / member**2)
            assert j == pytest.approx(round(j), abs=1e-8)
            cost = prior_sigma_cost(torch.tensor(member, dtype=torch.float64)).item()
            assert cost == pytest.approx(math.log(math.pi**2 / 6) + 2 * math.log(round(j)), abs=1e-8)
    assert sum(6 / (math.pi**2 * j**2) for j in range(1, 100_000)) < 1
    # Beyond the grid's end there is one member, and a cost that is not less than its own.
    smaller, larger = prior_sigma_neighbours(5.0)
    assert smaller == larger == pytest.approx(math.sqrt(0.1 * math.exp(-0.01)))
    assert prior_sigma_cost(5.0).item() == pytest.approx(math.log(math.pi**2 / 6))


def test_several_widths_cost_the_sum_and_are_learnt() -> None:
    widths = torch.tensor([0.01, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    cost = prior_sigma_cost(widths)
    assert cost.item() == pytest.approx(sum(prior_sigma_cost(width).item() for width in widths))
    (gradient,) = torch.autograd.grad(cost, widths)
    assert bool((gradient < 0).all())  # wider is cheaper
    assert torch.autograd.gradcheck(prior_sigma_cost, widths)


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_a_width_that_is_none_is_named(width: float) -> None:
    with pytest.raises(ValueError, match=f"prior_sigma must be a positive number. Got {width}"):
        prior_sigma_neighbours(width)
