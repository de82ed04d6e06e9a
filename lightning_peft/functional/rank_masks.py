"""Masks over the components of layers: drawn, kept to a budget, and made a number of first components.

A row is a layer, a column a component: masks of layers with equally many components are handled together, (..., K).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from heapq import heapify, heappop, heappush

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.arguments import require_number


def gumbel(count: int, seed: int, step: int, device: torch.device | None = None) -> Tensor:
    """Standard Gumbel noise that depends on the seed and the step alone: (count,) float32.

    Every process draws the same, a resumed run draws the same, and no generator but its own is touched.

    Args:
        count: how many numbers.
        seed: of the run.
        step: of the run; each has noise of its own.
        device: where they are drawn, and what they depend on as well.
    """
    # Hashed: torch's generator on a CPU takes 32 bits of its seed, and neighbouring seeds are to be unlike.
    key = int.from_bytes(sha256(f"{seed} {step}".encode()).digest()[:4], "big")
    generator = torch.Generator(device or "cpu").manual_seed(key)
    # Not -log(-log(u)): u may be 0 or 1, and a clamp before the minus sign gives NaN. An exponential is -log(u).
    return -torch.empty(count, dtype=torch.float32, device=device).exponential_(generator=generator).log()


def straight_through(soft: Tensor) -> Tensor:
    """0 or 1, whichever is nearer; the gradient passes as if nothing had been rounded.

    Example:
        >>> straight_through(torch.tensor([0.2, 0.9]))
        tensor([0., 1.])
    """
    # The difference is exactly 0, so the sum is exactly 0 or 1: (round(y) + y) - y would not be.
    return soft.detach().round() + (soft - soft.detach())


def relaxed(logits: Tensor, noise: Tensor, temperature: float, shift: float) -> Tensor:
    """The soft mask of a Gumbel draw: sigmoid((o + g + b) / tau), in (0, 1).

    Args:
        logits: o.
        noise: g, one sample of :func:`gumbel` per element.
        temperature: tau.
        shift: b.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, eq. 9.
    """
    return torch.sigmoid((logits + noise + shift) / temperature)


def keep_probability(logits: Tensor, shift: float) -> Tensor:
    """How often a draw keeps a component: 1 - exp(-exp(o + b)).

    A draw keeps it where o + g + b > 0, and P(g > -x) = 1 - exp(-exp(x)) for one Gumbel sample; with the difference of
    two it would be the sigmoid. The temperature has no part in it.

    Example:
        >>> keep_probability(torch.tensor([-3.0, 0.0]), shift=3.0)
        tensor([0.6321, 1.0000])
    """
    return -torch.expm1(-torch.exp(logits + shift))


def prefix(mask: Tensor) -> Tensor:
    """m', the mask of as many components that keeps the first ones: 0 or 1, of the same shape, without a gradient.

    Example:
        >>> prefix(torch.tensor([0.0, 1.0, 1.0]))
        tensor([1., 1., 0.])
    """
    count = mask.detach().sum(-1, keepdim=True)
    return (torch.arange(mask.shape[-1], device=mask.device) < count).to(mask.dtype)


def misplaced(mask: Tensor, s: Tensor) -> Tensor:
    """What of a layer's energy is where no prefix of the same length has it: |m s - m' s|^2.

    0 for a prefix, and only for one where no s is 0. m' is a constant: no gradient passes through the count.

    Args:
        mask: (..., K) m, 0 or 1.
        s: (..., K) singular values, descending.

    Returns:
        (...) one value per layer.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, eq. 7.
    """
    return ((mask - prefix(mask)) * s).square().sum(-1)


def excess(spent: Tensor, budget: float) -> Tensor:
    """log(max(T, P) / P): how far a budget P is exceeded by T; 0 with a zero gradient where it is not.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, eq. 8.
    """
    # log1p of the surplus: at T = P the gradient is 0, and at T = 0 nothing divides by it.
    return torch.log1p(F.relu(spent - budget) / budget)


def deviation(spent: Tensor, budget: float) -> Tensor:
    """log(max(T, P) / min(T, P)): how far T is from P, on either side.

    Reference:
        Gao et al., DISP-LLM, NeurIPS 2024, arXiv 2410.11988, as in the authors' code.
    """
    return (spent.clamp_min(1.0) / budget).log().abs()


def whole_ranks(counts: Mapping[str, float], sizes: Mapping[str, int], minimum: int = 1) -> dict[str, int]:
    """The nearest whole ranks that layers may have.

    Args:
        counts: layer -> how many components are kept on average.
        sizes: layer -> how many it has.
        minimum: components that a layer keeps at least, if it has so many.
    """
    return {name: min(max(round(count), minimum), sizes[name]) for name, count in counts.items()}


def select_ranks(
    wanted: Mapping[str, int],
    probabilities: Mapping[str, Tensor],
    costs: Mapping[str, int],
    amount: int,
    minimum: int = 1,
    dense: Mapping[str, int] | None = None,
    refill: bool = True,
) -> dict[str, int]:
    """The ranks that are wanted, brought into a budget. Equal inputs, equal ranks.

        while sum_l price(k_l) > amount:  the layer whose last component has the smallest P_k gives it up
        price(k) = k cost,  or  min(k cost, dense)  where a layer that does not pay as factors stays dense, and whole

    Of components that tie the dearer goes first, then that of the earlier layer. What is left of the amount goes to the
    layers whose next component is kept most often, until no layer's next one fits; of those that tie the cheaper first.

    Args:
        wanted: layer -> how many components it would have without a budget; at most K.
        probabilities: layer -> (K,) how often a component is kept.
        costs: layer -> parameters of one component.
        amount: what all may cost together.
        minimum: components that every layer keeps, as far as it has them; at least 1.
        dense: layer -> parameters of its weight as one matrix; ``None`` if all are kept as factors.
        refill: whether what is left is spent; else the ranks only fall.

    Raises:
        ValueError: the amount does not pay for the minimum.

    Example:
        >>> rows = {"a": torch.tensor([1.0, 0.9, 0.1]), "b": torch.tensor([1.0, 0.4, 0.3])}
        >>> select_ranks({"a": 2, "b": 2}, rows, {"a": 10, "b": 10}, amount=30)
        {'a': 2, 'b': 1}
    """
    layers = [
        _Layer(row.detach().cpu().double().tolist(), minimum, costs[name], None if dense is None else dense[name])
        for name, row in probabilities.items()
    ]
    least = sum(layer.prices[0] for layer in layers)
    if least > amount:
        raise ValueError(
            f"a budget of {amount:,} parameters does not pay for the minimum of {minimum} in each of {len(layers)} "
            f"layers, which has {least:,}. Raise it, or factorise fewer layers."
        )
    for layer, name in zip(layers, probabilities, strict=True):
        layer.at = layer.reaching(wanted[name])
    left = amount - sum(layer.prices[layer.at] for layer in layers)

    falls = [(layer.worth(layer.at - 1), -layer.step(layer.at - 1), i) for i, layer in enumerate(layers) if layer.at]
    heapify(falls)
    while left < 0:
        _, price, i = heappop(falls)
        layer = layers[i]
        left, layer.at = left - price, layer.at - 1
        if layer.at:
            heappush(falls, (layer.worth(layer.at - 1), -layer.step(layer.at - 1), i))

    rises = [(-layer.worth(layer.at), layer.step(layer.at), i) for i, layer in enumerate(layers) if layer.can_rise]
    heapify(rises)
    while refill and rises:
        _, price, i = heappop(rises)
        if price > left:
            continue  # nor will it later: what is left only falls
        layer = layers[i]
        left, layer.at = left - price, layer.at + 1
        if layer.can_rise:
            heappush(rises, (-layer.worth(layer.at), layer.step(layer.at), i))
    return {name: layer.ranks[layer.at] for name, layer in zip(probabilities, layers, strict=True)}


class _Layer:
    """The ranks that a layer may have, rising, what each costs, and where it is."""

    def __init__(self, row: list[float], minimum: int, cost: int, dense: int | None) -> None:
        n = len(row)
        self.row, self.at = row, 0
        # Where factors cost as much as the dense weight, all components are had for its price.
        self.ranks = [k for k in range(min(minimum, n), n + 1) if dense is None or k == n or k * cost < dense]
        self.prices = [k * cost if dense is None else min(k * cost, dense) for k in self.ranks]

    @property
    def can_rise(self) -> bool:
        return self.at + 1 < len(self.ranks)

    def reaching(self, rank: int) -> int:
        """The first level with so many components."""
        return next(i for i, k in enumerate(self.ranks) if k >= rank)

    def worth(self, level: int) -> float:
        """How often the first component is kept that the next level has and this one has not."""
        return self.row[self.ranks[level]]

    def step(self, level: int) -> int:
        """What the next level costs more than this one."""
        return self.prices[level + 1] - self.prices[level]


def require_ratio(ratio: object) -> None:
    """Check the kept share of parameters.

    Raises:
        TypeError: it is no number.
        ValueError: it is not in (0, 1].
    """
    require_number("ratio", ratio)
    assert isinstance(ratio, int | float)
    if not 0 < ratio <= 1:
        raise ValueError(
            f"ratio is the share of the factorised layers' parameters that is kept, in (0, 1]. Got {ratio}."
        )
