"""Layers whose weight holds trained entries: autograd functions that give these entries a gradient, and no other one.

The weight has been written already, W.flat[I] = original + value * delta, and is a constant to autograd. Each function
passes on what a layer with such a weight gives, and in the backward finds

    d delta_j = value_j e_j        d value_i = sum over j of component i of e_j delta_j        e: dL/dW at the entries

so that any number of forwards may come before their backwards, as long as nothing is written between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_peft.functional.sparse import Kernel, Pattern, embedding_entry_gradient, entry_gradient


@dataclass(frozen=True)
class Entries:
    """The trained entries of a weight, as a backward needs them.

    Attributes:
        delta: (k,), or (n, s) for n components of s entries.
        value: (n,), what multiplies the components.
        pattern: where the entries are in the weight as it is stored.
        kernel: see :func:`~lightning_peft.functional.sparse.entry_gradient`.
        transposed: whether the weight is stored as (d_in, d_out).
        after: called when a backward has found their gradient, so that an optimizer may change them next.
    """

    delta: Tensor
    value: Tensor
    pattern: Pattern
    kernel: Kernel | None = None
    transposed: bool = False
    after: Callable[[], None] | None = None


def spread(value: Tensor, delta: Tensor) -> Tensor:
    """What multiplies each entry: (n,) of components, in the shape that multiplies delta."""
    return value if delta.dim() == 1 else value[:, None]


def linear_entries(y: Tensor, x: Tensor, entries: Entries, fresh: bool = True) -> Tensor:
    """y, through which the entries of the weight that made it from x get their gradient.

    Args:
        y: (..., d_out), x W^T + b.
        x: (..., d_in).
        entries: of W.
        fresh: whether y is a tensor that nobody else has and no view; else it is copied.

    Returns:
        (..., d_out), y's numbers.
    """
    result: Tensor = _Linear.apply(y, x, entries.delta, entries.value, entries, fresh)  # type: ignore[no-untyped-call]
    return result


def embedding_entries(
    y: Tensor, ids: Tensor, entries: Entries, padding: int | None = None, fresh: bool = True
) -> Tensor:
    """y, through which the entries of the embedding that made it get their gradient.

    Args:
        y: (..., n), the embedding's output.
        ids: (...), what was looked up.
        entries: of the weight, (m, n).
        padding: a row that gets no gradient.
        fresh: whether y is a tensor that nobody else has and no view; else it is copied.

    Returns:
        (..., n), y's numbers.
    """
    result: Tensor = _Embedding.apply(y, ids, entries.delta, entries.value, entries, padding, fresh)  # type: ignore[no-untyped-call]
    return result


def weight_entries(weight: Tensor, entries: Entries) -> Tensor:
    """The weight, for whoever reads it: its entries get their part of its gradient, which is dense for a moment.

    Args:
        weight: W, of any shape, with the entries in it.
        entries: of W.

    Returns:
        W, in the same memory.
    """
    result: Tensor = _Weight.apply(weight, entries.delta, entries.value, entries)  # type: ignore[no-untyped-call]
    return result


def _save(ctx: Any, entries: Entries, delta_grad: bool, value_grad: bool, *tensors: Tensor) -> None:
    ctx.pattern, ctx.kernel, ctx.transposed = entries.pattern, entries.kernel, entries.transposed
    ctx.after, ctx.dtype, ctx.shape = entries.after, entries.delta.dtype, entries.delta.shape
    wanted = delta_grad or value_grad
    ctx.save_for_backward(
        # Without its version: DDP writes the same mask anew at every forward, perhaps before this one's backward.
        entries.value.data if delta_grad else None,
        entries.delta if value_grad else None,
        *(tensors if wanted else (None,) * len(tensors)),
    )


def _gradients(
    ctx: Any, found: Tensor, value: Tensor | None, delta: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient of the entries, (k,), to those of delta and value; saved tensors are what `_save` has saved."""
    found = found.to(ctx.dtype).view(ctx.shape)
    if ctx.after is not None:
        ctx.after()
    dvalue = None
    if delta is not None:
        products = found * delta
        dvalue = products if delta.dim() == 1 else products.sum(1)
    return (None if value is None else found * spread(value.to(found.dtype), found)), dvalue


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, delta: Tensor, value: Tensor, entries: Entries, fresh: bool) -> Tensor:
        _save(ctx, entries, ctx.needs_input_grad[2], ctx.needs_input_grad[3], x)
        if not fresh:
            return y.clone()
        # No view, which could not be changed in place afterwards.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, delta, x = ctx.saved_tensors  # once: recomputation unpacks what it computes again
        if x is None:
            return grad, None, None, None, None, None
        a, b = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.transposed:
            a, b = b.to(a.dtype), a
        # Inside autocast "dense" would be cast once more.
        with torch.autocast(grad.device.type, enabled=False):
            found = entry_gradient(a, b, ctx.pattern, ctx.kernel)
        ddelta, dvalue = _gradients(ctx, found, value, delta)
        return grad, None, ddelta, dvalue, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        ids: Tensor,
        delta: Tensor,
        value: Tensor,
        entries: Entries,
        padding: int | None,
        fresh: bool,
    ) -> Tensor:
        _save(ctx, entries, ctx.needs_input_grad[2], ctx.needs_input_grad[3], ids)
        ctx.padding = padding
        if not fresh:
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, delta, ids = ctx.saved_tensors
        if ids is None:
            return grad, None, None, None, None, None, None
        rows = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        found = embedding_entry_gradient(rows, ids.reshape(-1), ctx.pattern, ctx.padding)
        ddelta, dvalue = _gradients(ctx, found, value, delta)
        return grad, None, ddelta, dvalue, None, None, None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, delta: Tensor, value: Tensor, entries: Entries) -> Tensor:
        _save(ctx, entries, ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ddelta, dvalue = _gradients(ctx, grad.reshape(-1)[ctx.pattern.indices], *ctx.saved_tensors)
        return None, ddelta, dvalue, None
