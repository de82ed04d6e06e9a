"""Perturbations of embeddings that raise the loss: FGM (Miyato et al., 2017) and FreeLB (Zhu et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor


def ascend(delta: Tensor, gradient: Tensor, step: float, radius: float | None = None) -> Tensor:
    """One step up the loss, of every example by itself.

        delta' = P( delta + step g / ||g||_2 ),     P: onto the ball ||delta||_2 <= radius

    Norms are over all cells of an example. With delta = 0 and without a radius this is FGM's perturbation.

    Args:
        delta: (B, L, d).
        gradient: (B, L, d), of the loss with respect to delta; its scale does not matter.
        step: length of the step, in the unit of embeddings.
        radius: longest delta; ``None`` for no limit.

    Returns:
        (B, L, d) in float32, detached; an example whose gradient is 0 does not move.

    Reference:
        Miyato, Dai, Goodfellow, Adversarial training methods for semi-supervised text classification, ICLR 2017, arXiv
        1605.07725, eq. 5 (FGM); Zhu et al., FreeLB, ICLR 2020, arXiv 1909.11764, algorithm 1. Both remembered.
    """
    gradient = gradient.detach().float()
    smallest = torch.finfo(torch.float32).tiny
    moved = delta.detach().float() + step * gradient / _norm(gradient).clamp(min=smallest)
    if radius is None:
        return moved
    return moved * (radius / _norm(moved).clamp(min=smallest)).clamp(max=1.0)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return norm
