from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft.rank import close_lowest, close_some, open_best, open_highest, weighed


def scores(**layers: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in layers.items()}


def closed(masks: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: (~mask).nonzero().flatten().tolist() for name, mask in masks.items()}


ONES = {"a": 1, "b": 1}


def test_the_lowest_of_all_layers_are_closed() -> None:
    masks = close_lowest(scores(a=[0.5, 0.1, 0.9], b=[0.2, 0.8, 0.3]), ONES, amount=3)
    assert closed(masks) == {"a": [1], "b": [0, 2]}
    assert all(mask.dtype == torch.bool and mask.device.type == "cpu" for mask in masks.values())


@pytest.mark.parametrize("amount", range(7))
def test_the_count_is_exact_whatever_the_ties(amount: int) -> None:
    masks = close_lowest(scores(a=[0.5, 0.5, 0.5], b=[0.5, 0.5, 0.5]), ONES, amount)
    assert sum(int((~mask).sum()) for mask in masks.values()) == amount


def test_ties_are_broken_by_layer_order_then_index() -> None:
    assert closed(close_lowest(scores(a=[0.5, 0.5], b=[0.5, 0.5]), ONES, 3)) == {"a": [0, 1], "b": [0]}
    assert closed(close_lowest(scores(b=[0.5, 0.5], a=[0.5, 0.5]), ONES, 3)) == {"b": [0, 1], "a": [0]}


def test_float32_scores_keep_their_order() -> None:
    near = torch.tensor([1.0, 1.0 + 2**-23])
    assert closed(close_lowest({"a": near.flip(0)}, {"a": 1}, 1)) == {"a": [1]}


def test_every_layer_keeps_its_best() -> None:
    masks = close_lowest(scores(a=[0.1, 0.2, 0.3], b=[0.7, 0.8, 0.9]), ONES, amount=4, minimum=1)
    assert closed(masks) == {"a": [0, 1], "b": [0, 1]}
    assert closed(close_lowest(scores(a=[0.5, 0.5], b=[0.5, 0.5]), ONES, 2, minimum=1)) == {"a": [1], "b": [1]}


def test_prices_are_paid_until_enough_is_closed() -> None:
    some = scores(a=[0.1, 0.3], b=[0.2, 0.4])
    sizes = {"a": 10, "b": 3}
    assert closed(close_lowest(some, sizes, 10)) == {"a": [0], "b": []}
    assert closed(close_lowest(some, sizes, 11)) == {"a": [0], "b": [0]}
    assert closed(close_lowest(some, sizes, 13)) == {"a": [0], "b": [0]}
    assert closed(close_lowest(some, sizes, 14)) == {"a": [0, 1], "b": [0]}


def test_nothing_to_do() -> None:
    assert close_lowest({}, {}, 0) == {}
    assert closed(close_lowest(scores(a=[0.0, 0.0], b=[0.0]), ONES, 0)) == {"a": [], "b": []}


def test_it_does_not_change_its_input() -> None:
    some = scores(a=[0.5, 0.1])
    close_lowest(some, {"a": 1}, 1, minimum=1)
    assert some["a"].tolist() == pytest.approx([0.5, 0.1])


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_closed_first_and_named(broken: float) -> None:
    with pytest.warns(UserWarning, match="importance is not finite in b: training has diverged there, lower the"):
        masks = close_lowest(scores(a=[0.1, 0.2], b=[0.3, broken]), ONES, 2)
    assert closed(masks) == {"a": [0], "b": [1]}


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="cannot close 3: keeping 1 components in every layer leaves 2 to close."):
        close_lowest(scores(a=[0.1, 0.2], b=[0.1, 0.2]), ONES, 3, minimum=1)


def opened(masks: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}


def masks(**layers: list[int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=torch.bool) for name, values in layers.items()}


