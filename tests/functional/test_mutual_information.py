"""Estimators of scores, by the properties of the method's card: correlated Gaussians, whose information is known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_peft.functional.mutual_information import (
    ESTIMATORS,
    dv,
    dv_surrogate,
    estimate,
    info_nce,
    jsd,
    log_mean_exp_off_diagonal,
    next_log_moving,
    nwj,
    score_estimator,
    smile,
)

OF_SCORES = (dv, nwj, jsd, info_nce, smile)


def pairs(n: int, d: int, rho: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and y of d standard normal entries, each correlated with its own."""
    x, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def log_ratios(x: Tensor, y: Tensor, rho: float) -> Tensor:
    """The best critic, ln p(y | x) / p(y), of each x with each y."""
    of = y.unsqueeze(0) - rho * x.unsqueeze(1)
    variance = 1 - rho**2
    return (y.square().unsqueeze(0) - of.square() / variance).sum(-1) / 2 - y.shape[1] / 2 * math.log(variance)


def mean_of_batches(
    estimator: Callable[[Tensor], Tensor], d: int, rho: float, batches: int = 50, n: int = 128
) -> float:
    generator = torch.Generator().manual_seed(5)
    values = [float(estimator(log_ratios(*pairs(128, d, rho, generator), rho))) for _ in range(batches)]
    return sum(values) / batches


def test_property_1_correlated_gaussians_with_the_best_critic() -> None:
    truth = -2 * math.log(1 - 0.8**2)
    assert truth == pytest.approx(2.043, abs=5e-4)
    assert mean_of_batches(dv, 4, 0.8) == pytest.approx(truth, abs=0.10)
    assert mean_of_batches(nwj, 4, 0.8) == pytest.approx(truth, abs=0.10)
    assert 1.85 <= mean_of_batches(info_nce, 4, 0.8) <= 2.02
    assert 1.85 <= mean_of_batches(lambda s: info_nce(s, symmetric=True), 4, 0.8) <= 2.02
    assert mean_of_batches(lambda s: smile(s, 1), 4, 0.8) > 2.2
    assert mean_of_batches(lambda s: smile(s, 5), 4, 0.8) == pytest.approx(truth, abs=0.12)


def test_property_2_nothing_in_common_is_no_information() -> None:
    for estimator in (dv, nwj, info_nce, smile):
        assert mean_of_batches(estimator, 4, 0.0) == pytest.approx(0, abs=0.03)


def test_a_critic_that_knows_nothing_of_independent_pairs_finds_about_nothing() -> None:
    """As property 2, with scores that are not all equal."""
    generator = torch.Generator().manual_seed(3)
    scores = [0.3 * torch.randn(128, 128, generator=generator, dtype=torch.float64) for _ in range(50)]
    for estimator in (dv, info_nce, smile):
        assert sum(float(estimator(s)) for s in scores) / 50 == pytest.approx(-0.045, abs=0.03)  # -sigma^2 / 2


def test_property_3_info_nce_is_never_above_its_ceiling() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (2, 7, 64):
        scores = 5 * torch.randn(50, n, n, generator=generator)
        assert all(float(info_nce(s)) <= math.log(n) for s in scores)
        ceiling = ESTIMATORS["info_nce"].ceiling(n)
        assert float(info_nce(1e4 * torch.eye(n))) == pytest.approx(ceiling, rel=1e-6)
        assert ceiling == math.log(n)


def test_property_4_what_changes_an_estimate_and_what_does_not() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(33, 33, generator=generator, dtype=torch.float64)
    order = torch.randperm(33, generator=generator)
    for estimator in OF_SCORES:
        torch.testing.assert_close(estimator(scores[order][:, order]), estimator(scores))
    for estimator in (dv, info_nce):
        torch.testing.assert_close(estimator(scores + 2.5), estimator(scores))
    assert float(nwj(scores + 2.5)) < float(nwj(scores)) - 1
    torch.testing.assert_close(info_nce(scores + torch.randn(33, 1, dtype=torch.float64)), info_nce(scores))
    torch.testing.assert_close(info_nce(scores, symmetric=True), info_nce(scores.T, symmetric=True))
    torch.testing.assert_close(info_nce(scores, symmetric=True), (info_nce(scores) + info_nce(scores.T)) / 2)


