"""LoRA: low-rank adaptation (Hu et al., 2021)."""

from __future__ import annotations

from math import sqrt

import torch
from torch import nn

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.rank.gate import Gate


class LoRA(LowRank):
    """Low-rank adaptation.

        y = W x + b + (alpha / r) B diag(m) A drop(x)

    A: (r, d_in), uniform in +-1/sqrt(d_in). B: (d_out, r), zero, so that training starts from the base model.
    m: (r,), the gate's mask. A and B are trained, W and b are frozen.

    Args:
        base: Linear, Conv1d, Conv2d, Conv3d, Embedding or transformers' Conv1D layer; frozen and kept.
        rank: number of components r; at most min(d_in, d_out).
        alpha: update scale; the update is multiplied by alpha / r, with the rank given here.
        dropout: probability of dropout on the adapter's input, while training.

    Shape:
        x: (..., d_in) -> (..., d_out); for an embedding (...) indices -> (..., d_out);
        for a convolution ([N,] c_in, *places) -> ([N,] d_out, *places), with d_in = c_in / groups * prod(kernel)

    Raises:
        TypeError: the layer is of a kind that cannot be adapted.
        ValueError: rank, alpha or dropout is out of range.

    Reference:
        Hu et al., LoRA, 2021, arXiv 2106.09685, eq. 3. Departure: A starts uniform as in the authors' code
        (`kaiming_uniform_` with a = sqrt 5), not Gaussian as in the text; on an embedding too, where their code starts
        with A = 0 and B Gaussian. The mask is ours: it lets any rank policy drive the method.

    Example:
        >>> LoRA(nn.Linear(8, 4), rank=2).effective_weight().shape
        torch.Size([4, 8])
    """

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
        super().__init__(base, rank, alpha, dropout)

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        return Gate(self.rank, cost=d_in + d_out).to(self.A.device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / sqrt(self.A.shape[1])
        self.A.uniform_(-bound, bound)
        self.B.zero_()
