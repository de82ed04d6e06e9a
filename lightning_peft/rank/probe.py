"""Probe: what is read of the layers before training, and what follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lightning_peft.rank.budget import RankBudget, Site


class Processes(Protocol):
    """What a probe may ask of the other processes; all of them ask at the same time."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def rank(self) -> int:
        """The number of this one."""

    def gather(self, value: Any) -> list[Any]:
        """The plain values or tensors of all, by rank."""

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of all, the same bits everywhere."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all, the same bits everywhere; exact where all but one have zeros."""

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter in one piece, where it is sharded."""

    def like(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A value that everyone has in one piece, sharded as the parameter is."""


class Alone:
    """One process."""

    count = 1
    rank = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def like(self, value: Tensor, parameter: Tensor) -> Tensor:
        return value


class Probe(ABC):
    """Listen to adapted layers for a few batches, then act once on their adapters.

        begin -> (see ... see -> fold) for every batch -> act

    What is driven by :class:`lightning_peft.Calibration`, and by a few lines without a Trainer. Every process sees its
    own batches; in `fold` or `act` what they have seen is brought together, so that all of them act alike.

    Attributes:
        reads: what :meth:`see` gets: "inputs" of layers, or "gradients" of their outputs as well; or "samples", which
            is both, with the samples of a batch kept apart.
        weights: whether it reads or fills what is as large as the base's weights.
    """

    reads: Literal["inputs", "gradients", "samples"]
    weights: ClassVar[bool] = False

    @abstractmethod
    def begin(self, budget: RankBudget, processes: Processes) -> None:
        """Start anew on these adapters.

        Raises:
            RuntimeError: the probe cannot act on one of them.
        """

    @abstractmethod
    def wanted(self) -> Collection[str]:
        """The layers that are still to be listened to; none when enough has been seen."""

    @abstractmethod
    def see(self, layer: str, x: Tensor, rows: Callable[[], Tensor], gradient: Callable[[], Tensor] | None) -> None:
        """A layer was called. To a probe of samples: it was called in this batch, once or several times.

        Args:
            layer: its name in the budget.
            x: what it was called with, the first time; layers that share an input are called with the same object.
            rows: gives (n, d_in), what the layer's (d_out, d_in) matrix multiplies, a row per position that counts. To
                a probe of samples (samples, n, d_in): all positions and calls of each, since its gradient is their sum.
            gradient: gives (n, d_out) or (samples, n, d_out), the loss's gradient by what it multiplies to; ``None`` if
                `reads` is "inputs".
        """

    def fold(self) -> None:  # noqa: B027  # most need none
        """A batch is over, on all processes."""

    @abstractmethod
    def act(self) -> dict[str, Tensor]:
        """Fill the adapters in place.

        Returns:
            The components that are to stay open: layer -> (n,) bool, on the CPU, for every layer.
        """

    @abstractmethod
    def unseen(self) -> list[str]:
        """Layers of which nothing was seen, so that the start of their adapters owes nothing to data."""

    def report(self) -> str:
        """What was found, in a sentence; empty for nothing."""
        return ""


def require_untrained(budget: RankBudget, by: str) -> None:
    """Check that all adapters are low-rank ones whose update is still zero.

    Raises:
        RuntimeError: one is not, so that filling its factors would lose what it has learned.
    """
    for name, site in budget.items():
        adapter = site.adapter
        kind = type(adapter).__name__
        if not {"A", "B"} <= {part for part, _ in adapter.own_parameters()}:
            raise RuntimeError(f"{by} fills the factors A and B of low-rank adapters, and {kind} at {name!r} has none.")
        if bool(((adapter.B.detach() * site.gate.value().detach()) != 0).any()):
            raise RuntimeError(
                f"the adapter at {name!r} has been trained: its update is not zero, and {by} would put a new start in "
                "its place. Take the calibration out, or eject the adapters and inject new ones."
            )


def first_open(site: Site, rank: int) -> Tensor:
    """The mask of the first `rank` components: (n,) bool on the CPU."""
    return torch.arange(len(site.gate)) < rank
