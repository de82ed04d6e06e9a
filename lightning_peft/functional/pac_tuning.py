"""PAC-tuning's formulas: a bound for losses without a limit, and how fast they may grow.

    L <= L^ + (KL + ln(1 / delta) + union) / (gamma n) + 3/2 gamma K^2
    K: mean_i exp(gamma (mean l - l_i)) <= exp(3/2 gamma^2 K^2)        the smaller, the tighter losses lie together

K is looked up: it is measured before training at a few widths of the prior, and read between them at the present one.

Reference:
    Liu et al., PAC-tuning, EMNLP 2023, arXiv 2310.17588 (its code); Zhang et al., arXiv 2305.19243 (its abstract).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft.functional.pac_bayes import Scalar, require_count, require_share, wide

PRIOR_SIGMAS: tuple[float, ...] = tuple(math.exp(-6 + 4 * i / 7) for i in range(8))
"""The widths at which the reference code measures K: exp(linspace(-6, -2, 8))."""


def moment_constant(losses: Tensor, gammas: Sequence[float]) -> Tensor:
    """The smallest K that fits measured losses for every gamma.

        K^2 = max over gamma of  ln( mean over draws and i of exp(gamma (mean_i l - l_i)) ) / (3/2 gamma^2)

    Args:
        losses: (draws, n): l_i of networks drawn from the prior, on n examples; the mean of each draw is its own.
        gammas: values that gamma may take, positive.

    Returns:
        A scalar in float64, 0 where all losses of a draw are equal.

    Raises:
        ValueError: losses have no two dimensions, or gammas are none or not positive.

    Reference:
        PAC-tuning's condition. Departures: the least K in closed form, where the code searches (times 1.5 up, by 1.1
        down); the mean over draws stands within the logarithm, as in the definition (remembered).
    """
    if losses.ndim != 2 or not losses.numel():
        raise ValueError(f"losses must be (draws, examples), neither of them 0. Got {tuple(losses.shape)}.")
    if not gammas or not all(0 < gamma < math.inf for gamma in gammas):
        raise ValueError(f"gammas must be positive numbers, at least one. Got {gammas!r}.")
    losses = losses.double()
    gamma = torch.tensor(gammas, dtype=torch.float64, device=losses.device)
    below = (losses.mean(1, keepdim=True) - losses).flatten()
    moment = torch.logsumexp(gamma[:, None] * below, 1) - math.log(below.numel())
    return (moment / (1.5 * gamma.square())).max().clamp(min=0).sqrt()


def interpolated(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear between measured values, never falling; constant outside them.

    K is to bound the moments of every narrower prior too: each value is first raised to the largest of narrower ones.
    Nothing waits for the device.

    Args:
        x: a scalar: the width of the prior, through which a gradient may run.
        places: (m,), where it was measured, no two of them equal.
        values: (m,), what was measured.

    Returns:
        A scalar.

    Raises:
        ValueError: places and values are not two rows of one length.
    """
    if places.ndim != 1 or places.shape != values.shape or not places.numel():
        raise ValueError(
            f"places and values must be two rows of one length. Got {tuple(places.shape)} and {tuple(values.shape)}."
        )
    places, order = places.sort()
    values = values.gather(0, order).cummax(0).values
    if places.numel() == 1:
        return values[0] + 0 * x
    right = torch.searchsorted(places, x.detach().to(places.dtype).view(1)).clamp(1, places.numel() - 1)
    # By gather: an index that is a tensor would be read from the device.
    below, above = places.gather(0, right - 1), places.gather(0, right)
    share = ((x - below) / (above - below)).clamp(0, 1).to(values.dtype)
    return torch.lerp(values.gather(0, right - 1), values.gather(0, right), share).view(())


def best_gamma(
    kl: Scalar,
    n: float,
    K: Scalar,
    delta: float = math.exp(-10),
    union: float = 0.0,
    limits: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """The gamma at which :func:`unbounded` is least: sqrt(2 A / (3 n)) / K with A = KL + ln(1 / delta) + union.

    Args:
        kl: the divergence.
        n: number of examples.
        K: of :func:`moment_constant`, positive.
        delta: failure probability; the default is the 10 nats of the reference code.
        union: nats paid for learnt prior widths; the code has 3 for each trained tensor.
        limits: the least and the largest gamma that K was measured for; beyond them it says nothing. The reference
            code clips gamma so, to 10 in its script.

    Raises:
        ValueError: delta is not in (0, 1), n is less than 1, union is negative, or limits are out of order.
    """
    if not 0 <= limits[0] <= limits[1]:
        raise ValueError(f"limits must be the least and the largest gamma, in this order. Got {limits!r}.")
    return ((2 * _paid(kl, n, delta, union) / 3).sqrt() / K).clamp(*limits)


def unbounded(
    risk: Scalar,
    kl: Scalar,
    n: float,
    delta: float = math.exp(-10),
    *,
    K: Scalar,
    gamma: Scalar | None = None,
    union: float = 0.0,
) -> Tensor:
    """PAC-tuning's first stage: L^ + (KL + ln(1 / delta) + union) / (gamma n) + 3/2 gamma K^2.

    Args:
        risk: L^, the plain loss at perturbed weights.
        kl: the divergence.
        n: number of examples.
        delta: failure probability; the default is the 10 nats of the reference code.
        K: how far losses lie apart, see :func:`moment_constant`.
        gamma: positive; the code's script holds it at 10 (its help says 5 to 10). ``None`` is :func:`best_gamma`, at
            which the last two terms are K sqrt(6 A / n); for a K of some gammas alone, give its `limits` there.
        union: nats paid for learnt prior widths; the code has 3 for each trained tensor.

    Raises:
        ValueError: gamma is a number that is not positive, delta is not in (0, 1), n is less than 1, or union negative.
    """
    if isinstance(gamma, float | int) and not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive; None takes the best one. Got {gamma!r}.")
    paid = _paid(kl, n, delta, union)
    if gamma is None:
        return risk + K * (6 * paid).sqrt()
    return risk + paid / gamma + 1.5 * gamma * K**2


def _paid(kl: Scalar, n: float, delta: float, union: float) -> Tensor:
    require_share("delta", delta)
    require_count(n)
    if not union >= 0:
        raise ValueError(f"union must be at least 0, in nats. Got {union!r}.")
    return (wide(kl) + math.log(1 / delta) + union) / n
