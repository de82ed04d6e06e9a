"""The singular value decomposition of a product of skinny matrices, without forming the product."""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V with B A = U diag(S) V, from the factors alone.

        B = Q_b R_b,  A^T = Q_a R_a,  R_b R_a^T = U' diag(S) V',      U = Q_b U',  V = V' Q_a^T

    O((d_out + d_in) r^2) where the product's own decomposition takes O(d_out d_in min(d_out, d_in)), and memory for
    tensors of the factors' shapes.

    Args:
        B: (d_out, r).
        A: (r, d_in).

    Returns:
        U (d_out, n), S (n,) descending, V (n, d_in), with n = min(r, d_in, d_out); float64 where the device has it.

    Example:
        >>> U, S, V = product_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]]))
        >>> S
        tensor([10.], dtype=torch.float64)
    """
    wide = torch.float32 if B.device.type == "mps" else torch.float64
    left, right = torch.linalg.qr(B.to(wide)), torch.linalg.qr(A.mT.to(wide))
    U, S, V = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return left.Q @ U, S, V @ right.Q.mT
