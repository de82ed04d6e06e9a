from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.functional.weighted_svd import (
    scale,
    squared_gradient_entries,
    squared_gradients,
    weighted_svd,
    whitened_svd,
)

SHAPES = [(12, 12), (8, 20), (20, 8)]
DEAD = 3
"""An input that nothing is known of."""


def uneven(d_in: int) -> Tensor:
    """Importance over eight orders of magnitude, and none at all."""
    importance = 10 ** (-8 * torch.rand(d_in))
    importance[DEAD] = 0
    return importance


def inputs(d_in: int, n: int = 200) -> Tensor:
    """Rows that are strong in few directions, and never on one channel."""
    X = torch.randn(n, d_in) * 0.6 ** torch.arange(d_in) @ torch.linalg.qr(torch.randn(d_in, d_in)).Q
    X[:, DEAD] = 0
    return X


WEIGHTINGS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "none": weighted_svd,
    "diagonal": lambda W: weighted_svd(W, scale(uneven(W.shape[1]))),
    "whiten": lambda W: whitened_svd(W, inputs(W.shape[1]).T @ inputs(W.shape[1])),
    "nothing known": lambda W: weighted_svd(W, scale(torch.zeros(W.shape[1]))),
    "nothing seen": lambda W: whitened_svd(W, torch.zeros(W.shape[1], W.shape[1])),
}


