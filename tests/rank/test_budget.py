from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_peft import Budget, DynamicDoRA, LoRA, RankBudget, inject
from lightning_peft.compaction import compact_training
from lightning_peft.rank import clean_name, close_lowest


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


def adapted(rank: int = 3) -> nn.Sequential:
    module = net()
    inject(module, partial(LoRA, rank=rank))
    return module


def test_it_is_a_mapping_in_the_modules_order() -> None:
    module = adapted()
    budget = RankBudget.of(module)
    assert list(budget) == ["0", "2"]
    assert budget["0"].adapter is module[0]
    assert budget["0"].gate is module[0].gate
    assert budget["2"].name == "2"
    assert len(RankBudget.of(net())) == 0
    assert not RankBudget.of(net())


def test_components_and_parameters() -> None:
    budget = RankBudget.of(adapted())
    assert (budget.capacity, budget.spent) == (6, 6)
    assert budget.capacity_parameters == 3 * (8 + 6) + 3 * (6 + 4)
    budget.keep({"0": torch.tensor([1, 0, 0]), "2": torch.tensor([0, 1, 1])})
    assert budget.ranks() == {"0": 1, "2": 2}
    assert budget.spent == 3
    assert budget.spent_parameters == 14 + 2 * 10
    assert budget.sizes() == {"0": 1, "2": 1}
    assert budget.sizes("parameters") == {"0": 14, "2": 10}
    assert RankBudget({}).ranks() == {}
    assert RankBudget({}).spent == 0


def test_soft_keep_reaches_the_gain() -> None:
    module = net()
    inject(module, partial(DynamicDoRA, rank=2))
    budget = RankBudget.of(module)
    for site in budget.values():
        torch.nn.init.ones_(site.gate.gain)  # type: ignore[arg-type]
    budget.keep({"0": torch.tensor([1, 0])}, soft=True)
    assert budget.ranks() == {"0": 1, "2": 2}
    assert budget["0"].gate.mask.tolist() == [1, 1]


def test_an_unknown_layer_is_named_and_nothing_is_changed() -> None:
    budget = RankBudget.of(adapted())
    with pytest.raises(KeyError, match="no adapted layer is called '7'; there are 0, 2"):
        budget.keep({"0": torch.zeros(3), "7": torch.zeros(3)})
    assert budget.spent == 6


def test_a_shared_layer_counts_once() -> None:
    layer = nn.Linear(4, 4)
    module = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer), "head": nn.Linear(4, 2)})
    inject(module, partial(LoRA, rank=2))
    assert list(RankBudget.of(module)) == ["a.0"]


def test_wrappers_leave_no_trace_in_the_names() -> None:
    assert clean_name("_orig_mod.net._fsdp_wrapped_module.a._checkpoint_wrapped_module") == "net.a"
    module = nn.Sequential(adapted())
    module.compile(backend="eager")
    assert list(RankBudget.of(module)) == ["0.0", "0.2"]
    assert list(RankBudget.of(torch.compile(module, backend="eager"))) == ["0.0", "0.2"]  # type: ignore[arg-type]


def test_the_table_shows_every_layer_and_the_totals() -> None:
    budget = RankBudget.of(adapted())
    budget.keep({"0": torch.tensor([1, 0, 0])})
    header, rule, first, second, _, total = budget.table().splitlines()
    assert header.split() == ["layer", "adapter", "rank", "parameters"]
    assert set(rule) == {"-"}
    assert first.split() == ["0", "LoRA", "1/3", "14"]
    assert second.split() == ["2", "LoRA", "3/3", "30"]
    assert total.split() == ["2", "layers", "4/6", "44"]
    assert len({len(line) for line in budget.table().splitlines()}) == 1


