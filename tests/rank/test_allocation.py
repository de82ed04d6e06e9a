from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft.rank import close_lowest, open_best


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
