"""BLoB's formulas: how the divergence is spread over the steps of a cycle.

Reference:
    Wang et al., BLoB: Bayesian low-rank adaptation by backpropagation, NeurIPS 2024, arXiv 2406.11675 (its code);
    Blundell et al., Weight uncertainty in neural networks, 2015, for the weights that double.
"""

from __future__ import annotations

import math


def kl_cycle(n: int, batch_size: int, gamma: float = 8.0) -> int:
    """Steps of a cycle: M = 100 n^(pi / gamma) / batch, a whole number, at least 1.

    Args:
        n: examples of the training set.
        batch_size: examples of a step.
        gamma: the larger, the shorter the cycle and the heavier the divergence.

    Raises:
        ValueError: an argument is not positive.
    """
    for name, value in (("n", n), ("batch_size", batch_size), ("gamma", gamma)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive. Got {value!r}.")
    return max(int(100 * n ** (math.pi / gamma) / batch_size), 1)


def kl_weight(step: int, cycle: int) -> float:
    """What the divergence is multiplied by at a step: pi_i = 2^i / (2^(M + 1) - 1), doubling through the cycle.

    The weights of a cycle sum to 1 - 1 / (2^(M + 1) - 1). That i counts from 1 is remembered.

    Args:
        step: optimizer steps, from 0.
        cycle: M, of :func:`kl_cycle`.

    Raises:
        ValueError: step is negative, or cycle is less than 1.
    """
    if step < 0 or cycle < 1:
        raise ValueError(f"step must be at least 0 and cycle at least 1. Got step={step!r} and cycle={cycle!r}.")
    i = step % cycle + 1
    # 2^i alone is more than a float holds from i = 1024 on.
    return 2.0 ** (i - cycle - 1) / (1 - 2.0 ** -(cycle + 1))