def test_layers_take_turns_in_the_order_of_their_worth() -> None:
    now = masks(a=[1, 0, 0, 0], b=[1, 0, 0, 0], c=[1, 0, 0, 0])
    even = {name: torch.zeros(4) for name in now}
    worth, sizes = {"a": 0.1, "b": 0.9, "c": 0.5}, dict.fromkeys(now, 1)
    ranks = [{n: len(i) for n, i in opened(open_highest(now, even, worth, sizes, k)).items()} for k in range(11)]
    assert ranks[1] == {"a": 1, "b": 2, "c": 1}
    assert ranks[2] == {"a": 1, "b": 2, "c": 2}
    assert ranks[4] == {"a": 2, "b": 3, "c": 2}
    assert ranks[9] == ranks[10] == {"a": 4, "b": 4, "c": 4}
    by_two = open_highest(now, even, worth, sizes, 3, each=2)
    assert {name: len(rows) for name, rows in opened(by_two).items()} == {"a": 1, "b": 3, "c": 2}
    limited = open_highest(now, even, worth, sizes, 9, limit=1)
    assert {name: len(rows) for name, rows in opened(limited).items()} == {"a": 2, "b": 2, "c": 2}
    assert opened(now) == {"a": [0], "b": [0], "c": [0]}  # its input is as it was


def test_the_best_closed_component_opens_first_and_ties_go_to_the_smaller_layer() -> None:
    now = masks(a=[0, 1, 0, 1], b=[0, 1, 0, 0])
    some = scores(a=[0.1, 0.9, 0.3, 0.8], b=[0.2, 0.5, 0.2, float("nan")])
    worth = {"a": 0.5, "b": 0.5}
    assert opened(open_highest(now, some, worth, ONES, 1)) == {"a": [1, 3], "b": [0, 1]}
    assert opened(open_highest(now, some, worth, ONES, 2)) == {"a": [1, 2, 3], "b": [0, 1]}
    assert opened(open_highest(now, some, {"a": float("nan"), "b": 0.0}, ONES, 1)) == {"a": [1, 3], "b": [0, 1]}


