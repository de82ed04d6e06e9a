"""Changes of some entries of a tensor, as numbers that can be added, scaled and written: all in O(k)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod

import torch
from torch import Tensor

from lightning_peft.arguments import require_number


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """What is added to some entries of a tensor.

    Args:
        indices: (k,) int64, positions in the flattened tensor, ascending and distinct.
        delta: (k,) float32, or float64 where the tensor is; what is added there, finite.
        shape: of the whole tensor.

    Raises:
        ValueError: positions are not ascending and distinct, out of range, or not as many as deltas; or a delta is not
            finite.

    Example:
        >>> a = SparseDelta(torch.tensor([0, 3]), torch.tensor([1.0, 2.0]), (2, 3))
        >>> b = SparseDelta(torch.tensor([3, 5]), torch.tensor([0.5, 4.0]), (2, 3))
        >>> (a + b * 2).indices.tolist(), (a + b * 2).delta.tolist()
        ([0, 3, 5], [1.0, 3.0, 8.0])
    """

    indices: Tensor
    delta: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        indices, delta = self.indices, self.delta
        if indices.dim() != 1 or indices.dtype != torch.int64 or delta.shape != indices.shape:
            raise ValueError(
                "entries are (k,) positions of int64 and (k,) deltas. Got "
                f"{tuple(indices.shape)} of {indices.dtype} and {tuple(delta.shape)}."
            )
        if not delta.is_floating_point():
            raise ValueError(f"deltas are floating-point numbers. Got {delta.dtype}.")
        if len(indices) and not (
            bool((indices.diff() > 0).all()) and indices[0] >= 0 and indices[-1] < prod(self.shape)
        ):
            raise ValueError(
                f"positions in a tensor of shape {self.shape} are ascending, distinct and from 0 to "
                f"{prod(self.shape) - 1}. Got {indices[:4].tolist()}{', ...' if len(indices) > 4 else ''}."
            )

        if not is_finite(delta):
            place = int((~wide(delta).isfinite()).nonzero()[0])
            raise ValueError(
                f"deltas are finite. Got {float(delta[place])} at position {int(indices[place])}: the run that they "
                "are from diverged, or they were multiplied or added beyond what their dtype holds."
            )

    def __add__(self, other: SparseDelta) -> SparseDelta:
        """Both changes: deltas of entries that both have are added."""
        if self.shape != other.shape:
            raise ValueError(f"changes of tensors of shapes {self.shape} and {other.shape} cannot be added.")
        every = torch.cat([self.indices, other.indices])
        indices, place = every.unique(return_inverse=True)
        dtype = torch.promote_types(torch.promote_types(self.delta.dtype, other.delta.dtype), torch.float32)
        delta = torch.zeros(len(indices), dtype=dtype, device=self.delta.device)
        # Two numbers at most meet in an entry, and the sum of two does not depend on their order.
        delta.index_add_(0, place, torch.cat([self.delta.to(dtype), other.delta.to(dtype)]))
        return SparseDelta(indices, delta, self.shape)

    def __mul__(self, factor: float) -> SparseDelta:
        require_factor(factor)
        return SparseDelta(self.indices, self.delta * factor, self.shape)

    __rmul__ = __mul__

    @torch.no_grad()
    def write(self, tensor: Tensor) -> Tensor:
        """Add the deltas in place, in float32 or wider, rounded once; returns what the entries were: (k,)."""
        places = torch.unravel_index(self.indices.to(tensor.device), self.shape)
        before = tensor.detach()[places]
        dtype = torch.promote_types(before.dtype, torch.float32)
        tensor.detach()[places] = (before.to(dtype) + self.delta.to(tensor.device, dtype)).to(before.dtype)
        return before

    @torch.no_grad()
    def put_back(self, tensor: Tensor, before: Tensor) -> None:
        """Give the entries the values that :meth:`write` has returned, bit for bit."""
        tensor.detach()[torch.unravel_index(self.indices.to(tensor.device), self.shape)] = before


def wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or in float32 where its dtype is one of 8 bits, in which little can be computed."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of it is."""
    return bool(wide(tensor.detach()).isfinite().all())


def require_factor(factor: float) -> None:
    """Check what deltas are multiplied by.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite.
    """
    require_number("a factor of deltas", factor)
    if not isfinite(factor):
        raise ValueError(f"a factor of deltas is finite. Got {factor}.")
