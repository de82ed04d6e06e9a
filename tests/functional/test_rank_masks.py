from __future__ import annotations

from math import exp, inf, log
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.functional.rank_masks import (
    deviation,
    excess,
    gumbel,
    keep_probability,
    misplaced,
    prefix,
    relaxed,
    require_ratio,
    select_ranks,
    straight_through,
    whole_ranks,
)

TAU, SHIFT = 0.4, 3.0


def draw(logits: Tensor, step: int, seed: int = 0) -> Tensor:
    noise = gumbel(logits.numel(), seed, step).view_as(logits)
    return straight_through(relaxed(logits, noise, TAU, SHIFT))


def test_property_2_draws_keep_as_often_as_said() -> None:
    """1e5 draws of 9 logits, from nearly never to nearly always: within three standard deviations."""
    logits, draws = torch.linspace(-6.0, -1.5, 9), 100_000
    kept = draw(logits.expand(draws, 9), step=4).double().mean(0)
    wanted = torch.tensor([1 - exp(-exp(float(o) + SHIFT)) for o in logits], dtype=torch.float64)
    assert torch.allclose(keep_probability(logits, SHIFT).double(), wanted, rtol=1e-6)
    assert ((kept - wanted).abs() < 3 * (wanted * (1 - wanted) / draws).sqrt()).all()
    assert wanted.min() < 0.06
    assert wanted.max() > 0.98


def test_the_probability_is_not_a_sigmoid() -> None:
    """One Gumbel sample per element, not the difference of two: half is at log log 2, not at 0."""
    middle = torch.tensor([log(log(2)) - SHIFT, -SHIFT])
    assert keep_probability(middle, SHIFT).tolist() == pytest.approx([0.5, 1 - exp(-1)], abs=1e-6)


def test_property_3_straight_through_is_zero_or_one_with_the_soft_gradient() -> None:
    logits = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)) * 3 - 3
    logits.requires_grad_(True)
    noise = gumbel(logits.numel(), 0, 0).view_as(logits)
    mask = straight_through(relaxed(logits, noise, TAU, SHIFT))
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    (gradient,) = torch.autograd.grad(mask.sum(), logits)
    y = torch.sigmoid((logits.detach() + noise + SHIFT) / TAU)
    assert torch.equal(mask.detach(), (y > 0.5).float())
    assert torch.allclose(gradient, y * (1 - y) / TAU, rtol=1e-5, atol=1e-8)


def test_noise_depends_on_seed_and_step_alone() -> None:
    state = torch.get_rng_state()
    first = gumbel(1000, seed=3, step=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    assert torch.equal(first, gumbel(1000, seed=3, step=7))
    for seed, step in ((3, 8), (4, 7), (7, 3), (3 + 2**32, 7)):
        assert not torch.equal(first, gumbel(1000, seed, step))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(first, gumbel(1000, seed=3, step=7))
    finally:
        torch.set_default_dtype(torch.float32)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(200_000, 0, 0).double()
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("spent", [0.0, 40.0, 99.9, 100.0])
def test_property_4_within_the_budget_there_is_neither_penalty_nor_gradient(spent: float) -> None:
    T = torch.tensor(spent, requires_grad=True)
    R = excess(T, 100.0)
    (gradient,) = torch.autograd.grad(R, T)
    assert (float(R.detach()), float(gradient)) == (0.0, 0.0)


@pytest.mark.parametrize("ratio", [1.001, 1.5, 3.0])
def test_property_4_above_the_budget_it_is_the_log_ratio(ratio: float) -> None:
    T = torch.tensor(1e8 * ratio, requires_grad=True)
    R = excess(T, 1e8)
    (gradient,) = torch.autograd.grad(R, T)
    assert float(R.detach()) == pytest.approx(log(ratio), rel=1e-4)
    assert float(gradient) == pytest.approx(1 / (1e8 * ratio), rel=1e-5)


@pytest.mark.parametrize("ratio", [1.001, 1.5, 3.0])
def test_property_4_two_sides_are_symmetric_in_the_log_ratio(ratio: float) -> None:
    over, under = (float(deviation(torch.tensor(1e8 * r), 1e8)) for r in (ratio, 1 / ratio))
    assert over == pytest.approx(log(ratio), rel=1e-4)
    assert under == pytest.approx(over, rel=1e-4)
    nothing = torch.tensor(0.0, requires_grad=True)
    deviation(nothing, 1e8).backward()
    assert nothing.grad is not None
    assert nothing.grad.isfinite()
    met = torch.tensor(1e8, requires_grad=True)
    deviation(met, 1e8).backward()
    assert float(met.grad) == 0  # type: ignore[arg-type]


def test_property_5_alignment_is_zero_for_a_prefix_and_only_there() -> None:
    s = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.0])
    for bits in range(32):
        mask = torch.tensor([float(bits >> i & 1) for i in range(5)])
        seen = mask[:4]  # where s is not 0
        is_prefix = bool((seen.diff() <= 0).all()) and not (mask[4] and not seen.all())
        assert (float(misplaced(mask, s)) == 0) == is_prefix, mask
    # What is at a place where s is 0 stands for a component that a prefix would have.
    assert float(misplaced(torch.tensor([1.0, 0, 0, 0, 1]), s)) == 9


def test_property_5_a_swap_costs_the_energy_of_both() -> None:
    s = torch.tensor([5.0, 3.0, 2.0, 1.0])
    assert float(misplaced(torch.tensor([1.0, 0, 0, 1]), s)) == pytest.approx(3**2 + 1**2)
    assert float(misplaced(torch.tensor([0.0, 1, 1, 0]), s)) == pytest.approx(5**2 + 2**2)


