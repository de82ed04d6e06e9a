"""How much of some features is left in others: information between rows, by a critic that nobody has to train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from lightning_peft.functional.mutual_information import info_nce


def kept_information(before: Tensor, after: Tensor, temperature: float = 0.1, chunk: int = 16) -> Tensor:
    """What each layer's features tell of the same examples' features before, in nats, by InfoNCE.

        s_ij = cos( before_i, after_j ) / temperature,    the mean of both directions

    A lower bound whatever the critic, with the ceiling ln N; equal features do not reach it where examples are alike.

    Args:
        before: (L, N, d).
        after: (L, N, d).
        temperature: of the cosines.
        chunk: layers whose scores, (N, N), are in memory at once.

    Returns:
        (L,), in float32 at least.

    Raises:
        ValueError: shapes are not alike, or there are fewer than 2 examples.
    """
    if before.dim() != 3 or before.shape != after.shape or before.shape[1] < 2:
        raise ValueError(
            "features before and after must both be (L, N, d), of at least 2 examples. Got "
            f"{tuple(before.shape)} and {tuple(after.shape)}."
        )
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    found = []
    for one, other in zip(before.split(chunk), after.split(chunk), strict=True):
        x, z = F.normalize(one.to(wide), dim=2), F.normalize(other.to(wide), dim=2)
        found.append(vmap(lambda scores: info_nce(scores, symmetric=True))(x @ z.mT / temperature))
    return torch.cat(found)
