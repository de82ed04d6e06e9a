"""What a policy is that trains its masks: a module draws one per layer and step, and gradients reach it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_peft.rank.budget import RankBudget, Site
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.policy import Policy


class MaskSampler(nn.Module, ABC):
    """Draw a mask for every layer, with a gradient to what it is drawn from, and tell what it will keep.

    Layers with equally many components are a group, one row each, so that a group is one batched call.

    Args:
        layers: layer -> how many components it has, in the module's order.
    """

    def __init__(self, layers: Mapping[str, int]) -> None:
        super().__init__()
        self.layers = dict(layers)
        groups: dict[int, list[str]] = {}
        for name, n in layers.items():
            groups.setdefault(n, []).append(name)
        self.groups = groups
        """Number of components -> the layers that have so many."""

    @abstractmethod
    def masks(self, step: int) -> Sequence[Tensor]:
        """The masks of a step, by group: (L, K), exactly 0 or 1. Equal parameters and steps, equal masks."""

    @abstractmethod
    def probabilities(self) -> Sequence[Tensor]:
        """How often a component is kept, by group: (L, K), without noise."""

    def counts(self) -> Sequence[Tensor]:
        """How many components are kept on average, by group: (L,)."""
        return [rows.sum(1) for rows in self.probabilities()]

    def by_layer(self, groups: Sequence[Tensor]) -> dict[str, Tensor]:
        """What groups have for each layer, in the module's order; views."""
        rows = {
            name: row
            for names, group in zip(self.groups.values(), groups, strict=True)
            for name, row in zip(names, group.unbind(), strict=True)
        }
        return {name: rows[name] for name in self.layers}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskSampler:
        # It goes where the model goes, and stays as precise as it is: in 16 bits a small step would be lost.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class SamplingPolicy(Policy, ABC):
    """A policy whose components are kept or not by masks that a module draws, and that training moves.

    `RankSelection` drives it: the module is a child of the LightningModule, and masks are drawn before every step's
    forward. What :meth:`decide` finds without noise is in the gates' own masks, where it counts for everything that is
    not a training step.
    """

    @property
    @abstractmethod
    def sampler(self) -> MaskSampler | None:
        """What draws the masks; ``None`` before :meth:`build`."""

    @abstractmethod
    def build(self, budget: RankBudget) -> MaskSampler:
        """The module that draws for the adapters of `budget`: the one that is there, if it fits them, or a new one.

        Called before the strategy wraps the module; nothing of it depends on the global generator.

        Raises:
            ValueError: the adapters have no components that a mask can be learned for.
        """

    @abstractmethod
    def draw(self, step: int) -> None:
        """Draw the masks of a step into the gates; equal parameters and steps, equal masks.

        Raises:
            RuntimeError: the adapters are no longer those that the module was built for.
        """

    def clear(self) -> None:
        """Take the drawn masks out of the gates."""
        for site in self._budget.values():
            site.gate.drawn = None


class KeepProbability(Importance):
    """How often draws keep a component, found when it is asked for.

    Where nothing draws for a layer, its gate's own mask counts: 1 or 0.

    Attributes:
        sampler: what draws; ``None`` if nothing does.
    """

    reads = "nothing"

    def __init__(self) -> None:
        super().__init__(beta=0.0)
        self.sampler: MaskSampler | None = None

    def measure(self, group: list[Site]) -> Tensor:
        found = self._found(group)
        return torch.stack([found[site.name] for site in group])

    def scores(self) -> dict[str, Tensor]:
        return self._found([site for group in self._groups for site in group])

    @torch.no_grad()
    def _found(self, sites: list[Site]) -> dict[str, Tensor]:
        drawn = {} if self.sampler is None else self.sampler.by_layer(self.sampler.probabilities())
        rows = {site.name: drawn.get(site.name, site.gate.mask) for site in sites}
        # For a layer that was cut since, nothing draws any more.
        return {s.name: rows[s.name] if len(rows[s.name]) == len(s.gate) else s.gate.mask.clone() for s in sites}

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        return {}
