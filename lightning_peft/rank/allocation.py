"""Which components stay open: a pure, deterministic function of scores, prices and an amount."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor


def close_lowest(
    scores: Mapping[str, Tensor], sizes: Mapping[str, int], amount: int, minimum: int = 0
) -> dict[str, Tensor]:
    """Close the components of lowest score, over all layers together, until at least `amount` is closed.

    Scores of different layers are compared as they are. Ties are broken by layer order, then index, earlier closed
    first: an exact count always, whatever the scores, where a threshold would close every component that ties with it.

    Args:
        scores: layer -> (n,) worth of its components; what is not finite is worth least, and a warning says so.
        sizes: layer -> what one of its components counts; all 1 for a number of components.
        amount: how much to close; 0 closes nothing.
        minimum: components that every layer keeps, its best ones.

    Returns:
        layer -> (n,) bool on the CPU, True for the components that stay open.

    Raises:
        ValueError: `amount` cannot be closed without going below `minimum`.

    Example:
        >>> close_lowest({"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.1, 0.5])}, {"a": 1, "b": 1}, amount=1)
        {'a': tensor([False,  True]), 'b': tensor([True, True])}
    """
    if not scores:
        return {}
    counts = [score.numel() for score in scores.values()]
    # One transfer from the device for all layers.
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()]).cpu().double()
    if not bool(torch.isfinite(flat).all()):
        broken = [
            name for name, part in zip(scores, flat.split(counts), strict=True) if not bool(part.isfinite().all())
        ]
        warnings.warn(
            f"importance is not finite in {', '.join(broken)}: training has diverged there, lower the learning rate. "
            "These components are closed first.",
            stacklevel=2,
        )
        flat = torch.where(torch.isfinite(flat), flat, -torch.inf)
    if minimum:
        parts = []
        for part in flat.split(counts):
            best = part.argsort(descending=True, stable=True)[:minimum]
            parts.append(part.index_fill(0, best, torch.inf))
        flat = torch.cat(parts)
    order = flat.argsort(stable=True)
    price = torch.repeat_interleave(torch.tensor([sizes[name] for name in scores]), torch.tensor(counts))[order]
    closable = int(price[flat[order] != torch.inf].sum())
    if amount > closable:
        raise ValueError(
            f"cannot close {amount}: keeping {minimum} components in every layer leaves {closable} to close."
        )
    closed_before = price.cumsum(0) - price
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[order[closed_before < amount]] = False
    return dict(zip(scores, mask.split(counts), strict=True))


def open_highest(
    scores: Mapping[str, Tensor], sizes: Mapping[str, int], amount: int, minimum: int = 0
) -> dict[str, Tensor]:
    """Open the components of highest score, over all layers together, for as long as `amount` lasts.

    A component that does not fit into what is left is passed over for a cheaper one. Ties are broken by layer order,
    then index, earlier opened first: of a layer whose scores do not rise, the first components are opened.

    Args:
        scores: layer -> (n,) worth of its components; what is not finite is worth least.
        sizes: layer -> what one of its components counts; all 1 for a number of components.
        amount: how much may be opened.
        minimum: components that every layer gets whatever their score, its best ones, as far as it has them.

    Returns:
        layer -> (n,) bool on the CPU, True for the components that are open.

    Raises:
        ValueError: `amount` does not pay for `minimum`.

    Example:
        >>> open_highest({"a": torch.tensor([0.9, 0.1]), "b": torch.tensor([0.5, 0.1])}, {"a": 1, "b": 1}, amount=3)
        {'a': tensor([True, True]), 'b': tensor([ True, False])}
    """
    if not scores:
        return {}
    counts = [score.numel() for score in scores.values()]
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()]).cpu().double()
    flat = torch.where(torch.isfinite(flat), flat, -torch.inf)
    if minimum:
        for part in flat.split(counts):  # views
            part[part.argsort(descending=True, stable=True)[:minimum]] = torch.inf
    price = torch.repeat_interleave(torch.tensor([sizes[name] for name in scores]), torch.tensor(counts))
    floor = int(price[flat == torch.inf].sum())
    if amount < floor:
        raise ValueError(f"{amount:,} does not pay for {minimum} components in every layer, which cost {floor:,}.")
    order = flat.argsort(descending=True, stable=True)
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    left, cheapest = amount, min(sizes[name] for name in scores)
    for index, cost in zip(order.tolist(), price[order].tolist(), strict=True):
        if left < cheapest:
            break
        if cost <= left:
            mask[index], left = True, left - cost
    return dict(zip(scores, mask.split(counts), strict=True))
