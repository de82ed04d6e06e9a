from __future__ import annotations

import torch
import torch.nn.functional as F

from lightning_peft.functional.r_drop import symmetric_kl


def test_it_is_the_mean_of_both_divergences() -> None:
    first, second = torch.randn(2, 4, 3, dtype=torch.float64)
    p, q = first.softmax(-1), second.softmax(-1)
    both = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2
    torch.testing.assert_close(symmetric_kl(first, second), both.mean())
    assert symmetric_kl(first, first) == 0
    shown = torch.tensor([True, False, True, False])
    torch.testing.assert_close(symmetric_kl(first, second, shown), both[shown].mean())


def test_both_have_a_gradient() -> None:
    first = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(symmetric_kl, (first, second))
    symmetric_kl(first, second).backward()
    assert first.grad is not None
    assert second.grad is not None
    assert not torch.equal(first.grad, F.normalize(second.grad))
