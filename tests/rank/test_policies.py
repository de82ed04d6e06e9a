"""Every policy x every property: what RankPruning and RankMonitor rely on, whoever decides."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    AdaLoRA,
    Budget,
    Growth,
    Importance,
    LoRA,
    PartlyOpen,
    Policy,
    PruneAndGrow,
    RankBudget,
    RankPolicy,
    Site,
    SoftThreshold,
    SoRA,
    Taylor,
    inject,
)
from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.rank import Constant, Linear

TOTAL, CAPACITY = 40, 6


class Drawn(Importance):
    """Worth that looks like any other, drawn from the step alone."""

    reads = "weights"

    def __init__(self, ties: bool = False) -> None:
        super().__init__(beta=0.5)
        self.step, self.ties = 0, ties

    def measure(self, group: list[Site]) -> Tensor:
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        drawn = torch.rand(len(group), len(group[0].gate), generator=generator)
        return torch.ones_like(drawn) if self.ties else drawn

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"step": {}}  # the step is set by hand


@dataclass(frozen=True)
class Kind:
    """One policy, the adapter that it is used with, and what is open at the end."""

    policy: Callable[..., Policy]
    adapter: AdapterFactory
    start: int  # components per layer
    end: int | None  # in all; None if it is what is left
    hard: AdapterFactory | None = field(default=partial(LoRA, rank=CAPACITY))  # the same without a gain


def grown(start: int, kind: Any = AdaLoRA) -> AdapterFactory:
    return PartlyOpen(partial(kind, rank=CAPACITY), start)


SCHEDULE = Linear(warmup=0.1, tail=0.3)


def of(kind: Any, rank: float, **settings: Any) -> Callable[..., Policy]:
    """Makes the policy, with another importance, budget or setting if asked."""

    def make(importance: Importance | None = None, final: Budget | None = None, **other: Any) -> Policy:
        policy: Policy = kind(SCHEDULE, importance or Drawn(), final or Budget(rank=rank), **(settings | other))
        return policy

    return make


def threshold(importance: Importance | None = None) -> Policy:
    return SoftThreshold(0.04, Constant(warmup=0.1, tail=0.3), interval=4)


FULL = partial(AdaLoRA, rank=CAPACITY)
KINDS: dict[str, Kind] = {
    "prune": Kind(of(RankPolicy, 2, interval=4), FULL, CAPACITY, 8),
    "prune_softly": Kind(of(RankPolicy, 2, interval=4, soft=True), FULL, CAPACITY, 8, hard=None),
    "threshold": Kind(threshold, partial(SoRA, rank=CAPACITY), CAPACITY, None, hard=None),
    "grow": Kind(of(Growth, 3, interval=4), grown(1), 1, 12, grown(1, LoRA)),
    "grow_by_two": Kind(of(Growth, 3.25, interval=3, each=2), grown(1), 1, 13, grown(1, LoRA)),
    "prune_and_grow": Kind(of(PruneAndGrow, 3, interval=4, moves=5), grown(3), 3, 12, grown(3, LoRA)),
    "prune_and_grow_from_less": Kind(of(PruneAndGrow, 2.5, interval=3), grown(2), 2, 10, grown(2, LoRA)),
    "prune_and_grow_from_more": Kind(of(PruneAndGrow, 2.5, interval=3), grown(5), 5, 10, grown(5, LoRA)),
}
every = pytest.mark.parametrize("name", list(KINDS))
budgeted = pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.end is not None])


def build(adapter: AdapterFactory) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 8), nn.Linear(8, 7))
    inject(module, adapter, targets=["0", "2", "4", "5"])
    return module


class Run:
    """A training loop without a Trainer: the optimizer's step, what follows it, and the policy's events."""

    def __init__(self, policy: Policy, module: nn.Module, lr: float = 0.02) -> None:
        self.policy, self.module = policy, module
        self.budget = RankBudget.of(module)
        own = [p for site in self.budget.values() for _, p in site.adapter.own_parameters()]
        self.optimizer = torch.optim.AdamW(own, lr=lr)
        self.step = 0
        policy.track(self.budget)
        self.events: dict[int, dict[str, list[bool]]] = {}
        self.spent: dict[int, int] = {}

    def one(self) -> None:
        self.step += 1
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(self.step))
        self.optimizer.zero_grad()
        (self.module(x) - x[:, :7].sin()).square().mean().backward()
        self.optimizer.step()
        policy, step = self.policy, self.step
        policy.after_steps(1, step, TOTAL)
        if policy.observes(step, TOTAL) and policy.importance.reads != "nothing":
            if isinstance(policy.importance, Drawn):
                policy.importance.step = 100 * step
            policy.importance.update()
        if policy.is_event(step, TOTAL):
            policy.apply(policy.decide(step, TOTAL), step, TOTAL)
            self.events[step] = {name: site.gate.open().tolist() for name, site in self.budget.items()}
            self.spent[step] = self.budget.spent if policy.unit == "components" else self.budget.spent_parameters

    def until(self, step: int = TOTAL) -> Run:
        while self.step < step:
            self.one()
        return self

    def masks(self) -> dict[str, list[float]]:
        return {name: site.gate.mask.tolist() for name, site in self.budget.items()}


@budgeted
@pytest.mark.parametrize("hard", [False, True], ids=["gain", "no_gain"])
def test_after_every_event_what_is_open_is_the_budget(name: str, hard: bool) -> None:
    kind = KINDS[name]
    adapter = kind.hard if hard else kind.adapter
    if adapter is None:
        with pytest.raises(ValueError, match="soft removal zeroes a component's gain, and the adapter at '0' has none"):
            Run(kind.policy(), build(partial(LoRA, rank=CAPACITY)))
        return
    policy = kind.policy()
    run = Run(policy, build(adapter)).until()
    assert len(run.spent) >= 7
    assert run.spent == {step: policy.budget_at(step, TOTAL) for step in run.spent}
    assert run.budget.spent == policy.budget_at(TOTAL, TOTAL) == kind.end
    assert len(set(map(str, run.events.values()))) > 3  # it does move


@every
def test_no_layer_exceeds_its_capacity_or_falls_below_its_minimum(name: str) -> None:
    minimum = {} if name in ("threshold", "grow", "grow_by_two") else {"minimum": 2}
    run = Run(KINDS[name].policy(**minimum), build(KINDS[name].adapter)).until()
    least = 2 if minimum else 0
    for masks in run.events.values():
        for mask in masks.values():
            assert least <= sum(mask) <= CAPACITY == len(mask)


@every
def test_equal_worth_gives_equal_masks_in_the_modules_order(name: str) -> None:
    """All worth ties: two runs agree, and no layer is ahead of another by more than a turn."""
    kind = KINDS[name]
    runs = [Run(kind.policy(Drawn(ties=True)), build(kind.adapter)).until() for _ in range(2)]
    assert runs[0].events == runs[1].events
    if name.startswith("grow"):
        each = runs[0].policy.each  # type: ignore[attr-defined]
        for masks in runs[0].events.values():
            ranks = [sum(mask) for mask in masks.values()]
            assert max(ranks) - min(ranks) <= each
            assert all(mask == sorted(mask, reverse=True) for mask in masks.values())  # lower index first


@every
@pytest.mark.parametrize("stop", [2, 9, 12, 17, 28, 33])
def test_interrupted_is_uninterrupted(name: str, stop: int) -> None:
    kind = KINDS[name]
    whole = Run(kind.policy(), build(kind.adapter)).until()
    first = Run(kind.policy(), build(kind.adapter)).until(stop)
    file = io.BytesIO()
    state = {"m": first.module.state_dict(), "o": first.optimizer.state_dict(), "p": first.policy.state_dict()}
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    # Before the policy takes the adapters on, as on one device and DDP, or after it, as under FSDP.
    for late in (False, True):
        module = build(kind.adapter)
        if not late:
            module.load_state_dict(saved["m"])
        second = Run(kind.policy(), module)
        if late:
            module.load_state_dict(saved["m"])
        second.optimizer.load_state_dict(copy.deepcopy(saved["o"]))
        saved["p"]["importance"].pop("step", None)
        second.policy.load_state_dict(saved["p"])
        second.step = stop
        second.until()
        assert second.events == {step: masks for step, masks in whole.events.items() if step > stop}
        for key, value in whole.module.state_dict().items():
            assert torch.equal(value, second.module.state_dict()[key]), key
        for step in range(stop, TOTAL):
            assert second.policy.budget_at(step, TOTAL) == whole.policy.budget_at(step, TOTAL)


@every
def test_what_is_closed_at_the_last_event_stays_closed(name: str) -> None:
    """Whatever an optimizer does to it: a large rate, momentum, and the hook after every step."""
    run = Run(KINDS[name].policy(), build(KINDS[name].adapter)).until(28)
    assert list(run.events)[-1] == 28
    masks = run.masks()
    assert any(0 in mask for mask in masks.values())
    run.optimizer = torch.optim.SGD(run.optimizer.param_groups[0]["params"], lr=0.3, momentum=0.9)
    closed = {name: site.gate.mask == 0 for name, site in run.budget.items()}
    run.until()
    assert run.masks() == masks
    assert not any((site.gate.open() & closed[name]).any() for name, site in run.budget.items())


@every
def test_a_second_fit_starts_from_where_the_first_has_ended(name: str) -> None:
    kind = KINDS[name]
    module = build(kind.adapter)
    first = Run(kind.policy(), module).until()
    masks = first.masks()
    second = Run(kind.policy(), module)
    assert second.masks() == masks
    second.until()
    if kind.end is not None:
        assert second.budget.spent == kind.end
        assert set(second.spent.values()) == {kind.end}
    if not name.startswith("prune_and_grow"):
        for layer, mask in second.masks().items():
            assert all(now <= then for then, now in zip(masks[layer], mask, strict=True))


@pytest.mark.parametrize("name", ["prune", "prune_softly", "grow", "grow_by_two"])
def test_a_budget_that_is_met_at_the_start_changes_nothing(name: str) -> None:
    kind = KINDS[name]
    run = Run(kind.policy(final=Budget(rank=kind.start)), build(kind.adapter))
    masks = run.masks()
    run.until()
    assert run.masks() == masks
    assert len(run.events) > 3


@budgeted
def test_a_budget_in_parameters_is_never_exceeded_and_met_within_a_component(name: str) -> None:
    kind = KINDS[name]
    layers = [16, 18, 18, 15]
    final = Budget(parameters=2 * sum(layers) + 5 if name.startswith("prune") else 3 * sum(layers) + 5)
    run = Run(kind.policy(final=final), build(kind.adapter)).until()
    assert run.policy.unit == "parameters"
    assert {site.gate.cost for site in run.budget.values()} == set(layers)
    for step, spent in run.spent.items():
        assert run.policy.budget_at(step, TOTAL) - max(layers) < spent <= run.policy.budget_at(step, TOTAL)


@every
def test_it_says_what_it_is_set_to(name: str) -> None:
    settings = KINDS[name].policy().settings()
    assert set(settings) == {"budget", "schedule"}
    assert all(isinstance(value, str) for value in settings.values())


def test_a_softer_or_reopening_policy_cannot_be_cut_early() -> None:
    assert {name for name, kind in KINDS.items() if kind.policy().returning is None} == {"prune"}


def test_components_that_never_opened_have_no_history() -> None:
    """Weights as they were built, gradients and the optimizer's averages zero: ready to be trained from their start."""
    module = build(grown(1))
    before = {name: (site.adapter.A.clone(), site.adapter.B.clone()) for name, site in RankBudget.of(module).items()}  # type: ignore[operator]
    run = Run(KINDS["grow"].policy(), module)
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    run.until(12)
    seen = 0
    for name, site in run.budget.items():
        closed = site.gate.mask == 0
        seen += int(closed.sum())
        A, B = before[name]
        adapter: Any = site.adapter
        assert torch.equal(adapter.A[closed], A[closed])
        assert torch.equal(adapter.B[:, closed], B[:, closed])
        state = run.optimizer.state
        for entry in ("exp_avg", "exp_avg_sq"):
            assert not state[adapter.A][entry][closed].any()
            assert not state[adapter.B][entry][:, closed].any()
            assert not state[adapter.gate.gain][entry][closed].any()
    assert seen


