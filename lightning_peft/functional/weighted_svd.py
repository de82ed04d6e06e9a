"""The singular value decomposition of a weight whose inputs are not worth the same; and what its inputs are worth.

In the order of use: what the inputs of a layer are worth, from per-sample gradients or from what they carry; the
decomposition; what of it fits into a number of parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2**22
"""So many numbers of per-sample gradients are in memory at once, where they are built: 16 MB of float32."""


def squared_gradients(X: Tensor, G: Tensor) -> Tensor:
    """Squares of per-sample gradients of a weight, summed over samples and outputs, for every input.

        F_i = sum_s sum_o (G_s^T X_s)_oi^2 = sum_s x_si^T (G_s G_s^T) x_si       x_si: what input i carries, (T,)

    The right form builds no gradient: its largest tensor is (B, T, T). For long samples the left one costs less, and
    is built a few samples at a time. Squares of a gradient that was averaged over samples would be too small: there,
    samples cancel.

    Args:
        X: (B, T, d_in), what the layer multiplies; T rows a sample, among them all calls of the layer.
        G: (B, T, d_out), the gradient of each sample's own loss by what it multiplies to.

    Returns:
        (d_in,), in X's dtype.

    Example:
        >>> squared_gradients(torch.tensor([[[1.0, 0.0], [1.0, 2.0]]]), torch.tensor([[[3.0], [-1.0]]]))
        tensor([4., 4.])
    """
    T, d_in, d_out = X.shape[1], X.shape[2], G.shape[2]
    if T * (d_in + d_out) <= d_in * d_out:
        # Each is a square: what is below zero is rounding, where a sample's positions cancel.
        return ((G @ G.mT @ X) * X).sum(1).clamp_min(0).sum(0)
    return squared_gradient_entries(X, G).sum(0)


def squared_gradient_entries(X: Tensor, G: Tensor) -> Tensor:
    """Squares of per-sample gradients of a weight, summed over samples, entry by entry.

        F_oi = sum_s (G_s^T X_s)_oi^2

    As many multiplications as the weight's gradient in an ordinary backward, and a few samples' gradients in memory.

    Args:
        X: (B, T, d_in).
        G: (B, T, d_out); both as in :func:`squared_gradients`.

    Returns:
        (d_out, d_in), in X's dtype.
    """
    d_in, d_out = X.shape[2], G.shape[2]
    total = X.new_zeros(d_out, d_in)
    for x, g in zip(*(tensor.split(max(1, _BLOCK // (d_in * d_out))) for tensor in (X, G)), strict=True):
        total += (g.mT @ x).square_().sum(0)
    return total


def scale(importance: Tensor, power: float = 0.5, least: float = 1e-6) -> Tensor:
    """The diagonal by which inputs are weighted, from what they are worth: d = max(importance^power, least * mean).

    The floor keeps inputs that no data have shown: their weights are what is given up first, and are there at full
    rank. Its size is our choice, relative so that the loss may be multiplied by a constant.

    Args:
        importance: (d_in,), not negative; a sum or a mean, since a factor changes nothing but the size of s.
        power: 1/2 of summed squared gradients is FWSVD's; alpha of mean magnitudes is ASVD's.
        least: the floor, relative to the mean of importance^power.

    Returns:
        (d_in,), positive; ones where nothing is worth anything.
    """
    d = importance.pow(power)
    mean = d.mean()
    return torch.where(mean > 0, d.clamp_min(least * mean), torch.ones_like(d))


def weighted_svd(W: Tensor, d: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, Vh with W = U diag(s) Vh, whose first k components are the best of rank k by inputs that weigh d.

        W diag(d) = U diag(s) Q          Vh = Q diag(d)^-1          min |(W - W_k) diag(d)|_F,  rank W_k = k

    The columns of U are orthonormal. The rows of Vh are so where d is ``None``; else those of Vh diag(d) are. Each
    column of U has its largest entry positive.

    Args:
        W: (d_out, d_in).
        d: (d_in,), positive, see :func:`scale`; ``None`` for ones: the plain decomposition.

    Returns:
        U (d_out, K), s (K,) descending, Vh (K, d_in), with K = min(d_out, d_in); in W's dtype, at least float32.

    Reference:
        Hsu et al., FWSVD, ICLR 2022, arXiv 2207.00112 (d the root of the Fisher information's row sums); Yuan et al.,
        ASVD, 2023, arXiv 2312.05821 (d a power of the inputs' magnitude). Both remembered.

    Example:
        >>> U, s, Vh = weighted_svd(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 2.0]))
        >>> s
        tensor([4., 3.])
        >>> U[:, :1] * s[:1] @ Vh[:1]
        tensor([[0., 0.],
                [0., 2.]])
    """
    return _decomposed(W, None if d is None else _wide(d).square())


