from __future__ import annotations

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from lightning_peft.functional.incremental_svd import Sketch, join, sketch, strongest

N, D = 240, 12


@pytest.fixture
def X() -> Tensor:
    """Strong in few directions, and far from the origin."""
    X = torch.randn(N, D, dtype=torch.float64) @ torch.diag(0.7 ** torch.arange(D).double())
    return X @ torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q + 5


def full(X: Tensor) -> tuple[Tensor, Tensor]:
    _, S, V = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    return S, V


def close(found: Sketch, X: Tensor, k: int, tolerance: float) -> None:
    S, V = full(X)
    torch.testing.assert_close(found.S, S[:k], rtol=tolerance, atol=tolerance)
    cosines = (found.V * V[:k]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(k, dtype=torch.float64), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.mean, X.mean(0))
    torch.testing.assert_close(found.energy, S.square().sum())
    assert found.count == len(X)


@pytest.mark.parametrize("size", [1, 7, 60, N])
def test_without_truncation_batches_are_the_whole(X: Tensor, size: int) -> None:
    """Also where a batch has fewer rows than there are directions."""
    first, *rest = X.split(size)
    found = sketch(first).truncated(D)
    for part in rest:
        found = join(found, sketch(part)).truncated(D)
    close(found, X, D, 1e-9)
    torch.testing.assert_close(found.explained().sum(), torch.ones((), dtype=torch.float64))


def test_sketches_join_in_any_order_and_at_once(X: Tensor) -> None:
    parts = [sketch(part).truncated(D) for part in X.split(50)]
    close(join(*parts).truncated(D), X, D, 1e-9)
    close(join(*reversed(parts)).truncated(D), X, D, 1e-9)
    nothing = sketch(X[:0])
    close(join(nothing, *parts, nothing).truncated(D), X, D, 1e-9)


def test_truncation_loses_little_of_what_is_strong(X: Tensor) -> None:
    k = 6
    found = sketch(X[:40]).truncated(k)
    for part in X[40:].split(40):
        found = join(found, sketch(part)).truncated(k)
    S, V = full(X)
    torch.testing.assert_close(found.S[:3], S[:3], rtol=1e-2, atol=0)
    assert (found.V[:3] * V[:3]).sum(1).abs().min() > 0.99
    # what was dropped is dropped from the directions, and from neither mean nor energy
    torch.testing.assert_close(found.mean, X.mean(0))
    torch.testing.assert_close(found.energy, S.square().sum())


def test_it_is_pefts_incremental_pca(X: Tensor) -> None:
    k = 4
    pca = IncrementalPCA(n_components=k)
    found = None
    for part in X.split(40):
        pca.partial_fit(part)
        found = (sketch(part) if found is None else join(found, sketch(part))).truncated(k)
        torch.testing.assert_close(found.S, pca.singular_values_, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.V, pca.components_, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.explained(), pca.explained_variance_ratio_, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.mean, pca.mean_)


def test_data_that_do_not_vary_explain_nothing() -> None:
    found = sketch(torch.ones(5, 4)).truncated(3)
    assert found.explained().tolist() == [0.0, 0.0, 0.0]


def test_large_matrices_are_sketched_without_the_global_generator() -> None:
    generator = torch.Generator().manual_seed(0)
    m, d, k = 400, 300, 8
    X = torch.randn(m, d, generator=generator, dtype=torch.float64) * 0.8 ** torch.arange(d).double()
    before = torch.get_rng_state()
    S, V = strongest(X, k)
    assert torch.equal(torch.get_rng_state(), before)
    _, S_full, V_full = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(S, S_full[:k], rtol=1e-6, atol=0)
    assert (V * V_full[:k]).sum(1).abs().min() > 1 - 1e-5
    again = strongest(X, k)
    assert torch.equal(again[0], S)
    assert torch.equal(again[1], V)


def test_signs_are_everybodys(X: Tensor) -> None:
    _, V = strongest(X, 5)
    _, same = strongest(-X.flip(0), 5)
    torch.testing.assert_close(V, same)
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()
