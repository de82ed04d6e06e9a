"""How sure a share is, and a difference of two shares of the same questions."""

from __future__ import annotations

from math import comb, sqrt


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a share.

        (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Args:
        successes: how many.
        trials: of how many, n.
        z: standard normal quantile; 1.96 for 95 %.

    Raises:
        ValueError: no trials, or more successes than trials.

    Example:
        >>> [round(bound, 4) for bound in wilson(8, 10)]
        [0.4902, 0.9433]
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is no share: give at least one trial, and no more successes.")
    share, extra = successes / trials, z * z / trials
    middle = share + extra / 2
    reach = z * sqrt(share * (1 - share) / trials + extra / (4 * trials))
    return max(0.0, (middle - reach) / (1 + extra)), min(1.0, (middle + reach) / (1 + extra))


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test of two solvers on the same questions, two-sided.

    Under the hypothesis that neither is better, each question that one of them alone has right is a fair coin.

    Args:
        only_first: questions that the first alone has right.
        only_second: and the second alone.

    Returns:
        The probability of a difference at least as large by chance.

    Example:
        >>> mcnemar(1, 8)
        0.0390625
    """
    total = only_first + only_second
    tail = sum(comb(total, k) for k in range(min(only_first, only_second) + 1))
    return float(min(1.0, 2 * tail / 2**total))
