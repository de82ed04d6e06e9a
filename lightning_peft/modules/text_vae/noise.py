"""Random numbers of a variational autoencoder: private, alike on all processes, and known from the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class PrivateDropout(nn.Module):
    """Dropout that draws from a generator of its own, if it is given one: see :func:`private`.

    torch's own draws from the global generator, whose state Lightning does not keep in a checkpoint.

    Args:
        p: share of the entries that become 0 in training.

    Raises:
        ValueError: p is outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout={p}: it is a share of the entries, at least 0 and below 1.")
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The input with some entries 0 and the others 1 / (1 - p) times as large; in evaluation the input."""
        if not self.training or self.p == 0:
            return x
        return x * torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


@contextmanager
def private(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Let every PrivateDropout inside draw from this generator within the block."""
    found = [part for part in module.modules() if isinstance(part, PrivateDropout)]
    for part in found:
        part.generator = generator
    try:
        yield
    finally:
        for part in found:
            part.generator = None  # a generator can be neither copied nor pickled


def generator_of(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on these numbers alone, such as seed, epoch, batch and purpose.

    So no state has to be kept: a resumed run draws at each step what the uninterrupted one did.
    """
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator(device).manual_seed(seed)


def normal_rows(rows: int, width: int, generator: torch.Generator, rank: int = 0, world: int = 1) -> Tensor:
    """Standard normal numbers for this process's rows of the global batch: (rows, width), on the CPU.

    All processes draw for all rows, from generators that are alike, and each takes every `world`-th row, as
    :class:`~lightning_peft.modules.batching.LengthGrouped` shares out a batch: with several processes each sentence has
    the noise that it would have in one.
    """
    count = world * rows * width
    # In whole sixteens, of which torch makes its normal numbers: so a longer draw begins with the shorter one.
    drawn = torch.randn(-(-count // 16) * 16, generator=generator)[:count]
    return drawn.view(world * rows, width)[rank::world]
