"""Estimates of mutual information from a critic's scores: mathematics on a score matrix.

A critic T gives each pair a score, s_ij = T(x_i, z_j), of a batch of N pairs (x_i, z_i). The diagonal holds the N joint
samples, what is off it N (N - 1) samples of the marginals; no sample is its own negative. One convention holds for
all: the best critic is T = ln p(x, z) / (p(x) p(z)), values are in nats, and more is more information. So every
estimate is differentiable in the scores, to train critic and representation alike, and whatever reads one of them
reads the others. What each can be trusted for is in :data:`ESTIMATORS`.

    lme(s) = ln( mean of exp(s_ij) over i != j )

All is computed in float32, or float64 where scores are that, also under autocast.

Reference:
    Poole et al., On variational bounds of mutual information, ICML 2019, arXiv 1905.06922 (remembered); each estimator
    names its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bound = Literal["lower", "upper", "neither"]
_STRAIGHT_ABOVE = 40.0  # e^40 is 2e17: its square, which optimizers keep, is still a float32


@dataclass(frozen=True)
class Estimator:
    """What is known of an estimator before it has seen a number.

    Args:
        name: as in this package.
        bound: which side of the true information its value is on, in expectation: only a "lower" one may be maximised,
            and only an "upper" one minimised.
        trained_with: the function whose gradient trains the critic, or q; None where nothing is trained.
        read_out: the function that is reported, in nats; None where no value is to be reported, only a penalty made.
        capped: whether no value above ln N can come out, however much information there is.
    """

    name: str
    bound: Bound
    trained_with: str | None
    read_out: str | None
    capped: bool = False

    def ceiling(self, n: float) -> float:
        """The largest value that n samples can give: ln n for a capped estimator, infinity for another."""
        return math.log(n) if self.capped else math.inf


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        of.name: of
        for of in (
            # In expectation, with infinitely many marginal samples: a finite batch puts it too high (Jensen).
            Estimator("dv", "lower", "dv_surrogate", "dv"),
            Estimator("nwj", "lower", "nwj", "nwj"),
            Estimator("jsd", "lower", "jsd", "nwj"),  # its own value is not one of information
            Estimator("info_nce", "lower", "info_nce", "info_nce", capped=True),
            Estimator("smile", "neither", "jsd", "smile"),
            Estimator("club", "upper", "negative log-likelihood", None),
            Estimator("club_sample", "upper", "negative log-likelihood", None),
            Estimator("prior_kl", "upper", None, "gaussian_kl_to"),
            Estimator("aggregate", "lower", None, "aggregate_mutual_information", capped=True),
        )
    }
)
"""The estimators of this package by name: of scores (dv to smile, in this file), of a model q of one given the other
(club, club_sample, in :mod:`~lightning_peft.functional.club`: upper bounds if q is accurate), and of a known posterior
(prior_kl, aggregate, in :mod:`~lightning_peft.functional.latent`)."""


def estimate(name: str, scores: Tensor, tau: float = 5.0) -> Tensor:
    """The value that an estimator of scores reports, in nats: for "jsd" the NWJ read-out of the same critic.

    Args:
        name: "dv", "nwj", "jsd", "info_nce" or "smile".
        scores: (N, N).
        tau: of :func:`smile`, for which alone it counts.

    Raises:
        ValueError: there is no such estimator of scores, or the scores do not fit.
    """
    match score_estimator(name).read_out:
        case "dv":
            return dv(scores)
        case "nwj":
            return nwj(scores)
        case "info_nce":
            return info_nce(scores)
        case _:
            return smile(scores, tau)


def score_estimator(name: str) -> Estimator:
    """The entry of :data:`ESTIMATORS` of an estimator that is one of scores.

    Raises:
        ValueError: there is none of that name.
    """
    known = ("dv", "nwj", "jsd", "info_nce", "smile")
    if name not in known:
        raise ValueError(f"No estimator of scores is named {name!r}; there are {', '.join(known)}.")
    return ESTIMATORS[name]


def log_mean_exp_off_diagonal(scores: Tensor) -> Tensor:
    """Logarithm of the mean of exp(s_ij) over the N (N - 1) pairs off the diagonal, which never overflows.

    Args:
        scores: (N, N), finite.

    Returns:
        A scalar.

    Raises:
        ValueError: the scores are not square, fewer than 2 x 2, or no floating-point numbers.
    """
    return _log_mean_exp(_checked(scores))


def dv(scores: Tensor) -> Tensor:
    """Donsker and Varadhan's bound, MINE's value: mean_i s_ii - lme(s).

    A lower bound with infinitely many marginal samples; no ceiling. The logarithm of a mean over few samples is too low
    in expectation, so the value of a small batch is too high, the more the larger the true information; never average
    values of parts of a batch. Unchanged by a constant that is added to all scores. Its own gradient is biased by the
    same ratio; :func:`dv_surrogate` has the corrected one.

    Args:
        scores: (N, N), finite.

    Raises:
        ValueError: as :func:`log_mean_exp_off_diagonal`.

    Reference:
        Belghazi et al., Mutual information neural estimation, ICML 2018, arXiv 1801.04062.
    """
    scores = _checked(scores)
    return scores.diagonal().mean() - _log_mean_exp(scores)


def dv_surrogate(scores: Tensor, log_moving: Tensor) -> Tensor:
    """What MINE's critic is trained on: mean_i s_ii - exp(lme(s) - ln m), whose gradient is the corrected one.

    m is a moving average of exp(lme) over steps (:func:`next_log_moving`), taken as a constant: the gradient of the
    logarithm divides by it instead of by the few samples of one batch. With m = exp(lme(s)) the gradient is that of
    :func:`dv`. The value is of no use; report :func:`dv`.

    Exponentials above e^40 go on as straight lines, so that value and gradient are finite however large a score is; an
    m that is within 17 orders of magnitude never sees them.

    For informations of more than about ln N(N - 1) it is the wrong choice: the mean exponential is then made of samples
    that hardly any batch holds, m is that of the few that did, and nothing keeps the scores of the other batches down.
    The critic diverges, as :func:`nwj`'s does. Train it with :func:`info_nce` or :func:`jsd`.

    Args:
        scores: (N, N), finite.
        log_moving: ln m, a scalar; minus infinity before the first step, when the batch's own takes its place.

    Raises:
        ValueError: as :func:`log_mean_exp_off_diagonal`.

    Reference:
        Belghazi et al., 2018, section 3.2; in log space, where the common implementation overflows. The straight lines:
        our choice.
    """
    scores = _checked(scores)
    log_moving = log_moving.detach().to(scores)
    log_moving = torch.where(log_moving.isneginf(), _log_mean_exp(scores).detach(), log_moving)
    return scores.diagonal().mean() - _mean_exp(scores, log_moving, straight_above=_STRAIGHT_ABOVE)


def next_log_moving(log_moving: Tensor, scores: Tensor, rate: float = 0.01) -> Tensor:
    """The logarithm of MINE's moving average after a batch: m <- (1 - eta) m + eta exp(lme(s)), in log space.

    Args:
        log_moving: ln m, a scalar; minus infinity before the first batch, whose own value it then becomes.
        scores: (N, N), finite: of the global batch, where there are several processes.
        rate: eta, in (0, 1].

    Returns:
        A scalar of log_moving's dtype, without a gradient; ln m as it was, where the batch's own value is infinite or
        NaN: it would never come back.

    Raises:
        ValueError: rate is not in (0, 1], or as :func:`log_mean_exp_off_diagonal`.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate must lie in (0, 1], the weight of the newest batch. Got {rate!r}.")
    newest = _log_mean_exp(_checked(scores).detach()).to(log_moving)
    before = log_moving.detach()
    moved = newest
    if rate < 1:
        moved = torch.logaddexp(before + math.log1p(-rate), newest + math.log(rate))
    moved = torch.where(before.isneginf(), newest, moved)
    return torch.where(newest.isfinite(), moved, before)


