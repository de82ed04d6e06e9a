"""What an adapter has written into its base's weight: which entries, as of when, and where this process holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.functional.sparse import Pattern

MOST = 2**22
"""Entries that are computed in one go: more would take memory beside the weights for nothing."""


class Written:
    """A note of one adapter's entries in its base's weight. Copied or pickled, it knows the weight and nothing else.

    Attributes:
        weight: the parameter that was written into; while another one stands in its place, as a sharding strategy has
            it, what is there must not be written.
        delta: what identified delta and scaling when they were written; ``None`` if nothing is known.
        mask: the same of the mask.
        touched: whether a backward has given delta a gradient since: an optimizer may have changed it unseen.
        followed: whether what refreshes the adapter comes by after every optimizer step.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight: Tensor | None = weight
        self.delta: object = None
        self.mask: object = None
        self.touched = False
        self.followed = False
        self._pattern: Pattern | None = None
        self._version = -1
        self._parts: dict[tuple[int, int, int, int], tuple[int, int]] = {}

    def touch(self) -> None:
        """A backward comes by."""
        self.touched = True

    def pattern(self, indices: Tensor, shape: tuple[int, int]) -> Pattern:
        """The pattern of the entries in a matrix of this shape, made anew where they have become others."""
        known = self._pattern
        if known is None or known.indices is not indices or self._version != indices._version:
            known = self._pattern = Pattern.of(indices, shape)
            self._version = indices._version
        return known

    def write(self, weight: Tensor, indices: Tensor, values: Tensor, quietly: bool = False) -> None:
        """Overwrite these entries of a weight, or those of them that this process holds.

        Args:
            weight: of any shape; FSDP2's, if it is split by rows.
            indices: (k,) flat positions in the whole weight, ascending.
            values: (k,), in the weight's dtype.
            quietly: whether graphs that hold the weight are to go on: where the same numbers are written once more.
        """
        local, first = held(weight)
        if local.numel() != weight.numel():
            low, high = self._part(indices, first, local.numel())
            indices, values = indices[low:high] - first, values[low:high]
        target = local.data if quietly else local.detach()
        if target.is_contiguous():
            target.view(-1).scatter_(0, indices.long(), values)  # a third of what index_put takes
        else:  # channels last: put_ counts as if it were contiguous
            target.put_(indices.long(), values)

    def _part(self, indices: Tensor, first: int, count: int) -> tuple[int, int]:
        """Which of the entries are in [first, first + count); read from the device once."""
        key = (first, count, id(indices), indices._version)
        if key not in self._parts:
            ends = torch.tensor([first, first + count], device=indices.device)
            low, high = torch.searchsorted(indices.long(), ends).tolist()
            self._parts[key] = low, high
        return self._parts[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["weight"])  # type: ignore[misc]


def held(weight: Tensor) -> tuple[Tensor, int]:
    """What this process holds of a weight, and at which flat position of the whole it begins.

    Args:
        weight: a plain tensor; or FSDP2's, told by what it can do, for nothing here knows of processes.

    Raises:
        RuntimeError: it is split otherwise than by rows.
    """
    if not hasattr(weight, "to_local"):
        return weight, 0
    local: Tensor = weight.to_local()
    mesh, first = weight.device_mesh, 0  # type: ignore[attr-defined]
    for dim, placement in enumerate(weight.placements):  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        if not placement.is_shard(0) or first:
            raise RuntimeError(
                f"a weight of shape {tuple(weight.shape)} is split as {placement}, and entries of it can be written "
                "where it is split by rows once, as fully_shard does. Leave the layer out of the targets."
            )
        # As torch.chunk does it: as many rows as fit evenly, the last processes get what is left.
        rows = -(-weight.shape[0] // mesh.size(dim))
        first = mesh.get_local_rank(dim) * rows * (weight.numel() // weight.shape[0])
    return local, first


def whole(weight: Tensor) -> Tensor:
    """The weight in one piece; every process must ask."""
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full


def batches(sizes: Sequence[int], most: int = MOST) -> Iterator[slice]:
    """Runs of items that together have no more than so many entries, or a single one that has."""
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > most:
            yield slice(first, i)
            first, total = i, 0
        total += size
    if first < len(sizes):
        yield slice(first, len(sizes))
