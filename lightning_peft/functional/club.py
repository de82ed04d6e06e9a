"""CLUB: an upper bound of mutual information from a model q of one variable given the other.

A lower bound that is minimised says nothing: it can fall while the information stays. CLUB can be minimised, if q is
accurate: q(z | x) is fitted by its log-likelihood on pairs that are detached, and the encoder is then trained on CLUB
with q fixed. The bound is loose even with the best q (rho^2 d / (1 - rho^2) for correlated Gaussians, 3.5 times the
information at d = 4, rho = 0.8): a penalty, never a number to report.

Reference:
    Cheng et al., CLUB: A contrastive log-ratio upper bound of mutual information, ICML 2020, arXiv 2006.12013 (its
    code).
"""

from __future__ import annotations

import torch
from torch import Tensor


def categorical_log_densities(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every label under every prediction, ln q(y_j | x_i).

    Args:
        logits: (N, K), of q(y | x) over K classes.
        labels: (M,), integers in [0, K).

    Returns:
        (N, M), in nats; in float32, or logits' dtype where that is wider.

    Raises:
        ValueError: the shapes do not fit, or labels are not whole numbers.
    """
    if logits.ndim != 2 or labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            "logits must be (N, K), and labels (M,) integers. "
            f"Got {tuple(logits.shape)}, and {tuple(labels.shape)} of {labels.dtype}."
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(1).index_select(1, labels.long())


def club(log_densities: Tensor) -> Tensor:
    """The bound with all pairs as negatives: mean_i ln q(z_i | x_i) - mean_ij ln q(z_j | x_i).

    An upper bound in expectation if q is accurate, up to the factor (N - 1) / N of the pairs that are their own
    negatives, which the paper counts as well; no ceiling.

    Args:
        log_densities: (N, N), [i, j] = ln q(z_j | x_i):
            :func:`~lightning_peft.functional.gaussian.gaussian_log_densities` or :func:`categorical_log_densities`.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: the densities are not square, or fewer than 2 x 2.

    Reference:
        Cheng et al., 2020, equation 6 (number remembered).
    """
    log_densities = _checked(log_densities)
    return log_densities.diagonal().mean() - log_densities.mean()


def club_sample(log_densities: Tensor, permutation: Tensor) -> Tensor:
    """CLUB with one negative for each sample: mean_i [ ln q(z_i | x_i) - ln q(z_p(i) | x_i) ].

    Over all permutations its mean is :func:`club` of the same q; of more variance. Where the matrix is not at hand, the
    same follows from N densities of z and N of z[permutation], by
    :func:`~lightning_peft.functional.gaussian.gaussian_log_density`.

    Args:
        log_densities: (N, N), as in :func:`club`.
        permutation: (N,), integers; drawn by the caller, as every process has to draw the same.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: the densities are not square, fewer than 2 x 2, or the permutation has not N entries.
    """
    log_densities = _checked(log_densities)
    if permutation.shape != log_densities.shape[:1]:
        raise ValueError(
            f"permutation must have one entry for each of {len(log_densities)} samples. Got {tuple(permutation.shape)}."
        )
    negatives = log_densities.gather(1, permutation.to(log_densities.device).long().unsqueeze(1))
    return log_densities.diagonal().mean() - negatives.mean()


def _checked(log_densities: Tensor) -> Tensor:
    if log_densities.ndim != 2 or log_densities.shape[0] != log_densities.shape[1] or len(log_densities) < 2:
        raise ValueError(
            "log_densities must be (N, N) of at least 2 samples, with [i, j] = ln q(z_j | x_i). "
            f"Got {tuple(log_densities.shape)}."
        )
    return log_densities.to(torch.promote_types(log_densities.dtype, torch.float32))