def test_alignment_pulls_what_is_misplaced_and_nothing_else() -> None:
    """The gradient: down for a kept tail, up for a dropped head, none through the count."""
    s = torch.tensor([5.0, 3.0, 2.0, 1.0])
    mask = torch.tensor([1.0, 0, 0, 1], requires_grad=True)
    misplaced(mask, s).backward()
    assert mask.grad.tolist() == [0, -2 * 3**2, 0, 2 * 1**2]  # type: ignore[union-attr]


def test_a_prefix_keeps_the_count_row_by_row() -> None:
    mask = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert prefix(mask).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]


def rows(seed: int = 0) -> dict[str, Tensor]:
    """Keep probabilities that fall, of layers of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 12, "b": 12, "c": 30, "d": 7}
    return {name: torch.rand(n, generator=generator).sort(descending=True).values for name, n in sizes.items()}


COSTS = {"a": 24, "b": 24, "c": 70, "d": 107}
DENSE = {"a": 144, "b": 144, "c": 1200, "d": 700}


def select(found: dict[str, Tensor], *args: Any, **also: Any) -> dict[str, int]:
    """What is selected where as many are wanted as are kept on average."""
    return select_ranks(wanted(found), found, *args, **also)


def wanted(found: dict[str, Tensor]) -> dict[str, int]:
    sizes = {name: len(row) for name, row in found.items()}
    return whole_ranks({name: float(row.sum()) for name, row in found.items()}, sizes)


def spent(ranks: dict[str, int], dense: dict[str, int] | None = None) -> int:
    return sum(min(k * COSTS[n], inf if dense is None else dense[n]) for n, k in ranks.items())  # type: ignore[misc]


def test_whole_ranks_are_within_what_a_layer_has() -> None:
    assert whole_ranks({"a": 20.4, "b": 0.2, "c": 7.9}, {"a": 44, "b": 3, "c": 7}) == {"a": 20, "b": 1, "c": 7}
    assert whole_ranks({"a": 0.0, "b": 0.0}, {"a": 1, "b": 3}, minimum=2) == {"a": 1, "b": 2}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("amount", [225, 500, 1000, 2000, 10_000])
@pytest.mark.parametrize("dense", [None, DENSE], ids=["factors", "cheapest"])
def test_property_8_the_budget_is_kept_and_used_up(seed: int, amount: int, dense: dict[str, int] | None) -> None:
    found = rows(seed)
    ranks = select(found, COSTS, amount, dense=dense)
    assert spent(ranks, dense) <= amount
    for name, k in ranks.items():
        assert 1 <= k <= len(found[name])
        if k < len(found[name]):
            assert spent(ranks | {name: k + 1}, dense) > amount
            if dense is not None:
                assert k * COSTS[name] < dense[name]  # a layer that is dense is whole


def test_property_8_selection_is_deterministic_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    first = select(rows(), COSTS, 900)
    torch.manual_seed(99)
    assert select(rows(), COSTS, 900) == first
    torch.set_rng_state(state)
    select(rows(), COSTS, 900)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_refill_ranks_only_fall() -> None:
    found = rows()
    kept = select(found, COSTS, 10_000, refill=False)
    assert kept == wanted(found)
    fallen = select(found, COSTS, 900, refill=False)
    assert all(fallen[name] <= k for name, k in kept.items())
    assert spent(fallen) <= 900 < spent(kept)
    assert spent(fallen) <= spent(select(found, COSTS, 900)) <= 900


def test_the_layer_whose_last_component_is_kept_least_often_gives_it_up() -> None:
    found = {"a": torch.tensor([1.0, 0.9, 0.6]), "b": torch.tensor([1.0, 0.8, 0.7])}
    costs = {"a": 10, "b": 10}
    assert select(found, costs, 50, refill=False) == {"a": 2, "b": 2}
    assert select(found, costs, 50) == {"a": 2, "b": 3}  # one is left, and b's next is kept more often
    assert select(found, costs, 30) == {"a": 2, "b": 1}
    tied = {"a": torch.tensor([1.0, 0.9]), "b": torch.tensor([1.0, 0.9])}
    assert select(tied, costs, 30) == {"a": 1, "b": 2}  # the earlier layer's goes first
    assert select(tied, {"a": 10, "b": 11}, 32) == {"a": 2, "b": 1}  # the dearer


def test_where_dense_is_as_cheap_a_layer_keeps_all() -> None:
    """12 components of 24 parameters, 144 as a matrix: from 6 on the matrix is cheaper."""
    assert select({"a": torch.ones(12)}, {"a": 24}, 144, dense={"a": 144}) == {"a": 12}
    assert select({"a": torch.ones(12)}, {"a": 24}, 144) == {"a": 6}
    assert select({"a": torch.ones(12)}, {"a": 24}, 143, dense={"a": 144}) == {"a": 5}


def test_what_cannot_be() -> None:
    with pytest.raises(
        ValueError,
        match="a budget of 224 parameters does not pay for the minimum of 1 in each of 4 layers, which has 225",
    ):
        select(rows(), COSTS, 224)
    for ratio in (0, 1.2, -0.1, float("nan")):
        with pytest.raises(ValueError, match="ratio is the share of the factorised layers' parameters that is kept"):
            require_ratio(ratio)
    with pytest.raises(TypeError, match="ratio must be a number. Got '0.5'."):
        require_ratio("0.5")


def test_many_ranks_are_selected_at_once() -> None:
    """72 layers of 768 components, as BERT-base has them, down to the uniform rank of the ratio 0.48."""
    found = {str(i): torch.linspace(1, 0.2 + 0.01 * i, 768) for i in range(72)}
    ranks = select(found, dict.fromkeys(found, 1536), 72 * 253 * 1536)
    assert sum(ranks.values()) == 72 * 253
    assert ranks["71"] > ranks["0"]
