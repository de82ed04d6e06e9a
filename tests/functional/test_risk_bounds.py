from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch

from lightning_peft.functional.pac_bayes import gaussian_kl
from lightning_peft.functional.risk_bounds import (
    bernoulli_kl,
    certified_risk,
    effective_units,
    inverse_bernoulli_kl,
)


def exact_kl(q: float, p: float) -> Decimal:
    """The divergence of two floats, in fifty digits."""
    with localcontext() as context:
        context.prec = 50
        Q, P = Decimal(q), Decimal(p)
        return sum((a * (a / b).ln() for a, b in ((Q, P), (1 - Q, 1 - P)) if a), Decimal(0))


def pairs(seed: int, count: int) -> list[tuple[float, float]]:
    """q all over [0, 1], many of them near its ends, and divergences over twenty orders of magnitude."""
    source = random.Random(seed)
    ends = [lambda u: u, lambda u: 10 ** (-16 * u), lambda u: 1 - 10 ** (-15 * u), lambda u: 0.0]
    return [(ends[i % 4](source.random()), 10 ** (2.5 - 18 * source.random())) for i in range(count)]


@pytest.mark.parametrize(
    ("q", "c", "p"),
    [
        (0.0, 0.1, 0.0951626),
        (0.01, 0.01, 0.031126),
        (0.028, 0.0935, 0.160444),
        (0.05, 0.02, 0.105750),
        (0.1, 0.1, 0.282379),
        (0.5, 0.05, 0.654242),
        (0.02, 0.5, 0.447802),
    ],
)
def test_property_1_golden_values_of_the_inverse(q: float, c: float, p: float) -> None:
    assert inverse_bernoulli_kl(q, c) == pytest.approx(p, abs=1e-6)


def test_the_divergence_is_right_to_rounding_also_between_neighbours() -> None:
    source = random.Random(2)
    for q, _ in pairs(2, 400):
        for p in (source.random(), q + (1 - q) * 10 ** (-12 * source.random()), q * (1 - 1e-7 * source.random())):
            if 0 < p < 1:
                exact = float(exact_kl(q, p))
                assert bernoulli_kl(q, p) == pytest.approx(exact, rel=1e-9, abs=4e-16 * abs(p - q))
    assert bernoulli_kl(0.3, 0.3) == bernoulli_kl(0.0, 0.0) == bernoulli_kl(1.0, 1.0) == 0
    assert bernoulli_kl(0.3, 1.0) == bernoulli_kl(0.3, 0.0) == math.inf


def test_property_2_the_inverse_never_understates_and_hardly_overstates() -> None:
    """Fifty digits decide: what is returned has a divergence of at least c, its lower neighbourhood one below it."""
    for q, c in pairs(3, 2000):
        p = inverse_bernoulli_kl(q, c)
        assert q <= p <= 1
        if p < 1:
            assert exact_kl(q, p) >= Decimal(c)
        below = p - 1e-12 * (p - q) - 8 * math.ulp(p) - 40 * 2.2e-16 * (p - q) / max(c, 1e-300) * (p - q)
        if below > q:
            assert exact_kl(q, below) < Decimal(c)


def test_property_2_the_inverse_at_its_ends_and_its_order() -> None:
    for q in (0.0, 1e-300, 0.2, 1 - 1e-16, 1.0):
        assert inverse_bernoulli_kl(q, 0.0) == q
        assert inverse_bernoulli_kl(q, math.inf) == 1
    assert inverse_bernoulli_kl(1.0, 0.3) == 1
    for c in (1e-9, 1e-3, 0.5, 20.0):
        assert inverse_bernoulli_kl(0.0, c) == pytest.approx(-math.expm1(-c), rel=1e-12)
    divergences = [10 ** (-k / 4) for k in range(40, -8, -1)]
    for q in (0.0, 0.01, 0.5, 0.9):
        values = [inverse_bernoulli_kl(q, c) for c in divergences]
        assert values == sorted(values)
        assert all(p <= q + math.sqrt(c / 2) + 1e-15 for p, c in zip(values, divergences, strict=True))
    for c in (1e-6, 0.01, 1.0):
        values = [inverse_bernoulli_kl(k / 100, c) for k in range(101)]
        assert values == sorted(values)


def test_property_6_golden_values_of_the_certificate() -> None:
    for units, wanted in ((150_000, (0.021199, 0.035915)), (1000, (0.037935, 0.056548))):
        found = certified_risk(0.02, units=units, kl=100.0, n=30_000, delta=0.025, delta_prime=0.01)
        assert found == pytest.approx(wanted, abs=1e-6)


def test_units_golden_values() -> None:
    """10 passes over 67,349 examples at 0.06, one-sided: one draw a pass, a batch of 32, an example."""
    n, passes = 67_349, 10
    for largest, wanted in ((n, 0.497), (32, 0.0651), (1, 0.0609)):
        units = effective_units(n * passes, largest)
        assert inverse_bernoulli_kl(0.06, math.log(1 / 0.01) / units) == pytest.approx(wanted, abs=5.1e-4)


def test_units_of_unequal_size_count_as_many_as_the_largest_allows() -> None:
    """The mean of a full batch and a nearly empty one is hardly steadier than that of one draw."""
    assert effective_units(33, 32) == pytest.approx(33 / 32)
    generator = torch.Generator().manual_seed(0)
    # Weighted means of draws in {0, 1}: the bound at m_eff holds in all but delta of many repetitions.
    sizes = torch.tensor([32.0] * 10 + [5.0])
    draws = (torch.rand(20_000, len(sizes), generator=generator) < 0.3).float()
    means = Counter((draws @ sizes / sizes.sum()).clamp(max=1).tolist())
    c = math.log(1 / 0.05) / effective_units(int(sizes.sum()), 32)
    assert sum(times for mean, times in means.items() if inverse_bernoulli_kl(mean, c) < 0.3) < 0.05 * 20_000


