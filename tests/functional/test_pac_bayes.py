from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.functional.catoni import catoni, catoni_linear
from lightning_peft.functional.dziugaite_roy import dziugaite_roy
from lightning_peft.functional.pac_bayes import (
    best_t,
    bounded_cross_entropy,
    complexity,
    f_bbb,
    f_classic,
    f_kl,
    f_lambda,
    f_quad,
    gaussian_kl,
    learnt_t,
)
from lightning_peft.functional.risk_bounds import inverse_bernoulli_kl

BOUNDS: dict[str, Callable[..., Tensor]] = {
    "kl": f_kl,
    "classic": f_classic,
    "quad": f_quad,
    "lambda": f_lambda,
    "lambda, t given": lambda *args: f_lambda(*args, t=0.7),
    "bbb": lambda risk, kl, n, delta: f_bbb(risk, kl, n, eta=0.3),
    "dziugaite-roy": lambda *args: dziugaite_roy(*args, prior_sigma=0.05),
    "catoni": lambda *args: catoni(*args, a=0.4),
    "catoni, a grid": lambda *args: catoni(*args, a=(0.1, 0.4, 2.0)),
    "catoni, linear": lambda *args: catoni_linear(*args, t=5000.0),
}


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("risk", "kl", "n", "classic", "quad", "t", "inverse"),
    [
        (0.05, 500.0, 30_000, 0.14215, 0.11156, 0.55181, 0.10050),
        (0.02, 100.0, 30_000, 0.06273, 0.03628, 0.44867, 0.03438),
        (0.1, 5000.0, 60_000, 0.30433, 0.33735, None, 0.26344),
    ],
)
def test_property_3_golden_values_of_the_bounds(
    risk: float, kl: float, n: int, classic: float, quad: float, t: float | None, inverse: float
) -> None:
    R, KL = double(risk), double(kl)
    assert f_classic(R, KL, n, 0.025).item() == pytest.approx(classic, abs=5.1e-6)
    assert f_quad(R, KL, n, 0.025).item() == pytest.approx(quad, abs=5.1e-6)
    assert f_kl(R, KL, n, 0.025).item() == pytest.approx(inverse, abs=5.1e-6)
    if t is not None:
        assert best_t(R, complexity(KL, n, 0.025)).item() == pytest.approx(t, abs=5.1e-6)
    assert f_bbb(double(0.05), double(500.0), 30_000, eta=1.0).item() == pytest.approx(0.06667, abs=5.1e-6)


def test_what_to_expect_golden_values() -> None:
    """kl^-1, f_quad and f_classic, to one unit in the last of the three digits that are quoted."""
    for kl, n, risk, wanted in [
        (500, 67_349, 0.06, (0.094, 0.099, 0.121)),
        (2000, 67_349, 0.06, (0.136, 0.157, 0.182)),
        (10_000, 67_349, 0.06, (0.271, 0.408, 0.333)),
        (100, 2490, 0.25, (0.390, 0.447, 0.398)),
    ]:
        for bound, value in zip((f_kl, f_quad, f_classic), wanted, strict=True):
            assert bound(double(risk), double(kl), n, 0.025).item() == pytest.approx(value, abs=1e-3)
    assert f_kl(double(0.1), double(20.0), 100, 0.025).item() == pytest.approx(0.431, abs=5.1e-4)


def test_property_4_the_best_lambda_is_the_quadratic_bound() -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(200):
        u = torch.rand(3, generator=generator, dtype=torch.float64)
        risk, kl, n = u[0], (12 * u[1]).exp(), float(10 + (12 * u[2]).exp())
        quad = f_quad(risk, kl, n, 0.03)
        t = best_t(risk, complexity(kl, n, 0.03))
        torch.testing.assert_close(f_lambda(risk, kl, n, 0.03, t), quad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(f_lambda(risk, kl, n, 0.03), quad, rtol=1e-10, atol=1e-10)
        for other in (t * 0.9, t + 0.1 * (2 - t)):
            assert f_lambda(risk, kl, n, 0.03, other) > quad


def test_the_best_lambda_has_the_gradient_of_the_quadratic_bound() -> None:
    gradients = []
    for bound in (f_lambda, f_quad):
        risk, kl = double(0.07).requires_grad_(), double(300.0).requires_grad_()
        gradients.append(torch.stack(torch.autograd.grad(bound(risk, kl, 4000, 0.025), (risk, kl))))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=0)


