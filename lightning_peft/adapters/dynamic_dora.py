"""DoRA, dynamic low-rank adaptation (Mao et al., ACL 2024): rank-one components, scored by their share.

In the paper's order: the components (eq. 6), their score (eq. 7, 8), the budget's schedule (eq. 9), and `policy`, which
puts them together. The regularizer (eq. 10) is `lightning_peft.regularizers.DEM`. Not to be confused with the
weight-decomposed DoRA of Liu et al.
"""

from __future__ import annotations

from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.rank.budget import Budget, Site
from lightning_peft.rank.gate import Gate
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.policy import RankPolicy
from lightning_peft.rank.schedule import SlowCubic


class DynamicDoRA(LowRank):
    """Low-rank adaptation by rank-one components, each with a gain that can be pruned.

        y = W x + b + (alpha / R) B diag(c m) A drop(x)  =  W x + b + (alpha / R) sum_i c_i m_i b_i <a_i, drop(x)>

    A: (R, d_in), rows a_i, uniform in +-sqrt(6 / d_in). B: (d_out, R), columns b_i, uniform in +-sqrt(6 / R).
    c: (R,), zero, the gate's gain, so that training starts from the base model. m: (R,), the gate's mask.
    A, B and c are trained, W and b are frozen.

    Args:
        base: Linear, Conv1d, Conv2d, Conv3d, Embedding or transformers' Conv1D layer; frozen and kept.
        rank: number of components R at the start, 1.5 times the final average in the paper.
        alpha: update scale; the update is multiplied by alpha / R and never rescaled as components close.
        dropout: probability of dropout on the adapter's input, while training.

    Shape:
        x: (..., d_in) -> (..., d_out); for an embedding (...) indices -> (..., d_out);
        for a convolution ([N,] c_in, *places) -> ([N,] d_out, *places), with d_in = c_in / groups * prod(kernel)

    Raises:
        TypeError: the layer is of a kind that cannot be adapted.
        ValueError: rank, alpha or dropout is out of range.

    Reference:
        Mao et al., DoRA, ACL 2024, arXiv 2405.17357, eq. 6. alpha, dropout and the exact start are the authors' code's.
        Departure: closed for good is a mask here, where the code sets c to zero again after every step; the outputs are
        the same, and a closed component's gradient no longer counts when gradients are clipped.

    Example:
        >>> DynamicDoRA(nn.Linear(8, 4), rank=3).gate.gain
        Parameter containing:
        tensor([0., 0., 0.], requires_grad=True)
    """

    def __init__(self, base: nn.Module, rank: int = 12, alpha: float = 8.0, dropout: float = 0.1) -> None:
        super().__init__(base, rank, alpha, dropout)

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        # The authors count a component as the d_in + d_out numbers that an exported one has: c is folded into B.
        return Gate(self.rank, cost=d_in + d_out, gain=torch.zeros_like(self.A[:, 0]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound_a, bound_b = sqrt(6 / self.A.shape[1]), sqrt(6 / self.rank)
        self.A.uniform_(-bound_a, bound_a)
        self.B.uniform_(-bound_b, bound_b)
        if self.gate.gain is not None:
            self.gate.gain.zero_()


def component_shares(A: Tensor, B: Tensor, c: Tensor, eps: float = 1e-8) -> Tensor:
    """Each component's share of the norm of its layer's update, without forming the update.

        s_i = |c_i b_i a_i^T|_F / ( |sum_j c_j b_j a_j^T|_F + eps )
        |c_i b_i a_i^T|_F = |c_i| |a_i| |b_i|,     |sum_j c_j b_j a_j^T|_F^2 = c^T ( A A^T * B^T B ) c

    2 R^2 (d_in + d_out) multiplications per layer where the products have R d_out d_in numbers. A share can exceed 1
    when components cancel; a layer with one live component scores 1 for it.

    Args:
        A: (..., R, d_in).
        B: (..., d_out, R).
        c: (..., R), gain times mask.
        eps: keeps a layer whose update is zero at share 0.

    Returns:
        (..., R) shares. The scale of the update cancels.

    Reference:
        Mao et al., DoRA, ACL 2024, eq. 7; eps from the authors' code.
    """
    return _shares((A @ A.mT) * (B.mT @ B), c, eps)


def _shares(products: Tensor, c: Tensor, eps: float) -> Tensor:
    """Shares from the components' products, (..., R, R), or from their squared norms where they are orthogonal."""
    if products.dim() == c.dim():
        norms = products.sqrt() * c.abs()
        total = norms.square().sum(-1)
    else:
        norms = products.diagonal(dim1=-2, dim2=-1).sqrt() * c.abs()
        total = torch.einsum("...i,...ij,...j->...", c, products, c).clamp_min(0)
    return norms / (total.sqrt()[..., None] + eps)


class NormShare(Importance):
    """Running share of a component in the norm of its layer's update, from weights alone.

        worth <- beta worth + (1 - beta) s,     s = component_shares(A, B, c m)

    Pooled over all layers and compared directly, as in the paper: no weighing by a layer's size.

    Args:
        beta: how much of the running average is kept.
        eps: see :func:`component_shares`.

    Reference:
        Mao et al., DoRA, ACL 2024, eq. 7 and 8.
    """

    reads = "weights"

    def __init__(self, beta: float = 0.9, eps: float = 1e-8) -> None:
        super().__init__(beta)
        self.eps = eps

    def measure(self, group: list[Site]) -> Tensor:
        adapters: list[Any] = [site.adapter for site in group]
        c = torch.stack([site.gate.value() for site in group]).float()
        return _shares(type(adapters[0]).products(adapters).float(), c, self.eps)


def initial_rank(final_rank: float) -> int:
    """Components per layer at the start: ceil(1.5 r). Reference: section 4.3 of the paper (b(0) = 1.5 b(T))."""
    return ceil(1.5 * final_rank)


def policy(
    final: Budget,
    warmup: float = 0.15,
    tail: float = 0.5,
    interval: int = 10,
    beta: float = 0.9,
    eps: float = 1e-8,
    minimum: int = 0,
) -> RankPolicy:
    """The paper's policy: shares of the norm, slow-then-fast, soft until the tail begins and hard from then on.

        b(t) = b(0) - (b(0) - b(T)) q^3,    q = (t - t_i) / (T - t_f - t_i)

    Args:
        final: what may be spent at the end; `Budget(rank=r)` is the paper's.
        warmup: share t_i / T of the run before the first cut.
        tail: share t_f / T of the run after the last one.
        interval: optimizer steps between two cuts.
        beta: how much of the running average of the scores is kept.
        eps: see :func:`component_shares`.
        minimum: components that every layer keeps; 0 in the paper.

    Reference:
        Mao et al., DoRA, ACL 2024, eq. 9, algorithm 1. Departures, all where text and code differ or the code slips:
        the budget is the code's, since eq. 9 as printed never reaches b(T); exactly as many components are cut as it
        says, where the code cuts at least one and more on ties; steps are whole, where the code can cut twice at first.
    """
    return RankPolicy(SlowCubic(warmup, tail), NormShare(beta, eps), final, interval, soft=True, minimum=minimum)