def test_property_5_nwj_is_never_above_dv() -> None:
    generator = torch.Generator().manual_seed(2)
    for scale in (0.1, 1.0, 4.0):
        for scores in scale * torch.randn(50, 16, 16, generator=generator, dtype=torch.float64):
            assert float(nwj(scores)) <= float(dv(scores)) + 1e-12
    scores = scores - log_mean_exp_off_diagonal(scores)
    torch.testing.assert_close(nwj(scores), dv(scores))  # where the mean exponential is 1, they touch


def test_property_6_smile_without_a_limit_is_dv() -> None:
    scores = 3 * torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(smile(scores, math.inf), dv(scores))
    clipped = scores.clamp(-1, 1)
    by_hand = scores.diagonal().mean() - log_mean_exp_off_diagonal(clipped)
    assert torch.equal(smile(scores, 1.0), by_hand)  # joint samples are not clipped
    assert not torch.equal(smile(scores, 1.0), dv(clipped))


def test_property_7_jsd_of_a_critic_that_says_nothing() -> None:
    torch.testing.assert_close(jsd(torch.zeros(9, 9)), torch.tensor(-2 * math.log(2)))
    assert float(jsd(80 * torch.eye(9) - 40)) == pytest.approx(0, abs=1e-6)  # its largest value
    x, y = pairs(512, 1, 0.8, torch.Generator().manual_seed(4))
    best = log_ratios(x, y, 0.8)
    for wrong in (1.3 * best, 0.7 * best, best + 0.3, best - 0.3):
        assert float(jsd(best)) > float(jsd(wrong))  # the best critic is the log ratio


def test_property_8_surrogate_has_the_gradient_of_dv() -> None:
    scores = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    lme = log_mean_exp_off_diagonal(scores)
    (of_dv,) = torch.autograd.grad(dv(scores), scores, retain_graph=True)
    for log_moving in (lme, torch.tensor(-torch.inf)):  # and before the first step
        (of_surrogate,) = torch.autograd.grad(dv_surrogate(scores, log_moving), scores)
        torch.testing.assert_close(of_surrogate, of_dv)
    # With another m, what the marginal samples give is divided by it.
    (of_surrogate,) = torch.autograd.grad(dv_surrogate(scores, lme.detach() + math.log(4)), scores)
    off = ~torch.eye(12, dtype=torch.bool)
    torch.testing.assert_close(of_surrogate[off], of_dv[off] / 4)
    torch.testing.assert_close(of_surrogate.diagonal(), of_dv.diagonal())


def test_the_moving_average_is_one_of_exponentials() -> None:
    batches = list(torch.randn(5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))
    m, log_moving = None, torch.tensor(-torch.inf, dtype=torch.float64)
    for scores in batches:
        newest = scores[~torch.eye(8, dtype=torch.bool)].exp().mean()
        m = newest if m is None else 0.9 * m + 0.1 * newest
        log_moving = next_log_moving(log_moving, scores, rate=0.1)
        torch.testing.assert_close(log_moving.exp(), m)
    torch.testing.assert_close(next_log_moving(log_moving, scores, 1.0), log_mean_exp_off_diagonal(scores))
    far = next_log_moving(torch.tensor(500.0), scores + 1000)
    assert 990 < float(far) < 1010  # exp(1000) is no number
    assert far.dtype == torch.float32
    assert not next_log_moving(far, scores.requires_grad_()).requires_grad


