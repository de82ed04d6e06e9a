"""Principal directions of data that come in batches, from several processes or one: incremental, truncated SVD."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_SMALL = 256
"""Up to so many rows or columns the exact SVD is as quick as the randomised one."""
_ROUNDS = 4
"""Multiplications by X^T X: what is not wanted is weaker by (s_j / s_k)^8 then."""


@dataclass(frozen=True)
class Sketch:
    """What is known of n rows of data: their number, mean and energy, and directions V with singular values S.

        (S V)^T (S V)  ~  sum_i (x_i - mean)(x_i - mean)^T,        energy = sum_i |x_i - mean|^2

    Exact as :func:`sketch` makes it and :func:`join` joins it, and the best approximation of its rank once it is
    truncated. Two sketches become one (the mean is corrected for), so data may come in any order and from anywhere.

    Attributes:
        S: (m,), descending once truncated.
        V: (m, d); orthonormal rows once truncated, each with its largest entry positive.
        mean: (d,).
        energy: () tensor.
        count: n.
    """

    S: Tensor
    V: Tensor
    mean: Tensor
    energy: Tensor
    count: int

    def explained(self) -> Tensor:
        """Each direction's share of the energy, S^2 / energy: (m,). Zeros where the data do not vary."""
        return torch.where(self.energy > 0, self.S.square() / self.energy, torch.zeros_like(self.S))

    def truncated(self, k: int) -> Sketch:
        """The k strongest directions, or as many as there are."""
        S, V = strongest(self.S[:, None] * self.V, k)
        return replace(self, S=S, V=V)


def sketch(X: Tensor) -> Sketch:
    """All that there is to know of the rows of X, whose directions are the centred rows themselves.

    Args:
        X: (n, d). Computed in float64 where the device has it: sums over many batches, and differences of them.
    """
    wide = X.detach().to(torch.float32 if X.device.type == "mps" else torch.float64)
    mean = wide.mean(0) if len(X) else wide.new_zeros(X.shape[1])
    rows = wide - mean
    return Sketch(rows.new_ones(len(X)), rows, mean, rows.square().sum(), len(X))


def join(first: Sketch, *others: Sketch) -> Sketch:
    """The sketch of all rows together; not truncated.

        scatter = scatter_a + scatter_b + (n_a n_b / n) (mean_b - mean_a)(mean_b - mean_a)^T

    Reference:
        Ross et al., Incremental Learning for Robust Visual Tracking, IJCV 2008, section 3.1 (remembered): the last term
        is one more row.
    """
    for other in others:
        if not other.count:
            continue
        if not first.count:
            first = other
            continue
        count = first.count + other.count
        gap = other.mean - first.mean
        lift = (first.count * other.count / count) ** 0.5
        first = Sketch(
            S=torch.cat([first.S, other.S, first.S.new_full((1,), lift)]),
            V=torch.cat([first.V, other.V, gap[None]]),
            mean=first.mean + gap * (other.count / count),
            energy=first.energy + other.energy + lift**2 * gap.square().sum(),
            count=count,
        )
    return first


def strongest(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest singular values of X and their right singular vectors: (k,) and (k, d); fewer if X has fewer.

    Exact by `torch.linalg.svd` for small X. Else randomised, with 2 k directions and private random numbers: the same
    X gives the same answer, and the global generator is not drawn from.

    Args:
        X: (m, d).
        k: how many.

    Reference:
        Halko et al., Finding structure with randomness, SIAM Review 2011, algorithms 4.4 and 5.1 (remembered).
    """
    m, d = X.shape
    if min(m, d) > max(_SMALL, 4 * k):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(d, 2 * k, generator=generator, dtype=X.dtype).to(X.device)
        basis = torch.linalg.qr(X @ start).Q
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(X @ torch.linalg.qr(X.mT @ basis).Q).Q
        X = basis.mT @ X
    elif m > d:
        X = torch.linalg.qr(X, mode="r").R  # the left vectors, which nobody wants, are most of the work
    _, S, V = torch.linalg.svd(X, full_matrices=False)
    S, V = S[:k], V[:k]
    # A vector's sign is anybody's choice: here its largest entry is positive, on every process and in every batch.
    largest = V.gather(1, V.abs().argmax(1, keepdim=True)) if len(V) else V
    return S, torch.where(largest < 0, -V, V)
