from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lightning_peft.functional.gaussian import gaussian_log_densities, gaussian_log_density
from lightning_peft.functional.latent import (
    active_units,
    aggregate_mutual_information,
    gaussian_kl_per_unit,
    gaussian_kl_to,
    importance_weighted_nll,
    perplexity,
    unit_variances,
)
from lightning_peft.functional.mutual_information import info_nce


def posterior(n: int, k: int, variance: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q(z | x) = N(mu_x, I) with mu_x ~ N(0, variance I): I(x; z) = k / 2 ln(1 + variance)."""
    mean = math.sqrt(variance) * torch.randn(n, k, generator=generator, dtype=torch.float64)
    return mean, torch.zeros_like(mean), mean + torch.randn(n, k, generator=generator, dtype=torch.float64)


def test_many_densities_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    z = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    normal = Normal(mean.unsqueeze(1), (log_variance / 2).exp().unsqueeze(1))
    torch.testing.assert_close(gaussian_log_densities(mean, log_variance, z), normal.log_prob(z).sum(-1))
    own = Normal(mean[:5], (log_variance[:5] / 2).exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(gaussian_log_density(mean[:5], log_variance[:5], z), own)
    torch.testing.assert_close(gaussian_log_density(0.0, 0.0, z), Normal(0.0, 1.0).log_prob(z).sum(-1))
    inputs = [t.clone().requires_grad_() for t in (mean, log_variance, z)]
    assert torch.autograd.gradcheck(gaussian_log_densities, inputs)


def test_many_densities_do_not_cancel_in_float32() -> None:
    """Narrow posteriors far from zero, as a decoder that needs its code makes them."""
    generator = torch.Generator().manual_seed(1)
    mean = 50 + torch.randn(64, 16, generator=generator)
    log_variance = torch.full_like(mean, 2 * math.log(1e-3))
    z = mean + 1e-3 * torch.randn(64, 16, generator=generator)
    found = gaussian_log_densities(mean, log_variance, z)
    assert found.dtype == torch.float32
    exact = gaussian_log_density(mean.double(), log_variance.double(), z.double())
    torch.testing.assert_close(found.diagonal().double(), exact, atol=1e-4, rtol=1e-6)


def test_property_16_densities_are_computed_in_full_precision_under_autocast() -> None:
    generator = torch.Generator().manual_seed(2)
    mean, log_variance, z = torch.randn(3, 9, 4, generator=generator).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = gaussian_log_densities(mean, log_variance, z)
        information = aggregate_mutual_information(mean, log_variance, z)
        kl = gaussian_kl_to(mean, log_variance.exp(), 0.0, 1.0)
    assert (low.dtype, information.dtype, kl.dtype) == (torch.float32, torch.float64, torch.float32)
    assert torch.equal(low, gaussian_log_densities(mean.float(), log_variance.float(), z.float()))
    assert low.isfinite().all()
    assert kl.isfinite().all()
    assert torch.equal(information, aggregate_mutual_information(mean.double(), log_variance.double(), z.double()))


EXPECTED = {
    (1, 3): (0.655, 0.691, 0.697),
    (2, 3): (1.272, 1.372, 1.382),
    (8, 1): (2.282, 2.642, 2.748),
    (32, 1): (3.356, 5.486, 6.736),
}
"""k and variance, and the mean for 32, 256 and 1024 examples, measured independently of this code."""
SPREAD = {
    (1, 3): (0.154, 0.040, 0.020),
    (2, 3): (0.144, 0.065, 0.043),
    (8, 1): (0.328, 0.109, 0.076),
    (32, 1): (0.693, 0.242, 0.124),
}
"""Standard deviations of one batch."""


@pytest.mark.parametrize("closed_entropy", [False, True])
@pytest.mark.parametrize(("k", "variance"), EXPECTED)
def test_property_10_aggregate_information_of_known_posteriors(k: int, variance: int, closed_entropy: bool) -> None:
    generator = torch.Generator().manual_seed(10)
    for place, (n, batches) in enumerate(((32, 40), (256, 20), (1024, 5))):
        of = [
            aggregate_mutual_information(*posterior(n, k, variance, generator), closed_entropy=closed_entropy)
            for _ in range(batches)
        ]
        values = torch.stack(of)
        error = SPREAD[k, variance][place] * math.sqrt(1 / batches + 1 / 40)
        assert float(values.mean()) == pytest.approx(EXPECTED[k, variance][place], abs=3 * error)
        assert float(values.mean()) <= math.log(n) + 3 * error
        if not closed_entropy:
            assert float(values.max()) <= math.log(n)


def test_closed_entropy_has_the_spread_of_the_card_and_more_than_draws() -> None:
    generator = torch.Generator().manual_seed(11)
    batches = [posterior(32, 32, 1, generator) for _ in range(100)]
    closed, drawn = (
        torch.stack([aggregate_mutual_information(*of, closed_entropy=closed) for of in batches])
        for closed in (True, False)
    )
    assert float(closed.std()) == pytest.approx(0.693, rel=0.25)
    assert float(drawn.std()) < float(closed.std()) / 5
    assert float(closed.max()) > math.log(32) > float(drawn.max())


def test_aggregate_information_is_info_nce_of_the_densities_in_any_chunks() -> None:
    mean, _, z = posterior(50, 3, 2.0, torch.Generator().manual_seed(12))
    log_variance = 0.1 * mean
    whole = aggregate_mutual_information(mean, log_variance, z)
    torch.testing.assert_close(whole, info_nce(gaussian_log_densities(mean, log_variance, z).T))
    for chunk in (1, 7, 50):
        torch.testing.assert_close(aggregate_mutual_information(mean, log_variance, z, chunk=chunk), whole)
    with pytest.raises(ValueError, match="chunk must be at least 1. Got 0."):
        aggregate_mutual_information(mean, log_variance, z, chunk=0)
    with pytest.raises(
        ValueError, match=re.escape("must be (N, d) of at least 2 examples, with one draw z for each. Go")
    ):
        aggregate_mutual_information(mean[:1], log_variance[:1], z[:1])
    with pytest.raises(
        ValueError, match=re.escape("mean and log_variance must be (N, d), and z (M, d). Got (50, 3), (50,)")
    ):
        gaussian_log_densities(mean, log_variance[:, 0], z)


def test_property_11_divergence_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(13)
    mean, prior_mean = torch.randn(2, 6, 4, generator=generator)
    std, prior_std = torch.rand(2, 6, 4, generator=generator) + 0.1
    found = gaussian_kl_to(mean, std, prior_mean[0], prior_std[0])
    expected = kl_divergence(Normal(mean, std), Normal(prior_mean[0], prior_std[0]))
    torch.testing.assert_close(found, expected.sum(-1))
    torch.testing.assert_close(gaussian_kl_per_unit(mean, std, prior_mean[0], prior_std[0]), expected)
    torch.testing.assert_close(
        gaussian_kl_to(mean, std, 0.3, 0.7), kl_divergence(Normal(mean, std), Normal(0.3, 0.7)).sum(-1)
    )
    assert torch.equal(gaussian_kl_to(mean, std, mean, std), torch.zeros(6))  # exactly zero when q = r
    inputs = [t.double().requires_grad_() for t in (mean, std, prior_mean[0], prior_std[0])]
    assert torch.autograd.gradcheck(gaussian_kl_to, inputs)


def test_a_posterior_without_width_has_a_finite_divergence() -> None:
    std = torch.zeros(1, 2, requires_grad=True)
    kl = gaussian_kl_to(torch.zeros(1, 2), std, 0.0, 1.0)
    kl.sum().backward()  # type: ignore[no-untyped-call]
    assert float(kl.detach()) == pytest.approx(2 * (math.log(1e8) - 0.5), rel=1e-5)
    assert std.grad is not None
    assert std.grad.isfinite().all()


def test_property_12_units_that_vary_are_counted() -> None:
    generator = torch.Generator().manual_seed(14)
    means = torch.full((500, 32), 1e4) + 1e-3 * torch.randn(500, 32, generator=generator)
    means[:, 3:8] += torch.randn(500, 5, generator=generator)
    assert int(active_units(means)) == 5
    torch.testing.assert_close(unit_variances(means), means.double().var(0))
    two = torch.tensor([[0.0, 0.0], [0.2, math.sqrt(0.02) - 1e-3]])
    assert int(active_units(two)) == 1  # n - 1: variances 0.02 and just below 0.01
    assert int(active_units(two, threshold=0.005)) == 2
    with pytest.raises(ValueError, match=re.escape("means must be (N, d) of at least 2 examples. Got (1, 32).")):
        active_units(means[:1])


def test_property_13_more_draws_bound_the_likelihood_more_tightly() -> None:
    """x = z + noise, with a posterior that is too wide: ln p(x) is known."""
    generator = torch.Generator().manual_seed(15)
    x = math.sqrt(2) * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    z = x / 2 + 1.2 * torch.randn(400, 512, generator=generator, dtype=torch.float64)
    log_joint = Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x)
    log_posterior = Normal(x / 2, 1.2).log_prob(z)
    truth = float(-Normal(0.0, math.sqrt(2)).log_prob(x).mean())
    found = [float(importance_weighted_nll(log_joint[:, :s], log_posterior[:, :s]).mean()) for s in (1, 8, 64, 512)]
    elbo = float((log_posterior - log_joint).mean())  # by all draws
    assert elbo > found[1] > found[2] > found[3] > truth - 0.01
    assert found[0] == pytest.approx(float((log_posterior - log_joint)[:, 0].mean()))
    assert found[3] == pytest.approx(truth, abs=0.01)
    both = torch.cat([log_joint[:, :200], log_joint[:, 200:]], 1)
    assert torch.equal(importance_weighted_nll(both, log_posterior), importance_weighted_nll(log_joint, log_posterior))
    far = importance_weighted_nll(torch.full((2, 3), -2000.0), torch.zeros(2, 3))
    torch.testing.assert_close(far, torch.full((2,), 2000.0))
    for bad in ((torch.zeros(3), torch.zeros(3)), (torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(3, 0),) * 2):
        with pytest.raises(ValueError, match=re.escape("must be (N, S), one number for each of S draws. Got (3")):
            importance_weighted_nll(*bad)


def test_perplexity_is_one_of_totals() -> None:
    assert float(perplexity(torch.tensor(6 * math.log(50.0)), 6)) == pytest.approx(50)
    assert float(perplexity(0.0, 3.0)) == 1
