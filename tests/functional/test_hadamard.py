"""Hadamard matrices of any size: exact, applied as two products, and beside a butterfly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_peft.functional import hadamard
from lightning_peft.functional.hadamard import factors, is_exact, kron, left_core, power_of_two, rows, sizes

# Widths of common models, and the ends: the card's table, with what stands left of the product.
TABLE = {
    384: (12, 32),
    768: (24, 32),
    896: (28, 32),
    1024: (32, 32),
    1536: (48, 32),
    3072: (48, 64),
    4096: (64, 64),
    5120: (80, 64),
    11008: (86, 128),
    13824: (108, 128),
    14336: (112, 128),
}
SMALL = (1, 2, 3, 4, 5, 6, 7, 12, 16, 20, 24, 28, 36, 44, 60, 86, 108, 140, 148)


def butterfly(x: Tensor) -> Tensor:
    """log2 d stages of sums and differences: Sylvester's matrix times every row, by another road."""
    d, h = x.shape[-1], 1
    while h < d:
        pairs = x.reshape(*x.shape[:-1], d // (2 * h), 2, h)
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2).reshape(
            x.shape
        )
        h *= 2
    return x


@pytest.mark.parametrize("d", [*TABLE, *SMALL])
def test_property_5_factors_are_hadamard(d: int) -> None:
    for factor in factors(d):
        n = len(factor)
        if is_exact(d):
            whole = factor.to(torch.int64)
            assert torch.equal(whole.double(), factor)
            assert set(whole.unique().tolist()) <= {-1, 1}
            assert torch.equal(whole @ whole.t(), n * torch.eye(n, dtype=torch.int64))
        else:
            torch.testing.assert_close(factor @ factor.t(), n * torch.eye(n).double(), rtol=0, atol=1e-11)


def test_only_two_common_widths_have_no_hadamard_matrix_here() -> None:
    widths = [*TABLE, 512, 640, 1280, 1600, 2048, 2304, 2560, 2816, 3200, 3584, 4608, 5632, 6144, 6656, 7168, 8192]
    widths += [10240, 12288, 16384, 18944, 22016, 28672, 29568]
    assert [d for d in widths if not is_exact(d)] == [11008, 22016]


@pytest.mark.parametrize("d", TABLE)
def test_sizes_of_common_widths(d: int) -> None:
    assert sizes(d) == TABLE[d]
    assert [len(f) for f in factors(d)] == [*TABLE[d]]


def test_both_of_paleys_constructions_are_used() -> None:
    """12 comes from 5 and is symmetric, 20 from 19 and is not: its adjoint is another matrix."""
    assert (left_core(768), left_core(5120), left_core(11008), left_core(44), left_core(140)) == (12, 20, 43, 44, 140)
    second, first = factors(12)[0], factors(20)[0]
    assert torch.equal(second, second.t())
    assert not torch.equal(first, first.t())


@pytest.mark.parametrize("d", [24, 40, 64, 86, 768])
def test_rows_are_those_of_the_product(d: int) -> None:
    H = torch.kron(*factors(d))
    torch.testing.assert_close(rows(d, torch.arange(d)).double(), H, rtol=0, atol=0 if is_exact(d) else 1e-6)
    x = torch.randn(3, 2, d, dtype=torch.float64)
    left, right = factors(d)
    torch.testing.assert_close(kron(x, left, right), x @ H.t())
    torch.testing.assert_close(kron(x, left.t(), right.t()), x @ H)


@pytest.mark.parametrize("d", [2, 32, 1024, 4096])
def test_property_4_the_butterfly_agrees(d: int) -> None:
    x = torch.randn(2, d, dtype=torch.float64)
    torch.testing.assert_close(kron(x, *factors(d)), butterfly(x))


def test_large_widths_have_rows_without_a_matrix() -> None:
    d = 50257  # a prime: cosines; in full 20 GB
    found = rows(d, torch.tensor([0, 1, d - 1])).double()
    torch.testing.assert_close(found @ found.t(), d * torch.eye(3).double(), rtol=0, atol=1e-3)


def test_powers_of_two_are_near_the_root() -> None:
    for n in (1, 2, 12, 32, 64, 86, 4096):
        assert 2**-0.5 - 1e-9 <= power_of_two(n) * n**0.5 <= 2**0.5 + 1e-9
        assert torch.tensor(power_of_two(n), dtype=torch.bfloat16).item() == power_of_two(n)


def test_a_width_is_positive() -> None:
    with pytest.raises(ValueError, match=r"a Hadamard matrix has a size of at least 1. Got 0\."):
        hadamard.sizes(0)