@pytest.mark.parametrize(
    ("final", "unit", "amount"),
    [
        (Budget(rank=2), "components", 4),
        (Budget(rank=1.5), "components", 3),
        (Budget(rank=1.4), "components", 2),
        (Budget(rank=3), "components", 6),
        (Budget(parameters=50), "parameters", 50),
        (Budget(share=0.5), "parameters", 36),
        (Budget(share=1.0), "parameters", 72),
        (Budget(share=1 / 3), "parameters", 24),
        (Budget(dense_share=0.5), "parameters", 36),  # of 6 x 8 and 4 x 6
        (Budget(dense_share=0.25), "parameters", 18),
        (Budget(dense_share=2.0), "parameters", 72),  # no more than there is
        # 4 tensors of one name of one letter: a header of 484 bytes; 116 bytes are 29 float32 numbers
        (Budget(megabytes=600e-6), "parameters", 29),
    ],
)
def test_a_budget_in_any_unit(final: Budget, unit: str, amount: int) -> None:
    assert final.unit == unit
    assert final.amount(RankBudget.of(adapted())) == amount


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one of rank, parameters, share, megabytes, dense_share. Got none."),
        ({"rank": 2, "share": 0.5}, "Got rank=2, share=0.5."),
        ({"rank": 0}, "a budget's rank must be positive and finite. Got 0."),
        ({"rank": float("nan")}, "a budget's rank must be positive and finite. Got nan."),
        ({"rank": float("inf")}, "a budget's rank must be positive and finite. Got inf."),
        ({"megabytes": float("inf")}, "a budget's megabytes must be positive and finite. Got inf."),
        ({"parameters": -5}, "a budget's parameters must be positive and finite. Got -5."),
        ({"share": 1.5}, r"a budget's share must be in \(0, 1\]. Got 1.5."),
    ],
)
def test_a_budget_that_cannot_be(arguments: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Budget(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("final", "minimum", "says"),
    [
        (Budget(rank=1), 2, r"Budget\(rank=1\) is 2 components for 2 layers, below the floor of 4 \(2 components kept"),
        (
            Budget(rank=0.4),
            0,
            r"is 0 components for 2 layers, below the floor of 1 \(0 components kept in every layer, in",
        ),
        (Budget(parameters=13), 0, "is 13 parameters for 2 layers, below the floor of 14"),
        (Budget(megabytes=1e-6), 0, "is 0 parameters for 2 layers, below the floor of 14"),
        (Budget(rank=3.5), 0, "is 7 components, more than the 6 that the adapters have at full rank. Lower the budget"),
        (Budget(parameters=73), 0, "is 73 parameters, more than the 72"),
    ],
)
def test_a_budget_that_does_not_fit(final: Budget, minimum: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        final.amount(RankBudget.of(adapted()), minimum)


def test_the_smallest_budget_leaves_a_component_open() -> None:
    """Components of unequal price are closed whole; the floor is where the last one stays, whatever the scores."""
    budget = RankBudget.of(adapted())
    sizes = budget.sizes("parameters")
    amount = budget.capacity_parameters - Budget(parameters=14).amount(budget)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        masks = close_lowest({name: torch.rand(3, generator=generator) for name in budget}, sizes, amount)
        assert 0 < sum(int(mask.sum()) * sizes[name] for name, mask in masks.items()) <= 14


def test_it_prints_only_what_was_given() -> None:
    assert str(Budget(share=0.25)) == "Budget(share=0.25)"


def test_dense_parameters_are_counted_where_an_adapter_has_been_cut_away() -> None:
    net = adapted()
    before = RankBudget.of(net).dense_parameters
    first, second = RankBudget.of(net)
    RankBudget.of(net).keep({first: torch.zeros(3), second: torch.tensor([1, 0, 1])})
    compact_training(net)
    budget = RankBudget.of(net)
    assert list(budget) == [second]
    assert budget.dense_parameters == before == 6 * 8 + 4 * 6
    assert Budget(dense_share=0.5).amount(budget) == 36


def test_dense_parameters_cannot_be_told_of_flat_slices() -> None:
    net = adapted()
    next(iter(RankBudget.of(net).values())).adapter.base.weight._fsdp_flattened = True  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="where FSDP1 has them in flat slices. Give the budget in parameters"):
        Budget(dense_share=0.5).amount(RankBudget.of(net))
