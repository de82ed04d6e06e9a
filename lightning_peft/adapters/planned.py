"""PlannedFactory: what builds adapters after a look at all the layers that get one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from torch import nn

from lightning_peft.adapters.base import Adapter, AdapterFactory


class PlannedFactory(ABC):
    """Build adapters whose sizes depend on the whole module: on what else is adapted, or on how large the base is.

    :func:`lightning_peft.inject` tells it the module and the layers that were chosen, before the first is built.

    Attributes:
        kind: the class of the adapters.
    """

    kind: ClassVar[type[Adapter]]

    def usual(self, module: nn.Module) -> Sequence[str] | None:
        """Patterns of the layers to adapt where nobody names any; ``None``, the default, for what is usual.

        Raises:
            ValueError: the module has none of them.
        """
        return None

    @abstractmethod
    def planned(self, module: nn.Module, layers: Mapping[str, nn.Module], head: Collection[str]) -> AdapterFactory:
        """What builds the adapters of these layers.

        Args:
            module: without adapters yet.
            layers: those that were chosen, by name.
            head: names of the parameters of the task's head.

        Raises:
            ValueError: they do not fit what is asked for.
        """

    def __call__(self, base: nn.Module) -> Adapter:
        raise TypeError(
            f"{type(self).__name__} plans over all layers of a module: give it to inject or AdapterInjection, or build "
            f"{self.kind.__name__} around this one layer."
        )
