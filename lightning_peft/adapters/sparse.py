"""Sparse: what an adapter has that trains single entries of a weight."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_peft.rank.budget import Site


@runtime_checkable
class Sparse(Protocol):
    """An adapter that trains some entries of its base's weight, and can be given others.

    Attributes:
        base: the layer.
        indices: (k,) the entries, ascending, as positions in the flattened weight as the base stores it.
        delta: (k,) what is trained of them; or (n, s) for n components of s entries.
    """

    base: nn.Module
    indices: Tensor
    delta: nn.Parameter

    def value(self) -> Tensor:
        """What multiplies each component: (n,)."""

    def move(self, indices: Tensor) -> Tensor:
        """Train other entries, as many; the ones that are left get the base's bits back, new ones start at delta 0.

        Returns:
            (k,) for each new entry where it was among the old ones; -1 where it was none of them.
        """


def require_sparse(site: Site, by: str) -> Sparse:
    """The site's adapter, as what trains entries of a weight.

    Raises:
        TypeError: it does not.
    """
    adapter = site.adapter
    if not isinstance(adapter, Sparse):
        raise TypeError(
            f"{by} chooses among the entries of a weight, and {type(adapter).__name__} at {site.name!r} has components "
            "of another kind. Use it with adapters that train entries."
        )
    return adapter


def require_movable(site: Site, by: str) -> Sparse:
    """The site's adapter, as what trains entries of a weight one by one, so that it can be given others.

    Raises:
        TypeError: it trains no entries.
        ValueError: they are gated in blocks.
    """
    adapter = require_sparse(site, by)
    if adapter.delta.dim() > 1:
        raise ValueError(
            f"the adapter at {site.name!r} gates its entries in blocks of {adapter.delta.shape[1]}, and these cannot "
            f"move, which {by} has them do. Use block=1."
        )
    return adapter
