"""Terms of the loss beside re-entrant activation checkpointing under DDP.

DDP expects the gradient of a parameter once per backward pass. A re-entrant checkpoint runs a backward pass of its own
inside the backward pass: a parameter that is used in it and in a term of the loss then has its gradient twice, and DDP
stops ("marked as ready twice"). Here a term's gradient is put down before the model's backward begins, where it counts
as none, and what the model adds is announced as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointFunction


def recomputes(value: Tensor) -> bool:
    """Whether a re-entrant checkpoint is in what a value was computed from. Looks at every node of its graph."""
    seen: set[Any] = {value.grad_fn}
    waiting = [value.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None:
            continue
        kind = getattr(node, "_forward_cls", None)
        if kind is not None and issubclass(kind, CheckpointFunction):
            return True
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


def with_early_gradients(loss: Tensor, term: Tensor, others: Sequence[nn.Parameter], own: Sequence[Tensor]) -> Tensor:
    """loss + term, whose gradient is in `others` before that of the loss is computed.

    Args:
        loss: the task's loss, a scalar that requires grad.
        term: what is added; nothing of it may come from a re-entrant checkpoint.
        others: parameters that the model uses as well.
        own: parameters that the term alone uses; their gradient goes the usual way.
    """
    if not term.requires_grad:
        return loss + term
    total: Tensor = _Early.apply(loss, [term], list(others), *own)  # type: ignore[no-untyped-call]
    return total


class _Early(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, term: list[Tensor], others: list[nn.Parameter], *own: Tensor) -> Tensor:
        ctx.term, ctx.others, ctx.own = term[0], others, own
        return loss + term[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        others: list[nn.Parameter] = ctx.others
        wanted = [*others, *ctx.own]
        grad: Callable[..., Sequence[Tensor | None]] = torch.autograd.grad
        found = grad(ctx.term, wanted, slope.to(ctx.term.dtype), allow_unused=True)
        for parameter, gradient in zip(others, found[: len(others)], strict=True):
            if gradient is None:
                continue
            before = parameter.grad
            if before is None:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in the parameter's own layout
            else:
                before.add_(gradient)
        return (slope, None, None, *found[len(others) :])
