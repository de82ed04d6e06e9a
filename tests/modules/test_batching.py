"""The plan of an epoch, and a loader that goes on where it was stopped."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.modules.batching import LengthGrouped, PlannedLoader

LENGTHS = torch.randint(3, 60, (103,), generator=torch.Generator().manual_seed(1))


def test_plan_holds_every_row_once() -> None:
    plan = LengthGrouped(LENGTHS, batch_size=8, seed=5, window=4)
    batches = list(plan)
    assert sorted(i for batch in batches for i in batch) == list(range(103))
    assert len(batches) == len(plan) == 13
    assert sorted(map(len, batches)) == [7] + [8] * 12


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        plan = LengthGrouped(LENGTHS, batch_size=8, seed=seed)
        plan.set_epoch(epoch)
        return list(plan)

    state = torch.get_rng_state()
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert order(1, 1) == orders[3]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_grouping_saves_padding_and_keeps_a_random_order() -> None:
    batches = list(LengthGrouped(LENGTHS, batch_size=8))

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)

    in_file_order = padded([list(range(103))[i : i + 8] for i in range(0, 103, 8)])
    assert padded(batches) - int(LENGTHS.sum()) < 0.2 * (in_file_order - int(LENGTHS.sum()))
    longest = [int(LENGTHS[batch].max()) for batch in batches]
    assert longest != sorted(longest)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_batch(world_size: int) -> None:
    plans = [list(LengthGrouped(LENGTHS, 4, seed=2, rank=r, world_size=world_size)) for r in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    for batches in zip(*plans, strict=True):
        assert len({len(batch) for batch in batches}) == 1  # the same gradient weight in every process
    seen = [i for plan in plans for batch in plan for i in batch]
    assert set(seen) == set(range(103))
    assert len(seen) - 103 < world_size  # at most a few rows twice, to fill the last batch


def loader(workers: int = 0, seed: int = 5) -> PlannedLoader:
    plan = LengthGrouped(LENGTHS, batch_size=8, seed=seed, window=4)
    return PlannedLoader(range(103), plan, torch.tensor, workers)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loader_continues_with_the_batches_that_remain(workers: int) -> None:
    first = loader(workers)
    first.sampler.set_epoch(1)
    expected = [batch.tolist() for batch in loader_at(1)]
    iterator = iter(first)
    seen = [next(iterator).tolist() for _ in range(5)]
    second = loader(workers)
    second.load_state_dict(first.state_dict())
    iterator = iter(second)
    second.sampler.set_epoch(1)  # after the iterator was made, as Lightning does when it resumes
    assert seen + [batch.tolist() for batch in iterator] == expected
    assert second.state_dict()["done"] == 13
    second.sampler.set_epoch(2)
    assert [batch.tolist() for batch in second] == [batch.tolist() for batch in loader_at(2)]


def loader_at(epoch: int) -> PlannedLoader:
    fresh = loader()
    fresh.sampler.set_epoch(epoch)
    return fresh


def test_loader_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    assert len(list(loader())) == 13
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_refuses_another_plan_inside_an_epoch_only() -> None:
    stopped = loader()
    iterator = iter(stopped)
    next(iterator)
    sentence = r"stopped after batch 1 of 13 \(seed 5\), but the data module now makes 13 batches with seed 6"
    with pytest.raises(RuntimeError, match=sentence):
        loader(seed=6).load_state_dict(stopped.state_dict())
    for _ in iterator:
        pass
    other = loader(seed=6)
    other.load_state_dict(stopped.state_dict())  # at an epoch's end there is nothing left to be exact about
    other.sampler.set_epoch(1)
    assert len(list(other)) == 13


def test_every_row_once_from_short_to_long() -> None:
    rows = [torch.ones(n) for n in (5, 1, 4, 2, 3)]
    plan = LengthGrouped([5, 1, 4, 2, 3], batch_size=2, rank=1, world_size=2)
    loader = PlannedLoader(rows, plan, collate=lambda items: [*map(len, items)])
    state = torch.get_rng_state()
    assert list(loader.once()) == [[1, 2], [3, 4], [5]]
    assert torch.equal(torch.get_rng_state(), state)
    assert loader.state_dict()["done"] == 0  # where it stands has not moved
