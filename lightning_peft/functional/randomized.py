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

from lightning_peft.functional.low_rank import _PLAIN, _cast, _is_watched, linear_of_its_own
from lightning_peft.functional.srht import Projection, up


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
        differentiated = torch.is_grad_enabled()
        y: Tensor = _RandomizedLinear.apply(x, weight, bias, into, out, *update, differentiated)  # type: ignore[no-untyped-call]
        return y
    return randomized_linear_reference(x, weight, bias, into, out, update)


def randomized_linear_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, into: Projection, out: Projection | None, update: Update
) -> Tensor:
    """:func:`randomized_linear` composed of torch's own functions: any transform, any derivative."""
    value, a, b = update.value, update.a, update.b
    apart = any(v is not None and v.dim() > 1 for v in (value, a, b))
    rows = _whole(_rows(x, apart))
    dtype = torch.promote_types(x.dtype, value.dtype)
    inner = x.reshape(*_rows(x, apart), x.shape[-1]).to(dtype)
    h = into.down(inner, None if a is None else rows.beside(a, dtype))
    h = rows.times(h, value)
    if update.R is not None:
        h = update.R.to(h.dtype) @ h
    if update.U is not None:
        z = F.linear(h.t(), update.U.to(h.dtype))
    else:
        assert out is not None
        z = up(out, h, inner, None if b is None else rows.beside(b, h.dtype))
    z = z.view(*x.shape[:-1], z.shape[-1])
    if weight is None:
        return z
    y = F.linear(x, weight, bias)
    return y + z.to(y.dtype)


def _rows(x: Tensor, apart: bool) -> tuple[int, int]:
    """Examples and the tokens of each, where examples are told apart; else one example that has all tokens."""
    return (x.shape[0], prod(x.shape[1:-1])) if apart else (1, prod(x.shape[:-1]))


class _Piece(NamedTuple):
    """Some tokens of some examples."""

    examples: slice
    tokens: slice

    def of(self, t: Tensor) -> Tensor:
        """Its part of (examples, tokens, ...)."""
        return t[self.examples, self.tokens]

    def beside(self, v: Tensor, dtype: torch.dtype) -> Tensor:
        """What stands beside tokens of a vector: (n,) as it is, (examples, n) as (some, 1, n)."""
        return _cast(v, dtype) if v.dim() == 1 else _cast(v[self.examples], dtype).unsqueeze(1)

    def times(self, h: Tensor, v: Tensor) -> Tensor:
        """(k, tokens) times a vector: (k,), or (examples, k)."""
        v = _cast(v if v.dim() == 1 else v[self.examples], h.dtype)
        if v.dim() == 1:
            return h * v[:, None]
        return (h.view(len(h), len(v), -1) * v.t()[:, :, None]).view(h.shape)


def _whole(rows: tuple[int, int]) -> _Piece:
    return _Piece(slice(0, rows[0]), slice(0, rows[1]))


