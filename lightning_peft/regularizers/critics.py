"""Critics: networks T(x, z) that tell pairs which belong together from pairs which do not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.arguments import require_integer
from lightning_peft.regularizers.wide import Wide


class Critic(Wide, ABC):
    """T(x, z), for all pairs of two batches: forward(x, z) -> scores, scores[i, j] = T(x_i, z_j).

    At the start all scores are 0, so every estimate of information is; the gradient is not. Computed in float32 at
    least, also under autocast and in a model of lower precision.

    To write one, give :meth:`scores`, and set to zero what is multiplied last.

    Args:
        d_x: width of x.
        d_z: width of z.

    Shape:
        x (N, d_x), z (M, d_z) -> (N, M).

    Raises:
        ValueError: a size is below 1; in `forward`, features are of another width.
    """

    def __init__(self, d_x: int, d_z: int) -> None:
        super().__init__()
        _require_sizes(d_x=d_x, d_z=d_z)
        self.d_x, self.d_z = d_x, d_z

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        flat = x.dim() == 2 and z.dim() == 2
        if not flat or (x.shape[1], z.shape[1]) != (self.d_x, self.d_z):
            advice = "make it of these widths" if flat else "pool sequences to one row per example"
            raise ValueError(
                f"this {type(self).__name__} compares rows of {self.d_x} features with rows of {self.d_z}. Got shapes "
                f"{tuple(x.shape)} and {tuple(z.shape)}: {advice}."
            )
        dtype = self.computes_in(x, z)
        with torch.autocast(x.device.type, enabled=False):
            return self.scores(x.to(dtype), z.to(dtype))

    @abstractmethod
    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        """(N, d_x), (M, d_z) -> (N, M)."""

    @property
    def stackable(self) -> bool:
        """Whether several of its kind may be computed in one pass over stacked parameters.

        Not where something draws random numbers, has buffers or is computed again: no, unless a class says otherwise of
        itself.
        """
        return False


CriticFactory: TypeAlias = Callable[[int, int], Critic]
"""Makes a critic of the widths of x and z: a class, or `functools.partial(SeparableCritic, width=64)`."""


class ConcatCritic(Critic):
    """T(x, z) = MLP([x; z]), d_x + d_z -> hidden -> hidden -> 1, ReLU.

    The first layer is W_x x + W_z z, once per row, so no pair is ever written out. What is left are N M passes through
    the second layer and N M hidden activations, twice: for small batches, or with `chunk`.

    Args:
        d_x: width of x.
        d_z: width of z.
        hidden: width of both hidden layers.
        chunk: rows of x that are compared with all of z at a time. Their activations are then computed again in the
            backward pass and not kept. ``None`` for all at once.

    Reference:
        512 wide, default start with the last layer at zero: our choice.
    """

    def __init__(self, d_x: int, d_z: int, hidden: int = 512, chunk: int | None = None) -> None:
        super().__init__(d_x, d_z)
        _require_sizes(hidden=hidden, **({} if chunk is None else {"chunk": chunk}))
        self.chunk = chunk
        self.first, self.second = nn.Linear(d_x + d_z, hidden), nn.Linear(hidden, hidden)
        self.last = _zero(nn.Linear(hidden, 1))

    @property
    def stackable(self) -> bool:
        return type(self) is ConcatCritic and self.chunk is None

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        weight = self.first.weight
        of_x, of_z = F.linear(x, weight[:, : self.d_x], self.first.bias), F.linear(z, weight[:, self.d_x :])
        if self.chunk is None or len(x) <= self.chunk:
            return self._rest(of_x, of_z)
        return torch.cat(
            [
                checkpoint(self._rest, rows, of_z, use_reentrant=False, preserve_rng_state=False)
                for rows in of_x.split(self.chunk)
            ]
        )

    def _rest(self, of_x: Tensor, of_z: Tensor) -> Tensor:
        hidden = (of_x[:, None] + of_z).relu_()
        scores: Tensor = self.last(self.second(hidden).relu_()).squeeze(-1)
        return scores


class SeparableCritic(Critic):
    """T(x, z) = f(x)^T g(z), two towers d -> hidden -> width, ReLU.

    N + M passes and one product: for large batches, and the default of terms on wide features.

    Args:
        d_x: width of x.
        d_z: width of z.
        hidden: of the towers.
        width: of f(x) and g(z).

    Reference:
        256 -> 128, and the last layer of g alone at zero (with both there would be no gradient): our choice.
    """

    def __init__(self, d_x: int, d_z: int, hidden: int = 256, width: int = 128) -> None:
        super().__init__(d_x, d_z)
        _require_sizes(hidden=hidden, width=width)
        self.f = nn.Sequential(nn.Linear(d_x, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.g = nn.Sequential(nn.Linear(d_z, hidden), nn.ReLU(), _zero(nn.Linear(hidden, width)))

    @property
    def stackable(self) -> bool:
        return type(self) is SeparableCritic

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        scores: Tensor = self.f(x) @ self.g(z).T
        return scores


class BilinearCritic(Critic):
    """T(x, z) = x^T W z.

    Args:
        d_x: width of x.
        d_z: width of z.

    Reference:
        The score of van den Oord et al., 2018, arXiv 1807.03748 (remembered).
    """

    def __init__(self, d_x: int, d_z: int) -> None:
        super().__init__(d_x, d_z)
        self.W = nn.Parameter(torch.zeros(d_x, d_z))

    @property
    def stackable(self) -> bool:
        return type(self) is BilinearCritic

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        return x @ self.W @ z.T


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        require_integer(name, size)
        if size < 1:
            raise ValueError(f"{name} must be at least 1. Got {size}.")
