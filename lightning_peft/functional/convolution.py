"""A convolution plus a low-rank update of its kernel.

    y = conv(x, W) + b + conv1x1( diag(value) conv(drop(x), A), B )  =  conv(x, W + B diag(value) A) + b without dropout

A's rows are r small kernels, moved over the input as the base's own: with its stride, padding and dilation. What they
give is mixed at every place by B, as a convolution of kernel 1. With groups, each group of channels meets the same r
kernels, and each group of outputs has its own rows of B: the rows of W + B A are then the kernels of a grouped
convolution.

Both forms are exact, and each is the faster one somewhere; see :func:`is_merged`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.functional.low_rank import drop

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input, kernel, bias) -> output: how a convolution moves a kernel of any number of outputs over its input."""

_WIDE = (torch.float32, torch.float64)
_TILE = 16  # outputs that a convolution's kernels compute at once: fewer cost as much
_POINTWISE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def low_rank_convolution(
    convolve: Convolve,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    value: Tensor,
    groups: int = 1,
    dropout: float = 0.0,
) -> Tensor:
    """Convolution with a low-rank update of its frozen kernel.

        y = conv(x, W) + b + conv1x1( diag(value) conv(drop(x), A), B )

    With value or B zero, y is conv(x, W) + b bit for bit.

    Args:
        convolve: the base's convolution, for a kernel of a multiple of `groups` outputs.
        x: (N, c_in, *places) or (c_in, *places).
        weight: W, (d_out, c_in / groups, *kernel).
        bias: b, (d_out,), or ``None``.
        A: (r, d_in) with d_in = c_in / groups * prod(kernel).
        B: (d_out, r).
        value: (r,), what multiplies each component: scaling, gain and mask together.
        groups: the base's groups.
        dropout: probability of dropping an entry of the update's input; 0.0 outside training.

    Returns:
        (N, d_out, *places) or (d_out, *places), as `convolve` gives it.

    Example:
        >>> x, W, A, B = torch.ones(1, 1, 3), torch.zeros(1, 1, 2), torch.ones(1, 2), torch.ones(1, 1)
        >>> low_rank_convolution(F.conv1d, x, W, None, A, B, torch.tensor([0.5]))
        tensor([[[1., 1.]]])
    """
    if is_merged(x, weight, A, groups, dropout):
        return convolve(x, weight + ((B * value) @ A).view(weight.shape), bias)
    y = convolve(x, weight, bias)
    return y + low_rank_convolution_update(convolve, x, weight.shape[1:], A, B, value, groups, dropout).to(y.dtype)


def low_rank_convolution_update(
    convolve: Convolve,
    x: Tensor,
    kernel: torch.Size,
    A: Tensor,
    B: Tensor,
    value: Tensor,
    groups: int = 1,
    dropout: float = 0.0,
) -> Tensor:
    """The update alone, conv1x1(diag(value) conv(drop(x), A), B), in the adapter's dtype if wider.

    `kernel` is (c_in / groups, *kernel), the shape of one row of A; the rest as in :func:`low_rank_convolution`.
    """
    dtype = torch.promote_types(x.dtype, A.dtype)
    inner = A.to(dtype).view(-1, *kernel)
    if groups > 1:
        inner = inner.repeat(groups, *[1] * len(kernel))
    h = convolve(drop(x, dropout).to(dtype), inner, None)
    places = len(kernel) - 1
    return _POINTWISE[places](h, (B * value).to(dtype).view(*B.shape, *[1] * places), groups=groups)


def is_merged(x: Tensor, weight: Tensor, A: Tensor, groups: int = 1, dropout: float = 0.0) -> bool:
    """Whether :func:`low_rank_convolution` adds the update to the kernel and convolves once.

    At every place of the output, multiplications beyond the base's own:

        merged     d_out d_in                       the gradient of the whole kernel, which a frozen one does not need
        apart      3 r (groups d_in + d_out)        two thin convolutions, forward and both gradients of each

    Thin ones cost as if r were at least 16, so the merged form is the faster one on narrow and on depthwise layers. It
    is right without dropout alone, and keeps what a small update says only in float32 or wider: rounded to 16 bits
    together with W, most of it would be lost.
    """
    if dropout > 0 or not x.dtype == weight.dtype == A.dtype or weight.dtype not in _WIDE:
        return False
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return False
    d_out, (r, d_in) = weight.shape[0], A.shape
    return d_out * d_in <= 3 * max(r, _TILE) * (groups * d_in + d_out)
