"""A low-rank linear layer whose outputs are scaled one by one, as one autograd function; and the norms for the scale.

    y = scale * (x W^T + drop(x) A^T diag(value) B^T) + b,     scale = magnitude / |W + B diag(value) A|_row

It is :func:`~lightning_peft.functional.low_rank.low_rank_linear` with one more pass over the output in each direction:
the scale and the bias are applied together, and the scale of the gradient goes into what is smaller, W or the gradient.
The norms need no matrix of W's size: it is made and reduced in pieces that stay in the cache.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_peft.functional.low_rank import (
    _cast,
    _drop,
    _drop_gradient,
    _linear_plus,
    is_fast,
    low_rank_linear_reference,
)

_PIECE = 2**17  # numbers that are worked on at once on a CPU: half of a usual second-level cache in float32
_PIECE_ELSEWHERE = 2**24  # on an accelerator, where a call costs more and memory is what is scarce


def row_norms(weight: Tensor, A: Tensor, B: Tensor, value: Tensor) -> Tensor:
    """Norm of every row of a weight with its low-rank update, without a matrix of the weight's size.

        n_o = |W_o + sum_i B_oi value_i A_i|

    The sum is formed and squared piece by piece, at most 2^17 numbers at a time (2^24 on an accelerator), rather than
    expanded into |W_o|^2 + 2 <W_o, dW_o> + |dW_o|^2, whose terms cancel where an update is nearly opposite to its row.
    No gradient flows through it, and autocast does not reach into it: float32, or wider if an input is.

    Args:
        weight: W, (d_out, d_in); a transposed view is as good.
        A: (r, d_in).
        B: (d_out, r).
        value: (r,), what multiplies each component.

    Returns:
        (d_out,)

    Example:
        >>> W, A, B = torch.eye(2), torch.ones(1, 2), torch.tensor([[1.0], [0.0]])
        >>> row_norms(W, A, B, torch.ones(1))
        tensor([2.2361, 1.0000])
    """
    kind = weight.device.type
    with torch.no_grad(), nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        weight, A, B, value = (t.detach() for t in (weight, A, B, value))
        dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
        A, Bv = A.to(dtype), B.to(dtype) * value.to(dtype)
        size = _PIECE if kind == "cpu" else _PIECE_ELSEWHERE
        d_out, d_in = weight.shape
        if weight.is_contiguous() or not weight.t().is_contiguous():
            n = min(d_out, max(1, size // d_in))
            norms = A.new_empty(d_out)
            piece = A.new_empty(n, d_in)  # one for all: to allocate each would cost as much as to fill it
            for rows, Bv_rows, out in zip(weight.split(n), Bv.split(n), norms.split(n), strict=True):
                whole = torch.addmm(rows.to(dtype), Bv_rows, A, out=piece[: len(rows)])
                torch.linalg.vector_norm(whole, dim=1, out=out)
            return norms
        # Stored as (d_in, d_out): a piece is some inputs of all rows. Summed by `sum`, which adds up in a tree: a norm
        # along this dimension adds one by one, and loses digits over the tokens of a vocabulary.
        Wt, At, vBt, n = weight.t(), A.t(), Bv.t(), max(1, size // d_out)
        inputs = [slice(i, i + n) for i in range(0, d_in, n)]
        squares = [torch.addmm(Wt[some].to(dtype), At[some], vBt).square_().sum(0) for some in inputs]
        return torch.stack(squares).sum(0).sqrt()


def rescaled(y: Tensor, bias: Tensor | None, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Scale a layer's outputs one by one, but not its bias, which is in them already.

        scale * (y - b) + b,   computed as scale * y + (1 - scale) b: with scale 1 it is y bit for bit

    Args:
        y: (..., d_out), bias included.
        bias: b, (d_out,), or ``None``.
        scale: (d_out,)
        out: where to write; may be `y`.

    Returns:
        (..., d_out), of y's dtype; computed in the scale's if that is wider.
    """
    if out is not None:
        return torch.mul(y, scale, out=out) if bias is None else torch.addcmul(bias * (1 - scale), y, scale, out=out)
    scaled = y * scale if bias is None else torch.addcmul(bias * (1 - scale), y, scale)
    return scaled.to(y.dtype)


def decomposed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    value: Tensor,
    scale: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Linear layer with a low-rank update of its frozen weight, each output scaled.

        y = scale * (x W^T + drop(x) A^T diag(value) B^T) + b

    With scale 1, y is `low_rank_linear` bit for bit, and F.linear(x, weight, bias) where value or B is zero as well.
    Fast under the same conditions, otherwise :func:`decomposed_linear_reference`; dropout, autocast and dtypes are as
    they are there. The scale is applied in its own dtype where that is wider than the output's: bfloat16 would lose
    what a magnitude learns.

    For the gradient of the scale the unscaled output is kept, (tokens, d_out); not if the scale wants none.

    Args:
        x: (..., d_in), at least one dimension.
        weight: W, (d_out, d_in); a transposed view is as good.
        bias: b, (d_out,), or ``None``.
        A: (r, d_in).
        B: (d_out, r).
        value: (r,), what multiplies each component: scaling, gain and mask together.
        scale: (d_out,), what multiplies each output.
        dropout: probability of dropping an entry of the update's input; 0.0 outside training.

    Returns:
        (..., d_out)

    Example:
        >>> x, W, A, B = torch.ones(1, 3), torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2, 1)
        >>> decomposed_linear(x, W, None, A, B, torch.tensor([0.5]), torch.tensor([2.0, 0.0]))
        tensor([[3., 0.]])
    """
    if is_fast(x, weight, bias, A, B, value) and is_fast(scale, weight, None, A, B, value):
        y: Tensor = _DecomposedLinear.apply(x, weight, bias, A, B, value, scale, dropout)  # type: ignore[no-untyped-call]
        return y
    return decomposed_linear_reference(x, weight, bias, A, B, value, scale, dropout)


def decomposed_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    value: Tensor,
    scale: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`decomposed_linear` composed of torch's own functions, for any transform, tensor subclass, derivative."""
    return rescaled(low_rank_linear_reference(x, weight, bias, A, B, value, dropout), bias, scale)


