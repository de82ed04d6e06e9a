from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_peft.functional.pac_tuning import (
    PRIOR_SIGMAS,
    best_gamma,
    interpolated,
    moment_constant,
    unbounded,
)

GAMMAS = [0.5, 5.0, 7.5, 10.0]


def condition(losses: torch.Tensor, gamma: float, K: float) -> float:
    """ln of the moment over what it may be: at most 0 where K is large enough."""
    moments = torch.exp(gamma * (losses.mean(1, keepdim=True) - losses)).mean()
    return float(moments.log()) - 1.5 * gamma**2 * K**2


def test_the_moment_constant_is_the_smallest_that_meets_the_condition() -> None:
    losses = 3 * torch.rand(10, 200, dtype=torch.float64) ** 2
    K = moment_constant(losses, GAMMAS).item()
    slack = [condition(losses, gamma, K) for gamma in GAMMAS]
    assert max(slack) == pytest.approx(0, abs=1e-12)
    assert max(condition(losses, gamma, 0.999 * K) for gamma in GAMMAS) > 0


def test_the_moment_constant_of_losses_that_are_known() -> None:
    """Half at 0 and half at 2: the moment is cosh(gamma)."""
    losses = torch.tensor([[0.0, 2.0], [5.0, 7.0]])  # the mean of each draw is its own
    assert moment_constant(losses, [0.01]).item() == pytest.approx(math.sqrt(1 / 3), rel=1e-4)
    assert moment_constant(losses, [3.0]).item() == pytest.approx(math.sqrt(math.log(math.cosh(3)) / 13.5), rel=1e-12)
    assert moment_constant(torch.full((2, 5), 4.0), GAMMAS).item() == 0
    assert moment_constant(1e3 * torch.rand(3, 50), GAMMAS).isfinite()


def test_the_reference_grid() -> None:
    assert torch.allclose(torch.tensor(PRIOR_SIGMAS), torch.linspace(-6, -2, 8).exp(), rtol=1e-6)


def test_between_measured_values_it_is_linear_and_never_falls() -> None:
    places, values = torch.tensor([1.0, 2.0, 4.0, 5.0]), torch.tensor([1.0, 3.0, 2.0, 7.0])
    for x, wanted in [(0.5, 1.0), (1.0, 1.0), (1.5, 2.0), (2.0, 3.0), (3.0, 3.0), (4.0, 3.0), (4.5, 5.0), (9.0, 7.0)]:
        assert interpolated(torch.tensor(x), places, values).item() == pytest.approx(wanted)
        shuffled = torch.tensor([2, 0, 3, 1])
        assert interpolated(torch.tensor(x), places[shuffled], values[shuffled]).item() == pytest.approx(wanted)
    x = torch.tensor(1.25, requires_grad=True)
    assert torch.autograd.grad(interpolated(x, places, values), x)[0].item() == pytest.approx(2.0)
    assert interpolated(torch.tensor(3.0), torch.tensor([1.0]), torch.tensor([2.5])).item() == 2.5


def test_the_best_gamma_has_the_least_value() -> None:
    risk, kl, n, K, union = torch.tensor(0.8, dtype=torch.float64), 40.0, 100, 0.9, 12.0
    gamma = best_gamma(kl, n, K, union=union).item()
    A = 40.0 + 10 + 12
    assert gamma == pytest.approx(math.sqrt(2 * A / (3 * n)) / K, rel=1e-12)
    least = unbounded(risk, kl, n, K=K, union=union).item()
    assert least == pytest.approx(0.8 + K * math.sqrt(6 * A / n), rel=1e-12)
    assert unbounded(risk, kl, n, K=K, gamma=gamma, union=union).item() == pytest.approx(least, rel=1e-12)
    assert best_gamma(kl, n, K, union=union, limits=(5.0, 10.0)).item() == 5.0
    assert best_gamma(kl, n, K, union=union, limits=(0.1, 0.2)).item() == pytest.approx(0.2)
    for other in (0.9 * gamma, 1.1 * gamma):
        assert unbounded(risk, kl, n, K=K, gamma=other, union=union).item() > least


def test_the_first_stage_is_the_codes_objective() -> None:
    """1.5 K^2 gamma + (KL + 10 + 3 m) / (n gamma), at gamma 10 and m trained tensors."""
    K, kl, n, m = 0.4, 250.0, 100, 6
    found = unbounded(torch.tensor(0.0, dtype=torch.float64), kl, n, K=K, gamma=10.0, union=3.0 * m)
    assert found.item() == pytest.approx(1.5 * K**2 * 10 + (kl + 10 + 3 * m) / (n * 10), rel=1e-12)


def test_gradients_reach_the_divergence_and_the_constant() -> None:
    kl, K = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (40.0, 0.7))
    for gamma in (None, 8.0):
        gradients = torch.autograd.grad(unbounded(0.5, kl, 100, K=K, gamma=gamma), (kl, K))
        assert all(gradient > 0 for gradient in gradients)
        assert torch.autograd.gradcheck(lambda a, b, g=gamma: unbounded(0.5, a, 100, K=b, gamma=g), (kl, K))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: moment_constant(torch.zeros(5), GAMMAS),
            "losses must be (draws, examples), neither of them 0. Got (5,).",
        ),
        (lambda: moment_constant(torch.zeros(1, 5), []), "gammas must be positive numbers, at least one. Got []."),
        (lambda: moment_constant(torch.zeros(1, 5), [0.0]), "gammas must be positive numbers, at least one. Got"),
        (
            lambda: interpolated(torch.tensor(1.0), torch.zeros(2), torch.zeros(3)),
            "places and values must be two rows of one length. Got (2,) and (3,).",
        ),
        (lambda: unbounded(0.1, 1.0, 100, K=1.0, gamma=0.0), "gamma must be positive; None takes the best one. Got 0"),
        (lambda: unbounded(0.1, 1.0, 0, K=1.0), "n must be at least 1, the number of independent examples. Got 0."),
        (lambda: best_gamma(1.0, 100, 1.0, delta=0.0), "delta must lie strictly between 0 and 1. Got 0.0."),
        (
            lambda: best_gamma(1.0, 100, 1.0, limits=(10.0, 5.0)),
            "limits must be the least and the largest gamma, in this order. Got (10.0, 5.0).",
        ),
        (lambda: best_gamma(1.0, 100, 1.0, union=-3.0), "union must be at least 0, in nats. Got -3.0."),
    ],
)
def test_arguments_out_of_range_are_named(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()
