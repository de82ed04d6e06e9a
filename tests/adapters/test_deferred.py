from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

from lightning_peft.adapters.deferred import Deferred


class Counts:
    """Gives a product of factors, and counts how often."""

    def __init__(self) -> None:
        self.a = torch.randn(4, 2, requires_grad=True)
        self.b = torch.randn(2, 3, requires_grad=True)
        self.times = 0

    def __call__(self) -> Tensor:
        self.times += 1
        return self.a @ self.b


def test_what_is_known_computes_nothing() -> None:
    counts = Counts()
    deferred = Deferred(torch.empty(4, 3), counts)
    assert isinstance(deferred, Tensor)
    assert (deferred.dtype, deferred.shape, deferred.device) == (torch.float32, (4, 3), torch.device("cpu"))
    assert (deferred.ndim, deferred.dim(), deferred.numel(), deferred.size(0)) == (2, 2, 12, 4)
    assert deferred.dtype != torch.int8
    assert deferred.is_floating_point()
    assert counts.times == 0


def test_whoever_uses_it_gets_the_values_and_their_gradient() -> None:
    counts = Counts()
    deferred, x = Deferred(torch.empty(4, 3), counts), torch.randn(5, 3)
    y = nn.functional.linear(x, deferred)
    assert type(y) is Tensor
    assert torch.equal(y, x @ counts().T)
    y.sum().backward()
    assert counts.a.grad is not None
    assert torch.allclose(counts.a.grad, torch.ones(4, 5) @ x @ counts.b.T)
    for other in (deferred + 0, torch.stack([deferred])[0], deferred.t().t(), deferred.detach(), deferred.clone()):
        assert type(other) is Tensor
        assert torch.equal(other, counts())
    assert deferred.requires_grad
    assert deferred.tolist() == counts().tolist()
    assert torch.equal(copy.deepcopy(deferred.detach()), counts())
    torch.save(deferred.detach(), io.BytesIO())
    assert "0" in repr(deferred)


def test_an_autograd_function_gets_the_values() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, *g: Tensor) -> Tensor:
            return g[0] * 2

    counts = Counts()
    assert torch.equal(Twice.apply(Deferred(torch.empty(4, 3), counts)), 2 * counts().detach())
