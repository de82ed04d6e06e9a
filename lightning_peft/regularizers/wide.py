"""Wide: networks beside the model that stay in float32 where the model does not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_WIDE = (torch.float32, torch.float64)


class Wide(nn.Module):
    """A module whose parameters are in float32 at least, also where `module.to(torch.bfloat16)` comes by."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Wide:
        before = {name: p.data for name, p in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, p in self.named_parameters():
            if p.dtype not in _WIDE:
                p.data = before[name].to(p.device)
        return self

    def computes_in(self, tensor: Tensor, *others: Tensor) -> torch.dtype:
        """The dtype of its parameters, whatever it is given; the widest of what it is given, where it has none."""
        return next((p.dtype for p in self.parameters()), widened(tensor, *others))


def widened(tensor: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype to compute in: the widest of these, float32 at least."""
    dtype = torch.float32
    for each in (tensor, *others):
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype
