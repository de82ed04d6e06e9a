"""Parameters and optimizer state are cut together: what is left goes on as it would have; all is done, or nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    DEM,
    Adapter,
    Budget,
    Cubic,
    DynamicDoRA,
    LoRA,
    Orthogonality,
    RankBudget,
    RankPolicy,
    Taylor,
    eject,
    inject,
)
from lightning_peft.compaction import compact_training
from lightning_peft.rank.gate import Gate

MASKS = {"0": [1, 0, 1, 0], "2": [0, 0, 0, 0], "4": [1, 1, 1, 1], "6": [0, 0, 0, 1]}
RANKS = {"0": 2, "2": 0, "4": 4, "6": 1}


def adapted(factory: Any = None) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(),
        nn.Linear(7, 2),
    )  # fmt: skip
    inject(net, factory or partial(DynamicDoRA, rank=4, dropout=0.0), ["0", "2", "4", "6"])
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, closure: bool = False) -> None:
    for step in steps:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (net(x) - x[:, :2].sin()).square().mean()
        loss.backward()
        optimizer.step()


def close(net: nn.Module) -> None:
    RankBudget.of(net).keep({name: torch.tensor(mask) for name, mask in MASKS.items()})


def trainable(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "AdamW amsgrad": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "Adam": partial(torch.optim.Adam, lr=1e-2),
    "NAdam": partial(torch.optim.NAdam, lr=1e-2),
    "RAdam": partial(torch.optim.RAdam, lr=1e-2),
    "Adamax": partial(torch.optim.Adamax, lr=1e-2),
    "Adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "SGD": partial(torch.optim.SGD, lr=1e-2),
    "SGD momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "Rprop": partial(torch.optim.Rprop, lr=1e-3),
    "ASGD": partial(torch.optim.ASGD, lr=1e-2),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("factory", [partial(DynamicDoRA, rank=4, dropout=0.0), partial(LoRA, rank=4)])
def test_what_is_left_trains_on_as_it_would_have(build: Any, factory: Any) -> None:
    net = adapted(factory)
    optimizer = build(trainable(net))
    train(net, optimizer, range(5))
    close(net)
    masked = copy.deepcopy(net)
    of_masked = build(trainable(masked))
    of_masked.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    x = torch.randn(64, 8)
    before = net(x).detach()
    assert compact_training(net, [optimizer]) == RANKS
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-6)
    train(net, optimizer, range(5, 12))
    train(masked, of_masked, range(5, 12))
    left, was = RankBudget.of(net), RankBudget.of(masked)
    assert list(left) == ["0", "4", "6"]
    for name, site in left.items():
        keep = torch.tensor(MASKS[name], dtype=torch.bool)
        for part, dim in (("A", 0), ("B", 1)):
            index = keep.nonzero().flatten()
            wanted = getattr(was[name].adapter, part).detach().index_select(dim, index)
            torch.testing.assert_close(getattr(site.adapter, part).detach(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net(x), masked(x), rtol=1e-4, atol=1e-5)


def test_the_state_is_as_large_as_that_of_a_model_built_at_these_ranks() -> None:
    net = adapted()
    optimizer = torch.optim.AdamW(trainable(net), lr=1e-2, amsgrad=True)
    train(net, optimizer, range(3))
    close(net)
    compact_training(net, [optimizer])
    train(net, optimizer, range(3, 5))

    torch.manual_seed(0)
    small = nn.Sequential(*[copy.deepcopy(getattr(layer, "base", layer)) for layer in net])
    ranks = iter([2, 4, 1])
    inject(small, lambda layer: DynamicDoRA(layer, rank=next(ranks), dropout=0.0), ["0", "4", "6"])
    other = torch.optim.AdamW(trainable(small), lr=1e-2, amsgrad=True)
    train(small, other, range(2))

    def size(of: torch.optim.Optimizer) -> int:
        return sum(t.numel() * t.element_size() for entry in of.state.values() for t in entry.values())

    assert size(optimizer) == size(other)
    shapes = [[tuple(p.shape) for p in trainable(each)] for each in (net, small)]
    assert shapes[0] == shapes[1]


def test_places_groups_names_gradients_and_steps_stay() -> None:
    net = adapted()
    named = dict(net.named_parameters())
    groups = [
        {"params": [(n, named[n]) for n in ("8.weight", "0.A", "2.A", "4.A")], "lr": 0.1},
        {"params": [("2.B", named["2.B"]), ("2.gate.gain", named["2.gate.gain"])], "lr": 0.2},
        {"params": [(n, p) for n, p in named.items() if p.requires_grad and n not in
                    ("8.weight", "0.A", "2.A", "4.A", "2.B", "2.gate.gain")], "lr": 0.3},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, capturable=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(net, optimizer, range(3))
    scheduler.step()
    close(net)
    step, head = optimizer.state[named["0.A"]]["step"], optimizer.state[named["8.weight"]]
    gradient, moment = named["0.A"].grad, optimizer.state[named["0.A"]]["exp_avg"].clone()
    whole = named["4.A"]
    lists = [group["params"] for group in optimizer.param_groups]
    compact_training(net, [optimizer])
    now = dict(net.named_parameters())
    first, second, third = optimizer.param_groups
    assert [group["params"] for group in optimizer.param_groups] == lists
    assert first["params"] == [now["8.weight"], now["0.A"], now["4.A"]]
    assert first["param_names"] == ["8.weight", "0.A", "4.A"]
    assert (second["params"], second["param_names"]) == ([], [])
    assert [now[name] is p for name, p in zip(third["param_names"], third["params"], strict=True)] == [True] * 8
    assert now["4.A"] is whole  # nothing of it is closed
    assert optimizer.state[now["0.A"]]["step"] is step
    assert optimizer.state[now["8.weight"]] is head
    assert torch.equal(optimizer.state[now["0.A"]]["exp_avg"], moment[[0, 2]])
    assert gradient is not None
    assert torch.equal(now["0.A"].grad, gradient[[0, 2]])  # type: ignore[arg-type]
    assert set(optimizer.state) == {p for group in optimizer.param_groups for p in group["params"]}
    train(net, optimizer, range(3, 5))
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.05, 0.075]
    again = torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups])
    again.load_state_dict(optimizer.state_dict())


def test_two_optimizers_each_lose_what_they_hold() -> None:
    net = adapted()
    named = dict(net.named_parameters())
    one = torch.optim.SGD([named["0.A"], named["2.A"]], lr=0.1, momentum=0.9)
    two = torch.optim.AdamW([p for p in trainable(net) if p is not named["0.A"] and p is not named["2.A"]])
    train(net, one, range(2))
    train(net, two, range(2))
    close(net)
    compact_training(net, [one, two])
    now = dict(net.named_parameters())
    assert one.param_groups[0]["params"] == [now["0.A"]]
    assert not any(p is now["0.A"] for p in two.param_groups[0]["params"])
    assert sum(map(len, (one.state, two.state))) == len(trainable(net))


def test_a_component_with_an_open_mask_and_no_gain_yet_is_kept() -> None:
    net = adapted()  # gains start at zero
    RankBudget.of(net).keep({"0": torch.tensor([1, 0, 1, 0])})
    assert compact_training(net, []) == {"0": 2, "2": 4, "4": 4, "6": 4}


def test_dtype_device_mode_and_what_is_frozen_stay() -> None:
    net = adapted().bfloat16().eval()
    RankBudget.of(net)["0"].adapter.A.requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(net), lr=1e-2)
    train(net, optimizer, range(0))
    close(net)
    compact_training(net, [optimizer])
    adapter = RankBudget.of(net)["0"].adapter
    assert (adapter.A.dtype, adapter.B.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (adapter.A.requires_grad, adapter.B.requires_grad) == (False, True)
    assert not adapter.training
    assert RankBudget.of(net)["0"].gate.mask.dtype == torch.float32


def test_random_numbers_are_not_used_up() -> None:
    net = adapted()
    close(net)
    before = torch.get_rng_state()
    compact_training(net, [])
    assert torch.equal(torch.get_rng_state(), before)


def test_scale_is_kept_bit_for_bit() -> None:
    net = adapted(partial(LoRA, rank=4, alpha=0.7))
    scaling = RankBudget.of(net)["0"].adapter.scaling
    close(net)
    compact_training(net, [])
    assert RankBudget.of(net)["0"].adapter.scaling == pytest.approx(scaling, rel=1e-15)


def test_counting_goes_on_as_if_nothing_had_been_cut() -> None:
    net = adapted()
    train(net, torch.optim.SGD(trainable(net), lr=0.1), range(2))
    close(net)

    def counted() -> list[object]:
        budget = RankBudget.of(net)
        return [
            budget.ranks(), list(budget.ranks()), budget.spent, budget.capacity, budget.spent_parameters,
            budget.capacity_parameters, budget.sizes("parameters"), budget.table(), Budget(share=0.5).amount(budget),
            Budget(rank=1.5).amount(budget), Budget(megabytes=0.0012).amount(budget),
            RankBudget.of(nn.ModuleDict({"inner": net})).ranks(),
        ]  # fmt: skip

    before = counted()
    compact_training(net, [])
    assert counted() == before
    assert re.search(r"^2 +DynamicDoRA +0/4 +0$", RankBudget.of(net).table(), re.MULTILINE)
    assert copy.deepcopy(RankBudget.of(copy.deepcopy(net)).ranks()) == RANKS


def test_cutting_twice_remembers_the_first_size() -> None:
    net = adapted()
    RankBudget.of(net).keep({"0": torch.tensor([1, 0, 1, 1])})
    compact_training(net, [])
    RankBudget.of(net).keep({"0": torch.tensor([0, 0, 1])})
    assert compact_training(net, []) == {"0": 1, "2": 4, "4": 4, "6": 4}
    assert RankBudget.of(net).extents["0"].components == 4
    assert compact_training(net, []) == {"0": 1, "2": 4, "4": 4, "6": 4}  # nothing is closed


def test_eject_gives_the_base_back_bit_for_bit() -> None:
    net = adapted()
    plain = copy.deepcopy(net)
    eject(plain)
    train(net, torch.optim.SGD(trainable(net)[:-2], lr=0.1), range(2))
    close(net)
    compact_training(net, [])
    eject(net)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert all(p.requires_grad for p in net.parameters())
    assert not RankBudget.of(net).extents


def test_terms_see_the_new_tensors() -> None:
    net = adapted()
    terms = [DEM(), Orthogonality()]
    x = torch.randn(4, 8)
    for term in terms:
        term(net, x, None).backward()
    close(net)
    compact_training(net, [])
    net.zero_grad()
    sum(term(net, x, None) for term in terms).backward()
    for site in RankBudget.of(net).values():
        assert site.adapter.A.grad is not None
        assert site.adapter.A.grad.any()


def test_an_attention_without_components_is_plain_again() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.attention(x, x, x)[0])
            return y

    net = Attending()
    inject(net, partial(LoRA, rank=2), ["attention"])
    budget = RankBudget.of(net)
    for site in budget.values():
        nn.init.normal_(site.adapter.B)
    budget.keep({"attention.in_proj": torch.tensor([0, 0]), "attention.out_proj": torch.tensor([0, 1])})
    optimizer = torch.optim.AdamW(trainable(net))
    x = torch.randn(2, 3, 8)
    before = net(x).detach()
    assert compact_training(net, [optimizer]) == {"attention.in_proj": 0, "attention.out_proj": 1}
    assert type(net.attention) is nn.MultiheadAttention
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-6)


def unchanged(net: nn.Module, optimizer: torch.optim.Optimizer, error: type[Exception], says: str) -> None:
    modules, groups = list(net.modules()), [list(group["params"]) for group in optimizer.param_groups]
    state = {p: dict(entry) for p, entry in optimizer.state.items()}
    with pytest.raises(error, match=says):
        compact_training(net, [optimizer])
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], before, strict=True))
    assert {p: dict(entry) for p, entry in optimizer.state.items()}.keys() == state.keys()
    assert all(optimizer.state[p][key] is value for p, entry in state.items() for key, value in entry.items())
    assert RankBudget.of(net).extents.keys() == RankBudget.of(net).keys()


def test_factored_state_is_refused_before_anything_is_changed() -> None:
    net = adapted()
    optimizer = torch.optim.Adafactor(trainable(net), lr=1e-2)
    train(net, optimizer, range(2))
    close(net)
    unchanged(
        net, optimizer, TypeError,
        r"Adafactor keeps 'row_var' of shape \(4, 1\) for 'A' of the adapter at '0', which has shape \(4, 8\): what",
    )  # fmt: skip


def test_an_optimizer_with_a_list_of_its_own_is_refused() -> None:
    net = adapted()
    optimizer = torch.optim.LBFGS(trainable(net))
    close(net)
    unchanged(net, optimizer, TypeError, "LBFGS keeps parameters of adapters in '_params', beside its param_groups, so")


class Folded(LoRA):
    """A third party's adapter whose cut is no slice."""

    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        small = super().compacted(keep)
        if isinstance(small, LoRA):
            small.A.data.mul_(2)
            small.B.data.div_(2)
        return small


class Uncut(Adapter):
    """And one that cannot be cut at all."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.scale = nn.Parameter(torch.ones(2))
        self.gate = Gate(2, cost=1)

    def effective_weight(self) -> Tensor:
        weight: Tensor = self.base.weight * (self.scale * self.gate.value()).sum()  # type: ignore[operator]
        return weight


@pytest.mark.parametrize(("factory", "masks", "says"), [
    (partial(Folded, rank=4), MASKS, r"'A' of the adapter at '0' cannot be cut while training: Folded.compacted\(\) m"),
    (Uncut, {"0": [1, 0]}, "layer '0': Uncut cannot be compacted: its components are not cut out of its tensors."),
])  # fmt: skip
def test_an_adapter_that_cannot_be_cut_is_refused(factory: Any, masks: Any, says: str) -> None:
    net = adapted(factory)
    if factory is not Uncut:
        for site in RankBudget.of(net).values():
            nn.init.normal_(site.adapter.B)
    RankBudget.of(net).keep({name: torch.tensor(mask) for name, mask in masks.items()})
    unchanged(net, torch.optim.AdamW(trainable(net)), TypeError, says)


def test_without_any_open_component_it_says_so() -> None:
    net = adapted()
    RankBudget.of(net).keep({name: torch.zeros(4) for name in MASKS})
    unchanged(
        net, torch.optim.AdamW(trainable(net)), RuntimeError,
        "every component of every adapter is closed, so compaction would leave no adapter to train. Nothing was chang",
    )  # fmt: skip
    with pytest.raises(ValueError, match="compact_training found no adapter to cut in Linear; inject puts them in"):
        compact_training(nn.Linear(2, 2), [])


def test_a_policy_follows_a_cut_in_the_middle_of_its_schedule() -> None:
    net = adapted(partial(LoRA, rank=4))
    for site in RankBudget.of(net).values():
        nn.init.normal_(site.adapter.B)
    policy = RankPolicy(Cubic(0.1, 0.2), Taylor(beta=0.0), Budget(rank=1), interval=1)
    policy.track(RankBudget.of(net))
    optimizer = torch.optim.SGD(trainable(net), lr=0.1)
    total = 20
    for step in range(1, total + 1):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - x[:, :2]).square().mean().backward()
        if policy.observes(step, total):
            policy.importance.update()
        optimizer.step()
        if policy.is_event(step, total):
            policy.apply(policy.decide(step, total), step, total)
            scores = policy.importance.scores()
            kept = {name: site.gate.mask.detach() != 0 for name, site in policy.budget.items()}
            compact_training(net, [optimizer])
            policy.follow(RankBudget.of(net), kept)
            for name, row in policy.importance.scores().items():
                assert torch.equal(row, scores[name][kept[name]])
            assert RankBudget.of(net).spent == policy.budget_at(step, total)
            assert sum(len(site.gate) for site in RankBudget.of(net).values()) == policy.budget_at(step, total)
    assert RankBudget.of(net).spent == 4
    # A later fit goes on from there: what was cut away is closed for good, and nothing is left to cut.
    later = RankPolicy(Cubic(), Taylor(), Budget(rank=1))
    later.track(RankBudget.of(net))
    assert later.budget_at(0, 10) == later.budget_at(10, 10) == 4