def test_property_5_the_divergence_is_that_of_two_normals() -> None:
    mean, sigma = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64) + 0.01
    prior_mean, prior_sigma = torch.randn(7, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.01
    Q, P = (torch.distributions.Normal(*args) for args in ((mean, sigma), (prior_mean, prior_sigma)))
    wanted = torch.distributions.kl_divergence(Q, P).sum()
    torch.testing.assert_close(gaussian_kl(mean, sigma, prior_mean, prior_sigma), wanted, rtol=1e-12, atol=0)
    scaled = gaussian_kl(prior_mean + 3 * (mean - prior_mean), 3 * sigma, prior_mean, 3 * prior_sigma)
    torch.testing.assert_close(scaled, wanted, rtol=1e-12, atol=0)
    single = gaussian_kl(mean.float(), sigma.float(), prior_mean.float(), prior_sigma.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=1e-5, atol=0)
    assert gaussian_kl(mean.float(), sigma.float(), 0.0, 0.1, dtype=torch.float64).dtype == torch.float64


def test_property_5_the_divergence_is_zero_at_the_prior_alone() -> None:
    mean, sigma = torch.randn(1000), torch.full((1000,), 0.03)
    assert gaussian_kl(mean, sigma, mean, 0.03).item() == pytest.approx(0, abs=1e-9)
    assert gaussian_kl(mean, sigma, mean.clone(), sigma.clone()).item() == 0
    assert gaussian_kl(mean, sigma, mean + 1e-3, sigma).item() > 0
    # Where r - 1 - ln r would be rounding alone: 1000 entries that are 1e-4 away cost 1000 * 1e-8.
    assert gaussian_kl(mean, sigma * 1.0001, mean, sigma).item() == pytest.approx(1e-5, rel=0.01)


@pytest.mark.parametrize(
    ("share", "cost"), [(0.99, 1.0e-4), (0.9, 0.0104), (0.7, 0.102), (0.5, 0.318), (0.1, 1.81), (0.01, 4.11)]
)
def test_cost_of_a_parameter_by_how_much_narrower_it_is_than_the_prior(share: float, cost: float) -> None:
    found = gaussian_kl(torch.zeros(1), torch.full((1,), 0.1 * share), 0.0, 0.1).item()
    assert found == pytest.approx(cost, rel=0.02)


def test_property_8_the_divergence_grows_without_limit_and_stays_finite_at_the_clamp() -> None:
    costs = [gaussian_kl(torch.zeros(10), torch.full((10,), math.exp(-rho)), 0.0, 0.1).item() for rho in (3, 6, 9, 12)]
    assert costs == sorted(costs)
    assert math.isfinite(costs[-1])
    assert costs[-1] == pytest.approx(10 * (12 - math.log(10) - 0.5), rel=1e-4)


@pytest.mark.parametrize("name", BOUNDS)
def test_property_9_gradients_are_finite_differences(name: str) -> None:
    risk, kl = double(0.12).requires_grad_(), double(150.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, k: BOUNDS[name](r, k, 3000, 0.02), (risk, kl), eps=1e-5, atol=1e-8)
    gradient = torch.stack(torch.autograd.grad(BOUNDS[name](risk, kl, 3000, 0.02), (risk, kl)))
    assert bool((gradient > 0).all())


def test_property_9_the_divergence_has_the_gradient_of_its_equation() -> None:
    mean, sigma = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.1
    widths = torch.rand(4, dtype=torch.float64) + 0.1
    inputs = tuple(tensor.requires_grad_() for tensor in (mean, sigma, torch.zeros_like(mean), widths))
    assert torch.autograd.gradcheck(gaussian_kl, inputs)


@pytest.mark.parametrize("risk", [0.0, 1.0])
@pytest.mark.parametrize("name", BOUNDS)
def test_gradients_are_finite_at_the_ends(name: str, risk: float) -> None:
    R, KL = torch.tensor(risk, requires_grad=True), torch.tensor(80.0, requires_grad=True)
    gradients = torch.autograd.grad(BOUNDS[name](R, KL, 500, 0.02), (R, KL))
    assert all(bool(gradient.isfinite()) for gradient in gradients)


@pytest.mark.parametrize("name", [name for name in BOUNDS if name != "bbb"])
def test_every_bound_is_above_the_risk_and_grows_with_the_divergence(name: str) -> None:
    for risk in (0.0, 0.01, 0.2, 0.9):
        values = [BOUNDS[name](double(risk), double(kl), 5000, 0.025).item() for kl in (0.0, 10.0, 300.0)]
        assert risk < values[0] < values[1] < values[2]


@pytest.mark.parametrize("name", ["classic", "quad", "lambda", "lambda, t given"])
def test_the_inverted_divergence_is_below_what_loosens_it(name: str) -> None:
    for risk in (0.0, 0.01, 0.2, 0.5):
        for kl in (0.0, 20.0, 500.0):
            found = f_kl(double(risk), double(kl), 5000, 0.025)
            assert found <= BOUNDS[name](double(risk), double(kl), 5000, 0.025) + 1e-12


def test_quadratic_below_classic_where_the_risk_is_small() -> None:
    for risk in (0.0, 0.05, 0.15, 0.2, 0.24, 0.4):
        for kl in (1.0, 100.0, 1000.0):
            C = complexity(double(kl), 10_000, 0.025).item()
            below = bool(f_quad(double(risk), double(kl), 10_000) < f_classic(double(risk), double(kl), 10_000))
            assert below == (risk < 0.25 - math.sqrt(C / 2))


def test_the_differentiable_inverse_is_the_exact_one() -> None:
    for risk in (0.0, 1e-4, 0.03, 0.5, 0.999, 1.0):
        for kl in (0.0, 50.0, 4e4):
            C = complexity(double(kl), 2000, 0.025).item()
            wanted = inverse_bernoulli_kl(risk, C)
            assert f_kl(double(risk), double(kl), 2000).item() == pytest.approx(wanted, abs=1e-12)
            assert f_kl(torch.tensor(risk), torch.tensor(kl), 2000).item() == pytest.approx(wanted, abs=2e-6)


def test_catoni_is_above_the_risk_in_its_own_divergence() -> None:
    """The least over a, without the union, is the inverse of kl at (KL + ln(1 / delta)) / n."""
    risk, kl, n, delta = 0.1, 60.0, 2000, 0.025
    wanted = inverse_bernoulli_kl(risk, (kl + math.log(1 / delta)) / n)
    single = [catoni(double(risk), double(kl), n, delta, a=0.01 * k).item() for k in range(1, 300)]
    assert min(single) == pytest.approx(wanted, abs=1e-5)
    assert min(single) >= wanted
    grid = [0.25, 0.5, 1.0]
    together = catoni(double(risk), double(kl), n, delta, a=grid).item()
    assert together == min(catoni(double(risk), double(kl), n, delta / 3, a=a).item() for a in grid)
    best = math.sqrt(8 * n * (kl + math.log(1 / delta)))
    classic = risk + math.sqrt((kl + math.log(1 / delta)) / (2 * n))
    assert catoni_linear(double(risk), double(kl), n, delta, t=best).item() == pytest.approx(classic, abs=1e-12)


def test_the_learnt_t_stays_between_its_limits() -> None:
    assert learnt_t(torch.tensor(-200.0), 400).item() == pytest.approx(0.05)
    assert learnt_t(torch.tensor(200.0), 400).item() == 1.0
    assert learnt_t(double(6.0), 60_000).item() == pytest.approx(0.997537, abs=1e-6)


def test_maurers_constant_also_holds_below_eight_examples() -> None:
    """sum_k binom(n, k) (k/n)^k (1 - k/n)^(n - k) <= 2 sqrt(n): what the complexity's ln 2 sqrt(n) stands on."""
    for n in range(1, 40):
        total = sum(math.comb(n, k) * (k / n) ** k * (1 - k / n) ** (n - k) for k in range(n + 1))
        assert total <= 2 * math.sqrt(n)


def test_low_precision_is_computed_in_float32() -> None:
    risk, kl = torch.tensor(0.1).bfloat16(), torch.tensor(100.0)
    for name, bound in BOUNDS.items():
        value = bound(risk, kl, 3000, 0.025)
        assert value.dtype == torch.float32, name
        assert value.shape == ()


# -- Bounded cross-entropy ---------------------------------------------------------------------------------------------


def test_bounded_cross_entropy_is_its_equation_for_classes() -> None:
    logits, labels = 8 * torch.randn(50, 6, dtype=torch.float64), torch.randint(6, (50,))
    p = logits.softmax(-1)[torch.arange(50), labels].clamp(min=1e-3)
    found = bounded_cross_entropy(logits, labels, p_min=1e-3)
    torch.testing.assert_close(found, -p.log() / math.log(1e3))
    assert found.max() == 1
    assert found.min() >= 0
    assert bounded_cross_entropy(torch.tensor([[300.0, -300.0]]), torch.tensor([1])).item() == 1


def test_bounded_cross_entropy_of_a_sequence_is_the_mean_over_its_shown_tokens() -> None:
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    labels[0, 3:] = -100
    labels[2] = -100
    losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    found = bounded_cross_entropy(logits, labels)
    wanted = torch.stack([losses[0, :3].mean(), losses[1].mean(), double(0.0)]) / math.log(1e4)
    torch.testing.assert_close(found, wanted)


def test_bounded_cross_entropy_gives_no_gradient_beyond_the_least_probability() -> None:
    logits = torch.tensor([[0.0, 30.0], [0.0, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(bounded_cross_entropy(logits, torch.tensor([0, 0])).sum(), logits)
    assert torch.equal(gradient[0], torch.zeros(2))
    assert bool((gradient[1] != 0).all())
    assert bounded_cross_entropy(logits.bfloat16(), torch.tensor([0, 0])).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: complexity(1.0, 100, 1.0), "delta must lie strictly between 0 and 1. Got 1.0."),
        (lambda: f_quad(0.1, 1.0, 0), "n must be at least 1, the number of independent examples. Got 0."),
        (lambda: f_lambda(0.1, 1.0, 100, t=2.0), "t must lie strictly between 0 and 2; None takes the best one. Got"),
        (lambda: f_bbb(0.1, 1.0, 100, eta=0.0), "eta must lie in (0, 1]. Got 0.0."),
        (lambda: dziugaite_roy(0.1, 1.0, 1, prior_sigma=0.1), "n must be at least 2, the number of examples. Got 1."),
        (lambda: catoni(0.1, 1.0, 100, a=0.0), "a must be a positive number or several. Got 0.0."),
        (lambda: catoni(0.1, 1.0, 100, a=()), "a must be a positive number or several. Got ()."),
        (lambda: catoni_linear(0.1, 1.0, 100, t=-1.0), "t must be a positive number. Got -1.0."),
        (
            lambda: bounded_cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), p_min=0.0),
            "p_min must lie strictly between 0 and 1. Got 0.0.",
        ),
        (
            lambda: bounded_cross_entropy(torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.long)),
            "labels must have the shape of logits without the classes, one label for each prediction. Got logits "
            "(2, 5, 3) and labels (2,).",
        ),
    ],
)
def test_arguments_out_of_range_are_named(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()
