"""Mistakes in measuring information."""

from __future__ import annotations

import torch
from misuse.setups import Rows
from torch import Tensor

from lightning_peft.functional.club import club
from lightning_peft.functional.latent import active_units
from lightning_peft.functional.mutual_information import dv, info_nce, smile
from lightning_peft.metrics import MutualInformation


def scored_by(x: Tensor, z: Tensor, critic: object = None) -> object:
    metric = MutualInformation("dv", critic)  # type: ignore[arg-type]
    metric.update(x, z)
    return metric.compute()


ROWS: Rows = {
    "scores of each x with its own z alone": (lambda: dv(torch.zeros(8)), ValueError),
    "scores of views of different batches": (lambda: info_nce(torch.zeros(8, 4)), ValueError),
    "information of a single pair": (lambda: info_nce(torch.zeros(1, 1)), ValueError),
    "SMILE that clips everything": (lambda: smile(torch.zeros(8, 8), tau=0), ValueError),
    "CLUB of one density for each sample": (lambda: club(torch.zeros(8)), ValueError),
    "active units of a single example": (lambda: active_units(torch.zeros(1, 32)), ValueError),
    "CLUB as a number to report": (lambda: MutualInformation("club"), ValueError),
    "a misspelt estimator of information": (lambda: MutualInformation("infonce"), ValueError),
    "features that do not come in pairs": (lambda: scored_by(torch.zeros(8, 2), torch.zeros(6, 2)), ValueError),
    "a metric of information of one example": (lambda: scored_by(torch.zeros(1, 2), torch.zeros(1, 2)), RuntimeError),
    "a critic that scores no pairs but the given ones": (
        lambda: scored_by(torch.zeros(8, 2), torch.zeros(8, 2), lambda x, z: (x * z).sum(1)),
        ValueError,
    ),
}
