"""Subsampled randomized Hadamard transforms: orthonormal rows, two ways to apply them, one adjoint."""

from __future__ import annotations

import copy
import pickle
from typing import Literal

import pytest
import torch

from lightning_peft.functional import hadamard
from lightning_peft.functional.srht import SRHT, Path, Projection, faster_path, has_small_factors, up

CPU = torch.device("cpu")
PATHS: tuple[Path, ...] = ("rows", "kron")
# One factor left, Paley II, Sylvester, Paley II and Sylvester, Sylvester, Paley I, cosines
WIDTHS = (384, 768, 1024, 3072, 4096, 5120, 11008)


def made(
    d: int, n: int, path: Path, dtype: torch.dtype = torch.float32, side: Literal["in", "out"] = "in"
) -> Projection:
    return SRHT(d, n, 0, f"{d}", side).at(CPU, dtype, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("d", [24, 384, 768, 1024, 5120, 86])
def test_property_2_rows_are_orthonormal(d: int, path: Path) -> None:
    P = made(d, min(d, 64), path)
    found = P.whole() * P.unit
    torch.testing.assert_close(found @ found.t(), torch.eye(len(found)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("d", [24, 40, 86, 768])
@pytest.mark.parametrize("blocks", [0.5, 1.0, 2.3])
def test_property_3_up_is_the_adjoint_of_down(d: int, path: Path, blocks: float) -> None:
    n = round(d * blocks)
    P = made(d, n, path, torch.float64)
    x, h, scale = torch.randn(2, 3, d).double(), torch.randn(n, 6).double(), torch.rand(d).double()
    forth, back = (P.down(x, scale) * h).sum(), (x * up(P, h, x, scale)).sum()
    torch.testing.assert_close(forth, back, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(P.down(x), P.whole() @ x.view(6, d).t())


@pytest.mark.parametrize("d", WIDTHS)
def test_property_4_rows_and_kron_agree(d: int) -> None:
    rows, kron = (made(d, 64, path) for path in PATHS)
    x = torch.randn(1, 5, d, generator=torch.Generator().manual_seed(0))
    down = [P.down(x) * P.unit for P in (rows, kron)]
    torch.testing.assert_close(*down, rtol=0, atol=1e-4)
    torch.testing.assert_close(*(up(P, down[0], x) * P.unit for P in (rows, kron)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("d", [24, 768, 1024])
def test_property_8_one_hot_inputs_keep_their_share(d: int, path: Path) -> None:
    """|P e_j|^2 is r / d for every j: entries are flat. With cosines it is not."""
    P = made(d, d // 4, path)
    found = P.down(torch.eye(d).unsqueeze(0)).square().sum(0) * P.unit**2
    torch.testing.assert_close(found, torch.full((d,), 0.25), rtol=0, atol=1e-6)


def test_with_more_rows_than_width_there_are_blocks() -> None:
    P = made(24, 60, "rows", torch.float64)
    found = P.whole() * P.unit
    gram = found @ found.t()
    for block in (slice(0, 24), slice(24, 48), slice(48, 60)):
        torch.testing.assert_close(gram[block, block], torch.eye(len(gram[block])).double())
    assert gram[:24, 24:48].abs().max() > 0.1  # signs of its own: another rotation
    assert torch.equal(made(24, 60, "rows").whole()[:24].sign().sum(1), made(24, 24, "rows").whole().sign().sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_property_9_every_dtype_holds_the_same_numbers(dtype: torch.dtype) -> None:
    for path in PATHS:
        torch.testing.assert_close(made(768, 50, path, dtype).whole().double(), made(768, 50, path).whole().double())
        assert made(768, 50, path, dtype).unit == made(768, 50, path).unit


@pytest.mark.parametrize("path", PATHS)
def test_float16_does_not_overflow(path: Path) -> None:
    """4096 entries of 100 with the signs of a row: without the scale between the stages their sum is 409,600."""
    P = made(4096, 64, path, torch.float16)
    x = (100 * P.whole()[3].sign()).view(1, 1, -1)
    down = P.down(x)
    assert down.isfinite().all()
    torch.testing.assert_close(down[3].float(), torch.tensor([6400.0]))
    back = up(P, down, x) * P.unit**2
    assert back.isfinite().all()


def test_a_draw_is_made_once_for_all_who_hold_it() -> None:
    drawn = SRHT(24, 8, 0, "x", "in")
    first = drawn.at(CPU, torch.float32, "rows")
    assert drawn.at(CPU, torch.float32, "rows") is first
    assert drawn.at(CPU, torch.float64, "rows") is not first
    for twin in (copy.deepcopy(drawn), pickle.loads(pickle.dumps(drawn))):
        assert torch.equal(twin.at(CPU, torch.float32, "rows").whole(), first.whole())


def test_a_subset_has_the_same_rows() -> None:
    for path in PATHS:
        whole, some = made(40, 12, path), SRHT(40, 12, 0, "40", "in", [1, 5, 11]).at(CPU, torch.float32, path)
        assert torch.equal(some.whole(), whole.whole()[[1, 5, 11]])


def test_a_default_dtype_changes_nothing() -> None:
    first = made(86, 20, "kron").whole()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(made(86, 20, "kron").whole(), first)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("d", "last"), [(384, 130), (768, 139), (1024, 144), (4096, 189)])
def test_rows_are_faster_up_to_a_rank(d: int, last: int) -> None:
    """About 2 sqrt d multiplications, and the passes beside them; in two blocks twice as many."""
    assert [faster_path(d, n) for n in (1, last, last + 1, d)] == ["rows", "rows", "kron", "kron"]
    assert [faster_path(d, n, 2) for n in (2 * last, 2 * last + 2)] == ["rows", "kron"]
    assert faster_path(50257, 50257) == "rows"


def test_widths_without_small_factors_are_known() -> None:
    assert not has_small_factors(50257)
    assert all(has_small_factors(d) for d in (*WIDTHS, 32000, 151936, 1, 2, 3))
    assert hadamard.sizes(50257) == (50257, 1)
