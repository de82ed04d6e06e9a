"""A linear layer plus a low-rank update, as one autograd function.

    y = x W^T + b + drop(x) A^T diag(value) B^T

Written plainly, the update makes extra passes over tokens x d_out numbers to scale and to add, keeps what those passes
need for the backward, and multiplies by skinny matrices in a slow layout. Here the update is added into the base's
output and into the input's gradient in place, and what has r numbers per token is kept as (r, tokens), whose rows are
long: on a CPU most of the skinny products are then two to four times faster. The gate costs nothing per token, because
value scales the d_out r numbers of B, and its gradient comes out of B's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_PLAIN = {Tensor, nn.Parameter}
_LARGE = 2**18  # numbers in an output whose passes through memory cost more than a few more calls
_CPU_ADDMM = (torch.float32, torch.float64)  # not bfloat16 and float16, which F.linear gives to other kernels


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, value: Tensor, dropout: float = 0.0
) -> Tensor:
    """Linear layer with a low-rank update of its frozen weight.

        y = x W^T + b + drop(x) A^T diag(value) B^T

    With value or B zero, y is F.linear(x, weight, bias) bit for bit. Fast where :func:`is_fast` says so, otherwise
    :func:`low_rank_linear_reference`: the same numbers up to rounding. Dropout draws alike in both, from the global
    generator, except under a compiler or a transform, which need torch's own.

    Under autocast both products run in its dtype, as F.linear's do; y has the dtype that F.linear gives. Outside it an
    adapter wider than the base (float32 beside bfloat16) computes in its own dtype and is rounded when added. Gradients
    have the dtype of what they belong to; there is no second derivative, which the reference has.

    Args:
        x: (..., d_in), at least one dimension.
        weight: W, (d_out, d_in); a transposed view is as good.
        bias: b, (d_out,), or ``None``.
        A: (r, d_in).
        B: (d_out, r).
        value: (r,), what multiplies each component: scaling, gain and mask together.
        dropout: probability of dropping an entry of the update's input; 0.0 outside training.

    Returns:
        (..., d_out)

    Example:
        >>> x, W, A, B = torch.ones(1, 3), torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2, 1)
        >>> low_rank_linear(x, W, None, A, B, torch.tensor([0.5]))
        tensor([[1.5000, 1.5000]])
    """
    if is_fast(x, weight, bias, A, B, value):
        y: Tensor = _LowRankLinear.apply(x, weight, bias, A, B, value, dropout)  # type: ignore[no-untyped-call]
        return y
    return low_rank_linear_reference(x, weight, bias, A, B, value, dropout)


def low_rank_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, value: Tensor, dropout: float = 0.0
) -> Tensor:
    """:func:`low_rank_linear` composed of torch's own functions: any transform, any tensor subclass, any derivative."""
    y = F.linear(x, weight, bias)
    return y + low_rank_update(x, A, B, value, dropout).to(y.dtype)


def low_rank_update(x: Tensor, A: Tensor, B: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """The update alone, drop(x) A^T diag(value) B^T: (..., d_in) -> (..., d_out), in the adapter's dtype if wider."""
    dtype = torch.promote_types(x.dtype, A.dtype)
    h = F.linear(drop(x, dropout).to(dtype), A.to(dtype))
    return F.linear(h, (B * value).to(dtype))


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout as all adapters have it: torch's own, or a faster draw on a CPU where nobody has to see through it."""
    if p == 0:
        return x
    ours = x.device.type == "cpu" and type(x) in _PLAIN and not _is_watched()
    return x * _noise(x, p) if ours else F.dropout(x, p)


def is_fast(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, value: Tensor) -> bool:
    """Whether :func:`low_rank_linear` may use its autograd function.

    It steps aside for whatever has to see through it (torch.compile and export, jit tracing, forward-mode derivatives,
    functorch), for tensor subclasses (DTensor, quantised and fake tensors), and when the base weight wants a gradient.
    """
    if _is_watched():
        return False
    if weight.requires_grad and torch.is_grad_enabled():
        return False
    types = {type(x), type(weight), type(A), type(B), type(value), Tensor if bias is None else type(bias)}
    return types <= _PLAIN


def _is_watched() -> bool:
    """Whether somebody has to see through what is called now: a compiler, a tracer, a transform."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _noise(x: Tensor, p: float) -> Tensor:
    """What dropout multiplies by on a CPU: 0 with probability p, else 1 / (1 - p), p in steps of 2^-16.

    Four entries of 16 bits out of each 64-bit draw: torch's own draw per entry is most of what an adapted layer with
    dropout costs there.
    """
    closed = round(p * 2**16)
    if closed == 2**16:
        return torch.zeros_like(x)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()] >= closed - 2**15
    return kept.view(x.shape).to(x.dtype).mul_(2**16 / (2**16 - closed))


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)  # a call saved: it runs ten times per layer and step


def _drop(x: Tensor, p: float, fused: bool) -> tuple[Tensor, Tensor]:
    """x with dropout, and what its gradient needs: by the kernel of accelerators, or by :func:`_noise`."""
    if fused and p < 1:
        dropped, kept = torch.native_dropout(x, p, True)
        return dropped, kept
    noise = _noise(x, p)
    return x * noise, noise


def _drop_gradient(grad: Tensor, noise: Tensor, p: float) -> Tensor:
    """Gradient of the dropped tensor to the gradient of the tensor; may write into `grad`."""
    if noise.dtype is torch.bool:
        dx: Tensor = torch.ops.aten.native_dropout_backward(grad, noise, 1 / (1 - p))
        return dx
    return grad.mul_(noise)


def _is_addmm(x: Tensor) -> bool:
    """Whether F.linear(x, weight, bias) is torch.addmm on x's rows: torch's own rule on a CPU."""
    return x.device.type == "cpu" and x.dtype in _CPU_ADDMM and x.dim() in (2, 3) and x.is_contiguous()


def linear_of_its_own(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, bit for bit, for a `torch.autograd.Function` to return or change: contiguous and no view.

    With a bias F.linear may compute rows and return them under another shape, and what a function gives on may be
    changed in place only if it is no view. Nobody else has those rows, so the shape can be given without a trace; a
    copy would be one more pass.
    """
    y = F.linear(x, weight, bias).contiguous()
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, hT: Tensor, Bv: Tensor) -> Tensor:
    """F.linear(x, weight, bias) + hT^T Bv; a new tensor and no view, so that what follows may change it in place."""
    d_out, d_in = weight.shape
    large = hT.shape[1] * d_out >= _LARGE
    if large and bias is not None and _is_addmm(x) and x.dtype is hT.dtype:
        # addmm writes the bias into the output and adds the product to it. The same with one pass less over the output:
        # one skinny product writes bias and update together, then the same product is added. Zeros change no bit.
        y = x.new_empty((*x.shape[:-1], d_out))
        rows = y.view(-1, d_out)
        torch.mm(F.pad(hT, (0, 0, 0, 1), value=1.0).t(), torch.cat([Bv, bias.unsqueeze(0)]), out=rows)
        rows.addmm_(x.view(-1, d_in), weight.t())
        return y
    y = linear_of_its_own(x, weight, bias)
    rows = y.view(-1, d_out)
    if rows.dtype == hT.dtype:
        rows.addmm_(hT.t(), Bv)
    else:
        rows.add_(hT.t() @ Bv)
    return y


