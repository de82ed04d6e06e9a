from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    Budget,
    Cubic,
    DynamicDoRA,
    Importance,
    LoRA,
    RankBudget,
    RankPolicy,
    Schedule,
    Site,
    SlowCubic,
    Taylor,
    inject,
)
from lightning_peft.rank import Constant, Linear


class Preset(Importance):
    """Scores that a test sets, as a constant worth."""

    reads = "weights"

    def __init__(self) -> None:
        super().__init__(beta=0.0)
        self.now: dict[str, Tensor] = {}

    def measure(self, group: list[Site]) -> Tensor:
        return torch.stack([self.now[site.name] for site in group])


def adapted(kind: type[LoRA] | type[DynamicDoRA] = LoRA, rank: int = 4) -> tuple[nn.Module, RankBudget]:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8))
    inject(module, partial(kind, rank=rank), targets=["0", "1"])
    budget = RankBudget.of(module)
    for site in budget.values():
        for _, parameter in site.adapter.own_parameters():
            nn.init.normal_(parameter)
    return module, budget


def policy(schedule: Schedule, final: Budget | None = None, **options: Any) -> tuple[RankPolicy, Preset]:
    scores = Preset()
    scores.now = {"0": torch.tensor([0.1, 0.2, 0.3, 0.4]), "1": torch.tensor([0.5, 0.6, 0.7, 0.8])}
    return RankPolicy(schedule, scores, final or Budget(rank=2), **options), scores


def test_events_are_every_interval_and_at_the_end_of_the_window() -> None:
    some, _ = policy(Linear(0.1, 0.2), interval=15)
    assert [step for step in range(1, 101) if some.is_event(step, 100)] == [10, 25, 40, 55, 70, 80]
    assert [step for step in range(1, 101) if not some.observes(step, 100)] == list(range(81, 101))
    assert [step for step in range(1, 101) if some.is_final(step, 100)] == list(range(80, 101))


def test_steps_are_counted_from_one() -> None:
    some, _ = policy(Linear(0.0, 0.0), interval=4)
    assert [step for step in range(1, 11) if some.is_event(step, 10)] == [4, 8, 10]


def test_a_constant_schedule_cuts_at_the_end_of_the_warm_up() -> None:
    _, budget = adapted()
    some, _ = policy(Constant(0.3, 0.0), interval=50)
    some.track(budget)
    assert [some.budget_at(step, 10) for step in (1, 2, 3, 10)] == [8, 8, 4, 4]
    assert some.is_event(3, 10)


@pytest.mark.parametrize(
    "schedule", [Linear(0.1, 0.2), Cubic(0.1, 0.2), SlowCubic(0.15, 0.5), Constant(0.1, 0.2)], ids=repr
)
@pytest.mark.parametrize("soft", [False, True])
def test_after_every_event_the_open_components_are_the_budget(schedule: Schedule, soft: bool) -> None:
    _, budget = adapted(DynamicDoRA)
    some, scores = policy(schedule, interval=3, soft=soft)
    some.track(budget)
    total, events = 60, 0
    for step in range(1, total + 1):
        scores.now = {name: torch.rand(4) for name in budget}
        some.importance.update()
        if some.is_event(step, total):
            some.apply(some.decide(step, total), step, total)
            assert budget.spent == some.budget_at(step, total)
            events += 1
            if soft:  # as an optimizer would
                for site in budget.values():
                    nn.init.normal_(site.gate.gain)  # type: ignore[arg-type]
    assert events > 3
    assert budget.spent == 4


def test_the_lowest_are_closed() -> None:
    _, budget = adapted()
    some, _ = policy(Constant(0.1, 0.0))
    some.track(budget)
    some.importance.update()
    some.apply(some.decide(10, 10), 10, 10)
    assert budget["0"].gate.mask.tolist() == [0, 0, 0, 0]
    assert budget["1"].gate.mask.tolist() == [1, 1, 1, 1]


def test_every_layer_can_keep_some() -> None:
    _, budget = adapted()
    some, _ = policy(Constant(0.1, 0.0), minimum=1)
    some.track(budget)
    some.importance.update()
    some.apply(some.decide(10, 10), 10, 10)
    assert budget.ranks() == {"0": 1, "1": 3}
    assert budget["0"].gate.mask.tolist() == [0, 0, 0, 1]


def test_a_budget_of_parameters_is_kept() -> None:
    _, budget = adapted()
    some, _ = policy(Linear(0.0, 0.0), Budget(parameters=70), interval=1)
    some.track(budget)
    some.importance.update()
    for step in range(1, 11):
        some.apply(some.decide(step, 10), step, 10)
        assert budget.spent_parameters <= some.budget_at(step, 10)
        assert budget.spent_parameters > some.budget_at(step, 10) - 16
    assert some.budget_at(10, 10) == 70


