from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import DEM, LoRA, Orthogonality, UntilTail, Warmup, regularized


def test_it_is_the_weighted_sum() -> None:
    loss = torch.tensor(1.5, requires_grad=True)
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    total = regularized(loss, {"a": a, "b": b}, {"a": 0.5, "b": 2.0})
    assert total.item() == 1.5 + 1.0 - 6.0
    total.backward()
    assert [t.grad.item() for t in (loss, a, b)] == [1.0, 0.5, 2.0]  # type: ignore[union-attr]


def test_without_terms_it_is_the_loss_itself() -> None:
    loss = torch.tensor(1.5)
    assert regularized(loss, {}, {"off": 0.0}) is loss


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_a_sum_is_taken_in_float32_or_wider(dtype: torch.dtype, wanted: torch.dtype) -> None:
    total = regularized(torch.ones((), dtype=dtype), {"a": torch.tensor(2**-12)}, {"a": 1.0})
    assert total.dtype == wanted
    assert total.item() == 1 + 2**-12


@pytest.mark.parametrize("total", [1, 2, 10, 99, 100])
def test_a_weight_until_the_tail(total: int) -> None:
    weight = UntilTail(0.3, tail=0.29)
    last = total - 29 * total // 100
    assert [weight(step, total) for step in range(1, total + 1)] == [0.3] * last + [0.0] * (total - last)


@pytest.mark.parametrize(("share", "total"), [(0.1, 100), (0.29, 100), (1.0, 7), (0.1, 5), (0.0, 5)])
def test_a_weight_that_warms_up(share: float, total: int) -> None:
    length = round(share * 100) * total // 100
    found = [Warmup(0.5, share)(step, total) for step in range(1, total + 1)]
    assert found == [0.5 * min(1.0, step / length) if length else 0.5 for step in range(1, total + 1)]


def test_schedules_of_weights_combine() -> None:
    for weight in (Warmup(UntilTail(0.5, tail=0.2), share=0.4), UntilTail(Warmup(0.5, share=0.4), tail=0.2)):
        found = [weight(step, 10) for step in range(1, 11)]
        assert found == [0.125, 0.25, 0.375, *[0.5] * 5, 0.0, 0.0]
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share is the part of the run that warms up, from 0 to 1"):
            Warmup(0.5, share)


def test_a_weight_is_a_number_or_a_schedule() -> None:
    assert DEM(0.3).weight_at(7, 10) == 0.3
    assert Orthogonality(lambda step, total: step / total).weight_at(7, 10) == 0.7


def test_two_terms_of_one_class_in_a_plain_loop() -> None:
    """The callback's twin, as its error for manual optimization names it."""
    module = nn.Sequential(LoRA(nn.Linear(4, 4), rank=2))
    terms = {"first": DEM(0.3), "second": DEM(0.2)}
    weights = {name: term.weight_at(1, 10) for name, term in terms.items()}
    values = {name: term(module, None, None) for name, term in terms.items()}
    loss = module(torch.randn(3, 4)).square().mean()
    torch.testing.assert_close(regularized(loss, values, weights), loss + 0.5 * values["first"])
