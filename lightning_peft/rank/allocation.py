"""Which components are open: pure, deterministic functions of scores, prices and an amount."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

Compare = Literal["worth", "worth_per_cost"]
"""What decides between components: their worth, or their worth for each parameter that they cost."""


def weighed(scores: Mapping[str, Tensor], costs: Mapping[str, int], compare: Compare) -> dict[str, Tensor]:
    """Scores as they are compared: as they are, or divided by what a component of the layer costs.

    Divided, closing the lowest is the greedy rule for a knapsack: where it closes exactly the amount that is asked, no
    other choice that closes as much gives up less worth.

    Args:
        scores: layer -> (n,) worth of its components.
        costs: layer -> parameters that one of its components costs.
        compare: "worth" or "worth_per_cost".
    """
    if compare == "worth":
        return dict(scores)
    return {name: row.detach().double() / costs[name] for name, row in scores.items()}


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
    flat, price, broken = _together(scores, sizes, minimum)
    if broken:
        warnings.warn(
            f"importance is not finite in {', '.join(broken)}: training has diverged there, lower the learning rate. "
            "These components are closed first.",
            stacklevel=2,
        )
    order = flat.argsort(stable=True)
    price = price[order]
    closable = int(price[flat[order] != torch.inf].sum())
    if amount > closable:
        raise ValueError(
            f"cannot close {amount}: keeping {minimum} components in every layer leaves {closable} to close."
        )
    closed_before = price.cumsum(0) - price
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[order[closed_before < amount]] = False
    return _by_layer(scores, mask)


def open_highest(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    worth: Mapping[str, float],
    sizes: Mapping[str, int],
    amount: int,
    each: int = 1,
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Open components in the layers of highest worth, until no more fits into `amount`.

    Layers take turns in the order of their worth, `each` components a turn, and begin again when all have had one. So
    the highest layers get them if the amount is small, and all do if it is large. What is too dear for what is left is
    passed over. Within a layer the best closed component opens first. Of layers that tie, those with fewer components
    open go first, then the order of the layers decides; of components that tie, the lower index.

    Args:
        masks: layer -> (n,) bool, what is open now.
        scores: layer -> (n,) worth of its components, in the order of the layers.
        worth: layer -> what the layer itself is worth; what is not finite comes last.
        sizes: layer -> what one of its components counts; all 1 for a number of components.
        amount: what may be spent; never more is.
        each: components that a layer opens in its turn.
        limit: components that a layer may open in all; ``None`` for as many as it has.

    Returns:
        layer -> (n,) bool on the CPU, True for the components that are open.

    Example:
        >>> masks = {"a": torch.tensor([True, False]), "b": torch.tensor([True, False])}
        >>> scores = {"a": torch.zeros(2), "b": torch.zeros(2)}
        >>> open_highest(masks, scores, {"a": 0.2, "b": 0.7}, {"a": 1, "b": 1}, amount=1)
        {'a': tensor([ True, False]), 'b': tensor([True, True])}
    """
    opened = {name: mask.detach().cpu().bool().clone() for name, mask in masks.items()}
    queues = {name: _sorted(scores[name], ~opened[name], descending=True)[:limit] for name in opened}
    key = {n: (-worth[n] if isfinite(worth[n]) else float("inf"), int(mask.sum())) for n, mask in opened.items()}
    turns = sorted(opened, key=lambda name: key[name])
    left, moving = amount, True
    while moving:
        moving = False
        for name in turns:
            for _ in range(min(each, len(queues[name]))):
                if sizes[name] > left:
                    break
                opened[name][queues[name].pop(0)] = True
                left -= sizes[name]
                moving = True
    return opened


def close_some(
    masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], count: int, limit: int | None = None, minimum: int = 0
) -> dict[str, Tensor]:
    """Close the open components of lowest score, over all layers together, `count` of them if there are as many.

    Args:
        masks: layer -> (n,) bool, what is open now.
        scores: layer -> (n,) worth of its components; what is not finite is worth least.
        count: how many to close.
        limit: components that a layer may lose; ``None`` for as many as it has.
        minimum: components that every layer keeps open.

    Returns:
        layer -> (n,) bool on the CPU, True for the components that stay open. Ties are broken by layer order, then
        index, earlier closed first.
    """
    kept = {name: mask.detach().cpu().bool().clone() for name, mask in masks.items()}
    order = []
    for place, (name, mask) in enumerate(kept.items()):
        lowest = _sorted(scores[name], mask)
        most = max(0, len(lowest) - minimum)
        row = _finite(scores[name])
        # Its lowest only, as many as it may lose.
        order += [(float(row[i]), place, i, name) for i in lowest[: most if limit is None else min(limit, most)]]
    for _, _, i, name in sorted(order)[:count]:
        kept[name][i] = False
    return kept


def _finite(row: Tensor) -> Tensor:
    row = row.detach().cpu().double()
    return torch.where(row.isfinite(), row, -torch.inf)


def _sorted(row: Tensor, among: Tensor, descending: bool = False) -> list[int]:
    """Indices of components by score; of those that tie the lower index first."""
    order: list[int] = _finite(row).argsort(descending=descending, stable=True).tolist()
    return [i for i in order if among[i]]


def open_best(
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
        >>> open_best({"a": torch.tensor([0.9, 0.1]), "b": torch.tensor([0.5, 0.1])}, {"a": 1, "b": 1}, amount=3)
        {'a': tensor([True, True]), 'b': tensor([ True, False])}
    """
    if not scores:
        return {}
    flat, price, _ = _together(scores, sizes, minimum)
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
    return _by_layer(scores, mask)


def _together(scores: Mapping[str, Tensor], sizes: Mapping[str, int], minimum: int) -> tuple[Tensor, Tensor, list[str]]:
    """All components in one row, on the CPU: what they are worth and what they cost; and layers that are not finite.

    What is not finite is worth -inf, and the `minimum` best of every layer inf.
    """
    counts = [score.numel() for score in scores.values()]
    # One transfer from the device for all layers.
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()]).cpu().double()
    finite = flat.isfinite()
    broken = [name for name, part in zip(scores, finite.split(counts), strict=True) if not bool(part.all())]
    flat = torch.where(finite, flat, -torch.inf)
    if minimum:
        for part in flat.split(counts):  # views
            part[part.argsort(descending=True, stable=True)[:minimum]] = torch.inf
    price = torch.repeat_interleave(torch.tensor([sizes[name] for name in scores]), torch.tensor(counts))
    return flat, price, broken


def _by_layer(scores: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    return dict(zip(scores, mask.split([score.numel() for score in scores.values()]), strict=True))