def relative(found: Tensor, expected: Tensor, dim: int | None = None) -> float:
    return float(((found - expected).norm(dim=dim) / expected.norm(dim=dim)).max())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_property_1_full_rank_is_the_weight(shape: tuple[int, int], weighting: str) -> None:
    """In every column, also of an input that is worth nothing: the weighting that is taken in is taken out."""
    W = torch.randn(shape)
    U, s, Vh = WEIGHTINGS[weighting](W)
    K = min(shape)
    assert (U.shape, s.shape, Vh.shape) == ((shape[0], K), (K,), (K, shape[1]))
    assert {t.dtype for t in (U, s, Vh)} == {torch.float32}
    assert all(bool(t.isfinite().all()) for t in (U, s, Vh))
    assert relative(U * s @ Vh, W, dim=0) < 1e-5
    torch.testing.assert_close(U.T @ U, torch.eye(K), rtol=0, atol=1e-5)
    assert (s.diff() <= 0).all()
    assert (s > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_one_is_the_svd(shape: tuple[int, int]) -> None:
    W = torch.randn(shape)
    U, s, Vh = weighted_svd(W)
    other = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(s, other.S, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(len(s)), rtol=0, atol=1e-4)
    torch.testing.assert_close((U * other.U).sum(0).abs(), torch.ones(len(s)), rtol=0, atol=1e-4)
    torch.testing.assert_close(weighted_svd(W, torch.ones(shape[1])), (U, s, Vh), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_diagonal_is_taken_in_and_out_again(shape: tuple[int, int]) -> None:
    """Against the textbook's way, in float64: decompose W diag(d), multiply by its inverse."""
    W, d = torch.randn(shape).double(), scale(torch.rand(shape[1]).double() ** 4)
    U, s, Vh = weighted_svd(W, d)
    other = torch.linalg.svd(W * d, full_matrices=False)
    torch.testing.assert_close(s, other.S)
    k = 4
    torch.testing.assert_close(U[:, :k] * s[:k] @ Vh[:k], other.U[:, :k] * other.S[:k] @ other.Vh[:k] / d)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_whitened_one_is_the_best_for_what_the_layer_gives(shape: tuple[int, int], k: int) -> None:
    """Eckart and Young in the whitened space, by Cholesky as in SVD-LLM; and no neighbour is better."""
    W, X = torch.randn(shape).double(), inputs(shape[1]).double()
    C = X.T @ X
    U, s, Vh = whitened_svd(W, C, jitter=1e-9)
    root = torch.linalg.cholesky(C + 1e-9 * C.diagonal().mean() * torch.eye(shape[1]))
    other = torch.linalg.svd(W @ root, full_matrices=False)
    torch.testing.assert_close(s, other.S)
    W_k = U[:, :k] * s[:k] @ Vh[:k]
    reference = torch.linalg.solve_triangular(
        root, other.U[:, :k] * other.S[:k] @ other.Vh[:k], upper=False, left=False
    )
    torch.testing.assert_close(W_k, reference, rtol=1e-5, atol=1e-5)

    def loss(W_k: Tensor) -> float:
        return float((X @ (W - W_k).T).square().sum())

    best = loss(W_k)
    assert best == pytest.approx(float(s[k:].square().sum()), rel=1e-5)
    # The plain one is of rank k as well, and worse.
    P, t, Qh = weighted_svd(W)
    assert loss(P[:, :k] * t[:k] @ Qh[:k]) > 1.01 * best
    left, right = U[:, :k] * s[:k], Vh[:k]
    for _ in range(20):
        L, R = left + 1e-2 * torch.randn_like(left), right + 1e-2 * right.norm() * torch.randn_like(right) / 10
        assert loss(L @ R) > best
        # Alternating least squares from anywhere near comes back to it, and no lower.
        for _ in range(100):
            L = (torch.linalg.pinv(X @ R.T) @ X @ W.T).T
            R = torch.linalg.pinv(L) @ W
        assert loss(L @ R) > best * (1 - 1e-9)


def test_moments_in_float32_lose_nothing_that_counts() -> None:
    """What batches add up to in float32 is not positive definite any more, and gives the optimum all the same."""
    d_in, k = 64, 24
    X = torch.randn(4096, d_in) * 0.5 ** torch.arange(d_in) @ torch.linalg.qr(torch.randn(d_in, d_in)).Q
    W = torch.randn(d_in, d_in)
    C = sum((x.T @ x for x in X.split(64)), torch.zeros(d_in, d_in))
    assert float(torch.linalg.eigvalsh(C.double())[0]) < 0
    wide = X.double()

    def loss(C: Tensor, jitter: float) -> float:
        U, s, Vh = (part.double() for part in whitened_svd(W.double(), C, jitter))
        return float((wide @ (W.double() - U[:, :k] * s[:k] @ Vh[:k]).T).norm() / (wide @ W.double().T).norm())

    optimum = loss(wide.T @ wide, 0.0)
    assert optimum < 1e-5
    assert loss(C, 1e-6) < optimum + 1e-3


def test_signs_are_settled() -> None:
    W = torch.randn(9, 7)
    U, s, Vh = weighted_svd(W)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    turned, same, _ = weighted_svd(-W)
    torch.testing.assert_close(turned, U, rtol=0, atol=1e-5)
    torch.testing.assert_close(same, s)
    assert all(map(torch.equal, (U, s, Vh), weighted_svd(W)))


def test_a_weight_of_low_rank_has_so_many_components() -> None:
    W = torch.randn(16, 3).double() @ torch.randn(3, 16).double()
    for found in (weighted_svd(W), weighted_svd(W, scale(uneven(16).double() + 1e-3))):
        U, s, Vh = found
        assert (s[3:] < 1e-9 * s[0]).all()
        assert relative(U[:, :3] * s[:3] @ Vh[:3], W) < 1e-6
    U, s, Vh = weighted_svd(torch.zeros(4, 6))
    assert not s.any()
    assert not Vh.any()
    torch.testing.assert_close(U.T @ U, torch.eye(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    W = torch.randn(5, 6).to(dtype)
    U, s, Vh = weighted_svd(W)
    assert U.dtype == s.dtype == Vh.dtype == torch.promote_types(dtype, torch.float32)
    assert relative(U * s @ Vh, W.to(U)) < 1e-6


def test_a_weight_that_is_trained_is_only_read() -> None:
    W = nn.Parameter(torch.randn(4, 4))
    assert not any(part.requires_grad for part in weighted_svd(W))


def test_scale_has_a_floor_and_no_unit() -> None:
    importance = torch.tensor([4.0, 0.0, 16.0])
    torch.testing.assert_close(scale(importance), torch.tensor([2.0, 2e-6, 4.0]))
    torch.testing.assert_close(scale(importance, power=1.0, least=0.5), torch.tensor([4.0, 10 / 3, 16.0]))
    torch.testing.assert_close(scale(1e-12 * importance), 1e-6 * scale(importance))
    assert torch.equal(scale(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize(("T", "d_in", "d_out"), [(3, 7, 9), (40, 7, 9), (1, 5, 1)])
def test_squares_are_those_of_each_samples_gradient(T: int, d_in: int, d_out: int) -> None:
    """In the form for short samples and in that for long ones, against autograd one sample at a time."""
    B = 4
    layer, X = nn.Linear(d_in, d_out).double(), torch.randn(B, T, d_in).double()
    target = torch.randn(B, T, d_out).double()
    entries, gradients = torch.zeros(d_out, d_in).double(), []
    for x, y in zip(X, target, strict=True):
        output = layer(x)
        loss = (output.tanh() - y).square().mean()
        (gradient,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
        entries += gradient.square()
        gradients.append(torch.autograd.grad(loss, output)[0])
    G = torch.stack(gradients)
    torch.testing.assert_close(squared_gradient_entries(X, G), entries)
    torch.testing.assert_close(squared_gradients(X, G), entries.sum(0))
    # Those of the mean gradient are smaller: samples cancel.
    mean = torch.einsum("bto,bti->oi", G, X) / B
    assert (B * mean.square().sum(0) <= entries.sum(0) * (1 + 1e-9)).all()


def test_squares_that_cancel_are_not_negative() -> None:
    """As at an attention's keys, whose gradients add up to zero over positions, with inputs that never change."""
    X, G = 10 * torch.randn(8, 16, 64), torch.randn(8, 16, 64)
    X[..., ::2] = torch.linspace(1, 9, 32)
    G -= G.mean(1, keepdim=True)
    squares = squared_gradients(X, G)
    assert (squares >= 0).all()
    d = scale(squares)  # one root of a negative number would cost all inputs their weighting
    assert (d[1::2] > 1e3 * d[::2]).all()


def test_few_gradients_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    X, G = torch.randn(5, 8, 4), torch.randn(5, 8, 3)
    whole = squared_gradient_entries(X, G)
    monkeypatch.setattr("lightning_peft.functional.weighted_svd._BLOCK", 24)
    torch.testing.assert_close(squared_gradient_entries(X, G), whole)
