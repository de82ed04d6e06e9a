"""Gate: n switchable components of one adapter, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Switch the components of an adapter on and off, in place.

        value = gain * mask

    The mask is data, not shape: writing it recompiles nothing, travels in every checkpoint and is broadcast by DDP.
    There are two kinds of removal. *Hard* writes the mask, and the component stays closed whatever an optimizer does to
    the gain. *Soft* sets the gain to zero once, so the next optimizer step may bring the component back.

    A method that learns masks draws one for every step and puts it into `drawn`, where it stands for the mask in what
    the adapter computes, and nowhere else: :meth:`open` and :meth:`keep` are about the mask. It is of the step alone,
    so it is neither saved, copied nor moved; its gradient reaches whatever drew it.

    Args:
        n: number of components.
        cost: parameters that one component costs; at least 1.
        gain: (n,) start of the paper's own scalar per component, trained with the adapter; ``None`` if it has none.

    Shape:
        h: (..., n) -> (..., n)

    Raises:
        ValueError: n or cost is not positive, or gain is not of shape (n,).

    Example:
        >>> gate = Gate(3, cost=8)
        >>> gate.keep(torch.tensor([1, 0, 1]))
        >>> gate(torch.ones(3))
        tensor([1., 0., 1.])
    """

    mask: Tensor
    gain: nn.Parameter | None
    drawn: Tensor | None
    """(n,) the mask of this step, 0 or 1, where one is drawn for every step."""

    closes_itself: ClassVar[bool] = False
    """Whether training alone closes components, without a policy."""

    def __init__(self, n: int, cost: int, gain: Tensor | None = None) -> None:
        super().__init__()
        if n < 1 or cost < 1:
            raise ValueError(f"Gate needs at least one component of positive cost. Got n={n}, cost={cost}.")
        if gain is not None and gain.shape != (n,):
            raise ValueError(f"gain must have shape ({n},), one scalar per component. Got {tuple(gain.shape)}.")
        self.cost = cost
        device = None if gain is None else gain.device
        self.register_buffer("mask", torch.ones(n, dtype=torch.float32, device=device))
        self.gain = None if gain is None else nn.Parameter(gain)
        self.drawn = None
        self._first = n

    def start_with(self, count: int) -> None:
        """Start with the first `count` components open and room for the others.

        Raises:
            ValueError: there are not as many, or it is negative.
        """
        if not 0 <= count <= len(self):
            raise ValueError(f"a gate of {len(self)} components cannot start with {count} of them open.")
        self._first = count
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Open what is open at the start, for a mask that was built on the meta device. The gain is the adapter's."""
        mask = self.mask.detach()
        mask.copy_(torch.arange(len(mask), device=mask.device) < self._first)

    def __len__(self) -> int:
        return self.mask.numel()

    def value(self) -> Tensor:
        """What multiplies each component: (n,), the gain times the mask, or times the one that is drawn."""
        mask = self.mask if self.drawn is None else self.drawn
        return mask if self.gain is None else self.gain * mask

    def forward(self, h: Tensor) -> Tensor:
        return h * self.value().to(h.dtype)

    @property
    def removes_softly(self) -> bool:
        """Whether :meth:`keep` knows a soft removal here."""
        return self.gain is not None

    def open(self) -> Tensor:
        """Components that act on the output now: (n,) bool."""
        # Both, not their product: a gain that has diverged to NaN does not reopen a closed component.
        return self.mask.detach() != 0 if self.gain is None else (self.mask != 0) & (self.gain.detach() != 0)

    @torch.no_grad()
    def keep(self, which: Tensor, soft: bool = False) -> None:
        """Keep these components and close the others, in place.

        Args:
            which: (n,) 1 or True for the components that stay open.
            soft: zero the gain once instead of writing the mask. Components that `which` names keep their gain.

        Raises:
            ValueError: `which` is not of shape (n,), or soft removal is asked of a gate without a gain.
        """
        if which.shape != self.mask.shape:
            raise ValueError(f"which must have shape {tuple(self.mask.shape)}. Got {tuple(which.shape)}.")
        kept = which.to(self.mask) != 0
        if not soft:
            # The gain stays: the mask's gradient is worth times gain, so a closed component is still scored.
            self.mask.copy_(kept)
        elif self.gain is not None:
            self.gain.masked_fill_(~kept, 0.0)
        else:
            raise ValueError(
                "soft removal zeroes a component's gain, and this gate has none; use soft=False or another method."
            )

    def extra_repr(self) -> str:
        return f"n={len(self)}, cost={self.cost}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        # `module.to(bfloat16)` casts buffers too; a mask and what accumulates in its gradient stay float32. The tensor
        # is moved by hand so that `requires_grad`, set while an importance reads the mask's gradient, survives.
        wanted = self.mask.requires_grad
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        mask = self.mask.detach()
        self.mask = (mask if mask.dtype == torch.float32 else mask.float()).requires_grad_(wanted)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A drawn mask is inside the graph of a step, which cannot be copied or pickled.
        return self.__dict__ | {"drawn": None}
