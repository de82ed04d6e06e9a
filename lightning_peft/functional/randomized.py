"""A linear layer plus a low-rank update between frozen random projections, as one autograd function.

    y = x W^T + bias + update(x),      update(x) = b * ( P_out^T M value * P_in (a * x) )

a, value and b are vectors, M is the identity or a small matrix R; or a trained matrix U stands for b * P_out^T.
Composed of torch's own functions, the backward keeps two or three tensors of tokens x r numbers and one of
tokens x d_out. Here it keeps u = P_in (a * x) alone and goes through P_out once more, and everything is done for some
tokens at a time, so that what is between the two projections stays in the cache and takes no memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_peft.functional.low_rank import _PLAIN, _cast, _is_watched
from lightning_peft.functional.srht import Projection

_PIECE = 2**18  # numbers of the wider side that are worked on at a time on a CPU: 1 MB in float32


class Update(NamedTuple):
    """What is added to a layer, but for its projections. Vectors are (n,), or (batch, n) for one draw per example.

    Attributes:
        value: (k,), what multiplies each component: gain, mask and all constants.
        a: (d_in,), what multiplies the input, if anything.
        b: (d_out,), what multiplies the output, if anything.
        R: (r, k), between the projections, if anything.
        U: (d_out, k), in the place of b and the second projection, if anything.
    """

    value: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    R: Tensor | None = None
    U: Tensor | None = None


def randomized_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, into: Projection, out: Projection | None, update: Update
) -> Tensor:
    """A linear layer with an update between random projections.

        y = x W^T + bias + b * ( P_out^T R (value * P_in (a * x)) )             without a weight: the update alone

    With b, R or U zero, y is F.linear(x, weight, bias) bit for bit. A vector that has a batch dimension, (batch, n),
    has one draw for every example of x, (batch, ..., d_in), and is the same for all tokens between.

    Under autocast the products run in its dtype. Outside it an update wider than the layer (float32 beside bfloat16)
    computes in its own dtype and is rounded when added. No second derivative, which the reference has.

    Args:
        x: (..., d_in), at least one dimension.
        weight: W, (d_out, d_in), or ``None``.
        bias: (d_out,), or ``None``.
        into: P_in, (k, d_in), without its unit.
        out: P_out, (r, d_out), without its unit; ``None`` where there is U.
        update: the vectors and matrices.

    Returns:
        (..., d_out)

    Raises:
        ValueError: a vector has one draw per example, and not as many as x.
    """
    drawn = {len(v) for v in (update.value, update.a, update.b) if v is not None and v.dim() > 1}
    if drawn and (x.dim() < 2 or drawn != {len(x)}):
        raise ValueError(
            f"a vector has {max(drawn)} draws, one per example, and the layer's input is of shape {tuple(x.shape)}: "
            "its first dimension must be the batch. Draw one for all examples instead."
        )
    tensors = [t for t in (x, weight, bias, *update) if t is not None]
    frozen = weight is None or not (weight.requires_grad and torch.is_grad_enabled())
    if frozen and not _is_watched() and {type(t) for t in tensors} <= _PLAIN:
        y: Tensor = _RandomizedLinear.apply(x, weight, bias, into, out, *update)  # type: ignore[no-untyped-call]
        return y
    return randomized_linear_reference(x, weight, bias, into, out, update)


def randomized_linear_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, into: Projection, out: Projection | None, update: Update
) -> Tensor:
    """:func:`randomized_linear` composed of torch's own functions: any transform, any derivative."""
    value, a, b = (_beside(v, x.dim()) for v in (update.value, update.a, update.b))
    assert value is not None
    dtype = torch.promote_types(x.dtype, value.dtype)
    h = into.down(x.to(dtype), None if a is None else a.to(dtype))
    h = h * value.to(h.dtype)
    if update.R is not None:
        h = F.linear(h, update.R.to(h.dtype))
    if update.U is not None:
        z = F.linear(h, update.U.to(h.dtype))
    else:
        assert out is not None
        z = out.up(h, None if b is None else b.to(h.dtype))
    if weight is None:
        return z
    y = F.linear(x, weight, bias)
    return y + z.to(y.dtype)


