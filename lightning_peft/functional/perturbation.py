"""Weights drawn from a Gaussian by reparametrisation, so that gradients reach its mean and its standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

LOWEST, HIGHEST = -12.0, 0.0
"""The limits of log sigma: below, noise is lost in float32; above, there is nothing left of a weight."""

_TINY = 1e-24  # a variance, whose square root still has a finite slope


def log_sigma(offset: Tensor, start: Tensor, speed: float) -> Tensor:
    """log sigma = start + speed * offset, within its limits.

    Args:
        offset: (k,), what is trained, from 0.
        start: (k,) or ().
        speed: how much faster than its offset log sigma moves.
    """
    return (start + speed * offset).clamp(LOWEST, HIGHEST)


def perturbed(
    means: Sequence[Tensor],
    offset: Tensor,
    start: Tensor,
    speed: float,
    noise: Tensor,
    by_example: Sequence[bool],
    examples: int,
) -> tuple[Tensor, ...]:
    """mu + sigma eps, for tensors whose log sigma are parts of one vector.

        d mu = d w,     d log sigma = d w eps sigma

    One node of the graph for all of them. It keeps nothing that autograd frees, because re-entrant activation
    checkpointing comes by once for every part that it computes again.

    Args:
        means: mu, of any shapes and k entries together.
        offset: (k,), see :func:`log_sigma`.
        start: (k,) or ().
        speed: of :func:`log_sigma`.
        noise: standard normal: first the entries of means that have one draw, then (examples, their entries) of those
            that have one for every example.
        by_example: for each mean, whether it has one draw for every example; it is a vector then.
        examples: how many.

    Returns:
        Tensors of the means' shapes and dtypes; (examples, n) where there is a draw for every example.
    """
    result: tuple[Tensor, ...] = _Perturbed.apply(  # type: ignore[no-untyped-call]
        offset, start, speed, noise, tuple(by_example), examples, *means
    )
    return result


class _Perturbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        offset: Tensor,
        start: Tensor,
        speed: float,
        noise: Tensor,
        by_example: tuple[bool, ...],
        examples: int,
        *means: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        log = start + speed * offset
        sigma = log.clamp(LOWEST, HIGHEST).exp_()
        sizes = [mean.numel() for mean in means]
        ctx.slope = sigma * speed * ((log >= LOWEST) & (log <= HIGHEST))
        ctx.sizes, ctx.by_example, ctx.dtypes = sizes, by_example, [mean.dtype for mean in means]
        once = sum(size for size, many in zip(sizes, by_example, strict=True) if not many)
        ctx.eps, ctx.rows = noise[:once], noise[once:].view(examples, -1) if any(by_example) else None
        parts, wide = sigma.split(sizes), [mean.to(sigma.dtype) for mean in means]
        alone = [i for i, many in enumerate(by_example) if not many]
        each = [i for i, many in enumerate(by_example) if many]
        out = list(means)
        if alone:
            scale = sigma if not each else torch.cat([parts[i] for i in alone])
            deltas = (scale * ctx.eps).split([sizes[i] for i in alone])
            found = torch._foreach_add(
                [delta.view_as(wide[i]) for delta, i in zip(deltas, alone, strict=True)], [wide[i] for i in alone]
            )
            for i, value in zip(alone, found, strict=True):
                out[i] = value.to(means[i].dtype)
        if each:
            assert ctx.rows is not None
            block = torch.cat([wide[i] for i in each]) + torch.cat([parts[i] for i in each]) * ctx.rows
            for i, value in zip(each, block.split([sizes[i] for i in each], 1), strict=True):
                # Of its own: an output of a node may not share memory with another.
                out[i] = value.to(means[i].dtype, memory_format=torch.contiguous_format, copy=True)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        alone = [i for i, many in enumerate(ctx.by_example) if not many]
        each = [i for i, many in enumerate(ctx.by_example) if many]
        by_mean: list[Tensor | None] = list(grads)
        by_sigma: list[Tensor] = [ctx.slope] * len(grads)
        if alone:
            eps = ctx.eps.split([ctx.sizes[i] for i in alone])
            there = [(i, part) for i, part in zip(alone, eps, strict=True) if grads[i] is not None]
            flat = [grads[i].reshape(-1).to(part.dtype) for i, part in there]  # type: ignore[union-attr]
            found = torch._foreach_mul(flat, [part for _, part in there]) if there else ()
            for i, part in zip(alone, eps, strict=True):
                by_sigma[i] = torch.zeros_like(part) if grads[i] is None else part
            for (i, _), value in zip(there, found, strict=True):
                by_sigma[i] = value
        if each:
            sizes = [ctx.sizes[i] for i in each]
            rows = [
                ctx.rows.new_zeros(len(ctx.rows), ctx.sizes[i]) if grads[i] is None else grads[i].to(ctx.rows.dtype)  # type: ignore[union-attr]
                for i in each
            ]
            block = torch.cat(rows, 1)
            for i, value in zip(each, block.sum(0).split(sizes), strict=True):
                by_mean[i] = None if grads[i] is None else value.to(ctx.dtypes[i])
            for i, value in zip(each, (block * ctx.rows).sum(0).split(sizes), strict=True):
                by_sigma[i] = value
        return (torch.cat(by_sigma) * ctx.slope, None, None, None, None, None, *by_mean)


def perturbed_output(
    x: Tensor, output: Tensor, weight_sigma: Tensor | None, bias_sigma: Tensor | None, eps: Tensor
) -> Tensor:
    """The output of a linear layer whose weight is drawn anew for every example.

        y_i + sqrt( (x_i^2) (sigma_W^2)^T + sigma_b^2 ) eps_i

    The same distribution as a weight of its own for every row of x, without these weights: outputs of a row are
    independent Gaussians (the local reparametrisation).

    Args:
        x: (batch, d_in), the layer's input.
        output: (batch, d_out), at the mean.
        weight_sigma: (d_out, d_in), or none.
        bias_sigma: (d_out,), or none.
        eps: (batch, d_out), standard normal.

    Reference:
        Kingma et al., Variational dropout and the local reparameterization trick, 2015 (remembered).
    """
    with torch.autocast(x.device.type, enabled=False):
        variance = torch.zeros_like(eps)
        if weight_sigma is not None:
            variance = linear(x.to(eps.dtype).square(), weight_sigma.square())
        if bias_sigma is not None:
            variance = variance + bias_sigma.square()
        return output + (variance.clamp_min(_TINY).sqrt() * eps).to(output.dtype)
