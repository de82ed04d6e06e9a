"""Catoni's bounds, in which a number that is fixed beforehand takes the place of a square root.

Reference:
    Catoni, PAC-Bayesian supervised classification, 2007; Alquier et al., 2016, for the linear form (both remembered).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_peft.functional.pac_bayes import Scalar, require_count, require_share, wide


def catoni(risk: Scalar, kl: Scalar, n: float, delta: float = 0.025, *, a: float | Sequence[float]) -> Tensor:
    """Catoni's bound, for an a that was fixed before the data were seen.

        [1 - exp(-a R - (KL + ln(1 / delta)) / n)] / (1 - exp(-a))

    Args:
        risk: R.
        kl: the divergence.
        n: number of examples.
        delta: failure probability, in (0, 1).
        a: positive. Of several the one that gives the least is taken, each at delta / their number: the union over a
            grid.

    Raises:
        ValueError: an a is not positive, there is none, delta is not in (0, 1), or n is less than 1.

    Reference:
        Catoni, PAC-Bayesian supervised classification, 2007 (remembered).
    """
    require_count(n)
    require_share("delta", delta)
    values = (a,) if isinstance(a, float | int) else tuple(a)
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError(f"a must be a positive number or several. Got {a!r}.")
    paid = (wide(kl) + math.log(len(values) / delta)) / n
    bounds = [-torch.expm1(-value * wide(risk) - paid) / -math.expm1(-value) for value in values]
    return torch.stack(bounds).amin(0)


def catoni_linear(risk: Scalar, kl: Scalar, n: float, delta: float = 0.025, *, t: float) -> Tensor:
    """The linear form, for a t that was fixed before the data were seen: R + (KL + ln(1 / delta)) / t + t / (8 n).

    Args:
        risk: R.
        kl: the divergence.
        n: number of examples.
        delta: failure probability, in (0, 1).
        t: positive, in examples: sqrt(8 n A) is the best one for KL + ln(1 / delta) = A.

    Raises:
        ValueError: t is not positive, delta is not in (0, 1), or n is less than 1.

    Reference:
        Catoni, 2007; Alquier et al., 2016 (remembered).
    """
    require_count(n)
    require_share("delta", delta)
    if not 0 < t < math.inf:
        raise ValueError(f"t must be a positive number. Got {t!r}.")
    return wide(risk) + (wide(kl) + math.log(1 / delta)) / t + t / (8 * n)
