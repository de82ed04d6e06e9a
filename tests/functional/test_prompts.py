from __future__ import annotations

import pytest
import torch

from lightning_peft.functional.prompts import (
    PromptSplit,
    dept_parameters,
    dept_split,
    dpt_parameters,
    dpt_rank,
    half_width,
    position_offsets,
    product_std,
    svd_start,
)


@pytest.mark.parametrize(("std", "rank"), [(0.2635, 10), (0.02, 10), (1.3, 1), (0.05, 64)])
def test_property_sigma_rule_gives_the_prompts_deviation(std: float, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = half_width(std, rank)
    A = torch.empty(400, rank).uniform_(-a, a, generator=generator)
    B = torch.empty(rank, 500).uniform_(-a, a, generator=generator)
    assert (A @ B).std().item() == pytest.approx(std, rel=0.05)
    assert product_std(a, rank) == pytest.approx(std)


@pytest.mark.parametrize(("std", "rank"), [(0.0, 4), (-1.0, 4), (1.0, 0)])
def test_a_start_needs_something(std: float, rank: int) -> None:
    with pytest.raises(ValueError, match="positive deviation and at least one component"):
        half_width(std, rank)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_svd_start_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U, S, V = svd_start(rows, 5)
    torch.testing.assert_close((U * S) @ V, rows)
    U, S, V = svd_start(rows, 2)
    rest = torch.linalg.svdvals(rows)[2:]
    torch.testing.assert_close((rows - (U * S) @ V).norm(), rest.norm())
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_svd_start_is_at_least_single() -> None:
    assert all(part.dtype == torch.float32 for part in svd_start(torch.randn(4, 6).bfloat16(), 2))


def test_offsets_are_the_tables_rows_and_zero_elsewhere() -> None:
    generator = torch.Generator().manual_seed(2)
    A, B, value = (torch.randn(size, generator=generator) for size in ((7, 3), (3, 4), (3,)))
    positions = torch.tensor([[-1, 0, 6, 7], [3, 3, 100, 2]])
    offsets = position_offsets(positions, A, B, value)
    table = A @ torch.diag(value) @ B
    assert offsets.shape == (2, 4, 4)
    torch.testing.assert_close(offsets[0, 1:3], table[[0, 6]])
    torch.testing.assert_close(offsets[1, [0, 1, 3]], table[[3, 3, 2]])
    assert offsets[0, [0, 3]].eq(0).all()
    assert offsets[1, 2].eq(0).all()


def test_gradients_of_offsets() -> None:
    A, B, value = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((5, 2), (2, 3), (2,)))
    positions = torch.tensor([[0, 4, -1], [4, 9, 1]])
    assert torch.autograd.gradcheck(lambda *args: position_offsets(positions, *args), (A, B, value))


@pytest.mark.parametrize(
    ("width", "counts"), [(512, 6_120), (768, 8_680), (1024, 11_240), (4096, 41_960)], ids="d={}".format
)
def test_counts_of_decomposed_prompts(width: int, counts: int) -> None:
    assert dpt_parameters(100, width, 10) == counts
    assert [dpt_rank(count, 100, width) for count in (counts, counts - 1)] == [10, 9]


@pytest.mark.parametrize("length", [1, 20, 40, 60, 80, 100])
def test_property_a_split_never_exceeds_its_parameters(length: int) -> None:
    for width, reach in ((768, 256), (768, 512), (4096, 256), (384, 64)):
        parameters = 100 * width + 17
        split = dept_split(parameters, width, reach, length)
        assert dept_parameters(split.length, width, split.rank, reach) <= parameters
        most = min(reach, width)
        assert split.rank == most or dept_parameters(split.length, width, split.rank + 1, reach) > parameters


def test_the_papers_splits() -> None:
    found = [dept_split(76_800, 768, 256, length).rank for length in (20, 40, 60, 80, 100)]
    assert found == [60, 45, 30, 15, 0]
    assert dept_split(76_800, 768, 512) == PromptSplit(60, 24)
    assert [dept_split(409_600, 4096, 256, m).rank for m in (60, 40)] == [37, 56]
    assert dept_parameters(60, 4096, 37, 256) == 406_784


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"parameters=767 does not pay for 1 prompt tokens of width 768"):
        dept_split(767, 768, 256)
    with pytest.raises(ValueError, match=r"does not pay for 200 prompt tokens"):
        dept_split(76_800, 768, 256, length=200)
    with pytest.raises(ValueError, match=r"less than one component costs: 100 prompt tokens of width 768 take 868"):
        dpt_rank(867, 100, 768)
    with pytest.raises(ValueError, match="reach must be at least 1. Got 0"):
        dept_split(76_800, 768, 0)
    with pytest.raises(TypeError, match="parameters must be an integer"):
        dpt_rank(8.68e3, 100, 768)  # type: ignore[arg-type]