def test_soft_removal_becomes_hard_at_the_last_event() -> None:
    _, budget = adapted(DynamicDoRA)
    some, _ = policy(Linear(0.0, 0.5), soft=True)
    some.track(budget)
    some.importance.update()
    gate = budget["0"].gate
    assert gate.gain is not None
    some.apply({"0": torch.tensor([0, 1, 1, 1])}, 4, 10)
    assert gate.mask.tolist() == [1, 1, 1, 1]
    assert gate.gain[0] == 0
    some.apply({"0": torch.tensor([0, 0, 1, 1])}, 5, 10)
    assert gate.mask.tolist() == [0, 0, 1, 1]
    assert gate.gain[:2].tolist() == [0, 0]  # the paper's last event is one like the others


def test_a_budget_at_full_rank_closes_nothing() -> None:
    _, budget = adapted()
    some, _ = policy(Cubic(), Budget(rank=4), interval=1)
    some.track(budget)
    some.importance.update()
    for step in range(1, 11):
        some.apply(some.decide(step, 10), step, 10)
    assert budget.spent == budget.capacity


def test_ties_are_broken_in_the_modules_order_whatever_the_groups() -> None:
    """Importance groups layers by shape; the order of ties is the module's all the same."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8))
    inject(module, partial(LoRA, rank=2), targets=["0", "1", "3"])
    budget = RankBudget.of(module)
    scores = Preset()
    scores.now = {name: torch.ones(2) for name in budget}
    some = RankPolicy(Constant(0.1, 0.0), scores, Budget(rank=1))
    some.track(budget)
    some.importance.update()
    assert list(scores.scores()) == ["0", "3", "1"]
    masks = some.decide(10, 10)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "0": [False, False],
        "1": [False, True],
        "3": [True, True],
    }


def test_its_state_is_the_running_average() -> None:
    _, budget = adapted()
    some, _ = policy(Cubic())
    some.track(budget)
    some.importance.update()
    other, _ = policy(Cubic())
    other.track(budget)
    other.load_state_dict(some.state_dict())
    assert torch.equal(other.decide(5, 10)["0"], some.decide(5, 10)["0"])
    assert set(some.state_dict()) == {"importance", "gone"}


@pytest.mark.parametrize("broken", [0.9, float("nan")])
def test_what_an_earlier_fit_has_closed_stays_closed(broken: float) -> None:
    """Worth that is not finite goes first of all, but not in the place of what is gone."""
    _, budget = adapted()
    budget.keep({"0": torch.tensor([1, 1, 1, 0])})  # its best
    some, scores = policy(SlowCubic(0.5, 0.0), interval=1)
    scores.now["1"][3] = broken
    some.track(budget)
    some.importance.update()
    assert [some.budget_at(step, 10) for step in (1, 10)] == [7, 4]
    for step in (5, 10):  # nothing to cut yet, and all
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if broken != broken else "error")
            some.apply(some.decide(step, 10), step, 10)
        assert budget["0"].gate.mask[3] == 0
    assert broken != broken or budget.ranks() == {"0": 0, "1": 4}
    other, _ = policy(SlowCubic(0.5, 0.0))
    _, fresh = adapted()
    other.track(fresh)
    other.load_state_dict(some.state_dict())
    assert other.budget_at(1, 10) == 7


def test_what_an_earlier_fit_has_closed_is_none_of_those_that_a_layer_keeps() -> None:
    _, budget = adapted()
    budget.keep({"0": torch.tensor([0, 0, 0, 1])})
    some, _ = policy(Cubic(0.0, 0.1), interval=1, minimum=2)
    some.track(budget)
    some.importance.update()
    some.apply(some.decide(10, 10), 10, 10)
    assert budget.ranks() == {"0": 1, "1": 3}  # the budget of 4, exactly


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="interval is a number of optimizer steps, at least 1. Got 0."):
        policy(Cubic(), interval=0)
    with pytest.raises(ValueError, match="minimum is a number of components, at least 0. Got -1."):
        policy(Cubic(), minimum=-1)
    _, budget = adapted()
    soft = RankPolicy(Cubic(), Taylor(), Budget(rank=2), soft=True)
    with pytest.raises(ValueError, match="soft removal zeroes a component's gain, and the adapter at '0' has none"):
        soft.track(budget)
    with pytest.raises(ValueError, match="below the floor of 6"):
        policy(Cubic(), Budget(rank=2), minimum=3)[0].track(budget)