def whitened_svd(W: Tensor, C: Tensor, jitter: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, Vh with W = U diag(s) Vh, whose first k components change least what the layer gives, in the mean square.

        C = X^T X = S S^T     W S = U diag(s) Q     Vh = Q S^-1     min |X (W - W_k)^T|_F,  rank W_k = k

    The loss is sum_{i > k} s_i^2. The columns of U are orthonormal, the largest entry of each positive.

    Args:
        W: (d_out, d_in).
        C: (d_in, d_in), the sum or mean of x x^T over the layer's inputs; S is any root, such as Cholesky's.
        jitter: what is added to the diagonal of C, relative to its mean: directions that no data have shown keep a
            length.

    Returns:
        As :func:`weighted_svd`.

    Reference:
        Wang et al., SVD-LLM, 2024, arXiv 2403.07378. Departure: it takes S by Cholesky and solves with it; here neither
        is needed, see :func:`_decomposed`. Jitter as in its code.
    """
    C = _wide(C)
    mean = C.diagonal().mean()
    return _decomposed(W, C, torch.where(mean > 0, jitter * mean, torch.ones_like(mean)))


def _decomposed(W: Tensor, C: Tensor | None, jitter: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of W S with S^-1 absorbed, for S S^T = C + jitter, without S.

        (W S)(W S)^T = W C W^T = U diag(s^2) U^T          diag(s) Vh = diag(s) Q S^-1 = U^T W

    So U comes from the eigenvectors of a K x K matrix, and what follows needs no root of C and no inverse: U U^T W is W
    however uneven C is. An SVD of W S with S^-1 multiplied on afterwards loses max(S) / min(S) times the rounding, in
    the columns that matter least.

    Squaring halves the digits: a singular value below 1e-8 of the largest is lost to rounding. Float32 weights have
    none to lose, and the product stays exact. It is also the quicker way: BERT-base's 72 layers take half the time of
    `torch.linalg.svd` in float64. In float32 that one is wrong where C is uneven. Figures: benchmarks/svd_time.py.
    """
    wide = _wide(W)
    d_out, d_in = wide.shape
    # With fewer inputs than outputs, W = basis R and the same of R: the K x K matrix is the small one always.
    basis, R = torch.linalg.qr(wide) if d_out > d_in else (None, wide)

    def weighted(rows: Tensor) -> Tensor:
        if C is None:
            return rows
        return rows * C if C.dim() == 1 else rows @ C

    gram = weighted(R) @ R.mT + jitter * (R @ R.mT)
    U = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors
    V = U.mT @ R
    # s^2 = v C v^T of each row: where it is small, the eigenvalue is rounding. C itself may be so, and below zero.
    s = ((weighted(V) * V).sum(1).clamp_min(0) + jitter * V.square().sum(1)).sqrt()
    s, order = s.sort(descending=True, stable=True)
    U, V = U[:, order], V[order]
    if basis is not None:
        U = basis @ U
    # A vector's sign is anybody's choice: here the largest entry of U's column is positive.
    sign = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    U, V = U * sign, V * sign.mT
    Vh = torch.where(s[:, None] > 0, V / s[:, None], V)
    dtype = torch.promote_types(W.dtype, torch.float32)
    return U.to(W.device, dtype), s.to(W.device, dtype), Vh.to(W.device, dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    tensor = tensor.detach()
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