def _beside(vector: Tensor | None, dims: int) -> Tensor | None:
    """A vector with one draw per example, with dimensions for the tokens between."""
    if vector is None or vector.dim() == 1:
        return vector
    return vector.view(len(vector), *[1] * (dims - 2), vector.shape[-1])


class _Piece(NamedTuple):
    """Some tokens of some examples."""

    examples: slice
    tokens: slice

    def of(self, t: Tensor) -> Tensor:
        """Its part of (examples, tokens, ...)."""
        return t[self.examples, self.tokens]

    def beside(self, v: Tensor, dtype: torch.dtype) -> Tensor:
        """What stands beside it of a vector: (n,) as it is, (examples, n) as (some, 1, n)."""
        return _cast(v, dtype) if v.dim() == 1 else _cast(v[self.examples], dtype).unsqueeze(1)


def _pieces(rows: tuple[int, int], width: int, device: torch.device) -> Iterator[_Piece]:
    """All of (examples, tokens): at once, or so much at a time as a cache holds."""
    (examples, tokens), whole = rows, slice(None)
    if device.type != "cpu":
        yield _Piece(whole, whole)
    elif examples == 1:
        step = max(1, _PIECE // width)
        yield from (_Piece(whole, slice(i, i + step)) for i in range(0, tokens, step))
    else:
        step = max(1, _PIECE // max(1, width * tokens))
        yield from (_Piece(slice(i, i + step), whole) for i in range(0, examples, step))


class _RandomizedLinear(torch.autograd.Function):
    # g = dL/dy; u = P_in (a x); h = value u; m = R h or h; q = P_out (b g) or U^T g; p = R^T q or q; v = value p
    #
    #   y = x W^T + bias + b P_out^T m                       dx = g W + a P_in^T v       da = sum x P_in^T v
    #   dvalue = sum u p     db = sum g P_out^T m            dR = sum q h^T              dU = sum g h^T

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        into: Projection,
        out: Projection | None,
        value: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        R: Tensor | None,
        U: Tensor | None,
    ) -> Tensor:
        ctx.into, ctx.out, ctx.x_shape, ctx.x_dtype = into, out, x.shape, x.dtype
        needs = ctx.needs_input_grad
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:  # which autocast leaves alone
            ctx.dtype = torch.get_autocast_dtype(kind)
            x = _cast(x, ctx.dtype)
            weight, bias = (None if t is None else _cast(t, ctx.dtype) for t in (weight, bias))
        else:
            ctx.dtype = torch.promote_types(x.dtype, value.dtype)
        # With one draw per example they are told apart; else all tokens are alike.
        apart = any(v is not None and v.dim() > 1 for v in (value, a, b))
        ctx.rows = (len(x), prod(x.shape[1:-1])) if apart else (1, prod(x.shape[:-1]))
        inner = x.reshape(*ctx.rows, x.shape[-1])
        with torch.autocast(kind, enabled=False):
            if weight is None:
                assert out is not None or U is not None
                d_out = out.width if U is None else len(U)  # type: ignore[union-attr]
                y = x.new_zeros(*x.shape[:-1], d_out, dtype=ctx.dtype)
            else:
                y = F.linear(x, weight, bias).contiguous()
            outer = y.view(*ctx.rows, y.shape[-1])
            u = x.new_empty(*ctx.rows, value.shape[-1], dtype=ctx.dtype) if any(needs[5:]) else None
            for piece in _pieces(ctx.rows, max(x.shape[-1], y.shape[-1]), x.device):
                a_here, b_here = (None if t is None else piece.beside(t, ctx.dtype) for t in (a, b))
                here = into.down(_cast(piece.of(inner), ctx.dtype), a_here)
                if u is not None:
                    piece.of(u).copy_(here)
                h = here * piece.beside(value, ctx.dtype)
                if R is not None:
                    h = h @ _cast(R, ctx.dtype).t()
                if U is not None:
                    piece.of(outer).add_(h @ _cast(U, ctx.dtype).t())
                else:
                    assert out is not None
                    piece.of(outer).add_(out.up(h, b_here))
        ctx.save_for_backward(x if needs[6] else None, weight if needs[0] else None, u, value, a, b, R, U)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Everything was cast in the forward; a backward called inside autocast must not cast again.
        with torch.autocast(grad.device.type, enabled=False):
            return _RandomizedLinear._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_grad, _, bias_grad, _, _, value_grad, a_grad, b_grad, R_grad, U_grad = ctx.needs_input_grad
        x, weight, u, value, a, b, R, U = ctx.saved_tensors
        into, out, dtype = ctx.into, ctx.out, ctx.dtype
        grad = grad.contiguous()
        outer = grad.view(*ctx.rows, grad.shape[-1])
        dbias = outer.sum((0, 1)) if bias_grad else None
        dx = dx3 = None
        d_in = ctx.x_shape[-1]
        if x_grad:
            dx = grad.new_zeros(*grad.shape[:-1], d_in) if weight is None else _cast(grad, weight.dtype) @ weight
            dx3 = dx.view(*ctx.rows, d_in)
        x3 = None if x is None else x.reshape(*ctx.rows, d_in)
        sums = [_Sum(t) if wanted else None for t, wanted in ((value, value_grad), (a, a_grad), (b, b_grad))]
        dvalue, da, db = sums
        dR = torch.zeros_like(R, dtype=dtype) if R_grad else None
        dU = torch.zeros_like(U, dtype=dtype) if U_grad else None
        for piece in _pieces(ctx.rows, max(d_in, grad.shape[-1]), grad.device):
            g = _cast(piece.of(outer), dtype)
            v = piece.beside(value, dtype)
            a_here, b_here = (None if t is None else piece.beside(t, dtype) for t in (a, b))
            q = g @ _cast(U, dtype) if U is not None else out.down(g, b_here)
            p = q if R is None else q @ _cast(R, dtype)
            if u is not None:
                here = piece.of(u)
                h = here * v
                if dR is not None:
                    dR.addmm_(q.flatten(0, 1).t(), h.flatten(0, 1))
                if dU is not None:
                    dU.addmm_(g.flatten(0, 1).t(), h.flatten(0, 1))
                if db is not None:
                    db.add(piece, g * out.up(h if R is None else h @ _cast(R, dtype).t()))
                if dvalue is not None:
                    dvalue.add(piece, here * p)
            if x_grad or a_grad:
                back = p * v
                if da is not None and x3 is not None:
                    plain = into.up(back)
                    da.add(piece, plain * _cast(piece.of(x3), dtype))
                    back_x = plain if a_here is None else plain * a_here
                else:
                    back_x = into.up(back, a_here)
                if dx3 is not None:
                    piece.of(dx3).add_(back_x)
        if dx is not None:
            dx = _cast(dx.view(ctx.x_shape), ctx.x_dtype)
        found = [None if each is None else each.total() for each in sums]
        dR, dU = (None if t is None else _cast(t, like.dtype) for t, like in ((dR, R), (dU, U)))
        return dx, None, dbias, None, None, *found, dR, dU


class _Sum:
    """The gradient of a vector, piece by piece: over all tokens, or over those of each example."""

    def __init__(self, vector: Tensor) -> None:
        # Sums over many tokens are kept in float32 or wider.
        self._dtype = vector.dtype
        self._wide = torch.promote_types(vector.dtype, torch.float32)
        self._sum = torch.zeros_like(vector, dtype=self._wide)

    def add(self, piece: _Piece, product: Tensor) -> None:
        """Add a piece's products, (examples, tokens, n)."""
        if self._sum.dim() == 1:
            self._sum += product.sum((0, 1), dtype=self._wide)
        else:
            self._sum[piece.examples] += product.sum(1, dtype=self._wide)

    def total(self) -> Tensor:
        """In the vector's own shape and dtype."""
        return _cast(self._sum, self._dtype)
