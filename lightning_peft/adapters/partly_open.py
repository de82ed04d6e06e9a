"""PartlyOpen: adapters that start with some of their components, and room for more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.arguments import require_integer


@dataclass(frozen=True)
class PartlyOpen:
    """Build adapters of which only the first components are open, for a policy that opens more as training goes on.

    All tensors are there from the start, so that neither structure nor optimizer changes when rank grows. A component
    that has never been open has had no gradient: its weights are as they were built, but for weight decay and for terms
    that look at all of them, and an optimizer's averages of it are zero.

    Args:
        adapter: builds the adapter, with as many components as a layer may ever have: `partial(AdaLoRA, rank=16)`.
        rank: how many are open at the start.

    Raises:
        ValueError: rank is negative; or, when a layer is adapted, more than there are.

    Example:
        >>> from functools import partial
        >>> from lightning_peft import LoRA
        >>> PartlyOpen(partial(LoRA, rank=4), rank=1)(nn.Linear(8, 8)).gate.mask
        tensor([1., 0., 0., 0.])
    """

    adapter: AdapterFactory
    rank: int = 1

    def __post_init__(self) -> None:
        require_integer("rank", self.rank)
        if self.rank < 0:
            raise ValueError(f"rank is how many components are open at the start, at least 0. Got {self.rank}.")

    def __call__(self, base: nn.Module) -> Adapter:
        adapter = self.adapter(base)
        if adapter.gate is None:
            raise TypeError(f"{type(adapter).__name__} has no gate, so it cannot start with some of its components.")
        if self.rank > len(adapter.gate):
            raise ValueError(
                f"rank={self.rank} components were to be open at the start, and {type(adapter).__name__} was built "
                f"with {len(adapter.gate)}: start with fewer, or build it with more."
            )
        adapter.gate.start_with(self.rank)
        return adapter
