"""Orthogonality: keep the components of a low-rank adapter apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.regularizers.base import Regularizer, Weight, low_rank


def deviation(P: Tensor) -> Tensor:
    """Squared distance of the rows from an orthonormal set: (..., r, d) -> (...), |P P^T - I|_F^2."""
    gram = P @ P.mT
    eye = torch.eye(P.shape[-2], dtype=P.dtype, device=P.device)
    return (gram - eye).square().sum((-2, -1))


class Orthogonality(Regularizer):
    """Mean over layers of |A A^T - I|_F^2 + |B^T B - I|_F^2.

    Layers of equal shape are stacked, so that the graph has a few nodes per shape and not per layer.

    Args:
        weight: what the term is multiplied by; a number or a function of (step, total).

    Raises:
        RuntimeError: the module has no low-rank adapter.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512, eq. 4 (the squared norm, as in the text; HF PEFT and the
        authors' code take the norm itself).
    """

    def __init__(self, weight: Weight = 0.1) -> None:
        super().__init__(weight)

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        adapters = low_rank(module)
        if not adapters:
            raise RuntimeError("Orthogonality found no low-rank adapter in the module; inject adapters first.")
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        for adapter in adapters:
            for P in (adapter.A, adapter.B.mT):
                groups.setdefault(tuple(P.shape), []).append(P)
        return torch.stack([deviation(torch.stack(group)).sum() for group in groups.values()]).sum() / len(adapters)
