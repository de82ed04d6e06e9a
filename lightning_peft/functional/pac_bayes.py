"""What a PAC-Bayes term adds up: the divergence of two Gaussians, bounded losses, and the objectives made of both.

Q = N(mu, diag sigma^2) is a distribution over trained parameters, P = N(mu0, diag lambda^2) one that was fixed without
the n examples of S. R is the risk of networks drawn from Q, on S, with a loss in [0, 1]. With probability 1 - delta
over S, for all Q at once, each bound below but :func:`f_bbb` is above the true risk; the smaller ones say more.

    C = (KL(Q || P) + ln(2 sqrt(n) / delta)) / n

Every objective is differentiable in risk and divergence. In training R is a batch's risk at one draw, and the value
an objective; what is known of a trained Q is computed by :func:`~lightning_peft.functional.risk_bounds.certified_risk`.

Reference:
    Perez-Ortiz et al., Tighter risk certificates for neural networks, JMLR 22(227), 2021, arXiv 2007.12911 (its code).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Scalar = Tensor | float
"""A scalar tensor, through which a gradient may run, or a number."""


def gaussian_kl(
    mean: Tensor, sigma: Tensor, prior_mean: Scalar, prior_sigma: Scalar, dtype: torch.dtype | None = None
) -> Tensor:
    """Divergence KL(Q || P) of two Gaussians of independent entries, in nats.

        KL = 1/2 sum_j [ sigma_j^2 / lambda_j^2 + (mu_j - mu0_j)^2 / lambda_j^2 - 1 + 2 ln(lambda_j / sigma_j) ]

    It is 0 if and only if Q is P, and does not change when sigma, lambda and mu - mu0 are multiplied by one number.

    Args:
        mean: mu, of any shape.
        sigma: standard deviations of Q, positive, of mean's shape.
        prior_mean: mu0, broadcast against `mean`.
        prior_sigma: lambda, positive, broadcast against `sigma`: one number, one per tensor or one per entry.
        dtype: what to compute in; by default float32, or wider where an argument is. A certificate takes float64.

    Returns:
        A scalar.

    Example:
        >>> gaussian_kl(torch.zeros(2), torch.full((2,), 0.05), 0.0, 0.1)
        tensor(0.6363)
    """
    mean, sigma = wide(mean, dtype), wide(sigma, dtype)
    prior_mean, prior_sigma = wide(prior_mean, dtype), wide(prior_sigma, dtype)
    x = 2 * torch.log(sigma / prior_sigma)
    # expm1(x) - x in place of r - 1 - ln r, which near r = 1 is all rounding.
    return (torch.expm1(x) - x + ((mean - prior_mean) / prior_sigma).square()).sum() / 2


def bounded_cross_entropy(logits: Tensor, labels: Tensor, p_min: float = 1e-4, ignore_index: int = -100) -> Tensor:
    """Cross-entropy in [0, 1], one value for each example.

        l = -ln(max(p_y, p_min)) / ln(1 / p_min)

    Of a sequence, the mean over its tokens is taken before the maximum (our choice). An example that is beyond p_min
    gives no gradient. One whose labels are all ignored has the loss 0, and still is an example.

    Args:
        logits: (batch, classes), or (batch, *places, classes) with one prediction at each place. What predicts the next
            token is to stand where the label of that token stands: a causal model's logits are shifted by the caller.
        labels: (batch,) or (batch, *places), integers.
        p_min: the probability below which a loss does not grow, in (0, 1).
        ignore_index: the label of places that count for nothing.

    Returns:
        (batch,), in float32, or logits' dtype where that is wider.

    Raises:
        ValueError: p_min is not in (0, 1), or the shapes do not fit.

    Example:
        >>> bounded_cross_entropy(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 1]), p_min=0.25)
        tensor([0.5000, 1.0000])
    """
    require_share("p_min", p_min)
    if logits.shape[:-1] != labels.shape or not labels.shape:
        raise ValueError(
            "labels must have the shape of logits without the classes, one label for each prediction. "
            f"Got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}."
        )
    flat = F.cross_entropy(wide(logits).flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    places = flat.view(labels.shape[0], -1)
    shown = (labels != ignore_index).view(labels.shape[0], -1).sum(-1)
    largest = -math.log(p_min)
    return (places.sum(-1) / shown.clamp(min=1)).clamp(max=largest) / largest


def complexity(kl: Scalar, n: float, delta: float) -> Tensor:
    """C = (KL + ln(2 sqrt(n) / delta)) / n: what a distribution costs in the bounds below.

    Maurer showed the constant 2 sqrt(n) for n >= 8; below, the sum that it bounds is small enough to look at, and does
    not exceed it either.

    Args:
        kl: the divergence, and what else is paid for in nats, as :func:`prior_sigma_cost`.
        n: number of independent examples: of all processes together, never tokens or batches.
        delta: probability, in (0, 1), that the bound does not hold.

    Raises:
        ValueError: delta is not in (0, 1), or n is less than 1.

    Reference:
        Maurer, A note on the PAC Bayesian theorem, 2004, arXiv cs/0411099 (remembered).
    """
    require_count(n)
    require_share("delta", delta)
    return (wide(kl) + math.log(2 * math.sqrt(n) / delta)) / n


def f_kl(risk: Scalar, kl: Scalar, n: float, delta: float = 0.025) -> Tensor:
    """The largest p with kl(R || p) <= C: the bound that the next three loosen.

    Its gradient is that of the implicit function: dp = (dC - d_q kl(R || p) dR) / d_p kl(R || p). The value is that of
    the tensors' precision; :func:`~lightning_peft.functional.risk_bounds.inverse_bernoulli_kl` never rounds down.

    Args:
        risk: R, in [0, 1].
        kl: as in :func:`complexity`.
        n: as in :func:`complexity`.
        delta: as in :func:`complexity`.

    Reference:
        Langford and Seeger, 2001; Maurer, 2004 (attributions remembered).
    """
    return _inverse_kl(wide(risk), complexity(kl, n, delta))


def f_classic(risk: Scalar, kl: Scalar, n: float, delta: float = 0.025) -> Tensor:
    """McAllester's bound, from Pinsker's inequality: R + sqrt(C / 2).

    Args: as in :func:`f_kl`.
    """
    return wide(risk) + (complexity(kl, n, delta) / 2).sqrt()


def f_quad(risk: Scalar, kl: Scalar, n: float, delta: float = 0.025) -> Tensor:
    """The bound for small risks: ( sqrt(R + C / 2) + sqrt(C / 2) )^2.

    Below :func:`f_classic` if and only if R < 1/4 - sqrt(C / 2).

    Args: as in :func:`f_kl`.
    """
    half = complexity(kl, n, delta) / 2
    return ((wide(risk) + half).sqrt() + half.sqrt()).square()


def f_lambda(risk: Scalar, kl: Scalar, n: float, delta: float = 0.025, t: Scalar | None = None) -> Tensor:
    """Thiemann's bound, which holds for all t in (0, 2) at once: R / (1 - t/2) + C / (t (1 - t/2)).

    Args:
        risk: R.
        kl: as in :func:`complexity`.
        n: as in :func:`complexity`.
        delta: as in :func:`complexity`.
        t: weighs risk against complexity; a tensor may be learnt, see :func:`learnt_t`. ``None`` is :func:`best_t`,
            where the bound and its gradient are those of :func:`f_quad`.

    Raises:
        ValueError: t is a number outside (0, 2).
    """
    if isinstance(t, float | int) and not 0 < t < 2:
        raise ValueError(f"t must lie strictly between 0 and 2; None takes the best one. Got {t!r}.")
    C = complexity(kl, n, delta)
    if t is None:
        # At the minimum the derivative by t is zero: what t depends on adds nothing to the gradient.
        t = best_t(wide(risk).detach(), C.detach())
    return wide(risk) / (1 - t / 2) + C / (t * (1 - t / 2))


def best_t(risk: Scalar, C: Scalar) -> Tensor:
    """The t at which :func:`f_lambda` is least: 2 / (1 + sqrt(2 R / C + 1)).

    Args:
        risk: R.
        C: of :func:`complexity`, positive.
    """
    return 2 / (1 + (2 * wide(risk) / wide(C) + 1).sqrt())


def learnt_t(v: Tensor, n: float) -> Tensor:
    """t in (1 / sqrt(n), 1) from a parameter without limits: sigmoid(v) (1 - 1/sqrt(n)) + 1/sqrt(n).

    Args:
        v: begins at 6.0 in the reference code, which has an SGD optimizer of its own for it.
        n: number of examples.
    """
    require_count(n)
    least = 1 / math.sqrt(n)
    return torch.sigmoid(v) * (1 - least) + least


def f_bbb(risk: Scalar, kl: Scalar, n: float, eta: float = 0.1) -> Tensor:
    """The evidence lower bound, with the divergence made cheaper: R + eta KL / n. Not a bound of the risk.

    Args:
        risk: R.
        kl: the divergence.
        n: number of examples.
        eta: in (0, 1].

    Raises:
        ValueError: eta is not in (0, 1], or n is less than 1.
    """
    require_count(n)
    if not 0 < eta <= 1:
        raise ValueError(f"eta must lie in (0, 1]. Got {eta!r}.")
    return wide(risk) + eta * wide(kl) / n


class _InverseKL(torch.autograd.Function):
    """p = max{p : kl(q || p) <= c}, by halving intervals; without a look at values, so that no device is waited for."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, c: Tensor) -> Tensor:
        low, high = q, torch.ones_like(q)
        for _ in range(30 if q.dtype == torch.float32 else 56):
            middle = (low + high) / 2
            under = torch.xlogy(q, q / middle) + torch.xlogy(1 - q, (1 - q) / (1 - middle)) < c
            low, high = torch.where(under, middle, low), torch.where(under, high, middle)
        ctx.save_for_backward(q, high)
        return high

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, p = ctx.saved_tensors
        tiny = torch.finfo(q.dtype).eps
        q, p = q.clamp(tiny, 1 - 2 * tiny), p.clamp(2 * tiny, 1 - tiny)
        by_c = p * (1 - p) / (p - q).clamp(min=tiny)  # 1 / d_p kl(q || p)
        by_q = by_c * (p.log() - q.log() - torch.log1p(-p) + torch.log1p(-q))
        return grad * by_q, grad * by_c


def _inverse_kl(q: Tensor, c: Tensor) -> Tensor:
    q, c = torch.broadcast_tensors(q, c.to(device=q.device))
    dtype = torch.promote_types(q.dtype, c.dtype)
    p: Tensor = _InverseKL.apply(q.to(dtype), c.to(dtype))  # type: ignore[no-untyped-call]
    return p


def wide(value: Scalar, dtype: torch.dtype | None = None) -> Tensor:
    """The value in float32, or wider where it is; a number in float64."""
    if not isinstance(value, Tensor):
        # A number is exact, whatever it is combined with.
        return torch.tensor(value, dtype=dtype or torch.float64)
    return value.to(dtype or torch.promote_types(value.dtype, torch.float32))


def require_share(name: str, value: float) -> None:
    """Check that a number is a share, neither nothing nor all.

    Raises:
        ValueError: it does not lie strictly between 0 and 1.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1. Got {value!r}.")


def require_count(n: float) -> None:
    """Check that there is an example.

    Raises:
        ValueError: n is less than 1, or infinite.
    """
    if not 1 <= n < math.inf:
        raise ValueError(f"n must be at least 1, the number of independent examples. Got {n!r}.")
