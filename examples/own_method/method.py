"""A method that lightning_peft does not have: singular values of the frozen weights, tuned one by one."""

import torch

from lightning_peft import Gate, LowRank
from lightning_peft.adapters.layers import matrix


class SingularValues(LowRank):
    """Tune the largest singular values of a frozen weight W = U S V'.

        y = W x + b + (alpha / r) U_r diag(c m) V_r' drop(x)

    A = V_r': (r, d_in), B = U_r: (d_out, r), frozen. c: (r,), zero, the gate's gain and all that is trained.
    m: (r,), the gate's mask: a component is a singular direction.

    Reference:
        Lingam et al., SVFT, NeurIPS 2024, arXiv 2405.19597, the plain variant (remembered). Departures: the r largest
        singular values, not all; scaled by alpha / r; a rank policy may close directions.
    """

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        return Gate(self.rank, cost=d_in + d_out, gain=torch.zeros_like(self.A[:, 0]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        U, _, Vh = torch.linalg.svd(matrix(self.base).to(self.A.dtype), full_matrices=False)
        self.A.copy_(Vh[: self.rank]).requires_grad_(False)
        self.B.copy_(U[:, : self.rank]).requires_grad_(False)
        self.gate.gain.zero_()