class _LowRankLinear(torch.autograd.Function):
    # t tokens; v = value; g = dL/dy, (t, d_out); hT = A drop(x)^T, (r, t); Bv = (B diag(v))^T, (r, d_out);
    # uT = Bv g^T, (r, t); P = g^T hT^T, (d_out, r)
    #
    #   y = x W^T + b + hT^T Bv
    #   dx = g W + noise * (uT^T A)     dA = uT drop(x)     dB = P diag(v)     dv_i = sum_o P_oi B_oi

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, value: Tensor, p: float
    ) -> Tensor:
        x_grad, _, _, A_grad, B_grad, value_grad, _ = ctx.needs_input_grad
        inner, noise = _drop(x, p, fused=x.device.type != "cpu") if p > 0 else (x, None)
        ctx.x_shape, ctx.x_dtype, ctx.p = x.shape, x.dtype, p
        if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(x.device.type)
            # Cast once for base, update and backward. F.linear, too, keeps the cast weight for its backward.
            low = _cast(x, dtype)
            inner = low if inner is x else _cast(inner, dtype)
            x, weight, bias = low, _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
        else:
            dtype = torch.promote_types(x.dtype, A.dtype)
        ctx.dtype = dtype
        inner = inner.reshape(-1, inner.shape[-1])
        hT = _cast(A, dtype) @ _cast(inner, dtype).t()
        Bv = _cast(B * value, dtype).t().contiguous()
        ctx.save_for_backward(
            inner if A_grad else None,  # narrow if it came so: the backward widens it again
            noise if x_grad else None,
            weight if x_grad else None,
            A if x_grad else None,
            B if B_grad or value_grad else None,
            value if B_grad else None,
            Bv if x_grad or A_grad else None,
            hT if B_grad or value_grad else None,
        )
        return _linear_plus(x, weight, bias, hT, Bv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Everything was cast in the forward; a backward called inside autocast must not cast again.
        if torch.is_autocast_enabled(grad.device.type):
            with torch.autocast(grad.device.type, enabled=False):
                return _LowRankLinear._gradients(ctx, grad)
        return _LowRankLinear._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, _, bias_grad, A_grad, B_grad, value_grad, _ = ctx.needs_input_grad
        inner, noise, weight, A, B, value, Bv, hT = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1]).contiguous()
        dx = dbias = dA = dB = dvalue = None
        if bias_grad:
            dbias = g.sum(0)
        wide = _cast(g, ctx.dtype)
        # Skinny products first: they read g one after the other, while it is in the cache.
        if B_grad or value_grad:
            # Not `contiguous()`, which leaves one column of stride d_out as it is: DDP's buckets want B's own strides.
            P = _cast(hT @ wide, B.dtype).t().clone(memory_format=torch.contiguous_format)
            if value_grad:
                dvalue = (P * B).sum(0)
            if B_grad:
                dB = P.mul_(value)
        if x_grad or A_grad:
            uT = Bv @ wide.t()
        if A_grad:
            dA = uT @ _cast(inner, ctx.dtype)
        if x_grad:
            dx = _cast(uT.t() @ _cast(A, ctx.dtype), g.dtype)
            if noise is not None:
                dx = _drop_gradient(dx, noise.reshape(dx.shape), ctx.p)
            dx = _cast(dx.addmm_(g, weight).view(ctx.x_shape), ctx.x_dtype)
        return dx, None, dbias, dA, dB, dvalue, None
