"""The gradients of an open step, kept and put back."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lightning_peft import LoRA, RankBudget, inject
from lightning_peft.accumulation import partial_gradients, restore_gradients


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        inject(net, partial(LoRA, rank=2))
    for site in RankBudget.of(net).values():
        site.gate.mask.requires_grad_(True)
    return net


def test_gradients_of_adapters_head_and_masks_return_bit_for_bit() -> None:
    net, other = model(), model()
    net(torch.randn(3, 6)).square().sum().backward()
    state = partial_gradients(net)
    assert state["sharded"] == {}
    (own,) = state["ranks"]
    assert own.keys() == {*(f"{i}.{part}" for i in (0, 2) for part in ("A", "B", "gate.mask")), "4.weight", "4.bias"}
    restore_gradients(other, state)
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (name not in own)
        assert p.grad is None or torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    for name, site in RankBudget.of(net).items():
        assert torch.equal(site.gate.mask.grad, RankBudget.of(other)[name].gate.mask.grad)  # type: ignore[arg-type]


def test_what_is_kept_does_not_follow_the_model() -> None:
    net = model()
    net(torch.ones(3, 6)).sum().backward()
    state = partial_gradients(net)
    before = state["ranks"][0]["4.weight"].clone()
    net(torch.ones(3, 6)).sum().backward()
    restore_gradients(other := model(), state)
    other[4].weight.grad.zero_()
    assert torch.equal(state["ranks"][0]["4.weight"], before)


def test_another_number_of_processes_gets_the_mean_and_a_missing_gradient_counts_as_zero() -> None:
    net = model()
    first, second = {"4.bias": torch.tensor([1.0, 4.0])}, {"4.bias": torch.tensor([3.0, 0.0]), "0.A": torch.ones(2, 6)}
    restore_gradients(net, {"sharded": {"4.weight": torch.full((2, 4), 7.0)}, "ranks": [first, second]})
    assert torch.equal(net[4].bias.grad, torch.tensor([2.0, 2.0]))
    assert torch.equal(net[0].A.grad, torch.full((2, 6), 0.5))
    assert torch.equal(net[4].weight.grad, torch.full((2, 4), 7.0))
    assert net[2].A.grad is None
