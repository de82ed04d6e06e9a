"""What is known of a latent variable with a Gaussian posterior: divergence, information, units in use, likelihood.

x has the posterior q(z | x) = N(mu(x), diag sigma(x)^2), z of d units; r is a prior. Over the data,

    E KL(q(z | x) || r) = I(x; z) + KL(q(z) || r)

so the divergence of a variational autoencoder, or of a bottleneck, is an upper bound of the information, for any r.

Reference:
    He et al., Lagging inference networks and posterior collapse in variational autoencoders, ICLR 2019, arXiv
    1901.05534 (its code: the measures); Karimi Mahabadi et al., Variational information bottleneck for effective
    low-resource fine-tuning, ICLR 2021, arXiv 2106.05469 (its code: the divergence).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_peft.functional.gaussian import exact_dtype, gaussian_log_densities, gaussian_log_density

_LEAST = 1e-8  # standard deviations are no smaller than this inside a logarithm


def gaussian_kl_per_unit(mean: Tensor, std: Tensor, prior_mean: Tensor | float, prior_std: Tensor | float) -> Tensor:
    """Divergence of each unit's posterior, before it is summed: what free bits are given to.

        KL_k = 1/2 [ sigma^2 / sigma_r^2 + (mu_r - mu)^2 / sigma_r^2 - 1 + 2 ln(sigma_r / sigma) ]

    Args:
        mean: mu, (..., d).
        std: sigma, (..., d), not negative.
        prior_mean: mu_r, broadcast against `mean`: (d,), or one number.
        prior_std: sigma_r, positive, broadcast against `std`.

    Returns:
        (..., d), in nats; in float32, or wider where an argument is. Exactly 0 where q is r.
    """
    mean, std = _wide(mean), _wide(std)
    prior_mean = _wide(prior_mean if isinstance(prior_mean, Tensor) else mean.new_tensor(prior_mean))
    prior_std = _wide(prior_std if isinstance(prior_std, Tensor) else std.new_tensor(prior_std)).clamp(min=_LEAST)
    x = 2 * (std.clamp(min=_LEAST) / prior_std).log()
    # expm1(x) - x in place of r - 1 - ln r, which near r = 1 is all rounding.
    return (torch.expm1(x) - x + ((prior_mean - mean) / prior_std).square()) / 2


def gaussian_kl_to(mean: Tensor, std: Tensor, prior_mean: Tensor | float, prior_std: Tensor | float) -> Tensor:
    """Divergence KL(q(z | x) || r) of each example: the sum of :func:`gaussian_kl_per_unit` over units.

    Its mean over examples is an upper bound of I(x; z) for any prior r, and the tighter the nearer r is to the mean
    posterior; no ceiling. So it can be minimised, and a learnt prior makes the bound tighter.

    Args:
        mean: mu, (N, d).
        std: sigma, (N, d), not negative.
        prior_mean: mu_r, (d,), or one number.
        prior_std: sigma_r, (d,), or one number; positive.

    Returns:
        (N,), in nats.
    """
    return gaussian_kl_per_unit(mean, std, prior_mean, prior_std).sum(-1)


def aggregate_mutual_information(
    mean: Tensor, log_variance: Tensor, z: Tensor, chunk: int = 1024, closed_entropy: bool = False
) -> Tensor:
    """Information I(x; z) between examples and their latent variable, by the mixture of all posteriors.

        mean_i ln q(z_i | x_i) - mean_i [ ln sum_j exp(ln q(z_i | x_j)) - ln N ]

    A lower bound in expectation over the examples (it is InfoNCE with the best critic), whose ceiling is ln N: 3.47
    for 32 examples. Take 1024 or more, and report N with it.

    Args:
        mean: mu, (N, d).
        log_variance: ln sigma^2, (N, d).
        z: (N, d), one draw from each posterior.
        chunk: draws whose N densities are in memory at once.
        closed_entropy: the expectation of ln q(z_i | x_i), -1/2 sum_k (1 + ln 2 pi + ln sigma_k^2), in its place, as
            the reference code does (remembered): the same in expectation, but what the two parts have in common no
            longer cancels. A value can then be above ln N, and in many units varies several times as much.

    Returns:
        A scalar in float64 (float32 on a device without it), in nats.

    Raises:
        ValueError: fewer than 2 examples, shapes that do not fit, or chunk less than 1.
    """
    n = len(z)
    if n < 2 or z.shape != mean.shape:
        raise ValueError(
            "mean, log_variance and z must be (N, d) of at least 2 examples, with one draw z for each. "
            f"Got {tuple(mean.shape)}, {tuple(log_variance.shape)} and {tuple(z.shape)}."
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1. Got {chunk!r}.")
    exact = exact_dtype(z)
    mean, log_variance, z = mean.to(exact), log_variance.to(exact), z.to(exact)
    mixed = [gaussian_log_densities(mean, log_variance, some).logsumexp(0) for some in z.split(chunk)]
    if closed_entropy:
        own = -(1 + math.log(2 * math.pi) + log_variance).sum(1) / 2
    else:
        own = gaussian_log_density(mean, log_variance, z)
    return (own - torch.cat(mixed)).mean() + math.log(n)


def unit_variances(means: Tensor) -> Tensor:
    """Variance of each unit's posterior mean over examples: in two passes, divided by N - 1.

    Args:
        means: mu, (N, d), of the whole set.

    Returns:
        (d,), in float64 (float32 on a device without it).

    Raises:
        ValueError: fewer than 2 examples, or means are not (N, d).
    """
    if means.ndim != 2 or len(means) < 2:
        raise ValueError(f"means must be (N, d) of at least 2 examples. Got {tuple(means.shape)}.")
    means = means.to(exact_dtype(means))
    return (means - means.mean(0)).square().sum(0) / (len(means) - 1)


def active_units(means: Tensor, threshold: float = 0.01) -> Tensor:
    """How many units the encoder uses: those whose posterior mean has a variance of at least `threshold`.

    Args:
        means: mu, (N, d), of the whole set.
        threshold: least variance.

    Returns:
        A scalar integer, at most d.

    Raises:
        ValueError: as :func:`unit_variances`.
    """
    return (unit_variances(means) >= threshold).sum()


def importance_weighted_nll(log_joint: Tensor, log_posterior: Tensor) -> Tensor:
    """Negative log-likelihood of each example from S draws: -( ln sum_s exp(ln p(x, z_s) - ln q(z_s | x)) - ln S ).

    An upper bound of -ln p(x) in expectation, that tightens as S grows; with one draw it is the negative ELBO. Draws
    that do not fit in memory together are evaluated in parts, and their numbers concatenated here.

    Args:
        log_joint: ln p(x, z_s) = ln p(x | z_s) + ln p(z_s), (N, S).
        log_posterior: ln q(z_s | x), (N, S), of draws from q.

    Returns:
        (N,), in nats; in float32, or wider where an argument is.

    Raises:
        ValueError: the shapes differ, or are not (N, S) of at least one draw.
    """
    if log_joint.ndim != 2 or log_joint.shape != log_posterior.shape or not log_joint.shape[1]:
        raise ValueError(
            "log_joint and log_posterior must be (N, S), one number for each of S draws. "
            f"Got {tuple(log_joint.shape)} and {tuple(log_posterior.shape)}."
        )
    return math.log(log_joint.shape[1]) - (_wide(log_joint) - _wide(log_posterior)).logsumexp(1)


def perplexity(nll: Tensor | float, tokens: Tensor | float) -> Tensor:
    """Perplexity exp(NLL / tokens), of totals over a set: never a mean of perplexities.

    Args:
        nll: negative log-likelihood of all examples together, in nats.
        tokens: how many tokens were predicted in them: the end symbol counts, the start symbol does not.

    Returns:
        A scalar.
    """
    return (torch.as_tensor(nll) / torch.as_tensor(tokens)).exp()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