def test_property_7_the_certificate_in_order() -> None:
    def cert(n: int = 5000, kl: float = 50.0, units: float = 1e4, empirical: float = 0.1, tried: int = 1) -> float:
        return certified_risk(empirical, units, kl, n, tried=tried)[1]

    falling = ("n", [100, 1000, 10_000, 10**6]), ("units", [1, 10, 1e4, 1e8])
    rising = ("kl", [0.0, 1.0, 100.0, 5000.0]), ("tried", [1, 2, 50]), ("empirical", [0.0, 0.1, 0.5, 0.9])
    for name, values in falling:
        found = [cert(**{name: value}) for value in values]  # type: ignore[arg-type]
        assert found == sorted(found, reverse=True)
        assert len(set(found)) == len(found)
    for name, values in rising:
        found = [cert(**{name: value}) for value in values]  # type: ignore[arg-type]
        assert found == sorted(found)
        assert len(set(found)) == len(found)
    for empirical in (0.0, 0.3, 1.0):
        q, risk = certified_risk(empirical, 100, 3.0, 500)
        assert empirical <= q <= risk <= 1
    assert certified_risk(0.0, 1e9, 1e6, 1000)[1] == pytest.approx(1, abs=1e-12)
    assert certified_risk(0.0, 1e9, 1e9, 10)[1] == 1


def test_a_choice_among_several_costs_both_probabilities() -> None:
    assert certified_risk(0.1, 500, 20.0, 3000, 0.05, 0.02, tried=4) == pytest.approx(
        certified_risk(0.1, 500, 20.0, 3000, 0.05 / 4, 0.02 / 4), rel=1e-12
    )


def test_property_12_the_certificate_covers_the_true_risk() -> None:
    """200 data sets: a Gaussian posterior of ridge regression on signs; its true risk is known in closed form.

    x ~ N(0, I_d), y = sign of a noisy x . truth: a drawn w errs with probability angle(w, direction) / pi, mixed with
    the noise. The chosen delta is large, so that a bound that were too small by a factor would be seen.
    """
    torch.manual_seed(12)
    sets, n, d, draws, flips, delta, delta_prime = 200, 300, 5, 100, 0.1, 0.3, 0.2
    truth = torch.nn.functional.normalize(torch.randn(sets, d, 1, dtype=torch.float64), dim=1)
    x = torch.randn(sets, n, d, dtype=torch.float64)
    y = torch.where(torch.rand(sets, n, 1, dtype=torch.float64) < flips, -1.0, 1.0) * (x @ truth).sign()
    mean = torch.linalg.solve(x.mT @ x + 30 * torch.eye(d, dtype=torch.float64), x.mT @ y)
    sigma, prior_sigma = torch.full((d, 1), 0.15, dtype=torch.float64), 0.4

    def risks(w: torch.Tensor) -> torch.Tensor:  # (sets, d, draws) -> true risk of each draw
        cosine = (torch.nn.functional.normalize(w, dim=1) * truth).sum(1).clamp(-1, 1)
        disagree = cosine.arccos() / math.pi
        return flips + (1 - 2 * flips) * disagree

    true = risks(mean + sigma * torch.randn(sets, d, 1000, dtype=torch.float64)).mean(1)
    w = mean + sigma * torch.randn(sets, d, draws, dtype=torch.float64)
    empirical = ((x @ w).sign() != y).double().mean((1, 2))
    missed, certificates = 0, []
    for i in range(sets):
        kl = gaussian_kl(mean[i], sigma, 0.0, prior_sigma).item()
        bound = certified_risk(empirical[i].item(), draws, kl, n, delta, delta_prime)[1]
        missed += bound < true[i].item()
        certificates.append(bound)
    assert missed <= sets * (delta + delta_prime) * 0.5
    # The test could fail: risks lie where a certificate has something to miss, and the bare error would miss often.
    assert float((empirical < true).double().mean()) > 0.3
    assert max(certificates) < 0.6


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: bernoulli_kl(1.5, 0.2), "q must lie in [0, 1]. Got 1.5."),
        (lambda: bernoulli_kl(0.5, -0.2), "p must lie in [0, 1]. Got -0.2."),
        (lambda: inverse_bernoulli_kl(math.nan, 0.1), "q must lie in [0, 1]. Got nan."),
        (lambda: inverse_bernoulli_kl(0.1, -0.1), "c must be at least 0, in nats. Got -0.1."),
        (lambda: inverse_bernoulli_kl(0.1, math.nan), "c must be at least 0, in nats. Got nan."),
        (
            lambda: effective_units(10, 11),
            "largest must lie between 1 and the number of losses. Got largest=11 and losses=10.",
        ),
        (lambda: certified_risk(-0.1, 10, 1.0, 100), "empirical must lie in [0, 1]. Got -0.1."),
        (lambda: certified_risk(0.1, 0, 1.0, 100), "units must be at least 1. Got 0."),
        (lambda: certified_risk(0.1, 10, 1.0, 0), "n must be at least 1. Got 0."),
        (lambda: certified_risk(0.1, 10, 1.0, 100, tried=0), "tried must be at least 1. Got 0."),
        (lambda: certified_risk(0.1, 10, math.nan, 100), "kl must be at least 0, in nats. Got nan."),
        (lambda: certified_risk(0.1, 10, 1.0, 100, delta=0.0), "delta must lie strictly between 0 and 1. Got 0.0."),
        (
            lambda: certified_risk(0.1, 10, 1.0, 100, delta_prime=1.0),
            "delta_prime must lie strictly between 0 and 1. Got 1.0.",
        ),
    ],
)
def test_arguments_out_of_range_are_named(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()
