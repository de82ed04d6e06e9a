"""A linear layer whose weight is a sum of rank-one terms, each with a scalar of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def factorized_linear(x: Tensor, U: Tensor, Vh: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Two thin products with a scalar per component between them.

        y = U diag(value) Vh x + b

    The scalars multiply whichever is the smallest: what is between the products, tokens x K numbers, or a factor,
    K d_out or K d_in. The exception is a frozen factor beside scalars that want a gradient: multiplied into it they
    would ask for the gradient of the whole factor, a third product; between the products theirs is a sum over tokens.

    Args:
        x: (..., d_in).
        U: (d_out, K).
        Vh: (K, d_in).
        value: (K,), a gate's gain times its mask.
        bias: b, (d_out,), or ``None``.

    Returns:
        (..., d_out); under autocast in its dtype.

    Example:
        >>> factorized_linear(torch.ones(1, 2), torch.ones(3, 1), torch.ones(1, 2), torch.tensor([0.5]))
        tensor([[1., 1., 1.]])
    """
    d_out, d_in = U.shape[0], Vh.shape[1]
    factor = U if d_out <= d_in else Vh
    wanted = torch.is_grad_enabled() and value.requires_grad
    if x.numel() <= d_in * min(d_out, d_in) or (wanted and not factor.requires_grad):
        h = F.linear(x, Vh)
        return F.linear(h * value.to(h.dtype), U, bias)
    if factor is U:
        U = U * value.to(U.dtype)
    else:
        Vh = value.to(Vh.dtype)[:, None] * Vh
    return F.linear(F.linear(x, Vh), U, bias)
