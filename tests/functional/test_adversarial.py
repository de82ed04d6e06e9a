from __future__ import annotations

import torch

from lightning_peft.functional.adversarial import ascend


def test_a_step_has_its_length_in_every_example() -> None:
    delta, gradient = torch.zeros(3, 4, 5), torch.randn(3, 4, 5) * torch.tensor([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
    moved = ascend(delta, gradient, step=0.5)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((3,), 0.5))
    torch.testing.assert_close(torch.cosine_similarity(moved.flatten(1), gradient.flatten(1)), torch.ones(3))


def test_it_stays_within_the_radius_and_short_ones_are_left_alone() -> None:
    delta, gradient = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    delta[0] *= 1e-3
    free, held = ascend(delta, gradient, 0.5), ascend(delta, gradient, 0.5, radius=0.6)
    assert torch.equal(free[0], held[0])
    torch.testing.assert_close(held[1].norm(), torch.tensor(0.6))
    torch.testing.assert_close(held[1] / held[1].norm(), free[1] / free[1].norm())


def test_where_there_is_no_slope_nothing_moves() -> None:
    delta = torch.randn(2, 3, 4)
    assert torch.equal(ascend(delta, torch.zeros(2, 3, 4), 1.0), delta)
    assert torch.equal(ascend(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 1.0, radius=1.0), torch.zeros(2, 3, 4))


def test_it_climbs() -> None:
    """On a quadratic, whose slope is known: the loss after a step is larger, as much as the slope says."""
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    delta = torch.zeros_like(x, requires_grad=True)
    (gradient,) = torch.autograd.grad((x + delta).square().sum(), delta)
    moved = ascend(delta, gradient, 0.01)
    rise = (x + moved).square().sum() - x.square().sum()
    torch.testing.assert_close(rise, 0.01 * gradient.norm() + 0.01**2, rtol=1e-5, atol=0)
    assert not moved.requires_grad