def nwj(scores: Tensor) -> Tensor:
    """Nguyen, Wainwright and Jordan's bound, the dual of KL as an f-divergence: 1 + mean_i s_ii - exp(lme(s)).

    A true lower bound of any batch size, without a ceiling, and of high variance: the mean of exponentials is that of
    its largest. Never above :func:`dv` of the same scores. Other codes call T + 1 the critic (f, with e^-1 E exp(f)).
    Infinite, not NaN, where an exponential overflows.

    Args:
        scores: (N, N), finite.

    Raises:
        ValueError: as :func:`log_mean_exp_off_diagonal`.

    Reference:
        Nguyen et al., 2010 (remembered); as in Poole et al., 2019.
    """
    scores = _checked(scores)
    return 1 + scores.diagonal().mean() - _mean_exp(scores)


def jsd(scores: Tensor) -> Tensor:
    """Deep InfoMax's objective: -mean_i softplus(-s_ii) - mean softplus(s_ij), i != j; 2 JSD - 2 ln 2 at its best.

    An objective to train on, with small gradients that do not explode; neither a bound nor in nats of information, and
    at most 0. Its best critic is the log ratio, so :func:`nwj` of the same scores is a lower bound in nats.

    Args:
        scores: (N, N), finite.

    Raises:
        ValueError: as :func:`log_mean_exp_off_diagonal`.

    Reference:
        Hjelm et al., Learning deep representations by mutual information estimation and maximization, ICLR 2019, arXiv
        1808.06670. Its code keeps the diagonal out of the marginals by subtracting 10; here it is left out.
    """
    scores = _checked(scores)
    n = len(scores)
    joint = F.softplus(-scores.diagonal()).mean()
    return -joint - F.softplus(scores).masked_fill(_diagonal(scores), 0).sum() / (n * (n - 1))


