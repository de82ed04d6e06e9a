"""Estimates from more pairs than a score matrix has room for: it is scored in blocks, of which only sums are kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_peft.functional.gaussian import exact_dtype
from lightning_peft.functional.mutual_information import score_estimator


@torch.no_grad()
def estimate_in_blocks(
    name: str, critic: Callable[[Tensor, Tensor], Tensor], x: Tensor, z: Tensor, tau: float = 5.0, chunk: int = 256
) -> Tensor:
    """What :func:`~lightning_peft.functional.mutual_information.estimate` gives for the whole matrix critic(x, z).

    Sums are taken in float64, where the device has it. There is no gradient.

    Args:
        name: an estimator of scores.
        critic: (n, ...) and (m, ...) to scores (n, m).
        x: (N, ...).
        z: (N, ...), of the same examples.
        tau: of SMILE.
        chunk: a block is of chunk x chunk pairs.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: fewer than 2 pairs, not as many x as z, or the critic's scores are of another shape.
    """
    estimator, n = score_estimator(name), len(x)
    if n < 2 or len(z) != n:
        raise ValueError(f"Mutual information needs at least 2 pairs, one z for each x. Got {n} x and {len(z)} z.")
    joint, rows = [], []
    for i, some in enumerate(x.split(chunk)):
        sums = []
        for j, others in enumerate(z.split(chunk)):
            scores = critic(some, others)
            if scores.shape != (len(some), len(others)):
                raise ValueError(
                    f"critic must score every pair of {len(some)} x and {len(others)} z: ({len(some)}, {len(others)}). "
                    f"Got {tuple(scores.shape)}."
                )
            scores = scores.to(exact_dtype(scores))
            if i == j:
                joint.append(scores.diagonal().clone())
            if estimator.read_out == "smile":
                scores = scores.clamp(-tau, tau)
            if i == j and not estimator.capped:  # InfoNCE finds its own among all; the others' marginals are off it
                scores = scores.clone().fill_diagonal_(-math.inf)
            sums.append(scores.logsumexp(1))
        rows.append(torch.stack(sums).logsumexp(0))
    own, row = torch.cat(joint), torch.cat(rows)
    if estimator.capped:
        return (own - row).mean() + math.log(n)
    return read_out(name, own.mean(), row.logsumexp(0) - math.log(n * (n - 1)))


def read_out(name: str, joint: Tensor, log_mean_exp: Tensor) -> Tensor:
    """The value of an estimator that needs no more than two numbers: all but InfoNCE.

    Args:
        name: an estimator of scores.
        joint: mean score of the joint samples.
        log_mean_exp: logarithm of the mean exponential score of the marginal ones, clipped for SMILE.
    """
    if score_estimator(name).read_out == "nwj":
        return 1 + joint - log_mean_exp.exp()
    return joint - log_mean_exp
