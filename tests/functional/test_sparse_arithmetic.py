"""Changes of some entries: sums, multiples, and writing them into a tensor and out of it again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.functional.sparse_arithmetic import SparseDelta
from lightning_peft.interop.sparse import SparseAdapter

SHAPE = (6, 5)


def change(seed: int, k: int = 9) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(30, generator=generator)[:k].sort().values
    return SparseDelta(indices, torch.randn(k, generator=generator), SHAPE)


def dense(delta: SparseDelta) -> Tensor:
    whole = torch.zeros(30)
    whole[delta.indices] = delta.delta
    return whole.view(SHAPE)


def test_property_15_two_changes_added_commute() -> None:
    a, b = change(0), change(1)
    one, other = a + b, b + a
    assert set(a.indices.tolist()) & set(b.indices.tolist())  # else nothing meets
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.delta, other.delta)
    assert torch.equal(dense(one), dense(a) + dense(b))


def test_sums_in_double_precision_stay_so() -> None:
    a = SparseDelta(torch.tensor([1, 4]), torch.tensor([1e-12, 1.0], dtype=torch.float64), SHAPE)
    b = SparseDelta(torch.tensor([4]), torch.tensor([1e-12], dtype=torch.float64), SHAPE)
    assert (a + b).delta.tolist() == [1e-12, 1.0 + 1e-12]
    assert (change(0) + change(1)).delta.dtype == torch.float32


def test_multiples() -> None:
    a = change(0)
    assert torch.equal(dense(a * 0.3), dense(a) * 0.3)
    assert torch.equal(dense(-2.0 * a), dense(a) * -2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_written_and_put_back_bit_for_bit(dtype: torch.dtype) -> None:
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    for layout in (base.clone(), base.t().contiguous().t()):  # also where memory is in another order
        delta = change(0)
        for _ in range(50):
            before = delta.write(layout)
            assert torch.equal(layout, (base.to(torch.promote_types(dtype, torch.float32)) + dense(delta)).to(dtype))
            delta.put_back(layout, before)
        assert torch.equal(layout, base)


@pytest.mark.parametrize(
    ("indices", "delta", "error"),
    [
        (torch.tensor([2, 1]), torch.zeros(2), "ascending, distinct and from 0 to 29"),
        (torch.tensor([1, 1]), torch.zeros(2), "ascending, distinct"),
        (torch.tensor([1, 30]), torch.zeros(2), r"Got \[1, 30\]"),
        (torch.tensor([-1, 3]), torch.zeros(2), "from 0 to 29"),
        (torch.tensor([1]), torch.zeros(2), r"\(k,\) deltas. Got \(1,\) of torch.int64 and \(2,\)"),
        (torch.tensor([1], dtype=torch.int32), torch.zeros(1), "positions of int64"),
        (torch.tensor([1]), torch.zeros(1, dtype=torch.int64), "deltas are floating-point"),
        (
            torch.tensor([1, 7]),
            torch.tensor([1.0, float("nan")]),
            r"deltas are finite\. Got nan at position 7: the run",
        ),
        (torch.tensor([1]), torch.tensor([float("-inf")]), "Got -inf at position 1"),
    ],
)
def test_what_is_no_change_is_refused(indices: Tensor, delta: Tensor, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        SparseDelta(indices, delta, SHAPE)


@pytest.mark.parametrize(
    ("factor", "error", "says"),
    [
        (float("nan"), ValueError, r"a factor of deltas is finite\. Got nan\."),
        (float("-inf"), ValueError, r"a factor of deltas is finite\. Got -inf\."),
        ("x", TypeError, r"a factor of deltas must be a number\. Got 'x'\."),
        (True, TypeError, r"must be a number\. Got True\."),
    ],
)
def test_what_is_no_factor_is_refused(factor: Any, error: type[Exception], says: str) -> None:
    for product in (lambda: change(0) * factor, lambda: factor * change(0)):
        with pytest.raises(error, match=says):
            product()
    with pytest.raises(error, match=says):
        SparseAdapter({}) * factor  # also where there is nothing to multiply


def test_what_grows_beyond_its_dtype_is_refused() -> None:
    large = SparseDelta(torch.tensor([3]), torch.tensor([3e38]), SHAPE)
    for grown in (lambda: large + large, lambda: large * 10, lambda: large * 1e300):
        with pytest.raises(
            ValueError, match="Got inf at position 3: the run that they are from diverged, or they were"
        ):
            grown()


def test_changes_of_other_shapes_are_not_added() -> None:
    with pytest.raises(ValueError, match=r"\(6, 5\) and \(5, 6\) cannot be added"):
        change(0) + SparseDelta(torch.tensor([1]), torch.zeros(1), (5, 6))
