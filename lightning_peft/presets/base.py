"""Preset: the callbacks of one method, in the order that they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.adapters.layers import matrix, why_not
from lightning_peft.adapters.lora import LoRA
from lightning_peft.arguments import require_instance, require_integer
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, RankPruning, Regularization
from lightning_peft.rank.budget import Budget
from lightning_peft.rank.policy import RankPolicy
from lightning_peft.regularizers import DEM, Orthogonality, UntilTail
from lightning_peft.regularizers.dem import Normalizer


class Preset(list[Callback]):
    """The callbacks of one method, in the order that they need: `Trainer(callbacks=[*preset])`.

    A type of its own, so that the command line can tell a function that returns one from any other: the `peft` of a job
    takes whatever returns a Preset, yours too.
    """

    def __getattr__(self, name: str) -> Any:
        # A Trainer takes anything for a callback, and would say that a list has no attribute 'setup'.
        if hasattr(Callback, name):
            raise MisconfigurationException(
                "a preset is a list of callbacks, and was given to the Trainer as one callback. Unpack it: "
                "callbacks=[*preset, ...]."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def require_owner(owner: str, **options: object) -> None:
    """Check that no option was given of something that is not there.

    Args:
        owner: what they belong to, and why it is not there.
        options: by name; ``None`` where it was not given.

    Raises:
        ValueError: one was given.
    """
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if given:
        one = len(given) == 1
        raise ValueError(
            f"{', '.join(given)} {'belongs' if one else 'belong'} to {owner}: give that, or leave "
            f"{'this' if one else 'these'} out."
        )


def final_budget(final_rank: float | None, budget: Budget | None) -> Budget:
    """The budget of a preset that takes it as an average rank, 8 if nothing is given, or in another unit.

    Raises:
        TypeError: budget is no Budget.
        ValueError: both are given.
    """
    if budget is not None:
        require_instance("budget", budget, Budget, "Budget(share=0.5)")
    if final_rank is not None and budget is not None:
        raise ValueError(f"give final_rank or budget, not both. Got final_rank={final_rank}, budget={budget}.")
    return budget or Budget(rank=8 if final_rank is None else final_rank)


def falling_rank(
    final_rank: float | None, budget: Budget | None, initial_rank: int | None, start: Callable[[float], int]
) -> tuple[Budget, int]:
    """Where rank falls to, as :func:`final_budget` takes it, and how many components a layer has at the start.

    Args:
        final_rank: average rank per layer at the end.
        budget: the end in another unit.
        initial_rank: components per layer at the start; ``None`` for what the paper says.
        start: that, as a function of the final average rank.

    Raises:
        TypeError: budget is no Budget.
        ValueError: final_rank and budget are both given, or a budget other than a rank comes without `initial_rank`.
    """
    final = final_budget(final_rank, budget)
    if initial_rank is not None:
        return final, initial_rank
    if final.rank is None:
        raise ValueError(f"{final} does not say how many components to start with; give initial_rank as well.")
    return final, start(final.rank)


def falling_dora(
    adapter: AdapterFactory,
    policy: RankPolicy,
    tail: float,
    dem_weight: float,
    dem_normalizer: Normalizer,
    targets: Sequence[str] | None,
    train: Sequence[str] | None,
    compact: Literal["never", "final"],
) -> Preset:
    """The callbacks of dynamic DoRA's components, whatever adapter has them: rank that falls, and DEM until the tail.

    Raises:
        ValueError: dem_weight is negative.
    """
    if dem_weight < 0:
        raise ValueError(f"dem_weight is the weight of a penalty, at least 0. Got {dem_weight}.")
    callbacks: list[Callback] = [AdapterInjection(adapter, targets, train), RankPruning(policy, compact)]
    if dem_weight:
        callbacks.append(Regularization({"dem": DEM(UntilTail(dem_weight, tail), dem_normalizer)}))
    return Preset([*callbacks, RankMonitor(), AdapterCheckpoint()])


def orthogonal(weight: float) -> list[Callback]:
    """The callback of the penalty that keeps A and B orthonormal, in the form of AdaLoRA's code; none for weight 0.

    Raises:
        ValueError: the weight is negative.
    """
    if not weight >= 0:
        raise ValueError(f"orthogonality is the weight of a penalty, at least 0. Got {weight}.")
    return [Regularization({"orthogonality": Orthogonality(weight, form="norm")})] if weight else []


def capped_lora(rank: int, cap: int, alpha: float, dropout: float) -> AdapterFactory:
    """Builds LoRA with room for `cap` components per layer, or as many as the layer has, of which `rank` will be open.

    The update is multiplied by alpha / rank in every layer, whatever its cap and whatever stays open.
    """
    require_integer("rank", rank)
    if rank < 1:
        raise ValueError(f"rank is the average number of components per layer, at least 1. Got {rank}.")

    def build(layer: nn.Module) -> LoRA:
        room = cap if why_not(layer) else min(cap, *matrix(layer).shape)
        return LoRA(layer, room, alpha * room / rank, dropout)

    return build