def test_what_opens_learns_at_once_and_hardly_moves_the_output() -> None:
    module = build(grown(1))
    run = Run(KINDS["grow"].policy(), module).until(7)
    masks = {name: torch.tensor(mask) != 0 for name, mask in run.masks().items()}
    x = torch.randn(5, 8)
    before = module(x)
    run.policy.apply({name: torch.ones(CAPACITY) for name in masks}, 8, TOTAL)
    assert run.budget.spent == run.budget.capacity
    assert 0 < (module(x) - before).abs().max() < 1e-6
    was = {name: site.gate.gain.detach().clone() for name, site in run.budget.items()}  # type: ignore[union-attr]
    run.one()
    for name, site in run.budget.items():
        assert (site.gate.gain[~masks[name]] - was[name][~masks[name]]).abs().min() > 1e-3  # type: ignore[index]


def test_the_layers_of_highest_worth_grow() -> None:
    worth = Drawn()
    worth.measure = lambda group: torch.stack(  # type: ignore[method-assign]
        [torch.full((CAPACITY,), {"0": 0.2, "2": 0.9, "4": 0.1, "5": 0.5}[site.name]) for site in group]
    )
    run = Run(KINDS["grow"].policy(worth), build(grown(1))).until()
    ranks = [{name: sum(mask) for name, mask in masks.items()} for masks in run.events.values()]
    assert ranks[1] == {"0": 1, "2": 2, "4": 1, "5": 1}
    assert ranks[2] == {"0": 1, "2": 3, "4": 1, "5": 1} or ranks[2] == {"0": 1, "2": 3, "4": 1, "5": 2}
    assert max(ranks[-1].values()) == ranks[-1]["2"]


