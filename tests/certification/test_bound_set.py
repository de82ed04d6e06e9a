"""The bound set: every example once, and what cannot be counted so is told."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_peft.certification.bound_set import BoundSet, example_hash, root
from lightning_peft.modules.batching import LengthGrouped, PlannedLoader

DATA = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
ROWS = [torch.tensor([i, i * i]) for i in range(10)]


def labels(data: BoundSet) -> list[list[int]]:
    return [batch[1].tolist() for batch in data.read(range(len(data.batches)))]


def test_every_example_once_in_its_order() -> None:
    data = BoundSet(DataLoader(DATA, batch_size=4, shuffle=True))
    assert len(data) == 10
    state = torch.get_rng_state()
    assert labels(data) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch) for batch in BoundSet(DATA, 3).batches] == [3, 3, 3, 1]
    assert BoundSet(DATA).batch_size == 32


def test_a_loader_for_several_processes_repeats_nothing() -> None:
    sampler = DistributedSampler(DATA, num_replicas=4, rank=1)
    assert sum(map(len, labels(BoundSet(DataLoader(DATA, 4, sampler=sampler))))) == 10


def test_planned_batches_come_from_short_to_long() -> None:
    rows = [torch.ones(n) for n in (5, 1, 4, 2, 3)]
    loader = PlannedLoader(rows, LengthGrouped([5, 1, 4, 2, 3], batch_size=2), collate=lambda items: [*map(len, items)])
    data = BoundSet(loader)
    assert list(data.read(range(len(data.batches)))) == [[1, 2], [3, 4], [5]]
    assert root(data.dataset) == (rows, [1, 3, 4, 2, 0])


def test_what_is_kept() -> None:
    data = BoundSet(DATA, 4)
    before = data.digest()
    data.keep([1, 3, 5])
    assert labels(data) == [[1, 3, 5]]
    assert root(data.dataset)[1] == [1, 3, 5]
    assert data.digest() != before == BoundSet(DataLoader(DATA, 2, shuffle=True)).digest()
    with pytest.raises(ValueError, match="none is left to certify on"):
        data.keep([])


def test_hashes_tell_examples_apart() -> None:
    examples: list[Any] = [
        torch.ones(2),
        torch.ones(2, 1),
        torch.ones(2, dtype=torch.float64),
        (torch.ones(2), 1),
        (torch.ones(2), True),
        {"text": "a", "label": 1},
        {"text": "a", "label": 2},
        ["a", "b"],
        ["ab"],
        b"a",
        "a",
    ]
    assert len({example_hash(example) for example in examples}) == len(examples)
    assert example_hash(torch.ones(2)) == example_hash(torch.ones(4)[::2])
    # A tokenizer's mapping is no dictionary, and prints large tensors with dots.
    ids = torch.arange(4000)
    other = ids.clone()
    other[2000] = 0
    one, two = (UserDict(ids=each) for each in (ids, other))
    assert example_hash(one) != example_hash(two)
    assert example_hash(one) == example_hash({"ids": ids})


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(3))


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.rand(2), 0


class SometimesAugmented(Augmented):
    """The first example is left as it is, the others are not."""

    def __getitem__(self, index: int) -> Any:
        return (torch.rand(2) if index else torch.zeros(2)), 0


class Opaque:
    """An example of which nothing is known but where it lies in memory."""


def noisy(items: Any) -> Any:
    x = default_collate(items)
    return x + torch.randn(x.shape)


def centred(items: Any) -> Any:
    x = default_collate(items)
    return x - x.float().mean(0)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (
            DataLoader(ROWS, 4, collate_fn=lambda items: default_collate(items[:1] * len(items))),
            ValueError,
            "its example 1 is not what example 1 gives by itself",
        ),
        (
            DataLoader(ROWS, 4, collate_fn=lambda items: default_collate(items[:2] + items[3:])),
            ValueError,
            "makes 3 examples of 4",
        ),
        (DataLoader(ROWS, 4, collate_fn=noisy), ValueError, "collate_fn gives another batch each time"),
        (DataLoader(ROWS, 4, collate_fn=centred), ValueError, "its example 0 is not what example 0 gives by itself"),
        (DataLoader(DATA, 4, drop_last=True), ValueError, r"drops the last 2 of 10 examples \(drop_last=True\)"),
        (
            DataLoader(DATA, sampler=RandomSampler(DATA, True)),
            ValueError,
            "draws 10 of 10 examples, some of them twice",
        ),
        (
            DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 10, 10)),
            ValueError,
            "WeightedRandomSampler chooses which examples are read",
        ),
        (DataLoader(DATA, batch_sampler=[[0], [1]]), ValueError, "come from a list of somebody's own"),  # type: ignore[arg-type]
        (DataLoader(Stream()), ValueError, "Stream is a stream or no data"),
        (3, TypeError, "int is a stream or no data"),
        (Subset(DATA, []), ValueError, "the bound set has no example"),
        (Augmented(), ValueError, "is another one each time that it is read"),
        (SometimesAugmented(), ValueError, "is another one each time that it is read"),
        (Subset(DATA, [0, 1, 1, 2]), ValueError, "has 1 example more than once, of 4"),
        (Subset(Subset(DATA, [3, 4, 3]), [0, 1, 2]), ValueError, "has 1 example more than once, of 3"),
        ([Opaque(), Opaque()], TypeError, "an example holds a Opaque, whose contents cannot be told"),
    ],
)
def test_what_cannot_be_counted_is_told(data: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        BoundSet(data)


def padded(items: Any, left: bool = False) -> Any:
    longest = max(map(len, items))
    rows = [[0] * (longest - len(row)) + row if left else row + [0] * (longest - len(row)) for row in items]
    return {"ids": torch.tensor(rows), "length": torch.tensor(list(map(len, items))), "name": [str(r) for r in items]}


def sorted_and_padded(items: Any) -> Any:
    return padded(sorted(items, key=len))


@pytest.mark.parametrize("collate", [padded, partial(padded, left=True), sorted_and_padded])
def test_padding_and_order_are_the_loaders_own(collate: Any) -> None:
    texts = [[5, 3, 1], [2], [7, 7], [4, 5, 6, 7], [9]]
    before = torch.get_rng_state(), random.getstate()
    data = BoundSet(DataLoader(texts, 3, collate_fn=collate))  # type: ignore[arg-type]
    assert (torch.get_rng_state().equal(before[0]), random.getstate()) == (True, before[1])
    assert [len(batch["name"]) for batch in data.read([0, 1])] == [3, 2]


def test_nothing_is_dropped_where_nothing_is_left_over() -> None:
    assert len(BoundSet(DataLoader(DATA, 5, drop_last=True))) == 10