@pytest.mark.parametrize("seed", range(20))
def test_growth_never_exceeds_the_amount_and_leaves_less_than_a_component(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    now = {name: torch.rand(4, generator=generator) < 0.4 for name in "abc"}
    sizes = {name: int(torch.randint(1, 9, (), generator=generator)) for name in now}
    some = {name: torch.rand(4, generator=generator) for name in now}
    worth = {name: float(torch.rand((), generator=generator)) for name in now}
    for amount in range(0, 60, 3):
        after = open_highest(now, some, worth, sizes, amount)
        cost = sum(sizes[name] * int((after[name] & ~now[name]).sum()) for name in now)
        assert cost <= amount
        assert all((after[name] & now[name]).equal(now[name]) for name in now)
        assert all(after[name].all() or sizes[name] > amount - cost for name in now)


def test_the_lowest_are_closed_within_limits() -> None:
    now = masks(a=[1, 1, 1, 0], b=[1, 1, 1, 1])
    some = scores(a=[0.1, 0.2, 0.3, 0.0], b=[0.4, 0.5, 0.6, float("nan")])
    assert opened(close_some(now, some, 3)) == {"a": [2], "b": [0, 1, 2]}
    assert opened(close_some(now, some, 3, limit=1)) == {"a": [1, 2], "b": [0, 1, 2]}
    assert opened(close_some(now, some, 9, minimum=2)) == {"a": [1, 2], "b": [1, 2]}
    assert opened(close_some(now, {"a": torch.ones(4), "b": torch.ones(4)}, 2)) == {"a": [2], "b": [0, 1, 2, 3]}
    assert opened(close_some(now, {"a": torch.ones(4), "b": torch.ones(4)}, 4, limit=2)) == {"a": [2], "b": [2, 3]}


def test_worth_per_cost_prefers_many_small_components() -> None:
    some, costs = scores(a=[0.6, 0.5], b=[0.4, 0.3]), {"a": 10, "b": 2}
    assert weighed(some, costs, "worth") == some
    assert opened(close_lowest(weighed(some, costs, "worth"), costs, 4)) == {"a": [0, 1], "b": []}
    assert opened(close_lowest(weighed(some, costs, "worth_per_cost"), costs, 4)) == {"a": [0], "b": [0, 1]}


@pytest.mark.parametrize("seed", range(40))
def test_worth_per_cost_is_the_best_choice_where_it_closes_exactly_the_amount(seed: int) -> None:
    """Against every subset that closes as much: none gives up less worth, but for one component where it overshoots."""
    generator = torch.Generator().manual_seed(seed)
    some = {name: torch.rand(3, generator=generator).double() for name in "abc"}
    costs = {name: int(torch.randint(1, 7, (), generator=generator)) for name in some}
    flat = [(float(value), costs[name]) for name, row in some.items() for value in row]
    subsets = [
        (sum(flat[i][1] for i in range(9) if bits >> i & 1), sum(flat[i][0] for i in range(9) if bits >> i & 1))
        for bits in range(512)
    ]
    exact = 0
    for amount in range(1, sum(cost for _, cost in flat) + 1):
        kept = close_lowest(weighed(some, costs, "worth_per_cost"), costs, amount)
        lost = sum(float(some[name][~mask].sum()) for name, mask in kept.items())
        paid = sum(costs[name] * int((~mask).sum()) for name, mask in kept.items())
        best = min(worth for cost, worth in subsets if cost >= amount)
        assert amount <= paid < amount + max(costs.values())
        assert lost <= best + max(worth for worth, _ in flat)
        if paid == amount:
            exact += 1
            assert lost == pytest.approx(best)
    assert exact >= 9


def open_of(scores: dict[str, list[float]], sizes: dict[str, int], amount: int, minimum: int = 0) -> dict[str, Any]:
    masks = open_best({name: torch.tensor(row) for name, row in scores.items()}, sizes, amount, minimum)
    return {name: mask.int().tolist() for name, mask in masks.items()}


def test_the_highest_are_opened_for_as_long_as_there_is_something_left() -> None:
    scores = {"a": [0.9, 0.4, 0.1], "b": [0.8, 0.7, 0.2]}
    assert open_of(scores, {"a": 1, "b": 1}, 4) == {"a": [1, 1, 0], "b": [1, 1, 0]}
    assert open_of(scores, {"a": 1, "b": 1}, 99) == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert open_of(scores, {"a": 1, "b": 1}, 0) == {"a": [0, 0, 0], "b": [0, 0, 0]}
    assert open_best({}, {}, 3) == {}


def test_what_does_not_fit_is_passed_over() -> None:
    assert open_of({"dear": [0.9, 0.8], "cheap": [0.1, 0.05]}, {"dear": 5, "cheap": 2}, 9) == {
        "dear": [1, 0],
        "cheap": [1, 1],
    }


def test_a_minimum_comes_first() -> None:
    scores = {"a": [0.9, 0.8, 0.7], "b": [0.2, 0.3, 0.1]}
    assert open_of(scores, {"a": 1, "b": 1}, 3, minimum=1) == {"a": [1, 1, 0], "b": [0, 1, 0]}
    assert open_of(scores, {"a": 1, "b": 1}, 6, minimum=9) == {"a": [1, 1, 1], "b": [1, 1, 1]}
    with pytest.raises(ValueError, match="1 does not pay for 1 components in every layer, which cost 2"):
        open_of(scores, {"a": 1, "b": 1}, 1, minimum=1)


def test_what_is_not_finite_is_opened_last() -> None:
    assert open_of({"a": [float("nan"), 0.1], "b": [float("inf"), -1.0]}, {"a": 1, "b": 1}, 2) == {
        "a": [0, 1],
        "b": [0, 1],
    }