def test_moves_are_as_many_as_the_schedule_says_and_never_more_in_one_layer() -> None:
    policy = KINDS["prune_and_grow"].policy()
    assert isinstance(policy, PruneAndGrow)
    run = Run(policy, build(grown(3)))
    last = {name: [bool(m) for m in mask] for name, mask in run.masks().items()}
    moved = {}
    for step in range(1, TOTAL + 1):
        run.one()
        if step in run.events:
            now = run.events[step]
            lost = {n: sum(a and not b for a, b in zip(last[n], now[n], strict=True)) for n in now}
            won = {n: sum(b and not a for a, b in zip(last[n], now[n], strict=True)) for n in now}
            assert max(lost.values()) <= policy.limit
            assert max(won.values()) <= policy.limit
            assert sum(lost.values()) == sum(won.values()) == policy.moves_at(step, TOTAL)
            moved[step] = sum(lost.values())
            last = now
    assert list(moved.values()) == sorted(moved.values(), reverse=True)
    assert moved[4] == 5
    assert moved[28] == 0


def test_what_returns_starts_from_nothing() -> None:
    run = Run(KINDS["prune_and_grow"].policy(), build(grown(3))).until(8)
    gate = run.budget["0"].gate
    assert gate.gain is not None
    closed = dict.fromkeys(run.budget, torch.ones(CAPACITY, dtype=torch.bool)) | {"0": torch.arange(CAPACITY) != 0}
    run.policy.apply(closed, 8, TOTAL)
    assert gate.gain[0] == 0
    with torch.no_grad():
        gate.gain[0] = 0.7  # momentum
    run.policy.apply(dict.fromkeys(run.budget, torch.ones(CAPACITY, dtype=torch.bool)), 8, TOTAL)
    assert gate.gain[0].item() == pytest.approx(1e-5)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="growth starts with 24 components open, more than the 8 of Budget"):
        Run(KINDS["grow"].policy(final=Budget(rank=2)), build(partial(AdaLoRA, rank=CAPACITY)))
    with pytest.raises(ValueError, match="each is how many components a layer opens in its turn, at least 1. Got 0."):
        Growth(SCHEDULE, Taylor(), Budget(rank=2), each=0)
    with pytest.raises(ValueError, match="moves is a number of components, at least 1. Got 0."):
        PruneAndGrow(SCHEDULE, Taylor(), Budget(rank=2), moves=0)
    with pytest.raises(TypeError, match="limit must be an integer. Got 0.5."):
        PruneAndGrow(SCHEDULE, Taylor(), Budget(rank=2), limit=0.5)  # type: ignore[arg-type]
    for kind in (RankPolicy, Growth, PruneAndGrow):
        with pytest.raises(ValueError, match="compare='cost': choose 'worth' or 'worth_per_cost'."):
            kind(SCHEDULE, Taylor(), Budget(share=0.5), compare="cost")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"weighs components by their parameters, and Budget\(rank=2\) counts"):
            kind(SCHEDULE, Taylor(), Budget(rank=2), compare="worth_per_cost")
