from __future__ import annotations

import math
import re

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lightning_peft.functional.latent import active_units, aggregate_mutual_information, importance_weighted_nll
from lightning_peft.metrics import ActiveUnits, AggregateMutualInformation, ImportanceWeightedNLL, PriorDivergence


def test_property_10_aggregate_information_of_a_large_set_goes_beyond_that_of_batches() -> None:
    """The card's row of 32 units: 11.09 nats, of which 32 examples can show 3.47 and 1024 show 6.93."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1024, 32, generator=generator)
    z = mean + torch.randn(1024, 32, generator=generator)
    whole, batches = AggregateMutualInformation(chunk=100), AggregateMutualInformation(batch_size=32, name="mi/32")
    for rows in torch.arange(1024).split(48):
        for metric in (whole, batches):
            metric.update(mean[rows], torch.zeros(len(rows), 32), z[rows])
    found = whole.compute() | batches.compute()
    expected = aggregate_mutual_information(mean, torch.zeros_like(mean), z)
    torch.testing.assert_close(found["mi/aggregate"], expected)
    of_batches = [
        aggregate_mutual_information(mean[rows], torch.zeros(32, 32), z[rows]) for rows in torch.arange(1024).split(32)
    ]
    torch.testing.assert_close(found["mi/32"], torch.stack(of_batches).mean())
    assert float(found["mi/aggregate"]) == pytest.approx(6.736, abs=3 * 0.124)
    assert float(found["mi/32"]) <= float(found["mi/32_ceiling"]) == math.log(32)
    assert [float(found[key]) for key in ("mi/aggregate_n", "mi/32_n")] == [1024, 32]
    assert float(found["mi/aggregate_ceiling"]) == math.log(1024)


def test_a_last_batch_counts_by_its_size_and_a_single_example_not() -> None:
    mean = torch.randn(11, 2, generator=torch.Generator().manual_seed(1))
    z = mean + 0.5
    metric = AggregateMutualInformation(batch_size=4)
    metric.update(mean, torch.zeros_like(mean), z)
    values = [
        aggregate_mutual_information(mean[i : i + 4], torch.zeros(11, 2)[i : i + 4], z[i : i + 4]) for i in (0, 4, 8)
    ]
    expected = (4 * values[0] + 4 * values[1] + 3 * values[2]) / 11
    torch.testing.assert_close(metric.compute()["mi/aggregate"], expected)
    metric.reset()
    metric.update(mean[:9], torch.zeros(9, 2), z[:9])
    torch.testing.assert_close(metric.compute()["mi/aggregate"], (values[0] + values[1]) / 2)
    with pytest.raises(ValueError, match="batch_size must be at least 2, or None for the whole set. Got 1."):
        AggregateMutualInformation(batch_size=1)
    with pytest.raises(
        ValueError, match=re.escape("must be (n, d), with one draw z for each example. Got (11, 2), (2,) and")
    ):
        metric.update(mean, torch.zeros(2), z)


def test_property_12_units_are_counted_over_all_batches() -> None:
    """A unit that is constant within every batch may still vary between them."""
    means = torch.zeros(40, 32)
    means[:20, :5] = 1.0
    metric = ActiveUnits()
    for some in means.split(10):
        assert int(active_units(some)) == 0
        metric.update(some)
    assert {key: float(value) for key, value in metric.compute().items()} == {"au": 5, "au_n": 40}
    few = ActiveUnits(threshold=0.3, name="au_3")
    few.update(means)
    assert float(few.compute()["au_3"]) == 0
    with pytest.raises(ValueError, match="threshold must be positive, the least variance of a unit in use. Got 0."):
        ActiveUnits(0)
    with pytest.raises(ValueError, match=re.escape("means must be (n, d), one row for each example. Got (32,).")):
        metric.update(means[0])
    metric.reset()
    metric.update(means[:1])
    with pytest.raises(
        RuntimeError, match=re.escape("ActiveUnits needs at least 2 examples; call update(means) before c")
    ):
        metric.compute()


def test_divergence_is_the_mean_over_examples() -> None:
    generator = torch.Generator().manual_seed(2)
    mean, std = torch.randn(7, 3, generator=generator), torch.rand(7, 3, generator=generator) + 0.1
    metric = PriorDivergence()
    for rows in (slice(0, 5), slice(5, 7)):
        metric.update(mean[rows], std[rows], torch.full((3,), 0.5), 2.0)
    expected = kl_divergence(Normal(mean, std), Normal(0.5, 2.0)).sum(1).mean()
    torch.testing.assert_close(metric.compute()["kl"].float(), expected)
    assert float(metric.compute()["kl_n"]) == 7
    with pytest.raises(ValueError, match=re.escape("mean and std must both be (n, d). Got (7, 3) and (3,).")):
        metric.update(mean, std[0])
    with pytest.raises(
        RuntimeError, match=re.escape("has counted no examples; call update(mean, std) before compute()")
    ):
        _computed(PriorDivergence())


def test_likelihood_and_perplexity_are_of_totals() -> None:
    generator = torch.Generator().manual_seed(3)
    log_joint, log_posterior = torch.randn(2, 10, 6, generator=generator, dtype=torch.float64) - 40
    tokens = torch.arange(1, 11)
    metric = ImportanceWeightedNLL()
    metric.update(log_joint[:7], log_posterior[:7], tokens[:7])
    metric.update(log_joint[7:, :4], log_posterior[7:, :4], int(tokens[7:].sum()))
    total = importance_weighted_nll(log_joint[:7], log_posterior[:7]).sum()
    total = total + importance_weighted_nll(log_joint[7:, :4], log_posterior[7:, :4]).sum()
    found = {key: float(value) for key, value in metric.compute().items()}
    assert found == pytest.approx(
        {"nll": float(total) / 10, "nll_n": 10, "nll_draws": 4, "ppl": math.exp(float(total) / 55), "ppl_n": 55}
    )
    metric.reset()
    metric.update(log_joint, log_posterior)
    assert list(metric.compute()) == ["nll", "nll_n", "nll_draws"]
    with pytest.raises(
        RuntimeError, match=re.escape("has counted no examples; call update(log_joint, log_posterior) bef")
    ):
        _computed(ImportanceWeightedNLL())


def _computed(metric: PriorDivergence | ImportanceWeightedNLL) -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        metric.compute()