@pytest.mark.parametrize("rate", [0.01, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_moving_average_forgets_what_is_no_number(bad: float, rate: float) -> None:
    scores = torch.full((3, 3), bad)
    for before in (torch.tensor(-torch.inf), torch.tensor(0.5)):
        assert torch.equal(next_log_moving(before, scores, rate), before)


def test_the_surrogate_and_its_gradient_are_finite_however_large_a_score_is() -> None:
    scores = torch.zeros(3, 3, requires_grad=True)
    with torch.no_grad():
        scores[0, 1] = 120.0
    value = dv_surrogate(scores, torch.tensor(0.0))
    value.backward()
    assert value.isfinite()
    assert scores.grad is not None
    e40 = math.exp(40)
    assert float(scores.grad[0, 1]) == pytest.approx(-e40 / 6)  # pushed down, as hard as at 40
    assert float(value.detach()) == pytest.approx(-(5 + 81 * e40) / 6)


@pytest.mark.parametrize("estimator", [*OF_SCORES, log_mean_exp_off_diagonal], ids=lambda of: of.__name__)
def test_gradients_are_those_of_differences(estimator: Callable[[Tensor], Tensor]) -> None:
    scores = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    assert torch.autograd.gradcheck(estimator, (scores,))


@pytest.mark.parametrize("estimator", OF_SCORES, ids=lambda of: of.__name__)
def test_large_scores_make_no_nan(estimator: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(8)
    for scale in (1e3, 1e30):
        scores = (scale * torch.randn(6, 6, generator=generator)).requires_grad_()
        value = estimator(scores)
        value.backward()
        assert scores.grad is not None
        assert not value.isnan()
        assert not scores.grad.isnan().any()
        if estimator is not nwj:  # an exponential, which overflows; infinite, as it is
            assert value.isfinite()
            assert scores.grad.isfinite().all()


def test_property_16_low_precision_is_raised_and_autocast_changes_nothing() -> None:
    scores = torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    for dtype in (torch.bfloat16, torch.float16):
        low = (60 * scores).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for estimator in OF_SCORES:
                value = estimator(low)
                assert value.dtype == torch.float32
                assert value.isfinite() or estimator is nwj
                assert torch.equal(value, estimator(low.float()))
    for estimator in OF_SCORES:
        assert estimator(scores.double()).dtype == torch.float64


def test_what_is_known_of_each_estimator() -> None:
    assert {name: of.bound for name, of in ESTIMATORS.items()} == {
        "dv": "lower",
        "nwj": "lower",
        "jsd": "lower",
        "info_nce": "lower",
        "smile": "neither",
        "club": "upper",
        "club_sample": "upper",
        "prior_kl": "upper",
        "aggregate": "lower",
    }
    assert {name for name, of in ESTIMATORS.items() if of.ceiling(64) < math.inf} == {"info_nce", "aggregate"}
    assert ESTIMATORS["aggregate"].ceiling(64) == math.log(64)
    scores = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    for name, value in {"dv": dv, "nwj": nwj, "jsd": nwj, "info_nce": info_nce, "smile": smile}.items():
        assert torch.equal(estimate(name, scores), value(scores))
        assert score_estimator(name).name == name
    assert torch.equal(estimate("smile", scores, tau=0.5), smile(scores, 0.5))


def test_what_is_no_score_matrix_is_refused() -> None:
    for estimator in (*OF_SCORES, log_mean_exp_off_diagonal, lambda s: dv_surrogate(s, torch.tensor(0.0))):
        with pytest.raises(ValueError, match=re.escape("scores must be (N, N), with scores[i, j] = T(x_i, z_j): one")):
            estimator(torch.zeros(3, 4))
        with pytest.raises(ValueError, match=re.escape("Got (2, 3, 3).")):
            estimator(torch.zeros(2, 3, 3))
        with pytest.raises(ValueError, match="needs at least 2 pairs, since one's z is the other's negative. Got 1."):
            estimator(torch.zeros(1, 1))
        with pytest.raises(ValueError, match=re.escape("scores must be floating-point numbers. Got torch.int64.")):
            estimator(torch.zeros(3, 3, dtype=torch.long))
    for tau in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tau must be positive, the largest score of a marginal sample; inf is"):
            smile(torch.zeros(3, 3), tau)
    for rate in (0, 1.5):
        with pytest.raises(
            ValueError, match=re.escape(f"rate must lie in (0, 1], the weight of the newest batch. Got {rate}")
        ):
            next_log_moving(torch.tensor(0.0), torch.zeros(3, 3), rate)
    for name in ("club", "mine"):
        with pytest.raises(ValueError, match=f"No estimator of scores is named '{name}'; there are dv, nwj, jsd, info"):
            estimate(name, torch.zeros(3, 3))