def _products_summed(g: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_t g_to u_to, (d_out,), without a product of all tokens: they are read once."""
    n = min(len(g), max(1, (_PIECE if g.device.type == "cpu" else _PIECE_ELSEWHERE) // g.shape[1]))
    total = g.new_zeros(g.shape[1], dtype=dtype)
    piece = g.new_empty(n, g.shape[1])  # one for all: to allocate each would cost as much as to fill it
    for some, same in zip(g.split(max(1, n)), u.split(max(1, n)), strict=True):
        total += torch.mul(some, same, out=piece[: len(some)]).sum(0, dtype=dtype)
    return total


class _DecomposedLinear(torch.autograd.Function):
    # t tokens; v = value; s = scale; g = dL/dy, (t, d_out); hT = A drop(x)^T, (r, t); Bv = (B diag(v))^T, (r, d_out);
    # u = x W^T + b + hT^T Bv, (t, d_out); uT = (Bv s) g^T, (r, t); P = diag(s) g^T hT^T, (d_out, r)
    #
    #   y = s u + (1 - s) b
    #   dx = g (diag(s) W) + noise * (uT^T A)     dA = uT drop(x)     dB = P diag(v)     dv_i = sum_o P_oi B_oi
    #   ds = sum_t g_t (u_t - b)                  db = sum_t g_t

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        value: Tensor,
        scale: Tensor,
        p: float,
    ) -> Tensor:
        x_grad, _, _, A_grad, B_grad, value_grad, scale_grad, _ = ctx.needs_input_grad
        inner, noise = _drop(x, p, fused=x.device.type != "cpu") if p > 0 else (x, None)
        ctx.x_shape, ctx.x_dtype, ctx.p = x.shape, x.dtype, p
        if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(x.device.type)
            low = _cast(x, dtype)
            inner = low if inner is x else _cast(inner, dtype)
            x, weight, bias = low, _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
        else:
            dtype = torch.promote_types(x.dtype, A.dtype)
        ctx.dtype = dtype
        inner = inner.reshape(-1, inner.shape[-1])
        hT = _cast(A, dtype) @ _cast(inner, dtype).t()
        Bv = _cast(B * value, dtype).t().contiguous()
        u = _linear_plus(x, weight, bias, hT, Bv)
        ctx.save_for_backward(
            inner if A_grad else None,  # narrow if it came so: the backward widens it again
            noise if x_grad else None,
            weight if x_grad else None,
            bias if scale_grad else None,
            A if x_grad else None,
            B if B_grad or value_grad else None,
            value if B_grad else None,
            scale if x_grad or A_grad or B_grad or value_grad else None,
            Bv if x_grad or A_grad else None,
            hT if B_grad or value_grad or (scale_grad and bias is not None) else None,
            # Not y, from which u can be had: what follows may change y in place, as it may change a linear layer's.
            u if scale_grad else None,
        )
        return rescaled(u, bias, scale, out=torch.empty_like(u) if scale_grad else u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Everything was cast in the forward; a backward called inside autocast must not cast again.
        if torch.is_autocast_enabled(grad.device.type):
            with torch.autocast(grad.device.type, enabled=False):
                return _DecomposedLinear._gradients(ctx, grad)
        return _DecomposedLinear._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, _, bias_grad, A_grad, B_grad, value_grad, scale_grad, _ = ctx.needs_input_grad
        inner, noise, weight, bias, A, B, value, scale, Bv, hT, u = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1]).contiguous()
        dx = dbias = dA = dB = dvalue = dscale = None
        wide = _cast(g, ctx.dtype)
        if scale_grad:
            dscale = _products_summed(g, u.view(-1, u.shape[-1]), torch.promote_types(g.dtype, torch.float32))
        if scale_grad and bias is not None:
            # A row of ones sums over tokens: one more row in a product that is made anyway.
            sums = F.pad(hT, (0, 0, 0, 1), value=1.0) @ wide
            dscale -= bias * sums[-1]
            products = sums[:-1]
        elif B_grad or value_grad:
            products = hT @ wide
        if bias_grad:
            dbias = g.sum(0)
        if B_grad or value_grad:
            # Not `contiguous()`, which leaves one column of stride d_out as it is: DDP's buckets want B's own strides.
            P = _cast(products, B.dtype).t().clone(memory_format=torch.contiguous_format).mul_(scale[:, None])
            if value_grad:
                dvalue = (P * B).sum(0)
            if B_grad:
                dB = P.mul_(value)
        if x_grad or A_grad:
            uT = _cast(Bv * scale, ctx.dtype) @ wide.t()
        if A_grad:
            dA = uT @ _cast(inner, ctx.dtype)
        if x_grad:
            dx = _cast(uT.t() @ _cast(A, ctx.dtype), g.dtype)
            if noise is not None:
                dx = _drop_gradient(dx, noise.reshape(dx.shape), ctx.p)
            # The scale stands between the two: it goes into the smaller.
            if g.numel() < weight.numel():
                g = _cast(g * scale, g.dtype)
            else:
                weight = _cast(weight * scale[:, None], g.dtype)
            dx = _cast(dx.addmm_(g, weight).view(ctx.x_shape), ctx.x_dtype)
        return dx, None, dbias, dA, dB, dvalue, dscale, None