def info_nce(scores: Tensor, symmetric: bool = False) -> Tensor:
    """How well each x_i is told its own z_i from those of the batch: mean_i (s_ii - ln sum_j exp(s_ij)) + ln N.

    A lower bound of low variance that is never above its ceiling ln N, however much information there is: read it
    beside the ceiling. Unchanged by a number that is added to a row.

    Args:
        scores: (N, N), finite; for contrastive losses, cosines divided by a temperature.
        symmetric: take the mean with the same of the transpose, which tells each z_i its own x_i. A bound as well.

    Raises:
        ValueError: as :func:`log_mean_exp_off_diagonal`.

    Reference:
        van den Oord et al., Representation learning with contrastive predictive coding, 2018, arXiv 1807.03748.
    """
    scores = _checked(scores)
    told = scores.log_softmax(1).diagonal().mean()
    if symmetric:
        told = (told + scores.log_softmax(0).diagonal().mean()) / 2
    return told + math.log(len(scores))


def smile(scores: Tensor, tau: float = 5.0) -> Tensor:
    """The DV bound with scores of marginal samples clipped: mean_i s_ii - lme(clip(s, -tau, tau)).

    Neither a lower nor an upper bound, without a ceiling: a small tau buys low variance with a bias that is usually
    upward; without a limit, tau = inf, it is :func:`dv`. A value to report; the critic is trained with :func:`jsd`.

    Args:
        scores: (N, N), finite.
        tau: positive; the paper's figures use 1, 5 and infinity.

    Raises:
        ValueError: tau is not positive, or as :func:`log_mean_exp_off_diagonal`.

    Reference:
        Song and Ermon, Understanding the limitations of variational mutual information estimators, ICLR 2020, arXiv
        1910.06222.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, the largest score of a marginal sample; inf is plain DV. Got {tau!r}.")
    scores = _checked(scores)
    return scores.diagonal().mean() - _log_mean_exp(scores.clamp(-tau, tau))


def _checked(scores: Tensor) -> Tensor:
    """The scores in the precision to compute in."""
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(
            "scores must be (N, N), with scores[i, j] = T(x_i, z_j): one row and one column for each pair of the "
            f"batch. Got {tuple(scores.shape)}."
        )
    if len(scores) < 2:
        raise ValueError(
            f"Mutual information needs at least 2 pairs, since one's z is the other's negative. Got {len(scores)}."
        )
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating-point numbers. Got {scores.dtype}.")
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _diagonal(scores: Tensor) -> Tensor:
    return torch.eye(len(scores), dtype=torch.bool, device=scores.device)


def _log_mean_exp(scores: Tensor) -> Tensor:
    n = len(scores)
    return scores.masked_fill(_diagonal(scores), -math.inf).flatten().logsumexp(0) - math.log(n * (n - 1))


def _mean_exp(scores: Tensor, log_unit: Tensor | float = 0.0, straight_above: float = math.inf) -> Tensor:
    """exp(lme(s) - log_unit), each exponential by itself: one that overflows leaves the others' gradients finite.

    Where an exponent is above `straight_above`, its tangent there stands for the exponential.
    """
    n = len(scores)
    exponents = scores.masked_fill(_diagonal(scores), -math.inf) - log_unit
    if straight_above < math.inf:
        beyond = (exponents - straight_above).relu()
        return ((exponents.clamp(max=straight_above).exp() * (1 + beyond)) / (n * (n - 1))).sum()
    return (exponents - math.log(n * (n - 1))).exp().sum()
