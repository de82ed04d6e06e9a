"""From counted errors to a certificate: numbers that rounding never makes too small.

Errors of networks drawn from Q are counted over the bound set. kl(q || p), the divergence of two coins, says how far
the truth may be from what was counted; it is inverted twice: from the draws to the risk of Q on the set, and from the
set to the risk on all data.
"""

from __future__ import annotations

import math
import sys

from lightning_peft.functional.pac_bayes import require_share

_EPS = sys.float_info.epsilon


def bernoulli_kl(q: float, p: float) -> float:
    """kl(q || p) = q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)), in nats.

    Args:
        q: in [0, 1].
        p: in [0, 1].

    Returns:
        The divergence; infinity where p rules out what q does not.

    Raises:
        ValueError: q or p is not in [0, 1].
    """
    _require_probability("q", q)
    _require_probability("p", p)
    # Near each other both terms are almost p - q: logarithms of ratios near 1 keep what is left of the difference.
    return max(q * _log_ratio(q, p, q - p) + (1 - q) * _log_ratio(1 - q, 1 - p, p - q), 0.0)


def _log_ratio(a: float, b: float, difference: float) -> float:
    """ln(a / b) where a - b is known better than a and b give it; 0 for a = 0, which multiplies it."""
    if a == 0:
        return 0.0
    if b == 0:
        return math.inf
    return math.log1p(difference / b) if abs(difference) < b / 2 else math.log(a) - math.log(b)


def inverse_bernoulli_kl(q: float, c: float) -> float:
    """kl^-1(q, c) = max{p in [q, 1] : kl(q || p) <= c}, never rounded down.

    Intervals are halved until none lies between two neighbouring numbers, and the upper end is returned, of which the
    divergence is at least c beyond what rounding may hide.

    Args:
        q: in [0, 1].
        c: at least 0, in nats.

    Raises:
        ValueError: q is not in [0, 1], or c is negative or no number.

    Example:
        >>> round(inverse_bernoulli_kl(0.028, 0.0935), 6)
        0.160444
    """
    _require_probability("q", q)
    if not c >= 0:
        raise ValueError(f"c must be at least 0, in nats. Got {c!r}.")
    if c == 0:
        return float(q)
    low, high = float(q), 1.0
    while low < (middle := low + (high - low) / 2) < high:
        # What rounding may add to a divergence of numbers this far apart.
        hidden = 8 * _EPS * (middle - q + c)
        low, high = (middle, high) if bernoulli_kl(q, middle) <= c + hidden else (low, middle)
    return high


def effective_units(losses: int, largest: int) -> float:
    """As how many independent draws a Monte-Carlo mean counts.

        m_eff = losses / largest

    The mean of all losses is a mean of units, weighted by their size; a unit is the losses that share one draw of the
    noise. Sizes may differ: with u's share of all losses at most w, ln E exp(s u X) is convex in u and concave in the
    expectation, so that the sum of units is bounded like 1/w equal ones.

        one draw a pass       losses = n passes, largest = n                    m_eff = passes
        one draw a batch      losses = n passes, largest = the largest batch    m_eff = passes n / batch
        one draw an example   losses = n passes, largest = 1                    m_eff = passes n

    Args:
        losses: losses counted, of all passes and processes.
        largest: most losses that share a draw.

    Raises:
        ValueError: not 1 <= largest <= losses.
    """
    if not 1 <= largest <= losses:
        raise ValueError(
            f"largest must lie between 1 and the number of losses. Got largest={largest!r} and losses={losses!r}."
        )
    return losses / largest


def certified_risk(
    empirical: float,
    units: float,
    kl: float,
    n: int,
    delta: float = 0.025,
    delta_prime: float = 0.01,
    tried: int = 1,
) -> tuple[float, float]:
    """A number that the true risk of Q exceeds with probability at most delta + delta'.

        q    = kl^-1( empirical, ln(2 tried / delta') / units )            the risk of Q on the bound set
        risk = kl^-1( q, (KL + ln(2 sqrt(n) tried / delta)) / n )          the risk of Q on all data

    It is the risk of networks drawn anew from Q for every prediction, not that of Q's mean. It holds where the prior
    was fixed without the n examples and everything else that was fitted to them is in Q.

    Args:
        empirical: mean loss, in [0, 1], over the bound set and the draws.
        units: independent draws behind it, see :func:`effective_units`.
        kl: KL(Q || P) of the Q that was evaluated, in float64, with what else is paid for: the cost of learnt priors.
        n: examples of the bound set.
        delta: probability that the bound fails over the choice of the set.
        delta_prime: probability that the Monte-Carlo mean misleads.
        tried: distributions among which this one was chosen by looking at the bound set: checkpoints, runs, settings.
            Each of them had to hold: both probabilities are divided by it.

    Returns:
        q and the certificate; neither ever understates by rounding.

    Raises:
        ValueError: an argument is out of its range.

    Reference:
        Langford and Caruana, 2001, and Perez-Ortiz et al., JMLR 2021, for the two steps. Departures: units smaller than
        a pass; both failure probabilities are divided by `tried`.

    Example:
        >>> q, risk = certified_risk(0.02, units=150_000, kl=100.0, n=30_000)
        >>> round(q, 6), round(risk, 6)
        (0.021199, 0.035915)
    """
    _require_probability("empirical", empirical)
    for name, share in (("delta", delta), ("delta_prime", delta_prime)):
        require_share(name, share)
    for name, number in (("units", units), ("n", n), ("tried", tried)):
        if not 1 <= number < math.inf:
            raise ValueError(f"{name} must be at least 1. Got {number!r}.")
    if not kl >= 0:
        raise ValueError(f"kl must be at least 0, in nats. Got {kl!r}.")
    q = inverse_bernoulli_kl(empirical, _up(math.log(2 * tried / delta_prime) / units))
    return q, inverse_bernoulli_kl(q, _up((kl + math.log(2 * math.sqrt(n) * tried / delta)) / n))


def _up(c: float) -> float:
    """More than the number that a few roundings may have made less."""
    return c * (1 + 8 * _EPS)


def _require_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]. Got {value!r}.")