def _pieces(rows: tuple[int, int], size: int, device: torch.device) -> Iterator[_Piece]:
    """All of (examples, tokens): at once, or so much at a time as a cache holds."""
    examples, tokens = rows
    if device.type != "cpu":
        yield _whole(rows)
    elif examples == 1:
        yield from (_Piece(slice(0, 1), slice(i, i + size)) for i in range(0, tokens, size))
    else:
        step = max(1, size // max(1, tokens))
        yield from (_Piece(slice(i, i + step), slice(0, tokens)) for i in range(0, examples, step))


class _RandomizedLinear(torch.autograd.Function):
    # g = dL/dy; u = P_in (a x); h = value u; m = R h or h; q = P_out (b g) or U^T g; p = R^T q or q; v = value p
    #
    #   y = x W^T + bias + b P_out^T m                       dx = g W + a P_in^T v       da = sum x P_in^T v
    #   dvalue = sum u p     db = sum g P_out^T m            dR = q h^T                  dU = g^T h^T

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
        differentiated: bool,
    ) -> Tensor:
        ctx.into, ctx.out, ctx.x_shape, ctx.x_dtype = into, out, x.shape, x.dtype
        needs = ctx.needs_input_grad
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(kind)
            x = _cast(x, dtype)
            weight, bias = (None if t is None else _cast(t, dtype) for t in (weight, bias))
        else:
            dtype = torch.promote_types(x.dtype, value.dtype)
        ctx.dtype = dtype
        ctx.rows = _rows(x, any(v is not None and v.dim() > 1 for v in (value, a, b)))
        inner = x.reshape(*ctx.rows, x.shape[-1])
        kept: list[Tensor] = []
        with torch.autocast(kind, enabled=False):
            if weight is None:
                width = len(U) if out is None else out.width  # type: ignore[arg-type]  # one of the two is there
                y = x.new_zeros(*x.shape[:-1], width, dtype=dtype)
            else:
                y = linear_of_its_own(x, weight, bias)
            outer = y.view(*ctx.rows, y.shape[-1])
            size = into.piece if out is None else min(into.piece, out.piece)
            ctx.pieces = list(_pieces(ctx.rows, size, x.device))
            for piece in ctx.pieces:
                u = into.down(_cast(piece.of(inner), dtype), None if a is None else piece.beside(a, dtype))
                if differentiated and any(needs[5:10]):
                    kept.append(u)
                h = piece.times(u, value)
                if R is not None:
                    h = _cast(R, dtype) @ h
                if U is not None:
                    here = piece.of(outer)
                    here += (h.t() @ _cast(U, dtype).t()).view(here.shape)
                else:
                    assert out is not None
                    _add(piece.of(outer), out.spread(h), out.signs, None if b is None else piece.beside(b, dtype))
        ctx.save_for_backward(x if needs[6] else None, weight if needs[0] else None, value, a, b, R, U, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Everything was cast in the forward; a backward called inside autocast must not cast again.
        with torch.autocast(grad.device.type, enabled=False):
            return _RandomizedLinear._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_grad, _, bias_grad, _, _, value_grad, a_grad, b_grad, R_grad, U_grad, _ = ctx.needs_input_grad
        x, weight, value, a, b, R, U, *kept = ctx.saved_tensors
        into, out, dtype = ctx.into, ctx.out, ctx.dtype
        outer = grad.contiguous().view(*ctx.rows, grad.shape[-1])
        inner = None if x is None else x.reshape(*ctx.rows, x.shape[-1])
        dbias = outer.sum((0, 1)) if bias_grad else None
        dx = None
        if x_grad:
            shape = *ctx.rows, ctx.x_shape[-1]
            dx = outer.new_zeros(shape) if weight is None else (_cast(outer, weight.dtype) @ weight)
        dvalue, da, db = (_Sum(t) if wanted else None for t, wanted in ((value, value_grad), (a, a_grad), (b, b_grad)))
        dR = torch.zeros_like(R, dtype=dtype) if R_grad else None
        dU = torch.zeros_like(U, dtype=dtype) if U_grad else None
        for i, piece in enumerate(ctx.pieces):
            g = _cast(piece.of(outer), dtype)
            a_here, b_here = (None if t is None else piece.beside(t, dtype) for t in (a, b))
            # Nothing outlives its use: one more tensor of a piece is felt beside what is kept of all tokens.
            if dU is not None or db is not None:
                h = piece.times(kept[i], value)
                if dU is not None:
                    dU.addmm_(g.flatten(0, 1).t(), h.t())
                if db is not None:
                    db.add_products(piece, g, out.spread(h if R is None else _cast(R, dtype) @ h), out.signs)
                del h
            q = _cast(U, dtype).t() @ g.flatten(0, 1).t() if U is not None else out.down(g, b_here)
            p = q if R is None else _cast(R, dtype).t() @ q
            if dR is not None:
                dR.addmm_(q, piece.times(kept[i], value).t())
            if dvalue is not None:
                dvalue.add_components(piece, kept[i] * p)
            if x_grad or a_grad:
                v = piece.times(p, value)
                del p, q
                back = into.spread(v)
                if da is not None:
                    assert inner is not None
                    da.add_products(piece, _cast(piece.of(inner), dtype), back, into.signs)
                if dx is not None:
                    _add(piece.of(dx), back, into.signs, a_here)
                del v, back
        if dx is not None:
            dx = _cast(dx.view(ctx.x_shape), ctx.x_dtype)
        found = [None if each is None else each.total() for each in (dvalue, da, db)]
        dR, dU = (None if t is None else _cast(t, like.dtype) for t, like in ((dR, R), (dU, U)))
        return dx, None, dbias, None, None, *found, dR, dU, None


def _add(y: Tensor, z: Tensor, signs: Tensor | None, scale: Tensor | None) -> None:
    """y += scale sum_j signs_j z_j, in place: (examples, tokens, d) and (m, examples * tokens, d)."""
    for j, block in enumerate(z):
        factor = scale
        if signs is not None:
            factor = _cast(signs[j], z.dtype) if scale is None else _cast(signs[j], z.dtype) * scale
        block = block.view(y.shape)
        if factor is None:
            y += block
        elif y.dtype is z.dtype:
            y.addcmul_(block, factor)
        else:
            y += block * factor


class _Sum:
    """The gradient of a vector, piece by piece: over all tokens, or over those of each example."""

    def __init__(self, vector: Tensor) -> None:
        # Sums over many tokens are kept in float32 or wider.
        self._dtype = vector.dtype
        self._wide = torch.promote_types(vector.dtype, torch.float32)
        self._sum = torch.zeros_like(vector, dtype=self._wide)

    def add_components(self, piece: _Piece, products: Tensor) -> None:
        """Add a piece's products, (k, examples * tokens)."""
        if self._sum.dim() == 1:
            self._sum += products.sum(1, dtype=self._wide)
        else:
            here = self._sum[piece.examples]
            here += products.view(len(products), len(here), -1).sum(2, dtype=self._wide).t()

    def add_products(self, piece: _Piece, g: Tensor, z: Tensor, signs: Tensor | None) -> None:
        """Add sum_j signs_j g z_j, of (examples, tokens, d) and (m, examples * tokens, d)."""
        here = self._sum if self._sum.dim() == 1 else self._sum[piece.examples]
        for j, block in enumerate(z):
            total = (g * block.view(g.shape)).sum((0, 1) if here.dim() == 1 else 1, dtype=self._wide)
            here += total if signs is None else total * _cast(signs[j], self._wide)

    def total(self) -> Tensor:
        """In the vector's own shape and dtype."""
        return _cast(self._sum, self._dtype)
